"""A checkout of apple/ml-tarflow (arXiv 2412.06329), as its authors wrote it; biflow holds none of its code."""

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from biflow import interop
from biflow.models import TarFlow

from . import Peer

MODULE = "transformer_flow"  # the file with its Model
HEAD_DIM = 64  # what its Model always takes


def load(path: str | Path) -> ModuleType:
    """The module of the checkout at `path`, imported under a private name; sys.path stays as it is.

    Raises:
        FileNotFoundError: no checkout there. ValueError: a module that cannot be imported, or without its Model.
    """
    root = Path(path).expanduser()
    source = root / f"{MODULE}.py"
    if not source.is_file():
        raise FileNotFoundError(
            f"peer ml-tarflow: expected a checkout of github.com/apple/ml-tarflow, got {root}, which has no {MODULE}.py"
        )
    name = f"_peer_{MODULE}"
    spec = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"peer ml-tarflow: {source} cannot be imported ({type(error).__name__}: {error})") from error
    if not isinstance(getattr(module, "Model", None), type):
        raise ValueError(f"peer ml-tarflow: expected a class Model in {source}, got none")
    return module


def load_model(flow: TarFlow, path: str | Path) -> nn.Module:
    """The checkout's Model with the weights of `flow`. Errors as `ml_tarflow`."""
    c = flow.config
    if c.head_dim != HEAD_DIM:
        raise ValueError(f"head_dim: ml-tarflow has {HEAD_DIM} only, got {c.head_dim}")
    state = interop.to_ml_tarflow(flow)
    module = load(path)
    with torch.random.fork_rng(devices=[]):  # its initial values are thrown away
        try:
            model = module.Model(
                in_channels=c.in_channels,
                img_size=c.img_size,
                patch_size=c.patch_size,
                channels=c.width,
                num_blocks=c.num_blocks,
                layers_per_block=flow.blocks[0].config.layers,
                nvp=not c.shift_only,
                num_classes=c.num_classes,
            ).eval()
            model.load_state_dict(state)
        except (TypeError, RuntimeError, AttributeError) as error:
            reason = textwrap.shorten(str(error), 200)
            raise ValueError(f"peer ml-tarflow: {path} has another Model than expected ({reason})") from error
    return model


def ml_tarflow(flow: TarFlow, y: Tensor | None, path: str | Path) -> Peer:
    """The peer with the weights of `flow`; labels as in `flow.decode`, but none negative.

    Raises ValueError for a configuration that ml-tarflow does not have, or a Model of another interface.
    """
    model = load_model(flow, path)
    return Peer(
        "ml-tarflow",
        lambda i, z: model.blocks[i].reverse(z, y),  # what its Model.reverse calls; it may write into its argument
        lambda z: model.reverse(z, y),
        {"checkout": _commit(Path(path).expanduser())},
    )


def _commit(root: Path) -> str:
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()
