"""`biflow bench`: the benchmarks of a source checkout."""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from biflow.cli.common import examples, model_file

OPS = (
    "decode",
    "encode",
    "training",
    "affine",
    "decode_block",
    "block_params",
    "jacobi_update",
    "attention",
    "norm",
    "gate",
    "alignment",
)
PACKAGE = "_biflow_benchmarks"  # the name under which benchmarks/ is imported: no other package has it
DECODE = "Of decode:"


def bench(
    op: Annotated[
        str | None,
        typer.Option(
            "--op", metavar="|".join(OPS), help="One benchmark; decode, encode, training: whole flows.  [default: all]"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few cases, few repetitions: under a minute.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads.  [default: torch's choice]")] = None,
    out: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also write machine, limits and all rows.")
    ] = None,
    configs: Annotated[
        str | None, typer.Option(metavar="NAMES", help=f"{DECODE} of S, M, L, B/2, with commas.  [default: all]")
    ] = None,
    batches: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help=f"{DECODE} batch sizes.  [default: 1,16,64; B/2: 1]")
    ] = None,
    precisions: Annotated[
        str | None, typer.Option(metavar="NAMES", help=f"{DECODE} precisions of decode.  [default: all]")
    ] = None,
    solvers: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help=f"{DECODE} solvers; windowed:32 has a window.  [default: all but windowed]"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help=f"{DECODE} a trained flow in place of --configs.")
    ] = None,
    compile_step: Annotated[
        bool, typer.Option("--compile", help=f"{DECODE} also a static-cache step under torch.compile; takes minutes.")
    ] = False,
    ml_tarflow: Annotated[
        str | None,
        typer.Option("--peer-ml-tarflow", metavar="PATH", help=f"{DECODE} also a checkout of apple/ml-tarflow."),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help=f"{DECODE} never time peers on one block in place of all; takes many minutes."),
    ] = False,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help=f"{DECODE} draw the rows.")] = None,
    markdown: Annotated[
        str | None, typer.Option(metavar="FILE.md", help=f"{DECODE} write the rows as a table.")
    ] = None,
) -> None:
    """Time kernels and whole decodes against eager PyTorch, other implementations and what the machine can do.

    Needs a source checkout installed with `pip install -e .`: the benchmarks are not part of the wheel. Times are worth
    something only on a machine that does nothing else; docs/benchmarks.md says what each column means.
    """
    if op not in (None, *OPS):
        raise ValueError(f"--op: expected one of {', '.join(OPS)}, got {op!r}")
    options = {
        "configs": _split("--configs", configs),
        "batches": _split("--batches", batches, int),
        "precisions": _split("--precisions", precisions),
        "solver_names": _split("--solvers", solvers),
        "model": None if model is None else model_file(model),
        "compile_step": compile_step,
        "ml_tarflow_path": ml_tarflow,
        "full": full,
    }
    files = {"--json": out, "--plot": plot, "--markdown": markdown}
    if op not in (None, "decode") and any([*options.values(), plot, markdown]):
        raise ValueError(f"--op {op}: expected without options of decode")
    paths = {name: Path(file).expanduser() for name, file in files.items() if file is not None}
    for name, path in paths.items():
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{name}: expected an existing folder, got {path.parent}")
    names = OPS if op is None else (op,)
    timing, *benchmarks = _import("timing", *[f"bench_{name}" for name in names])
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    rows, sections = [], {}
    if "--plot" in paths and importlib.util.find_spec("matplotlib") is None:  # now, not after minutes
        raise ValueError("--plot: needs Matplotlib, which is not installed: pip install 'biflow[bench]'")
    for name, benchmark in zip(names, benchmarks, strict=True):
        if name == "decode":
            found = {"machine": timing.machine_info(), **benchmark.run(quick=quick, **options)}
            sections = {"limits": found["limits"], "wrong": found["wrong"]}
        else:
            found = {"rows": benchmark.run(quick=quick)}
        rows += found["rows"]
        if "--json" in paths:
            timing.write_json(paths["--json"], rows, **sections)
        for line in _report(found, paths) if name == "decode" else timing.table(found["rows"]):
            typer.echo(line)
    if sections.get("wrong"):
        raise RuntimeError("wrong results: " + "; ".join(sections["wrong"]))


def _split(name: str, text: str | None, kind: type = str) -> list | None:
    """ "1,16" -> [1, 16]."""
    try:
        return None if text is None else [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: expected integers with commas between them, got {text!r}") from None


def _report(found: dict, paths: dict[str, Path]) -> list[str]:
    report = importlib.import_module(f"{PACKAGE}.report")
    if "--markdown" in paths:
        paths["--markdown"].write_text(report.markdown(found))
    if "--plot" in paths:
        report.save_plot(found, paths["--plot"])
    return report.text(found)


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
        examples(
            "biflow bench",
            "biflow bench --op affine",
            "biflow bench --op decode --quick --json rows.json --plot rows.png",
            "biflow bench --op decode --compile --peer-ml-tarflow ../ml-tarflow --markdown rows.md",
            "biflow bench --op decode --model runs/flow --batches 1,64 --solvers sequential,auto",
        ),
    ),
)
