"""How decode_block is divided on GPUs that need not be there: `decode_plan` for flows and batches that matter."""

import pytest
import torch
from blocks import random_weights

from benchmarks.flows import CONFIGS, LARGE
from benchmarks.gpu.sweep import decode_plans
from biflow.models import TarFlowConfig
from biflow.ops import BlockConfig

from .backends import NAMES, get
from .test_decode_block import Call

# multiprocessors, bytes of shared memory a block may have, cooperative launches
MACHINES = {
    "H200": [132, 232448, 1],
    "A100": [108, 166912, 1],
    "L4": [58, 101376, 1],
    "MIG": [16, 232448, 1],
    "no cooperative launches": [132, 232448, 0],
}
FLOWS = {name: (CONFIGS | LARGE)[name] for name in ("S", "B/2", "TARFlow-64", "AFHQ")}
FIELDS = ("persistent", "row_tiles", "blocks", "splits", "warps", "norm_in_place")


@pytest.fixture
def plan_of(request):
    backend = get(NAMES[0], request.config.getoption("--emulator"))

    def plan(machine, flow="B/2", batch=1, precision="bf16", guided=False, **fields):
        c = TarFlowConfig(head_dim=64, **FLOWS[flow])
        found = backend.ops.decode_block_buffers(
            **dict(
                batch=batch, guided=guided, prefix_tokens=0, tokens=c.tokens, channels=c.channels, width=c.width,
                layers=c.layers_per_block, head_dim=64, mlp_hidden=4 * c.width, start_token=False, shift_only=False,
                precision=precision, machine=MACHINES[machine],
            )
            | fields
        )  # fmt: skip
        return dict(zip(FIELDS, found[:6], strict=True)) | {"words": found[6], "shared": found[16], "limit": found[17]}

    return plan


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("flow", FLOWS)
def test_a_plan_suits_the_machine(plan_of, flow, machine, precision):
    for batch in (1, 2, 8, 16, 32, 64, 128, 256, 1024):
        for guided in (False, True):
            plan = plan_of(machine, flow, batch, precision, guided)
            rows, row_tiles = batch * (1 + guided), plan["row_tiles"]
            assert plan["shared"] <= plan["limit"] == MACHINES[machine][1], "else the launch is refused"
            groups = -(-rows // (16 * row_tiles))
            assert plan["blocks"] >= groups
            if plan["persistent"]:
                assert plan["blocks"] <= MACHINES[machine][0], "one block a multiprocessor"
            assert row_tiles == 1 or not (plan["norm_in_place"] or plan["splits"] > 1)
            assert plan["splits"] == 1 or plan["warps"] == 8
            assert plan["splits"] * rows * FLOWS[flow]["width"] // 64 <= plan["blocks"] or plan["splits"] == 1


def test_more_rows_take_more_tiles_where_they_fit(plan_of):
    tiles = {m: [plan_of(m, batch=b)["row_tiles"] for b in (32, 33, 512, 513)] for m in MACHINES}
    assert tiles["H200"] == tiles["A100"] == tiles["MIG"] == [1, 2, 2, 4]
    assert tiles["L4"] == [1, 1, 1, 1]  # sums of more tiles do not fit beside the weights under way


def test_few_long_sequences_share_tokens(plan_of):
    assert [plan_of("H200", f)["splits"] for f in ("S", "B/2", "TARFlow-64")] == [1, 1, 4]
    assert plan_of("H200", "TARFlow-64", 64)["splits"] == 1
    assert plan_of("H200", "TARFlow-64", head_dim=12, width=96)["splits"] == 1  # no whole 16 bytes


def test_one_launch_where_it_can_be(plan_of):
    assert plan_of("H200")["persistent"]
    assert plan_of("MIG", batch=1024)["persistent"]  # 16 row groups of 64
    assert not plan_of("MIG", batch=1025)["persistent"]
    assert not plan_of("no cooperative launches")["persistent"]


def test_wide_tokens_leave_less_room(plan_of):
    """Rows are not normalised in place then; too wide tokens are told by `gpu_plan`."""
    assert plan_of("H200", channels=768)["shared"] <= MACHINES["H200"][1]
    assert plan_of("L4", channels=768)["shared"] > MACHINES["L4"][1]


@pytest.mark.parametrize("batch", [1, 9, 65])
def test_plans_of_the_sweep_are_taken(backend, batch):
    """Each is launched; what they compute, test_decode_block.py says."""
    if backend.name not in ("forward", "cuda"):
        pytest.skip("the kernels of test_decode_block.py")
    sizes = dict(tokens=2, channels=3, width=16, layers=1, head_dim=8, mlp_hidden=16)
    config = BlockConfig(**sizes)
    call = Call(backend, config, random_weights(config), "bf16", {})
    z = torch.randn(batch, 2, 3, generator=torch.Generator().manual_seed(0))
    plans = list(decode_plans(call.buffers(z, [])[0], batch, 6))
    assert len(plans) > 10
    assert {plan[1] for plan in plans} >= ({1} if batch < 17 else {1, 2, 4})
    assert all(call(z, plan).isfinite().all() for plan in plans)
