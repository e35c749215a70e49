"""Sample grids during training: what the averaged model draws from the same noise and labels each time."""

import copy
import math
from pathlib import Path

import torch

from biflow.evaluate import plots
from biflow.models import BiFlow, TarFlow
from biflow.train.configs import RunConfig

SEED = 0x6121D  # of the noise, the same in all runs, so that their grids can be compared


def draw(model: TarFlow | BiFlow, run: RunConfig, out: Path, step: int) -> Path:
    """Write out/samples/step_XXXXXXXX.png, run.sample_images images in rows, classes in turn; returns its path.

    A flow is decoded exactly (and denoised if it was trained with noise), an inverse takes one pass. Guidance as
    run.sample_guidance says. The model is left as it is, with nothing kept of what decoding prepares. No random state
    but the grid's own is used: training goes on as it would have.
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
    path = out / "samples" / f"step_{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    plots.save_grid(images.cpu().split(math.ceil(math.sqrt(count))), path)
    return path
