"""Training on encoded images: resuming bit for bit with corrupt images and workers, what is told of them."""

import dataclasses
import json
import shutil

import data_sets
import kill_resume
import numpy as np
import pytest
import torch
from tiny_representation import aligned
from tiny_training import changed, flow_config, interrupted, same_weights

from biflow import cli, train
from biflow import data as datasets
from biflow.data import encoded
from biflow.train import optim, trainer

CORRUPT = (4, 17, 31)


def write(folder, count=60):
    """8x8 images of two classes, three of them corrupt."""
    rng = np.random.RandomState(0)
    images = []
    for i in range(count):
        pixels = rng.randint(0, 60, (8, 8))
        pixels[:, :4] += 180 * (i % 2)
        data = data_sets.encode(pixels.astype(np.uint8))
        images.append((i % 2, data_sets.spoiled(data, i) if i in CORRUPT else data))
    return data_sets.write_folder(folder, images)


def configured(path, steps=20, every=5, **fields):
    config = flow_config(path, steps=steps, every=every, keep=10)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, img_size=8, **fields))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 20 steps with random crops and no workers."""
    path, out = write(tmp_path_factory.mktemp("data") / "set"), tmp_path_factory.mktemp("run") / "flow"
    config = configured(path, crop="random")
    return config, out, train.train_flow(config, out, progress=False)


def with_workers(config, workers):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))


@pytest.mark.parametrize(("step", "workers"), [(10, 2), (0, 2), (15, 0)])
def test_resuming_within_an_epoch_changes_no_bit(step, workers, finished, tmp_path, capsys):
    out = interrupted(finished[1], tmp_path, step)
    resumed = train.train_flow(with_workers(finished[0], workers), out, resume=True, progress=False)
    assert same_weights(resumed, finished[2])
    assert kill_resume.metrics(out) == kill_resume.metrics(finished[1])


def test_corrupt_images_are_told_of_counted_and_listed(finished, tmp_path, capsys):
    config, out, _ = finished
    assert sorted(encoded.listed(out / "corrupt.txt")) == [
        "class0/000004.png",
        "class1/000017.png",
        "class1/000031.png",
    ]
    images = datasets.load(config.data).train_x
    order = optim.DataOrder(len(images), 16, config.run.seed)
    bad = torch.tensor([int(images.decoder.name(i)[-10:-4]) in CORRUPT for i in range(len(images))])
    want = [
        float(sum(bad[order.indices(step)].sum() for step in range(start, start + 5))) / 5 for start in (0, 5, 10, 15)
    ]
    assert [line["replaced"] for line in kill_resume.metrics(out) if line["split"] == "train"] == pytest.approx(want)
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, exclude=str(out / "corrupt.txt")))
    train.train_flow(without, tmp_path / "again", progress=False)
    assert "3 images are left out" in capsys.readouterr().err
    assert not (tmp_path / "again" / "corrupt.txt").exists()


def test_the_bits_are_those_of_the_same_images_in_memory(tmp_path):
    """A folder without corrupt images trains as a .npz of the same pixels does."""
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (40, 8, 8)).astype(np.uint8)
    labels = np.arange(40) % 2
    order = np.argsort(labels, kind="stable")  # a folder is read class by class
    path = data_sets.write_folder(
        tmp_path / "set", [(int(k), data_sets.encode(x)) for x, k in zip(pixels, labels, strict=True)]
    )
    np.savez(tmp_path / "set.npz", images=pixels[order], labels=labels[order])
    one = train.train_flow(configured(path, steps=6), tmp_path / "a", progress=False)
    other = train.train_flow(flow_config(tmp_path / "set.npz", steps=6, every=5), tmp_path / "b", progress=False)
    assert same_weights(one, other)


def test_a_run_does_not_go_on_with_other_images(finished, tmp_path):
    path = tmp_path / "set"
    shutil.copytree(finished[0].data.source, path)
    config = configured(path, steps=10)
    train.train_flow(config, tmp_path / "run", progress=False)
    (path / "class0" / "000000.png").rename(path / "class0" / "999999.png")
    with pytest.raises(ValueError, match=r"expected the images of .* that the run began with, got others"):
        train.train_flow(config, tmp_path / "run", resume=True, progress=False)


def test_images_class_map_and_list_may_move(tmp_path):
    """All that a run reads, to the disk of another job."""

    def at(place):
        names = {"exclude": str(tmp_path / place / "out.txt"), "classes": str(tmp_path / place / "classes.txt")}
        return configured(tmp_path / place / "set", steps=6, every=2, **names)

    write(tmp_path / "here" / "set")
    (tmp_path / "here" / "out.txt").write_text("class0/000004.png\nclass1/000017.png\n")
    (tmp_path / "here" / "classes.txt").write_text("class1\nclass0\n")
    calm = train.train_flow(at("here"), tmp_path / "run", progress=False)
    out = interrupted(tmp_path / "run", tmp_path, 2)
    (tmp_path / "here").rename(tmp_path / "there")
    assert same_weights(train.train_flow(at("there"), out, resume=True, progress=False), calm)
    assert kill_resume.metrics(out) == kill_resume.metrics(tmp_path / "run")
    (tmp_path / "there" / "classes.txt").write_text("class0\nclass1\n")
    with pytest.raises(ValueError, match=r"expected the images of .* that the run began with, got others"):
        train.train_flow(at("there"), out, resume=True, progress=False)


def test_cached_features_of_encoded_images_change_no_bit(finished, tmp_path):
    """With flips, corrupt images and workers; another folder, or a file that has changed, has another cache."""
    path, folder = tmp_path / "set", tmp_path / "features"
    shutil.copytree(finished[0].data.source, path)
    plain = aligned(configured(path, steps=8))
    want = train.train_flow(plain, tmp_path / "plain", progress=False)
    for workers in (0, 1):
        config = with_workers(changed(plain, "representation", cache_features=str(folder)), workers)
        found = train.train_flow(config, tmp_path / f"cached{workers}", progress=False)
        assert same_weights(found, want)
        assert kill_resume.metrics(tmp_path / f"cached{workers}")[-1] == kill_resume.metrics(tmp_path / "plain")[-1]
    assert len(list(folder.iterdir())) == 2  # as they are, and mirrored
    (path / "class0" / "000000.png").write_bytes((path / "class0" / "000002.png").read_bytes())
    train.train_flow(config, tmp_path / "changed", progress=False)
    assert len(list(folder.iterdir())) == 4
    with pytest.raises(ValueError, match=r"cache_features: expected false with data\.crop 'random', since every step"):
        changed(config, "data", crop="random")


@pytest.mark.parametrize("kind", data_sets.KINDS)
def test_the_digest_is_of_what_is_read(kind, tmp_path):
    if kind == "table":
        pytest.importorskip("datasets")
    images = [(i % 2, data_sets.numbered_png(i)) for i in range(20)]
    load = lambda path, **fields: datasets.load(datasets.DataConfig(source=str(path), img_size=8, **fields)).train_x  # noqa: E731
    path = data_sets.WRITERS[kind](tmp_path / "a", images)
    want = load(path).digest()
    assert load(path, workers=2).digest() == want
    assert want not in (load(path, seed=1).digest(), load(path, channels=1).digest())
    others = data_sets.WRITERS[kind](tmp_path / "b", [(k, data_sets.numbered_png(99)) for k, _ in images])
    shutil.rmtree(path)
    others.rename(path)
    assert load(path).digest() != want


def test_workers_end_with_the_run(finished, tmp_path, monkeypatch):
    seen = []
    original = trainer.Trainer._train_step

    def step(self):
        original(self)
        seen.extend(self.stream._ready._workers)
        if self.step == 3:
            raise FloatingPointError("stop")

    monkeypatch.setattr(trainer.Trainer, "_train_step", step)
    with pytest.raises(FloatingPointError, match="stop"):
        train.train_flow(with_workers(finished[0], 1), tmp_path / "run", progress=False)
    assert len(seen) == 3
    assert not any(worker.is_alive() for worker in seen)


# --- biflow data check ----------------------------------------------------------------------------------------------


def check(capsys, *arguments):
    assert cli.main(["data", "check", *map(str, arguments), "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", data_sets.KINDS)
def test_check_reads_everything(kind, tmp_path, capsys):
    if kind == "table":
        pytest.importorskip("datasets")
    images = [(i % 3, data_sets.numbered_png(i, 8 + i % 5)) for i in range(40)]
    images[8] = (2, images[5][1])  # the same file twice
    for i in (3, 4, 21):
        images[i] = (images[i][0], data_sets.spoiled(images[i][1], i))
    path, names = data_sets.WRITERS[kind](tmp_path / "set", images), data_sets.names(kind, images)
    report = check(capsys, path, "--workers", "1", "--duplicates", "--out", tmp_path / "bad.txt")
    prefix = "" if kind == "shards" else "class"
    assert report["classes"] == {f"{prefix}0": 12, f"{prefix}1": 12, f"{prefix}2": 13}
    assert {k: report[k] for k in ("kind", "images", "corrupt", "excluded", "duplicates")} == {
        "kind": kind, "images": 37, "corrupt": 3, "excluded": 0, "duplicates": 1,
    }  # fmt: skip
    assert report["duplicate_examples"] == [[names[5], names[8]]]
    assert report["bytes"] == sum(len(data) for _, data in images)
    assert report["sizes"] == {"smallest": [8, 8], "median": [10, 10], "largest": [12, 12]}
    assert report["modes"] == {"RGB": 37}
    assert sorted(encoded.listed(tmp_path / "bad.txt")) == sorted(names[i] for i in (3, 4, 21))
    report = check(capsys, path, f"exclude={tmp_path / 'bad.txt'}")
    assert (report["images"], report["corrupt"], report["excluded"]) == (37, 0, 3)
    assert "duplicates" not in report


def test_check_of_shards_that_are_broken(tmp_path, capsys):
    path = data_sets.write_shards(tmp_path / "set", [(0, data_sets.numbered_png(i)) for i in range(60)])
    (path / "part-0001.tar").write_bytes(b"?" * 2000)
    report = check(capsys, path, "--out", tmp_path / "bad.txt")
    assert (report["images"], report["corrupt"], report["classes"]) == (40, 0, {"0": 40})
    assert report["unreadable_shards"][0].startswith("part-0001.tar: expected an uncompressed tar file")
    assert encoded.listed(tmp_path / "bad.txt") == ["part-0001.tar"]
    assert check(capsys, path, f"exclude={tmp_path / 'bad.txt'}")["unreadable_shards"] == []


def test_check_of_arrays_and_wrong_use(tmp_path, capsys):
    report = check(capsys, "digits")
    assert (report["kind"], report["images"], report["classes"]["8"]) == ("digits", 1797, 174)
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8))
    report = check(capsys, tmp_path / "a.npz")
    assert (report["images"], report["held_out"], report["classes"], report["img_size"]) == (4, 0, None, 8)
    for line, reason in (
        (["none"], "there is no such path"),
        (["digits", "--duplicates"], "expected encoded images"),
        (["digits", "--out", str(tmp_path / "none" / "bad.txt")], "--out: expected an existing folder"),
        (["digits", "colour=1"], "unknown field 'colour'"),
        (["digits", "split=test"], "split: expected None with digits"),
    ):
        assert cli.main(["data", "check", *line]) == 2
        assert reason in capsys.readouterr().err
    assert cli.main(["data", "check", "--help"]) == 0
    assert "  biflow data check" in capsys.readouterr().out.split("Examples:")[1]
