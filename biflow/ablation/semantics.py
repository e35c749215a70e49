"""What a flow of an ablation knows of classes, at the end and along its training: classification, probes, curves."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import biflow
from biflow import evaluate
from biflow.ablation.results import cell
from biflow.config import check_fields
from biflow.data import ImageData, spread
from biflow.evaluate import EvaluationConfig, ProbeConfig, RealData
from biflow.models import TarFlow
from biflow.train import runs

TARGETS = {"frechet": -1.0, "accuracy": 1.0}  # what a run has to reach, and which way is better


@dataclass(frozen=True)
class SemanticsConfig:
    """What is measured of a row's flow beside its samples. The data has to have labels, and held-out images.

    classify_images: held-out images that are classified by the gradient rule.
    probe: of the linear probes of every layer.
    curve_samples: of every checkpoint that the run has kept (run.checkpoint_every, run.keep), also the Frechet distance
        of so many samples, and the classification; 0: of none.
    curve_guidance: of these samples.
    """

    classify_images: int = 2000
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    curve_samples: int = 0
    curve_guidance: float = 0.0

    def __post_init__(self):
        check_fields(self)
        for name, least in (("classify_images", 2), ("curve_samples", 0), ("curve_guidance", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def measure(
    flow: TarFlow, run: Path, data: ImageData, real: RealData, evaluation: EvaluationConfig, config: SemanticsConfig
) -> dict:
    """classification: `describe_classification` of the gradient rule. probe: `probe_flow` of all layers. curve: by
    checkpoint, oldest first, step, frechet and accuracy; its classification and samples are those of `config`.

    ValueError: data without labels or held-out images, a flow without classes.
    """
    if data.val_y is None or real.judge is None or not flow.config.num_classes:
        raise ValueError("semantics: expected labelled held-out images and a flow with classes, got none")
    rows = spread(len(data.val_x), config.classify_images)
    x, y = data.val_x.batch(rows), data.val_y[rows]

    def classification(model: TarFlow) -> dict:
        scores = model.classify(x.to(model.var.device), batch_size=evaluation.batch_size).cpu()
        return evaluate.describe_classification(scores, y, "gradient")

    curve = []
    for folder in reversed(runs.checkpoints(run)) if config.curve_samples else ():
        model = biflow.load(folder / "model.safetensors", flow.var.device)
        own = replace(evaluation, samples=config.curve_samples, guidances=(config.curve_guidance,))
        z, classes = evaluate.noise(model, own)
        samples = evaluate.decode_exact(model, z, classes, config.curve_guidance, own)
        described = evaluate.describe_samples(samples, classes, real, config.curve_guidance)
        accuracy = classification(model)["accuracy"]
        curve.append({"step": int(folder.name[5:]), "frechet": described["frechet"], "accuracy": accuracy})
    return {
        "classification": classification(flow),
        "probe": evaluate.probe_flow(flow, data, config=config.probe),
        "curve": curve,
        "settings": asdict(config),
    }


def steps_to_reach(curve: list[dict], target: float | None, name: str) -> int | None:
    """The first step of a curve at which `name` is as good as `target`; None: at none."""
    sign = TARGETS[name]
    known = [point for point in curve if point[name] is not None] if target is not None else []
    return next((point["step"] for point in known if sign * point[name] >= sign * target), None)


def semantics_table(results: dict[str, list[dict]]) -> str:
    """Markdown: classification, the best and the last layer's probe, and how soon a row is where the baseline ends.

    The baseline is the first row without representation alignment; its end is the last point of its curve, seed by
    seed. "" if no row has semantics.
    """
    rows = {name: [r for r in found if "semantics" in r] for name, found in results.items()}
    rows = {name: found for name, found in rows.items() if found}
    if not rows:
        return ""
    baseline = next((f for f in rows.values() if f[0]["configuration"]["flow"].get("representation") is None), [])
    ends = {r["seed"]: r["semantics"]["curve"][-1] for r in baseline if r["semantics"]["curve"]}
    layers = [(p["block"], p["layer"]) for p in next(iter(rows.values()))[0]["semantics"]["probe"]]
    probes = " | ".join(f"probe {block}:{layer}" for block, layer in layers)
    lines = [
        "| | seeds | accuracy, gradient rule | NLL | steps to the baseline's final Frechet distance "
        f"| steps to its final accuracy | {probes} |",
        "|---" * (6 + len(layers)) + "|",
    ]
    for found in rows.values():
        own = [r["semantics"] for r in found]
        cells = [found[0]["title"], str(len(found))]
        cells += [cell([s["classification"][key] for s in own]) for key in ("accuracy", "nll")]
        for name in TARGETS:
            steps = [
                steps_to_reach(r["semantics"]["curve"], ends[r["seed"]][name], name)
                for r in found
                if r["seed"] in ends and r["semantics"]["curve"]
            ]
            missed = f" ({steps.count(None)} of {len(steps)} never)" if None in steps else ""
            cells.append(cell(steps) + missed)
        for pair in layers:
            cells.append(cell([p["accuracy"] for s in own for p in s["probe"] if (p["block"], p["layer"]) == pair]))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Accuracy and NLL: of held-out images by `TarFlow.classify`. Probes: linear, by block:layer from 0. Steps: the "
        "first checkpoint as good as the last one of the first row without alignment, seed by seed.",
    ]
    return "\n".join(lines) + "\n"
