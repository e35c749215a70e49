"""Encoders of representation alignment: the libraries, modules of one's own, the self-supervised one, what fails."""

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_representation
import torch
import torch.nn.functional as F
import yaml
from tiny_representation import MAPS, RGB, aligned, prepared
from tiny_training import changed, flow_config, same_weights, write_images
from torch import nn

import biflow
from biflow import checkpoint, cli, train
from biflow.config import to_mapping
from biflow.data import load
from biflow.train import EncoderConfig, Representation, encoders, self_supervised

COLOR = SimpleNamespace(channels=3, img_size=8, num_classes=0, train_y=None)
GRAY = SimpleNamespace(channels=1, img_size=8, num_classes=0, train_y=None)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz", count=120)


def pictures(channels=1, size=8):
    return 2 * torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(0)) - 1


def normalised(x):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x.expand(-1, 3, -1, -1) + 1) / 2 - mean[:, None, None]) / std[:, None, None]


# --- DINOv2


class Transformer(nn.Module):
    """Shaped as timm's: patches of 2 pixels, a class token before them, `forward_features`."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 6, 2, stride=2)
        self.patch_embed.patch_size = (2, 2)
        self.num_prefix_tokens = 1

    def forward_features(self, x):
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([torch.full_like(tokens[:, :1], 9.0), tokens], 1)


def fake_timm(monkeypatch, cached):
    """timm of one model; its weights are in the cache if there is something in `cached`."""

    def create_model(name, pretrained, num_classes, dynamic_img_size):
        assert (num_classes, dynamic_img_size) == (0, True)
        if pretrained and not cached:
            raise ConnectionError("no route")
        return cached[0] if pretrained else Transformer()

    listed = ["vit_base_patch14_dinov2"]
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model, list_models=lambda f: listed))


def test_dinov2_gives_its_patches_or_says_what_to_do_offline(monkeypatch, tmp_path):
    cached = []
    fake_timm(monkeypatch, cached)
    config = EncoderConfig(name="dinov2", size=8)
    with pytest.raises(FileNotFoundError, match=r"'dinov2': expected weights in the cache of timm.*weights=PATH"):
        encoders.build(config, COLOR, 4, 0)
    with pytest.raises(ValueError, match="model: expected one of vit_base_patch14_dinov2, got 'resnet18'"):
        encoders.build(dataclasses.replace(config, model="resnet18"), COLOR, 4, 0)
    downloaded = Transformer()
    torch.save(downloaded.state_dict(), tmp_path / "weights.pth")
    from_file, width = encoders.build(dataclasses.replace(config, weights=str(tmp_path / "weights.pth")), COLOR, 4, 0)
    assert width == 6
    assert same_weights(from_file.module.transformer, downloaded)
    with pytest.raises(ValueError, match=r"size: expected a multiple of 2, the patches of .*dinov2\.lvd142m, got 9"):
        encoders.build(dataclasses.replace(config, size=9, weights=str(tmp_path / "weights.pth")), COLOR, 4, 0)
    cached.append(downloaded)
    encoder, _ = encoders.build(config, COLOR, 4, 0)
    x = pictures(3, 4)
    want = downloaded.patch_embed(normalised(F.interpolate(x, (8, 8), mode="bicubic", antialias=True)))
    torch.testing.assert_close(encoder.maps(x), want)
    assert encoders.build(EncoderConfig(name="dinov2"), COLOR, 4, 0)[0].size == 224


def test_a_missing_library_is_said_before_there_is_a_run(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "flow.yaml").write_text(yaml.safe_dump({"stage": "flow", **to_mapping(flow_config(images))}))
    own = "representation={features: [[-1, 0]], encoder: {name: dinov2}}"
    assert cli.main(["train", str(tmp_path / "flow.yaml"), own, "--out", str(tmp_path / "run"), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "representation.encoder 'dinov2': expected timm, which cannot be imported" in said
    assert "pip install 'biflow[representation]'" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dinov2_is_timms(tmp_path):
    """The real library, random weights: positions resampled as timm resamples them for a model of that size."""
    try:
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    name = "vit_small_patch14_dinov2"
    model = timm.create_model(name, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    config = EncoderConfig(name="dinov2", model=name, weights=str(tmp_path / "dino.pth"), size=56)
    encoder, width = encoders.build(config, COLOR, 4, 0)
    small = timm.create_model(name, num_classes=0, img_size=56).eval()
    small.load_state_dict(checkpoint_filter_fn(model.state_dict(), small))
    x = pictures(3, 56)
    with torch.no_grad():
        want = small.forward_features(normalised(x))[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert width == 384
    torch.testing.assert_close(encoder.maps(x), want)


# --- modules of one's own


def test_a_module_is_given_what_inputs_and_size_say():
    x = pictures()
    rgb, width = encoders.build(EncoderConfig(name=RGB), GRAY, 4, 0)
    assert width == 3
    torch.testing.assert_close(rgb.maps(x), normalised(x))
    small, _ = encoders.build(EncoderConfig(name=RGB, size=4), GRAY, 4, 0)
    torch.testing.assert_close(small.maps(x), normalised(F.interpolate(x, (4, 4), mode="bicubic", antialias=True)))
    raw, width = encoders.build(EncoderConfig(name=MAPS, inputs="raw"), GRAY, 4, 0)
    assert width == 5
    torch.testing.assert_close(raw.maps(x), tiny_representation.maps()(x))


def test_weights_are_read_from_a_file(tmp_path):
    want = nn.Conv2d(1, 5, 3)
    torch.save(want.state_dict(), tmp_path / "weights.pt")
    config = EncoderConfig(name=MAPS, inputs="raw", weights=str(tmp_path / "weights.pt"))
    assert same_weights(encoders.build(config, GRAY, 4, 0)[0].module, want)


@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        ({"name": "no_such.module:f"}, ValueError, "a function that can be imported, got 'no_such.module:f'"),
        ({"name": "tiny_perceptual:nothing"}, TypeError, "expected a torch.nn.Module, got str"),
        ({"name": "tiny_representation:vectors"}, ValueError, r"one feature map \(B,F,h,w\) for a batch B of 2, got"),
        ({"name": MAPS}, ValueError, r"a module that takes \(2, 1, 8, 8\) \(size resizes them\), got RuntimeError"),
        ({"name": MAPS, "weights": "absent.pt"}, FileNotFoundError, "absent.pt: no such file of weights"),
        ({"name": "vgg"}, ValueError, "name: expected one of dinov2, self_supervised, or 'package.module:function'"),
        (
            {"name": "dinov2", "steps": 3},
            ValueError,
            r"steps: expected None with name 'dinov2' \(for self_supervised\)",
        ),
        ({"size": 8}, ValueError, r"size: expected None with name 'self_supervised'"),
        ({"name": MAPS, "model": "b"}, ValueError, r"model: expected None .* \(for dinov2\), got 'b'"),
        ({"name": MAPS, "inputs": "bytes"}, ValueError, "inputs: expected one of imagenet, raw, got 'bytes'"),
        ({"precision": "fp16"}, ValueError, "precision: expected one of fp32, bf16, got 'fp16'"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_encoders_that_do_not_work(fields, error, reason):
    with pytest.raises(error, match=reason):
        encoders.build(EncoderConfig(**fields), GRAY, 4, 0)


# --- trained without labels


def test_vicreg_is_its_formula():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 5, generator=g, dtype=torch.float64)
    want = 25 * ((a - b) ** 2).mean()
    for z in (a, b):
        z = z.numpy()
        cov = np.cov(z, rowvar=False)
        want += 25 * np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean()
        want += (cov**2).sum() / 5 - (np.diag(cov) ** 2).sum() / 5
    assert float(self_supervised.vicreg_loss(a, b)) == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize(
    ("size", "grid", "side"), [(28, 7, 7), (8, 4, 4), (32, 16, 16), (64, 16, 16), (9, 9, 9), (64, 4, 8)]
)
def test_the_map_is_as_fine_as_the_tokens(size, grid, side):
    """As far as three stages can halve it."""
    found = self_supervised.SmallEncoder(2, size, grid)(torch.zeros(2, 2, size, size))
    assert found.shape == (2, self_supervised.FEATURES, side, side)


def test_features_are_those_of_the_last_two_stages():
    """The earlier ones at the resolution of the last; each channel standardised by itself."""
    module = self_supervised.SmallEncoder(1, 64, 4).eval()
    with torch.no_grad():
        module.standardise.running_mean.uniform_(-1, 1)
        module.standardise.running_var.uniform_(0.5, 2)
        x = pictures(size=64)
        middle = module.stages[1](module.stages[0](x))
        last = module.stages[2](middle)
        assert middle.shape[-1] == 2 * last.shape[-1]
        want = torch.cat([F.avg_pool2d(middle, 2), last], 1)
        mean, var = module.standardise.running_mean[:, None, None], module.standardise.running_var[:, None, None]
        torch.testing.assert_close(module(x), (want - mean) / (var + 1e-5).sqrt(), rtol=1e-4, atol=1e-4)


def test_no_label_enters_and_the_global_state_is_left_alone(images):
    """The same bits from the same images with other labels, or none."""
    data = load(flow_config(images).data)
    own = [data, dataclasses.replace(data, train_y=1 - data.train_y), dataclasses.replace(data, train_y=None)]
    found, before = [], torch.get_rng_state()
    for each in own:
        encoder, _ = encoders.build(EncoderConfig(steps=2), each, 2, 0)
        encoders.prepare(encoder, each, None, seed=0, flip=True, progress=False)
        found.append(encoder.module)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(found[0], found[1])
    assert same_weights(found[0], found[2])
    other, _ = encoders.build(EncoderConfig(steps=2), data, 2, 1)
    encoders.prepare(other, data, None, seed=1, flip=True, progress=False)
    assert not same_weights(found[0], other.module)


def test_training_learns_features_that_are_standardised(images):
    data = load(flow_config(images).data)
    encoder, _ = encoders.build(EncoderConfig(steps=60), data, 2, 0)
    encoders.prepare(encoder, data, None, seed=0, flip=False, progress=False)
    with torch.no_grad():
        maps = encoder.maps(data.train_x.batch()).transpose(0, 1).flatten(1)
    assert maps.mean(1).abs().mean() < 0.5
    assert 0.5 < maps.std(1).mean() < 2
    found = encoders.probed(encoder, data)
    assert found["pooled"] >= 0.9
    assert found["token"] >= 0.6
    assert encoders.probed(encoder, dataclasses.replace(data, val_y=None)) == {}
    few = data.train_x.take(torch.arange(4001) % 5)
    rare = dataclasses.replace(data, train_x=few, train_y=(torch.arange(4001) == 4000).long())
    assert encoders.probed(encoder, rare) == {}, "a class that none of the images looked at has"


def test_the_encoder_is_kept_and_trained_again_only_if_damaged(images, tmp_path, monkeypatch, capsys):
    own = {"name": "self_supervised", "inputs": None, "steps": 3}
    first = prepared(images, tmp_path, own).encoder
    path = tmp_path / "encoder.safetensors"
    kept = path.read_bytes()
    known = checkpoint.read(path).metadata
    assert set(known) == {"pooled", "token", "untrained_pooled", "untrained_token", "pixels"}
    assert known["pixels"] == 1.0, "a line through the pixels separates these classes"
    said = capsys.readouterr().out
    assert f"{known['pooled']:.3f} of held-out labels from their mean" in said
    assert f"untrained {known['untrained_pooled']:.3f}" in said
    assert "raw pixels 1.000" in said
    with monkeypatch.context() as patch:
        patch.setattr(self_supervised, "train_encoder", lambda *a, **k: pytest.fail("trained again"))
        again = prepared(images, tmp_path, own).encoder
    x = pictures()
    assert torch.equal(again(x), first(x))
    path.write_bytes(kept[:-1])
    assert same_weights(prepared(images, tmp_path, own).encoder, first)
    assert "training the network again" in capsys.readouterr().err
    assert path.read_bytes() == kept
    other = prepared(images, tmp_path, {**own, "steps": 4}).encoder
    assert not same_weights(other, first)


def test_runs_share_the_encoder_of_an_earlier_one(images, tmp_path, monkeypatch):
    """The same bits and hash as in the run that trained it; its own seed makes it that of runs of other seeds."""
    own = {"name": "self_supervised", "inputs": None}
    first = prepared(images, tmp_path, {**own, "steps": 3, "seed": 5})
    path = tmp_path / "encoder.safetensors"
    config = tiny_representation.aligned(changed(flow_config(images), "run", seed=9), {**own, "steps": 3, "seed": 5})
    elsewhere = Representation(config, load(config.data))
    assert elsewhere.prepare() == first.sha256, "whatever the seed of the run"
    other = prepared(images, None, {**own, "steps": 3})
    assert other.sha256 != first.sha256
    monkeypatch.setattr(self_supervised, "train_encoder", lambda *a, **k: pytest.fail("trained again"))
    shared = prepared(images, tmp_path / "other", {**own, "weights": str(path)})
    assert same_weights(shared.encoder, first.encoder)
    assert shared.sha256 == first.sha256
    assert shared.encoder.known == first.encoder.known == checkpoint.read(path).metadata
    assert not (tmp_path / "other").exists()


def test_an_encoder_that_does_not_fit_is_refused(images, tmp_path):
    own = {"name": "self_supervised", "inputs": None}
    prepared(images, tmp_path, {**own, "steps": 3})
    path = tmp_path / "encoder.safetensors"
    given = EncoderConfig(weights=str(path))
    for grid, data, change, reason in (
        (4, GRAY, {}, "expected an encoder of grid 4, got one of grid 2"),
        (2, SimpleNamespace(channels=1, img_size=16), {}, "expected an encoder of img_size 16, got one of img_size 8"),
        (2, COLOR, {}, "expected the weights of this encoder, got others: .*size mismatch"),
        (2, GRAY, {"steps": 4}, "expected an encoder of steps 4, got one of steps 3"),
        (2, GRAY, {"seed": 4}, "expected an encoder of seed 4, got one of seed 0"),
    ):
        with pytest.raises(ValueError, match=rf"encoder 'self_supervised': .*{reason}"):
            encoders.build(dataclasses.replace(given, **change), data, grid, 0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="the file is corrupted"):
        encoders.build(given, GRAY, 2, 0)
    biflow.save(biflow.TarFlow(flow_config(images).model), path)
    with pytest.raises(ValueError, match="expected a self-supervised network, "):
        encoders.build(given, GRAY, 2, 0)


def test_one_image_is_too_few(images):
    data = load(flow_config(images).data)
    few = dataclasses.replace(data, train_x=data.train_x.take(torch.arange(1)))
    with pytest.raises(ValueError, match="encoder: expected at least 2 training images to learn from, got 1"):
        self_supervised.train_encoder(self_supervised.SmallEncoder(1, 8, 4), few, steps=1, seed=0, flip=False)


def test_the_examples_of_the_documentation_work(images, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "flowback.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    settings = yaml.safe_load(block)["representation"]
    config = flow_config(images, steps=1)
    config = aligned(config, {**settings.pop("encoder"), "inputs": None, "steps": 2}, **settings)
    assert config.representation.weight == 0.1
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "encoder: {name: my_encoder" in c)
    (tmp_path / "my_encoder.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    own = yaml.safe_load(re.search(r"# my_encoder.py; encoder: (.*)", code)[1])
    config = aligned(flow_config(images, steps=1), own)
    assert biflow.load(_trained(config, tmp_path / "run") / "model.safetensors").config == config.model


def _trained(config, out):
    train.train_flow(config, out, progress=False)
    return out
