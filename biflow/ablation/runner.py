"""Rows of an ablation: read, trained from several seeds, evaluated, kept."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import biflow
from biflow import checkpoint, evaluate, presets
from biflow import data as datasets
from biflow.ablation.encoder import prepare
from biflow.ablation.orderings import Ordering
from biflow.ablation.pieces import digest
from biflow.ablation.results import read_results
from biflow.ablation.semantics import Semantics, SemanticsConfig
from biflow.ablation.table import write_tables
from biflow.config import check_fields, completed, from_mapping, to_mapping
from biflow.data import DataConfig
from biflow.evaluate import EvaluationConfig, RealData
from biflow.files import replacing
from biflow.models import BiFlow, TarFlow
from biflow.report import environment
from biflow.train import FlowTraining, InverseTraining, RunConfig, train_flow, train_inverse
from biflow.train.environment import now, own_git
from biflow.train.runs import check_same, train_seconds

PLACE = ("source", "index", "workers")  # fields of the data that may differ from one machine to the next
# fields that are newer than folders that runs are in, whose names do not change while these have their defaults
NEWER = {"representation": None, "decoder": None}
NEWER_OF = {
    "data": (
        "crop", "channels", "classes", "exclude", "split", "image_key", "label_key", "normalize_latents", "posterior",
    ),
    "run": (
        "wandb", "peak_flops", "compile", "activation_checkpointing", "sample_every", "sample_images",
        "sample_guidance", "sample_vae",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """One row, as a YAML file has it.

    title: what the table calls it.
    flow, inverse: a preset or YAML file of stage one, and of stage two; without inverse the row is of the exact one.
    flow_settings, inverse_settings: `key=value` changes of them.
    evaluation: of samples and reconstructions.
    semantics: what the flow knows of classes, and when it knew; None: not measured.
    """

    title: str
    flow: str
    flow_settings: tuple[str, ...] = ()
    inverse: str | None = None
    inverse_settings: tuple[str, ...] = ()
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    semantics: SemanticsConfig | None = None

    def __post_init__(self):
        check_fields(self)
        if self.inverse is None and self.inverse_settings:
            raise ValueError(f"inverse_settings: expected none without inverse, got {list(self.inverse_settings)}")

    def training(self, seed: int, settings: Sequence[str]) -> tuple[FlowTraining, InverseTraining | None]:
        """Both stages' configurations, with `settings` and the seed applied last; flow.KEY=VALUE is for stage one."""

        def last(stage: str) -> list[str]:
            other = {"flow": "inverse.", "inverse": "flow."}[stage]
            own = [s.removeprefix(f"{stage}.") for s in settings if not s.startswith(other)]
            return [*own, f"run.seed={seed}"]

        flow = presets.training(self.flow, [*self.flow_settings, *last("flow")], "flow")
        if self.inverse is None:
            return flow, None
        return flow, presets.training(self.inverse, [*self.inverse_settings, *last("inverse")], "inverse")


def read_row(path: str | Path) -> AblationRow:
    """The row in a YAML file; the .yaml files that it names are relative to it.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such file, not a row.
    """
    row = from_mapping(AblationRow, presets.read(str(path)), str(path))
    stages = {name: getattr(row, name) for name in ("flow", "inverse")}
    folder = Path(path).parent
    return replace(row, **{k: str(folder / v) for k, v in stages.items() if v and v.endswith((".yaml", ".yml"))})


def run_ablation(
    rows: Sequence[str | Path],
    out: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    settings: Sequence[str] = (),
    orderings: Sequence[Ordering] = (),
    progress: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """Train and evaluate every row from every seed, and write a table and a plot.

    What is finished is skipped, what was interrupted goes on: call it again. Rows whose flows, or flows and inverses,
    have the same configuration share them.

    Args:
        rows: YAML files (`AblationRow`); their names name the results.
        out: a folder. results/ROW-SEED.json: one result each, small enough to be kept in a repository; flows/,
            inverses/: the runs; encoders/, features/: of representation alignment, shared by all rows and seeds that
            ask for the same; table.md, table.png: of all results in the folder. One process a seed at a time: rows of
            a seed share runs. Seeds that share an encoder: the second process when the first has written it.
        seeds: of training; the evaluation has its own. A row's mean and spread are over them.
        settings: `key=value` for both stages of all rows, such as data.source=fashion_mnist.npz; flow.key=value and
            inverse.key=value for one of them.
        orderings: of rows, which table.md compares as far as there are results.
        progress: show progress bars.

    Returns:
        name of a row -> its results in the order of `seeds`. Of a run whose loss was not finite: "failed", the reason,
        in the place of numbers; the others go on. Remove its file to try again.

    Raises:
        FileNotFoundError, ValueError, TypeError: rows that cannot be read, two of one name, no seeds or one twice; a
            result in `out` of another configuration (where the data lies may differ).
    """
    named = {Path(path).stem: read_row(path) for path in rows}
    if len(named) < len(rows) or not named:
        raise ValueError(f"rows: expected files of different names, at least one, got {[str(p) for p in rows]}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected at least one, each once, got {list(seeds)}")
    out = Path(out)
    (out / "results").mkdir(parents=True, exist_ok=True)
    results = {name: [] for name in named}

    @functools.lru_cache(maxsize=2)  # rows have the same data and mostly the same evaluation
    def real_data(data: DataConfig, evaluation: EvaluationConfig) -> RealData:
        return RealData.of(datasets.load(data), evaluation)

    for seed in seeds:  # all rows of a seed first: a table that is cut short compares all of them
        for name, row in named.items():
            results[name].append(_result(name, row, seed, settings, out, real_data, progress))
            write_tables(read_results(out / "results", named), orderings, out)
    return results


def _result(
    name: str,
    row: AblationRow,
    seed: int,
    settings: Sequence[str],
    out: Path,
    real_data: Callable[[DataConfig, EvaluationConfig], RealData],
    progress: bool,
) -> dict:
    flow_config, inverse_config = row.training(seed, settings)
    configuration = _configuration(flow_config, inverse_config, row.evaluation, row.semantics)
    file = out / "results" / f"{name}-{seed}.json"
    if file.is_file():
        found = json.loads(file.read_text())
        check_same(_with_defaults(found["configuration"]), configuration, str(file))
        return found
    result = {"row": name, "title": row.title, "seed": seed}
    try:
        result |= _train_and_evaluate(row, flow_config, inverse_config, out, real_data, progress)
    except FloatingPointError as error:
        result["failed"] = str(error).partition(";")[0]
    result |= {"configuration": configuration, "environment": _environment()}
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def _environment() -> dict:
    """Of the process that finishes a result. commit: of biflow, where it runs from a checkout."""
    checkout = own_git()
    code = {} if checkout is None else {"commit": checkout["commit"], "dirty": checkout["dirty"]}
    return {"biflow": biflow.__version__, **code, **environment(), "finished": now()}


def _train_and_evaluate(
    row: AblationRow,
    flow_config: FlowTraining,
    inverse_config: InverseTraining | None,
    out: Path,
    real_data: Callable[[DataConfig, EvaluationConfig], RealData],
    progress: bool,
) -> dict:
    flow_run, inverse_run = out / "flows" / _digest(flow_config), None
    prepared = prepare(flow_config, out, progress)
    flow = train_flow(prepared.config, flow_run, resume=True, progress=progress)
    rev = None
    if inverse_config is not None:
        inverse_run = out / "inverses" / _digest(flow_config, inverse_config)
        rev = train_inverse(inverse_config, flow, inverse_run, resume=True, progress=progress)
    real, semantics, curve, known = real_data(flow_config.data, row.evaluation), None, [], {}
    if row.semantics is not None:
        data = datasets.load(flow_config.data)
        semantics = Semantics(flow, flow_run, prepared, data, real, row.evaluation, row.semantics)
        curve = semantics.curve()
        known = semantics.samples(curve) if rev is None else {}
    return {
        **_evaluate(flow, rev, real, row.evaluation, known),
        **({} if semantics is None else {"semantics": semantics.measure(curve)}),
        "judge_sha256": None if real.judge is None else checkpoint.fingerprint(real.judge.model),
        "encoder": prepared.encoder,
        "prepare_seconds": prepared.seconds,
        "train_seconds": {
            "flow": train_seconds(flow_run),
            "inverse": None if rev is None else train_seconds(inverse_run),
        },
    }


def _evaluate(
    flow: TarFlow, rev: BiFlow | None, real: RealData, evaluation: EvaluationConfig, known: dict[float, dict]
) -> dict:
    """known: guidance -> samples of the exact inverse that have been described already."""
    left = tuple(guidance for guidance in evaluation.guidances if guidance not in known)
    if rev is None and max(left, default=-1) == max(evaluation.guidances):  # whose residual is measured
        found = evaluate.evaluate_flow(flow, real, replace(evaluation, guidances=left))
        described = known | {samples["guidance"]: samples for samples in found["samples"]}
        found["samples"] = [described[guidance] for guidance in evaluation.guidances]
    elif rev is None:
        found = evaluate.evaluate_flow(flow, real, evaluation)
    else:
        found = evaluate.evaluate_likelihood(flow, real, evaluation)
        found |= evaluate.evaluate_inverse(rev, flow, real, evaluation)
    for samples in found["samples"]:
        samples["passes"] = _passes(flow, rev, samples["guidance"])
    return {"data": evaluate.describe_data(real), **found}


def _passes(flow: TarFlow, rev: BiFlow | None, guidance: float) -> int:
    """Passes through a network, one after the other, from z to x; an exact step of one token counts as one."""
    if rev is None:
        return flow.config.num_blocks * flow.blocks[0].sequential_passes
    return 2 if guidance > 0 and not rev.config.max_guidance else 1


def _configuration(
    flow: FlowTraining,
    inverse: InverseTraining | None,
    evaluation: EvaluationConfig,
    semantics: SemanticsConfig | None = None,
) -> dict:
    """All that determines a result, as it is stored in it."""
    stages = {"flow": flow, "inverse": inverse, "evaluation": evaluation}
    stages |= {} if semantics is None else {"semantics": semantics}
    return _without_place({k: None if c is None else to_mapping(c) for k, c in stages.items()})


def _without_place(configuration: dict) -> dict:
    """The configuration without what differs from one machine to the next: where the data lies, who decodes it, how
    many processes and micro-batches share a step."""
    stages = {k: v for k, v in configuration.items() if k in ("flow", "inverse") and v is not None}
    return configuration | {
        k: {name: value for name, value in v.items() if name != "parallel"}
        | {"data": {name: value for name, value in v["data"].items() if name not in PLACE}}
        for k, v in stages.items()
    }


def _with_defaults(configuration: dict) -> dict:
    """The configuration of a result with the defaults of fields that are newer than it."""
    classes = {
        "flow": FlowTraining,
        "inverse": InverseTraining,
        "evaluation": EvaluationConfig,
        "semantics": SemanticsConfig,
    }
    return _without_place({k: v and completed(classes[k], v) for k, v in configuration.items()})


def _digest(flow: FlowTraining, inverse: InverseTraining | None = None) -> str:
    named = _without_place({k: to_mapping(c) for k, c in (("flow", flow), ("inverse", inverse)) if c is not None})
    plain = {group: to_mapping(cls()) for group, cls in (("data", DataConfig), ("run", RunConfig))}
    for stage in named.values():
        for name, default in NEWER.items():
            if stage.get(name, default) == default:
                stage.pop(name, None)
        for group, newer in NEWER_OF.items():
            stage[group] = {k: v for k, v in stage[group].items() if k not in newer or v != plain[group][k]}
    return digest(named)
