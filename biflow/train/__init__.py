"""Training of both stages: `train_flow` (maximum likelihood) and `train_inverse` (hidden alignment)."""

from biflow.train.configs import AlignmentConfig, FlowTraining, InverseTraining, OptimConfig, RunConfig
from biflow.train.distill import alignment_loss, train_inverse
from biflow.train.likelihood import likelihood_loss, train_flow

__all__ = [
    "AlignmentConfig",
    "FlowTraining",
    "InverseTraining",
    "OptimConfig",
    "RunConfig",
    "alignment_loss",
    "likelihood_loss",
    "train_flow",
    "train_inverse",
]
