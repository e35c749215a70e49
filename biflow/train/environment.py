"""environment.json: where, when and by what code a run was carried out, one entry a sitting."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import biflow
from biflow.files import replacing
from biflow.models.layers import device_name
from biflow.report import environment

PACKAGES = (
    "accelerate", "datasets", "diffusers", "lpips", "numpy", "pillow", "safetensors", "tensorboard", "timm",
    "torchvision", "triton", "wandb",
)  # fmt: skip
GIT_SECONDS = 10  # a repository on a slow disk does not hold up a run for longer


def record(out: Path, step: int, device: torch.device) -> None:
    """Append what `sitting` says to out/environment.json, a list. step: from which the run goes on.

    ValueError: the file holds something else.
    """
    path, before = out / "environment.json", []
    if path.exists():
        before = sittings(out)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([*before, {"step": step, **sitting(device)}], indent=1) + "\n")


def sittings(out: Path) -> list[dict[str, Any]]:
    """The entries of a run's environment.json; [] if it has none. ValueError: the file holds something else."""
    path = out / "environment.json"
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error})") from None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{path}: expected a list of sittings, got {type(found).__name__}")
    return found


def sitting(device: torch.device) -> dict[str, Any]:
    """Of this process: time of start (UTC), command line and folder, machine, device, versions, git commits.

    git: of the working directory, and of biflow itself where it runs from a checkout: root, commit, and whether tracked
    files differ from it; None where there is none.
    """
    try:
        from biflow import _C
    except ImportError:
        build = None
    else:
        build = {name: value for name, value in _C.build_info().items() if name != "version"}
    return {
        "started": now(),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "host": platform.node(),
        "platform": platform.platform(),
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "biflow": biflow.__version__,
        "build": build,
        **environment(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "git": {"folder": git(Path.cwd()), "biflow": own_git()},
    }


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def own_git() -> dict[str, Any] | None:
    """`git` of biflow itself; None where it does not run from a checkout, such as in a venv inside another's."""
    package = Path(biflow.__file__).parent
    return git(package) if _ask(package, "ls-files", "--error-unmatch", "__init__.py") is not None else None


def git(folder: Path) -> dict[str, Any] | None:
    """{"root", "commit", "dirty"} of the repository around a folder; None: no repository, no commit or no git."""
    root, commit = _ask(folder, "rev-parse", "--show-toplevel"), _ask(folder, "rev-parse", "HEAD")
    if root is None or commit is None:
        return None
    changed = _ask(folder, "status", "--porcelain", "--untracked-files=no")  # else the run's own folder counts
    return {"root": root, "commit": commit, "dirty": None if changed is None else bool(changed)}


def _ask(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
