"""What a flow knows of classes: classify, by its own likelihood, and probe, by a linear classifier of its features."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biflow.cli.common import Checkpoint, DataSource, Device, Seed, data_config, examples, load_model, pick_images

if TYPE_CHECKING:
    from torch import Tensor

    from biflow.models import TarFlow

RULES = ("gradient", "bayes", "both")


def classify(
    checkpoint: Checkpoint,
    data: DataSource = None,
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


def probe(
    checkpoint: Checkpoint,
    data: DataSource = None,
    features: Annotated[
        list[str] | None,
        typer.Option("--features", metavar="BLOCK:LAYER|all", help="From 0, blocks in encode order; may be repeated."),
    ] = None,
    train: Annotated[int, typer.Option("--train", min=2, help="At most so many training images.")] = 10_000,
    n: Annotated[int, typer.Option("--n", min=1, help="At most so many held-out images.")] = 10_000,
    tokens: Annotated[
        int, typer.Option("--tokens", min=0, help="Also probe so many single tokens of each image; 0: none.")
    ] = 0,
    penalty: Annotated[float, typer.Option("--penalty", help="C of the logistic regression; smaller: stronger.")] = 1.0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a pass.")] = 256,
    out: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write the numbers as JSON.")] = None,
    device: Device = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """How well a linear classifier reads the class off a flow's features, by block and layer.

    A logistic regression on the mean over tokens of each layer's features, fitted on labelled training images and
    judged on held-out ones; with --tokens also one of single tokens' features. Prints a table. Needs scikit-learn.
    """
    from tqdm import tqdm

    from biflow import data as datasets
    from biflow import evaluate
    from biflow.files import replacing

    path = None if out is None else Path(out).expanduser()
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"--json: expected an existing folder, got {path.parent}")
    pairs = _pairs(features or ["all"])
    config = evaluate.ProbeConfig(
        train_images=train, held_out_images=n, tokens=tokens, penalty=penalty, batch_size=batch_size
    )
    flow = load_model(checkpoint, "TarFlow", device=device)
    loaded = datasets.load(data_config(data, checkpoint, flow.config.img_size))
    evaluate.check_data(flow, loaded)
    count = min(train, len(loaded.train_x)) + min(n, len(loaded.val_x))
    with tqdm(total=count, desc="probe", unit="image", disable=quiet) as bar:
        found = evaluate.probe_flow(flow, loaded, pairs, config, progress=bar.update)
    shown = {"accuracy": "held-out accuracy", "train_accuracy": "training accuracy"}
    if tokens:
        shown |= {f"token_{name}": f"{title}, one token" for name, title in shown.items()}
    typer.echo(f"| block | layer | {' | '.join(shown.values())} |\n{'|---' * (2 + len(shown))}|")
    for row in found:
        cells = [str(row["block"]), str(row["layer"]), *(f"{row[name]:.4f}" for name in shown)]
        converged = row["converged"] and row.get("token_converged", True)
        typer.echo(f"| {' | '.join(cells)} |" + ("" if converged else " (the solver has not converged)"))
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(
                json.dumps({"train": train, "n": n, "tokens": tokens, "penalty": penalty, "probe": found}, indent=1)
                + "\n"
            )


def _pairs(words: list[str]) -> list[tuple[int, int]] | None:
    """["3:1"] -> [(3, 1)]; ["all"] -> None."""
    if words == ["all"]:
        return None
    pairs = []
    for word in words:
        block, _, layer = word.partition(":")
        if not (block.isdecimal() and layer.isdecimal()):
            raise ValueError(f"--features: expected BLOCK:LAYER such as 3:1, or all alone, got {word!r}")
        pairs.append((int(block), int(layer)))
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"--features: expected each once, got {' '.join(words)}")
    return pairs


def _scores(flow: "TarFlow", x: "Tensor", rule: str, noise_draws: int, batch_size: int, seed: int) -> "Tensor":
    """On the CPU. Both rules see the same noise."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    options = {"rule": rule, "noise_draws": noise_draws, "batch_size": batch_size, "generator": generator}
    return flow.classify(x.to(flow.var.device), **options).cpu()


def _write(scores: "Tensor", top_k: int, path: Path) -> None:
    import numpy as np

    from biflow.files import replacing

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
    (
        "probe",
        probe,
        examples(
            "biflow probe runs/flow",
            "biflow probe runs/flow --features 3:1 --features 2:1 --json probe.json",
            "biflow probe runs/flow --tokens 2",
        ),
    ),
)
