"""Training configurations by name, and from YAML files."""

import itertools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biflow.config import apply_overrides, from_mapping

if TYPE_CHECKING:
    from biflow.train import FlowTraining, InverseTraining

STAGES = ("flow", "inverse")


def names() -> list[str]:
    """The presets that come with biflow."""
    folder = resources.files("biflow.presets")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def about(name: str) -> str:
    """What a preset says of itself: the comment that it begins with. ValueError: no such preset."""
    lines = _text(name).splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in comment)


def parameters(source: str) -> int:
    """How many numbers the model of a preset or YAML file learns; needs no memory for them. Errors as `training`."""
    import torch

    from biflow.models import BiFlow, BiFlowConfig, TarFlow

    config = training(source).model
    with torch.device("meta"):
        model = (BiFlow if isinstance(config, BiFlowConfig) else TarFlow)(config)
    return sum(p.numel() for p in model.parameters())


def read(source: str) -> dict[str, Any]:
    """The mapping in a preset (by name) or a YAML file (by path, ending in .yaml or .yml).

    Raises:
        FileNotFoundError: no such file. ValueError: no such preset, or a file that is not a YAML mapping.
    """
    import yaml

    if source.endswith((".yaml", ".yml")):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: expected YAML in UTF-8; {error}") from None
    else:
        text = _text(source)
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise ValueError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise ValueError(f"{source}: expected settings of fewer nested levels") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a mapping of settings, got {type(values).__name__}")
    return values


def _text(name: str) -> str:
    if name not in names():
        raise ValueError(f"expected a .yaml file or a preset ({', '.join(names())}), got {name!r}")
    return (resources.files("biflow.presets") / f"{name}.yaml").read_text(encoding="utf-8")


def training(source: str, overrides: Sequence[str] = (), stage: str | None = None) -> "FlowTraining | InverseTraining":
    """The training configuration of a preset or YAML file with `key=value` overrides applied.

    Args:
        source: as in `read`; the file's top-level `stage` is "flow" or "inverse", the rest are the fields of
            `FlowTraining` or `InverseTraining`.
        overrides: such as "optim.lr=1e-4"; values are YAML.
        stage: the stage that the caller can run; None: either.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `read`, an unknown or wrong field, or another stage.
    """
    from biflow.train import FlowTraining, InverseTraining

    values = read(source)
    try:
        values = apply_overrides(values, list(overrides))
    except RecursionError:  # YAML can say that a group is its own member
        raise ValueError(f"{source}: expected settings that do not contain themselves") from None
    found = values.pop("stage", None)
    if found not in STAGES:
        raise ValueError(f"{source}: stage: expected one of {', '.join(STAGES)}, got {found!r}")
    if stage is not None and found != stage:
        command = {"flow": "biflow train", "inverse": "biflow distill"}[found]
        raise ValueError(f"{source}: expected a configuration of stage {stage!r}, got {found!r} (use `{command}`)")
    return from_mapping(FlowTraining if found == "flow" else InverseTraining, values, source)
