"""The models: TarFlow (forward, exact) and BiFlow (learned inverse)."""

from biflow.models.reverse import BiFlow, BiFlowConfig
from biflow.models.tarflow import TarFlow, TarFlowConfig

__all__ = ["BiFlow", "BiFlowConfig", "TarFlow", "TarFlowConfig"]
