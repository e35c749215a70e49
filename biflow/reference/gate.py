"""Gates of an MLP in plain torch; formulas and shapes: biflow.ops.gate."""

import math

import torch


def gate(m, kind):
    if kind == "gelu":
        return 0.5 * m * (1 + torch.erf(m / math.sqrt(2)))
    a, b = m.chunk(2, dim=-1)
    return a * torch.sigmoid(a) * b
