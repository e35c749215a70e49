"""Exact decoding: the certificate tells good from bad, options that do not exist are named."""

import re

import pytest
import torch
from tiny import make_condition, make_flow

from biflow import solvers


class Spoilt:
    """A block whose inverse is off by `error` in one number of one sample."""

    sequential_passes = 3

    def __init__(self, block, error):
        self.block, self.error = block, error

    def decode_sequential(self, z, y, context, guidance):
        x = self.block.decode_sequential(z, y, context, guidance)
        x[1, 2, 3] += self.error
        return x

    def residual(self, *arguments):
        return self.block.residual(*arguments)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_the_certificate_sees_a_wrong_token_in_any_block(where, guidance):
    flow = make_flow(std=0.1, num_classes=3)
    y, _ = make_condition(flow, 3)
    z = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    strength = solvers.Guidance(guidance)
    exact, info = solvers.decode(flow.blocks, z, y, None, strength, "sequential", certify=True)
    assert info.residual.dtype == torch.float32
    assert info.residual.max() <= 1e-5
    blocks = list(flow.blocks)
    blocks[where] = Spoilt(blocks[where], 0.1)
    x, info = solvers.decode(blocks, z, y, None, strength, "sequential", certify=True)
    assert info.residual[1] > 0.02, "the spoilt sample passed"
    assert info.residual[[0, 2]].max() <= 1e-5, "a sound sample was blamed"
    assert torch.equal(x[[0, 2]], exact[[0, 2]])


def test_the_certificate_knows_the_guidance():
    """An exact decode of other guidance is not exact for this one."""
    flow = make_flow(std=0.1, num_classes=3)
    y, z = torch.tensor([0, 1]), torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    block = flow.blocks[1]
    options = [solvers.Guidance(0.0), solvers.Guidance(1.0), solvers.Guidance(1.0, anneal=False),
               solvers.Guidance(1.0, guide="a"), solvers.Guidance(1.0, attn_temp=0.3)]  # fmt: skip
    for made in options:
        x = block.decode_sequential(z, y, None, made)
        for asked in options:
            residual = block.residual(x, z, y, None, asked).max()
            assert (residual <= 1e-5) == (made == asked), (made, asked, residual)


def test_a_decode_that_overflows_is_not_certified():
    flow = make_flow(std=0.1)
    with torch.no_grad():
        flow.blocks[1].proj_out.bias[:4] = 100.0  # x grows by exp(100) a block
    z = torch.ones(1, 4, 4)
    _, info = flow.decode(z, return_info=True)
    assert not info.residual.max() <= 1e-5


def test_info_counts_passes_per_block():
    _, info = make_flow().decode(torch.zeros(1, 4, 4), return_info=True)
    assert info.solver == ("sequential",) * 3
    assert info.passes == (3, 3, 3), "the first of 4 tokens is given"
    _, info = make_flow(start_token=True).decode(torch.zeros(1, 4, 4), solver="sequential", return_info=True)
    assert info.passes == (4, 4, 4)


def test_auto_is_sequential():
    flow, z = make_flow(), torch.ones(2, 4, 4)
    assert torch.equal(flow.decode(z, solver="auto"), flow.decode(z, solver="sequential"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "jacobi"}, ValueError, "solver: expected one of sequential, auto, got 'jacobi'"),
        ({"solver": None}, ValueError, "solver: expected one of sequential, auto, got None"),
        ({"precision": "bf16"}, ValueError, "precision: expected one of fp32, got 'bf16'"),
        ({"window": 16}, ValueError, "window: expected None with solver='auto', which uses no windows; got 16"),
        ({"tol": 0.0}, ValueError, "tol: expected a finite number > 0, got 0"),
        ({"tol": None}, TypeError, "tol: expected a number, got NoneType None"),
        ({"guidance": float("nan")}, ValueError, "guidance: expected a finite number >= 0, got nan"),
        ({"guidance": "high"}, TypeError, "guidance: expected a number, got str 'high'"),
        ({"guide": "c"}, ValueError, "guide: expected 'a', 'b' or 'ab', got 'c'"),
        ({"guide": ""}, ValueError, "guide: expected 'a', 'b' or 'ab', got ''"),
        ({"anneal": 1}, TypeError, "anneal: expected bool, got int 1"),
        ({"attn_temp": 0.0}, ValueError, "attn_temp: expected a finite number > 0, got 0"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_flow().decode(torch.zeros(1, 4, 4), **options)
