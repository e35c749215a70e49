"""Editing without training: inpaint, edit, interpolate."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biflow.cli.common import (
    Checkpoint,
    Device,
    Seed,
    check_picture,
    data_config,
    examples,
    load_model,
    own_data,
    pick_images,
    picture_file,
)

if TYPE_CHECKING:
    from torch import Tensor

    from biflow.data import DataConfig, ImageData
    from biflow.models import BiFlow, TarFlow

BATCH = 256  # images edited at once: memory does not grow with --n
COLUMNS = 16  # images in a picture; a .npz has all
HALVES = ("left", "right", "top", "bottom")

Inverse = Annotated[
    str | None,
    typer.Option("--inverse", metavar="CKPT", help="Decode by this learned inverse of the flow, in one pass."),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--images",
        metavar="SOURCE",
        help="digits, a .npz, a folder, shards.  [default: what the flow's run held out]",
    ),
]
Out = Annotated[str, typer.Option("--out", help="A .png (before and after) or .npz (edited images).")]
Guidance = Annotated[float, typer.Option("--guidance", help="Strength >= 0 of the decode.")]
NoDenoise = Annotated[bool, typer.Option("--no-denoise", help="Keep the training noise (not with learned denoising).")]
Solver = Annotated[
    str | None, typer.Option("--solver", help="Exact inverse: sequential, jacobi, windowed or auto.  [default: auto]")
]
Window = Annotated[
    int | None, typer.Option("--window", min=1, help="With --solver windowed: tokens a window.  [default: 16]")
]
Tol = Annotated[
    float | None, typer.Option("--tol", help="Exact inverse: tolerance of the iterative solvers.  [default: 1e-5]")
]
Precision = Annotated[str, typer.Option("--precision", help="Of encode and decode: fp32 or bf16.")]


def inpaint(
    checkpoint: Checkpoint,
    mask: Annotated[
        str | None,
        typer.Option("--mask", metavar="FILE", help="An image of the images' size: white is known, black is hidden."),
    ] = None,
    half: Annotated[
        str | None, typer.Option("--half", metavar="|".join(HALVES), help="Hide this half of each image.")
    ] = None,
    box: Annotated[
        str | None,
        typer.Option("--box", metavar="TOP,LEFT,HEIGHT,WIDTH", help="Hide this rectangle of each image, in pixels."),
    ] = None,
    inverse: Inverse = None,
    images: Source = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of images, evenly spaced.")] = 8,
    label: Annotated[
        str,
        typer.Option(
            "--class", metavar="K|own|none", help="Class that the images are completed as; own: their labels."
        ),
    ] = "own",
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Encodes and decodes.  [default: 1 with --inverse, else 4]")
    ] = None,
    guidance: Guidance = 0.0,
    no_paste: Annotated[
        bool, typer.Option("--no-paste", help="Do not put the known pixels themselves into the result.")
    ] = False,
    agreement: Annotated[
        bool,
        typer.Option("--agreement", help="Also how often a classifier, trained first, sees the images' own labels."),
    ] = False,
    out: Out = "inpainted.png",
    seed: Seed = 0,
    no_denoise: NoDenoise = False,
    solver: Solver = None,
    window: Window = None,
    tol: Tol = None,
    precision: Precision = "fp32",
    device: Device = "cpu",
) -> None:
    """Hide a part of each image and let the flow fill it in.

    The z of the known tokens is kept, that of the hidden ones drawn, and decoded; further rounds fit both together.
    Prints the root mean square error of the known pixels as decoded, round by round, and of the clean result before the
    known pixels were put back into it.
    """
    import torch

    from biflow import editing
    from biflow.evaluate import EvaluationConfig, RealData

    path = picture_file(out)
    flow, learned = _models(checkpoint, inverse, device)
    check_picture(path, flow.config.in_channels)
    options = _options(learned, guidance, precision, no_denoise, solver, window, tol)
    known = _mask(flow.config.img_size, mask, half, box)
    data = _data(flow, checkpoint, images)
    judge = None
    if agreement:
        judge = RealData.of(_judged(flow, checkpoint, data), EvaluationConfig(seed=seed)).judge
        if judge is None:
            raise ValueError("--agreement: expected images with labels of two classes or more, got none")
    x, own = pick_images(data, n)
    y = _labels(flow, own, label, len(x))
    generator = torch.Generator().manual_seed(seed)

    def edit(x: "Tensor", y: "Tensor | None") -> tuple["Tensor", ...]:
        found = editing.inpaint(
            flow, x, known.to(x.device), y, inverse=learned, rounds=rounds, keep_known=not no_paste,
            generator=generator, **options,
        )  # fmt: skip
        return found.images, found.error, found.max_error, found.round_errors.T

    result, error, max_error, by_round = _batched(edit, flow, learned, x, y)
    _warn_of_bad(result)
    rows = {"image": x, "known": torch.where(known, x, 0.0), "inpainted": result}
    _write(rows, result, own if y is None else y, path)
    levels = " ".join(f"{value:.2g}" for value in by_round.square().mean(0).sqrt().tolist())
    typer.echo(f"known pixels as decoded: root mean square error {levels}")
    typer.echo(f"known pixels of the clean result: {error.square().mean().sqrt():.2g}, largest {max_error.max():.2g}")
    if judge is not None:
        seen = [judge.agreement(torch.where(known, x, 0.0), own), judge.agreement(result.nan_to_num(0.0), own)]
        typer.echo(
            f"class agreement: {seen[1]:.3f}; the same images whole {judge.agreement(x, own):.3f}, hidden part gray "
            f"{seen[0]:.3f}"
        )
    typer.echo(f"{path}: {len(result)} images")


def edit(
    checkpoint: Checkpoint,
    source: Annotated[int, typer.Option("--from", min=0, metavar="A", help="Class of the images.")],
    target: Annotated[int, typer.Option("--to", min=0, metavar="B", help="Class to turn them into.")],
    inverse: Inverse = None,
    images: Source = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of images of class A, evenly spaced.")] = 8,
    guidance: Guidance = 0.0,
    out: Out = "edited.png",
    seed: Seed = 0,
    no_denoise: NoDenoise = False,
    solver: Solver = None,
    window: Window = None,
    tol: Tol = None,
    precision: Precision = "fp32",
    device: Device = "cpu",
) -> None:
    """Turn images of one class into another: encode under class A, decode under class B.

    Images without labels are all taken to be of class A.
    """
    import torch

    from biflow import editing

    path = picture_file(out)
    flow, learned = _models(checkpoint, inverse, device)
    check_picture(path, flow.config.in_channels)
    options = _options(learned, guidance, precision, no_denoise, solver, window, tol)
    classes = flow.config.num_classes
    for name, value in (("--from", source), ("--to", target)):
        if value >= classes:
            have = f"a class in [0, {classes})" if classes else "a flow with classes"
            raise ValueError(f"{name}: expected {have}, got {value}")
    x, _ = pick_images(_data(flow, checkpoint, images), n, source)
    generator = torch.Generator().manual_seed(seed)

    def edited(x: "Tensor", _: None) -> tuple["Tensor", ...]:
        return (editing.edit_class(flow, x, source, target, inverse=learned, generator=generator, **options),)

    (result,) = _batched(edited, flow, learned, x, None)
    _warn_of_bad(result)
    _write({f"class {source}": x, f"class {target}": result}, result, torch.full((len(x),), target), path)
    typer.echo(f"{path}: {len(result)} images")


def interpolate(
    checkpoint: Checkpoint,
    inverse: Inverse = None,
    images: Source = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of pairs; their images are evenly spaced.")] = 4,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Images on the way, both ends included.")] = 8,
    linear: Annotated[bool, typer.Option("--linear", help="Along a line in z, not along a great circle.")] = False,
    label: Annotated[
        str,
        typer.Option("--class", metavar="K|none", help="Class K: pairs of its images only; none: any, unconditional."),
    ] = "none",
    guidance: Guidance = 0.0,
    out: Out = "interpolated.png",
    seed: Seed = 0,
    no_denoise: NoDenoise = False,
    solver: Solver = None,
    window: Window = None,
    tol: Tol = None,
    precision: Precision = "fp32",
    device: Device = "cpu",
) -> None:
    """Go from one image to another through z. A row of the picture: an image, the decoded way, the other image."""
    import torch

    from biflow import editing

    path = picture_file(out)
    flow, learned = _models(checkpoint, inverse, device)
    check_picture(path, flow.config.in_channels)
    options = _options(learned, guidance, precision, no_denoise, solver, window, tol)
    if label == "own":
        raise ValueError("--class: expected a class or none, got 'own'")
    y = _labels(flow, None, label, n)
    x, _ = pick_images(_data(flow, checkpoint, images), 2 * n, None if y is None else int(label))
    if len(x) < 2 * n:
        raise ValueError(f"--n: expected at most {len(x) // 2} pairs of the {len(x)} images, got {n}")
    generator = torch.Generator().manual_seed(seed)

    def between(x: "Tensor", y: "Tensor | None") -> tuple["Tensor", ...]:
        return (
            editing.interpolate(
                flow, x[:, 0], x[:, 1], steps, y, inverse=learned, spherical=not linear, generator=generator, **options
            ),
        )

    pairs = torch.stack([x[:n], x[n:]], 1)
    (result,) = _batched(between, flow, learned, pairs, y, max(1, BATCH // steps))
    _warn_of_bad(result.flatten(0, 1))
    rows = {
        f"pair {i}": torch.cat([pair[:1], way, pair[1:]])
        for i, (pair, way) in enumerate(zip(pairs, result, strict=True))
    }
    flat = result.flatten(0, 1)
    _write(rows, flat, None if y is None else torch.full((len(flat),), int(label)), path, limit=steps + 2)
    typer.echo(f"{path}: {len(flat)} images")


def _models(checkpoint: str, inverse: str | None, device: str) -> "tuple[TarFlow, BiFlow | None]":
    from biflow.evaluate import check_pair

    flow = load_model(checkpoint, "TarFlow", device=device)
    if inverse is None:
        return flow, None
    learned = load_model(inverse, "BiFlow", device=device)
    check_pair(learned, flow)
    return flow, learned


def _options(
    learned: "BiFlow | None",
    guidance: float,
    precision: str,
    no_denoise: bool,
    solver: str | None,
    window: int | None,
    tol: float | None,
) -> dict[str, Any]:
    """The options of the functions of biflow.editing."""
    exact = {"solver": solver, "window": window, "tol": tol}
    exact = {name: value for name, value in exact.items() if value is not None}
    if learned is not None and learned.config.learned_denoising and no_denoise:
        raise ValueError("--no-denoise: expected with an inverse that does not denoise by itself, got one that does")
    if learned is not None and exact:
        name, value = next(iter(exact.items()))
        raise ValueError(f"--{name}: expected without --inverse; a learned inverse has one pass; got {value!r}")
    return {"guidance": guidance, "precision": precision, "denoise": False if no_denoise else None, **exact}


def _data(flow: "TarFlow", checkpoint: str, source: str | None) -> "ImageData":
    """What the run of the flow was trained on, split as there; any other source whole."""
    from biflow import data as datasets
    from biflow import evaluate

    size = flow.config.img_size
    if own_data(checkpoint, source):
        config: DataConfig = data_config(source, checkpoint, size)
    else:
        encoded = datasets.is_encoded(source)
        config = datasets.DataConfig(source=source, img_size=size if encoded else None, val_fraction=0.0)
    data = datasets.load(config)
    evaluate.check_data(flow, data)
    return data


def _judged(flow: "TarFlow", checkpoint: str, data: "ImageData") -> "ImageData":
    """What a classifier of `data` is trained on: its own training images if others are held out, else the run's."""
    if len(data.val_x):
        return data
    try:
        own = _data(flow, checkpoint, None)
    except ValueError as error:
        raise ValueError(
            "--agreement: expected --images with a test split, or a flow in the folder of its run, on whose images a "
            f"classifier is trained, got neither ({error})"
        ) from None
    if own.class_names != data.class_names:
        raise ValueError(f"--agreement: expected the run's classes {own.class_names}, got {data.class_names}")
    return own


def _labels(flow: "TarFlow", own: "Tensor | None", label: str, n: int) -> "Tensor | None":
    import torch

    classes = flow.config.num_classes
    if label == "none" or (label == "own" and (own is None or not classes)):
        return None
    if label == "own":
        return own
    if not label.isdecimal() or int(label) >= classes:
        have = f"a class in [0, {classes}), own or none" if classes else "none for a flow without classes"
        raise ValueError(f"--class: expected {have}, got {label!r}")
    return torch.full((n,), int(label))


def _mask(size: int, file: str | None, half: str | None, box: str | None) -> "Tensor":
    """(size, size) bool, True: known."""
    import torch

    given = {"--mask": file, "--half": half, "--box": box}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"expected one of --mask, --half and --box, got {' and '.join(named) or 'none'}")
    if file is not None:
        return _mask_file(Path(file).expanduser(), size)
    mask = torch.ones(size, size, dtype=torch.bool)
    if half is not None:
        if half not in HALVES:
            raise ValueError(f"--half: expected one of {', '.join(HALVES)}, got {half!r}")
        lines = mask if half in ("top", "bottom") else mask.T
        lines[slice(None, size // 2) if half in ("left", "top") else slice(size // 2, None)] = False
        return mask
    try:
        top, left, height, width = (int(word) for word in box.split(","))
    except ValueError:
        raise ValueError(f"--box: expected four integers TOP,LEFT,HEIGHT,WIDTH, got {box!r}") from None
    if min(top, left) < 0 or min(height, width) < 1 or max(top + height, left + width) > size:
        raise ValueError(f"--box: expected a rectangle inside images of {size}x{size} pixels, got {box!r}")
    mask[top : top + height, left : left + width] = False
    return mask


def _mask_file(path: Path, size: int) -> "Tensor":
    import numpy as np
    import torch
    from PIL import Image

    if not path.exists():
        raise FileNotFoundError(f"--mask: {path}: no such file")
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("L"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--mask: {path}: expected an image that Pillow can decode; {error}") from None
    if pixels.shape != (size, size):
        got = "x".join(map(str, pixels.shape))
        raise ValueError(f"--mask: {path}: expected {size}x{size} pixels as the images have, got {got}")
    return torch.from_numpy(pixels >= 128)


def _batched(
    call: Callable, flow: "TarFlow", learned: "BiFlow | None", x: "Tensor", y: "Tensor | None", size: int = BATCH
) -> "list[Tensor]":
    """call(x, y) in parts on the models' device; each result joined on the CPU."""
    import contextlib

    import torch

    where = flow.var.device
    parts = []
    with flow.frozen(), contextlib.nullcontext() if learned is None else learned.frozen():
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            found = call(x[rows].to(where), None if y is None else y[rows].to(where))
            parts.append([part.cpu() for part in found])
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _warn_of_bad(images: "Tensor") -> None:
    bad = len(images) - int(images.isfinite().flatten(1).all(1).sum())
    if bad:
        typer.echo(f"biflow: {bad} of {len(images)} images are not finite; less guidance helps", err=True)


def _write(rows: "dict[str, Tensor]", images: "Tensor", y: "Tensor | None", path: Path, limit: int = COLUMNS) -> None:
    """A .png of the rows, the first `limit` of each, or a .npz of images and labels."""
    from biflow.data.adm import write_floats
    from biflow.evaluate import plots

    if path.suffix == ".npz":
        write_floats(path, [images], len(images), y)
    else:
        plots.save_grid([row[:limit] for row in rows.values()], path, labels=list(rows))


COMMANDS = (
    (
        "inpaint",
        inpaint,
        examples(
            "biflow inpaint runs/flow --half left",
            "biflow inpaint runs/flow --inverse runs/inverse --box 2,2,4,4 --class none --out filled.png",
            "biflow inpaint runs/flow --images photos/ --mask mask.png --rounds 8 --out filled.npz",
            "biflow inpaint runs/flow --inverse runs/inverse --half bottom --n 1000 --agreement",
        ),
    ),
    (
        "edit",
        edit,
        examples(
            "biflow edit runs/flow --from 3 --to 8",
            "biflow edit runs/flow --inverse runs/inverse --images digits --from 1 --to 7 --guidance 1",
        ),
    ),
    (
        "interpolate",
        interpolate,
        examples(
            "biflow interpolate runs/flow",
            "biflow interpolate runs/flow --inverse runs/inverse --class 4 --steps 10 --out fours.png",
        ),
    ),
)
