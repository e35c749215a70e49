"""decode_block many times in a row on random shapes, options and plans: right each time, no drift, no growing memory.

pytest tests/kernels/test_decode_block_soak.py --decodes 1000       # minutes on the emulator
"""

import itertools
import random
import resource

import torch
from blocks import error_and_allowed, random_weights

from biflow.ops.decode_block import BlockConfig

from .backends import COPIES, ORDERS
from .test_decode_block import Call, references

GROWTH = 64 << 20  # bytes a process may grow by after the first decodes


def draw(r: random.Random, seed: int):
    """Config, z, options, precision, plan."""
    head_dim, pick = r.choice([2, 6, 8, 16]), r.choice
    config = BlockConfig(
        tokens=r.randint(1, 5), channels=r.randint(1, 6), width=head_dim * r.randint(1, 3), layers=pick([1, 1, 2]),
        head_dim=head_dim, mlp_hidden=r.randint(1, 40), norm=pick(["layernorm", "rmsnorm"]),
        gate=pick(["gelu", "swiglu"]), qk_norm=pick([True, False]), rope=pick([True, False]),
        pos_embed=pick([True, False]), start_token=pick([True, False]), shift_only=r.random() < 0.2,
        num_classes=pick([0, 3]), layout=pick(["scale_shift", "shift_scale", "interleaved"]),
        scale=pick(["exp", "softplus", "sigmoid"]), clip=pick([None, ("hard", 0.5), ("tanh", 2.0)]),
        clip_on=pick(["both", "scale"]), flip=pick([True, False]),
    )  # fmt: skip
    batch, g = pick([1, 2, 3, 5]), torch.Generator().manual_seed(seed)
    z = torch.randn(batch, config.tokens, config.channels, generator=g)
    options = dict(y=torch.randint(-1, 3, (batch,), generator=g)) if config.num_classes else {}
    if r.random() < 0.4:
        options |= dict(guidance=pick([0.5, 2.0]), guide=pick(["a", "b", "ab"]), anneal=pick([True, False]))
        options |= dict(attn_temp=pick([1.0, 0.7]))
    splits = pick([1, 1, 2]) if head_dim % 8 == 0 else 1
    plan = [r.randint(0, 1), 1, r.randint(1, 3), splits, pick([1, 2, 4, 8]), r.randint(0, 1)]
    return config, z, options, pick(["fp32", "bf16"]), plan


def test_many_random_decodes(backend, request, leave_out):
    if backend.name not in ("forward", "cuda"):
        leave_out("one place, which takes all orders of threads and copies in turn")
    r, turns, before = random.Random(5), itertools.cycle(itertools.product(ORDERS, COPIES)), None
    decodes = request.config.getoption("--decodes", 30)
    for i in range(decodes):
        config, z, options, precision, plan = draw(r, i)
        weights = random_weights(config, seed=i)
        exact, plain = references(config, weights, z, options, precision)
        if backend.name == "forward":
            order, copies = next(turns)
            backend.configure(order, seed=i, copies=copies)
        got = Call(backend, config, weights, precision, options)(z, plan).cpu()
        error, allowed = error_and_allowed(got, plain, exact)
        assert error <= allowed, (
            f"decode {i}, {precision}, {plan}, {options}, {config}: {error:.2e}, {allowed:.2e} allowed"
        )
        if i == decodes // 4:
            before = memory(backend)
    assert memory(backend) - before < GROWTH
    if backend.name == "forward":
        backend.configure("forward")


def memory(backend) -> int:
    """Bytes in use: of the process at its most, or on the GPU."""
    if backend.name == "cuda":
        return torch.cuda.memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
