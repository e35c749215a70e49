"""When packed weights must be packed again."""

from collections.abc import Hashable

import torch
from torch import Tensor


def weights_key(weights: list[Tensor]) -> Hashable:
    """A key that changes when weights do: a cache of something made from them holds while the key is the same.

    It holds each tensor's address and autograd version, which every in-place write through torch moves, and for
    contiguous tensors on the CPU a hash of 64 values of each, which also tells writes that leave no version: through
    `.data`, as averaged weights are often copied, or through memory shared with NumPy. A write of that kind that
    changes only a few values of a tensor can be missed.

    Args:
        weights: tensors of any shape, dtype and device.
    """
    identity = tuple((w.data_ptr(), None if w.is_inference() else w._version) for w in weights)
    sampled = [w for w in weights if w.device.type == "cpu" and w.is_contiguous() and w.numel()]
    return identity, torch.ops.biflow.weights_fingerprint(sampled) if sampled else 0
