"""The processes that do one job together, as `torchrun` and `accelerate launch` start them.

A process that was started alone is all of them: nothing is imported, connected or copied for it.
"""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WAIT = timedelta(hours=2)  # how long the others wait for what one does alone, such as training a small encoder
SENT = 1 << 28  # bytes at once


@dataclass(frozen=True)
class Processes:
    """Which of the job's processes this one is. Methods that talk to the others are called by all, in the same order.

    rank, count: number of this process, from 0, and of all. device: where it computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether it is the one that writes files and talks to the user."""
        return self.rank == 0

    def split(self, n: int) -> range:
        """This process's share of 0 ... n - 1: consecutive, ascending with the rank, sizes differ by 1 at most."""
        return range(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """The rows (n_r,...) of all processes r, one after the other, on the main one's CPU; None on the others.

        Same dtype and shape but for n_r, which may be 0: after work on `split(n)`, what a single process would have.
        """
        rows = rows.detach().cpu().contiguous()
        if self.count == 1:
            return rows
        counts = self._all(len(rows))
        if not self.main:
            for part in _bytes(rows):
                dist.send(part, 0)
            return None
        found = rows.new_empty(sum(counts), *rows.shape[1:])
        found[: len(rows)] = rows
        start = len(rows)
        for rank, count in enumerate(counts[1:], 1):
            for part in _bytes(found[start : start + count]):
                dist.recv(part, rank)
            start += count
        return found

    def gather(self, items: list) -> list:
        """The items of all processes, by rank, on all of them. They travel pickled: small ones, from our own code."""
        return items if self.count == 1 else [item for part in self._all(items) for item in part]

    def same(self, value: Any) -> Any:
        """The main process's value."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return number if self.count == 1 else int(self._reduced(torch.tensor(number), dist.ReduceOp.MAX))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in fp64 on the CPU; the same bits on all of them."""
        return self._reduced(values.detach().to("cpu", torch.float64), dist.ReduceOp.SUM)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            self._all(None)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The body runs in the main process, then in the others, which find the files that it wrote."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def _all(self, value: Any) -> list:
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def _reduced(self, values: Tensor, operation: dist.ReduceOp) -> Tensor:
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values, operation)
        return values


def join(device: str | torch.device = "cpu") -> Processes:
    """The processes of this job; the first call connects them: gloo between CPUs, NCCL between GPUs.

    device: "cpu", or "cuda": each process gets the GPU of its number on its machine, which becomes torch's current one.

    Raises:
        ImportError: several processes, and accelerate is not there. ValueError: several processes, and a GPU with a
        number; more processes on this machine than it has GPUs.
    """
    where = torch.device(device)
    if not (dist.is_initialized() or dist.is_torchelastic_launched()):
        return Processes(0, 1, where)
    if not dist.is_initialized():
        _import_before_connecting()
        dist.init_process_group("gloo" if where.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=WAIT)
    if dist.get_world_size() == 1:
        return Processes(0, 1, where)
    if where.type != "cpu" and where.index is not None:
        raise ValueError(f"device: expected 'cuda' in a job of several processes, one GPU each; got {str(where)!r}")
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError(
            "expected accelerate in a job of several processes, which cannot be imported "
            f"({error}): pip install 'biflow[distributed]'"
        ) from error
    state = PartialState(cpu=where.type == "cpu")
    return Processes(state.process_index, state.num_processes, state.device)


def leave() -> None:
    """The end of the common work, and of the group's threads: one that still lets go of a Python object while the
    interpreter ends would abort the process. After FSDP2, whose caches keep the group, they have at least let go.
    """
    if dist.is_initialized():
        gc.collect()  # a DistributedDataParallel is a cycle that holds the group
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(device: str | torch.device = "cpu") -> Iterator[Processes]:
    """`join`, and leave at the end. After an error not: the others may be beyond answering."""
    yield join(device)
    leave()


def _import_before_connecting() -> None:
    """The modules whose functions take the group of their import as a default argument, and keep it for ever."""
    import torch.distributed.fsdp.sharded_grad_scaler
    import torch.distributed.nn.functional
    import torch.distributed.optim  # noqa: F401


def _bytes(rows: Tensor) -> tuple[Tensor, ...]:
    """Views of contiguous rows as pieces that are sent at once; of no rows, none."""
    return rows.view(-1).view(torch.uint8).split(SENT) if rows.numel() else ()
