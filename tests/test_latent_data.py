"""Latents as data: what a batch holds, and training on them."""

import dataclasses
import pickle
import shutil
from pathlib import Path

import kill_resume
import numpy as np
import pytest
import torch
from tiny_latents import COUNT, configured, encode, make_place, read_moments, source
from tiny_training import changed, interrupted, same_weights

from biflow import data, train
from biflow.data import DataConfig, Stream
from biflow.data.check import check
from biflow.train import EncoderConfig

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'biflow[latents]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def moments(place):
    return read_moments(place / "latents")


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_step_is_a_function_of_seed_and_step(place, moments):
    """Whatever the workers, the order in a batch and what was read before; other steps and seeds are other draws."""
    found = data.load(source(place, flip=True)).train_x
    order = [torch.tensor([5, 0, 21, 9]), torch.tensor([9, 5]), torch.tensor([1])]

    def read(seed, workers=0, start=0):
        images = dataclasses.replace(found, workers=workers)
        stream = Stream(images, order.__getitem__, 3, seed=seed)
        parts = [stream.read(step) for step in range(start, 3)]
        stream.close()
        return parts

    want = read(7)
    for other in (read(7, workers=2), read(7)):
        for a, b in zip(want, other, strict=True):
            assert torch.equal(a.pixels, b.pixels)
            assert torch.equal(a.turned, b.turned)
    assert torch.equal(read(7, start=1)[0].pixels, want[1].pixels)
    alone = found.decode([9], 7, 0)[0]
    assert torch.equal(alone[0], want[0].pixels[3])
    assert not torch.equal(found.decode([9], 7, 1)[0], alone)
    assert not torch.equal(found.decode([9], 8, 0)[0], alone)
    z = (want[0].pixels * 2 + 0.1).numpy()
    own = moments[order[0], want[0].turned.int()]
    noise = (z - own[:, 0]) / own[:, 1]
    assert 0.9 < noise.std() < 1.1
    assert abs(noise.mean()) < 0.1


def test_draws_and_mirrored_ones_have_their_shares(place, moments):
    found = data.load(source(place, flip=True)).train_x
    turned = torch.stack([found.turned(range(COUNT), 0, step) for step in range(200)]).float()
    assert abs(float(turned.mean()) - 0.5) < 0.03
    assert turned.mean(0).min() > 0.35
    draws = torch.stack([dataclasses.replace(found, flip=False).decode([4], 0, step)[0][0] for step in range(400)])
    draws = (draws * 2 + 0.1).numpy()
    assert np.abs((draws.mean(0) - moments[4, 0, 0]) / moments[4, 0, 1]).max() < 0.3
    assert np.abs(draws.std(0) / moments[4, 0, 1] - 1).max() < 0.2


def test_normalisation_and_means(place, moments):
    for name, (shift, scale) in {"scaling": (0.1, 2.0), "channels": (None, None)}.items():
        found = data.load(source(place, normalize_latents=name, posterior="mean"))
        if shift is None:
            shift, scale = (np.array(found.latents[k]).reshape(4, 1, 1) for k in ("shift", "scale"))
        assert np.abs(found.train_x.batch().numpy() - (moments[:, 0, 0] - shift) / scale).max() < 1e-5
        assert np.abs(found.train_x.mirrored().batch().numpy() - (moments[:, 1, 0] - shift) / scale).max() < 1e-5
    drawn = data.load(source(place)).train_x
    assert torch.equal(drawn.batch(torch.tensor([3, 8])), drawn.batch()[[3, 8]])
    assert (found.num_classes, found.channels, found.img_size, found.bin_width) == (2, 4, 8, None)
    assert found.train_y.tolist() == [0] * 11 + [1] * 11


def test_held_out_latents_are_split_by_class_and_not_mirrored(place):
    found = data.load(DataConfig(source=str(place / "latents"), val_fraction=0.2, flip=True))
    assert (len(found.train_x), len(found.val_x), found.val_y.tolist()) == (18, 4, [0, 0, 1, 1])
    stream = Stream(found.val_x, lambda step: torch.arange(4), 1)
    assert stream.read(0).turned is None
    assert torch.equal(stream.read(0).pixels, found.val_x.batch())


def test_shards_are_mapped_not_read(place):
    """And a copy in another process has none of it."""
    found = data.load(source(place)).train_x
    found.batch(torch.tensor([0]))
    pointer = found._shard(0).data_ptr()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [(*(int(end, 16) for end in line[0].split("-")), line[-1]) for line in lines]
    assert next(name for low, high, name in spans if low <= pointer < high).endswith("train-00000.safetensors")
    assert len(pickle.dumps(found)) < 5000
    assert torch.equal(pickle.loads(pickle.dumps(found)).batch(), found.batch())


def test_damaged_latents_are_told_of(place, tmp_path):
    shutil.copytree(place / "latents", tmp_path / "out")
    assert check(source(tmp_path, "out"), progress=False)[0]["unreadable_shards"] == []
    path = tmp_path / "out" / "train-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    report, _ = check(source(tmp_path, "out"), progress=False)
    assert report["unreadable_shards"] == ["train-00001.safetensors"]
    assert (report["kind"], report["images"], report["classes"]) == ("latents", COUNT, {"class0": 11, "class1": 11})
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"train-00001\.safetensors: expected a shard of latents, got a truncated"):
        data.load(source(tmp_path, "out"))
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train-00001\.safetensors: no such file: the latents are not complete"
    ):
        data.load(source(tmp_path, "out"))
    for text, reason in (("{}", "expected JSON as `biflow latents encode` writes it"), ('{"format": "x"}', "got 'x'")):
        (tmp_path / "out" / "latents.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            data.load(source(tmp_path, "out"))
    with pytest.raises(ValueError, match="posterior: expected 'sample' with digits"):
        data.load(DataConfig(posterior="mean"))


# --- training --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow(place):
    config = configured(place)
    return config, place / "flow", train.train_flow(config, place / "flow", progress=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_changes_no_bit(workers, flow, tmp_path):
    config, out, model = flow
    copy = interrupted(out, tmp_path, 4)
    resumed = train.train_flow(changed(config, "data", workers=workers), copy, resume=True, progress=False)
    assert same_weights(resumed, model)
    assert kill_resume.metrics(copy) == kill_resume.metrics(out)


def test_a_run_does_not_go_on_with_other_latents(place, flow, tmp_path):
    encode(place, tmp_path / "latents", batch_size=4, mirrored=True, dtype="fp16")
    state = interrupted(flow[1], tmp_path, 4)
    shutil.move(place / "latents", place / "own")
    try:
        shutil.copytree(tmp_path / "latents", place / "latents")
        with pytest.raises(ValueError, match=r"expected the images of .* that the run began with, got others"):
            train.train_flow(flow[0], state, resume=True, progress=False)
    finally:
        shutil.rmtree(place / "latents")
        shutil.move(place / "own", place / "latents")


def test_cached_features_of_latents_change_no_bit(place, tmp_path):
    """Those of mirrored images come from their own latents; draws that change by the step have no cache."""
    from test_training_on_files import aligned

    config = aligned(configured(place, steps=6, posterior="mean"))
    config = changed(config, "representation", encoder=EncoderConfig(name="tiny_representation:latents", inputs="raw"))
    want = train.train_flow(config, tmp_path / "plain", progress=False)
    cached = changed(config, "representation", cache_features=True)
    assert same_weights(train.train_flow(cached, tmp_path / "cached", progress=False), want)
    assert kill_resume.metrics(tmp_path / "cached") == kill_resume.metrics(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"cache_features: expected false with data\.posterior 'sample'"):
        train.train_flow(changed(cached, "data", posterior="sample"), tmp_path / "drawn", progress=False)
