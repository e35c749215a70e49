"""Representation alignment in stage one: its loss, what each strategy trains, resuming, cached features, settings."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tiny_representation
import torch
from tiny import VARIANTS, images, make_condition, make_flow
from tiny_representation import aligned, prepared
from tiny_training import changed, flow_config, same_weights, write_images

import biflow
from biflow import checkpoint, cli, train
from biflow.data import DataConfig, load
from biflow.train import EncoderConfig, FlowTraining, RepresentationConfig, likelihood, representation_loss, runs
from biflow.train.representation import Projectors, Representation

STRATEGIES = {
    "forward": {"strategy": "forward"},
    "detach": {"strategy": "detach"},
    "cached": {"strategy": "reverse", "context": "cached"},
    "live": {"strategy": "reverse"},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz")


# --- features of the encode


@pytest.mark.parametrize("name", VARIANTS)
def test_the_encode_gives_features_and_changes_no_bit(name):
    flow = make_flow(**{**VARIANTS[name], "layers_per_block": 2})
    x, (y, tokens) = images(flow), make_condition(flow, 4)
    pairs = [(0, 1), (1, 0), (1, 1)]
    z, logdet, states, found = flow.encode(x, y, tokens, return_states=True, features=pairs)
    assert all(torch.equal(a, b) for a, b in zip((z, logdet), flow.encode(x, y, tokens), strict=True))
    assert list(found) == pairs
    wanted = biflow.pseudo_reverse(flow, states, y, tokens, context="cached", features=pairs).features
    detached = biflow.models.pseudo_reverse.detached_features(flow, states, y, tokens, features=pairs)
    for pair in pairs:
        assert torch.equal(detached[pair], wanted[pair])
        torch.testing.assert_close(found[pair], wanted[pair], rtol=1e-4, atol=1e-5)


def test_features_that_are_not_there_are_refused():
    flow = make_flow()
    x = images(flow)
    with pytest.raises(ValueError, match="features: block: expected 0 to 2, got 3"):
        flow.encode(x, features=[(3, 0)])
    with pytest.raises(ValueError, match="features: layer of block 1: expected 0 to 0, got -1"):
        flow.encode(x, features=[(1, -1)])
    with torch.no_grad(), pytest.raises(ValueError, match="precision: expected None with features, got 'fp32'"):
        flow.encode(x, features=[(1, 0)], precision="fp32")


# --- the loss


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["fp32", "fp64"])
def test_loss_is_the_mean_negative_cosine(dtype, bound):
    g = torch.Generator().manual_seed(0)
    found = [torch.randn(3, 4, 5, generator=g, dtype=torch.float64) for _ in range(2)]
    targets = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    want = 0.0
    for h in found:
        for b in range(3):
            for t in range(4):
                u, v = h[b, t].numpy(), targets[b, t].numpy()
                want -= u @ v / np.sqrt((u @ u) * (v @ v)) / (2 * 3 * 4)
    got = representation_loss([h.to(dtype) for h in found], targets.to(dtype))
    assert got.dtype == dtype
    assert abs(float(got) - want) <= bound
    assert representation_loss([targets], 3 * targets) == pytest.approx(-1)
    zero = torch.zeros(1, 2, 5, requires_grad=True)
    loss = representation_loss([zero], targets[:1, :2].float())
    loss.backward()
    assert loss == 0
    assert zero.grad.isfinite().all()


def test_targets_are_directions_of_the_resized_map_without_a_gradient(pictures):
    own = prepared(pictures)
    x = load(DataConfig(source=str(pictures))).train_x.batch(torch.arange(6))
    maps = tiny_representation.maps()(x)  # (6,5,4,4) for 2x2 tokens
    maps = torch.nn.functional.interpolate(maps, (2, 2), mode="bilinear", antialias=True).double()
    want = maps.flatten(2).transpose(1, 2)
    want = want / want.norm(dim=-1, keepdim=True)
    got = own.encoder(x.requires_grad_())
    assert (got.shape, got.dtype, got.requires_grad) == ((6, 4, 5), torch.float16, False)
    assert (got.double() - want).abs().max() <= 5e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own.encoder(x), got), "the run's precision is not the encoder's"
    halved = prepared(pictures, encoder={"precision": "bf16"}).encoder(x)
    assert 0 < (halved.double() - want).abs().max() <= 2e-2


def test_the_objective_adds_the_weighted_loss(pictures):
    config = aligned(flow_config(pictures), weight=0.3)
    data = load(config.data)
    own = Representation(config, data)
    own.prepare()
    objective = likelihood.Likelihood(config, data.bin_width, own)
    flow = make_flow(img_size=8, patch_size=4, num_blocks=2, num_classes=2)
    x, y = data.train_x.batch(torch.arange(8)), data.train_y[:8]
    loss, terms = objective.loss(flow, x, y, torch.Generator().manual_seed(5), training=False)
    noisy = likelihood.add_noise(x, 0.1, data.bin_width, torch.Generator().manual_seed(5))
    nats = likelihood.likelihood_loss(flow, noisy, y)[0]
    _, _, states = flow.encode(noisy, y, return_states=True)
    cosines = []
    for block in (1, 0):
        given = states[block].flip(1) if block else states[block]
        h = flow.blocks[block].features(given, y, None, (0,))[1][0]
        projected = own.projectors.each[0](h.flip(1) if block else h)
        cosines.append(torch.nn.functional.cosine_similarity(projected, own.encoder(x).float(), dim=-1).mean())
    torch.testing.assert_close(terms["likelihood"], nats.detach(), rtol=0, atol=0)
    torch.testing.assert_close(terms["alignment"], -(cosines[0] + cosines[1]).detach() / 2)
    torch.testing.assert_close(loss, nats - 0.3 * (cosines[0] + cosines[1]) / 2)
    assert set(terms) == {"likelihood", "alignment"}
    assert all(not t.requires_grad for t in terms.values())


def test_projectors_are_three_layers_shared_or_one_each():
    h = torch.randn(2, 3, 6)
    shared, each = Projectors(6, 8, 5, 1), Projectors(6, 8, 5, 2)
    one, two = shared([h, h])
    assert torch.equal(one, two)
    linear = [m for m in shared.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(6, 8), (8, 8), (8, 5)]
    want = h
    for index, m in enumerate(linear):
        want = want @ m.weight.T + m.bias
        want = want * torch.sigmoid(want) if index < 2 else want
    torch.testing.assert_close(one, want)
    assert not torch.equal(*each([h, h]))
    assert len(each.each) == 2


@pytest.mark.parametrize(
    ("name", "reached"),
    [("forward", {0, 1}), ("detach", {1}), ("cached", {1}), ("live", {1, 2})],
)
def test_which_blocks_a_strategy_trains(name, reached, pictures):
    config = aligned(flow_config(pictures), features=((1, 0),), **STRATEGIES[name])
    config = changed(config, "model", num_blocks=3)
    data = load(config.data)
    own = Representation(config, data)
    own.prepare()
    flow = make_flow(img_size=8, patch_size=4, num_classes=2)
    x, y = data.train_x.batch(torch.arange(8)), data.train_y[:8]
    z, logdet, features = own.encode(flow, x, y)
    assert all(torch.equal(a, b) for a, b in zip((z, logdet), flow.encode(x, y), strict=True))
    own.loss(features, x).backward()
    found = {
        i
        for i, block in enumerate(flow.blocks)
        if any((p.grad is not None and p.grad.any()) for p in block.parameters())
    }
    assert found == reached
    assert all(p.grad.any() for p in own.projectors.parameters())
    assert all(p.grad is None for p in own.encoder.parameters())


def test_cached_reverse_is_detach_to_the_bit_and_live_is_not(pictures, tmp_path):
    found = {}
    for name in STRATEGIES:
        config = aligned(flow_config(pictures, steps=4), **STRATEGIES[name])
        found[name] = train.train_flow(config, tmp_path / name, progress=False)
    assert same_weights(found["cached"], found["detach"])
    for other in ("forward", "live"):
        assert not same_weights(found[other], found["detach"])


# --- runs


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A run of 20 steps with alignment and a self-supervised encoder, a checkpoint every 5, all of them kept."""
    out = tmp_path_factory.mktemp("run") / "flow"
    config = aligned(
        flow_config(pictures, steps=20, every=5, keep=10),
        {"name": "self_supervised", "inputs": None, "steps": 3},
        strategy="reverse",
        shared_projector=False,
    )
    return config, out, train.train_flow(config, out, progress=False)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_model_is_a_plain_flow_and_the_state_has_the_projectors(run):
    config, out, model = run
    saved = biflow.load(out / "model.safetensors")
    assert same_weights(saved, model)
    assert saved.config == config.model
    state = checkpoint.read(runs.checkpoints(out)[0] / "state.safetensors").tensors
    for prefix in ("", "exp_avg.", "exp_avg_sq."):
        names = [name for name in state if name.startswith(f"{prefix}objective.each.")]
        assert len(names) == 2 * 6, "weight and bias of three layers, one projector a feature"
    lines = metrics(out)
    assert all(math.isclose(m["loss"], m["likelihood"] + 0.1 * m["alignment"], rel_tol=1e-5) for m in lines)
    trained = [m["alignment"] for m in lines if m["split"] == "train"]
    assert trained[-1] < trained[0] - 0.05


def test_resuming_is_bit_for_bit(run, tmp_path):
    import shutil

    config, out, model = run
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "model.safetensors").unlink()
    for folder in runs.checkpoints(copy)[:2]:  # as a kill after step 10 leaves it
        shutil.rmtree(folder)
    resumed = train.train_flow(config, copy, resume=True, progress=False)
    assert same_weights(resumed, model)
    ends = [checkpoint.read(runs.checkpoints(folder)[0] / "state.safetensors").tensors for folder in (out, copy)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_resuming_with_something_else_is_refused(run, pictures, tmp_path, monkeypatch):
    config, out, _ = run
    with pytest.raises(ValueError, match=r"representation\.strategy = 'reverse', this configuration 'detach'"):
        train.train_flow(changed(config, "representation", strategy="detach"), out, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"representation = \{'representation\.features'.*this configuration None"):
        train.train_flow(dataclasses.replace(config, representation=None), out, resume=True, progress=False)
    plain = aligned(flow_config(pictures, steps=4, every=2))
    train.train_flow(plain, tmp_path / "run", progress=False)
    monkeypatch.setattr(tiny_representation, "OFFSET", [1.0])
    with pytest.raises(ValueError, match=r"encoder_weights_sha256 = '"):
        train.train_flow(plain, tmp_path / "run", resume=True, progress=False)


def test_the_flow_starts_and_sees_noise_as_without_alignment(pictures, tmp_path):
    """Adding alignment changes no other random number: the first step's likelihood is the baseline's, to the bit."""
    config = flow_config(pictures, steps=1, every=1)
    train.train_flow(config, tmp_path / "plain", progress=False)
    train.train_flow(aligned(config), tmp_path / "aligned", progress=False)
    plain, with_it = metrics(tmp_path / "plain")[0], metrics(tmp_path / "aligned")[0]
    assert with_it["likelihood"] == plain["loss"]
    assert "likelihood" not in plain


@pytest.mark.parametrize("name", STRATEGIES)
def test_bf16_and_shift_only_flows_train(name, pictures, tmp_path):
    config = changed(flow_config(pictures, steps=2, every=1, precision="bf16"), "model", shift_only=True)
    train.train_flow(aligned(config, **STRATEGIES[name]), tmp_path / "run", progress=False)
    assert all(math.isfinite(m["alignment"]) for m in metrics(tmp_path / "run"))


def test_latents_are_aligned_with_what_takes_latents(tmp_path):
    latents = np.random.RandomState(0).standard_normal((12, 8, 8, 4)).astype(np.float32)
    np.savez(tmp_path / "latents.npz", images=latents)
    config = changed(flow_config(tmp_path / "latents.npz", steps=2, every=1), "model", in_channels=4, num_classes=0)
    for name in ("self_supervised", "tiny_representation:latents"):
        own = {"name": name, "steps": 2, "inputs": None} if name == "self_supervised" else {"name": name}
        train.train_flow(aligned(config, own), tmp_path / name.rpartition(":")[2], progress=False)
    with pytest.raises(ValueError, match="got latents of 4: self_supervised takes them as they are"):
        train.train_flow(aligned(config, {"inputs": "imagenet"}), tmp_path / "pixels", progress=False)


# --- cached features


def test_cached_features_change_no_bit(pictures, tmp_path, capfd):
    """With flips; 54 images are no multiple of the batch of 16."""
    config = aligned(flow_config(pictures, steps=12, every=6))
    want = train.train_flow(config, tmp_path / "plain", progress=False)
    cached = changed(config, "representation", cache_features=True)
    assert same_weights(train.train_flow(cached, tmp_path / "cached", progress=False), want)
    files = sorted((tmp_path / "cached" / "features").iterdir())
    assert [np.load(file).shape for file in files] == [(54, 4, 5)] * 2  # as they are, and mirrored
    assert metrics(tmp_path / "cached")[-1]["loss"] == metrics(tmp_path / "plain")[-1]["loss"]
    assert "writing the encoder's features of 54 images" in capfd.readouterr().out
    # a folder for several runs: written once, by the first; a run may go on with or without it
    shared = changed(config, "representation", cache_features=str(tmp_path / "shared"))
    train.train_flow(shared, tmp_path / "first", progress=False)
    assert "writing" in capfd.readouterr().out
    assert same_weights(train.train_flow(shared, tmp_path / "second", progress=False), want)
    assert "writing" not in capfd.readouterr().out
    assert same_weights(train.train_flow(config, tmp_path / "second", resume=True, progress=False), want)


def test_a_stale_or_damaged_cache_is_not_read(pictures, tmp_path, capfd, monkeypatch):
    folder = str(tmp_path / "features")
    first = prepared(pictures, cache_features=folder)
    damaged = first.cache.paths[1]
    kept = damaged.read_bytes()
    rows = torch.arange(2 * 54)
    want = first.cache(rows)
    damaged.write_bytes(kept[:-2])
    again = prepared(pictures, cache_features=folder)
    assert "damaged" in capfd.readouterr().out
    assert damaged.read_bytes() == kept
    assert torch.equal(again.cache(rows), want)
    monkeypatch.setattr(tiny_representation, "OFFSET", [1.0])
    other = prepared(pictures, cache_features=folder)
    assert other.cache.paths != first.cache.paths
    assert not torch.equal(other.cache(rows), want)
    with np.load(pictures) as arrays:
        np.savez(tmp_path / "images.npz", images=255 - arrays["images"], labels=arrays["labels"])
    assert prepared(tmp_path / "images.npz", cache_features=folder).cache.paths != other.cache.paths


def test_a_killed_write_loses_a_part_at_most(pictures, tmp_path, monkeypatch, capfd):
    """With files of 20 images, for 54 images and as many mirrored, in batches of 16."""
    from biflow.train import feature_cache
    from biflow.train.encoders import Encoder

    calls, forward = [], Encoder.forward

    def fail(self, x):
        calls.append(len(x))
        if len(calls) == 6:  # one for the shape, then those of images 0 ... 53, then of the first mirrored ones
            raise KeyboardInterrupt
        return forward(self, x)

    want = prepared(pictures, cache_features=str(tmp_path / "whole")).cache
    monkeypatch.setattr(feature_cache, "PART", 20)
    monkeypatch.setattr(Encoder, "forward", fail)
    folder = tmp_path / "features"
    with pytest.raises(KeyboardInterrupt):
        prepared(pictures, cache_features=str(folder))
    assert [len(np.load(file)) for file in sorted(folder.iterdir())] == [20, 20, 14]
    assert "in 6 of 6 files" in capfd.readouterr().out
    found = prepared(pictures, cache_features=str(folder)).cache
    assert "in 3 of 6 files" in capfd.readouterr().out
    assert calls == [16] * (6 + 1 + 4)
    rows = torch.randperm(2 * 54, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(rows), want(rows))


# --- settings


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"features": ()}, r"features: expected at least one \(block, layer\), got none"),
        ({"features": ((2, 0),)}, r"features: expected blocks below 2, got \(2, 0\)"),
        ({"features": ((0, -2),)}, r"features: expected layers of block 0 below 1, got \(0, -2\)"),
        ({"features": ((1, 0), (-1, -1))}, r"expected each \(block, layer\) once, got \[\(1, 0\), \(1, 0\)\]"),
        ({"strategy": "backward"}, "strategy: expected one of forward, detach, reverse, got 'backward'"),
        ({"context": "live"}, r"context: expected None with strategy 'detach' \(for reverse\), got 'live'"),
        ({"strategy": "reverse", "context": "dead"}, "context: expected one of cached, live, got 'dead'"),
        ({"weight": 0.0}, "weight: expected a finite number > 0, got 0"),
        ({"projector_width": 0}, "projector_width: expected a finite number of at least 1"),
        ({"cache_features": ""}, "cache_features: expected true, false or a folder"),
    ],
)
def test_bad_settings(fields, reason, pictures):
    with pytest.raises(ValueError, match=reason):
        aligned(flow_config(pictures), **fields)


def test_settings_on_the_command_line(pictures, tmp_path, capsys):
    words = ["train", "digits_flow", f"data.source={pictures}", "model.width=16", "model.head_dim=8", "--quiet"]
    words += ["model.num_classes=2", "model.patch_size=4", "optim.steps=1", "run.tensorboard=false", "run.threads=1"]
    own = "representation={features: [[-1, -1], [-2, 1]], strategy: forward, projector_width: 8, encoder: {steps: 2}}"
    assert cli.main([*words, own, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "encoder.safetensors").exists()
    assert cli.main([*words, own, "representation.encoder.name=vgg", "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "representation.encoder: name: expected one of dinov2, self_supervised, or 'package.module:function'" in said


def test_pairs_count_from_the_end():
    model = biflow.TarFlowConfig(
        img_size=8, in_channels=1, width=16, head_dim=8, num_blocks=3, layers_per_block=(1, 2, 4)
    )
    own = RepresentationConfig(features=((-1, -2), (1, -1), (0, 0)))
    assert own.pairs(model) == ((2, 2), (1, 1), (0, 0))
    assert FlowTraining(model=model, representation=own).representation.encoder == EncoderConfig()
