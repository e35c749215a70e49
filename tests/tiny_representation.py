"""Representation alignment for the tests, and functions that an encoder can name as "tiny_representation:NAME"."""

import dataclasses

import torch
from tiny_training import flow_config
from torch import Tensor, nn

from biflow.data import load
from biflow.train import EncoderConfig, Representation, RepresentationConfig

MAPS, RGB = "tiny_representation:maps", "tiny_representation:rgb"
OFFSET = [0.0]  # what `maps` adds to its weights: another encoder of the same name


def aligned(config, encoder=None, **fields):
    """The run's configuration with alignment of both blocks' only layer, by `maps` unless `encoder` says otherwise."""
    encoder = EncoderConfig(**{"name": MAPS, "inputs": "raw", **(encoder or {})})
    own = {"features": ((-1, 0), (0, 0)), "projector_width": 8, "encoder": encoder, **fields}
    return dataclasses.replace(config, representation=RepresentationConfig(**own))


def prepared(images, out=None, encoder=None, **fields):
    """The alignment of a run on those images, ready."""
    config = aligned(flow_config(images), encoder, **fields)
    result = Representation(config, load(config.data))
    result.prepare(out)
    return result


def filled(module: nn.Module) -> nn.Module:
    """Weights that do not depend on any generator."""
    with torch.no_grad():
        for index, p in enumerate(module.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel()) + index + OFFSET[0]).view(p.shape))
    return module


def maps() -> nn.Module:
    """Gray images -> maps of 5 channels, half their size."""
    return filled(nn.Conv2d(1, 5, 3, stride=2, padding=1))


def rgb() -> nn.Module:
    """RGB images -> maps of 3 channels: the images."""
    return nn.Identity()


def latents() -> nn.Module:
    """Latents of 4 channels -> maps of 6."""
    return filled(nn.Conv2d(4, 6, 1))


class Vectors(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def vectors() -> nn.Module:
    """No feature map."""
    return Vectors()
