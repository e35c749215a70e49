"""Images to latents by a tiny random AutoencoderKL, and images of what a model of them draws."""

import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_latents
import torch
from peak_memory import peak_bytes
from tiny_latents import COUNT, configured, encode, make_place, read_moments, source
from tiny_training import changed, inverse_config, random_flow

import biflow
from biflow import cli, data, distributed, latents, train
from biflow.data import DataConfig
from biflow.data import latents as stored
from biflow.files import TEMPORARY
from biflow.latents import autoencoder as vae
from biflow.latents.encoding import ChannelMoments

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'biflow[latents]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def moments(place):
    return read_moments(place / "latents")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


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


def test_the_documented_way_to_read_the_format(place, moments, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "latents.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    namespace = {}
    monkeypatch.chdir(place)
    exec(compile(code, "docs/latents.md", "exec"), namespace)
    assert np.array_equal(namespace["moments"], moments[16:])
    assert namespace["labels"].tolist() == [1] * 6
    assert namespace["own"] == {"shift": [0.1] * 4, "scale": [2.0] * 4}


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
    found = sum((ChannelMoments.of(part) for part in z[1:].split(2)), ChannelMoments.of(z[:1]))
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


def test_rounding_above_the_posteriors_own_noise_is_told_of(place, tmp_path, monkeypatch, capsys):
    own, small = vae.encode, torch.tensor([1.0, 1e-6]).view(2, 1, 1, 1)
    monkeypatch.setattr(vae, "encode", lambda *a: own(*a) * small)
    report = encode(place, tmp_path / "half", dtype="fp16")
    assert report["rounding"] > report["posterior_std"]
    assert "fp16 changes the means by" in capsys.readouterr().err


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


def test_another_process_of_the_job_makes_its_files_and_leaves_the_others(place, tmp_path, monkeypatch):
    class Second(distributed.Processes):
        def wait(self):
            """Nobody else is there."""

        def same(self, value):
            return value

    out = tmp_path / "latents"
    shutil.copytree(place / "latents", out)
    for shard in out.glob("*.safetensors"):
        shard.unlink()
    (out / f"{TEMPORARY}train-00000").write_text("what the first process is writing")
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "join", lambda device: Second(1, 2, torch.device(device)))
        assert encode(place, out) is None
    found = {path.name for path in out.iterdir()}
    assert found == {f"{TEMPORARY}train-00000", "latents.json", "train-00001.safetensors"}
    encode(place, out)
    assert contents(out) == contents(place / "latents")


def test_an_interrupted_command_says_how_it_goes_on(place, tmp_path, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(vae, "encode", stop)
    words = ["latents", "encode", place / "images", "--vae", place / "vae", "--img-size", 16, "--out", tmp_path / "out"]
    assert cli.main([*map(str, words), "--quiet"]) == 130
    assert "stopped at 0 of 22 images; the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
def encode_with(threads, *given):
    torch.set_num_threads(threads)  # the last bits of convolutions depend on it
    encode(*given)


def test_a_killed_process_loses_a_shard_at_most(place, tmp_path):
    given = (torch.get_num_threads(), place, tmp_path / "out")
    process = multiprocessing.get_context("spawn").Process(target=encode_with, args=given)
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


def test_values_that_are_no_bytes_are_encoded_as_they_are(tmp_path):
    """The digits, 0..16 as x = v / 8 - 1, by an autoencoder of gray images."""
    tiny_latents.write_autoencoder(tmp_path / "vae", in_channels=1, out_channels=1)
    config = latents.EncodingConfig(batch_size=600, mirrored=False, dtype="fp32")
    latents.encode_images(DataConfig(), str(tmp_path / "vae"), tmp_path / "out", config, progress=False)
    x = data.load(DataConfig(val_fraction=0.0)).train_x.batch(torch.arange(5))
    want = vae.encode(vae.load(str(tmp_path / "vae")), x)[:, 0]
    found = data.load(source(tmp_path, "out", posterior="mean")).train_x.batch(torch.arange(5))
    assert torch.allclose(found * 2 + 0.1, want, atol=1e-5)


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


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow(place):
    config = configured(place)
    return config, place / "flow", train.train_flow(config, place / "flow", progress=False)


def sample(run, *words):
    return cli.main(["sample", str(run), *map(str, words)])


def test_from_an_image_folder_to_images(place, tmp_path, capsys):
    """The commands of docs/latents.md; both stages; images in the .npz are those that the autoencoder gives."""
    words = ["latents", "encode", place / "images", "--vae", place / "vae", "--img-size", 16, "--out", tmp_path / "set"]
    assert cli.main([*map(str, words), "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["corrupt"], report["shape"], report["dtype"]) == (COUNT, 2, [4, 8, 8], "fp16")
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
        assert np.abs(found["arr_0"] - bytes_).max() <= 1
        assert found["arr_0"].dtype == np.uint8
        assert found["arr_1"].tolist() == [0, 1, 0, 1, 0]
        assert data.load(DataConfig(source=str(out))).channels == 3
    assert sample(tmp_path / "flow", "--n", 4, "--vae", place / "vae", "--out", tmp_path / "grid.png") == 0
    assert (tmp_path / "grid.png").stat().st_size > 1000
    words = ["distill", "digits_inverse", f"data.source={place / 'latents'}", "--flow", tmp_path / "flow", "--out", "x"]
    assert cli.main([*map(str, words)]) == 2
    assert "expected latents normalised as the model's (shift [" in capsys.readouterr().err
    words = ["evaluate", tmp_path / "flow", "--data", place / "latents"]
    assert cli.main([*map(str, words)]) == 2
    assert "the channels of another set have other numbers" in capsys.readouterr().err
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
    assert sample(flow[1], "--vae", place / "vae", "--vae-tile", 10) == 2
    assert "a tile of 8, 12, 16, ...; got 8 and 10" in capsys.readouterr().err
    assert sample(flow[1], "--out", tmp_path / "grid.png") == 2
    assert "--vae with the autoencoder" in capsys.readouterr().err
    assert cli.main(["inpaint", str(flow[1]), "--half", "left", "--out", str(tmp_path / "grid.png")]) == 2
    assert "expected a file ending in .npz for latents of 4 channels" in capsys.readouterr().err


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_of_decoding_is_bounded_by_the_configuration(place):
    """The same for 4 and 24 latents, more with a larger batch, and less with tiles for a large latent."""
    model = vae.load(str(place / "vae"))
    generator = torch.Generator().manual_seed(0)

    def decoding(count, side, batch, tile):
        z = torch.randn(count, 4, side, side, generator=generator)
        return peak_bytes(lambda: [None for _ in vae.decode(model, z, batch_size=batch, tile=tile)])

    few, many = decoding(4, 16, 2, 64), decoding(24, 16, 2, 64)
    assert few > 2 * 3 * 32 * 32 * 4
    assert many <= 1.02 * few
    assert decoding(8, 16, 8, 64) > 3 * few
    whole, tiled = decoding(1, 96, 1, 96), decoding(1, 96, 1, 24)
    assert tiled < 0.35 * whole
    assert decoding(3, 96, 1, 24) <= 1.01 * tiled + 3 * 192 * 192  # beside it the bytes of the image before


def test_tiles_make_nearly_the_same_image(place):
    model = vae.load(str(place / "vae"))
    z = torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(0))
    whole, tiled = (next(iter(vae.decode(model, z, tile=tile))).float() for tile in (48, 24))
    assert whole.shape == tiled.shape == (1, 3, 96, 96)
    assert (whole - tiled).abs().mean() < 0.2 * whole.std()  # each tile has its own GroupNorm and attention
    assert (whole - tiled.flip(-1)).abs().mean() > 0.7 * whole.std()
    for tile, batch in ((6, 1), (10, 1), (8, 0)):
        with pytest.raises(ValueError, match="expected a batch of at least 1 and a tile of 8, 12, 16"):
            vae.decode(model, z, tile=tile, batch_size=batch)
    with pytest.raises(ValueError, match="expected 4 channels as the autoencoder has, got 3"):
        vae.decode(model, z[:, :3])
