"""Sample grids during training: what the averaged model draws from the same noise and labels each time."""

import copy
import math
from pathlib import Path

import torch
from torch import Tensor

from biflow import latents
from biflow.data import ImageData
from biflow.evaluate import plots
from biflow.models import BiFlow, TarFlow
from biflow.train.configs import RunConfig
from biflow.train.perceptual import Pixels

SEED = 0x6121D  # of the noise, the same in all runs, so that their grids can be compared
DECODED_AT_ONCE = 4  # latents


def pixels_of(run: RunConfig, data: ImageData) -> Pixels | None:
    """What makes images of drawn latents, on the CPU; None for images, and without grids. Errors as `Pixels`."""
    if run.sample_every is None or run.sample_vae is None:
        return None
    return Pixels(run.sample_vae, data, "run.sample_vae")


def draw(model: TarFlow | BiFlow, run: RunConfig, out: Path, step: int, pixels: Pixels | None = None) -> Path:
    """Write out/samples/step_XXXXXXXX.png, run.sample_images images in rows, classes in turn; returns its path.

    A flow is decoded exactly (and denoised if it was trained with noise), an inverse takes one pass. Guidance as
    run.sample_guidance says. The model is left as it is, with nothing kept of what decoding prepares. No random state
    but the grid's own is used: training goes on as it would have. `pixels` makes images of latents, a few at once, and
    is on the model's device for that moment only.
    """
    classes, count = model.config.num_classes, run.sample_images
    device = next(model.parameters()).device
    y = torch.arange(count, device=device) % classes if classes else None
    guidance = run.sample_guidance
    if guidance is None:
        guidance = min(1.0, getattr(model.config, "max_guidance", 0.0) or 1.0) if classes else 0.0
    model = copy.deepcopy(model).eval()  # packed weights and CUDA graphs go with it
    with model.frozen():
        images = model.sample(count, y, guidance=guidance, generator=torch.Generator().manual_seed(SEED))
    del model
    if pixels is not None:
        images = _decoded(images, pixels)
    path = out / "samples" / f"step_{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    plots.save_grid(images.cpu().split(math.ceil(math.sqrt(count))), path)
    return path


def _decoded(drawn: Tensor, pixels: Pixels) -> Tensor:
    """Latents (N,c,h,w) -> images (N,C,H,W) in [-1, 1] on the CPU."""
    pixels.to(drawn.device)
    try:
        z = drawn * pixels.scale + pixels.shift
        parts = list(latents.decode(pixels.autoencoder, z, batch_size=DECODED_AT_ONCE))
    finally:
        pixels.to("cpu")
    return torch.cat(parts).float() / 127.5 - 1
