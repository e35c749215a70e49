"""Results as a Markdown table and a plot."""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from biflow.ablation.orderings import Ordering, compare
from biflow.ablation.results import at_guidance, best_guidance, by_guidance, cell, finished
from biflow.ablation.semantics_table import semantics_table
from biflow.files import replacing

PANELS = {"frechet": "Frechet distance, lower is better", "class_agreement": "class agreement, higher is better"}
STYLES = (
    {"marker": "o"},
    {"marker": "s", "linestyle": "--"},
    {"marker": "^", "linestyle": ":"},
)  # colours repeat after 10


def write_tables(results: dict[str, list[dict]], orderings: Sequence[Ordering], out: Path) -> None:
    """out/table.md and (this needs Matplotlib) out/table.png: Frechet distance and class agreement by guidance."""
    whole = finished(results)
    parts = [table(whole), semantics_table(whole)] if whole else []
    parts += [orderings_table(whole, orderings)] if orderings and whole else []
    parts += [failures_list(results)]
    text = "\n".join(part for part in parts if part)
    with replacing(out / "table.md") as temporary:
        temporary.write_text(text)
    if whole:
        _plot(whole, out / "table.png")


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: a line a row, without guidance and at that of its lowest mean Frechet distance.

    Mean and standard deviation over seeds.
    """
    shown = ("frechet", "precision", "recall", "class_agreement")
    names = "Frechet distance | precision | recall | class agreement"
    lines = [
        f"| | seeds | at guidance 0: {names} | best guidance | passes | {names} | reconstruction MSE | bits per dim |",
        "|---" * 14 + "|",
    ]
    for found in results.values():
        best = best_guidance(found)
        cells = [found[0]["title"], str(len(found))]
        without, at_best = (list(at_guidance(found, guidance).values()) for guidance in (0.0, best))
        cells += [cell([s[key] for s in without]) for key in shown]
        cells += [f"{best:g}", str(at_best[0]["passes"])]
        cells += [cell([s[key] for s in at_best]) for key in shown]
        cells += [cell([r.get(key) for r in found]) for key in ("reconstruction_mse", "held_out_bits_per_dim")]
        lines.append(f"| {' | '.join(cells)} |")
    data = [r["data"] for found in results.values() for r in found]
    floors = [[d[f"{key}_held_out"] for d in data] for key in shown[:3]]
    floors.append([d.get("classifier_held_out_accuracy") for d in data])
    lines += [
        "",
        f"Real held-out images: Frechet distance {cell(floors[0])}, precision {cell(floors[1])}, recall "
        f"{cell(floors[2])}, class agreement {cell(floors[3])}. A cell: mean over seeds ± standard deviation. Passes: "
        "through a network, one after the other; an exact step of one token is one.",
    ]
    return "\n".join(lines) + "\n"


def orderings_table(results: dict[str, list[dict]], orderings: Sequence[Ordering]) -> str:
    """Markdown: a line for each of the orderings that there are results for."""
    lines = [
        "| lower Frechet distance expected | than | guidance | mean | mean | difference | noise | seeds | verdict "
        "| source |",
        "|---" * 10 + "|",
    ]
    verdicts: Counter[str] = Counter()
    for ordering in orderings:
        found = compare(ordering, results)
        if found is None:
            continue
        verdicts[found.verdict] += 1
        cells = [results[name][0]["title"] for name in (ordering.better, ordering.worse)]
        cells.append("each row's best" if ordering.guidance is None else f"{ordering.guidance:g}")
        cells += [f"{value:.4g}" for value in (found.better, found.worse, found.difference)]
        cells += ["" if found.noise is None else f"{found.noise:.2g}", str(found.seeds), found.verdict, ordering.source]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"In all: {', '.join(f'{count} {verdict}' for verdict, count in sorted(verdicts.items()))}.",
        "",
        "Difference: mean over seeds of each seed's own difference. Noise: half its 95% confidence interval (Student's "
        "t: the fewer seeds, the wider). Holds: the difference is larger; does not hold: it is below minus the noise. "
        "Seeds are of training: all rows are scored on the same noise by the same classifier.",
    ]
    return "\n".join(lines) + "\n"


def failures_list(results: dict[str, list[dict]]) -> str:
    """Markdown: the runs that failed, and why; "" if none did."""
    failed = [r for found in results.values() for r in found if "failed" in r]
    return "".join(f"- {r['title']}, seed {r['seed']}: {r['failed']}\n" for r in failed)


def _plot(results: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, (key, label) in zip(panels, PANELS.items(), strict=True):
        for row, found in enumerate(results.values()):
            values = {g: [s[key] for s in samples] for g, samples in sorted(by_guidance(found).items())}
            values = {g: known for g, v in values.items() if (known := [x for x in v if x is not None])}
            means = [statistics.fmean(v) for v in values.values()]
            spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values.values()]
            axes.errorbar(
                list(values), means, yerr=spreads, capsize=3, label=found[0]["title"], **STYLES[row // 10 % len(STYLES)]
            )
        axes.set(xlabel="guidance", ylabel=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
