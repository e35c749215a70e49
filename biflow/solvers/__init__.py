"""Exact decoding: how the blocks of a flow are inverted, by which solver, and a certificate of how exact the result is.

Knows blocks by the protocols `InvertibleBlock` and `Iterate` only; models and devices are behind them.
`solve_adjoint` is the gradient of an inverse.
"""

from biflow.solvers.adjoint import solve_adjoint
from biflow.solvers.decode import DecodeInfo, check_options, decode, solve
from biflow.solvers.fixed_point import fixed_point
from biflow.solvers.policy import Entry, Measurement, Method, Policy, methods
from biflow.solvers.protocol import (
    PRECISIONS,
    SOLVERS,
    WINDOW,
    Condition,
    Guidance,
    InvertibleBlock,
    Iterate,
    effective_tol,
)

__all__ = [
    "PRECISIONS",
    "SOLVERS",
    "WINDOW",
    "Condition",
    "DecodeInfo",
    "Entry",
    "Guidance",
    "InvertibleBlock",
    "Iterate",
    "Measurement",
    "Method",
    "Policy",
    "check_options",
    "decode",
    "effective_tol",
    "fixed_point",
    "methods",
    "solve",
    "solve_adjoint",
]
