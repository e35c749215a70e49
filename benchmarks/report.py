"""What bench_decode found, for people: a short table, Markdown, a plot. All take {"machine", "limits", "rows"}."""

from pathlib import Path

from .timing import table

COLUMNS = ("config", "batch", "contestant", "solver", "precision", "ms_image", "us_step", "limit_us_step",
           "percent_of_limit")  # fmt: skip


def text(found: dict) -> list[str]:
    """Lines for a terminal: limits, then rows with the columns that matter."""
    reads = [{k: v for k, v in row.items() if k != "gflop_s"} for row in found["limits"] if "gb_s" in row]
    gemms = [row for row in found["limits"] if "gflop_s" in row]
    rows = []
    for row in found["rows"]:
        short = {name: row.get(name) for name in (*COLUMNS, *_ratios(found["rows"]))}
        errors = {"max_error": row["max_error"], "rms_error": row["rms_error"], "against": row["error_against"]}
        rows.append(short | errors | {"blocks": _blocks(row)})
    return [*table(reads), "", *table(gemms), "", *table(rows)]


def markdown(found: dict) -> str:
    """The machine, the limits and a table of all rows."""
    machine = found["machine"]
    ratios = _ratios(found["rows"])
    head = ["flow, batch", "decoded by", "ms an image", "us a step", "limit, us", "share of it"]
    head += [f"x {name[2:].replace('_', '-')}" for name in ratios] + ["error, largest", "rms"]
    lines = [
        f"{machine['date'][:10]} · {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads · "
        f"{machine['isa']} · torch {machine['torch']} · commit {machine['commit']}",
        "",
        "Limits measured at the start and the end of the run, the better one: "
        + "; ".join(_limit(row) for row in found["limits"])
        + ".",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in found["rows"]:
        part = "" if row["blocks_timed"] == row["blocks"] else f" ({_blocks(row)} blocks timed)"
        cells = [
            f"{row['config']} {row['batch']}",
            label(row) + part,
            f"{row['ms_image']:.3g}",
            f"{row['us_step']:.4g}",
            f"{row['limit_us_step']:.4g}",
            f"{row['percent_of_limit']:.0f}%",
            *[f"{row[name]:.2f}" if name in row else "-" for name in ratios],
            f"{row['max_error']:.1e}",
            f"{row['rms_error']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save_plot(found: dict, path: str | Path) -> None:
    """A PNG: a panel per config, a line per contestant, a dot per batch at its milliseconds an image, log scale.

    Hollow dots were timed in part.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows, machine = found["rows"], found["machine"]
    configs, batches = (list(dict.fromkeys(row[key] for row in rows)) for key in ("config", "batch"))
    names = list(dict.fromkeys(label(row) for row in rows))
    colors = {batch: f"C{i}" for i, batch in enumerate(sorted(batches))}
    figure = Figure(figsize=(1.9 + 3.0 * len(configs), 1.7 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(configs), squeeze=False, sharey=True)[0]
    for panel, config in zip(panels, configs, strict=True):
        for row in rows:
            if row["config"] == config:
                color, whole = colors[row["batch"]], row["blocks_timed"] == row["blocks"]
                panel.plot(
                    row["ms_image"], names.index(label(row)), "o", color=color, mfc=color if whole else "white", ms=7
                )
        panel.set(title=config, xscale="log", xlabel="ms per image", yticks=range(len(names)), yticklabels=names)
        panel.grid(axis="x", which="both", alpha=0.2)
        panel.grid(axis="y", alpha=0.4)
    panels[0].set_ylim(len(names) - 0.5, -0.5)  # shared; the first contestant on top
    marks = [Line2D([], [], marker="o", ls="", color=colors[b], label=f"batch {b}") for b in colors]
    if any(row["blocks_timed"] != row["blocks"] for row in rows):
        marks.append(Line2D([], [], marker="o", ls="", color="gray", mfc="white", label="timed in part"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    figure.suptitle(
        f"Exact decode, {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['commit']}, {machine['date'][:10]}",
        fontsize="medium",
    )
    figure.savefig(path, format="png", dpi=130)


def label(row: dict) -> str:
    """The contestant, with solver and precision where it has a choice of them."""
    return f"biflow, {row['solver']}, {row['precision']}" if row["contestant"] == "biflow" else row["contestant"]


def _ratios(rows: list[dict]) -> list[str]:
    """Columns of ratios: x_eager and those of the peers."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith("x_")))


def _blocks(row: dict) -> str:
    return f"{row['blocks_timed']} of {row['blocks']}"


def _limit(row: dict) -> str:
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    if "gb_s" in row:
        return f"{row['mb']:.3g} MB read at {row['gb_s']:.0f} GB/s by {threads}"
    return f"{row['limit']} {row['gflop_s']:.0f} GFLOP/s, {threads}"
