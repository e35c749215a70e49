"""Training of both stages: `train_flow` (maximum likelihood) and `train_inverse` (a learned inverse)."""

from biflow.train.configs import (
    GUIDANCE_DRAWS,
    STRATEGIES,
    AlignmentConfig,
    FlowTraining,
    InverseTraining,
    OptimConfig,
    PerceptualConfig,
    RunConfig,
)
from biflow.train.distill import alignment_loss, train_inverse
from biflow.train.likelihood import likelihood_loss, train_flow
from biflow.train.perceptual import Perceptual

__all__ = [
    "GUIDANCE_DRAWS",
    "STRATEGIES",
    "AlignmentConfig",
    "FlowTraining",
    "InverseTraining",
    "OptimConfig",
    "Perceptual",
    "PerceptualConfig",
    "RunConfig",
    "alignment_loss",
    "likelihood_loss",
    "train_flow",
    "train_inverse",
]
