"""Encoded images: crops, every kind of source, what stands in for corrupt images, workers, class maps, lists."""

import dataclasses
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import data_sets
import every_image
import numpy as np
import pytest
import torch
from PIL import Image

import biflow
from biflow import data as datasets
from biflow import files
from biflow.data import DataConfig, Stream, encoded
from biflow.data.decode import crop_numbers, decode
from biflow.train.optim import DataOrder

CORRUPT = (7, 20, 23)


def images(count=60, corrupt=CORRUPT, classes=data_sets.CLASSES, side=10):
    rng = np.random.RandomState(0)
    whole = [data_sets.numbered_png(i, side, rng) for i in range(count)]
    return [(i % classes, data_sets.spoiled(data, i) if i in corrupt else data) for i, data in enumerate(whole)]


@pytest.fixture(params=data_sets.KINDS)
def source(request, tmp_path):
    """(kind, path) of a set of 60 images of which three are corrupt."""
    if request.param == "table":
        pytest.importorskip("datasets")
    return request.param, str(data_sets.WRITERS[request.param](tmp_path / "set", images()))


def folder(tmp_path, **options):
    return str(data_sets.write_folder(tmp_path / "set", images(**options)))


def config(path, **fields):
    return DataConfig(**{"source": str(path), "img_size": 8, "val_fraction": 0.0, **fields})


def read(data, steps, start=0, seed=1):
    order = DataOrder(len(data.train_x), 16, seed=0)
    stream = Stream(data.train_x, order.indices, steps, seed=seed)
    batches = [stream.read(step) for step in range(start, steps)]
    stream.close()
    return batches


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x.pixels, y.pixels) and torch.equal(x.indices, y.indices) and x.replaced == y.replaced
        for x, y in zip(a, b, strict=True)
    )


# --- crops ----------------------------------------------------------------------------------------------------------


def resized(image, side):
    """ADM: halved by boxes while twice the side fits, then bicubic."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return np.array(image.resize([round(x * scale) for x in image.size], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(40, 30), (33, 131), (16, 16), (8, 8), (5, 9), (7, 5)])
def test_crops_are_those_of_adm(size):
    rng = np.random.RandomState(0)
    image = Image.fromarray(rng.randint(0, 256, (size[1], size[0], 3), np.uint8))
    data = data_sets.encode(np.array(image))
    whole = resized(image, 8)
    top, left = (whole.shape[0] - 8) // 2, (whole.shape[1] - 8) // 2
    assert np.array_equal(decode(data, 3, 8).transpose(1, 2, 0), whole[top : top + 8, left : left + 8])
    sides = range(8, math.ceil(8 / 0.8) + 1)
    for share in (0.0, 0.4, 0.999999):
        for y, x in ((0.0, 0.999999), (0.5, 0.3)):
            whole = resized(image, sides[int(share * len(sides))])
            top, left = int(y * (whole.shape[0] - 7)), int(x * (whole.shape[1] - 7))
            want = whole[top : top + 8, left : left + 8]
            assert np.array_equal(decode(data, 3, 8, (share, y, x)).transpose(1, 2, 0), want)


def test_numbers_of_crops_never_change():
    """A run that is resumed with a newer biflow, Python or NumPy sees the same crops."""
    assert crop_numbers(0, 0, 0) == (0.8444218515250481, 0.7579544029403025, 0.420571580830845)
    assert crop_numbers(3, 7, 9) == crop_numbers(3, 7, 9)
    many = np.array([crop_numbers(s, t, p) for s in range(3) for t in range(20) for p in range(100)])
    assert len(np.unique(many)) == many.size
    assert np.abs(many.mean(0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(many.T) - np.eye(3)).max() < 0.05


def test_random_crops_are_for_training_alone(tmp_path):
    data = datasets.load(config(folder(tmp_path, corrupt=(), side=16), crop="random", val_fraction=0.2))
    centre = datasets.load(config(tmp_path / "set", val_fraction=0.2))
    assert torch.equal(data.val_x.batch(), centre.val_x.batch())
    assert torch.equal(data.train_x.batch(), centre.train_x.batch())  # as evaluation reads them
    batches = read(data, 6)
    drawn = {}
    for batch in batches:
        for index, pixels in zip(batch.indices.tolist(), batch.pixels, strict=True):
            drawn.setdefault(index, []).append(pixels)
    assert any(not torch.equal(some[0], some[1]) for some in drawn.values() if len(some) > 1)  # each epoch anew
    assert same(read(data, 6), batches)
    assert not same(read(data, 6, seed=2), batches)


def test_images_are_turned_and_made_gray_or_rgb(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    assert decode(data_sets.encode(pixels, exif=exif), 3, 8)[0, :, 0].tolist() == [255] * 4 + [0] * 4
    transparent = np.dstack([pixels, np.zeros((8, 8), np.uint8)])
    assert np.array_equal(decode(data_sets.encode(transparent), 3, 8), pixels.transpose(2, 0, 1))
    assert decode(data_sets.encode(pixels), 1, 8).shape == (1, 8, 8)


# --- every kind of source -------------------------------------------------------------------------------------------


def test_a_set_is_the_same_from_every_source(source):
    kind, path = source
    data = datasets.load(config(path))
    assert (data.channels, data.img_size, data.num_classes, data.levels) == (3, 8, 3, 256)
    assert data.class_names == (("0", "1", "2") if kind == "shards" else ("class0", "class1", "class2"))
    want = [torch.from_numpy(decode(data, 3, 8).copy()) for _, data in images(corrupt=())]
    name = data_sets.names(kind, images())
    positions = {data.train_x.decoder.name(i): i for i in range(60)}
    pixels = datasets.images.BYTES.values(torch.stack(want))
    x = data.train_x.batch()
    for i in set(range(60)) - set(CORRUPT):
        assert torch.equal(x[positions[name[i]]], pixels[i])
        assert data.train_y[positions[name[i]]] == i % 3


def test_the_next_image_of_the_class_stands_in_and_is_counted(source, capsys):
    kind, path = source
    data = datasets.load(config(path))
    assert len(data.train_x) == 60  # the order of an epoch does not depend on what is corrupt
    name = data_sets.names(kind, images())
    positions = {data.train_x.decoder.name(i): i for i in range(60)}
    x = data.train_x.batch()
    for i, other in ((7, 10), (20, 26), (23, 26)):  # 23 is the next of the class of 20, and corrupt itself
        assert torch.equal(x[positions[name[i]]], x[positions[name[other]]])
    assert data.corrupt.reasons.keys() == {name[i] for i in CORRUPT}
    err = capsys.readouterr().err
    assert all(f"{name[i]}: " in err for i in CORRUPT)
    data.train_x.batch()
    assert capsys.readouterr().err == ""  # told of once
    alone = datasets.load(config(path))
    alone.train_x.batch(torch.tensor([positions[name[20]]]))
    assert alone.corrupt.reasons.keys() == {name[20], name[23]}  # also what could not stand in
    first, second = read(data, 60 * 2 // 16)[:4], read(datasets.load(config(path)), 4)
    assert same(first, second)  # whether held in memory or not
    assert sum(batch.replaced for batch in first) in (3, 4)  # the last batch runs into the next epoch


def test_workers_and_resuming_change_no_bit(source):
    for crop in ("center", "random"):
        whole = read(datasets.load(config(source[1], crop=crop)), 8)
        data = datasets.load(config(source[1], crop=crop, workers=2))
        assert same(read(data, 8), whole)
        assert len(data.corrupt) == 3
        assert same(read(datasets.load(config(source[1], crop=crop, workers=1)), 8, start=5), whole[5:])
        assert same(read(datasets.load(config(source[1], crop=crop)), 8, start=5), whole[5:])


def test_jumps_and_the_cache_change_no_bit(tmp_path, monkeypatch):
    path = folder(tmp_path)
    whole = read(datasets.load(config(path)), 12)
    monkeypatch.setattr(encoded, "CACHE_BYTES", 60 * 3 * 64 - 1)
    bare = datasets.load(config(path))
    assert not bare.train_x.held
    assert same(read(bare, 12), whole)
    assert not bare.train_x.held
    monkeypatch.undo()
    for workers in (0, 2):
        data = datasets.load(config(path, workers=workers))
        stream = Stream(data.train_x, DataOrder(60, 16, seed=0).indices, 12)
        assert same(
            [stream.read(step) for step in (3, 4, 0, 1, 2, 3, 4, 11)], [whole[i] for i in (3, 4, 0, 1, 2, 3, 4, 11)]
        )
        stream.close()


def test_loading_decodes_nothing(tmp_path, monkeypatch):
    path = folder(tmp_path)
    monkeypatch.setattr(encoded, "decode", None)
    assert len(datasets.load(config(path)).train_x) == 60


@pytest.fixture(params=["fork", "forkserver"])
def start_method(request):
    """How Python starts processes: "fork" before 3.14, "forkserver" from there on."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_workers_ignore_what_stops_a_run(start_method, tmp_path, monkeypatch):
    masks, tasks = [], datasets.stream._Sampler.__iter__

    def before_the_fork(sampler):
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return tasks(sampler)

    monkeypatch.setattr(datasets.stream._Sampler, "__iter__", before_the_fork)
    data = datasets.load(config(folder(tmp_path), workers=1))
    stream = Stream(data.train_x, DataOrder(60, 16, seed=0).indices, 100)
    stream.read(0)
    assert masks[0] >= {signal.SIGINT, signal.SIGTERM}  # from a worker's first moment
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}
    worker = stream._ready._workers[0]
    for number in ("INT", "TERM"):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)  # from another process
    for step in range(1, 40):
        stream.read(step)
    assert worker.is_alive()
    datasets.stream._close_all()  # when Python exits
    worker.join(20)
    assert not worker.is_alive()


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_stream_that_nobody_closed_ends_with_python(method, tmp_path):
    """Also where libraries have threads that block no signal."""
    script = (
        "import multiprocessing, sys\n"
        "from biflow.data import DataConfig, Stream, load\n"
        "from biflow.train.optim import DataOrder\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method(sys.argv[1])\n"
        "    data = load(DataConfig(source=sys.argv[2], img_size=8, val_fraction=0.0, workers=1))\n"
        "    stream = Stream(data.train_x, DataOrder(60, 16, seed=0).indices, 100)\n"
        "    kept = [stream, stream.read(0)]\n"
        "    kept.append(kept)\n"
    )
    (tmp_path / "leave.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(biflow.__file__).parents[1])}
    words = [sys.executable, str(tmp_path / "leave.py"), method, str(folder(tmp_path, corrupt=()))]
    subprocess.run(words, check=True, timeout=120, env=environment)


def test_the_global_generator_is_left_alone(tmp_path):
    before = torch.get_rng_state()
    read(datasets.load(config(folder(tmp_path), workers=1)), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_fault_of_an_image_stops_the_run(workers, tmp_path):
    path = folder(tmp_path, corrupt=())
    data = datasets.load(config(path, workers=workers))
    for k in range(3):
        for file in (tmp_path / "set" / f"class{k}").iterdir():
            file.unlink()
    with pytest.raises(FileNotFoundError, match=r"class\d/0") as error:
        read(data, 4)
    assert "Traceback" not in str(error.value)  # the same words whether a worker met it or not


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_an_image_that_can_be_decoded_is_an_error(workers, tmp_path):
    path = folder(tmp_path, corrupt=range(1, 60, 3))
    reason = r"^class1/0000\d\d\.png: expected at least one image of class 1 that can be decoded, got none"
    with pytest.raises(ValueError, match=reason):
        read(datasets.load(config(path, workers=workers)), 4)
    with pytest.raises(ValueError, match="expected an image that Pillow can decode, got none in 60 files"):
        datasets.load(config(data_sets.write_folder(tmp_path / "all", [(0, b"no image")] * 60)))


def test_many_corrupt_images_are_told_of_in_few_lines(tmp_path, capsys, monkeypatch):
    data = datasets.load(config(folder(tmp_path, corrupt=range(0, 60, 2))))
    data.train_x.batch()
    assert len(data.corrupt) == 30
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1].endswith("further ones are only counted")
    data.corrupt.write(tmp_path / "corrupt.txt")
    data.corrupt.write(tmp_path / "corrupt.txt")  # nothing twice
    assert sorted(encoded.listed(tmp_path / "corrupt.txt")) == sorted(data.corrupt.reasons)
    kept = (tmp_path / "corrupt.txt").read_bytes()
    data.corrupt.add("class0/new.png", "empty")

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        data.corrupt.write(tmp_path / "corrupt.txt")
    assert (tmp_path / "corrupt.txt").read_bytes() == kept


def needs(kind):
    if kind in ("table", "latents"):
        pytest.importorskip({"table": "datasets", "latents": "diffusers"}[kind])


@pytest.mark.parametrize("kind", every_image.KINDS)
def test_every_image_once_an_epoch(kind, tmp_path):
    needs(kind)
    every_image.check(kind, tmp_path, 400, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", every_image.KINDS)
def test_every_image_once_an_epoch_of_many(kind, tmp_path):
    needs(kind)
    every_image.check(kind, tmp_path, 20_000, 2)


# --- what is left out, classes, channels ----------------------------------------------------------------------------


def test_images_are_left_out_by_a_list(source, tmp_path, capsys):
    kind, path = source
    name = data_sets.names(kind, images())
    listed = tmp_path / "bad.txt"
    listed.write_text("# found by a check\n" + "".join(f"{name[i]}\treason\n" for i in CORRUPT) + "gone.png\n\n")
    data = datasets.load(config(path, exclude=str(listed)))
    assert len(data.train_x) == 57
    assert "3 images are left out" in (err := capsys.readouterr().err)
    assert "1 of its names are not in the data" in err
    data.train_x.batch()
    assert len(data.corrupt) == 0
    assert data.train_y.bincount().tolist() == [20, 19, 18]
    assert data.fingerprint != datasets.load(config(path)).fingerprint
    if kind == "folder":
        listed.write_text("class1\n")
        data = datasets.load(config(path, exclude=str(listed)))
        assert (data.train_y.bincount().tolist(), data.num_classes) == ([20, 0, 20], 3)
    with pytest.raises(FileNotFoundError, match=r"data\.exclude"):
        datasets.load(config(path, exclude=str(tmp_path / "none.txt")))
    listed.write_text("\n".join(name))
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        datasets.load(config(path, exclude=str(listed)))


def test_class_maps(tmp_path):
    path = folder(tmp_path, corrupt=())
    text, mapping = tmp_path / "names.txt", tmp_path / "map.json"
    text.write_text("class2\nclass9\nclass0\nclass1\n")
    mapping.write_text('{"class0": 2, "class9": 1, "class1": 3, "class2": 0}')
    for file in (text, mapping):
        data = datasets.load(config(path, classes=str(file)))
        assert (data.class_names, data.num_classes) == (("class2", "class9", "class0", "class1"), 4)
        assert data.train_y.tolist() == [2] * 20 + [3] * 20 + [0] * 20
    text.write_text("class0\nclass1\n")
    with pytest.raises(ValueError, match=r"class2/000002\.png: expected one of the 2 classes of .*names.txt"):
        datasets.load(config(path, classes=str(text)))
    for content, reason in (
        ('{"class0": 1, "class1": 2}', "the numbers 0 ... K - 1"),
        ('{"class0": 0, "class1": 0}', "each once"),
        ('{"class0": true}', "numbers"),
        ("[]", "expected names"),
        ("{", "expected a name a line"),
    ):
        mapping.write_text(content)
        with pytest.raises(ValueError, match=reason):
            datasets.load(config(path, classes=str(mapping)))
    text.write_text("a\nb\na\n")
    with pytest.raises(ValueError, match="'a' twice"):
        datasets.load(config(path, classes=str(text)))
    with pytest.raises(FileNotFoundError, match=r"data\.classes"):
        datasets.load(config(path, classes="none.txt"))
    with pytest.raises(ValueError, match="classes: expected None with images without labels"):
        datasets.load(config(f"{path}/class0", classes=str(text)))


def test_a_colour_image_in_a_gray_set(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "LOOKED_AT", 3)
    for i in range(6):
        Image.new("RGB" if i == 1 else "L", (8, 8), 50).save(tmp_path / f"{i}.png")
    data = datasets.load(config(tmp_path))
    assert data.channels == 1
    with pytest.raises(ValueError, match=r"1\.png: expected a gray image .* got RGB; data\.channels"):
        data.train_x.batch()
    assert datasets.load(config(tmp_path, channels=1)).train_x.batch().shape == (6, 1, 8, 8)
    assert datasets.load(config(tmp_path, channels=3)).train_x.batch().shape == (6, 3, 8, 8)


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop", "random"), ("channels", 1), ("classes", "a.txt"), ("exclude", "a.txt"), ("split", "test"),
     ("image_key", "jpg"), ("label_key", "cls"), ("index", "a.npz")],
)  # fmt: skip
def test_fields_of_other_sources_are_refused(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"{field}: expected .* with digits"):
        datasets.load(DataConfig(**{field: value}))
    if field in ("split", "image_key", "label_key", "index"):
        with pytest.raises(ValueError, match=rf"{field}: expected None .* \(it is for .*\)"):
            datasets.load(dataclasses.replace(config(folder(tmp_path)), **{field: value}))


@pytest.mark.parametrize(("field", "value"), [("crop", "left"), ("channels", 2), ("workers", -1)])
def test_configuration_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected"):
        DataConfig(**{field: value})


# --- Hugging Face datasets ------------------------------------------------------------------------------------------


@pytest.fixture
def library():
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    return found


def table(library, count=6, **columns):
    features = {"image": library.Image(), **{name: feature for name, (feature, _) in columns.items()}}
    values = {"image": [{"bytes": d, "path": None} for _, d in images(count, ())]}
    values |= {name: found for name, (_, found) in columns.items()}
    return library.Dataset.from_dict(values, features=library.Features(features))


def test_saved_splits_and_parquet(library, tmp_path, monkeypatch):
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    labels = (library.Value("int64"), [0, 1, 2, 0, 1, 2])
    whole = table(library, label=labels)
    library.DatasetDict({"train": whole, "test": whole.select([4, 1])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    whole.to_parquet(str(tmp_path / "parquet" / "data" / "train-00000.parquet"))
    want = datasets.load(config(tmp_path / "splits"))
    assert (want.class_names, want.train_y.tolist()) == (("0", "1", "2"), [0, 1, 2, 0, 1, 2])
    for path in ("parquet", "parquet/data/train-00000.parquet"):
        found = datasets.load(config(tmp_path / path))
        assert torch.equal(found.train_x.batch(), want.train_x.batch())
        assert torch.equal(found.train_y, want.train_y)
    assert torch.equal(
        datasets.load(config(f"hf:{tmp_path}/parquet")).train_x.batch(), want.train_x.batch()
    )  # what the library finds there
    pandas = pytest.importorskip("pandas")  # a parquet file of another program has no word of images
    rows = [{"image": {"bytes": data, "path": ""}, "label": k} for k, data in images(6, ())]
    pandas.DataFrame(rows).to_parquet(tmp_path / "foreign.parquet")
    found = datasets.load(config(tmp_path / "foreign.parquet"))
    assert torch.equal(found.train_x.batch(), want.train_x.batch())
    with pytest.raises(ValueError, match="images of every class, got none of class 0 below 1"):
        datasets.load(config(tmp_path / "splits", split="test", label_key="label"))
    (tmp_path / "names.txt").write_text("0\n1\n2\n")
    test = datasets.load(config(tmp_path / "splits", split="test", classes=str(tmp_path / "names.txt")))
    assert torch.equal(test.train_x.batch(), want.train_x.batch(torch.tensor([4, 1])))
    with pytest.raises(ValueError, match=r"data\.split: expected one of train, test, got 'val'"):
        datasets.load(config(tmp_path / "splits", split="val"))


def test_columns(library, tmp_path):
    names = (library.Value("string"), ["ox", "cat", "ox", "bee", "bee", "ox"])
    coarse = (library.ClassLabel(names=["small", "large"]), [1, 0, 1, 0, 0, 1])
    table(library, kind=names, size=coarse, view=(library.Image(), [None] * 6)).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"image_key: expected one of the columns of images, \['image', 'view'\]"):
        datasets.load(config(tmp_path / "set"))
    data = datasets.load(config(tmp_path / "set", image_key="image"))
    assert (data.class_names, data.train_y.tolist()) == (("small", "large"), [1, 0, 1, 0, 0, 1])
    data = datasets.load(config(tmp_path / "set", image_key="image", label_key="kind"))
    assert (data.class_names, data.train_y.tolist()) == (("bee", "cat", "ox"), [2, 1, 2, 0, 0, 2])
    for field in ("image_key", "label_key"):
        with pytest.raises(ValueError, match=f"{field}: expected one of .* got 'none'"):
            datasets.load(dataclasses.replace(config(tmp_path / "set", image_key="image"), **{field: "none"}))
    with pytest.raises(ValueError, match="got none in 6 files"):
        datasets.load(config(tmp_path / "set", image_key="view"))
    with pytest.raises(ValueError, match=r"data\.split: expected None for a folder of one split"):
        datasets.load(config(tmp_path / "set", image_key="image", split="train"))


def test_a_data_set_out_of_reach(library, tmp_path, monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(library, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"hf:owner/name: .* in the cache or within reach; no network"):
        datasets.load(config("hf:owner/name"))
    with pytest.raises(FileNotFoundError, match=r"none\.parquet: no such file"):
        datasets.load(config(tmp_path / "none.parquet"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="expected a data set that Hugging Face datasets can read"):
        datasets.load(config(tmp_path / "saved"))


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"biflow\[data\]"):
        datasets.load(config("hf:owner/name"))
