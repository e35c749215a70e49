"""Classification by a flow's own likelihood: classify."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biflow.cli.common import Checkpoint, Device, Seed, data_config, examples, load_model, pick_images

if TYPE_CHECKING:
    from torch import Tensor

    from biflow.models import TarFlow

RULES = ("gradient", "bayes", "both")


def classify(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE", help="digits, a .npz, a folder, shards.  [default: the run's]"),
    ] = None,
    rule: Annotated[
        str,
        typer.Option("--rule", metavar="|".join(RULES), help="One backward pass, an encode a class, or compare them."),
    ] = "gradient",
    n: Annotated[int | None, typer.Option("--n", min=2, help="At most so many images, evenly spaced.")] = None,
    noise_draws: Annotated[
        int,
        typer.Option("--noise-draws", min=0, help="Mean over so many draws of the training noise; 0: clean images."),
    ] = 0,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Labels an image, best first.")] = 5,
    out: Annotated[
        str | None, typer.Option("--out", help="Write a .npz with labels (N,k) and scores (N,K) of each image.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a pass.")] = 256,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Classify images with a flow that was trained with classes; no classifier is trained.

    Held-out images if there are any. Prints JSON: by rule the accuracy and calibration where the images have labels,
    and how many images each class got; with --rule both also how often the two agree.
    """
    from biflow import data as datasets
    from biflow import evaluate

    if rule not in RULES:
        raise ValueError(f"--rule: expected one of {', '.join(RULES)}, got {rule!r}")
    path = None if out is None else Path(out).expanduser()
    if path is not None and (path.suffix != ".npz" or rule == "both"):
        raise ValueError(f"--out: expected a file ending in .npz, and one rule; got {out!r} with --rule {rule}")
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"--out: expected an existing folder, got {path.parent}")
    flow = load_model(checkpoint, "TarFlow", device=device)
    loaded = datasets.load(data_config(data, checkpoint, flow.config.img_size))
    evaluate.check_data(flow, loaded)
    x, y = pick_images(loaded, n)
    report: dict = {"images": len(x), "held_out": len(loaded.val_x) > 0, "noise_draws": noise_draws}
    found = {}
    for name in ("gradient", "bayes") if rule == "both" else (rule,):
        start = time.perf_counter()
        found[name] = scores = _scores(flow, x, name, noise_draws, batch_size, seed)
        seconds = time.perf_counter() - start
        described = {} if y is None else evaluate.describe_classification(scores, y, name, top_k)
        counts = scores.argmax(1).bincount(minlength=scores.shape[1]).tolist()
        report[name] = {**described, "predicted": counts, "seconds": round(seconds, 3)}
    if rule == "both":
        report["agreement"] = float((found["gradient"].argmax(1) == found["bayes"].argmax(1)).double().mean())
    if path is not None:
        _write(found[rule], top_k, path)
    typer.echo(json.dumps(report, indent=2, allow_nan=False))


def _scores(flow: "TarFlow", x: "Tensor", rule: str, noise_draws: int, batch_size: int, seed: int) -> "Tensor":
    """On the CPU. Both rules see the same noise."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    options = {"rule": rule, "noise_draws": noise_draws, "batch_size": batch_size, "generator": generator}
    return flow.classify(x.to(flow.var.device), **options).cpu()


def _write(scores: "Tensor", top_k: int, path: Path) -> None:
    import numpy as np

    from biflow.checkpoint import replacing

    labels = scores.topk(min(top_k, scores.shape[1])).indices
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, labels=labels.numpy(), scores=scores.numpy())


COMMANDS = (
    (
        "classify",
        classify,
        examples(
            "biflow classify runs/flow",
            "biflow classify runs/flow --rule both --noise-draws 4",
            "biflow classify flow.safetensors --data images.npz --top-k 3 --out labels.npz",
        ),
    ),
)
