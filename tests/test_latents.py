"""Images to latents by a tiny random AutoencoderKL, training on them, and images of what was learned."""

import dataclasses
import io
import json
import multiprocessing
import pickle
import shutil
import signal
import time
from pathlib import Path

import data_sets
import kill_resume
import numpy as np
import pytest
import tiny_latents
import torch
from tiny_training import changed, flow_config, interrupted, inverse_config, random_flow, same_weights

import biflow
from biflow import cli, data, train
from biflow.data import DataConfig, Stream
from biflow.data import latents as stored
from biflow.data.check import check

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'biflow[latents]'")

from biflow import latents
from biflow.latents import autoencoder as vae
from biflow.train import EncoderConfig

COUNT, CORRUPT = 22, (3, 12)


def write_images(folder, count=COUNT, corrupt=CORRUPT):
    rng = np.random.RandomState(0)
    images = []
    for i in range(count):
        pixels = rng.randint(0, 256, (tiny_latents.SIDE, tiny_latents.SIDE, 3), np.uint8)
        file = data_sets.encode(pixels)
        images.append((i % 2, data_sets.spoiled(file, 0) if i in corrupt else file))
    return data_sets.write_folder(folder, images)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An autoencoder, images, and their latents in fp32, shards of 8 images."""
    folder = tmp_path_factory.mktemp("latents")
    tiny_latents.write_autoencoder(folder / "vae")
    write_images(folder / "images")
    encode(folder, folder / "latents")
    return folder


def encode(place, out, images="images", **config):
    config = latents.EncodingConfig(**{"batch_size": 3, "shard_images": 8, "dtype": "fp32", **config})
    source = DataConfig(source=str(place / images), img_size=tiny_latents.SIDE)
    return latents.encode_images(source, str(place / "vae"), out, config, progress=False)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def source(place, name="latents", **fields):
    return DataConfig(source=str(place / name), val_fraction=0.0, **fields)


@pytest.fixture(scope="module")
def moments(place):
    """(N,2,2,4,8,8), read with safetensors and json alone, as docs/latents.md has it."""
    from safetensors.numpy import load_file

    index = json.loads((place / "latents" / "latents.json").read_text())
    return np.concatenate([load_file(place / "latents" / shard["file"])["moments"] for shard in index["shards"]])


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_images_and_of_the_mirrored_images(place, moments):
    """Image by image with the model itself; the stand-in's for a corrupt one. A latent mirrored is another thing."""
    model = vae.load(str(place / "vae"))
    images = data.load(DataConfig(source=str(place / "images"), img_size=tiny_latents.SIDE, val_fraction=0.0)).train_x
    x = torch.from_numpy(np.stack([images.decoder.decode([i])[0][0].numpy() for i in range(COUNT)])).float()
    x = x / 127.5 - 1
    with torch.no_grad():
        for side, sided in enumerate((x, x.flip(-1))):
            want = model.encode(sided).latent_dist
            assert np.abs(moments[:, side, 0] - want.mean.numpy()).max() < 1e-5
            assert np.abs(moments[:, side, 1] - want.std.numpy()).max() < 1e-5
    assert np.abs(moments[:, 1, 0] - moments[:, 0, 0][..., ::-1]).max() > 1e-2


def test_statistics_are_numpys(place, moments):
    index = stored.read_index(place / "latents")
    mean, std = (moments[:, :, k].astype(np.float64).transpose(2, 0, 1, 3, 4).reshape(4, -1) for k in (0, 1))
    want = {"shift": mean.mean(1), "scale": np.sqrt(mean.var(1) + (std**2).mean(1))}
    for name, values in want.items():
        assert np.abs(np.array(index["normalization"]["channels"][name]) / values - 1).max() < 1e-12
    assert index["normalization"]["scaling"] == {"shift": [0.1] * 4, "scale": [2.0] * 4}
    assert index["posterior_std"] == pytest.approx(np.sqrt((std**2).mean()), rel=1e-6)
    assert index["rounding"] == 0


def test_statistics_of_a_large_mean_are_sound():
    """Squares minus the square of the mean would have lost everything in fp64 at 1e9."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 1, 1, 3, 4, 4, generator=generator, dtype=torch.float64)
    z = torch.cat([1e9 + noise, torch.full_like(noise, 0.5)], 2)
    found = sum((latents.encoding.Moments.of(part) for part in z[1:].split(2)), latents.encoding.Moments.of(z[:1]))
    want = noise.transpose(0, 3).flatten(1).var(1, correction=0) + 0.25
    assert torch.allclose(torch.from_numpy(found.squares / found.count), want, rtol=1e-6)


def test_half_precision_says_what_it_changes(place, moments, tmp_path, capsys):
    report = encode(place, tmp_path / "half", dtype="fp16")
    half = data.load(source(tmp_path, "half")).train_x
    change = np.sqrt(((moments[:, :, 0].astype(np.float16) - moments[:, :, 0].astype(np.float64)) ** 2).mean())
    assert report["rounding"] == pytest.approx(change, rel=1e-3)
    assert 0 < report["rounding"] < 1e-2 * report["posterior_std"]
    assert half.batch().dtype == torch.float32
    assert "changes the means" not in capsys.readouterr().err
    size = sum(p.stat().st_size for p in (tmp_path / "half").glob("*.safetensors"))
    assert report["bytes"] == size
    assert size == pytest.approx(COUNT * (2 * 2 * 4 * 8 * 8 * 2 + 8), abs=3 * 4096)


def test_corrupt_images_are_counted_and_named(place):
    found = stored.read_index(place / "latents")["corrupt"]
    assert sorted(found) == ["class0/000012.png", "class1/000003.png"]
    names = [
        name for p in sorted((place / "latents").glob("*.safetensors")) for name in stored.read_shard(p)[0]["names"]
    ]
    assert names == sorted(names)
    assert len(names) == COUNT


class Killed(BaseException):
    """Nothing between handles it, as nothing handles SIGKILL."""


@pytest.mark.parametrize("batches", [0, 1, 4, 7])
def test_goes_on_where_it_was_stopped(batches, place, tmp_path, monkeypatch):
    """8 batches in shards of 3, 3, 2. Finished shards are not made anew, and the end is the same to the byte."""
    own, left = vae.encode, [2 * batches]

    def encode_some(*arguments):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return own(*arguments)

    monkeypatch.setattr(vae, "encode", encode_some)
    with pytest.raises(Killed):
        encode(place, tmp_path / "out")
    (tmp_path / "out" / ".tmp-train-00001.safetensors-1234").write_bytes(b"half a shard")
    with pytest.raises(ValueError, match="expected finished latents, got some"):
        data.load(source(tmp_path, "out"))
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.safetensors")}
    assert len(times) == batches // 3
    left[0] = -1
    encode(place, tmp_path / "out")
    assert all(p.stat().st_mtime_ns == found for p, found in times.items())
    assert contents(tmp_path / "out") == contents(place / "latents")
    encode(place, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(place / "latents")


@pytest.mark.slow
def test_a_killed_process_loses_a_shard_at_most(place, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=encode, args=(place, tmp_path / "out"))
    process.start()
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out").glob("train-*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0)
    assert list((tmp_path / "out").glob("train-*"))
    encode(place, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(place / "latents")


def test_does_not_go_on_with_something_else(place, tmp_path):
    shutil.copytree(place / "latents", tmp_path / "out")
    with pytest.raises(ValueError, match="was begun with mirrored = True, this is False"):
        encode(place, tmp_path / "out", mirrored=False)
    shutil.copytree(place / "images", tmp_path / "images")
    shutil.copytree(place / "vae", tmp_path / "vae")
    (tmp_path / "images" / "class0" / "000000.png").rename(tmp_path / "images" / "class0" / "9.png")
    with pytest.raises(ValueError, match="was begun with images_sha256"):
        encode(tmp_path, tmp_path / "out")
    tiny_latents.write_autoencoder(tmp_path / "vae", seed=1)
    shutil.rmtree(tmp_path / "images")
    shutil.copytree(place / "images", tmp_path / "images")
    with pytest.raises(ValueError, match="was begun with autoencoder"):
        encode(tmp_path, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="expected an empty folder, or latents to go on with"):
        encode(place, tmp_path / "other")


def test_test_splits_of_arrays_stay_apart(place, tmp_path):
    rng = np.random.RandomState(0)
    x = rng.randint(0, 256, (14, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", x_train=x[:9], y_train=np.arange(9) % 3, x_test=x[9:], y_test=np.arange(5) % 3)
    config = latents.EncodingConfig(batch_size=4, shard_images=8, mirrored=False, dtype="fp32")
    report = latents.encode_images(
        DataConfig(source=str(tmp_path / "set.npz")), str(place / "vae"), tmp_path / "out", config, progress=False
    )
    assert (report["images"], report["held_out"], report["classes"]) == (14, 5, 3)
    found = data.load(DataConfig(source=str(tmp_path / "out"), posterior="mean"))
    assert found.train_y.tolist() == [k % 3 for k in range(9)]
    assert found.val_y.tolist() == [k % 3 for k in range(5)]
    z = vae.encode(vae.load(str(place / "vae")), torch.from_numpy(x[9:]).permute(0, 3, 1, 2) / 127.5 - 1)[:, 0]
    assert torch.allclose(found.val_x.batch(), (z - 0.1) * 0.5, atol=1e-5)
    with pytest.raises(ValueError, match="flip: expected false with latents encoded without those of mirrored"):
        data.load(DataConfig(source=str(tmp_path / "out"), flip=True))


def test_what_is_no_autoencoder_is_refused(place, tmp_path, monkeypatch):
    config = json.loads((place / "vae" / "config.json").read_text())
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="unet: expected an AutoencoderKL, got UNet2DModel"):
        vae.load(str(tmp_path / "unet"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="empty: expected the weights of an AutoencoderKL"):
        vae.load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"expected a folder of an AutoencoderKL \(config.json\)"):
        vae.load(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="none: expected a folder of an AutoencoderKL, or its name on the hub"):
        vae.load(str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no such folder; and not in the Hugging Face cache"):
        vae.load("nobody/nothing")
    shutil.copytree(place / "vae", tmp_path / "pipeline" / "vae")
    assert vae.describe(vae.load(str(tmp_path / "pipeline")), "")["config"]["latent_channels"] == 4
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'biflow\[latents\]'"):
        vae.load(str(place / "vae"))


def test_images_that_do_not_fit_are_refused(place, tmp_path):
    config = latents.EncodingConfig()
    with pytest.raises(ValueError, match="a side that 2 divides, as the autoencoder takes, got 3 channels and side 9"):
        latents.encode_images(
            DataConfig(source=str(place / "images"), img_size=9), str(place / "vae"), tmp_path, config
        )
    with pytest.raises(ValueError, match=r"data\.flip: not for encoding"):
        latents.encode_images(DataConfig(flip=True), str(place / "vae"), tmp_path, config)
    assert not list(tmp_path.iterdir())


def test_latents_that_fp16_cannot_hold_are_refused(place, tmp_path, monkeypatch):
    own = vae.encode
    monkeypatch.setattr(vae, "encode", lambda *a: 1e6 * own(*a))
    with pytest.raises(ValueError, match=r"class0/.*png: expected latents that fp16 can hold, got .*; use fp32"):
        encode(place, tmp_path / "out", dtype="fp16")
    monkeypatch.setattr(vae, "encode", lambda *a: float("nan") * own(*a))
    with pytest.raises(ValueError, match=r"class0/000000.png: expected finite latents"):
        encode(place, tmp_path / "more")


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


# --- training and sampling --------------------------------------------------------------------------------------------


def configured(place, steps=12, make=flow_config, **fields):
    config = changed(make(place / "latents", steps=steps, every=4, keep=10), "model", in_channels=4)
    return changed(config, "data", **{"flip": True, "val_fraction": 0.2, **fields})


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


def sample(run, *words):
    return cli.main(["sample", str(run), *map(str, words)])


def test_from_an_image_folder_to_images(place, tmp_path, capsys):
    """The commands of docs/latents.md; both stages; images in the .npz are those that the autoencoder gives."""
    words = ["latents", "encode", place / "images", "--vae", place / "vae", "--img-size", 16, "--out", tmp_path / "set"]
    assert cli.main([*map(str, words), "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["corrupt"], report["shape"], report["dtype"]) == (COUNT, 2, [4, 8, 8], "fp16")
    shutil.rmtree(tmp_path / "set" / "unused", ignore_errors=True)
    config = changed(configured(place, steps=2, normalize_latents="channels"), "data", source=str(tmp_path / "set"))
    trained = train.train_flow(config, tmp_path / "flow", progress=False)
    inverse = changed(
        configured(place, 2, inverse_config, normalize_latents="channels"), "data", source=config.data.source
    )
    train.train_inverse(inverse, trained, tmp_path / "inverse", progress=False)
    for run in ("flow", "inverse"):
        out = tmp_path / f"{run}.npz"
        assert sample(tmp_path / run, "--n", 5, "--vae", place / "vae", "--vae-batch", 2, "--out", out) == 0
        assert sample(tmp_path / run, "--n", 5, "--out", tmp_path / "z.npz") == 0
        found, z = np.load(out), np.load(tmp_path / "z.npz")
        about = data.load(config.data).latents
        shift, scale = (torch.tensor(about[k]).view(-1, 1, 1) for k in ("shift", "scale"))
        raw = torch.from_numpy(z["images"]).permute(0, 3, 1, 2) * scale + shift
        with torch.no_grad():
            want = vae.load(str(place / "vae")).decode(raw).sample
        bytes_ = ((want.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        assert np.abs(found["images"] - bytes_).max() <= 1
        assert found["images"].dtype == np.uint8
        assert found["labels"].tolist() == [0, 1, 0, 1, 0]
        assert data.load(DataConfig(source=str(out))).channels == 3
    assert sample(tmp_path / "flow", "--n", 4, "--vae", place / "vae", "--out", tmp_path / "grid.png") == 0
    assert (tmp_path / "grid.png").stat().st_size > 1000
    words = ["evaluate", tmp_path / "flow", "--samples", 8, "--guidance", 0]
    capsys.readouterr()
    assert cli.main([*map(str, words)]) == 0
    assert json.loads(capsys.readouterr().out)["exact"]["held_out_bits_per_dim"] is None
    assert (
        cli.main([*map(str, ["inpaint", tmp_path / "flow", "--half", "left", "--n", 2, "--out", tmp_path / "i.npz"])])
        == 0
    )


def test_sampling_wants_the_autoencoder_of_the_latents(place, flow, tmp_path, capsys):
    other = tiny_latents.write_autoencoder(tmp_path / "other", seed=1)
    assert sample(flow[1], "--vae", other) == 2
    assert "expected the autoencoder that made the latents" in capsys.readouterr().err
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(place / "vae")
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "tuned")
    assert sample(flow[1], "--n", 2, "--vae", tmp_path / "tuned", "--out", tmp_path / "tuned.npz") == 0
    assert "with another decoder" in capsys.readouterr().err
    biflow.save(random_flow(flow[0].model), tmp_path / "plain.safetensors")
    assert sample(tmp_path / "plain.safetensors", "--vae", place / "vae") == 2
    assert "expected a model trained on latents" in capsys.readouterr().err
    assert sample(flow[1], "--out", tmp_path / "grid.png") == 2
    assert "--vae with the autoencoder" in capsys.readouterr().err
    assert cli.main(["inpaint", str(flow[1]), "--half", "left", "--out", str(tmp_path / "grid.png")]) == 2
    assert "expected a file ending in .npz for latents of 4 channels" in capsys.readouterr().err


# --- memory -----------------------------------------------------------------------------------------------------------


def peak(work):
    """Most bytes that torch's CPU allocator had given out at once beyond those at the start, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_memory_of_decoding_is_bounded_by_the_configuration(place):
    """The same for 4 and 24 latents, more with a larger batch, and less with tiles for a large latent."""
    model = vae.load(str(place / "vae"))
    generator = torch.Generator().manual_seed(0)

    def decoding(count, side, batch, tile):
        z = torch.randn(count, 4, side, side, generator=generator)
        return peak(lambda: [None for _ in vae.decode(model, z, batch_size=batch, tile=tile)])

    few, many = decoding(4, 16, 2, 64), decoding(24, 16, 2, 64)
    assert few > 2 * 3 * 32 * 32 * 4
    assert many <= 1.02 * few
    assert decoding(8, 16, 8, 64) > 3 * few
    whole, tiled = decoding(1, 96, 1, 96), decoding(1, 96, 1, 16)
    assert tiled < 0.35 * whole
    assert decoding(6, 96, 1, 16) <= 1.02 * tiled


def test_tiles_make_nearly_the_same_image(place):
    model = vae.load(str(place / "vae"))
    z = torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(0))
    whole, tiled = (next(iter(vae.decode(model, z, tile=tile))).float() for tile in (48, 24))
    assert whole.shape == tiled.shape == (1, 3, 96, 96)
    assert (whole - tiled).abs().mean() < 0.1 * whole.std()
    for tile, batch in ((6, 1), (10, 1), (8, 0)):
        with pytest.raises(ValueError, match="expected a batch of at least 1 and a tile of 8, 12, 16"):
            next(iter(vae.decode(model, z, tile=tile, batch_size=batch)))
    with pytest.raises(ValueError, match="expected 4 channels as the autoencoder has, got 3"):
        next(iter(vae.decode(model, z[:, :3])))


def test_decoded_images_are_written_as_they_come(tmp_path):
    from biflow.cli.common import write_bytes_npz

    parts = [torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8) for n in (2, 2, 1)]
    write_bytes_npz(iter(parts), 5, torch.arange(5), tmp_path / "a.npz")
    found = np.load(io.BytesIO((tmp_path / "a.npz").read_bytes()))
    assert np.array_equal(found["images"], torch.cat(parts).permute(0, 2, 3, 1).numpy())
    assert found["labels"].tolist() == [0, 1, 2, 3, 4]
