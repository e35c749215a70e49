"""Runs side by side: what differs in their configuration and environment, how far they came, losses at equal steps."""

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biflow import presets
from biflow.files import replacing
from biflow.train import environment
from biflow.train.configs import flatten
from biflow.train.runs import with_defaults
from biflow.train.speed import CLOCK

SITTING = ("step", "started", "command", "folder")  # of a sitting; no two are alike in these
SHOWN_STEPS = 8  # of those that all runs have
SPEED = ("step_seconds", "data_share", "images_per_second", "mfu")


def compare(folders: Sequence[str | Path]) -> dict[str, Any]:
    """What two or more runs of one stage have done, and what differs between them; they may still be going on.

    Returns:
        stage; runs: of each its name, folder, step, steps, seconds (of all sittings), sittings, the last line of
        metrics of each split ("train", "val"), best: the one of the smallest held-out loss, and of the last sitting's
        lines the medians of what `Speed.report` says, None where a run does not have it;
        configuration, environment: field -> its value in each run, of fields that are not the same in all (the
        environment's of the last sittings); at_equal_steps: split -> {"step": those that all runs have a line of,
        metric: [its values at these steps, of each run]} for metrics of all runs, but those of time.

    Raises:
        FileNotFoundError: a folder that is none of a run. ValueError: fewer than two, one twice, or different stages,
            whose losses are different quantities.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    if len(paths) < 2:
        raise ValueError(f"runs: expected at least two folders, got {len(paths)}")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"runs: expected each folder once, got {', '.join(map(str, paths))}")
    configurations = [_configuration(path) for path in paths]
    stages = [found.pop("stage") for found in configurations]
    if len(set(stages)) > 1:
        raise ValueError(
            "runs: expected one stage, since their losses are different quantities, got "
            + ", ".join(f"{path} ({stage})" for path, stage in zip(paths, stages, strict=True))
        )
    lines = [_lines(path) for path in paths]
    sittings = [environment.sittings(path) for path in paths]
    last = [{k: v for k, v in found[-1].items() if k not in SITTING} if found else {} for found in sittings]
    described = [
        {"name": name, "folder": str(path), **_progress(found, sat, config["optim"]["steps"])}
        for name, path, found, sat, config in zip(_names(paths), paths, lines, sittings, configurations, strict=True)
    ]
    return {
        "stage": stages[0],
        "runs": described,
        "configuration": _differences(configurations),
        "environment": _differences(last),
        "at_equal_steps": {split: _at_equal_steps(lines, split) for split in ("train", "val")},
    }


def table(found: dict[str, Any]) -> list[str]:
    """`compare` as lines of text: a column a run, and a row a field that differs, a result, a common step."""
    runs = found["runs"]
    rows = [("", *(run["name"] for run in runs))]
    for group in ("configuration", "environment"):
        rows += [(), (f"{group}:" if found[group] else f"{group}: the same",)]
        rows += [(f"  {name}", *map(_text, values)) for name, values in found[group].items()]
    rows += [(), ("results:",), ("  step", *(f"{run['step']} of {run['steps']}" for run in runs))]
    for split, name in (("train", "training loss"), ("val", "held-out loss")):
        rows.append((f"  {name}, last", *(_text((run[split] or {}).get("loss")) for run in runs)))
    best = [run["best"] and f"{_text(run['best']['loss'])} at {run['best']['step']}" for run in runs]
    rows.append(("  held-out loss, best", *map(_text, best)))
    rows += [(f"  {name}", *(_text(run[name]) for run in runs)) for name in ("seconds", *SPEED)]
    for split, name in (("val", "held-out loss"), ("train", "training loss")):
        common = found["at_equal_steps"][split]
        if common["step"] and "loss" in common:
            rows += [(), (f"{name} at step:",)]
            for index in _spread(len(common["step"])):
                rows.append((f"  {common['step'][index]}", *(_text(values[index]) for values in common["loss"])))
            others = [metric for metric in common if metric not in ("step", "loss", "lr", "grad_norm")]
            if others:
                rows += [(), (f"{name.split()[0]}, at step {common['step'][-1]}:",)]
                rows += [(f"  {metric}", *(_text(values[-1]) for values in common[metric])) for metric in others]
            break
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(len(runs) + 1)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in rows]


def save_plot(found: dict[str, Any], path: str | Path) -> None:
    """Write a PNG of the losses of the runs of `compare` over their steps: training and held out.

    ImportError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a plot needs Matplotlib, which is not installed: pip install 'biflow[train]'") from None
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axis, (split, title) in zip(figure.subplots(1, 2), (("train", "training"), ("val", "held out")), strict=True):
        for run in found["runs"]:
            points = [(p["step"], p["loss"]) for p in _lines(Path(run["folder"]))[split] if _is_number(p["loss"])]
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=run["name"])
        axis.set(title=title, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


# --- reading ----------------------------------------------------------------------------------------------------------


def _configuration(path: Path) -> dict[str, Any]:
    if not (path / "config.yaml").is_file():
        raise FileNotFoundError(f"{path}: expected the folder of a run, found no config.yaml in it")
    found = with_defaults(presets.read(str(path / "config.yaml")))
    if found.get("stage") not in presets.STAGES:
        raise ValueError(f"{path}: expected a run of stage flow or inverse, got {found.get('stage')!r}")
    return found


def _lines(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl by split; one that is being written, or was when the run was killed, is left out."""
    found = {"train": [], "val": []}
    file = path / "metrics.jsonl"
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("split") in found and "step" in value and "loss" in value:
            found[value["split"]].append(value)
    return found


def _names(paths: list[Path]) -> list[str]:
    """The folders' names, with as much of the path as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


# --- what is said of them ---------------------------------------------------------------------------------------------


def _progress(lines: dict[str, list[dict]], sittings: list[dict], steps: int) -> dict[str, Any]:
    every = [*lines["train"], *lines["val"]]
    scored = [line for line in lines["val"] if _is_number(line["loss"])]
    since = sittings[-1]["step"] if sittings else 0
    speed = {}
    for name in SPEED:
        values = [line[name] for line in lines["train"] if line["step"] > since and name in line]
        speed[name] = statistics.median(values) if values else None
    return {
        "step": max((line["step"] for line in every), default=0),
        "steps": steps,
        "seconds": max((line["seconds"] for line in every), default=None),
        "sittings": len(sittings),
        "train": lines["train"][-1] if lines["train"] else None,
        "val": lines["val"][-1] if lines["val"] else None,
        "best": min(scored, key=lambda line: line["loss"], default=None),
        **speed,
    }


def _differences(mappings: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """field -> its values, None where a mapping lacks it, of fields that differ."""
    flat = [flatten(mapping) for mapping in mappings]
    names = dict.fromkeys(name for mapping in flat for name in mapping)
    found = {name: [mapping.get(name) for mapping in flat] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _at_equal_steps(lines: list[dict[str, list[dict]]], split: str) -> dict[str, list]:
    by_step = [{line["step"]: line for line in found[split]} for found in lines]
    steps = sorted(set.intersection(*map(set, by_step)))
    names = dict.fromkeys(name for found in by_step for step in steps for name in found[step])
    metrics = [
        name
        for name in names
        if name not in (*CLOCK, "step", "split") and all(name in found[step] for found in by_step for step in steps)
    ]
    return {"step": steps, **{name: [[found[step][name] for step in steps] for found in by_step] for name in metrics}}


def _spread(count: int) -> list[int]:
    """At most SHOWN_STEPS of 0 ... count - 1, the last among them."""
    shown = min(count, SHOWN_STEPS)
    return [round((k + 1) * count / shown) - 1 for k in range(shown)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
