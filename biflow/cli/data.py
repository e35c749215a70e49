"""Data sets: data check."""

import json
from pathlib import Path
from typing import Annotated

import typer

from biflow.cli.common import examples


def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A folder, .tar shards, a .npz, a Hugging Face data set; hf:NAME on the hub, or digits.",
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Fields of data, such as split=test or classes=names.txt."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that decode.")] = 0,
    duplicates: Annotated[bool, typer.Option("--duplicates", help="Also look for files of equal bytes.")] = False,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Write the corrupt ones, to give as data.exclude.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Read and decode every image of a data set once; prints JSON: counts, sizes, classes, what is corrupt.

    Training needs no check: it puts the next image of the class in the place of a corrupt one, and tells of it. With
    the file of --out as data.exclude they are left out from the beginning. The exit code is 0 whatever was found.
    """
    from biflow.config import apply_overrides, from_mapping
    from biflow.data import DataConfig
    from biflow.data.check import check as check_data
    from biflow.files import replacing

    path = None if out is None else Path(out).expanduser()
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"--out: expected an existing folder, got {path.parent}")
    values = apply_overrides({"source": source, "workers": workers}, settings or [])
    report, lines = check_data(from_mapping(DataConfig, values, "data"), duplicates=duplicates, progress=not quiet)
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    typer.echo(json.dumps(report, indent=2, allow_nan=False))


COMMANDS = (
    (
        "check",
        check,
        examples(
            "biflow data check images/train --workers 8 --out corrupt.txt",
            "biflow data check 'shards/train-{000..127}.tar' --duplicates",
            "biflow data check saved_dataset split=validation label_key=fine_label",
        ),
    ),
)
