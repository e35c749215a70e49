"""A flow whose decode is timed: its inputs, its first tokens as a block of their own, the check of a result."""

import dataclasses
import functools

import torch
from torch import Tensor

from benchmarks.flows import CONFIGS, LARGE, random_flow
from biflow.evaluate.eager import eager_decode_block
from biflow.models import TarFlow
from biflow.models.block import Block
from biflow.models.layers import patchify

from .parity import WrongResult

SHORT = 16  # tokens of the prefix that shows what a call costs, and that it is right
ROWS = 4  # samples, spread over the batch, whose whole result is checked
# largest root mean square error, as a share of that of x - z: a decode that returns z is off by 1
BOUNDS = {"fp32": 1e-3, "bf16": 0.1}
# of a dry run: 16 tokens
TINY = {"width": 64, "num_blocks": 2, "layers_per_block": 1}


class Subject:
    """One of benchmarks/flows.py on `device`; no classes, no prior scale. Made when first used."""

    def __init__(self, name: str, device: torch.device, dry: bool):
        self.name, self.device = name, device
        patch = (CONFIGS | LARGE)[name]["patch_size"]
        self._changes = TINY | {"img_size": 4 * patch} if dry else {}
        self._short: dict[int, Block] = {}

    @functools.cached_property
    def flow(self) -> TarFlow:
        with torch.inference_mode(False):  # whoever asks first
            return random_flow(self.name, device=self.device, **self._changes)

    @property
    def block(self) -> Block:
        """What stands for the others where one is timed: all have the same shape and weights of the same kind."""
        return self.flow.blocks[0]

    @property
    def short(self) -> int:
        return min(SHORT, self.block.tokens)

    def z(self, batch: int, tokens: int | None = None) -> Tensor:
        """(B,T,D) ~ N(0, I); the first `tokens` of it."""
        c = self.flow.config
        generator = torch.Generator(self.device).manual_seed(1)
        z = torch.randn(batch, c.tokens, c.channels, generator=generator, device=self.device)
        return z if tokens in (None, c.tokens) else z[:, :tokens].contiguous()

    def first(self, tokens: int) -> Block:
        """`block`, which reads tokens in data order, as if the sequence ended after `tokens`: what comes later changes
        nothing. Its weights are copies; that of `short` tokens is kept."""
        if tokens == self.block.tokens:
            return self.block
        if tokens not in self._short:
            c = dataclasses.replace(self.block.config, tokens=tokens)
            with torch.inference_mode(False), torch.device(self.device):
                made = Block(c).eval()
                state = self.block.state_dict()
                made.load_state_dict(state | {"pos_embed": state["pos_embed"][:tokens]})
            if tokens != self.short:
                return made
            self._short[tokens] = made
        return self._short[tokens]

    def check_first(self, x: Tensor, precision: str) -> float:
        """The error of x (B,P,D), the first P <= `short` tokens of `block`, against an eager decode in fp32."""
        z = self.z(*x.shape[:2])
        return check("the first tokens", x, eager_decode_block(self.first(x.shape[1]), z), z, precision)

    def check_block(self, x: Tensor, z: Tensor, precision: str) -> float:
        """The error of x, the inverse of z (B,T,D) by `block`, through its parallel pass in fp32."""
        rows = self._rows(len(z))
        return check("G(x)", self.block(x[rows])[0], z[rows], x[rows], precision)

    def check_flow(self, images: Tensor, z: Tensor, precision: str) -> float:
        """The error of a whole decode, through the encode in fp32."""
        rows, c = self._rows(len(z)), self.flow.config
        x = patchify(images[rows], c.patch_size)
        return check("encode(x)", self.flow(images[rows])[0], z[rows], x, precision)

    def _rows(self, batch: int) -> Tensor:
        return torch.linspace(0, batch - 1, min(batch, ROWS), device=self.device).round().long()


def check(what: str, got: Tensor, want: Tensor, other: Tensor, precision: str) -> float:
    """The error of `got`, relative to what lies between `want` and `other`; WrongResult if it is too large, or NaN."""
    wide = want.double()
    error = ((got.double() - wide).square().mean() / (other.double() - wide).square().mean()).sqrt().item()
    if not error <= BOUNDS[precision]:
        raise WrongResult(
            f"expected {what} within {BOUNDS[precision]:g} of what the decode changes, got {error:.3g}: not timed"
        )
    return error
