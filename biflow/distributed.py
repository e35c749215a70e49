"""The processes that do one job together, as `torchrun`, `accelerate launch` or a scheduler starts them.

A process that was started alone is all of them: nothing is imported, connected or copied for it. Which process this is
only its launcher knows; that is what is read from the environment here, and nothing else.
"""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=30)  # of what all do at the same time: after that a process that hangs is noticed
PATIENCE = timedelta(days=7)  # how long processes wait for what one does alone, or for shares of work of any length
SENT = 1 << 28  # bytes at once
TASKS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "an MPI launcher"}  # how many were started, and by whom

_patient: dist.ProcessGroup | None = None  # all processes once more, with PATIENCE


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
        counts = self._all(len(rows), _patient)
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
        """Until all processes are here, for days if need be; one that dies ends the wait of the others."""
        if self.count > 1:
            dist.barrier(_patient)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The body runs in the main process, then in the others, which find the files that it wrote."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def _all(self, value: Any, group: dist.ProcessGroup | None = None) -> list:
        values = [None] * self.count
        dist.all_gather_object(values, value, group)
        return values

    def _reduced(self, values: Tensor, operation: dist.ReduceOp) -> Tensor:
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values, operation)
        return values


def join(device: str | torch.device = "cpu") -> Processes:
    """The processes of this job; the first call connects them: gloo between CPUs, NCCL between GPUs.

    There are several under torchrun, and where WORLD_SIZE in the environment is above 1 (torch's env://: beside it
    RANK, MASTER_ADDR, MASTER_PORT, and with GPUs LOCAL_RANK).

    device: "cpu", or "cuda": each process gets the GPU of its number on its machine, which becomes torch's current one.

    Raises:
        ImportError: several processes, and accelerate is not there. ValueError: several processes, and a GPU with a
        number; more processes on this machine than it has GPUs; one of several tasks of srun or mpirun that are not
        told how to connect.
    """
    global _patient
    where = torch.device(device)
    if not (dist.is_initialized() or _one_of_several(where)):
        return Processes(0, 1, where)
    if not dist.is_initialized():
        _import_before_connecting()
        dist.init_process_group("gloo" if where.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
        _patient = None
    if dist.get_world_size() == 1:
        return Processes(0, 1, where)
    if _patient is None:
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
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
    global _patient
    if dist.is_initialized():
        gc.collect()  # a DistributedDataParallel is a cycle that holds the group
        dist.barrier()
        _patient = None
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(device: str | torch.device = "cpu") -> Iterator[Processes]:
    """`join`, and leave at the end. After an error not: the others may be beyond answering."""
    yield join(device)
    leave()


def _one_of_several(where: torch.device) -> bool:
    """Whether whoever started this process started others beside it; errors as `join`."""
    if dist.is_torchelastic_launched():
        return True
    count = os.environ.get("WORLD_SIZE")
    if count is None:
        tasks, launcher = _tasks()
        if tasks > 1:
            raise ValueError(
                f"WORLD_SIZE: expected in the environment of each of {tasks} tasks that {launcher} started, got none: "
                "each would do the whole job. Start one torchrun a machine, or export RANK, WORLD_SIZE, LOCAL_RANK, "
                "MASTER_ADDR and MASTER_PORT in each task (docs/distributed.md); WORLD_SIZE=1 if each has a job of "
                "its own"
            )
        return False
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"WORLD_SIZE: expected the number of processes in the environment, got {count!r}")
    if int(count) == 1:
        return False
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", *(("LOCAL_RANK",) if where.type != "cpu" else ())):
        if name not in os.environ:
            what = "the process's number on its machine, for its GPU, " if name == "LOCAL_RANK" else ""
            raise ValueError(f"{name}: expected {what}in the environment beside WORLD_SIZE={count}, got none")
    return True


def _tasks() -> tuple[int, str]:
    """How many tasks like this one a scheduler started, and which."""
    found = {name: os.environ.get(name, "") for name in TASKS}
    # srun's: what salloc or sbatch run is no step, and one shell of `srun --pty` is what a user sits at
    if {"SLURM_STEP_ID", "SLURM_PROCID"} <= os.environ.keys() and "SLURM_PTY_PORT" not in os.environ:
        found["srun"] = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")
    tasks, name = max((int(count) if count.isdecimal() else 1, name) for name, count in found.items())
    return tasks, TASKS.get(name, name)


def _import_before_connecting() -> None:
    """The modules whose functions take the group of their import as a default argument, and keep it for ever."""
    import torch.distributed.fsdp.sharded_grad_scaler
    import torch.distributed.nn.functional
    import torch.distributed.optim  # noqa: F401


def _bytes(rows: Tensor) -> tuple[Tensor, ...]:
    """Views of contiguous rows as pieces that are sent at once; of no rows, none."""
    return rows.view(-1).view(torch.uint8).split(SENT) if rows.numel() else ()
