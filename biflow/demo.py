"""The main job end to end on real handwriting: train a flow, learn its inverse, compare exact and learned samples."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import biflow
from biflow import data as datasets
from biflow import evaluate, presets
from biflow.config import completed, to_mapping
from biflow.evaluate import EvaluationConfig, plots
from biflow.files import TEMPORARY, replacing
from biflow.models import BiFlow, TarFlow
from biflow.report import environment, markdown
from biflow.train import FlowTraining, InverseTraining, train_flow, train_inverse
from biflow.train.runs import check_same, train_seconds

FLOW_PRESET, INVERSE_PRESET = "digits_flow", "digits_inverse"
DEFAULT_GUIDANCE = 0.7  # of the learned samples; fixed before the samples are scored
GUIDANCES = (0.0, 0.5, DEFAULT_GUIDANCE, 1.0, 2.0, 3.0)
PICTURE_COLUMNS = 10
QUICK_FLOW = (
    "model.width=32", "model.head_dim=16", "model.num_blocks=2", "model.layers_per_block=1", "optim.steps=20",
    "optim.warmup_steps=5", "optim.batch_size=64", "run.log_every=5", "run.validate_every=10",
    "run.checkpoint_every=10", "run.tensorboard=false", "run.threads=1",
)  # fmt: skip
QUICK_INVERSE = tuple(o.replace("layers_per_block", "layers_per_group") for o in QUICK_FLOW)


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """All that determines the demo's report."""

    flow: FlowTraining
    inverse: InverseTraining
    evaluation: EvaluationConfig
    default_guidance: float
    timing_repetitions: int


def demo_config(*, quick: bool = False, seed: int = 0) -> DemoConfig:
    """The configuration of `run_demo`: the digits presets; quick: tiny models and few steps, to test the machinery."""
    seeded = (f"run.seed={seed}",)
    return DemoConfig(
        flow=presets.training(FLOW_PRESET, (QUICK_FLOW if quick else ()) + seeded, "flow"),
        inverse=presets.training(INVERSE_PRESET, (QUICK_INVERSE if quick else ()) + seeded, "inverse"),
        evaluation=EvaluationConfig(
            samples=100 if quick else 1000, guidances=GUIDANCES, judge_steps=60 if quick else 200, seed=seed
        ),
        default_guidance=DEFAULT_GUIDANCE,
        timing_repetitions=2 if quick else 15,
    )


def run_demo(
    out: str | Path, *, quick: bool = False, seed: int = 0, progress: bool = True, resume: bool = False
) -> dict[str, Any]:
    """Train both stages on scikit-learn's digits, evaluate them, and write pictures and a report into `out`.

    Args:
        out: a new or empty folder, or with `resume` one of a demo that was interrupted or finished.
        quick: tiny models and few steps; tests the machinery, the samples mean nothing.
        seed: of both trainings, the samples and the classifier; the split of the data stays.
        progress: show progress bars.

    Returns:
        The report, also in out/report.json: the same for the same arguments, torch and CPU, but for "timings".

    Raises:
        FileExistsError: `out` is not empty and `resume` is not given, or not a demo's. ValueError: `resume` with other
        arguments. ImportError: scikit-learn or Matplotlib is missing.
    """
    config = demo_config(quick=quick, seed=seed)
    out = Path(out)
    _prepare(out, config, resume)
    threads = torch.get_num_threads()
    try:
        if config.flow.run.threads is not None:  # the last bits depend on the number of threads
            torch.set_num_threads(config.flow.run.threads)
        flow = train_flow(config.flow, out / "flow", resume=resume, progress=progress)
        rev = train_inverse(config.inverse, flow, out / "inverse", resume=resume, progress=progress)
        report = _evaluate(out, config, flow, rev, quick)
    finally:
        torch.set_num_threads(threads)
    with replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    with replacing(out / "report.md") as temporary:
        temporary.write_text(markdown(report))
    return report


def _prepare(out: Path, config: DemoConfig, resume: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file = out / "config.yaml"
    mapping = to_mapping(config)
    for leftover in out.glob(f"{TEMPORARY}*"):  # of a killed process
        leftover.unlink()
    if any(out.iterdir()):
        if not resume:
            raise FileExistsError(f"{out}: the folder is not empty; continue the demo in it (--resume) or name another")
        if not file.is_file():
            raise FileExistsError(
                f"{out}: expected a demo to resume (config.yaml), got a folder that holds other things"
            )
        found = presets.read(str(file))
        if not {"flow", "inverse"} <= found.keys():
            raise FileExistsError(f"{file}: expected the configuration of a demo, got that of something else")
        check_same(completed(DemoConfig, found), mapping, str(file))
    with replacing(file) as temporary:
        temporary.write_text(yaml.safe_dump(mapping, sort_keys=False))


def _evaluate(out: Path, config: DemoConfig, flow: TarFlow, rev: BiFlow, quick: bool) -> dict[str, Any]:
    started = time.perf_counter()
    real = evaluate.RealData.of(datasets.load(config.flow.data), config.evaluation)
    exact = evaluate.evaluate_flow(flow, real, config.evaluation)
    learned = evaluate.evaluate_inverse(rev, flow, real, config.evaluation)
    guidance = config.default_guidance
    _pictures(out, config, flow, rev, real, _best(exact["samples"])["guidance"])
    seconds = time.perf_counter() - started
    decoders = evaluate.time_decoders(rev, flow, guidance=guidance, repetitions=config.timing_repetitions)
    default = next(s for s in learned["samples"] if s["guidance"] == guidance)
    return {
        "biflow": biflow.__version__,
        "quick": quick,
        "data": {"source": config.flow.data.source, **evaluate.describe_data(real)},
        "summary": {
            "default_guidance": guidance,
            "held_out_bits_per_dim": exact["held_out_bits_per_dim"],
            "round_trip_max_error": exact["round_trip_max_error"],
            "classifier_held_out_accuracy": real.judge.held_out_accuracy,
            "learned": default,
            "exact_at_its_best_guidance": _best(exact["samples"]),
        },
        "exact": {"parameters": _count(flow), **exact},
        "learned": {"parameters": _count(rev), **learned},
        "configuration": to_mapping(config),
        "environment": environment(),
        "timings": {
            "train_flow_seconds": train_seconds(out / "flow"),
            "train_inverse_seconds": train_seconds(out / "inverse"),
            "evaluation_seconds": round(seconds, 1),
            "decoders": decoders,
        },
    }


def _best(samples: list[dict]) -> dict:
    """The entry of highest class agreement."""
    return max(samples, key=lambda s: s["class_agreement"])


def _pictures(
    out: Path, config: DemoConfig, flow: TarFlow, rev: BiFlow, real: evaluate.RealData, exact_guidance: float
) -> None:
    count = real.num_classes * PICTURE_COLUMNS
    settings = dataclasses.replace(config.evaluation, samples=count)
    z, y = evaluate.noise(flow, settings)
    order = y.argsort(stable=True)
    labels = [f"class {k}" for k in range(real.num_classes)]
    for name, images in (
        ("exact", evaluate.decode_exact(flow, z, y, exact_guidance, settings)),
        ("learned", evaluate.decode_learned(rev, flow, z, y, config.default_guidance, settings)),
    ):
        plots.save_grid(images[order].split(PICTURE_COLUMNS), out / f"samples_{name}.png", labels=labels)
    # trajectories: of three z from the prior, then of three held-out digits that the flow encoded
    data_y = real.val_y[:3]
    generator = torch.Generator().manual_seed(config.evaluation.seed)
    noisy = real.val_x[:3] + flow.config.noise_std * torch.randn(real.val_x[:3].shape, generator=generator)
    with torch.no_grad():
        z = torch.cat([z[:3], flow.encode(noisy, data_y)[0]])
    y = torch.cat([y[:3], data_y])
    names = [f"{kind}, class {k}" for kind, k in zip(["prior z"] * 3 + ["encoded digit"] * 3, y.tolist(), strict=True)]
    plots.save_trajectories(*plots.trajectories(flow, rev, z, y, 0.0), names, out / "trajectory.png")
    runs = {"stage one: maximum likelihood": "flow", "stage two: hidden alignment": "inverse"}
    plots.save_curves({title: out / run / "metrics.jsonl" for title, run in runs.items()}, out / "curves.png")


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
