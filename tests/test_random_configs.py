"""Configurations drawn at random: options that no case names together must decode and encode right together, too."""

import copy
import random

import pytest
import torch

import biflow
from biflow.evaluate import eager_decode

CONFIGS = 30
EPS = torch.finfo(torch.float32).eps


def draw(seed):
    """A flow of two blocks of 16 tokens, a condition, options of guidance, a window."""
    choose = random.Random(seed)
    o = {"num_classes": choose.choice([0, 3]), "context_dim": choose.choice([0, 5])}
    o |= {name: choose.random() < 0.5 for name in ("qk_norm", "rope", "pos_embed", "start_token")}
    o |= {"norm": choose.choice(["layernorm", "rmsnorm"]), "gate": choose.choice(["gelu", "swiglu"])}
    o |= {"clip": choose.choice([None, ("hard", 0.5), ("tanh", 1.0)]), "head_dim": choose.choice([16, 32, 64])}
    o["class_tokens"] = choose.choice([0, 2]) if o["num_classes"] else 0
    o["shift_only"] = choose.random() < 0.2
    if not o["shift_only"]:
        o |= {"scale": choose.choice(["exp", "softplus", "sigmoid"]), "clip_on": choose.choice(["both", "scale"])}
    shape = {"img_size": 8, "in_channels": 1, "patch_size": 2, "width": 64, "num_blocks": 2, "layers_per_block": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = biflow.TarFlow(biflow.TarFlowConfig(**shape, **o))
        with torch.no_grad():
            for block in flow.blocks:
                block.proj_out.weight.normal_(0, 0.03)
                block.proj_out.bias.normal_(0, 0.05)
            for p in flow.parameters():
                if p.dim() == 1:
                    p.add_(0.05 * torch.randn_like(p))
            if o["shift_only"]:
                flow.var.uniform_(0.5, 2.0)
        batch = choose.choice([1, 3, 5])
        z = torch.randn(batch, 16, 4)
        y = torch.randint(-1, 3, (batch,)) if o["num_classes"] and choose.random() < 0.8 else None
        length = choose.choice([0, 1, 3])
        context = torch.randn(batch, length, 5) if o["context_dim"] and choose.random() < 0.8 else None
    guided = {"guidance": choose.choice([0.0, 1.3]), "guide": choose.choice(["a", "b", "ab"])}
    guided |= {"anneal": choose.random() < 0.5, "attn_temp": choose.choice([1.0, 0.7])}
    return flow, z, y, context, guided, choose.choice([1, 3, 5, 16, 20])


def rms(x):
    return x.square().mean().sqrt()


def check_single(got, plain, exact, terms=1):
    """terms: of the sums in it, whose floor is sqrt(terms) roundings (docs/decisions/0007)."""
    assert rms(got - exact) <= 2 * rms(plain - exact) + terms**0.5 * EPS * rms(exact)


@pytest.mark.parametrize("seed", range(CONFIGS))
@torch.no_grad()
def test_decodes_and_densities_are_right(seed):
    flow, z, y, context, guided, window = draw(seed)
    wide, wide_context = copy.deepcopy(flow).double(), None if context is None else context.double()
    exact = eager_decode(wide, z.double(), y, wide_context, **guided)
    plain = eager_decode(flow, z, y, context, **guided)
    largest = exact.abs().max().clamp_min(1)
    for solver in ({"solver": "sequential"}, {"solver": "jacobi"}, {"solver": "windowed", "window": window}):
        x, info = flow.decode(z, y, context, return_info=True, **solver, **guided)
        if solver["solver"] == "sequential":
            check_single(x, plain, exact)
        assert (x - exact).abs().max() <= 1e-4 * largest, solver
        assert info.residual.max() <= 1e-4, solver
        coarse = flow.decode(z, y, context, precision="bf16", **solver, **guided)
        assert rms(coarse - exact) <= 0.03 * rms(exact), solver

    images = plain
    exact, plain = wide.encode(images.double(), y, wide_context), flow.encode(images, y, context)
    single, half = (flow.encode(images, y, context, precision=p) for p in ("fp32", "bf16"))
    for got, coarse, same, want, terms in zip(single, half, plain, exact, (1, 2 * 16 * 4), strict=True):
        check_single(got, same, want, terms)
        assert rms(coarse - want) <= 0.03 * rms(want) + 0.01


def test_the_draw_reaches_every_option():
    configs = [draw(seed)[0].config for seed in range(CONFIGS)]
    for name in ("num_classes", "class_tokens", "context_dim", "qk_norm", "rope", "pos_embed", "start_token", "norm",
                 "gate", "clip", "head_dim", "shift_only", "clip_on"):  # fmt: skip
        assert len({getattr(c, name) for c in configs}) > 1, name
    assert {c.scale for c in configs} == {"exp", "softplus", "sigmoid"}
