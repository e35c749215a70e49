"""Training: both objectives against formulas written out here, and the loop around them."""

import dataclasses
import itertools
import json
import math
import sys
from functools import partial

import pytest
import torch
from tiny_training import changed, flow_config, inverse_config, random_flow, same_weights, write_images

import biflow
from biflow import train
from biflow.config import from_mapping, to_mapping
from biflow.models.layers import patchify
from biflow.ops._checks import DEVICES
from biflow.train import AlignmentConfig, OptimConfig, RunConfig, distill, likelihood, optim, trainer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture(scope="module")
def flow_run(images, tmp_path_factory):
    """A finished stage one run: (config, folder, model)."""
    out = tmp_path_factory.mktemp("run") / "flow"
    config = flow_config(images, steps=60, every=20, tensorboard=True)
    return config, out, train.train_flow(config, out, progress=False)


def metrics(out, split):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


# --- stage one


def test_a_flow_learns_and_leaves_a_complete_folder(flow_run):
    config, out, model = flow_run
    logged, held_out = metrics(out, "train"), metrics(out, "val")
    assert [line["step"] for line in logged] == [line["step"] for line in held_out] == [20, 40, 60]
    assert {"loss", "lr", "grad_norm", "seconds"} <= logged[0].keys()
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.2
    assert held_out[-1]["loss"] < held_out[0]["loss"] - 0.1
    assert not model.training
    steps = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert steps == ["step_00000040", "step_00000060"]  # keep = 2
    assert same_weights(biflow.load(out / "model.safetensors"), model)
    assert same_weights(biflow.load(out / "checkpoints/step_00000060/model.safetensors"), model)
    assert list((out / "tensorboard").iterdir())
    yaml = __import__("yaml").safe_load((out / "config.yaml").read_text())
    assert yaml.pop("stage") == "flow"
    assert from_mapping(train.FlowTraining, yaml) == config


def test_the_logged_validation_loss_is_that_of_the_averaged_model(flow_run):
    config, out, model = flow_run
    data = biflow.data.load(config.data)
    generator = torch.Generator().manual_seed(trainer.VALIDATION_SEED)
    x = data.val_x.batch()
    noisy = x + 0.1 * torch.randn(x.shape, generator=generator)
    want = -model.log_prob(noisy, data.val_y).mean() / 64
    assert metrics(out, "val")[-1]["loss"] == pytest.approx(float(want), rel=1e-5)


def test_two_runs_give_the_same_bits_and_another_seed_does_not(images, tmp_path):
    state = torch.get_rng_state()
    runs = [
        train.train_flow(flow_config(images, steps=6, seed=seed), tmp_path / str(i), progress=False)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers are not used
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


def test_likelihood_loss_is_minus_log_prob_per_dimension(images):
    flow = random_flow(flow_config(images).model)
    x, y = torch.rand(5, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, -1, 0, 1])
    loss, z = train.likelihood_loss(flow, x, y)
    assert loss.item() == pytest.approx(-flow.log_prob(x, y).mean().item() / 64, rel=1e-5)
    assert torch.equal(z, flow.encode(x, y)[0])


def test_noise_is_gaussian_or_fills_a_bin():
    x = torch.full((200, 1, 8, 8), 0.25)
    generator = torch.Generator().manual_seed(0)
    gauss = likelihood.add_noise(x, 0.1, 1 / 8, generator) - x
    assert float(gauss.std()) == pytest.approx(0.1, rel=0.05)
    uniform = likelihood.add_noise(x, 0.0, 1 / 8, generator) - x
    assert -1 / 16 <= float(uniform.min()) < -0.06
    assert 0.06 < float(uniform.max()) <= 1 / 16
    with pytest.raises(ValueError, match="noise_std: expected more than 0"):
        likelihood.add_noise(x, 0.0, None, generator)


def test_label_drop():
    y = torch.arange(2000) % 10
    generator = torch.Generator().manual_seed(0)
    dropped = likelihood.drop_labels(y, 0.1, generator)
    assert 0.07 < float((dropped == -1).float().mean()) < 0.13
    assert torch.equal(dropped[dropped >= 0], y[dropped >= 0])
    assert likelihood.drop_labels(y, 0.0, generator) is y
    assert likelihood.drop_labels(None, 0.5, generator) is None


def test_the_objective_drops_labels_in_training_only(images):
    config = dataclasses.replace(flow_config(images), label_drop=0.5)
    flow, objective = random_flow(config.model), likelihood.Likelihood(config, None)
    x, y = torch.zeros(20, 1, 8, 8), torch.arange(20) % 2
    for training in (True, False):
        generator = torch.Generator().manual_seed(5)
        noisy = 0.1 * torch.randn(x.shape, generator=generator)
        dropped = torch.rand(20, generator=generator) < 0.5
        want = train.likelihood_loss(flow, noisy, torch.where(dropped, -1, y) if training else y)[0]
        got, _ = objective.loss(flow, x, y, torch.Generator().manual_seed(5), training=training)
        assert torch.equal(got, want)


def test_images_are_flipped_at_random_in_training(images, tmp_path, monkeypatch):
    seen, named = [], []

    def spy(self, model, x, y, generator, *, training, rows=None):
        assert (rows is not None) == training
        if training:
            seen.append(x)
            named.append(rows)
        return original(self, model, x, y, generator, training=training, rows=rows)

    original = likelihood.Likelihood.loss
    monkeypatch.setattr(likelihood.Likelihood, "loss", spy)
    config = flow_config(images, steps=3)
    train.train_flow(config, tmp_path / "run", progress=False)
    data = biflow.data.load(config.data)
    order = optim.DataOrder(len(data.train_x), 16, config.run.seed)
    stored = torch.cat([data.train_x.batch(order.indices(step)) for step in range(3)])
    kept = (torch.cat(seen) == stored).flatten(1).all(1)
    turned = (torch.cat(seen) == stored.flip(-1)).flatten(1).all(1)
    assert bool((kept ^ turned).all())
    assert 12 <= int(turned.sum()) <= 36
    indices = torch.cat([order.indices(step) for step in range(3)])
    assert torch.equal(torch.cat(named), indices + len(data.train_x) * turned), "which image, and whether mirrored"


def test_shift_only_moves_the_prior_in_training_only(images, tmp_path):
    config = changed(flow_config(images, steps=4), "model", shift_only=True)
    model = train.train_flow(config, tmp_path / "run", progress=False)
    assert not torch.equal(model.var, torch.ones_like(model.var))
    objective, before = likelihood.Likelihood(config, None), model.var.clone()
    x, generator = torch.zeros(3, 1, 8, 8), torch.Generator()
    objective.loss(model, x, None, generator, training=False)
    assert torch.equal(model.var, before)
    objective.loss(model, x, None, generator, training=True)
    objective.settle(model, lambda moment: moment)
    assert not torch.equal(model.var, before)


def test_dequantisation_noise_without_noise_std(images, tmp_path):
    config = changed(flow_config(images, steps=3), "model", noise_std=0.0)
    assert train.train_flow(config, tmp_path / "run", progress=False).config.noise_std == 0


# --- stage two


def aligned(images, **alignment):
    """(config, flow, inverse, x, y) with weights that are not at their zero initialisation."""
    config = inverse_config(images)
    config = dataclasses.replace(config, alignment=AlignmentConfig(**alignment))
    flow = random_flow(flow_config(images).model)
    torch.manual_seed(2)
    inverse = biflow.BiFlow(config.model)
    for head in inverse.heads:
        torch.nn.init.normal_(head[1].weight, std=0.2)
    x, y = torch.rand(12, 1, 8, 8) * 2 - 1, torch.arange(12) % 2
    x[0] = 0.0  # an even gray image: its target is smaller than the floor
    return config, flow, inverse, x, y


def plain_alignment(config, flow, inverse, x, y, seed):
    """The loss written out, term by term and sample by sample, in the order of the generator's draws."""
    generator = torch.Generator().manual_seed(seed)
    a = config.alignment
    noisy = x + flow.config.noise_std * torch.randn(x.shape, generator=generator)
    dropped = torch.rand(len(x), generator=generator) < config.label_drop
    w = config.model.max_guidance * torch.rand(len(x), generator=generator)
    w = torch.where(dropped, 0.0, w)
    z, _, states = flow.encode(noisy, y, return_states=True)
    label = torch.where(dropped, -1, y)
    clean, hidden = inverse(z, label, w, return_states=True)
    free, free_hidden = inverse(z, None, torch.zeros_like(w), return_states=True)
    total, errors = 0.0, {}
    pairs = {"output": (clean, free, patchify(x, 4))}
    pairs |= {f"state_{i}": (hidden[i], free_hidden[i], states[i]) for i in range(len(hidden))}
    for name, (h, u, target) in pairs.items():
        losses, means = [], []
        for b in range(len(x)):
            mixed = (h[b] + w[b] * u[b].detach()) / (1 + w[b])
            squares = (mixed - target[b].detach()) ** 2
            if a.normalize == "token_rms":
                squares = torch.stack(
                    [s / max((t**2).mean().item(), 0.01) for s, t in zip(squares, target[b], strict=True)]
                )
            elif a.normalize == "mean_square":
                squares = squares / max((target[b] ** 2).mean().item(), 0.01)
            means.append(squares.mean())
            adaptive = (squares.sum().item() + a.adaptive_constant) ** -a.adaptive_power
            losses.append(adaptive * squares.sum() if a.adaptive_power else squares.mean())
        total = total + (a.weight_output if name == "output" else a.weight_states) * sum(losses) / len(x)
        errors[name] = sum(means) / len(x)
    return total, errors


@pytest.mark.parametrize(
    "alignment",
    [
        {"normalize": "none"},
        {"normalize": "token_rms"},
        {"normalize": "mean_square", "weight_output": 1.5, "weight_states": 0.25},
        {"normalize": "mean_square", "adaptive_power": 1.0},
        {"normalize": "none", "adaptive_power": 0.5, "adaptive_constant": 0.1},
    ],
    ids=str,
)
def test_alignment_loss_and_its_gradient_follow_the_formula(images, alignment):
    config, flow, inverse, x, y = aligned(images, **alignment)
    config = dataclasses.replace(config, label_drop=0.3)
    loss, terms = train.alignment_loss(inverse, flow, x, y, torch.Generator().manual_seed(7), config)
    gradients = torch.autograd.grad(loss, list(inverse.parameters()))
    want, errors = plain_alignment(config, flow, inverse, x, y, 7)
    assert terms.keys() - {"norm_0", "norm_1", "norm_2"} == errors.keys() == {"output", "state_0", "state_1"}
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name, error in errors.items():
        assert terms[name].item() == pytest.approx(error.item(), rel=1e-5)
        assert not terms[name].requires_grad
    for (name, _), got, expected in zip(
        inverse.named_parameters(), gradients, torch.autograd.grad(want, list(inverse.parameters())), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * want.item(), msg=name)


def test_the_gradient_reaches_the_inverse_only_and_all_of_it(images):
    config, flow, inverse, x, y = aligned(images)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    loss, _ = train.alignment_loss(inverse, flow, x, y, torch.Generator().manual_seed(0), config)
    loss.backward()
    assert all(p.grad is None for p in flow.parameters())
    assert all(p.requires_grad for p in flow.parameters())  # the caller's flow is as it was
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    still = [name for name, p in inverse.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_without_state_terms_only_the_output_is_trained(images):
    config, flow, inverse, x, y = aligned(images, weight_states=0.0)
    loss, terms = train.alignment_loss(inverse, flow, x, y, torch.Generator().manual_seed(0), config)
    loss.backward()
    assert terms.keys() == {"output", "norm_0", "norm_1", "norm_2"}
    assert inverse.heads[0][1].weight.grad is None
    assert inverse.heads[2][1].weight.grad is not None


def test_validation_uses_no_guidance_and_every_label(images):
    config, flow, inverse, x, y = aligned(images)
    config = dataclasses.replace(config, label_drop=0.9)
    _, terms = train.alignment_loss(inverse, flow, x, y, torch.Generator().manual_seed(3), config, training=False)
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    clean = inverse(flow.encode(noisy, y)[0], y)
    target = patchify(x, 4)
    error = ((clean - target) ** 2).mean((1, 2)) / (target**2).mean((1, 2)).clamp_min(0.01)
    assert float(terms["output"]) == pytest.approx(float(error.detach().mean()), rel=1e-5)
    objective = distill.Alignment(config, flow, None)
    _, again = objective.loss(inverse, x, y, torch.Generator().manual_seed(3), training=False)
    _, trained = objective.loss(inverse, x, y, torch.Generator().manual_seed(3), training=True)
    assert again["output"] == terms["output"] != trained["output"]


def test_a_perfect_prediction_has_no_loss_and_gray_targets_stay_finite():
    target = torch.zeros(2, 3, 4)
    for normalize in ("none", "token_rms", "mean_square"):
        config = AlignmentConfig(normalize=normalize, adaptive_power=1.0)
        exact, off = (partial(distill.squared_error, prediction) for prediction in (target, target + 1))
        assert float(distill.term(exact, target, config)[0]) == 0
        assert math.isfinite(float(distill.term(off, target, config)[0]))


def test_an_inverse_learns_and_is_loadable(images, flow_run, tmp_path):
    model = train.train_inverse(
        inverse_config(images, steps=60, every=20), flow_run[2], tmp_path / "run", progress=False
    )
    logged, held_out = metrics(tmp_path / "run", "train"), metrics(tmp_path / "run", "val")
    assert {"loss", "output", "state_0", "state_1", "lr", "grad_norm", "seconds"} <= logged[0].keys()
    assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]
    assert held_out[-1]["output"] < 0.7 * held_out[0]["output"]
    assert same_weights(biflow.load(tmp_path / "run" / "model.safetensors"), model)


def test_an_inverse_without_classes_uses_the_unconditional_trajectory(images):
    config, flow, _, x, y = aligned(images)
    config = changed(config, "model", num_classes=0, max_guidance=0.0)
    inverse = biflow.BiFlow(config.model)
    losses = [
        train.alignment_loss(inverse, flow, x, labels, torch.Generator().manual_seed(0), config)[0]
        for labels in (y, None)
    ]
    assert torch.equal(*losses)


# --- the loop


def test_learning_rate_schedule():
    config = OptimConfig(steps=100, lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [optim.learning_rate(k, config) for k in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10 + 89 // 2 : 10 + 89 // 2 + 2] == pytest.approx([0.55, 0.55], abs=0.02)  # half way down the cosine
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert optim.learning_rate(0, OptimConfig(steps=1, lr=1.0, warmup_steps=0)) == 1.0


def test_average_follows_its_formula():
    model = torch.nn.Linear(2, 1)
    mean = optim.Average(model, 0.5)
    value = model.weight.detach().clone()
    for k in range(12):
        with torch.no_grad():
            model.weight.add_(1.0)
        mean.update(model, k)
        d = min(0.5, (1 + k) / (10 + k))
        value = d * value + (1 - d) * model.weight.detach()
        torch.testing.assert_close(mean.model.weight, value)
    exact = optim.Average(model, 0.0)
    with torch.no_grad():
        model.weight.mul_(3.0)
    exact.update(model, 0)
    assert torch.equal(exact.model.weight, model.weight)


def test_only_matrices_of_linear_layers_are_decayed(images):
    inverse = biflow.BiFlow(inverse_config(images).model)
    decayed, kept = optim.make_optimizer(inverse, OptimConfig(weight_decay=0.5)).param_groups
    names = {id(p): name for name, p in inverse.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    assert all(names[id(p)].endswith("weight") and p.dim() == 2 for p in decayed["params"])
    assert {"pos_embed", "class_embed", "null_class"} <= {names[id(p)] for p in kept["params"]}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_data_order_is_an_epoch_of_everything_and_a_function_of_the_step():
    order = optim.DataOrder(10, 4, seed=3)
    drawn = torch.cat([order.indices(step) for step in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    fresh = optim.DataOrder(10, 4, seed=3)
    assert torch.equal(fresh.indices(3), drawn[12:16])  # without the steps before
    assert not torch.equal(optim.DataOrder(10, 4, seed=4).indices(0), drawn[:4])
    assert len(optim.DataOrder(3, 8, seed=0).indices(1)) == 8  # a batch larger than the data


def test_gradients_are_clipped(images, tmp_path, monkeypatch):
    """The clipped norm is what the optimizer sees; the logged one is before clipping."""
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args):
        norms = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        seen.append(float(torch.stack(norms).norm()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    config = changed(flow_config(images, steps=3, every=1), "optim", grad_clip=0.01)
    train.train_flow(config, tmp_path / "run", progress=False)
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in seen)
    assert all(line["grad_norm"] > 0.02 for line in metrics(tmp_path / "run", "train"))


def test_bf16_autocast_trains_fp32_weights(images, tmp_path):
    flow = train.train_flow(flow_config(images, steps=20, precision="bf16"), tmp_path / "flow", progress=False)
    assert flow.blocks[0].proj_in.weight.dtype == torch.float32
    lines = metrics(tmp_path / "flow", "train")
    assert lines[-1]["loss"] < lines[0]["loss"]
    exact = train.train_flow(flow_config(images, steps=20), tmp_path / "exact", progress=False)
    assert not same_weights(flow, exact)
    config = inverse_config(images, steps=4, precision="bf16")
    inverse = train.train_inverse(config, flow, tmp_path / "inverse", progress=False)
    assert inverse.proj_in.weight.dtype == torch.float32


@pytest.mark.parametrize("which", ["loss", "gradient"])
def test_training_stops_at_a_loss_that_is_not_finite(which, images, tmp_path, monkeypatch):
    original, calls = likelihood.likelihood_loss, []

    def broken(flow, x, y):
        loss, z = original(flow, x, y)
        calls.append(1)
        if len(calls) == 13:  # 10 steps and a validation of one batch came before: step 12
            poison = flow.blocks[0].proj_in.bias.sum()
            loss = loss * math.inf if which == "loss" else loss + (poison - poison.detach()).abs().sqrt()
        return loss, z

    monkeypatch.setattr(likelihood, "likelihood_loss", broken)
    with pytest.raises(FloatingPointError, match=rf"step 12: {'loss' if which == 'loss' else 'grad_norm'} is"):
        train.train_flow(flow_config(images), tmp_path / "run", progress=False)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000010"]
    saved = biflow.load(tmp_path / "run/checkpoints/step_00000010/model.safetensors")
    assert all(bool(v.isfinite().all()) for v in saved.state_dict().values())
    assert not (tmp_path / "run/model.safetensors").exists()


def test_a_missing_tensorboard_is_said_in_one_line(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train.train_flow(flow_config(images, steps=2, tensorboard=True), tmp_path / "run", progress=False)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "biflow[train]" in said[0]


# --- bad input


@pytest.mark.parametrize(
    ("cls", "fields", "reason"),
    [
        (OptimConfig, {"steps": 0}, "steps: expected"),
        (OptimConfig, {"lr": 0.0}, "lr: expected"),
        (OptimConfig, {"lr": 1e-8}, "lr: expected a finite number > 0, at least min_lr"),
        (OptimConfig, {"betas": (0.9, 1.0)}, "betas: expected"),
        (OptimConfig, {"grad_clip": 0.0}, "grad_clip: expected"),
        (OptimConfig, {"ema": 1.0}, "ema: expected"),
        (OptimConfig, {"weight_decay": math.nan}, "weight_decay: expected"),
        (RunConfig, {"precision": "fp8"}, "precision: expected one of fp32, bf16"),
        (RunConfig, {"device": "abacus"}, "for which this build has kernels, got 'abacus'"),
        (RunConfig, {"device": "meta"}, "device: expected 'cpu'"),
        (RunConfig, {"keep": 0}, "keep: expected"),
        (AlignmentConfig, {"normalize": "max"}, "normalize: expected one of none, token_rms, mean_square"),
        (AlignmentConfig, {"weight_output": 0.0, "weight_states": 0.0}, "at least one of them above 0"),
        (AlignmentConfig, {"adaptive_constant": 0.0}, "adaptive_constant: expected"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_configuration_out_of_range(cls, fields, reason):
    with pytest.raises(ValueError, match=reason):
        cls(**fields)


def test_configuration_of_a_stage_out_of_range(images):
    with pytest.raises(ValueError, match="label_drop: expected a number"):
        dataclasses.replace(flow_config(images), label_drop=1.0)
    with pytest.raises(ValueError, match="label_drop: expected more than 0 with max_guidance"):
        dataclasses.replace(inverse_config(images), label_drop=0.0)
    with pytest.raises(ValueError, match="context_dim: expected 0"):
        changed(flow_config(images), "model", context_dim=4)
    values = to_mapping(inverse_config(images))
    values["alignment"]["norm"] = "none"
    with pytest.raises(ValueError, match="unknown field 'norm'"):
        from_mapping(train.InverseTraining, values)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"img_size": 12}, "expected img_size 8 and in_channels 1"),
        ({"in_channels": 3}, "expected img_size 8 and in_channels 1"),
        ({"num_classes": 3}, "num_classes: expected 2"),
    ],
    ids=str,
)
def test_model_and_data_must_fit(fields, reason, images, tmp_path):
    with pytest.raises(ValueError, match=reason):
        train.train_flow(changed(flow_config(images), "model", **fields), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_flow_and_inverse_must_fit(images, tmp_path):
    flow = random_flow(flow_config(images).model)
    for fields, reason in (
        ({"num_blocks": 3}, "num_blocks: expected 2"),
        ({"patch_size": 2}, "patch_size: expected 4"),
    ):
        with pytest.raises(ValueError, match=reason):
            train.train_inverse(changed(inverse_config(images), "model", **fields), flow, tmp_path / "run")
    with pytest.raises(TypeError, match="expected a TarFlow, got BiFlow"):
        train.train_inverse(inverse_config(images), biflow.BiFlow(inverse_config(images).model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif("cuda" not in DEVICES, reason="built without CUDA")
def test_a_device_that_this_machine_lacks(tmp_path):
    """A run from a GPU can be read anywhere, but goes on only where there is one."""
    config = dataclasses.replace(flow_config(tmp_path), run=RunConfig(device="cuda:99"))
    with pytest.raises(ValueError, match="device: expected one of this machine, got 'cuda:99': torch sees"):
        likelihood.train_flow(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
