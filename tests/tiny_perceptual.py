"""Perceptual terms for the tests, and functions that a term can name as "tiny_perceptual:NAME"."""

import dataclasses

import torch
from tiny_training import inverse_config
from torch import nn

from biflow.data import load
from biflow.train import Perceptual, PerceptualConfig

CONVOLUTIONS, PAIR = "tiny_perceptual:convolutions", "tiny_perceptual:pair"


def with_terms(config, *terms):
    """The run's configuration with those terms; a weight of 1 if they name none."""
    return dataclasses.replace(config, perceptual=tuple(PerceptualConfig(**{"weight": 1.0, **t}) for t in terms))


def prepared(images, *terms, out=None, **run):
    """The terms of a run on those images, ready."""
    config = with_terms(inverse_config(images, **run), *terms)
    result = Perceptual(config, load(config.data))
    result.prepare(out)
    return result


def pictures(count=4, channels=1, size=8, dtype=torch.float32):
    """Two batches of noise in [-1, 1]."""
    return (torch.rand(2, count, channels, size, size, dtype=torch.float64) * 2 - 1).to(dtype)


def rng(seed=7):
    return torch.Generator().manual_seed(seed)


def convolutions() -> nn.Sequential:
    """Two layers for RGB images, random weights, with what freezing has to switch off: dropout, ReLU in place."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3)
    )


class Pair(nn.Module):
    """Images -> (maps (B,K,S,S), vectors (B,K)): what a module may return."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, -1.0]).view(1, 3, 1, 1))

    def forward(self, x):
        maps = x * self.scale
        return maps, maps.mean((2, 3))


def pair() -> Pair:
    return Pair()


def nothing() -> str:
    return "no module"


def tokens_lost() -> nn.Module:
    """Gives no batch of feature maps."""
    return nn.Flatten(0)
