"""Training with sharded weights (FSDP2), and files of shards: torch.distributed.checkpoint in its safetensors form.

That form has no pickle, which the default one of torch.distributed.checkpoint has.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from biflow.distributed import Processes
from biflow.files import sync
from biflow.models.layers import Layer
from biflow.train.distributed import Losses, Parallel

FOLDER = "shards"  # in a checkpoint


class Sharded(Parallel):
    """Each process holds a part of every weight, moment and averaged weight; whole are those of a layer that computes.

    torch's `fully_shard` itself: Accelerate's FSDP2 takes no CPUs, on which this is tested.
    """

    keeps_casts = False  # or else each process has all layers in bf16 at once

    def trained(self, losses: Losses) -> nn.Module:
        return self._shard(losses)

    def averaged(self, losses: Losses) -> nn.Module:
        return self._shard(losses, reshard_after_forward=True)  # no backward pass will

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @torch.no_grad()
    def whole_model(self, model: nn.Module, *, keep: bool = True) -> nn.Module | None:
        state = {}
        for name, part in model.state_dict().items():
            tensor = self.whole(part)
            if keep:
                state[name] = tensor.cpu()
        if not keep:
            return None
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
            found = type(model)(model.config)
        found.to(next(iter(state.values())).dtype).load_state_dict(state)
        return found.eval().requires_grad_(False)

    def placed(self, value: Tensor, like: Tensor | None) -> Tensor:
        if not isinstance(like, DTensor) or isinstance(value, DTensor):
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None).clone()

    def write_shards(self, folder: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, object]]:
        return write_shards(folder, tensors, self.processes)

    def _shard(self, losses: Losses, **options) -> nn.Module:
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here writes in place
        mesh = init_device_mesh(self.processes.device.type, (self.processes.count,))
        for module in losses.modules():
            if isinstance(module, Layer):
                fully_shard(module, mesh=mesh)
        if losses.own is not None and any(True for _ in losses.own.parameters()):
            fully_shard(losses.own, mesh=mesh)  # it is also called beside the averaged weights
        return fully_shard(losses, mesh=mesh, **options)

    @contextlib.contextmanager
    def _sharing(self, losses: nn.Module, last: bool) -> Iterator[None]:
        losses.set_requires_gradient_sync(last)
        yield


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], processes: Processes
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Write the sharded ones of `tensors` to files in `folder`/shards, all processes together.

    Returns:
        The others; and for `check_shards` and `read_shards` the names, and the SHA-256 of each file.
    """
    sharded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    path = folder / FOLDER
    dcp.save(sharded, storage_writer=dcp.HuggingFaceStorageWriter(str(path), save_distributed=True))
    processes.wait()
    files = sorted(path.iterdir())
    for file in files[processes.rank :: processes.count]:
        sync(file)
    if processes.main:
        sync(path)
    digests = dict(processes.gather(_digests(files, processes)))
    rest = {name: tensor for name, tensor in tensors.items() if name not in sharded}
    return rest, {"tensors": sorted(sharded), "files": digests}


def check_shards(folder: Path, shards: Mapping[str, object], processes: Processes) -> None:
    """ValueError: a file in `folder`/shards is missing or not the one that was written. Each process looks at some."""
    wanted = shards["files"]
    path = folder / FOLDER
    missing = [name for name in wanted if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path / missing[0]}: expected a file of the checkpoint, got none")
    for name, found in _digests(sorted(path / name for name in wanted), processes):
        if found != wanted[name]:
            raise ValueError(
                f"{path / name}: the file is corrupted: expected SHA-256 {wanted[name][:12]}..., got {found[:12]}..."
            )


def read_shards(
    folder: Path, shards: Mapping[str, object], like: Mapping[str, Tensor], processes: Processes
) -> dict[str, Tensor]:
    """The tensors by name, each placed as that of `like`, sharded or whole, whatever wrote them. All together."""
    found = {name: torch.empty_like(like[name].detach()) for name in shards["tensors"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # alone: as it should be
        reader = dcp.HuggingFaceStorageReader(str(folder / FOLDER))
        dcp.load(found, storage_reader=reader, no_dist=processes.count == 1)
    return found


def _digests(files: list[Path], processes: Processes) -> list[tuple[str, str]]:
    """(name, SHA-256) of this process's share of the files."""
    found = []
    for path in files[processes.rank :: processes.count]:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
        found.append((path.name, digest.hexdigest()))
    return found
