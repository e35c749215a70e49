"""Whether calibration chooses well: the time of a calibrated `flow.decode(z)` over that of the best single solver.

Flows of the shapes S and M with random weights and, given data, with briefly trained ones, whose blocks differ. Each is
calibrated here and now, at the batch sizes and precisions that are timed; then solver="auto" and every single solver
(sequential, jacobi, windowed with W = 16 and 32 < T) decode the same noise in turns. The ratio is the median of those
within each turn. The goal is 1.15, or 0.2 ms more than the best. A decode that is wrong has no time.

    python -m benchmarks.calibrated [--quick] [--data fashion_mnist.npz] [--json FILE] [--markdown FILE]
"""

import argparse
import copy
import functools
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import biflow
from biflow import data as datasets
from biflow import solvers
from biflow.evaluate import eager_decode
from biflow.models import TarFlow, TarFlowConfig
from biflow.models.layers import patchify
from biflow.train.likelihood import add_noise, drop_labels, likelihood_loss

from .bench_decode import Reference, WrongResult, check
from .flows import CONFIGS, check_configs, random_flow
from .timing import keep_memory, machine_info, ratio, table, turns, write_json

WINDOWS = (16, 32)
GOAL, GOAL_MS = 1.15, 0.2  # times the best single solver, or milliseconds more
STEPS, BATCH, RATE, NOISE = 100, 64, 1e-3, 0.1  # of the brief training


def run(
    quick: bool = False,
    *,
    configs: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    precisions: Sequence[str] = solvers.PRECISIONS,
    data: str | Path | None = None,
) -> dict[str, list]:
    """{"rows": one per flow, precision and batch, "wrong": sentences about decodes that are not right}.

    Args:
        quick: config S at batches 1 and 16, few repetitions, a tenth of the training.
        configs, batches: None: S and M, at 1, 16 and 64.
        data: images to train on, what `biflow.data.load` takes; None: only flows of random weights.

    Raises:
        ValueError: unknown configs, images of other channels than theirs.
    """
    check_configs(configs)
    names = configs or (("S",) if quick else ("S", "M"))
    images = None if data is None else _load(data, names)
    keep_memory()
    rows, wrong = [], []
    for name in names:
        sizes = batches or ((1, 16) if quick else (1, 16, 64))
        flows = {"random": lambda name=name: random_flow(name)}
        if images is not None:
            flows["trained"] = functools.partial(trained_flow, name, images, STEPS // 10 if quick else STEPS)
        for weights, make in flows.items():
            _say(f"{name}, {weights} weights")
            flow = make()
            _say(f"{name}, {weights} weights: calibration")
            biflow.calibrate(flow, batches=sizes, precisions=precisions, repetitions=3 if quick else 7)
            for batch in sizes:
                noise, y, reference = _problem(flow, batch)
                for precision in precisions:
                    _say(f"{name}, {weights} weights, batch {batch}, {precision}")
                    row = {"config": name, "weights": weights, "batch": batch, "precision": precision}
                    found = _case(flow, noise, y, reference, precision, 3 if quick else 7, wrong)
                    rows += [row | found] if found else []
    return {"rows": rows, "wrong": wrong}


def trained_flow(name: str, images: datasets.ImageData, steps: int) -> TarFlow:
    """One of CONFIGS after `steps` steps of maximum likelihood on images of its size, noise and labels included."""
    config = TarFlowConfig(head_dim=64, num_classes=images.num_classes, noise_std=NOISE, **CONFIGS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = TarFlow(config)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        chosen = torch.randint(len(images.train_x), (BATCH,), generator=generator)
        x = F.adaptive_avg_pool2d(images.train_x.batch(chosen), config.img_size)
        y = None if images.train_y is None else drop_labels(images.train_y[chosen], 0.1, generator)
        loss, _ = likelihood_loss(flow, add_noise(x, NOISE, None, generator), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow.eval().requires_grad_(False)


def _load(source: str | Path, names: Sequence[str]) -> datasets.ImageData:
    images = datasets.load(datasets.DataConfig(source=str(source)))
    for name in names:
        channels = CONFIGS[name]["in_channels"]
        if images.channels != channels:
            raise ValueError(f"data: expected images of {channels} channels for {name}, got {images.channels}")
    return images


def _problem(flow: TarFlow, batch: int) -> tuple[Tensor, Tensor | None, Reference]:
    """Noise, labels and the exact tokens of it. Not the noise of calibration, which has another seed."""
    c = flow.config
    z = torch.randn(batch, c.tokens, c.channels, generator=torch.Generator().manual_seed(1))
    y = torch.arange(batch) % c.num_classes if c.num_classes else None
    exact = patchify(eager_decode(copy.deepcopy(flow).double(), z.double(), y), c.patch_size)
    rounding = patchify(eager_decode(flow, z, y), c.patch_size) - exact
    return z, y, Reference([exact], "fp64", rounding.abs().max().item())


def _case(
    flow: TarFlow, z: Tensor, y: Tensor | None, reference: Reference, precision: str, rounds: int, wrong: list[str]
) -> dict:
    """Times of one case; nothing if "auto", or every single solver, is wrong."""
    c = flow.config
    ways = {"auto": ("auto", None), "sequential": ("sequential", None), "jacobi": ("jacobi", None)}
    ways |= {f"windowed:{w}": ("windowed", w) for w in WINDOWS if w < c.tokens}

    def decode(way: tuple[str, int | None], **more):
        with torch.inference_mode():
            return flow.decode(z, y, solver=way[0], window=way[1], precision=precision, **more)

    calls = {}
    for name, way in ways.items():
        try:
            x = patchify(decode(way), c.patch_size)
            check(f"{name} {precision}", x, reference, 1, precision, iterative=name != "sequential")
            calls[name] = functools.partial(decode, way)
        except WrongResult as error:
            wrong.append(f"{c.tokens} tokens, batch {len(z)}, {error}")
            _say(wrong[-1])
    if "auto" not in calls or len(calls) == 1:
        return {}
    _, info = decode(ways["auto"], return_info=True)
    times = turns(calls, rounds)
    ms = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
    best = min((name for name in ms if name != "auto"), key=ms.get)
    over = ratio(times[best], times["auto"])
    return {
        "auto_ms": ms["auto"],
        "best": best,
        "best_ms": ms[best],
        "auto_over_best": over,
        "met": over <= GOAL or ms["auto"] - ms[best] <= GOAL_MS,
        "blocks": " ".join(f"{s}:{w}" if w else s for s, w in zip(info.solver, info.window, strict=True)),
        "fallbacks": sum(len(failed) for failed in info.fallbacks),
        **{f"{name}_ms": ms.get(name) for name in ways if name != "auto"},
    }


def markdown(rows: list[dict], machine: dict) -> str:
    """The machine and a table of all rows."""
    known = ("auto_ms", "best_ms")
    singles = list(dict.fromkeys(key for row in rows for key in row if key.endswith("_ms") and key not in known))
    head = ["flow, batch", "weights", "precision", "auto, ms", *[f"{key[:-3]}, ms" for key in singles]]
    head += ["auto / best", "goal", "blocks"]
    lines = [
        f"{machine['date'][:10]} · {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads · "
        f"{machine['isa']} · torch {machine['torch']} · commit {machine['commit']}",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        cells = [f"{row['config']} {row['batch']}", row["weights"], row["precision"], f"{row['auto_ms']:.3g}"]
        cells += ["-" if row.get(key) is None else f"{row[key]:.3g}" for key in singles]
        cells += [f"{row['auto_over_best']:.2f}", "met" if row["met"] else "missed", row["blocks"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a decode was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="config S, batches 1 and 16, few repetitions")
    parser.add_argument("--data", metavar="PATH", help="gray images to train on, such as fashion_mnist.npz")
    parser.add_argument("--configs", help="of S, M, ..., comma-separated")
    parser.add_argument("--batches", help="comma-separated")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--json", metavar="FILE", help="write machine, rows and wrong results to this file")
    parser.add_argument("--markdown", metavar="FILE", help="write the rows as a table to this file")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    found = run(
        given.quick,
        configs=given.configs and given.configs.split(","),
        batches=given.batches and [int(batch) for batch in given.batches.split(",")],
        data=given.data,
    )
    rows = found["rows"]
    print("\n".join(table(rows)))
    print(
        f"auto within {GOAL} of the best single solver, or {GOAL_MS} ms: {sum(r['met'] for r in rows)} of {len(rows)}"
    )
    if given.json:
        write_json(given.json, rows, wrong=found["wrong"])
    if given.markdown:
        Path(given.markdown).write_text(markdown(rows, machine_info()))
    return 1 if found["wrong"] else 0


def _say(text: str) -> None:
    print(f"calibrated: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
