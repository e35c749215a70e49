"""The command line: `biflow train | distill | compare | sample | calibrate | evaluate | score | info | classify |
probe | inpaint | edit | interpolate | ablate | data | latents | demo | bench`.

Exit codes: 0 done, 1 a failure at run time, 2 wrong usage, configuration, data or checkpoint, 130 interrupted
(SIGINT), 143 terminated (SIGTERM).
Importing this package does not import torch: commands do, when they run.
"""

import sys
import traceback
from collections.abc import Sequence

import typer

from biflow.cli import classification, compare, data, editing, jobs, latents, models, sampling, score, tools
from biflow.cli.common import HELP_OPTIONS, Interrupted, guarded, version

# what biflow raises for input that it cannot take; any other exception is a failure at run time
BAD_INPUT = (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)

SHARED = ("train", "distill", "sample", "evaluate", "score", "latents encode")  # several processes do these together

app = typer.Typer(
    name="biflow",
    help="Train transformer normalizing flows, invert them exactly, and sample in one pass.",
    epilog="Start with: biflow demo --out runs/demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
)


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True, callback=version),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; anywhere on the line."),
) -> None:
    """Options before a command."""


for name, function, epilog in (
    *jobs.COMMANDS,
    *compare.COMMANDS,
    *sampling.COMMANDS,
    *models.COMMANDS,
    *score.COMMANDS,
    *classification.COMMANDS,
    *editing.COMMANDS,
    *tools.COMMANDS,
):
    app.command(name, epilog=epilog, context_settings=HELP_OPTIONS)(guarded(function, name, name in SHARED))

for of, about, commands in (("data", "Data sets.", data.COMMANDS), ("latents", "Latents.", latents.COMMANDS)):
    group = typer.Typer(help=about, no_args_is_help=True, rich_markup_mode=None, context_settings=HELP_OPTIONS)
    for name, function, epilog in commands:
        whole = f"{of} {name}"
        group.command(name, epilog=epilog, context_settings=HELP_OPTIONS)(guarded(function, whole, whole in SHARED))
    app.add_typer(group, name=of)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (None: the process's) and return its exit code; an error is one line on stderr."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in line
    try:
        return app(args=[word for word in line if word != "--debug"], prog_name="biflow", standalone_mode=False) or 0
    except SystemExit as stop:  # training stopped by SIGTERM; it has said so
        return stop.code
    except Exception as error:
        code, text = _explain(error)
        if debug:
            traceback.print_exc()
    print(text if text.startswith("Usage:") else f"biflow: error: {' '.join(text.split())}", file=sys.stderr)
    return code


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and message."""
    if isinstance(error, Interrupted):
        return 130, str(error) or "interrupted"
    if hasattr(error, "format_message"):  # typer's own: unknown commands and options, missing or wrong values
        context = getattr(error, "ctx", None)
        text = error.format_message()
        if text.startswith("Usage:"):
            return 2, text
        return 2, f"{text.splitlines()[0]} (see {context.command_path if context else 'biflow'} --help)"
    if isinstance(error, BAD_INPUT):
        return 2, str(error)
    return 1, f"{type(error).__name__}: {error} (--debug shows where)"
