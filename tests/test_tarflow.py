"""TarFlow: the mathematics of a flow (Jacobian, causality, inverse, density), sampling, sizes at the edge."""

import contextlib
import copy
import math
import re

import numpy as np
import pytest
import torch
from tiny import BATCH, VARIANTS, images, make_condition, make_flow, noise

import biflow
from biflow.models.layers import patchify

# --- encode


@pytest.mark.parametrize("name", VARIANTS)
def test_logdet_is_that_of_the_jacobian(name):
    flow = make_flow(dtype=torch.float64, **VARIANTS[name])
    y, context = make_condition(flow, BATCH)
    x = images(flow)
    _, logdet = flow.encode(x, y, context)
    assert logdet.dtype == torch.float64
    for b in range(BATCH):
        one = [None if t is None else t[b : b + 1] for t in (y, context)]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, one=one: flow.encode(v, *one)[0].flatten(), x[b : b + 1]
        )
        want = torch.linalg.slogdet(jacobian.flatten(1)).logabsdet
        torch.testing.assert_close(logdet[b], want, rtol=0, atol=1e-9)
    if not flow.config.shift_only:
        assert logdet.abs().min() > 1e-3, "a flow that changes no volume tests nothing"


@pytest.mark.parametrize("start_token", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_a_token_depends_on_those_before_it_in_block_order(which, start_token):
    """Blocks 0 and 1 in turn, the other one the identity: lower triangular in data order, then upper."""
    flow = make_flow(std=0.3, dtype=torch.float64, num_blocks=2, start_token=start_token)
    with torch.no_grad():
        for p in flow.blocks[1 - which].proj_out.parameters():
            p.zero_()
    c = flow.config
    jacobian = torch.autograd.functional.jacobian(
        lambda v: flow.encode(_pixels(v, c.patch_size))[0][0], patchify(images(flow, 1), c.patch_size)
    )[:, :, 0].abs()
    reach = jacobian.amax((1, 3))  # (T out, T in)
    causal = torch.ones(c.tokens, c.tokens).tril().bool()
    causal = causal.flip(0, 1) if which else causal
    assert (reach[~causal] == 0).all()
    assert (reach[causal] > 1e-6).all()
    first = c.tokens - 1 if which else 0
    diagonal = jacobian[first, :, first]
    if start_token:
        assert (diagonal.diag() - 1).abs().min() > 1e-6, "with a start token the first token transforms too"
    else:
        assert torch.equal(diagonal, flow.var[first].rsqrt().diag()), "the first token stays as it is, up to the prior"


def _pixels(tokens, patch):
    return biflow.models.layers.unpatchify(tokens, patch)


@pytest.mark.parametrize("name", ["classes", "shift-only"])
def test_states_are_the_trajectory_in_data_order(name):
    flow = make_flow(**VARIANTS[name])
    x, (y, context) = images(flow), make_condition(flow, BATCH)
    z, logdet, states = flow.encode(x, y, context, return_states=True)
    assert len(states) == flow.config.num_blocks + 1
    assert torch.equal(states[0], patchify(x, 2))
    assert torch.equal(states[-1], z)
    plain = flow.encode(x, y, context)
    assert torch.equal(plain[0], z)
    assert torch.equal(plain[1], logdet)
    # block 0 leaves its first token as it is, block 1 reads in reverse and leaves the last
    assert torch.equal(states[1][:, 0], states[0][:, 0])
    assert torch.equal(states[2][:, -1], states[1][:, -1])
    assert (states[2][:, 0] - states[1][:, 0]).abs().min() > 0


def test_log_prob_is_the_density():
    flow = make_flow(num_classes=3)
    x, (y, _) = images(flow), make_condition(flow, BATCH)
    z, logdet = flow.encode(x, y)
    want = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2)) + logdet
    torch.testing.assert_close(flow.log_prob(x, y), want)
    torch.testing.assert_close(flow.bits_per_dim(x, y), -want / (16 * math.log(2)) + 7)  # log2(2 / 256) = -7
    torch.testing.assert_close(flow.bits_per_dim(x, y, bin_width=1 / 8), -want / (16 * math.log(2)) + 3)


def test_a_shift_only_prior_is_part_of_the_density():
    """N(0, var) on ml-tarflow's z: the same density as N(0, 1) on ours."""
    flow = make_flow(dtype=torch.float64, shift_only=True)
    x = images(flow)
    z, _ = flow.encode(x)
    want = torch.distributions.Normal(0.0, flow.var.sqrt()).log_prob(z * flow.var.sqrt()).sum((1, 2))
    torch.testing.assert_close(flow.log_prob(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("class_tokens", [0, 2])
def test_unconditional_is_the_mean_class(class_tokens):
    flow = make_flow(num_classes=3, class_tokens=class_tokens)
    x = images(flow)
    none = flow.encode(x)
    minus = flow.encode(x, torch.full((BATCH,), -1))
    assert all(torch.equal(a, b) for a, b in zip(none, minus, strict=True))
    averaged = copy.deepcopy(flow)
    with torch.no_grad():
        for block in averaged.blocks:
            block.class_embed.copy_(block.class_embed.mean(0, keepdim=True).expand_as(block.class_embed))
    torch.testing.assert_close(none[0], averaged.encode(x, torch.tensor([0, 1, 2, 0]))[0])
    mixed = flow.encode(x, torch.tensor([-1, 1, -1, 0]))[0]
    torch.testing.assert_close(mixed[[0, 2]], none[0][[0, 2]])
    assert (mixed[1] - none[0][1]).abs().max() > 1e-3
    z = noise(flow)
    torch.testing.assert_close(flow.decode(z), flow.decode(z, torch.full((BATCH,), -1)))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_learns(name):
    flow = make_flow(**VARIANTS[name])
    y, context = make_condition(flow, BATCH)
    loss = -flow.log_prob(images(flow), y, context).sum() - flow.log_prob(images(flow, seed=1)).sum()
    loss.backward()
    for key, p in flow.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.abs().max() > 0, key


# --- decode


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_inverts_encode(name):
    flow = make_flow(**VARIANTS[name])
    x, (y, context) = images(flow), make_condition(flow, BATCH)
    back, info = flow.decode(flow.encode(x, y, context)[0], y, context, return_info=True)
    assert (back - x).abs().max() <= 1e-4
    assert info.residual.shape == (BATCH,)
    assert info.residual.max() <= 1e-5
    z = noise(flow)
    assert (flow.encode(flow.decode(z, y, context), y, context)[0] - z).abs().max() <= 1e-4


@pytest.mark.parametrize("guide", ["a", "b", "ab"])
@pytest.mark.parametrize("anneal", [True, False])
@pytest.mark.parametrize("name", ["classes", "start-token", "shift-only", "modern", "context", "hard-clip"])
def test_guided_decode_is_certified(name, anneal, guide):
    """The certificate evaluates the guided parameters in parallel: an independent check of the sequential op."""
    flow = make_flow(std=0.1, **VARIANTS[name])
    y, context = make_condition(flow, BATCH)
    z = noise(flow)
    options = {"guidance": 1.5, "guide": guide, "anneal": anneal, "attn_temp": 0.7}
    x, info = flow.decode(z, y, context, **options, return_info=True)
    assert info.residual.max() <= 1e-5
    moved = (x - flow.decode(z, y, context)).abs().flatten(1).amax(1)
    if flow.config.shift_only and guide == "a":
        assert moved.max() == 0, "there is no scale to guide"
    else:
        assert moved.min() > 1e-5


def test_guidance_leaves_unconditional_samples_alone():
    flow = make_flow(num_classes=3)
    z, y = noise(flow), torch.tensor([-1, 0, -1, 2])
    plain, guided = flow.decode(z, y), flow.decode(z, y, guidance=2.0)
    torch.testing.assert_close(guided[[0, 2]], plain[[0, 2]])
    assert (guided - plain)[[1, 3]].abs().max() > 1e-3
    heated = flow.decode(z, y, guidance=2.0, attn_temp=0.5)
    assert (heated - plain)[[0, 2]].abs().max() > 1e-4, "attn_temp guides without a class"


def test_decode_takes_strided_tensors():
    flow = make_flow(num_classes=3)
    x, (y, _) = images(flow), make_condition(flow, BATCH)
    z = flow.encode(x, y)[0]
    strided = z.mT.contiguous().mT
    assert not strided.is_contiguous()
    torch.testing.assert_close(flow.decode(strided, y.repeat_interleave(2)[::2]), flow.decode(z, y))
    torch.testing.assert_close(flow.encode(x.mT.contiguous().mT, y)[0], z)


def test_z_is_not_changed():
    flow = make_flow(start_token=True)
    z = noise(flow)
    before = z.clone()
    flow.decode(z)
    assert torch.equal(z, before)


# --- sample


def test_samples_are_reproducible():
    flow = make_flow(num_classes=3, noise_std=0.2)
    y = torch.tensor([0, 1, 2])
    a, b, c = (flow.sample(3, y, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert a.shape == (3, 1, 4, 4)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.manual_seed(4)
    d = flow.sample(3, y)
    torch.manual_seed(4)
    assert torch.equal(d, flow.sample(3, y))


def test_temperature_and_denoising_are_as_defined():
    flow = make_flow(num_classes=3, noise_std=0.2)
    y = torch.tensor([0, 1, -1])
    g = torch.Generator().manual_seed(1)
    z = torch.randn(3, 4, 4, generator=g)
    raw = flow.sample(3, y, temperature=0.5, denoise=False, guidance=1.0, generator=g.manual_seed(1))
    torch.testing.assert_close(raw, flow.decode(0.5 * z, y, guidance=1.0))
    clean = flow.sample(3, y, temperature=0.5, guidance=1.0, generator=g.manual_seed(1))
    x = raw.requires_grad_()
    score = torch.autograd.grad(flow.log_prob(x, y).sum(), x)[0]
    torch.testing.assert_close(clean, (x + 0.04 * score).detach())
    assert not clean.requires_grad
    assert torch.equal(flow.sample(1, temperature=0.0, denoise=False), flow.decode(torch.zeros(1, 4, 4)))


def test_a_sample_tells_of_its_decode():
    flow = make_flow(num_classes=3, noise_std=0.2)
    y, g = torch.tensor([0, 1, -1]), torch.Generator()
    want = flow.sample(3, y, guidance=1.0, solver="jacobi", generator=g.manual_seed(1))
    got, info = flow.sample(3, y, guidance=1.0, solver="jacobi", return_info=True, generator=g.manual_seed(1))
    assert torch.equal(got, want), "denoised"
    z = torch.randn(3, 4, 4, generator=g.manual_seed(1))
    told = flow.decode(z, y, guidance=1.0, solver="jacobi", return_info=True)[1]
    assert (info.passes, info.solver, info.fallbacks) == (told.passes, told.solver, told.fallbacks)
    assert torch.equal(info.residual, told.residual)


@pytest.mark.parametrize(
    "mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__
)
def test_sampling_works_without_gradients(mode):
    flow = make_flow(num_classes=3, context_dim=5, noise_std=0.2)
    want = flow.sample(3, torch.tensor([0, 1, 2]), torch.ones(3, 2, 5), generator=torch.Generator().manual_seed(1))
    with mode():
        y, context = torch.tensor([0, 1, 2]), torch.ones(3, 2, 5)  # inference tensors under inference_mode
        got = flow.sample(3, y, context, generator=torch.Generator().manual_seed(1))
        built_inside = make_flow(num_classes=3, context_dim=5, noise_std=0.2)  # its weights too
        assert torch.equal(built_inside.sample(3, y, context, generator=torch.Generator().manual_seed(1)), got)
    assert torch.equal(got, want)
    assert all(p.grad is None for p in flow.parameters())


@pytest.mark.parametrize("options", [{"generator": 3}, {"denoise": "no"}, {"denoise": 1}], ids=str)
def test_sample_refuses(options):
    with pytest.raises(TypeError, match=f"{next(iter(options))}: expected .* got (int|str)"):
        make_flow(noise_std=0.2).sample(1, **options)


def test_sample_takes_a_count_of_numpy():
    assert make_flow().sample(np.int64(2)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("call", ["encode", "decode", "denoise"])
def test_a_device_without_kernels_is_refused(call):
    flow = make_flow(noise_std=0.2).to("meta")
    x = torch.zeros(1, 4, 4, device="meta") if call == "decode" else torch.zeros(1, 1, 4, 4, device="meta")
    with pytest.raises(ValueError, match=r"expected a model on cpu.*: this build has no kernels for meta"):
        getattr(flow, call)(x)


def test_a_diverged_sample_does_not_spoil_the_others():
    """Strong guidance may overflow one sample: it comes back as it is, the others are denoised."""
    flow = make_flow(num_classes=3, noise_std=0.2)
    x = images(flow)
    x[1] = torch.inf
    out = flow._denoise(x, None, None)
    keep = [0, 2, 3]
    torch.testing.assert_close(out[keep], flow.denoise(x[keep]))
    with pytest.raises(ValueError, match="x: expected finite values, got 16 NaN or infinite of 64"):
        flow.denoise(x)


def test_update_prior_makes_z_unit_variance():
    flow = make_flow(shift_only=True, dtype=torch.float64)
    x = images(flow, 64)
    flow.update_prior(flow.encode(x)[0], rate=1.0)
    torch.testing.assert_close(flow.encode(x)[0].square().mean(0), torch.ones_like(flow.var))
    with pytest.raises(ValueError, match="update_prior: expected a shift_only model"):
        make_flow().update_prior(noise(flow))
    with pytest.raises(ValueError, match=re.escape("z: expected shape (at least 1, 4, 4), got (0, 4, 4)")):
        flow.update_prior(noise(flow, 0))


# --- sizes at the edge


@pytest.mark.parametrize("name", ["classes", "modern", "context", "shift-only"])
def test_an_empty_batch(name):
    flow = make_flow(noise_std=0.2, **VARIANTS[name])
    y, context = make_condition(flow, 0)
    z, logdet, states = flow.encode(images(flow, 0), y, context, return_states=True)
    assert z.shape == (0, 4, 4)
    assert logdet.shape == (0,)
    assert len(states) == 4
    x, info = flow.decode(z, y, context, guidance=1.0, return_info=True)
    assert x.shape == (0, 1, 4, 4)
    assert info.residual.shape == (0,)
    assert flow.sample(0, y, context).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("name", ["classes", "start-token", "modern", "shift-only"])
def test_a_single_token(name):
    flow = make_flow(img_size=2, **VARIANTS[name])
    x, (y, context) = images(flow), make_condition(flow, BATCH)
    z, logdet = flow.encode(x, y, context)
    torch.testing.assert_close(flow.decode(z, y, context, guidance=0.0), x)
    assert flow.decode(z, y, context, guidance=1.0).isfinite().all()
    if not (flow.config.start_token or flow.config.shift_only):
        assert torch.equal(z, patchify(x, 2) * flow.var.rsqrt())
        assert (logdet == -0.5 * flow.var.log().sum()).all()
