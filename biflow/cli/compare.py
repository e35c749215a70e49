"""Runs side by side: compare."""

import json
from pathlib import Path
from typing import Annotated

import typer

from biflow.cli.common import examples


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Folders of runs, finished or going on.")],
    out: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Also write all of it, and every metric at equal steps."),
    ] = None,
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Draw the losses.")] = None,
) -> None:
    """What differs between runs of one stage, and what came out: a table.

    Of configuration and environment only what differs; then steps, losses, time a step, and losses at equal steps.
    """
    from biflow import compare as comparing
    from biflow.files import replacing

    paths = {name: Path(file).expanduser() for name, file in (("--json", out), ("--plot", plot)) if file is not None}
    for name, path in paths.items():
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{name}: expected an existing folder, got {path.parent}")
    found = comparing.compare(runs)
    typer.echo("\n".join(comparing.table(found)))
    if "--json" in paths:
        with replacing(paths["--json"]) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
    if "--plot" in paths:
        comparing.save_plot(found, paths["--plot"])


COMMANDS = (
    (
        "compare",
        compare,
        examples(
            "biflow compare runs/flow runs/short",
            "biflow compare runs/* --json compare.json --plot compare.png",
        ),
    ),
)
