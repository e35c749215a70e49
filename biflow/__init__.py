"""biflow: train, invert exactly and sample transformer normalizing flows."""

from biflow import _library, ops  # noqa: F401  (_library registers the torch ops)
from biflow.checkpoint import load, save
from biflow.models import BiFlow, BiFlowConfig, TarFlow, TarFlowConfig

__version__ = "0.1.0"

__all__ = ["BiFlow", "BiFlowConfig", "TarFlow", "TarFlowConfig", "__version__", "load", "ops", "save"]
