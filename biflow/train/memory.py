"""Activation checkpointing: memory for time."""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from biflow.models.layers import Layer


def checkpoint_layers(model: nn.Module) -> None:
    """Let autograd keep each transformer layer's inputs only, and compute the rest again in the backward pass.

    In place, for the model that is trained: weights, their names and copies that were made before are as they were. The
    gradients are the same ones, bit for bit on a CPU; a step costs about one more forward pass. Two tensors (B,N,C) a
    layer are kept, N tokens with the condition's.
    """
    for layer in model.modules():
        if isinstance(layer, Layer):
            # nothing in a layer is random
            options = {"use_reentrant": False, "preserve_rng_state": False}
            layer.forward = functools.partial(checkpoint, layer.forward, **options)
