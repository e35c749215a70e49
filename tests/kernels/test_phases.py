"""The benchmark's inverse with a launch for each phase: right, and its launches are those that it names."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import make_flow, noise

from biflow.solvers import Condition

from . import backends

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import phases


class Stopping:
    """torch.ops.biflow, whose decode_block_ stops after so many launches."""

    def __init__(self, ops, launches):
        self._ops, self._launches = ops, launches

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def decode_block_(self, *arguments, **options):
        return self._ops.decode_block_(*arguments, **options, phases=self._launches)


@pytest.mark.parametrize("where", ["forward", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("batch", [2, 65])  # norms within other phases, and as phases of their own
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_launch_for_each_phase(where, batch, precision, monkeypatch):
    backend = backends.get(where)
    flow = make_flow(width=32, head_dim=16, num_blocks=1, layers_per_block=2)
    (block,), z = flow.blocks, noise(flow, batch)
    want = block.decode_sequential(z, Condition(precision=precision))
    with backend.public():
        block.to(backend.device)
        call, names = phases.by_phase(block, backend.to(z), precision)
        layer = ["qkv", "attention", "proj", "fc1", "fc2"] if batch == 2 else list(phases.LAYER)
        assert names == ["embed", *layer, *layer, "head"]
        assert (call().cpu() - want).abs().max() <= (1e-4 if precision == "fp32" else 5e-2)
        assert (want - z).abs().max() > 0.1

        every = block.sequential_passes * len(names) + 1
        x, ops = call(), torch.ops.biflow
        full = x.clone()
        for launches in (every, every - 1):  # the last one makes the last token
            x.fill_(torch.nan)
            monkeypatch.setattr(torch.ops, "biflow", Stopping(ops, launches))
            call()
            assert torch.equal(x[:, :-1], full[:, :-1])
            assert bool(x[:, -1].isnan().all()) == (launches < every)
        monkeypatch.undo()
