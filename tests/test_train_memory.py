"""Activation checkpointing and torch.compile: the same gradients; less memory, one graph."""

import dataclasses
import json

import pytest
import torch
from peak_memory import peak_bytes
from tiny_training import changed, flow_config, inverse_config, random_flow, same_weights, write_images

import biflow
from biflow import train
from biflow.train import distill, likelihood
from biflow.train.memory import checkpoint_layers
from biflow.train.representation import Representation


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz")


def steps(images, autocast=False, **shape):
    """For each stage the model that is trained, the others, and its loss of a fixed batch."""
    config, inverse = flow_config(images), inverse_config(images)
    config = changed(config, "model", **shape)
    width = {k: v for k, v in shape.items() if k == "width"}
    inverse = changed(inverse, "model", **width, layers_per_group=shape.get("layers_per_block", 1))
    flow, frozen = random_flow(config.model), random_flow(config.model).eval()
    torch.manual_seed(2)
    model = biflow.BiFlow(inverse.model)
    x, y = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.arange(6) % 2

    def one():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return likelihood.likelihood_loss(flow, x, y)[0]

    def two():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return distill.alignment_loss(model, frozen, x, y, torch.Generator().manual_seed(0), inverse)[0]

    return {"flow": ([flow], one), "inverse": ([model, frozen], two)}


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


# --- activation checkpointing


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["flow", "inverse"])
def test_checkpointed_gradients_are_the_same_bits(stage, autocast, images):
    (model, *_), loss = steps(images, autocast)[stage]
    plain = gradients(model, loss)
    names = list(model.state_dict())
    checkpoint_layers(model)
    assert all(map(torch.equal, plain, gradients(model, loss)))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("stage", ["flow", "inverse"])
def test_checkpointing_needs_less_memory(stage, images):
    (model, *_), loss = steps(images, width=64, layers_per_block=4)[stage]
    gradients(model, loss)
    plain = peak_bytes(lambda: loss().backward())
    checkpoint_layers(model)
    assert peak_bytes(lambda: loss().backward()) < 0.7 * plain


@pytest.mark.parametrize(("strategy", "context"), [("forward", None), ("detach", None), ("reverse", "live")])
def test_representation_alignment_can_be_checkpointed(strategy, context, images):
    """Its passes of its own go through the same layers."""
    encoder = train.EncoderConfig(name="test_train_memory:coarse", inputs="raw")
    own = train.RepresentationConfig(
        features=((0, 0), (1, 0)), strategy=strategy, context=context, projector_width=8, encoder=encoder
    )
    config = dataclasses.replace(flow_config(images), representation=own)
    representation = Representation(config, biflow.data.load(config.data))
    representation.prepare()
    objective = likelihood.Likelihood(config, None, representation)
    flow, x = random_flow(config.model), torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def loss():
        return objective.loss(flow, x, None, torch.Generator().manual_seed(1), training=True)[0]

    plain = gradients(flow, loss)
    checkpoint_layers(flow)
    assert all(map(torch.equal, plain, gradients(flow, loss)))


def coarse():
    """An encoder: (B,1,8,8) -> (B,4,2,2)."""
    torch.manual_seed(5)
    return torch.nn.Conv2d(1, 4, 4, stride=4)


def test_a_checkpointed_run_ends_in_the_same_bits(images, tmp_path):
    plain = train.train_flow(flow_config(images, steps=6, every=3), tmp_path / "plain", progress=False)
    config = flow_config(images, steps=6, every=3, activation_checkpointing=True)
    assert same_weights(train.train_flow(config, tmp_path / "run", progress=False), plain)
    inverse = inverse_config(images, steps=4, every=2)
    want = train.train_inverse(inverse, plain, tmp_path / "inverse", progress=False)
    inverse = changed(inverse, "run", activation_checkpointing=True)
    assert same_weights(train.train_inverse(inverse, plain, tmp_path / "other", progress=False), want)


# --- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("stage", ["flow", "inverse"])
def test_a_step_is_compiled_without_breaks(stage, checkpointing, images):
    """fullgraph: an op of ours that broke the graph would raise."""
    models, loss = steps(images)[stage]
    plain = gradients(models[0], loss)
    if checkpointing:
        checkpoint_layers(models[0])
    for model in models:
        model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for got, want in zip(gradients(models[0], loss), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["flow", "inverse"])
def test_a_compiled_run_learns_the_same_and_compiles_once(stage, images, tmp_path, monkeypatch):
    """The smaller last batch of a validation is not compiled for."""
    graphs, original = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append([t.shape for t in inputs if isinstance(t, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: original(self, **how, backend=backend))
    torch._dynamo.reset()
    flow = random_flow(flow_config(images).model)
    losses = []
    for compiled in (False, True):
        out, how = tmp_path / str(compiled), {"every": 2, "steps": 4, "compile": compiled}
        if stage == "flow":
            train.train_flow(flow_config(images, **how), out, progress=False)
        else:
            train.train_inverse(inverse_config(images, **how), flow, out, progress=False)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(graphs) == (1 if stage == "flow" else 3)  # the frozen flow, the inverse with and without a condition


@pytest.mark.slow
def test_inductor_compiles_a_step(images):
    (flow,), loss = steps(images, num_blocks=1)["flow"]
    plain = gradients(flow, loss)
    flow.compile(fullgraph=True, dynamic=False)
    for got, want in zip(gradients(flow, loss), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
