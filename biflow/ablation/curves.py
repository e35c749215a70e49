"""Along the training of an ablation's flow: what its checkpoints know, and when a run is where another one ends."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import biflow
from biflow import checkpoint, evaluate
from biflow.ablation.pieces import kept
from biflow.evaluate import EvaluationConfig, RealData
from biflow.models import TarFlow
from biflow.train import FlowTraining, runs

TARGETS = {"frechet": -1.0, "accuracy": 1.0}  # what a run has to reach, and which way is better


def measure_curve(
    run: Path,
    training: FlowTraining,
    real: RealData,
    evaluation: EvaluationConfig,
    guidance: float,
    settings: dict,
    known: Callable[[TarFlow], dict],
    device: torch.device,
) -> list[dict]:
    """Of every checkpoint at a multiple of run.checkpoint_every and at the last step, oldest first: step, samples
    (`describe_samples` of evaluation.samples at `guidance`) and what `known` says of it.

    Each point is kept in run/evaluation as soon as it is measured, under a hash of `settings`, what `known` depends on,
    of the samples' settings, the checkpoint's weights and the classifier that judges.
    """
    own = replace(evaluation, guidances=(guidance,))
    drawn = {name: getattr(own, name) for name in ("samples", "guidances", "batch_size", "seed", "denoise")}
    judge, points = checkpoint.fingerprint(real.judge.model), []
    for folder in reversed(runs.checkpoints(run)):
        step = int(folder.name[5:])
        if step % training.run.checkpoint_every and step != training.optim.steps:
            continue  # where a signal stopped the run: other runs have no such point
        model = biflow.load(folder / "model.safetensors", device)
        key = {"drawn": drawn, "known": settings, "judge": judge, "weights": checkpoint.fingerprint(model)}

        def point(model: TarFlow = model, step: int = step) -> dict:
            z, classes = evaluate.noise(model, own)
            samples = evaluate.decode_exact(model, z, classes, guidance, own)
            return {
                "step": step,
                "samples": evaluate.describe_samples(samples, classes, real, guidance),
                **known(model),
            }

        points.append(kept(run / "evaluation", folder.name, key, point))
    return points


def steps_to_reach(curve: list[dict], target: float | None, name: str) -> float | None:
    """Steps after which `name` is as good as `target` and stays so to the curve's end; None: it ends below it.

    Linear between the last point that is not as good and the next one; the first point if all are as good. A point of
    which `name` is None is not there.
    """
    if target is None:
        return None
    sign = TARGETS[name]
    known = [(point["step"], sign * (point[name] - target)) for point in curve if point[name] is not None]
    missed = [index for index, (_, gain) in enumerate(known) if gain < 0]
    first = missed[-1] + 1 if missed else 0
    if first >= len(known):
        return None
    step, gain = known[first]
    if not first:
        return float(step)
    before, lack = known[first - 1]
    return before + (step - before) * lack / (lack - gain)
