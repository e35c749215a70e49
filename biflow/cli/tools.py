"""`biflow bench`: the kernel benchmarks of a source checkout."""

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from biflow.cli.common import examples

OPS = ("affine", "decode_block", "attention")


def bench(
    op: Annotated[str | None, typer.Option("--op", metavar="|".join(OPS), help="The op.  [default: all]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few cases, few repetitions.")] = False,
    out: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write rows and machine.")] = None,
) -> None:
    """Time kernels against eager PyTorch and against what the machine can do.

    Needs a source checkout installed with `pip install -e .`: the benchmarks are not part of the wheel.
    """
    if op not in (None, *OPS):
        raise ValueError(f"--op: expected one of {', '.join(OPS)}, got {op!r}")
    path = None if out is None else Path(out).expanduser()
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"--json: expected an existing folder, got {path.parent}")
    rows = []
    for benchmark in [_benchmark(name) for name in (OPS if op is None else (op,))]:
        found = benchmark.run(quick=quick)
        rows += found
        for line in _table(found):
            typer.echo(line)
    if path is not None:
        importlib.import_module("timing").write_json(path, rows)


def _benchmark(op: str):
    """The module benchmarks/bench_<op>.py beside the package."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    file = folder / f"bench_{op}.py"
    if not file.is_file():
        raise FileNotFoundError(
            f"biflow bench: expected {file}; benchmarks need a source checkout installed with `pip install -e .`"
        )
    for entry in (folder.parent, folder):  # benchmarks import what lies beside them
        if str(entry) not in sys.path:
            sys.path.insert(0, str(entry))
    return importlib.import_module(file.stem)


def _table(rows: list[dict]) -> list[str]:
    """Lines of a table with a column for every key, as wide as its values."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells]


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


COMMANDS = (
    (
        "bench",
        bench,
        examples("biflow bench", "biflow bench --op affine", "biflow bench --op decode_block --quick --json rows.json"),
    ),
)
