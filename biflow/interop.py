"""Weights of other projects: TARFlow checkpoints in the format of apple/ml-tarflow, read and written.

A state_dict there holds `var` (T,D) and, per block, `proj_in`, `pos_embed`, `class_embed` (with classes), `attn_mask`,
the layers under `attn_blocks` and `proj_out`; T tokens of D channels. Width, blocks, layers, classes and whether there
is a scale (nvp) follow from the shapes; image size, patch size, head_dim and noise_std are not in the file.
"""

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biflow.models import TarFlow, TarFlowConfig
from biflow.models.layers import check_grid

# module of one of our layers -> the same one in theirs
_LAYER_MODULES = {
    "norm1": "attention.norm",
    "qkv": "attention.qkv",
    "proj": "attention.proj",
    "norm2": "mlp.norm",
    "fc1": "mlp.main.0",
    "fc2": "mlp.main.2",
}

# what ml-tarflow always does: the fields of TarFlowConfig that its format cannot say otherwise
_FIXED = {
    "mlp_ratio": 4.0,
    "class_tokens": 0,
    "context_dim": 0,
    "norm": "layernorm",
    "gate": "gelu",
    "qk_norm": False,
    "rope": False,
    "pos_embed": True,
    "start_token": False,
    "scale": "exp",
    "clip": None,
}


def from_ml_tarflow(
    state_dict_or_path: Mapping[str, Tensor] | str | Path,
    *,
    img_size: int,
    patch_size: int,
    in_channels: int,
    head_dim: int = 64,
    noise_std: float = 0.0,
) -> TarFlow:
    """A TarFlow with the weights of an ml-tarflow model (arXiv 2412.06329).

    Args:
        state_dict_or_path: the state_dict, or the path of a file with it: .safetensors, or .pth / .pt, which is read
            with `torch.load(weights_only=True)`.
        img_size, patch_size, in_channels: the images: T = (img_size / patch_size)^2, D = in_channels patch_size^2.
        head_dim: channels of an attention head; ml-tarflow uses 64.
        noise_std: standard deviation of the training noise; > 0 turns on denoising in `sample`.

    Returns:
        the model on the CPU, fp32. Its z is ml-tarflow's divided by sqrt(var), see `to_ml_tarflow_outputs`. Differences
        in decoding that are ml-tarflow's own: it guides without annealing unless told, and takes no y = -1.

    Raises:
        ValueError: a missing or unexpected key, a wrong shape or dtype (the message names it), a file that is not
            such a state_dict. FileNotFoundError: no such file.
    """
    state = state_dict_or_path
    if isinstance(state, str | Path):
        state = _read(Path(state))
    if not isinstance(state, Mapping):
        raise ValueError(f"state_dict: expected a mapping of names to tensors, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"state_dict: expected names and tensors, got {key!r}: {type(value).__name__}")
        if value.dtype != torch.float32:
            raise ValueError(f"{key}: expected torch.float32, got {value.dtype}")
    rows, width = _get(state, "blocks.0.proj_in.weight", 2).shape[::-1]
    blocks = _count(state, "blocks.")
    check_grid(img_size, in_channels, patch_size)
    channels = in_channels * patch_size**2
    if rows != channels:
        raise ValueError(
            f"blocks.0.proj_in.weight: expected {channels} columns (in_channels {in_channels} x patch_size "
            f"{patch_size} squared), got {rows}"
        )
    config = TarFlowConfig(
        img_size=img_size,
        in_channels=in_channels,
        patch_size=patch_size,
        width=width,
        num_blocks=blocks,
        layers_per_block=_count(state, "blocks.0.attn_blocks."),
        head_dim=head_dim,
        num_classes=_get(state, "blocks.0.class_embed", 3).shape[0] if "blocks.0.class_embed" in state else 0,
        noise_std=noise_std,
        shift_only=_get(state, "blocks.0.proj_out.weight", 2).shape[0] == channels,
    )
    _get(state, "var", 2, (config.tokens, channels))  # before a model of T tokens is built
    if not bool(((state["var"] > 0) & torch.isfinite(state["var"])).all()):
        raise ValueError("var: expected positive finite variances")
    with torch.random.fork_rng(devices=[]):  # the initial values are thrown away: leave the caller's stream alone
        flow = TarFlow(config)
    names = _names(flow)
    mask = torch.ones(config.tokens, config.tokens).tril()
    ours = flow.state_dict()
    for theirs, own in names.items():
        want = mask if own is None else ours[own]
        value = _get(state, theirs, want.dim(), tuple(want.shape))
        if own is None and not torch.equal(value.cpu(), mask):
            raise ValueError(f"{theirs}: expected the lower triangle of ones")
    unexpected = sorted(set(state) - set(names))
    if unexpected:
        raise ValueError(f"{unexpected[0]}: unexpected key, one of {len(unexpected)} that this format does not have")
    flow.load_state_dict({own: state[theirs] for theirs, own in names.items() if own is not None})
    return flow


def to_ml_tarflow(flow: TarFlow) -> dict[str, Tensor]:
    """The state_dict of `flow` in ml-tarflow's format: fp32 copies on the model's device. Inverse of `from_ml_tarflow`.

    head_dim and noise_std are not in the format: whoever reads it must know them (ml-tarflow's own code takes 64).

    Raises:
        ValueError: a configuration that ml-tarflow does not have (the message names the field), or weights not fp32.
    """
    if not isinstance(flow, TarFlow):
        raise ValueError(f"flow: expected a TarFlow, got {type(flow).__name__}")
    c = flow.config
    for field, only in _FIXED.items():
        if getattr(c, field) != only:
            raise ValueError(f"{field}: ml-tarflow has {only!r} only, got {getattr(c, field)!r}")
    if isinstance(c.layers_per_block, tuple) and len(set(c.layers_per_block)) > 1:
        raise ValueError(f"layers_per_block: ml-tarflow has one number for all blocks, got {c.layers_per_block}")
    ours = flow.state_dict()
    result = {}
    for theirs, own in _names(flow).items():
        if own is None:
            result[theirs] = torch.ones(c.tokens, c.tokens, device=flow.var.device).tril()
            continue
        if ours[own].dtype != torch.float32:
            raise ValueError(f"{own}: expected torch.float32, got {ours[own].dtype}")
        result[theirs] = ours[own].detach().clone()
    return result


def to_ml_tarflow_outputs(flow: TarFlow, z: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
    """What ml-tarflow returns where `flow.encode` returned z (B,T,D) and logdet (B,).

    There z is not divided by sqrt(var), and the log-determinant is a mean over the T D dimensions, without var's part:
    (z sqrt(var), (logdet + sum log var / 2) / (T D)). Its training loss is 0.5 mean(z^2) - mean(logdet) of these.
    """
    var = flow.var.to(logdet.dtype)
    return z * var.sqrt().to(z.dtype), (logdet + 0.5 * var.log().sum()) / var.numel()


def _names(flow: TarFlow) -> dict[str, str | None]:
    """Their key -> our key (None for attn_mask, which we do not store)."""
    c = flow.config
    names: dict[str, str | None] = {"var": "var"}
    for i, block in enumerate(flow.blocks):
        name = f"blocks.{i}."
        same = ["proj_in.weight", "proj_in.bias", "pos_embed", "proj_out.weight", "proj_out.bias"]
        names |= {name + key: name + key for key in same + ["class_embed"] * (c.num_classes > 0)}
        names[name + "attn_mask"] = None
        for j in range(block.config.layers):
            for own, theirs in _LAYER_MODULES.items():
                for leaf in ("weight", "bias"):
                    names[f"{name}attn_blocks.{j}.{theirs}.{leaf}"] = f"{name}layers.{j}.{own}.{leaf}"
    return names


def _get(state: Mapping[str, Tensor], key: str, dims: int, shape: tuple[int, ...] | None = None) -> Tensor:
    if key not in state:
        raise ValueError(f"{key}: missing key")
    got = tuple(state[key].shape)
    if shape is not None and got != shape:
        raise ValueError(f"{key}: expected shape {shape}, got {got}")
    if len(got) != dims or math.prod(got) == 0:
        raise ValueError(f"{key}: expected {dims} dimensions, none of them empty, got shape {got}")
    return state[key]


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many indices 0, 1, 2, ... follow `prefix` in the keys; at least 1, so that what is missing gets named."""
    found = {key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}
    n = 0
    while str(n) in found:
        n += 1
    return max(n, 1)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: expected a .safetensors, .pth or .pt file, got suffix {path.suffix!r}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused: not a pickle of plain tensors; nothing else is unpickled") from None
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError, OSError) as error:
        raise ValueError(f"{path}: not a readable torch file ({type(error).__name__}: {error})") from None
