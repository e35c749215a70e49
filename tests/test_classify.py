"""Classification without training: the gradient against finite differences, Bayes' rule against log p, the cost."""

import copy

import pytest
import torch
from oracle_tarflow import Oracle, make_state_dict
from tiny import BATCH, VARIANTS, images, make_flow

import biflow
from biflow.models.classify import RULES

# both forms of the class embedding, with every option that changes what lies between it and the likelihood
CLASSES = {name: config for name, config in VARIANTS.items() if config.get("num_classes")}


def context_of(flow, batch=BATCH):
    c = flow.config
    if not c.context_dim:
        return None
    return torch.randn(batch, 3, c.context_dim, generator=torch.Generator().manual_seed(3)).to(flow.var.dtype)


def log_prob_of_mixture(flow, x, context, logits):
    """log p(x | e), e = softmax(logits)^T E, by a model whose classes all have the embedding e."""
    mixed = copy.deepcopy(flow)
    for block in mixed.blocks:
        e = torch.einsum("k,knc->nc", logits.softmax(0), block.class_embed.detach())
        block.class_embed.data.copy_(e.expand_as(block.class_embed))
    with torch.no_grad():
        return mixed.log_prob(x, None, context)


@pytest.mark.parametrize("name", CLASSES)
def test_the_gradient_is_that_of_the_mixtures_logits(name):
    flow = make_flow(dtype=torch.float64, **CLASSES[name])
    x, context, classes, step = images(flow), context_of(flow), flow.config.num_classes, 1e-4
    g = flow.classify(x, context)
    assert g.dtype == torch.float64
    assert g.shape == (BATCH, classes)
    for k in range(classes):
        nudge = step * torch.eye(classes, dtype=torch.float64)[k]
        above, below = (log_prob_of_mixture(flow, x, context, s * nudge) for s in (1, -1))
        assert (g[:, k] - (above - below) / (2 * step)).abs().max() <= 1e-6
    assert g.abs().max() > 0.05, "classes that do not matter would pass"
    assert g.sum(1).abs().max() <= 1e-12


@pytest.mark.parametrize("name", CLASSES)
def test_bayes_is_the_likelihood_of_each_class(name):
    flow = make_flow(**CLASSES[name])
    x, context = images(flow), context_of(flow)
    want = [flow.log_prob(x, torch.full((BATCH,), k), context) for k in range(flow.config.num_classes)]
    assert torch.equal(flow.classify(x, context, rule="bayes"), torch.stack(want, 1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["classes", "context-and-class-tokens"])
def test_samples_do_not_see_each_other(name, rule):
    flow = make_flow(dtype=torch.float64, **CLASSES[name])
    x, context = images(flow, 5), context_of(flow, 5)
    whole = flow.classify(x, context, rule=rule)
    torch.testing.assert_close(flow.classify(x, context, rule=rule, batch_size=2), whole, rtol=1e-12, atol=1e-13)
    for i in range(5):
        own = None if context is None else context[i : i + 1]
        torch.testing.assert_close(flow.classify(x[i : i + 1], own, rule=rule)[0], whole[i], rtol=1e-12, atol=1e-13)
    assert flow.classify(x[:0], None if context is None else context[:0], rule=rule).shape == (0, 3)


def calls_of(flow, **options):
    """Forward and backward passes of each block during one classification."""
    counts = {"forward": [0] * len(flow.blocks), "backward": [0] * len(flow.blocks)}

    def counter(kind, i):
        def count(*_):
            counts[kind][i] += 1

        return count

    for i, block in enumerate(flow.blocks):
        block.register_forward_hook(counter("forward", i))
        block.register_full_backward_hook(counter("backward", i))
    flow.classify(images(flow), **options)
    return counts


@pytest.mark.parametrize("class_tokens", [0, 2])
@pytest.mark.parametrize("classes", [3, 1000])
def test_one_encode_and_one_backward_whatever_the_number_of_classes(classes, class_tokens):
    flow = make_flow(num_classes=classes, class_tokens=class_tokens)
    assert calls_of(flow) == {"forward": [1, 1, 1], "backward": [1, 1, 1]}


def test_bayes_costs_an_encode_a_class():
    assert calls_of(make_flow(num_classes=7), rule="bayes") == {"forward": [7] * 3, "backward": [0] * 3}


def saved_bytes(call):
    """What autograd keeps for the backward pass, each storage once."""
    seen = {}

    def keep(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return sum(seen.values())


def test_memory():
    """Weights that need no gradient: autograd keeps less than for a step of training."""
    flow = make_flow(num_classes=3, img_size=8, layers_per_block=2)
    x = images(flow, 8)
    training, own = saved_bytes(lambda: flow.log_prob(x, None)), saved_bytes(lambda: flow.classify(x))
    assert own < 0.9 * training


def test_nothing_is_left_behind():
    flow = make_flow(num_classes=3)
    flow.blocks[1].class_embed.requires_grad_(False)
    before = {k: (p, p.detach().clone(), p._version, p.requires_grad) for k, p in flow.named_parameters()}
    x = images(flow).requires_grad_()
    for rule in RULES:
        scores = flow.classify(x, rule=rule)
        assert not scores.requires_grad
    for key, (parameter, values, version, wanted) in before.items():
        now = flow.get_parameter(key)
        assert now is parameter
        assert now.grad is None
        assert (now._version, now.requires_grad) == (version, wanted)
        assert torch.equal(now, values)
    assert x.grad is None


@pytest.mark.parametrize("rule", RULES)
def test_in_every_mode_of_autograd(rule):
    flow = make_flow(num_classes=3)
    x = images(flow)
    want = flow.classify(x, rule=rule)
    with torch.no_grad():
        assert torch.equal(flow.classify(x, rule=rule), want)
    with torch.inference_mode():
        assert torch.equal(flow.classify(x.clone(), rule=rule), want)
        made_inside = make_flow(num_classes=3)
        assert torch.equal(made_inside.classify(images(flow), rule=rule), want)
    assert torch.equal(made_inside.classify(x, rule=rule), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.classify(x, rule=rule), want)
    flow.requires_grad_(False)
    assert torch.equal(flow.classify(x, rule=rule), want)


def test_top_k():
    flow = make_flow(num_classes=5)
    x = images(flow)
    scores = flow.classify(x)
    labels, best = flow.classify(x, top_k=2)
    assert labels.shape == (BATCH, 2)
    assert torch.equal(labels[:, 0], scores.argmax(1))
    assert torch.equal(best, scores.sort(1, descending=True).values[:, :2])
    assert torch.equal(scores.gather(1, labels), best)


def test_one_class():
    """Its mixture is the class itself, whatever the logit is."""
    flow = make_flow(num_classes=1)
    assert torch.equal(flow.classify(images(flow)), torch.zeros(BATCH, 1))
    assert flow.classify(images(flow), rule="bayes", top_k=1)[0].tolist() == [[0]] * BATCH


@pytest.mark.parametrize("rule", RULES)
def test_draws_of_noise_are_averaged(rule):
    flow = make_flow(num_classes=3, noise_std=0.2)
    x = images(flow)
    scores = flow.classify(x, rule=rule, noise_draws=2, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    draws = [x + 0.2 * torch.randn(x.shape, generator=generator) for _ in range(2)]
    torch.testing.assert_close(scores, sum(flow.classify(d, rule=rule) for d in draws) / 2)
    again = flow.classify(
        x, rule=rule, noise_draws=2, batch_size=3, generator=torch.Generator().manual_seed(5)
    )  # the same noise
    torch.testing.assert_close(again, scores)
    assert (scores - flow.classify(x, rule=rule)).abs().max() > 1e-3


@pytest.mark.parametrize("nvp", [True, False])
def test_a_model_of_ml_tarflow(nvp):
    """Bayes against a likelihood that shares no code; the gradient against the slope of that towards each class."""
    var = 0.5 + torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    state = make_state_dict(4, 4, 16, 3, 1, classes=3, nvp=nvp, var=var)
    flow = biflow.interop.from_ml_tarflow(state, img_size=4, patch_size=2, in_channels=1, head_dim=8)
    x = images(flow)

    def likelihood(state, y):
        """Of the oracle's z and mean log-determinant, up to what is the same for all classes."""
        wide = {k: v.double() for k, v in state.items()}
        z, logdet = Oracle(wide, 8).encode(biflow.models.layers.patchify(x.double(), 2), y)
        return 16 * logdet - 0.5 * (z.square() / wide["var"]).sum((1, 2))

    by_class = torch.stack([likelihood(state, torch.full((BATCH,), k)) for k in range(3)], 1)
    scores = flow.classify(x, rule="bayes").double()
    torch.testing.assert_close(scores - scores[:, :1], by_class - by_class[:, :1], atol=1e-5, rtol=1e-5)
    g, step = flow.classify(x).double(), 1e-4
    for k in range(3):

        def moved(s, k=k):
            tables = {
                key: t + s * (t[k] - t.mean(0))
                for key, t in ((key, v.double()) for key, v in state.items())
                if key.endswith("class_embed")
            }
            return likelihood(state | tables, None)

        torch.testing.assert_close(g[:, k], (moved(step) - moved(-step)) / (2 * step) / 3, atol=1e-5, rtol=1e-4)


def test_classes_of_samples_are_found():
    """Images that the model drew for a class: Bayes is right most often, and the gradient close behind."""
    flow = make_flow(num_classes=4, img_size=8)
    y = torch.arange(200) % 4
    x = flow.sample(200, y, generator=torch.Generator().manual_seed(0))
    right = {rule: float((flow.classify(x, rule=rule).argmax(1) == y).double().mean()) for rule in RULES}
    assert right["bayes"] >= right["gradient"] >= 0.5, right
    assert right["bayes"] >= 0.8, right


BAD = {
    "unconditional": (dict(), dict(), ValueError, "expected a model with classes, got one with num_classes=0"),
    "rule": (dict(num_classes=3), dict(rule="guess"), ValueError, "rule: expected one of gradient, bayes, got 'guess'"),
    "bf16": (
        dict(num_classes=3, dtype=torch.bfloat16), dict(), TypeError,
        "expected weights of torch.float32 or torch.float64, got torch.bfloat16",
    ),
    "noise": (
        dict(num_classes=3), dict(noise_draws=2), ValueError,
        "noise_draws: expected 0 for a model with noise_std = 0, got 2",
    ),
    "draws": (dict(num_classes=3), dict(noise_draws=-1), ValueError, "noise_draws: expected 0 or more, got -1"),
    "top_k": (dict(num_classes=3), dict(top_k=4), ValueError, "expected None or 1 to 3 (num_classes), got 4"),
    "top_k 0": (dict(num_classes=3), dict(top_k=0), ValueError, "expected None or 1 to 3 (num_classes), got 0"),
    "batch_size": (dict(num_classes=3), dict(batch_size=0), ValueError, "batch_size: expected at least 1, got 0"),
    "generator": (dict(num_classes=3), dict(generator=1), TypeError, "generator: expected a torch.Generator or None"),
    "context": (
        dict(num_classes=3), dict(context=torch.zeros(BATCH, 1, 5)), ValueError,
        "context: expected None for a model with context_dim=0",
    ),
    "mask": (dict(num_classes=3), dict(mask=torch.ones(BATCH, 4, dtype=torch.bool)), TypeError, "argument 'mask'"),
    "mask as context": (
        dict(num_classes=3, context_dim=5), dict(context=torch.ones(BATCH, 3, 5, dtype=torch.bool)), TypeError,
        "context: expected a floating-point tensor, got torch.bool",
    ),
    "context and its mask": (
        dict(num_classes=3, context_dim=5),
        dict(context=(torch.zeros(BATCH, 3, 5), torch.ones(BATCH, 3, dtype=torch.bool))), TypeError,
        "context: expected a floating-point tensor, got tuple",
    ),
    "padded context": (
        dict(num_classes=3, context_dim=5), dict(context=torch.full((BATCH, 3, 5), torch.nan)), ValueError,
        "context: expected finite values, got 60 NaN or infinite of 60",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "options", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(config, options, error, message):
    flow = make_flow(**config)
    with pytest.raises(error) as raised:
        flow.classify(images(flow), **options)
    assert message in str(raised.value)


def test_images_that_are_none():
    flow = make_flow(num_classes=3)
    with pytest.raises(ValueError, match="x: expected shape"):
        flow.classify(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="x: expected finite values, got 64 NaN"):
        flow.classify(torch.full((BATCH, 1, 4, 4), torch.nan))
    with pytest.raises(TypeError, match=r"expected torch\.float32, the model's dtype; got torch\.float64"):
        flow.classify(images(flow).double())
    flow.blocks[0].proj_out.bias.data[:4] = -200.0
    with pytest.raises(FloatingPointError, match="expected finite scores, got NaN or infinite ones for 4 of 4"):
        flow.classify(images(flow))
