"""Data sets: exact pixel values, splits, and errors that name the file."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from biflow import data as datasets
from biflow.data import DataConfig
from biflow.data.adm import NpzImages, write_adm


@pytest.fixture(scope="module")
def digits():
    return datasets.load(DataConfig())


def bytes_npz(tmp_path, **arrays):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


def gray(count=6, side=4):
    return np.random.RandomState(0).randint(0, 256, (count, side, side), dtype=np.uint8)


def test_digits_have_seventeen_exact_values(digits):
    x = digits.train_x.batch()
    assert x.dtype == torch.float32
    assert x.shape[1:] == (1, 8, 8)
    v = (x + 1) * 8
    assert torch.equal(v, v.round())
    assert (v.min(), v.max()) == (0, 16)
    assert (digits.levels, digits.bin_width, digits.num_classes, digits.img_size) == (17, 1 / 8, 10, 8)
    assert digits.class_names[3] == "3"
    some = torch.tensor([5, 0, 5])
    assert torch.equal(digits.train_x.batch(some), x[some])


def test_the_split_is_stratified_seeded_and_complete(digits):
    assert len(digits.train_x) + len(digits.val_x) == 1797
    for k in range(10):
        total = (digits.train_y == k).sum() + (digits.val_y == k).sum()
        assert abs((digits.val_y == k).sum() - 0.1 * total) <= 0.5
    again, other = datasets.load(DataConfig()), datasets.load(DataConfig(seed=1))
    assert torch.equal(again.val_x.pixels, digits.val_x.pixels)
    assert not torch.equal(other.val_y, digits.val_y)
    train, held_out = datasets.images.split_indices(7, torch.tensor([0, 0, 0, 0, 1, 1, 2]), 0.5, 0)
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(7))
    assert 6 in train  # a class of one image stays in training
    assert len(datasets.load(DataConfig(val_fraction=0.0)).val_x) == 0


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"biflow\[train\]"):
        datasets.load(DataConfig())


def test_npz_bytes_are_bin_centres(tmp_path):
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    data = datasets.load(DataConfig(source=str(bytes_npz(tmp_path, images=images)), val_fraction=0.0))
    x = data.train_x.batch()
    assert torch.equal(x, (torch.arange(256.0).reshape(4, 1, 8, 8) + 0.5) * 2 / 256 - 1)
    assert (data.levels, data.bin_width, data.num_classes, data.train_y) == (256, 2 / 256, 0, None)
    edge = 0.5 * data.bin_width  # dequantised, the data fills [-1, 1]
    assert (float(x.min()) - edge, float(x.max()) + edge) == (-1, 1)


def test_npz_colour_floats_and_test_split(tmp_path):
    x = np.linspace(-1, 1, 6 * 4 * 4 * 3).reshape(6, 4, 4, 3)
    y = np.array([0, 1, 2, 0, 1, 2])
    path = bytes_npz(tmp_path, x_train=x[:4], y_train=y[:4], x_test=x[4:], y_test=y[4:].astype(np.uint8))
    data = datasets.load(DataConfig(source=str(path), img_size=4))
    assert torch.equal(data.val_x.batch(), torch.from_numpy(x[4:].transpose(0, 3, 1, 2)).float())
    assert data.val_y.tolist() == [1, 2]
    assert data.val_y.dtype == torch.int64
    assert (data.channels, data.num_classes, data.levels, data.bin_width) == (3, 3, None, None)


LABELS = np.array([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"pictures": gray()}, "expected arrays x_train .* got pictures"),
        ({"images": gray(), "y_train": LABELS}, "expected arrays .* got images, y_train"),
        ({"x_train": gray(), "y_train": LABELS, "y_test": LABELS}, "got y_test alone"),
        ({"x_train": gray(), "y_train": LABELS, "x_test": gray()}, "labels for both"),
        ({"x_train": gray(), "x_test": gray(side=8)}, r"expected x_test like x_train \(1, 4, 4\)"),
        ({"images": gray()[0]}, r"images: expected shape \(N,H,W\)"),
        ({"images": gray()[:, :, :3]}, "at least one square image"),
        ({"images": gray()[:0]}, "at least one square image"),
        ({"images": gray().astype(np.int64)}, "expected uint8, or floating point .* got int64"),
        ({"images": gray().astype(np.float32)}, r"expected values in \[-1, 1\]"),
        ({"images": np.full((2, 4, 4), np.nan)}, r"expected values in \[-1, 1\], got values in \[nan"),
        ({"images": gray(), "labels": LABELS[:5]}, r"labels: expected 6 integers"),
        ({"images": gray(), "labels": LABELS * 1.0}, "labels: expected 6 integers"),
        ({"images": gray(), "labels": LABELS - 1}, "expected labels counted from 0"),
        ({"images": gray(), "labels": LABELS * 2}, "no training image of class 1 below 2"),
        (
            {"x_train": gray(), "y_train": LABELS, "x_test": gray(1), "y_test": LABELS[:1] + 2},
            "y_test: expected labels",
        ),
        ({"images": np.array([{}, None], dtype=object)}, "Object arrays cannot be loaded"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else v[:25],
)
def test_npz_with_wrong_content_is_refused(arrays, reason, tmp_path):
    path = bytes_npz(tmp_path, **arrays)
    with pytest.raises(ValueError, match=reason) as error:
        datasets.load(DataConfig(source=str(path)))
    assert "data.npz" in str(error.value)


def test_broken_and_missing_files_are_refused(tmp_path):
    path = bytes_npz(tmp_path, images=gray())
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"plain text", pickle.dumps({"images": 1})):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"data\.npz: expected a \.npz file of plain arrays"):
            datasets.load(DataConfig(source=str(path)))
    flipped = bytearray(good)
    flipped[good.index(b"NUMPY") + 150] ^= 1  # in the pixels: found by the archive's checksum
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"data\.npz: expected"):
        datasets.load(DataConfig(source=str(path)))
    np.save(tmp_path / "array.npy", gray())
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(ValueError, match="got a single array"):
        datasets.load(DataConfig(source=str(path)))
    for missing in ("none.npz", "none"):
        with pytest.raises(FileNotFoundError, match="none"):
            datasets.load(DataConfig(source=str(tmp_path / missing)))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt: expected 'digits'"):
        datasets.load(DataConfig(source=str(tmp_path / "notes.txt")))


def test_npz_of_another_size_than_configured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected images of the configured img_size 8, got 4"):
        datasets.load(DataConfig(source=str(bytes_npz(tmp_path, images=gray())), img_size=8))
    with pytest.raises(ValueError, match="digits: expected img_size 8"):
        datasets.load(DataConfig(img_size=16))


def make_folder(root, mode="RGB"):
    """Two classes, wide and tall images: the left or upper half dark, so that a centre crop is half dark."""
    for name, size in (("ants", (12, 6)), ("bees", (6, 12))):
        (root / name).mkdir(parents=True)
        for i in range(3):
            image = Image.new(mode, size, "white")
            image.paste("black", (0, 0, size[0] // 2, size[1]) if name == "ants" else (0, 0, size[0], size[1] // 2))
            image.save(root / name / f"{i}.png")
    (root / "ants" / ".hidden.png").write_text("passed over")
    (root / "ants" / "readme.txt").write_text("passed over")
    return root


def test_a_npz_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_adm(tmp_path / "s.npz", [torch.zeros(3, 1, 4, 4)], 3)
    images = NpzImages("~/s.npz")
    assert [batch.shape for batch in images.batches(2)] == [(2, 3, 4, 4), (1, 3, 4, 4)]
    assert len(datasets.load(DataConfig(source="~/s.npz", val_fraction=0.0)).train_x) == 3


def test_folder_with_classes(tmp_path, monkeypatch):
    config = DataConfig(source=str(make_folder(tmp_path / "set")), img_size=6, val_fraction=0.34)
    data = datasets.load(config)
    assert data.class_names == ("ants", "bees")
    assert (data.channels, data.img_size, data.levels) == (3, 6, 256)
    assert (data.train_y.tolist(), data.val_y.tolist()) == ([0, 0, 1, 1], [0, 1])
    x = data.train_x.batch()
    low, high = -1 + 1 / 256, 1 - 1 / 256
    assert torch.equal(x[0, :, :, :3], torch.full((3, 6, 3), low))
    assert torch.equal(x[0, :, :, 3:], torch.full((3, 6, 3), high))
    assert torch.equal(x[2], x[0].transpose(1, 2))
    monkeypatch.setattr(datasets.encoded, "CACHE_BYTES", 0)
    lazy = datasets.load(config)
    assert torch.equal(lazy.train_x.batch(), x)
    assert torch.equal(lazy.val_x.batch(torch.tensor([1])), data.val_x.batch(torch.tensor([1])))
    assert lazy.train_x.batch(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 6, 6)


def test_flat_gray_folder(tmp_path):
    folder = make_folder(tmp_path / "set", "L") / "bees"
    data = datasets.load(DataConfig(source=str(folder), img_size=4, val_fraction=0.0))
    assert (data.channels, data.num_classes, data.train_y, len(data.train_x)) == (1, 0, None, 3)


def test_folders_with_wrong_content_are_refused(tmp_path):
    root = make_folder(tmp_path / "set")
    load = lambda size=6: datasets.load(DataConfig(source=str(root), img_size=size))  # noqa: E731
    with pytest.raises(ValueError, match="expected img_size with encoded images"):
        load(None)
    (root / "cats").mkdir()
    with pytest.raises(ValueError, match=r"cats: expected images .* in every class folder"):
        load()
    Image.new("L", (6, 6)).save(root / "stray.png")
    with pytest.raises(ValueError, match="got both"):
        load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected images .* got none"):
        datasets.load(DataConfig(source=str(tmp_path / "empty"), img_size=6))


def test_what_is_no_image_of_8_bits_is_corrupt(tmp_path):
    root = make_folder(tmp_path / "set")
    (root / "bees" / "8.png").write_bytes((root / "bees" / "0.png").read_bytes()[:60])
    Image.fromarray(np.full((6, 6), 40000, dtype=np.uint16)).save(root / "bees" / "9.png")
    data = datasets.load(DataConfig(source=str(root), img_size=6, val_fraction=0.0))
    x = data.train_x.batch()
    assert torch.equal(x[6:], x[3:4].expand(2, -1, -1, -1))  # the first of the class
    assert "expected an image that Pillow can decode" in data.corrupt.reasons["bees/8.png"]
    assert "expected 8 bits a channel" in data.corrupt.reasons["bees/9.png"]


def test_half_precision_latents_and_strides_are_kept(tmp_path):
    """Nothing is copied or widened before a batch is asked for."""
    latents = np.random.RandomState(0).standard_normal((6, 4, 4, 8)).astype(np.float16)
    data = datasets.load(DataConfig(source=str(bytes_npz(tmp_path, images=latents)), val_fraction=0.0))
    assert data.train_x.pixels.dtype == torch.float16
    x = data.train_x.batch(torch.tensor([4, 1]))
    assert x.is_contiguous()
    assert torch.equal(x, torch.from_numpy(latents[[4, 1]].transpose(0, 3, 1, 2).astype(np.float32)))
    path = tmp_path / "big_endian.npz"
    np.savez(path, images=latents.astype(">f8"))
    assert torch.equal(datasets.load(DataConfig(source=str(path), val_fraction=0.0)).train_x.batch()[[4, 1]], x)


@pytest.mark.parametrize(
    ("field", "value"), [("source", ""), ("img_size", 0), ("val_fraction", 1.0), ("val_fraction", -0.1), ("seed", -1)]
)
def test_configuration_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected"):
        DataConfig(**{field: value})
