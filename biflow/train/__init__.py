"""Training of both stages: `train_flow` (maximum likelihood) and `train_inverse` (a learned inverse)."""

from biflow.train.configs import (
    GUIDANCE_DRAWS,
    STRATEGIES,
    AlignmentConfig,
    FlowTraining,
    InverseTraining,
    OptimConfig,
    RunConfig,
)
from biflow.train.distill import alignment_loss, train_inverse
from biflow.train.distributed import ParallelConfig
from biflow.train.likelihood import likelihood_loss, train_flow
from biflow.train.perceptual import Perceptual
from biflow.train.representation import Representation, representation_loss
from biflow.train.term_configs import EncoderConfig, PerceptualConfig, RepresentationConfig

__all__ = [
    "GUIDANCE_DRAWS",
    "STRATEGIES",
    "AlignmentConfig",
    "EncoderConfig",
    "FlowTraining",
    "InverseTraining",
    "OptimConfig",
    "ParallelConfig",
    "Perceptual",
    "PerceptualConfig",
    "Representation",
    "RepresentationConfig",
    "RunConfig",
    "alignment_loss",
    "likelihood_loss",
    "representation_loss",
    "train_flow",
    "train_inverse",
]
