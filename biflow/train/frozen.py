"""Frozen networks that losses look through: where their weights come from, and what images look like to them.

Shared by perceptual terms (`backbones`) and representation alignment (`encoders`). Libraries are imported on demand.
"""

import contextlib
import importlib
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from biflow import checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


class Frozen(nn.Module):
    """A module in eval mode whose weights no gradient reaches.

    Args:
        module: it is frozen here.
        inputs: what it takes. "imagenet": three channels (gray is repeated) normalised by ImageNet's mean and standard
            deviation; "raw": the data's channels as they are, in [-1, 1] or latents.
    """

    def __init__(self, module: nn.Module, inputs: str):
        super().__init__()
        self.module, self.inputs = module, inputs
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, -1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        for part in module.modules():
            if getattr(part, "inplace", False):
                part.inplace = False  # it would overwrite what the layer before it gave

    def prepared(self, images: Tensor) -> Tensor:
        """Images (B,C,S,S) about [-1, 1] as the module takes them."""
        if self.inputs == "raw":
            return images
        return ((images.expand(-1, 3, -1, -1) + 1) / 2 - self.mean) / self.std


@contextlib.contextmanager
def building(who: str, seed: int) -> Iterator[None]:
    """Errors inside say for whom; weights that nobody sets are the same for every run of a seed."""
    kinds = (ImportError, FileNotFoundError, TypeError, ValueError)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    except kinds as error:
        kind = next(k for k in kinds if isinstance(error, k))
        raise kind(f"{who}: {error}") from error


def library(name: str, extra: str = "perceptual") -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch: its operators do not exist
        raise ImportError(
            f"expected {name}, which cannot be imported ({type(error).__name__}: {error}): "
            f"pip install 'biflow[{extra}]'; torchvision has to be the release made for the installed torch, "
            f"{torch.__version__}"
        ) from error


def with_weights(
    make: Callable[[bool], nn.Module],
    library: str,
    path: str | None,
    part: str = "",
    rename: Callable[[str], str] = str,
    option: str = "weights=PATH",
) -> nn.Module:
    """make(True), with the library's weights; or make(False) with those of submodule `part` read from the file.

    option: how the user names a file, for the error without a network.
    """
    if path is not None:
        model = make(False)
        load_weights(model.get_submodule(part), path, rename)
        return model
    try:
        return make(True)
    except Exception as error:  # the libraries' ways to fail at a download have nothing in common
        raise FileNotFoundError(
            f"expected weights in the cache of {library}, or a network to download them; got {type(error).__name__}: "
            f"{error}. Offline, give a file that was downloaded elsewhere: {option}"
        ) from error


def load_weights(module: nn.Module, path: str, rename: Callable[[str], str] = str) -> None:
    """Read the module's weights from a file of tensors by name. What else the file has, a head for one, is not read."""
    found = read_weights(Path(path).expanduser())
    wanted = module.state_dict()
    state = {}
    for own, tensor in wanted.items():
        name = rename(own)
        shape = tuple(found[name].shape) if name in found else None
        if shape != tuple(tensor.shape):
            got = f"none of that name but {', '.join(list(found)[:3])}, ..." if shape is None else str(shape)
            raise ValueError(f"{path}: expected a tensor {name!r} of shape {tuple(tensor.shape)}, got {got}")
        state[own] = found[name]
    module.load_state_dict(state)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .safetensors or torch.save file by name. FileNotFoundError; ValueError: not a state dict."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        found = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        # torch's own text on what needs unpickling is the advice to trust the file
        why = "one that would have to be unpickled" if isinstance(error, pickle.UnpicklingError) else error
        raise ValueError(f"{path}: expected .safetensors or a state dict written by torch.save, got {why}") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: expected a state dict, tensors by name; got {type(found).__name__}")
    return found


def named(name: str, weights: str | None, field: str) -> nn.Module:
    """The module that the function `name`, "package.module:function", returns, with the weights of a file if given.

    field: what errors call the setting. TypeError: it returns something else. ValueError: no such function.
    """
    where, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(where), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field}: expected a function that can be imported, got {name!r}: {error}") from error
    module = function()
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}(): expected a torch.nn.Module, got {type(module).__name__}")
    if weights is not None:
        load_weights(module, weights)
    return module


def trained_once(
    module: nn.Module,
    train: Callable[[nn.Module], Mapping[str, Any]],
    path: Path | None,
    kind: str,
    made_from: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Let `train` train the module and keep it in `path`, or read what an earlier sitting of the run kept there.

    Args:
        train: returns metadata to keep beside the weights. path: None: nothing is kept.
        kind: of file; its last word is what messages call it.
        made_from: what the weights depend on. A file of something else, or a damaged one, is written anew.

    Returns:
        The metadata.
    """
    what = kind.rpartition(" ")[2]
    if path is not None and path.exists():
        try:
            found = checkpoint.read(path)
            if (found.kind, found.config) != (kind, made_from):
                raise ValueError(f"{path}: expected a {what} made from {made_from}, got {found.config}")
            module.load_state_dict(found.tensors)
            return found.metadata
        except (RuntimeError, ValueError) as error:
            tqdm.write(f"biflow: training the {what} again: {error}", file=sys.stderr)
    metadata = train(module)
    if path is not None:
        checkpoint.write(path, kind, module.state_dict(), made_from, metadata)
    return metadata
