"""Perceptual terms: values, crops, what has a gradient, the classifier of a run, resuming, messages."""

import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import kill_resume
import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_perceptual import CONVOLUTIONS, PAIR, convolutions, pictures, prepared, rng, with_terms
from tiny_training import flow_config, inverse_config, random_flow, same_weights, write_images

import biflow
from biflow import checkpoint, train
from biflow.config import from_mapping, to_mapping
from biflow.data import load
from biflow.train import AlignmentConfig, InverseTraining, Perceptual, PerceptualConfig, backbones, perceptual, runs

OFF, ADAPTIVE = AlignmentConfig(), AlignmentConfig(adaptive_power=0.75, adaptive_constant=0.02)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz", count=120)


# --- the distance


def test_distance_of_features_by_hand():
    """Two layers in fp64: one of two positions, one of vectors."""
    a = torch.tensor([[[3.0, 0.0], [4.0, 2.0]]], dtype=torch.float64)  # (1,2,2): columns are positions
    b = torch.tensor([[[0.0, 5.0], [1.0, 0.0]]], dtype=torch.float64)
    u, v = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    first = ((0.6 - 0) ** 2 + (0.8 - 1) ** 2 + (0 - 1) ** 2 + (1 - 0) ** 2) / 2
    second = 0 + (2 / math.sqrt(2)) ** 2
    got = perceptual.feature_distance([a, u], [b, v])
    assert got.item() == pytest.approx((first + second) / 2, rel=1e-9)
    weights = [torch.tensor([2.0, 0.5], dtype=torch.float64), torch.tensor([0.0, 3.0], dtype=torch.float64)]
    first = (2 * 0.36 + 0.5 * 0.04 + 2 * 1 + 0.5 * 1) / 2
    assert perceptual.feature_distance([a, u], [b, v], weights).item() == pytest.approx(first + 3 * 2, rel=1e-9)
    assert perceptual.feature_distance([3 * a], [0.5 * a]).item() == pytest.approx(0, abs=1e-9)  # directions


def test_distance_without_any_feature_has_a_finite_gradient():
    a = torch.zeros(2, 3, 4, requires_grad=True)
    perceptual.feature_distance([a], [torch.ones(2, 3, 4)]).sum().backward()
    assert bool(a.grad.isfinite().all())


@pytest.mark.parametrize("alignment", [OFF, ADAPTIVE], ids=["plain", "adaptive"])
@pytest.mark.parametrize("channels", [1, 3])
def test_loss_is_the_formula_written_out(channels, alignment):
    """The named module `pair` on ImageNet's normalisation, in fp64, beside a second term on the raw image."""
    config = SimpleNamespace(
        perceptual=(
            PerceptualConfig(backbone=PAIR, weight=0.4),
            PerceptualConfig(backbone=PAIR, weight=2.5, name="raw", inputs="raw"),
        )[: channels // 2 + 1],  # the module multiplies by three channels: gray images only as RGB
        run=SimpleNamespace(seed=0, torch_device=lambda: torch.device("cpu")),
    )
    terms = Perceptual(config, SimpleNamespace(channels=channels, img_size=8, num_classes=0, train_y=None))
    terms.prepare()
    for backbone in terms.backbones:
        backbone.double()
    x, y = pictures(channels=channels, dtype=torch.float64)
    loss, errors = terms.loss(x, y, rng(), alignment)

    def features(image, raw):
        image = image.repeat(1, 3 // channels, 1, 1)
        if not raw:
            mean, std = (torch.tensor(t).double().view(3, 1, 1) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            image = (image / 2 + 0.5 - mean) / std
        maps = image * torch.tensor([1.0, 2.0, -1.0]).double().view(3, 1, 1)
        return maps, maps.mean((2, 3))

    want = 0
    for term in config.perceptual:
        parts = []
        for f, g in zip(features(x, term.name == "raw"), features(y, term.name == "raw"), strict=True):
            parts.append((F.normalize(f, dim=1) - F.normalize(g, dim=1)).square().sum(1).reshape(4, -1).mean(1))
        d = (parts[0] + parts[1]) / 2
        p, c = alignment.adaptive_power, alignment.adaptive_constant
        want = want + term.weight * (d / (d + c) ** p).mean()
        assert errors[f"perceptual_{term.label}"].item() == pytest.approx(d.mean().item(), rel=1e-6)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)  # ImageNet's constants are kept in fp32


def test_the_adaptive_weight_has_no_gradient(images):
    terms = prepared(images, {"backbone": CONVOLUTIONS})
    x, y = pictures(count=1)
    gradients = []
    for alignment in (OFF, ADAPTIVE):
        x = x.detach().requires_grad_()
        loss, errors = terms.loss(x, y, rng(), alignment)
        loss.backward()
        gradients.append(x.grad)
    weight = (errors["perceptual_convolutions"] + 0.02) ** -0.75
    torch.testing.assert_close(gradients[1], weight * gradients[0])


# --- crops


def test_crops_are_paired_and_follow_from_the_generator(images):
    """Equal images are at distance 0 whatever the crop; the same seed gives the same crops, another one others."""
    terms = prepared(images, {"backbone": CONVOLUTIONS, "crop": 8})
    x, y = pictures()
    assert terms.loss(x, x.clone(), rng(), OFF)[0] == 0
    values = [terms.loss(x, y, rng(seed), OFF)[0].item() for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    whole = prepared(images, {"backbone": CONVOLUTIONS, "crop": 8, "crop_scale": (1, 1), "crop_ratio": (1, 1)})
    without = prepared(images, {"backbone": CONVOLUTIONS})
    assert whole.loss(x, y, rng(), OFF)[0].item() == pytest.approx(without.loss(x, y, rng(), OFF)[0].item(), rel=1e-5)


def test_without_crops_the_generator_is_left_alone(images):
    generator = rng()
    prepared(images, {"backbone": CONVOLUTIONS}).loss(*pictures(), generator, OFF)
    assert torch.equal(generator.get_state(), rng().get_state())


# --- in the loss of stage two


def test_only_the_prediction_has_a_gradient(images):
    terms = prepared(images, {"backbone": CONVOLUTIONS, "crop": 8}, {"backbone": "classifier", "steps": 2})
    x, y = (t.requires_grad_() for t in pictures())
    terms.loss(x, y, rng(), OFF)[0].backward()
    assert bool((x.grad != 0).any())
    assert y.grad is None
    for backbone in terms.backbones:
        assert not backbone.training
        assert not any(part.training for part in backbone.modules())
        assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("denoising", [True, False], ids=["clean", "x_0"])
def test_the_term_is_of_the_guided_output_as_an_image(images, denoising):
    whole = {"crop": 8, "crop_scale": (1, 1), "crop_ratio": (1, 1)}  # draws boxes that change nothing
    config = with_terms(inverse_config(images), {"backbone": CONVOLUTIONS, "weight": 0.7, **whole})
    model = dataclasses.replace(config.model, learned_denoising=denoising)
    config = dataclasses.replace(config, model=model)
    flow = random_flow(flow_config(images).model)
    inverse = biflow.BiFlow(model)
    for head in inverse.heads:
        torch.nn.init.normal_(head[1].weight, std=0.2)
    x, y = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6) % 2
    terms = Perceptual(config, load(config.data))
    terms.prepare()
    plain = dataclasses.replace(config, perceptual=())
    without, before = train.alignment_loss(inverse, flow, x, y, rng(), plain)
    loss, errors = train.alignment_loss(inverse, flow, x, y, rng(), config, perceptual=terms)
    assert errors.keys() - before.keys() == {"perceptual_convolutions"}
    assert all(torch.equal(errors[name], value) for name, value in before.items())  # draws come after the others

    generator = rng()  # the same draws, written out
    noisy = x + 0.1 * torch.randn(x.shape, generator=generator)
    label = torch.where(torch.rand(6, generator=generator) < 0.1, -1, y)
    w = torch.where(label < 0, 0.0, 2 * torch.rand(6, generator=generator)).view(-1, 1, 1)
    z = flow.encode(noisy, y)[0]
    guided = (inverse(z, label, w.flatten()) + w * inverse(z)) / (1 + w)
    image = guided.view(6, 2, 2, 4, 4).permute(0, 1, 3, 2, 4).reshape(6, 1, 8, 8)
    backbone = terms.backbones[0]
    want = perceptual.feature_distance(backbone(image), backbone(x if denoising else noisy)).mean()
    assert errors["perceptual_convolutions"].item() == pytest.approx(want.item(), rel=1e-4)
    assert (loss - without).item() == pytest.approx(0.7 * want.item(), rel=1e-3)
    with pytest.raises(ValueError, match=r"expected the prepared terms of config\.perceptual, got None"):
        train.alignment_loss(inverse, flow, x, y, rng(), config)
    with pytest.raises(RuntimeError, match=r"expected prepare\(\) to be called before loss\(\)"):
        train.alignment_loss(inverse, flow, x, y, rng(), config, perceptual=Perceptual(config, load(config.data)))


def test_bf16_runs_have_finite_terms_in_fp32(images):
    terms = prepared(images, {"backbone": CONVOLUTIONS, "crop": 6}, {"backbone": "classifier", "steps": 2})
    x, y = pictures()
    x.requires_grad_()
    want = terms.loss(x, y, rng(), OFF)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = terms.loss(x, y, rng(), OFF)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=0.05)
    assert loss.item() != want.item()  # the backbone does run in bf16
    assert bool(x.grad.isfinite().all())
    terms = prepared(images, {"backbone": PAIR, "crop": 6})  # nothing in it that autocast would round
    want = terms.loss(x, y, rng(), OFF)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert terms.loss(x, y, rng(), OFF)[0] == want, "crops and distances are not rounded"


def test_training_with_a_term_brings_features_closer(images, tmp_path):
    """With a pixel error that weighs nothing the term alone moves the weights, and without it nothing does."""
    flow = random_flow(flow_config(images).model)
    plain = inverse_config(images, steps=80, every=20)
    plain = dataclasses.replace(plain, alignment=AlignmentConfig(strategy="naive", weight_output=1e-30))
    config = with_terms(plain, {"backbone": CONVOLUTIONS, "crop": 8})
    terms, data = prepared(images, {"backbone": CONVOLUTIONS}), load(config.data)
    x, y = data.val_x.batch(), data.val_y
    found = {}
    for name, settings in (("with", config), ("without", plain)):
        model = train.train_inverse(settings, flow, tmp_path / name, progress=False)
        with torch.no_grad():
            found[name] = terms.loss(model.decode(flow.encode(x, y)[0], y), x, rng(), OFF)[0].item()
    assert found["with"] < 0.5 * found["without"]
    lines = [json.loads(line) for line in (tmp_path / "with/metrics.jsonl").read_text().splitlines()]
    values = [line["perceptual_convolutions"] for line in lines if line["split"] == "val"]
    assert values[-1] < values[0]
    kept = biflow.load(tmp_path / "with/model.safetensors").state_dict()
    assert kept.keys() == model.state_dict().keys(), "the backbone is not part of the model"


# --- resuming


def test_resume_is_bit_for_bit_and_keeps_to_the_backbones(images, tmp_path, monkeypatch):
    flow = random_flow(flow_config(images).model)
    file = tmp_path / "weights.pt"
    torch.save(convolutions().state_dict(), file)
    term = {"backbone": CONVOLUTIONS, "crop": 8, "weights": str(file)}
    config = with_terms(inverse_config(images, 12, 4, keep=9), term, {"backbone": "classifier", "steps": 3, "crop": 6})
    calm = train.train_inverse(config, flow, tmp_path / "calm", progress=False)

    def interrupted(name):
        out = tmp_path / name
        shutil.copytree(tmp_path / "calm", out)
        (out / "model.safetensors").unlink()
        for folder in runs.checkpoints(out)[:2]:
            shutil.rmtree(folder)
        return out

    out = interrupted("killed")
    with monkeypatch.context() as patch:
        patch.setattr(backbones, "train_classifier", lambda *a, **k: pytest.fail("trained again"))
        resumed = train.train_inverse(config, flow, out, resume=True, progress=False)
    assert same_weights(resumed, calm)
    assert kill_resume.raw_state(out, 12) == kill_resume.raw_state(tmp_path / "calm", 12)
    assert kill_resume.metrics(out) == kill_resume.metrics(tmp_path / "calm")
    assert [path.name for path in runs.checkpoints(out)[0].iterdir() if "perceptual" in path.name] == []

    out, moved = interrupted("moved"), tmp_path / "elsewhere" / file.name
    moved.parent.mkdir()
    shutil.copy(file, moved)
    elsewhere = dataclasses.replace(config.perceptual[0], weights=str(moved))
    again = dataclasses.replace(config, perceptual=(elsewhere, config.perceptual[1]))
    assert same_weights(train.train_inverse(again, flow, out, resume=True, progress=False), calm)

    out = interrupted("other classifier")
    path = out / "perceptual_classifier.safetensors"
    found = checkpoint.read(path)
    changed = {name: tensor + 1 for name, tensor in found.tensors.items()}
    checkpoint.write(path, found.kind, changed, found.config, found.metadata)
    with pytest.raises(ValueError, match=r"the run to resume has perceptual_weights_sha256\.classifier"):
        train.train_inverse(config, flow, out, resume=True, progress=False)
    out = interrupted("other weights")
    torch.save(convolutions().state_dict(), file)
    with pytest.raises(ValueError, match=r"the run to resume has perceptual_weights_sha256\.convolutions"):
        train.train_inverse(config, flow, out, resume=True, progress=False)


def test_a_run_of_before_goes_on_without_terms(images, tmp_path):
    """Its configuration has no `perceptual`, its training state no fingerprints."""
    flow, config = random_flow(flow_config(images).model), inverse_config(images, 4, 2)
    want = train.train_inverse(config, flow, tmp_path, progress=False)
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert values.pop("perceptual") == []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert same_weights(train.train_inverse(config, flow, tmp_path, resume=True, progress=False), want)
    with pytest.raises(ValueError, match="the run to resume has perceptual = "):
        train.train_inverse(with_terms(config, {"backbone": PAIR}), flow, tmp_path, resume=True, progress=False)


# --- bad input


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"backbone": "resnet"}, "backbone: expected one of lpips, convnext_v2, vgg, classifier, or 'package.module:f"),
        ({"backbone": "os.system(1):x"}, "backbone: expected one of"),
        ({"backbone": "lpips", "weight": 0.0}, "weight: expected a finite number > 0"),
        ({"backbone": "lpips", "weight": math.inf}, "weight: expected a finite number > 0"),
        ({"backbone": "lpips", "name": "../x"}, "name: expected letters, digits and underscores, got '../x'"),
        ({"backbone": "lpips", "layers": ("a",)}, r"layers: expected None with backbone 'lpips' \(for all but lpips\)"),
        ({"backbone": "vgg", "layers": ()}, "layers: expected at least one name"),
        ({"backbone": "classifier", "weights": "x.pt"}, "weights: expected None with backbone 'classifier'"),
        ({"backbone": "vgg", "inputs": "raw"}, "inputs: expected None with backbone 'vgg'"),
        ({"backbone": PAIR, "inputs": "rgb"}, "inputs: expected one of imagenet, raw, got 'rgb'"),
        ({"backbone": PAIR, "model": "vgg16"}, "model: expected None with backbone 'tiny_perceptual:pair'"),
        ({"backbone": "vgg", "steps": 5}, r"steps: expected None with backbone 'vgg' \(for classifier\), got 5"),
        ({"backbone": "vgg", "crop": 0}, "crop: expected a finite number of at least 1"),
        ({"backbone": "vgg", "crop_scale": (0.5, 0.2)}, "crop_scale: expected 0 < smallest <= largest <= 1"),
        ({"backbone": "vgg", "crop_ratio": (0.0, 1.0)}, "crop_ratio: expected 0 < smallest <= largest, got"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_terms_out_of_range(fields, reason):
    with pytest.raises(ValueError, match=reason):
        PerceptualConfig(**{"weight": 1.0, **fields})


def test_configurations_round_trip_and_name_what_is_wrong(images):
    config = with_terms(inverse_config(images), {"backbone": "lpips", "crop": 224}, {"backbone": PAIR, "name": "a"})
    assert from_mapping(InverseTraining, yaml.safe_load(yaml.safe_dump(to_mapping(config)))) == config
    values = to_mapping(config)
    values["perceptual"][1]["colour"] = 3
    with pytest.raises(ValueError, match=re.escape("InverseTraining.perceptual[1]: unknown field 'colour'")):
        from_mapping(InverseTraining, values)
    with pytest.raises(ValueError, match="perceptual: expected terms of different names"):
        with_terms(config, {"backbone": PAIR}, {"backbone": PAIR})
    with pytest.raises(ValueError, match=r"decoder: expected the autoencoder by which .*in_channels 4\), got None"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, in_channels=4))
    with pytest.raises(ValueError, match="decoder: expected None but for perceptual terms on latents, got 'vae'"):
        dataclasses.replace(config, decoder="vae")
