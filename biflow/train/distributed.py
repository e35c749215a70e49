"""How a step of training is spread over processes and micro-batches. One process goes the same way, without wrappers.

Decisions behind it: docs/decisions/0023.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from biflow.config import check_fields
from biflow.distributed import Processes
from biflow.ops._checks import check_choice
from biflow.train.draws import BatchGenerator

if TYPE_CHECKING:
    from biflow.train.configs import FlowTraining, InverseTraining
    from biflow.train.trainer import Objective

PARALLEL_STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread; a resumed run may change it. What a step sees does not depend on it (docs/distributed.md).

    strategy: of several processes. "ddp": each has the whole model. "fsdp": weights, moments and averaged weights are
        sharded (FSDP2).
    accumulate: micro-batches that a process computes one after the other. optim.batch_size has to be a multiple of it
        times the number of processes.
    """

    strategy: str = "ddp"
    accumulate: int = 1

    def __post_init__(self):
        check_fields(self)
        check_choice("strategy", self.strategy, PARALLEL_STRATEGIES)
        if self.accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {self.accumulate}")


def check_parallel(config: "FlowTraining | InverseTraining", name: str, other_networks: bool) -> None:
    """ValueError: micro-batches of different sizes; compiled and sharded; fp64 where samples are drawn, or where the
    loss has other networks, by the field `name`."""
    if config.optim.batch_size % config.parallel.accumulate:
        raise ValueError(
            f"optim.batch_size: expected a multiple of parallel.accumulate {config.parallel.accumulate}, "
            f"got {config.optim.batch_size}"
        )
    if config.run.compile and config.parallel.strategy == "fsdp":
        raise ValueError("run.compile: expected false with parallel.strategy fsdp, whose hooks break graphs; got true")
    if config.run.precision == "fp64" and config.run.sample_every is not None:
        raise ValueError("run.sample_every: expected None with run.precision fp64, which sampling does not take")
    if config.run.precision == "fp64" and other_networks:
        raise ValueError(f"run.precision: expected fp32 or bf16 with {name}, whose networks are fp32; got 'fp64'")


class Losses(nn.Module):
    """An objective's loss of a model as the call of a module, which is where DDP and FSDP have their hooks.

    objective: of which the own module is trained beside the model, and is a part of this one; trained: whether it is.
    """

    def __init__(self, model: nn.Module, objective: "Objective", *, trained: bool):
        super().__init__()
        self.model, self.own = model, objective.module if trained else None
        self.objective = objective

    def forward(
        self, x: Tensor, y: Tensor | None, generator: torch.Generator, *, training: bool, rows: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`Objective.loss`."""
        return self.objective.loss(self.model, x, y, generator, training=training, rows=rows)


class Parallel:
    """One process.

    own: which rows of a global batch are this process's.
    keeps_casts: whether autocast may keep what it made of weights until the loss is there.

    ValueError: a batch that does not divide into equal parts.
    """

    keeps_casts = True

    def __init__(self, config: ParallelConfig, processes: Processes, batch_size: int):
        parts = processes.count * config.accumulate
        if batch_size % parts:
            raise ValueError(
                f"optim.batch_size: expected a multiple of {parts} ({processes.count} processes x parallel.accumulate "
                f"{config.accumulate}), got {batch_size}"
            )
        self.accumulate, self.processes, self.batch_size = config.accumulate, processes, batch_size
        self.own = processes.split(batch_size)

    def trained(self, losses: Losses) -> nn.Module:
        """What is called in the place of `losses`, whose gradients it makes the global batch's; before an optimizer."""
        return losses

    def averaged(self, losses: Losses) -> nn.Module:
        """The same of the averaged weights, which have no gradients."""
        return losses

    def micro_batches(self, losses: nn.Module, generator: BatchGenerator) -> Iterator[slice]:
        """Which of the own rows come next, with the generator where the step began; gradients add up in between.

        losses: as `trained` returned it.
        """
        count, state = len(self.own) // self.accumulate, generator.get_state()
        for k in range(self.accumulate):
            if k:
                generator.set_state(state)
            generator.part = (self.own.start + k * count, self.batch_size) if count < self.batch_size else None
            with self._sharing(losses, last=k == self.accumulate - 1):
                yield slice(k * count, (k + 1) * count)
        generator.part = None

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """By name, the mean over processes."""
        if self.processes.count == 1:
            return values
        total = self.processes.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, (total / self.processes.count).tolist(), strict=True))

    def mean_tensor(self, value: Tensor) -> Tensor:
        """The mean over processes, where and of the dtype that `value` is; on a GPU the host waits for nothing."""
        if self.processes.count == 1:
            return value
        total = value.detach().to(torch.float64, copy=True)
        dist.all_reduce(total)
        return (total / self.processes.count).to(value)

    def clip(self, parameters: list[nn.Parameter], largest: float | None) -> Tensor:
        """Scale the gradient to an L2 norm of at most `largest` (None: as it is); returns what its norm was, a scalar
        where the gradient is."""
        return self.whole(torch.nn.utils.clip_grad_norm_(parameters, largest or math.inf))

    def whole(self, tensor: Tensor) -> Tensor:
        """The tensor of which this process may hold a part; all processes ask together."""
        return tensor

    def whole_model(self, model: nn.Module, *, keep: bool = True) -> nn.Module | None:
        """The model, unsharded; all processes ask together. keep: else None, and no memory."""
        return model if keep else None

    def placed(self, value: Tensor, like: Tensor | None) -> Tensor:
        """The part of a whole tensor that this process holds, as it holds that of `like`."""
        return value

    def write_shards(self, folder: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Write the sharded ones of a state's tensors; returns the others, and what the other two methods ask for."""
        return tensors, {}

    def check_shards(self, folder: Path, shards: dict[str, object]) -> None:
        """ValueError: a file of shards is not the one that was written."""
        from biflow.train import sharded

        sharded.check_shards(folder, shards, self.processes)

    def read_shards(self, folder: Path, shards: dict[str, object], like: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, each placed as that of `like`, whatever number of processes wrote them; all read together."""
        from biflow.train import sharded

        return sharded.read_shards(folder, shards, like, self.processes)

    @contextlib.contextmanager
    def _sharing(self, losses: nn.Module, last: bool) -> Iterator[None]:
        """Of a micro-batch: in the last one's backward pass gradients are averaged over processes."""
        yield


class Replicated(Parallel):
    """The whole model in each process: Accelerate's DistributedDataParallel."""

    def trained(self, losses: Losses) -> nn.Module:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, DistributedType

        # buffers move alike by themselves; with find_unused_parameters heads without a term are left alone, and buckets
        # never change, or else a resumed run would add gradients up in another order
        options = {"broadcast_buffers": False, "find_unused_parameters": True, "gradient_as_bucket_view": True}
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # the name that Accelerate knows
        self.accelerator = Accelerator(
            cpu=self.processes.device.type == "cpu",
            mixed_precision="no",  # run.precision is the trainer's
            kwargs_handlers=[DistributedDataParallelKwargs(**options)],
        )
        found = self.accelerator.distributed_type
        if found not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise ValueError(
                f"accelerate launch: expected plain processes (--multi_gpu), got {found.value}; parallel.strategy=fsdp "
                "shards a model"
            )
        return self.accelerator.prepare_model(losses)

    @contextlib.contextmanager
    def _sharing(self, losses: nn.Module, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self.accelerator.no_sync(losses):
            yield


def spread(config: ParallelConfig, processes: Processes, batch_size: int) -> Parallel:
    """`Parallel` for so many processes, with the strategy of `config`."""
    if processes.count == 1:
        return Parallel(config, processes, batch_size)
    if config.strategy == "fsdp":
        from biflow.train.sharded import Sharded

        return Sharded(config, processes, batch_size)
    return Replicated(config, processes, batch_size)


def rows_of(indices: Callable[[int], Tensor], own: range) -> Callable[[int], Tensor]:
    """step -> (n,) indices, restricted to the own rows."""
    return lambda step: indices(step)[own.start : own.stop]
