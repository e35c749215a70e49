"""Orderings that a paper found, checked against the results of an ablation: holds, does not hold, within noise."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from biflow import presets
from biflow.ablation.results import at_guidance, best_guidance, mean
from biflow.config import check_fields, check_number, from_mapping


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """One claim: the Frechet distance of row `better` is lower than that of row `worse`.

    better, worse: names of rows, those of their files without .yaml.
    source: where it was found, with the paper's numbers.
    guidance: where the rows are compared; None: each at the guidance of its own lowest mean Frechet distance.
    """

    better: str
    worse: str
    source: str
    guidance: float | None = None

    def __post_init__(self):
        check_fields(self)
        if self.better == self.worse:
            raise ValueError(f"better, worse: expected two rows, got {self.better!r} twice")
        if self.guidance is not None:
            check_number("guidance", self.guidance, minimum=0)


@dataclass(frozen=True)
class Comparison:
    """What results say of an ordering.

    better, worse: mean Frechet distances. seeds: those that both rows have.
    difference: mean over these seeds of d_s = worse - better, each seed's own; noise: half the width of its 95%
        confidence interval, t std(d_s) / sqrt(seeds) with Student's t of seeds - 1 degrees of freedom (12.7 for two
        seeds, 4.3 for three); None with one seed.
    verdict: "holds" (difference > noise), "does not hold" (difference < -noise), "within noise", or "one seed".
    """

    ordering: Ordering
    better: float
    worse: float
    seeds: int
    difference: float
    noise: float | None
    verdict: str


def read_orderings(path: str | Path) -> list[Ordering]:
    """The orderings in a YAML file: a mapping from a name, which only error messages use, to the fields.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such file, not orderings.
    """
    return [from_mapping(Ordering, fields, f"{path}: {name}") for name, fields in presets.read(str(path)).items()]


def compare(ordering: Ordering, results: dict[str, list[dict]]) -> Comparison | None:
    """`ordering` by the results of `run_ablation`; None if they lack one of its rows, its guidance or a common seed.

    Rows are compared seed by seed: rows of one seed that share the flow share its luck.
    """
    sides = []
    for name in (ordering.better, ordering.worse):
        found = results.get(name, [])
        guidance = best_guidance(found) if ordering.guidance is None else ordering.guidance
        sides.append({seed: s["frechet"] for seed, s in at_guidance(found, guidance).items()})
    seeds = [s for s in sides[0] if sides[0][s] is not None and sides[1].get(s) is not None]
    if not seeds:
        return None
    better, worse = ([side[s] for s in seeds] for side in sides)
    differences = [w - b for b, w in zip(better, worse, strict=True)]
    difference = statistics.fmean(differences)
    noise, verdict = None, "one seed"
    if len(seeds) > 1:
        from scipy.stats import t

        quantile = float(t.ppf(0.975, len(seeds) - 1))
        noise = quantile * statistics.stdev(differences) / math.sqrt(len(seeds))
        verdict = "holds" if difference > noise else "does not hold" if difference < -noise else "within noise"
    return Comparison(ordering, mean(better), mean(worse), len(seeds), difference, noise, verdict)
