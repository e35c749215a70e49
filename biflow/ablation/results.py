"""How results are read: `samples` of every seed, by guidance."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


def read_results(folder: Path, first: Iterable[str] = ()) -> dict[str, list[dict]]:
    """Every ROW-SEED.json of a folder: row -> results by seed; the rows of `first`, then others by name."""
    found: dict[str, list[dict]] = {name: [] for name in first}
    for file in sorted(folder.glob("*-*.json")):
        found.setdefault(file.stem.rpartition("-")[0], []).append(json.loads(file.read_text()))
    return {name: sorted(results, key=lambda r: r["seed"]) for name, results in found.items() if results}


def finished(results: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The results of runs that reached their end; rows without any are left out."""
    whole = {name: [r for r in found if "failed" not in r] for name, found in results.items()}
    return {name: found for name, found in whole.items() if found}


def by_guidance(results: list[dict]) -> dict[float, list[dict]]:
    """Guidance -> the samples' entries of all seeds."""
    found: dict[float, list[dict]] = {}
    for result in results:
        for samples in result["samples"]:
            found.setdefault(samples["guidance"], []).append(samples)
    return found


def at_guidance(results: list[dict], guidance: float | None) -> dict[int, dict]:
    """Seed -> the samples' entry at that guidance."""
    return {r["seed"]: s for r in results for s in r["samples"] if s["guidance"] == guidance}


def best_guidance(results: list[dict]) -> float | None:
    """Where the mean Frechet distance is lowest; None without results."""
    means = {g: mean([s["frechet"] for s in samples]) for g, samples in by_guidance(results).items()}
    return min(means, key=means.get, default=None)


def mean(values: Sequence[float | None]) -> float:
    """Of the values that are known; infinite if none is."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else float("inf")


def cell(values: Sequence[float | None]) -> str:
    """Of a table: the mean of the values that are known ± their standard deviation; "" if none is."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.2g}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.4g}{spread}"
