"""diffusers' AutoencoderKL: loading, what it is, posteriors of images, and images of latents in bounded memory."""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

KIND = "AutoencoderKL"
ENCODER = ("encoder.", "quant_conv.")  # names of the weights that latents depend on


def load(source: str, device: str | torch.device = "cpu") -> "AutoencoderKL":
    """A frozen AutoencoderKL in fp32, in eval mode.

    Args:
        source: a folder of `save_pretrained`, of the autoencoder or of a pipeline with one in vae/; or the name of one
            on the Hugging Face hub, which is looked for in the local cache first.

    Raises:
        ImportError: diffusers is not installed. FileNotFoundError: no such folder; a name that is not in the cache and
        cannot be had from the hub. ValueError: something else than an AutoencoderKL, or not all of its weights.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(f"an autoencoder needs diffusers ({error}): pip install 'biflow[latents]'") from None
    path = Path(source).expanduser()
    local = path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1
    name = str(path) if local else source
    if local and not path.is_dir():
        raise FileNotFoundError(f"{source}: expected a folder of an {KIND}, or its name on the hub; no such folder")
    where, config = _config(AutoencoderKL, name, local)
    if config.get("_class_name") != KIND:
        raise ValueError(
            f"{source}: expected an {KIND}, got {config.get('_class_name') or 'something without a class'}"
        )
    options = {"torch_dtype": torch.float32, "output_loading_info": True}
    try:
        autoencoder, about = AutoencoderKL.from_pretrained(name, **where, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: expected the weights of an {KIND}; {error}") from None
    missing = [*about["missing_keys"], *about["mismatched_keys"]]
    if missing:
        raise ValueError(f"{source}: expected all weights of the {KIND} in its config, got none for {missing[0]}")
    return autoencoder.to(device).eval().requires_grad_(False)


def describe(autoencoder: "AutoencoderKL", name: str) -> dict[str, Any]:
    """What it is, as JSON values: name (as given), config, sha256 of its weights, encoder_sha256 of the encoder's.

    The latents depend on the encoder alone: another decoder of the same latents may take the place of its own.
    """
    weights = autoencoder.state_dict()
    return {
        "name": name,
        "config": {key: value for key, value in sorted(autoencoder.config.items()) if not key.startswith("_")},
        "sha256": _digest(weights),
        "encoder_sha256": _digest({key: value for key, value in weights.items() if key.startswith(ENCODER)}),
    }


def check_same(autoencoder: "AutoencoderKL", made_by: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`describe` of it; another decoder than latents were `made_by` (`describe`) is told of.

    ValueError: another encoder.
    """
    found = describe(autoencoder, name)
    if found["encoder_sha256"] != made_by["encoder_sha256"]:
        raise ValueError(
            f"{name}: expected the autoencoder that made the latents, {made_by['name']} (SHA-256 of its encoder "
            f"{made_by['encoder_sha256'][:12]}...), got another one ({found['encoder_sha256'][:12]}...)"
        )
    if found["sha256"] != made_by["sha256"]:
        tqdm.write(f"biflow: {name}: the encoder of {made_by['name']} with another decoder", file=sys.stderr)
    return found


def downsampling(config: Mapping[str, Any]) -> int:
    """Pixels a side that one position of the latents stands for."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def scaling(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """{"shift": s, "scale": r}, a number a channel: what x = (z - s) / r makes of a latent z is what models see.

    As diffusers' pipelines have it: x = (z - shift_factor) scaling_factor, or, for an autoencoder with latents_mean and
    latents_std, x = (z - latents_mean) scaling_factor / latents_std.
    """
    channels, factor = config["latent_channels"], config["scaling_factor"]
    shift, spread = config.get("latents_mean"), config.get("latents_std")
    if shift is None or spread is None:
        shift, spread = [config.get("shift_factor") or 0.0] * channels, [1.0] * channels
    return {"shift": [float(v) for v in shift], "scale": [float(v) / factor for v in spread]}


@torch.no_grad()
def encode(autoencoder: "AutoencoderKL", images: Tensor, precision: str = "fp32") -> Tensor:
    """Images (B,C,H,W) in [-1, 1] -> (B,2,c,h,w) fp32: mean and standard deviation of the posterior of each latent."""
    with _autocast(images.device, precision):
        posterior = autoencoder.encode(images).latent_dist
    return torch.stack([posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())], 1)


def decode(
    autoencoder: "AutoencoderKL", latents: Tensor, *, batch_size: int = 8, tile: int = 64, precision: str = "fp32"
) -> Iterator[Tensor]:
    """Latents z (N,c,h,w), as the encoder gives them -> images (n,C,H,W) uint8 on the CPU, batch by batch.

    Memory, but for `latents`, depends on batch_size and tile alone, whatever N is, and for large latents on little more
    than one image beside. Values x in [-1, 1] become round(127.5 (x + 1)); others are clamped, NaN is 0.

    Args:
        batch_size: latents decoded at once; 1 is what diffusers calls slicing.
        tile: larger latents are decoded in squares of that side which overlap by a quarter and are blended
            (diffusers' tiling): what comes differs a little from the whole. A multiple of 4, at least 8.

    Raises:
        ValueError: batch_size or tile is not as above, or the latents have another number of channels.
    """
    channels, factor = autoencoder.config.latent_channels, downsampling(autoencoder.config)
    if batch_size < 1 or tile < 8 or tile % 4:
        raise ValueError(f"expected a batch of at least 1 and a tile of 8, 12, 16, ...; got {batch_size} and {tile}")
    if latents.shape[1] != channels:
        raise ValueError(f"latents: expected {channels} channels as the autoencoder has, got {latents.shape[1]}")
    autoencoder.tile_latent_min_size, autoencoder.tile_sample_min_size = tile, tile * factor
    autoencoder.enable_tiling()
    autoencoder.disable_slicing()
    # no name holds a batch while the next one is decoded
    return (_bytes(autoencoder, part, precision) for part in latents.split(batch_size))


@torch.no_grad()
def _bytes(autoencoder: "AutoencoderKL", latents: Tensor, precision: str) -> Tensor:
    """One batch of `decode`."""
    latents = latents.to(autoencoder.device, torch.float32)
    with _autocast(latents.device, precision):
        images = autoencoder.decode(latents).sample
    return images.float().nan_to_num_(-1.0).clamp_(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8).cpu()


def _config(cls: type, name: str, local: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(where the autoencoder is: arguments of from_pretrained, its config.json)."""
    tries = [{"local_files_only": True, **folder} for folder in ({}, {"subfolder": "vae"})]
    if not local:
        tries += [{}, {"subfolder": "vae"}]
    for where in tries:
        try:
            return where, cls.load_config(name, **where)
        except (OSError, ValueError) as error:  # ValueError: no name that the hub could have
            reason = error
    if local:
        raise ValueError(f"{name}: expected a folder of an {KIND} (config.json), or of a pipeline with one in vae/")
    raise FileNotFoundError(
        f"{name}: no such folder; and not in the Hugging Face cache, nor to be had from the hub: {reason}"
    )


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
