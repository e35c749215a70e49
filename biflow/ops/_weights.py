"""When packed weights must be packed again."""

import torch
from torch import Tensor


def weights_key(weights: list[Tensor]) -> int:
    """A 64-bit hash of every byte, dtype and shape of `weights`, tensors on the CPU of any strides.

    What was made from weights holds while their key is the same, by whatever way they are written: through torch,
    `.data` or memory shared with NumPy. Different weights share a key with a probability of about 2^-64.
    """
    return torch.ops.biflow.weights_fingerprint(weights)
