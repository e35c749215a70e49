"""Sample grids of models of latents, seen through their autoencoder."""

import re
import shutil

import numpy as np
import pytest
import tiny_latents
import torch
from tiny_training import changed, interrupted, inverse_config, same_weights

import biflow
from biflow import cli, data, latents, train
from biflow.train import grids
from biflow.train.perceptual import Pixels

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'biflow[latents]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_latents.make_place(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def finished(place):
    """A run of 8 steps with checkpoints and grids every 4."""
    config = tiny_latents.configured(place, steps=8)
    config = changed(config, "run", sample_every=4, sample_images=6, sample_vae=str(place / "vae"))
    return config, place / "flow", train.train_flow(config, place / "flow", progress=False)


def test_a_grid_is_what_the_autoencoder_makes_of_what_the_model_samples(place, finished, tmp_path, monkeypatch):
    config, _, model = finished
    rows = []
    monkeypatch.setattr(grids.plots, "save_grid", lambda images, path: rows.extend(images))
    grids.draw(model, config.run, tmp_path, 8, grids.pixels_of(config.run, data.load(config.data)))
    assert [tuple(row.shape) for row in rows] == [(3, 3, 16, 16)] * 2
    y, generator = torch.arange(6) % 2, torch.Generator().manual_seed(grids.SEED)
    z = (
        model.sample(6, y, guidance=1.0, generator=generator) * 2.0 + 0.1
    )  # what `tiny_latents` divides by and takes off
    autoencoder = latents.load(str(place / "vae"))
    want = autoencoder.decode(z).sample.clamp(-1, 1)
    assert want.std() > 0.05
    assert (torch.cat(rows) - want).abs().max() <= 0.5 / 127.5 + 1e-5


def test_it_is_the_picture_of_the_command(finished, place, tmp_path):
    """`biflow sample` of as many draws the same noise by the same seed."""
    out = finished[1]
    words = ["--n", "6", "--seed", str(grids.SEED), "--vae", str(place / "vae"), "--out", str(tmp_path / "drawn.npz")]
    assert cli.main(["sample", str(out), *words]) == 0
    drawn = torch.from_numpy(np.load(tmp_path / "drawn.npz")["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    grids.plots.save_grid(drawn.split(3), tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes() == (out / "samples/step_00000008.png").read_bytes()


def test_grids_change_nothing_and_the_autoencoder_may_change_on_resume(finished, place, tmp_path):
    config, out, model = finished
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["step_00000004.png", "step_00000008.png"]
    plain = changed(config, "run", sample_every=None, sample_vae=None)
    assert same_weights(train.train_flow(plain, tmp_path / "run", progress=False), model)
    shutil.copytree(place / "vae", tmp_path / "moved" / "vae")
    copy = interrupted(out, tmp_path, 4)
    (copy / "samples/step_00000008.png").unlink()
    moved = changed(config, "run", sample_vae=str(tmp_path / "moved"))  # a pipeline with the same one in vae/
    assert same_weights(train.train_flow(moved, copy, resume=True, progress=False), model)
    assert (copy / "samples/step_00000008.png").read_bytes() == (out / "samples/step_00000008.png").read_bytes()


def test_an_inverse_is_drawn_too(place, finished, tmp_path):
    config = changed(inverse_config(place / "latents", steps=2), "model", in_channels=4)
    config = changed(config, "run", sample_every=2, sample_images=4, sample_vae=str(place / "vae"))
    train.train_inverse(config, finished[2], tmp_path / "run", progress=False)
    assert (tmp_path / "run/samples/step_00000002.png").stat().st_size > 0


def test_it_is_loaded_once_decodes_a_few_at_once_and_leaves_the_device(place, finished, tmp_path, monkeypatch):
    loaded, sizes, moves = [], [], []
    load, decode, move = latents.load, latents.autoencoder._bytes, Pixels.to
    monkeypatch.setattr(latents, "load", lambda *args: loaded.append(args) or load(*args))
    monkeypatch.setattr(
        latents.autoencoder, "_bytes", lambda vae, z, *args: sizes.append(len(z)) or decode(vae, z, *args)
    )
    monkeypatch.setattr(Pixels, "to", lambda self, device: moves.append(str(device)) or move(self, device))
    config = changed(finished[0], "run", sample_images=9)
    train.train_flow(config, tmp_path / "run", progress=False)
    assert loaded == [(str(place / "vae"),)]  # to the CPU
    assert sizes == [4, 4, 1] * 2
    assert moves == ["cpu", "cpu"] * 2  # to where the model is, and back
    monkeypatch.setattr(latents.autoencoder, "_bytes", lambda *args: 1 / 0)
    moves.clear()
    with pytest.raises(ZeroDivisionError):
        grids.draw(finished[2], config.run, tmp_path, 1, grids.pixels_of(config.run, data.load(config.data)))
    assert len(moves) == 2


def test_another_autoencoder_is_refused_before_the_folder_is_made(place, finished, tmp_path):
    other = tiny_latents.write_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="expected the autoencoder that made the latents"):
        train.train_flow(changed(finished[0], "run", sample_vae=other), tmp_path / "run", progress=False)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        train.train_flow(changed(finished[0], "run", sample_vae="./none"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    np.savez(tmp_path / "latents.npz", images=np.zeros((20, 8, 8, 4), np.float32), labels=np.arange(20) % 2)
    arrays = changed(finished[0], "data", source=str(tmp_path / "latents.npz"))
    with pytest.raises(ValueError, match=re.escape("run.sample_vae: expected data made by `biflow latents encode`")):
        train.train_flow(arrays, tmp_path / "run", progress=False)
    without_grids = changed(finished[0], "run", sample_every=None, sample_vae=other)
    assert isinstance(train.train_flow(without_grids, tmp_path / "run", progress=False), biflow.TarFlow)
