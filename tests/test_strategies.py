"""The ingredients of stage two, each switched: strategies, learned denoising, norm control, guidance draws."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from tiny import make_reverse
from tiny_training import changed, flow_config, inverse_config, random_flow, same_weights, write_images

import biflow
from biflow import checkpoint, cli, evaluate, train
from biflow.config import to_mapping
from biflow.data import load
from biflow.evaluate import EvaluationConfig, RealData, plots
from biflow.models.layers import patchify
from biflow.train import AlignmentConfig, distill, runs

GUIDED = {"num_classes": 3, "class_tokens": 2, "max_guidance": 3.0}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz")


def noise(batch=3):
    return torch.randn(batch, 4, 4, generator=torch.Generator().manual_seed(0))


def prepared(images, model=None, **alignment):
    """(config, flow, inverse, x, y) with heads that are not at their zero initialisation; no label is dropped."""
    config = changed(inverse_config(images), "model", max_guidance=0.0)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **(model or {})),
        alignment=AlignmentConfig(**alignment),
        label_drop=0.0,
    )
    flow = random_flow(flow_config(images).model)
    torch.manual_seed(2)
    inverse = biflow.BiFlow(config.model)
    for head in inverse.heads:
        torch.nn.init.normal_(head[1].weight, std=0.2)
    return config, flow, inverse, torch.rand(12, 1, 8, 8) * 2 - 1, torch.arange(12) % 2


def trajectory(flow, x, y, seed):
    """The states as `alignment_loss` draws them from that seed."""
    noisy = x + flow.config.noise_std * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return flow.encode(noisy, y, return_states=True)[2]


def loss_of(config, flow, inverse, x, y, seed=7):
    return train.alignment_loss(inverse, flow, x, y, torch.Generator().manual_seed(seed), config)


def relative_square(prediction, target):
    """What `term` computes with normalize="mean_square"."""
    square = (target**2).mean((1, 2), keepdim=True).clamp_min(0.01)
    return ((prediction - target) ** 2 / square).mean()


# --- strategies


def test_the_naive_strategy_is_the_outputs_term_alone(images):
    config, flow, inverse, x, y = prepared(images, strategy="naive", weight_output=1.5)
    loss, terms = loss_of(config, flow, inverse, x, y)
    z = trajectory(flow, x, y, 7)[-1]
    assert loss.item() == pytest.approx(1.5 * relative_square(inverse(z, y), patchify(x, 4)).item(), rel=1e-5)
    assert terms.keys() == {"output", "norm_0", "norm_1", "norm_2"}
    loss.backward()
    assert [head[1].weight.grad is None for head in inverse.heads] == [True, True, False]


@pytest.mark.parametrize("weights", [0.25, (0.25, 2.0), (0.0, 3.0)], ids=str)
def test_each_state_has_its_weight(images, weights):
    config, flow, inverse, x, y = prepared(images, weight_output=0.5, weight_states=weights)
    loss, terms = loss_of(config, flow, inverse, x, y)
    states = trajectory(flow, x, y, 7)
    output, hidden = inverse(states[-1], y, return_states=True)
    errors = [relative_square(h, state).item() for h, state in zip(hidden, states[:-1], strict=True)]
    assert abs(errors[0] - errors[1]) > 0.02  # weights in another order would show
    first, second = weights if isinstance(weights, tuple) else (weights, weights)
    want = 0.5 * relative_square(output, patchify(x, 4)).item() + first * errors[0] + second * errors[1]
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert [terms["state_0"].item(), terms["state_1"].item()] == pytest.approx(errors, rel=1e-5)


def chained(rev, z, y, w):
    """Hidden distillation written out: G as a chain of maps from one state to the next and nothing else beside them."""
    x, states = z, []
    for k in range(len(rev.groups)):
        single = make_reverse(**GUIDED, num_blocks=1, learned_denoising=False)
        weights = {name: value for name, value in rev.state_dict().items() if not name.startswith(("groups", "heads"))}
        for part in ("groups", "heads"):
            prefix = f"{part}.{k}."
            weights |= {f"{part}.0.{n[len(prefix) :]}": v for n, v in rev.state_dict().items() if n.startswith(prefix)}
        single.load_state_dict(weights)
        x = single(x, y, w)
        states.append(x)
    return states


def test_hidden_distillation_is_a_chain_of_maps_between_states():
    rev = make_reverse(**GUIDED, reembed_states=True)
    y, w = torch.tensor([0, -1, 2]), torch.tensor([1.0, 0.0, 2.0])
    output, states = rev(noise(), y, w, return_states=True)
    want = chained(rev, noise(), y, w)
    torch.testing.assert_close([*states[::-1], output], want)
    torch.testing.assert_close(rev(noise(), y, w), want[-1])  # also where nobody asks for the states
    free = make_reverse(**GUIDED)
    free.load_state_dict(rev.state_dict())  # the same weights
    other, others = free(noise(), y, w, return_states=True)
    torch.testing.assert_close(others[-1], states[-1])  # after the first group nothing was embedded anew
    assert not torch.allclose(other, output, atol=1e-3)


def test_hidden_distillation_forces_the_path_through_its_states(images):
    """A group's work reaches the output only by its head: with the heads at zero the output no longer sees z."""
    _, flow, inverse, x, y = prepared(images, {"reembed_states": True}, strategy="hidden_distillation")
    z = trajectory(flow, x, y, 7)[-1]
    with torch.no_grad():
        seen = inverse(z, y)
        assert not torch.allclose(seen, inverse(-z, y), atol=1e-3)
        inverse.heads[0][1].weight.zero_()
        assert torch.equal(inverse(z, y), inverse(-z, y))


@pytest.mark.parametrize("strategy", train.STRATEGIES)
def test_every_strategy_learns_and_is_loadable(strategy, images, tmp_path):
    config = inverse_config(images, steps=40, every=40, validate_every=2)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, reembed_states=strategy == "hidden_distillation"),
        alignment=AlignmentConfig(strategy=strategy),
    )
    flow = random_flow(flow_config(images).model)
    model = train.train_inverse(config, flow, tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if line["split"] == "val"]
    assert held_out[-1]["output"] < 0.5 * held_out[0]["output"]
    assert {"norm_0", "norm_1", "norm_2"} <= held_out[0].keys() & lines[0].keys()
    assert same_weights(biflow.load(tmp_path / "run" / "model.safetensors"), model)


# --- learned denoising


def test_without_learned_denoising_the_output_is_the_noisy_state(images):
    config, flow, inverse, x, y = prepared(
        images, {"learned_denoising": False}, weight_output=1.5, weight_states=(0.25,)
    )
    assert (len(inverse.groups), len(inverse.heads)) == (2, 2)
    loss, terms = loss_of(config, flow, inverse, x, y)
    states = trajectory(flow, x, y, 7)
    output, hidden = inverse(states[-1], y, return_states=True)
    assert len(hidden) == 2
    assert torch.equal(hidden[0], output)
    want = 1.5 * relative_square(output, states[0]) + 0.25 * relative_square(hidden[1], states[1])
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert terms.keys() == {"output", "state_1", "norm_0", "norm_1", "norm_2"}
    loss.backward()
    still = [name for name, p in inverse.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == ["null_class"]  # of no use where no label is dropped


def test_evaluation_denoises_what_is_not_clean(images):
    real = RealData.of(load(inverse_config(images).data), EvaluationConfig(judge_steps=5))
    shape = {"img_size": 8, "in_channels": 1, "patch_size": 4, "width": 16, "head_dim": 8, "num_blocks": 2}
    noisy, clean = (make_reverse(**shape, num_classes=2, learned_denoising=learned) for learned in (False, True))
    flow = random_flow(flow_config(images).model)
    config = EvaluationConfig(samples=12, guidances=(0.0,))
    z, y = evaluate.noise(flow, config)
    plain = noisy.decode(z, y)
    got = evaluate.decode_learned(noisy, flow, z, y, 0.0, config)
    torch.testing.assert_close(got, flow.denoise(plain, y))
    assert (got - plain).abs().max() > 1e-3
    off = dataclasses.replace(config, denoise=False)
    assert torch.equal(evaluate.decode_learned(noisy, flow, z, y, 0.0, off), plain)
    assert torch.equal(evaluate.decode_exact(flow, z, y, 0.0, off), flow.decode(z, y))
    assert torch.equal(evaluate.decode_learned(clean, flow, z, y, 0.0, config), clean.decode(z, y))
    reports = [evaluate.evaluate_inverse(m, flow, real, c) for m, c in ((noisy, config), (noisy, off), (clean, config))]
    assert [r["denoising"] for r in reports] == ["score", "none", "learned"]
    assert reports[0]["reconstruction_mse"] != reports[1]["reconstruction_mse"]
    exact, learned = plots.trajectories(flow, noisy, z, y, 0.0)
    assert len(exact) == len(learned) == 4
    torch.testing.assert_close(learned[-2:], [plain, got])


def test_the_time_of_a_noisy_inverse_has_the_score_step(images, monkeypatch):
    flow, steps = random_flow(flow_config(images).model), []
    monkeypatch.setattr(type(flow), "denoise", lambda self, x, y=None: steps.append(len(x)) or x)
    shape = {"img_size": 8, "in_channels": 1, "patch_size": 4, "width": 16, "head_dim": 8, "num_blocks": 2}
    counts = []
    for learned in (True, False):
        rev = make_reverse(**shape, num_classes=2, learned_denoising=learned)
        evaluate.time_decoders(rev, flow, guidance=0.0, batches=(3,), repetitions=1)
        counts.append(len(steps))
        steps.clear()
    assert counts == [4, 6]  # two exact ways, and the learned one, each warmed up and timed once


# --- norm control


@pytest.mark.parametrize("kind", ["token_rms", "global"])
def test_states_are_normalised_before_they_are_targets(images, kind):
    config, flow, inverse, x, y = prepared(images, normalize="none", normalize_targets=kind)
    loss, _ = loss_of(config, flow, inverse, x, y)
    states = trajectory(flow, x, y, 7)
    output, hidden = inverse(states[-1], y, return_states=True)
    total = 2.0 * ((output - patchify(x, 4)) ** 2).mean()  # of the output as it is
    for h, state in zip(hidden, states[:-1], strict=True):
        rows = []
        for sample in state:
            size = sample.pow(2).mean().sqrt() if kind == "global" else sample.pow(2).mean(1, keepdim=True).sqrt()
            rows.append(sample / size)
        target = torch.stack(rows)
        torch.testing.assert_close(target.square().mean((1, 2)), torch.ones(12))
        assert not torch.allclose(target, state, atol=1e-2)
        total = total + 0.5 * ((h - target) ** 2).mean()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_an_even_gray_state_is_not_blown_up():
    state = torch.full((2, 3, 4), 1e-3)
    for kind in ("token_rms", "global"):
        assert float(distill.normalized(state, kind).max()) == pytest.approx(1e-2)
        assert float(distill.normalized(0 * state, kind).abs().max()) == 0
    assert distill.normalized(state, "none") is state


def test_norms_of_the_trajectory_are_logged_and_a_clip_bounds_them(images):
    bounded = []
    for clip in (None, ("hard", 0.1)):
        config, _, inverse, x, y = prepared(images)
        flow = random_flow(dataclasses.replace(flow_config(images).model, clip=clip))
        for block in flow.blocks:
            torch.nn.init.normal_(block.proj_out.weight, std=1.0)
        _, terms = loss_of(config, flow, inverse, x, y)
        for i, state in enumerate(trajectory(flow, x, y, 7)):
            want = sum(float(sample.detach().norm()) for sample in state) / len(state) / math.sqrt(state[0].numel())
            assert terms[f"norm_{i}"].item() == pytest.approx(want, rel=1e-5)
        # z = (x - shift) exp(-log_scale), both at most 0.1 in size
        bounded.append(all(terms[f"norm_{i + 1}"] <= (terms[f"norm_{i}"] + 0.1) * math.exp(0.1) for i in range(2)))
    assert bounded == [False, True]


# --- guidance


@pytest.mark.parametrize("draw", train.GUIDANCE_DRAWS)
def test_guidance_strengths_have_their_distribution(draw):
    """Kolmogorov-Smirnov: 20,000 draws lie within 0.0115 of the distribution function with probability 0.99."""
    w = distill.draw_guidance(20_000, 7.0, draw, torch.Generator().manual_seed(0)).double().sort().values
    assert 0 <= float(w[0]) <= float(w[-1]) <= 7
    exact = {"uniform": w / 7, "log_uniform": torch.log1p(w) / math.log(8)}
    steps = torch.arange(1, len(w) + 1) / len(w)
    distance = {name: float((cdf - steps).abs().max()) for name, cdf in exact.items()}
    assert distance.pop(draw) < 0.0115
    assert min(distance.values()) > 0.1  # and not of the other


def test_the_drawn_strengths_are_what_the_model_is_trained_with(images, monkeypatch):
    config, flow, inverse, x, y = prepared(images)
    config = changed(dataclasses.replace(config, label_drop=0.4), "model", max_guidance=3.0)
    inverse, seen = biflow.BiFlow(config.model), []
    original = type(inverse).forward
    monkeypatch.setattr(
        type(inverse),
        "forward",
        lambda self, z, y=None, w=None, **o: seen.append((y, w)) or original(self, z, y, w, **o),
    )
    strengths = {}
    for draw in train.GUIDANCE_DRAWS:
        loss_of(dataclasses.replace(config, guidance_draw=draw), flow, inverse, x, y)
        (label, strengths[draw]), (none, free) = seen[-2:]
        assert none is free is None
        assert bool((strengths[draw][label < 0] == 0).all())
        assert bool((label < 0).any())
    uniform, log_uniform = strengths["uniform"], strengths["log_uniform"]
    torch.testing.assert_close(torch.log1p(log_uniform), uniform / 3 * math.log(4))  # of the same u


# --- configurations and files of before


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"strategy": "aligned"},
            "strategy: expected one of naive, hidden_distillation, hidden_alignment, got 'aligned'",
        ),
        ({"normalize_targets": "rms"}, "normalize_targets: expected one of none, token_rms, global, got 'rms'"),
        ({"weight_states": (1.0, -1.0)}, "weight_states: expected finite numbers of at least 0"),
        ({"weight_states": math.inf}, "weight_states: expected finite numbers of at least 0, got inf"),
        ({"weight_output": 0.0, "weight_states": (0.0, 0.0)}, "at least one of them above 0"),
        ({"strategy": "naive", "weight_output": 0.0}, "weight_output: expected more than 0 with the naive strategy"),
    ],
    ids=str,
)
def test_alignment_out_of_range(fields, reason):
    with pytest.raises(ValueError, match=reason):
        AlignmentConfig(**fields)


def test_what_does_not_go_together_is_refused(images):
    config = inverse_config(images)
    with pytest.raises(ValueError, match="guidance_draw: expected one of uniform, log_uniform, got 'normal'"):
        dataclasses.replace(config, guidance_draw="normal")
    with pytest.raises(
        ValueError, match=r"reembed_states: expected True with alignment.strategy 'hidden_distillation'"
    ):
        changed(config, "alignment", strategy="hidden_distillation")
    with pytest.raises(ValueError, match=r"reembed_states: expected False with alignment.strategy 'hidden_alignment'"):
        changed(config, "model", reembed_states=True)
    with pytest.raises(ValueError, match=r"weight_states: expected one number, or 2 \(states x_0 to x_1\), got 3"):
        changed(config, "alignment", weight_states=(1.0, 1.0, 1.0))
    config = changed(config, "model", learned_denoising=False)
    with pytest.raises(ValueError, match=r"weight_states: expected one number, or 1 \(states x_1 to x_1\), got 2"):
        changed(config, "alignment", weight_states=(1.0, 1.0))


NEW = {"model": ("learned_denoising", "reembed_states"), "alignment": ("strategy", "normalize_targets")}


def test_a_model_file_from_before_these_options_loads(tmp_path):
    rev = make_reverse(**GUIDED)
    config = to_mapping(rev.config)
    for name in NEW["model"]:
        del config[name]
    checkpoint.write(tmp_path / "old.safetensors", "BiFlow", rev.state_dict(), config, {})
    old = biflow.load(tmp_path / "old.safetensors")
    assert old.config == rev.config
    y = torch.tensor([0, 1, 2])
    assert torch.equal(old.decode(noise(), y, guidance=1.0), rev.decode(noise(), y, guidance=1.0))


def test_a_run_from_before_these_options_resumes(images, tmp_path, monkeypatch):
    """Its files lack the new fields; it may be resumed with their defaults, and with nothing else."""
    config = inverse_config(images, steps=20)
    flow = random_flow(flow_config(images).model)
    whole = train.train_inverse(config, flow, tmp_path / "whole", progress=False)

    def without(mapping):
        newer = ("guidance_draw", "parallel")
        mapping = {k: dict(v) if isinstance(v, dict) else v for k, v in mapping.items() if k not in newer}
        for group, names in NEW.items():
            for name in names:
                del mapping[group][name]
        return mapping

    out = tmp_path / "old"
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "to_mapping", lambda c: without(to_mapping(c)) if hasattr(c, "run") else to_mapping(c)
        )
        train.train_inverse(config, flow, out, progress=False)
    (out / "model.safetensors").unlink()
    for folder in runs.checkpoints(out)[:1]:
        assert folder.name == "step_00000020"
        folder.rename(tmp_path / "gone")
    assert "strategy" not in (out / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"alignment.strategy = 'hidden_alignment', this configuration 'naive'"):
        train.train_inverse(changed(config, "alignment", strategy="naive"), flow, out, resume=True, progress=False)
    assert same_weights(train.train_inverse(config, flow, out, resume=True, progress=False), whole)


# --- commands


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    """Model files of a flow with noise, one without, and inverses with and without learned denoising."""
    folder = tmp_path_factory.mktemp("models")
    config = flow_config(images).model
    biflow.save(random_flow(config), folder / "flow.safetensors")
    biflow.save(random_flow(dataclasses.replace(config, noise_std=0.0)), folder / "exact.safetensors")
    shape = {"img_size": 8, "in_channels": 1, "patch_size": 4, "width": 16, "head_dim": 8, "num_blocks": 2}
    for name, learned in (("clean", True), ("noisy", False)):
        rev = make_reverse(std=0.05, **shape, num_classes=2, learned_denoising=learned)
        biflow.save(rev, folder / f"{name}.safetensors")
    return folder


def test_sample_takes_the_score_of_the_flow_that_is_named(files, tmp_path):
    drawn = {}
    for name, options in {"noisy": [], "denoised": ["--flow", f"{files}/flow.safetensors"]}.items():
        out = tmp_path / f"{name}.npz"
        words = ["sample", f"{files}/noisy.safetensors", "--n", "6", "--guidance", "0", "--out", str(out), *options]
        assert cli.main(words) == 0
        drawn[name] = torch.from_numpy(np.load(out)["images"]).permute(0, 3, 1, 2)
    assert drawn["noisy"].abs().max() < 0.9  # so that nothing was clamped
    want = biflow.load(files / "flow.safetensors").denoise(drawn["noisy"], torch.arange(6) % 2)
    assert (want - drawn["noisy"]).abs().max() > 1e-3
    torch.testing.assert_close(drawn["denoised"], want.clamp(-1, 1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("clean.safetensors --flow {}/flow.safetensors", "without learned denoising, got learned denoising"),
        ("flow.safetensors --flow {}/flow.safetensors", "got a flow, which has its own score"),
        ("noisy.safetensors --flow {}/exact.safetensors", "expected a flow trained with noise"),
        ("noisy.safetensors --flow {}/clean.safetensors", "expected a TarFlow, got a BiFlow"),
        ("noisy.safetensors --no-denoise", "--no-denoise: expected with an exact flow"),
    ],
)
def test_sample_refuses_a_flow_of_no_use(line, message, files, capsys):
    words = f"sample {files}/{line.format(files)} --out {files}/never.npz".split()
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_evaluate_says_how_outputs_became_clean(files, images, capsys, monkeypatch):
    short = functools.partial(EvaluationConfig, judge_steps=5)
    short.guidances = EvaluationConfig.guidances
    monkeypatch.setattr(evaluate, "EvaluationConfig", short)
    words = ["evaluate", f"{files}/noisy.safetensors", "--flow", f"{files}/flow.safetensors", "--data", str(images)]
    found = []
    for options in ([], ["--no-denoise"]):
        assert cli.main([*words, "--samples", "12", "--guidance", "0", *options]) == 0
        report = json.loads(capsys.readouterr().out)
        found.append((report["exact"]["denoising"], report["learned"]["denoising"]))
    assert found == [("score", "score"), ("none", "none")]
