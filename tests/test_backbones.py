"""Backbones of perceptual terms: the classifier of a run, weights from files, the libraries, what does not work."""

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_perceptual import CONVOLUTIONS, PAIR, convolutions, pictures, prepared, rng, with_terms
from tiny_training import flow_config, inverse_config, random_flow, same_weights, write_images

import biflow
from biflow import checkpoint, cli
from biflow.config import to_mapping
from biflow.data import load
from biflow.evaluate.classifier import Classifier
from biflow.train import AlignmentConfig, Perceptual, PerceptualConfig, backbones, perceptual

RGB = SimpleNamespace(channels=3, img_size=8, num_classes=0, train_y=None)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz", count=120)


# --- layers


def test_layers_are_what_the_named_submodules_give():
    """Also where the next one would overwrite it in place; without dropout."""
    config = PerceptualConfig(backbone=CONVOLUTIONS, weight=1.0, layers=("0", "4"))
    backbone = backbones.build(config, RGB, seed=0)
    x = pictures(channels=3)[0]
    normalised = (x / 2 + 0.5 - backbone.mean) / backbone.std
    first = F.conv2d(normalised, backbone.module[0].weight, backbone.module[0].bias, padding=1)
    second = backbone.module[4](F.max_pool2d(first.relu(), 2))
    got = backbone(x)
    assert [tuple(f.shape) for f in got] == [(4, 8, 8, 8), (4, 6, 2, 2)]
    torch.testing.assert_close(got, [first, second])


# --- the classifier


def test_the_classifier_learns_and_the_global_state_is_left_alone(tmp_path):
    labels = np.arange(120) % 2
    gray = np.random.RandomState(0).randint(0, 60, (120, 8, 8)).astype(np.uint8)
    gray[labels == 0, :4] += 180
    gray[labels == 1, 4:] += 180  # bright top, bright bottom: flips from left to right change no class, others would
    images = tmp_path / "images.npz"
    np.savez(images, images=gray, labels=labels)
    before = torch.get_rng_state()
    terms = prepared(images, {"backbone": "classifier", "steps": 60}, out=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    found = checkpoint.read(tmp_path / "perceptual_classifier.safetensors")
    assert found.metadata["held_out_accuracy"] == 1.0
    torch.rand(1)
    with torch.no_grad():
        again = prepared(images, {"backbone": "classifier", "steps": 60})
    other = prepared(images, {"backbone": "classifier", "steps": 60}, seed=1)
    weights = [t.backbones[0].module for t in (terms, again, other)]
    assert same_weights(weights[0], weights[1])
    assert not same_weights(weights[0], weights[2])


def test_the_classifier_is_not_the_judge():
    """FD is computed on features of another network: below the class scores they have no tensor in common."""
    judge, own = Classifier(1, 28, 10).state_dict(), backbones.ResidualClassifier(1, 28, 10).state_dict()
    assert judge.keys() & own.keys() == {"scores.weight", "scores.bias"}
    assert [len(backbones.ResidualClassifier(1, size, 10).stages) for size in (4, 8, 28, 64)] == [1, 2, 4, 4]


def test_the_classifier_is_kept_and_trained_again_only_if_damaged(images, tmp_path, monkeypatch, capsys):
    term = {"backbone": "classifier", "steps": 3, "name": "own"}
    first = prepared(images, term, out=tmp_path).backbones[0].module
    path = tmp_path / "perceptual_own.safetensors"
    kept = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(backbones, "train_classifier", lambda *a, **k: pytest.fail("trained again"))
        assert same_weights(prepared(images, term, out=tmp_path).backbones[0].module, first)
    path.write_bytes(kept[:-1])
    assert same_weights(prepared(images, term, out=tmp_path).backbones[0].module, first)
    assert "training the classifier again" in capsys.readouterr().err
    assert path.read_bytes() == kept
    other = prepared(images, {**term, "steps": 4}, out=tmp_path).backbones[0].module
    assert "expected a classifier made from" in capsys.readouterr().err
    assert not same_weights(other, first)


# --- weights and libraries


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_weights_are_read_from_a_file(kind, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(5)
    want = convolutions()
    state = {**want.state_dict(), "head.weight": torch.zeros(2)}  # a head that nobody needs
    path = tmp_path / f"weights.{kind}"
    (save_file if kind == "safetensors" else torch.save)(state, path)
    term = PerceptualConfig(backbone=CONVOLUTIONS, weight=1.0, weights=str(path))
    assert same_weights(backbones.build(term, RGB, seed=0).module, want)
    assert not same_weights(backbones.build(dataclasses.replace(term, weights=None), RGB, seed=0).module, want)


def library(monkeypatch, name, module):
    """`import name` finds `module`; None: it is not installed."""
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(("backbone", "package"), [("lpips", "lpips"), ("convnext_v2", "timm"), ("vgg", "torchvision")])
def test_a_missing_library_is_said_before_there_is_a_run(backbone, package, images, tmp_path, monkeypatch, capsys):
    library(monkeypatch, package, None)
    flow = random_flow(flow_config(images).model)
    biflow.save(flow, tmp_path / "flow.safetensors")
    (tmp_path / "inverse.yaml").write_text(yaml.safe_dump({"stage": "inverse", **to_mapping(inverse_config(images))}))
    words = ["distill", str(tmp_path / "inverse.yaml"), f"perceptual=[{{backbone: {backbone}, weight: 0.4}}]"]
    words += ["--flow", str(tmp_path / "flow.safetensors"), "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert f"perceptual term {backbone!r}: expected {package}, which cannot be imported" in said
    assert "pip install 'biflow[perceptual]'" in said
    assert not (tmp_path / "run").exists()


class Stages(torch.nn.Module):
    """Shaped as timm's ConvNeXt-V2."""

    def __init__(self):
        super().__init__()
        self.stages = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 2), torch.nn.Conv2d(4, 5, 2)])

    def forward(self, x):
        return self.stages[1](self.stages[0](x)).mean((2, 3))


def test_a_library_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    cached = []

    def create_model(name, pretrained, num_classes):
        assert (name, num_classes) == ("convnextv2_base", 0)
        if pretrained and not cached:
            raise ConnectionError("no route")
        return cached[0] if pretrained else Stages()

    library(monkeypatch, "timm", SimpleNamespace(create_model=create_model, list_models=lambda f: ["convnextv2_base"]))
    term = PerceptualConfig(backbone="convnext_v2", weight=0.1)
    with pytest.raises(FileNotFoundError, match=r"'convnext_v2': expected weights in the cache of timm.*weights=PATH"):
        backbones.build(term, RGB, seed=0)
    with pytest.raises(ValueError, match="model: expected one of convnextv2_base, got 'resnet18'"):
        backbones.build(dataclasses.replace(term, model="resnet18"), RGB, seed=0)
    downloaded = Stages()
    torch.save(downloaded.state_dict(), tmp_path / "weights.pt")
    with_file = backbones.build(dataclasses.replace(term, weights=str(tmp_path / "weights.pt")), RGB, seed=0)
    assert same_weights(with_file.module, downloaded)
    cached.append(downloaded)
    backbone = backbones.build(term, RGB, seed=0)
    assert backbone.module is downloaded
    x = pictures(channels=3)[0]
    first = downloaded.stages[0]((x / 2 + 0.5 - backbone.mean) / backbone.std)
    torch.testing.assert_close(backbone(x), [first, downloaded.stages[1](first)])


def installed(name):
    try:
        return __import__(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


@pytest.mark.slow
def test_lpips_is_the_packages_value(tmp_path):
    """Random trunk, the package's weights of channels, the trunk's file as torchvision writes it."""
    lpips, models = installed("lpips"), installed("torchvision").models
    state = models.alexnet(weights=None).state_dict()
    torch.save(state, tmp_path / "alex.pth")
    term = PerceptualConfig(backbone="lpips", weight=0.4, model="alex", weights=str(tmp_path / "alex.pth"))
    backbone = backbones.build(term, RGB, seed=0)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = {name: state[f"features.{name.partition('.')[2]}"] for name in theirs.net.state_dict()}
    theirs.net.load_state_dict(trunk)
    x, y = pictures(channels=3, size=64)
    got = perceptual.feature_distance(backbone(x), backbone(y), backbone.channel_weights)
    torch.testing.assert_close(got, theirs(x, y).flatten(), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_vgg_compares_what_lpips_compares(tmp_path):
    models = installed("torchvision").models
    torch.save(models.vgg16(weights=None).state_dict(), tmp_path / "vgg16.pth")
    term = PerceptualConfig(backbone="vgg", weight=1.0, weights=str(tmp_path / "vgg16.pth"))
    backbone = backbones.build(term, RGB, seed=0)
    assert backbone.layers == ("features.3", "features.8", "features.15", "features.22", "features.29")
    assert [f.shape[1] for f in backbone(pictures(channels=3, size=32)[0])] == [64, 128, 256, 512, 512]


@pytest.mark.slow
def test_convnext_compares_every_stage(tmp_path):
    from safetensors.torch import save_file

    model = installed("timm").create_model("convnextv2_atto")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    options = {"model": "convnextv2_atto", "weights": str(tmp_path / "model.safetensors")}
    backbone = backbones.build(PerceptualConfig(backbone="convnext_v2", weight=0.1, **options), RGB, seed=0)
    x = pictures(channels=3, size=64)[0]
    want = model.eval().forward_intermediates((x / 2 + 0.5 - backbone.mean) / backbone.std, intermediates_only=True)
    torch.testing.assert_close(backbone(x), want)


# --- bad input


@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        ({"backbone": "no_such.module:f"}, ValueError, "a function that can be imported, got 'no_such.module:f'"),
        ({"backbone": "tiny_perceptual:absent"}, ValueError, "a function that can be imported.*no attribute 'absent'"),
        ({"backbone": "tiny_perceptual:nothing"}, TypeError, "expected a torch.nn.Module, got str"),
        ({"backbone": "tiny_perceptual:tokens_lost"}, ValueError, r"feature maps \(B,K,...\) for a batch B of 2"),
        ({"backbone": PAIR, "inputs": "raw", "crop": 8, "layers": ("a",)}, ValueError, r"expected names of submodules"),
        ({"backbone": CONVOLUTIONS, "crop": 2}, ValueError, r"takes images \(2, 1, 2, 2\) \(crop resizes them\), got"),
        ({"backbone": CONVOLUTIONS, "weights": "absent.pt"}, FileNotFoundError, "absent.pt: no such file of weights"),
        ({"backbone": CONVOLUTIONS, "weights": "pair.pt"}, ValueError, r"a tensor '0.weight' of shape \(8, 3, 3, 3\)"),
        ({"backbone": CONVOLUTIONS, "weights": "bad.pt"}, ValueError, "expected .safetensors or a state dict"),
        (
            {"backbone": CONVOLUTIONS, "weights": "code.pt"},
            ValueError,
            "a state dict written by torch.save, got one that would have",
        ),
        ({"backbone": CONVOLUTIONS, "weights": "list.pt"}, ValueError, "tensors by name; got list"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_backbones_that_do_not_work(fields, error, reason, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"scale": torch.zeros(3)}, "pair.pt")
    torch.save([1, 2], "list.pt")
    torch.save(convolutions(), "code.pt")
    (tmp_path / "bad.pt").write_bytes(b"PK nothing")
    config = with_terms(inverse_config(images), fields)
    with pytest.raises(error, match=reason):
        Perceptual(config, load(config.data))


def test_a_classifier_needs_labels(images, tmp_path):
    np.savez(tmp_path / "plain.npz", images=np.load(images)["images"])
    config = with_terms(inverse_config(tmp_path / "plain.npz"), {"backbone": "classifier"})
    with pytest.raises(ValueError, match="'classifier': backbone: expected data with labels of two classes or more"):
        Perceptual(config, load(config.data))


def test_the_examples_of_the_documentation_work(images, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "perceptual.md").read_text()
    terms = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["perceptual"]
    assert [PerceptualConfig(**term).weight for term in terms] == [0.4, 0.1]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "my_features.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (term,) = yaml.safe_load(re.search(r"# my_features.py; perceptual=(.*)", code)[1])
    x, y = pictures()
    assert prepared(images, term).loss(x, y, rng(), AlignmentConfig())[0] > 0
