"""Perceptual terms on latents, seen through their autoencoder."""

import dataclasses
import re

import pytest
import tiny_latents
import torch
from tiny_perceptual import CONVOLUTIONS, rng
from tiny_training import changed, flow_config, inverse_config

from biflow import data, latents, train
from biflow.train.perceptual import Perceptual, feature_distance


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_latents.make_place(tmp_path_factory.mktemp("place"))


def configured(place, make=inverse_config, **run):
    """A run on the latents (4,8,8)."""
    config = make(place / "latents", steps=2, **run)
    return changed(config, "model", in_channels=4, img_size=8)


def with_decoder(place, config, term):
    term = train.PerceptualConfig(**term)  # both at once: neither goes without the other
    return dataclasses.replace(config, perceptual=(term,), decoder=str(place / "vae"))


TERM = {"backbone": CONVOLUTIONS, "weight": 2.0}


def test_loss_and_gradient_are_those_of_the_decoded_images(place):
    config = with_decoder(place, configured(place), TERM)
    images = data.load(config.data)
    terms = Perceptual(config, images)
    terms.prepare()
    x, target = torch.randn(2, 3, 4, 8, 8, generator=rng()).unbind()
    x.requires_grad_()
    loss, errors = terms.loss(x, target, rng(), config.alignment)
    autoencoder = latents.load(str(place / "vae"))
    shift, scale = (torch.tensor(images.latents[name]).view(-1, 1, 1) for name in ("shift", "scale"))
    pictures = [autoencoder.decode(t * scale + shift).sample for t in (x, target)]
    assert pictures[0].shape == (3, 3, 16, 16)
    want = feature_distance(*(terms.backbones[0](p) for p in pictures)).mean()
    torch.testing.assert_close(loss, 2 * want)
    torch.testing.assert_close(errors["perceptual_convolutions"], want.detach())
    (got,), (slope,) = torch.autograd.grad(loss, x), torch.autograd.grad(2 * want, x)
    assert slope.abs().max() > 0
    torch.testing.assert_close(got, slope)
    assert all(p.grad is None for p in terms.pixels.parameters())


def test_a_run_trains_through_the_decoder_and_resumes_with_the_same_one(place, tmp_path):
    flow = train.train_flow(configured(place, flow_config), tmp_path / "flow", progress=False)
    config = with_decoder(place, configured(place), TERM)
    model = train.train_inverse(config, flow, tmp_path / "run", progress=False)
    without = train.train_inverse(configured(place), flow, tmp_path / "without", progress=False)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), without.parameters(), strict=True))
    train.train_inverse(config, flow, tmp_path / "run", resume=True, progress=False)
    other = tiny_latents.write_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="expected the autoencoder that made the latents"):
        train.train_inverse(dataclasses.replace(config, decoder=other), flow, tmp_path / "else", progress=False)


def test_what_cannot_be_seen_is_refused(place, tmp_path):
    config = with_decoder(place, configured(place), TERM)
    classifier = dataclasses.replace(config, perceptual=(train.PerceptualConfig(backbone="classifier", weight=1.0),))
    with pytest.raises(ValueError, match="backbone: expected another than the classifier with latents"):
        Perceptual(classifier, data.load(config.data))
    foreign = dataclasses.replace(data.load(config.data), latents=None)
    with pytest.raises(ValueError, match=re.escape("decoder: expected data made by `biflow latents encode`")):
        Perceptual(config, foreign)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Perceptual(dataclasses.replace(config, decoder=str(tmp_path / "none")), data.load(config.data))
