"""Hidden alignment's terms are read from the hidden states by one op: the plain form's loss and gradients, and what is
kept for them."""

import dataclasses

import pytest
import torch
from dispatched import Dispatched
from tiny import make_flow, make_reverse

import biflow
from biflow import train
from biflow.models.layers import patchify
from biflow.models.reverse import Head
from biflow.train import AlignmentConfig, distill, likelihood

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPE = {"img_size": 8, "in_channels": 1, "patch_size": 2, "width": 32, "num_blocks": 3, "head_dim": 16}
# AlignmentConfig, and what of BiFlowConfig differs from a guided inverse with RMSNorm
CASES = {
    "guided": ({"normalize": "mean_square"}, {}),
    "guided, a scale a token, adaptive": ({"normalize": "token_rms", "adaptive_power": 1.0}, {}),
    "guided, no scale, adaptive": ({"normalize": "none", "adaptive_power": 0.5, "adaptive_constant": 0.1}, {}),
    "guided, layernorm": ({"normalize": "token_rms"}, {"norm": "layernorm"}),
    "plain labels": ({"normalize": "mean_square", "weight_states": (0.1, 0.0, 2.0)}, {"max_guidance": 0.0}),
    "no classes, layernorm": (
        {"normalize": "none"},
        {"norm": "layernorm", "num_classes": 0, "max_guidance": 0.0},
    ),
    "normalised targets": ({"normalize_targets": "token_rms", "adaptive_power": 1.0}, {}),
    "noisy output": ({"normalize": "token_rms"}, {"learned_denoising": False, "norm": "layernorm"}),
    "noisy output, one group": ({}, {"learned_denoising": False, "num_blocks": 1}),
}  # fmt: skip


def prepared(case, dtype):
    """(config, flow, inverse, x, y); weights and images are the same numbers in every dtype."""
    alignment, own = CASES[case]
    model = {**SHAPE, "num_classes": 3, "class_tokens": 2, "max_guidance": 3.0, "guidance_tokens": 1, **own}
    inverse = make_reverse(**model).to(dtype)
    flow = make_flow(**SHAPE | {"num_blocks": model["num_blocks"]}, num_classes=3, noise_std=0.1, dtype=dtype)
    config = train.InverseTraining(model=inverse.config, alignment=AlignmentConfig(**alignment), label_drop=0.3)
    x = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1
    x[0] = 0  # an even gray image: its target is smaller than the floor
    return config, flow, inverse, x, torch.arange(10) % 3


def plain(config, flow, inverse, x, y):
    """(loss, errors) by predictions that are all made, mixed, and compared: the formula of `alignment_loss`."""
    g, own, a = torch.Generator().manual_seed(5), config.model, config.alignment
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        z, _, states = flow.encode(
            likelihood.add_noise(x, 0.1, None, g), y if own.num_classes else None, return_states=True
        )
    label = likelihood.drop_labels(y, config.label_drop, g) if own.num_classes else None
    w = None
    if own.max_guidance:
        w = distill.draw_guidance(len(x), own.max_guidance, config.guidance_draw, g)
        w = torch.where(label < 0, 0.0, w.to(x.dtype))
    targets = [distill.normalized(state, a.normalize_targets) for state in states[:-1]]
    output, predictions = inverse(z, label, w, return_states=True)
    pairs = {f"state_{i}": (h, t) for i, (h, t) in enumerate(zip(predictions, targets, strict=True))}
    if own.learned_denoising:
        pairs = {"output": (output, patchify(x, 2)), **pairs}
    else:
        pairs = {"output": (output, states[0]), **{k: v for k, v in pairs.items() if k != "state_0"}}
    free = [None] * len(pairs)
    if w is not None:
        with torch.no_grad():
            output, predictions = inverse(z, None, torch.zeros_like(w), return_states=True)
        free = [output, *predictions][: len(pairs)] if own.learned_denoising else predictions
    shares = a.weight_states if isinstance(a.weight_states, tuple) else (a.weight_states,) * (len(pairs) - 1)
    loss, errors = 0.0, {}
    for (name, (h, target)), u, share in zip(pairs.items(), free, (a.weight_output, *shares), strict=True):
        h = h.to(target.dtype)
        if w is not None:
            h = (h + w[:, None, None] * u) / (1 + w[:, None, None])
        square = (h - target) ** 2
        if a.normalize != "none":
            dims = 2 if a.normalize == "token_rms" else (1, 2)
            square = square / (target**2).mean(dims, keepdim=True).clamp_min(0.01)
        total = square.sum((1, 2))
        weight = (
            (total.detach() + a.adaptive_constant) ** -a.adaptive_power if a.adaptive_power else 1 / square[0].numel()
        )
        loss = loss + share * (weight * total).mean()
        errors[name] = square.mean().detach()
    return loss, errors


def ours(config, flow, inverse, x, y):
    return train.alignment_loss(inverse, flow, x, y, torch.Generator().manual_seed(5), config)


def results(f, case, dtype, autocast=False):
    """{name: value} of the loss, the logged errors and the gradients, in fp64."""
    config, flow, inverse, x, y = prepared(case, dtype)
    with torch.autocast("cpu", BF16, enabled=autocast):
        loss, errors = f(config, flow, inverse, x, y)
    loss.backward()
    found = {"loss": loss.detach(), **{k: v for k, v in errors.items() if not k.startswith("norm")}}
    found |= {f"grad {name}": p.grad for name, p in inverse.named_parameters() if p.grad is not None}
    return {name: t.double() for name, t in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_every_gradient_are_those_of_the_plain_form(case):
    got, want = results(ours, case, F64), results(plain, case, F64)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_rounding_errors_are_those_of_the_plain_form(case, autocast):
    """Root mean squares: of values that autocast rounds a largest error says little (docs/decisions/0007)."""
    exact = results(plain, case, F64)
    got, same = (results(f, case, F32, autocast) for f in (ours, plain))
    assert got.keys() == same.keys() == exact.keys()
    for name, e in exact.items():
        size = e.norm() + 1e-3 * exact["loss"]
        error, allowed = ((t[name] - e).norm() / size for t in (got, same))
        floor = 2**-8 if autocast else 16 * 2**-23
        assert error <= 2 * allowed + floor, (name, error, allowed)


def kept_by_states():
    """Bytes that autograd keeps for the states' terms, beside the network and the output's term."""
    kept = []
    for weight in (0.0, 0.5):
        config, flow, inverse, x, y = prepared("guided, layernorm", F32)
        config = dataclasses.replace(config, alignment=AlignmentConfig(weight_states=weight))
        weights = {p.untyped_storage().data_ptr() for p in inverse.parameters()}
        storages = {}

        def keep(t, storages=storages, weights=weights):
            if t.untyped_storage().data_ptr() not in weights:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            ours(config, flow, inverse, x, y)
        kept.append(sum(s.nbytes() for s in storages.values()))
    return kept[1] - kept[0]


def test_half_the_memory_or_less_is_kept(monkeypatch):
    ours = kept_by_states()
    monkeypatch.setattr(Head, "error", lambda self, h, *args: distill.squared_error(self(h), *args))
    plain = kept_by_states()
    assert plain >= SHAPE["num_blocks"] * 10 * 16 * SHAPE["width"] * 4  # norm(h) of each
    assert ours <= plain / 2, (ours, plain)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_head_multiplies_as_autocast_would(autocast):
    """The same products rounded; autocast rounds the prediction, too."""
    _, _, inverse, *_ = prepared("guided", F32)
    g = torch.Generator().manual_seed(0)
    h, target = (torch.randn(5, 16, n, generator=g) for n in (SHAPE["width"], 4))
    scale, head = torch.rand(5, 16, generator=g), inverse.heads[0]
    with torch.autocast("cpu", BF16, enabled=autocast):
        got = head.error(h, target, scale)
    y = head[0](h)
    if autocast:
        y, weight = y.to(BF16).float(), head[1].weight.to(BF16).float()
    else:
        weight = head[1].weight
    want = ((y @ weight.t() + head[1].bias - target).square() * scale[..., None]).sum((1, 2))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", train.STRATEGIES)
def test_which_strategies_make_predictions(strategy):
    """Those that hidden distillation embeds exist anyway; the unconditional ones are small and made in every case."""
    config, flow, inverse, x, y = prepared("guided", F32)
    distilled = strategy == "hidden_distillation"
    model = biflow.BiFlow(dataclasses.replace(config.model, reembed_states=distilled))
    model.load_state_dict(inverse.state_dict())
    config = dataclasses.replace(config, model=model.config, alignment=AlignmentConfig(strategy=strategy))
    with Dispatched() as called:
        ours(config, flow, model, x, y)
    assert called.names.count("alignment_error") == (SHAPE["num_blocks"] if strategy == "hidden_alignment" else 0)


@pytest.mark.parametrize("case", ["guided", "noisy output", "noisy output, one group"])
def test_hidden_states_are_what_the_heads_read(case):
    _, flow, inverse, x, y = prepared(case, F32)
    z = flow.encode(x, y)[0]
    output, states, hidden = inverse(z, y, return_states=True, return_hidden=True)
    again, alone = inverse(z, y, return_hidden=True)
    states = states[0 if inverse.config.learned_denoising else 1 :]
    assert torch.equal(output, again)
    assert len(hidden) == len(inverse.heads) - 1
    for head, state, h, other in zip(reversed(inverse.heads[:-1]), states, hidden, alone, strict=True):
        assert torch.equal(head(h), state)
        assert torch.equal(h, other)
