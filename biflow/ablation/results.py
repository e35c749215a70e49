"""How results are read: `samples` of every seed, by guidance."""

import statistics
from collections.abc import Sequence


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
