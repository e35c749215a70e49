"""Pictures: grids of samples, trajectories from noise to data, training curves (these need Matplotlib)."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from biflow.files import replacing
from biflow.models import BiFlow, TarFlow
from biflow.models.layers import unpatchify
from biflow.solvers import Condition, Guidance

TILE = 56  # pixels that an image's side is enlarged to, at least
GAP = 4
FONT = 13


def save_grid(
    rows: Sequence[Tensor], path: str | Path, *, labels: Sequence[str] = (), titles: Sequence[str] = ()
) -> None:
    """Write a PNG of image rows, enlarged without smoothing.

    Args:
        rows: one (N,C,S,S) fp32 tensor a row, C = 1 or 3, values [-1, 1] (others are clamped, NaN shows as black).
        path: the PNG, replaced atomically.
        labels: text left of each row; titles: text above each column.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows or rows[0].shape[1] not in (1, 3):
        raise ValueError(f"rows: expected images of 1 or 3 channels, got {[tuple(r.shape) for r in rows][:1]}")
    side = rows[0].shape[-1]
    scale = max(1, TILE // side)
    step = side * scale + GAP
    font = ImageFont.load_default(FONT)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    left = GAP + max([measure.textlength(text, font=font) + 2 * GAP for text in labels], default=0)
    top = GAP + (FONT + 2 * GAP if titles else 0)
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (int(left) + columns * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(canvas)
    for text, row in zip(labels, range(len(rows)), strict=False):
        draw.text((GAP, top + row * step + (step - GAP) // 2), text, fill="black", font=font, anchor="lm")
    for text, column in zip(titles, range(columns), strict=False):
        draw.text((left + column * step + (step - GAP) // 2, top // 2), text, fill="black", font=font, anchor="mm")
    for i, row in enumerate(rows):
        bytes_ = (((row.nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5).round()).to(torch.uint8)
        for j, image in enumerate(bytes_.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)):
            tile = Image.fromarray(image.contiguous().numpy()).resize((side * scale,) * 2, Image.Resampling.NEAREST)
            canvas.paste(tile, (int(left) + j * step, top + i * step))
    with replacing(Path(path)) as temporary:
        canvas.save(temporary, format="PNG")


@torch.no_grad()
def trajectories(
    flow: TarFlow, rev: BiFlow, z: Tensor, y: Tensor | None, guidance: float
) -> tuple[list[Tensor], list[Tensor]]:
    """From z (N,T,D) to clean images, block by block: (exact, learned), each [z, x_{B-1}, ..., x_0, clean].

    exact: what each flow block's inverse returned, then the denoised image (x_0 again for a flow without noise).
    learned: the states that the heads of the learned inverse predict after each group of layers, then its output
        (without learned denoising: x_0 as the exact one, denoised like it). States that it was trained to predict
        normalised are so here.
    All as images (N,C,S,S); guidance acts on the exact ones, and on the learned ones where it was trained in.
    """
    patch, classes = flow.config.patch_size, flow.config.num_classes
    condition = Condition(y if classes else None, None, Guidance(guidance if classes else 0.0))
    x = z * flow.var.sqrt()
    exact = [z]
    for block in reversed(flow.blocks):
        x = block.decode_sequential(x, condition)
        exact.append(x)
    exact = [unpatchify(state, patch) for state in exact]
    exact.append(flow.denoise(exact[-1], y if classes else None) if flow.config.noise_std > 0 else exact[-1])
    # as in BiFlow.decode: samples without a label are not guided
    w = None if y is None or not rev.config.max_guidance else torch.where(y < 0, 0.0, guidance).to(z.dtype)
    clean, states = rev(z, y if rev.config.num_classes else None, w, return_states=True)
    learned = [unpatchify(state, patch) for state in [z, *states[::-1], clean]]
    if not rev.config.learned_denoising and flow.config.noise_std > 0:
        learned[-1] = flow.denoise(learned[-1], y if classes and rev.config.num_classes else None)
    return exact, learned


def save_trajectories(exact: list[Tensor], learned: list[Tensor], names: Sequence[str], path: str | Path) -> None:
    """Write a PNG of `trajectories`: two rows a sample; names: of the samples. Each tile but the last of a row is
    stretched to its own mean +- 2.5 standard deviations, the last (clean) one shows [-1, 1]."""
    rows, labels = [], []
    for i, name in enumerate(names):
        for kind, states in (("exact", exact), ("learned", learned)):
            tiles = [_stretch(state[i]) for state in states[:-1]] + [states[-1][i]]
            rows.append(torch.stack(tiles))
            labels.append(f"{name}: {kind}")
    count = len(exact) - 2
    save_grid(rows, path, labels=labels, titles=["z", *[f"x{i}" for i in reversed(range(count))], "clean"])


def save_curves(runs: dict[str, Path], path: str | Path) -> None:
    """Write a PNG of training loss, held-out loss and learning rate. runs: title -> the run's metrics.jsonl."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("curves need Matplotlib, which is not installed: pip install 'biflow[train]'") from None
    figure = Figure(figsize=(5 * len(runs), 5.2), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False, sharex="col", height_ratios=(3, 1))
    for (title, source), (loss, rate) in zip(runs.items(), axes.T, strict=True):
        lines = [json.loads(line) for line in source.read_text().splitlines()]
        for split, label in (("train", "training"), ("val", "held out")):
            points = [(p["step"], p["loss"]) for p in lines if p["split"] == split and p["loss"] is not None]
            if points:
                loss.plot(*zip(*points, strict=True), label=label, marker="." if split == "val" else "")
        points = [(p["step"], p["lr"]) for p in lines if p["split"] == "train"]
        if points:
            rate.plot(*zip(*points, strict=True), color="tab:gray")
        loss.set(title=title, ylabel="loss")
        loss.legend()
        loss.grid(alpha=0.3)
        rate.set(xlabel="step", ylabel="learning rate")
        rate.grid(alpha=0.3)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _stretch(image: Tensor) -> Tensor:
    return (image - image.mean()) / (2.5 * image.std()).clamp_min(1e-6)
