"""Evaluation of a flow and its learned inverse: numbers, timings, pictures."""

from biflow.evaluate.classification import (
    calibration_error,
    describe_classification,
    fit_temperature,
    log_posterior,
    negative_log_likelihood,
)
from biflow.evaluate.classifier import Judge, train_judge
from biflow.evaluate.eager import eager_decode, eager_decode_block
from biflow.evaluate.frechet import frechet_distance, gaussian_distance
from biflow.evaluate.inception_score import inception_score
from biflow.evaluate.metrics import (
    EvaluationConfig,
    RealData,
    check_data,
    check_pair,
    decode_exact,
    decode_learned,
    denoising,
    describe_data,
    describe_samples,
    evaluate_flow,
    evaluate_inverse,
    evaluate_likelihood,
    noise,
    score_step,
)
from biflow.evaluate.moments import Moments, StreamingMoments
from biflow.evaluate.networks import DINOv2, Inception
from biflow.evaluate.precision_recall import precision_recall
from biflow.evaluate.probe import ProbeConfig, linear_probe, probe_flow
from biflow.evaluate.sets import (
    ImageSet,
    Network,
    SetStatistics,
    measure,
    measure_reference,
    measure_set,
    read_statistics,
    score,
)
from biflow.evaluate.timing import time_decoders

__all__ = [
    "DINOv2",
    "EvaluationConfig",
    "ImageSet",
    "Inception",
    "Judge",
    "Moments",
    "Network",
    "ProbeConfig",
    "RealData",
    "SetStatistics",
    "StreamingMoments",
    "calibration_error",
    "check_data",
    "check_pair",
    "decode_exact",
    "decode_learned",
    "denoising",
    "describe_classification",
    "describe_data",
    "describe_samples",
    "eager_decode",
    "eager_decode_block",
    "evaluate_flow",
    "evaluate_inverse",
    "evaluate_likelihood",
    "fit_temperature",
    "frechet_distance",
    "gaussian_distance",
    "inception_score",
    "linear_probe",
    "log_posterior",
    "measure",
    "measure_reference",
    "measure_set",
    "negative_log_likelihood",
    "noise",
    "precision_recall",
    "probe_flow",
    "read_statistics",
    "score",
    "score_step",
    "time_decoders",
    "train_judge",
]
