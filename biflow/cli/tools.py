"""`biflow bench`: the kernel benchmarks of a source checkout."""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from biflow.cli.common import examples

OPS = ("affine", "decode_block", "attention")
PACKAGE = "_biflow_benchmarks"  # the name under which benchmarks/ is imported: no other package has it


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
    names = OPS if op is None else (op,)
    timing, *benchmarks = _import("timing", *[f"bench_{name}" for name in names])
    rows = []
    for benchmark in benchmarks:
        found = benchmark.run(quick=quick)
        rows += found
        for line in timing.table(found):
            typer.echo(line)
    if path is not None:
        timing.write_json(path, rows)


def _import(*names: str) -> list[ModuleType]:
    """Modules of the folder benchmarks/ beside the package, if that is a checkout of biflow."""
    root = Path(__file__).resolve().parents[2]
    folder, project = root / "benchmarks", root / "pyproject.toml"
    wanted = [folder / f"{name}.py" for name in names]
    missing = [str(file) for file in [project, *wanted] if not file.is_file()]
    if missing or 'name = "biflow"' not in project.read_text().splitlines():
        raise FileNotFoundError(
            f"biflow bench: expected a source checkout of biflow at {root}, installed with `pip install -e .`; "
            + (f"no {missing[0]}" if missing else f"{project} belongs to another project")
        )
    for loaded in [m for m in sys.modules if m.split(".")[0] == PACKAGE]:
        del sys.modules[loaded]
    spec = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations.append(str(folder))
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]


COMMANDS = (
    (
        "bench",
        bench,
        examples("biflow bench", "biflow bench --op affine", "biflow bench --op decode_block --quick --json rows.json"),
    ),
)
