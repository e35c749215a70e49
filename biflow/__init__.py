"""biflow: train, invert exactly and sample transformer normalizing flows."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biflow import interop, ops, solvers
    from biflow.calibration import calibrate
    from biflow.checkpoint import load, save
    from biflow.models import BiFlow, BiFlowConfig, TarFlow, TarFlowConfig
    from biflow.models.pseudo_reverse import pseudo_reverse

__version__ = "0.1.0"

__all__ = [
    "BiFlow",
    "BiFlowConfig",
    "TarFlow",
    "TarFlowConfig",
    "__version__",
    "calibrate",
    "interop",
    "load",
    "ops",
    "pseudo_reverse",
    "save",
    "solvers",
]

# name -> the module that defines it; imported on first use, so that `biflow --help` need not wait for torch
_HOMES = {
    "BiFlow": "biflow.models",
    "BiFlowConfig": "biflow.models",
    "TarFlow": "biflow.models",
    "TarFlowConfig": "biflow.models",
    "calibrate": "biflow.calibration",
    "load": "biflow.checkpoint",
    "pseudo_reverse": "biflow.models.pseudo_reverse",
    "save": "biflow.checkpoint",
}
_MODULES = (
    "checkpoint",
    "config",
    "data",
    "editing",
    "evaluate",
    "interop",
    "models",
    "ops",
    "reference",
    "solvers",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"biflow.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'biflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
