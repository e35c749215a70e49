"""WebDataset shards: the index and its cache, labels, patterns, and tar files that are broken."""

import io
import os
import tarfile

import data_sets
import numpy as np
import pytest
import torch

from biflow import data as datasets
from biflow.data import DataConfig, shards


def image(number):
    return data_sets.numbered_png(number)


def write(path, *members):
    """members: (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            data_sets.add(tar, name, data)
    return path


def load(source, **fields):
    return datasets.load(DataConfig(**{"source": str(source), "img_size": 8, "val_fraction": 0.0, **fields}))


def numbers(data):
    pixels = ((data.train_x.batch() - 1 / 256 + 1) * 128).round().to(torch.uint8)
    return data_sets.numbers(pixels).tolist()


@pytest.fixture
def folder(tmp_path):
    return data_sets.write_shards(tmp_path / "set", [(i % 3, image(i)) for i in range(50)])


def test_patterns_name_shards_in_order(folder):
    assert numbers(load(folder)) == list(range(50))
    assert numbers(load(folder / "part-0001.tar", classes=None)) == list(range(20, 40))
    assert numbers(load(f"{folder}/part-{{0000..0002}}.tar")) == list(range(50))
    assert numbers(load(f"{folder}/part-{{0002,0000}}.tar")) == [*range(40, 50), *range(20)]
    assert numbers(load(f"{folder}/part-*.tar")) == list(range(50))
    with pytest.raises(FileNotFoundError, match=r"part-0003\.tar: no such file"):
        load(f"{folder}/part-{{0000..0003}}.tar")
    with pytest.raises(FileNotFoundError, match=r"expected \.tar files, found none"):
        load(f"{folder}/train-*.tar")
    assert list(shards.expand("a{08..10}{x,y}")) == ["a08x", "a08y", "a09x", "a09y", "a10x", "a10y"]


def test_what_webdataset_writes_is_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(f"{tmp_path}/train-%03d.tar", maxcount=7, verbose=0) as sink:
        for i in range(20):
            pixels = np.frombuffer(image(i), np.uint8).tobytes()
            sink.write({"__key__": f"n/{i:05d}", "png": pixels, "cls": i % 4, "json": {"label": 9}})
    data = load(tmp_path)
    assert numbers(data) == list(range(20))
    assert data.train_y.tolist() == [i % 4 for i in range(20)]
    assert data.train_x.decoder.name(8) == "train-001.tar/n/00008.png"


def test_the_index_is_kept_and_renewed(folder, monkeypatch, tmp_path):
    want = numbers(load(folder))
    kept = list(folder.glob(".biflow-index-*.npz"))
    assert len(kept) == 1
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", None)
    assert numbers(load(folder)) == want
    monkeypatch.setattr(shards, "_scan", scan)
    for damage in (b"", kept[0].read_bytes()[:-300], kept[0].read_bytes()[:200] + b"\0" * 5000):
        kept[0].write_bytes(damage)
        assert numbers(load(folder)) == want
    write(folder / "part-0002.tar", ("a.png", image(99)), ("a.cls", b"1"))
    assert numbers(load(folder)) == [*range(40), 99]
    assert len(list(folder.iterdir())) == 4  # no leftovers
    kept[0].unlink()
    assert numbers(load(folder, index=str(tmp_path / "index.npz"))) == [*range(40), 99]
    assert (tmp_path / "index.npz").exists()
    assert not list(folder.glob(".*"))
    with pytest.raises(FileNotFoundError):
        load(folder, index=str(tmp_path / "none" / "index.npz"))


def test_an_index_that_cannot_be_kept_is_told_of(folder, monkeypatch, capsys):
    def write(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shards, "_write", write)
    assert numbers(load(folder)) == list(range(50))
    assert "made anew each time (Permission denied); data.index=FILE" in capsys.readouterr().err


def test_labels(tmp_path):
    members = [
        (f"{i}.{kind}", data) for i in range(4) for kind, data in (("png", image(i)), ("txt", f" c{i % 2}\n".encode()))
    ]
    plain = write(tmp_path / "a" / "0.tar", *members)
    assert load(plain).train_y is None
    data = load(plain, label_key="txt")
    assert (data.class_names, data.train_y.tolist()) == (("c0", "c1"), [0, 1, 0, 1])
    json = [(f"{i}.json", b'{"label": %d, "kind": "k%d"}' % (i % 2, i // 2)) for i in range(4)]
    both = write(tmp_path / "b" / "0.tar", *members, *json)
    assert load(both).train_y.tolist() == [0, 1, 0, 1]
    data = load(both, label_key="json.kind")
    assert (data.class_names, data.train_y.tolist()) == (("k0", "k1"), [0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"0\.tar/0\.png: expected a label as the others have, got none"):
        load(both, label_key="cls")
    ids = [(f"{i}.cls", b"%d" % (i and 999_999_999)) for i in range(4)]  # no table of so many classes is made
    with pytest.raises(ValueError, match="got none of class 1 below 999999999"):
        load(write(tmp_path / "d" / "0.tar", *members, *ids))
    missing = write(tmp_path / "c" / "0.tar", *members, *json[:2], ("2.json", b'{"label": null}'), ("3.json", b"{"))
    with pytest.raises(ValueError, match=r"0\.tar/2\.png: expected a label"):
        load(missing)
    (tmp_path / "bad.txt").write_text("0.tar/2.png\n0.tar/3.png\n")
    assert load(missing, exclude=str(tmp_path / "bad.txt")).train_y.tolist() == [0, 1]


def test_samples_of_several_images_or_none(tmp_path, capsys):
    two = [(f"{i}.{kind}", image(number)) for i in range(3) for kind, number in (("png", i), ("seg.png", 10 + i))]
    path = write(tmp_path / "a" / "0.tar", *two)
    assert numbers(load(path)) == [0, 1, 2]  # the extension of the others is seg.png
    assert numbers(load(path, image_key="seg.png")) == [10, 11, 12]
    path = write(tmp_path / "b" / "0.tar", ("0.png", image(0)), ("0.jpg", image(1)))
    with pytest.raises(ValueError, match=r"expected one image a sample, got 0\.png and 0\.jpg \(data\.image_key"):
        load(path)
    assert numbers(load(path, image_key="jpg")) == [1]
    path = write(tmp_path / "c" / "0.tar", ("0.png", image(0)), ("1.txt", b"x"), ("._0.png", b"x"), ("notes", b"x"))
    for _ in range(2):  # the index remembers
        assert numbers(load(path)) == [0]
        assert "1 samples without an image are passed over, the first is 1" in capsys.readouterr().err


def broken_header(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 // 512 * 512 - 4096 : len(data) // 2 // 512 * 512 + 4096] = b"\xff" * 8192
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size // 2 + 700)


def compressed(path):
    tar = path.read_bytes()
    with tarfile.open(path, "w:gz") as out:
        data_sets.add(out, "x", tar)


@pytest.mark.parametrize("damage", [broken_header, cut, compressed, lambda path: path.write_bytes(b"")])
def test_images_of_a_broken_shard_are_not_lost_silently(damage, folder, tmp_path, capsys):
    damage(folder / "part-0001.tar")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"1 shards cannot be read and would be lost; part-0001\.tar: expected an unc"
        ):
            load(folder)
    (tmp_path / "bad.txt").write_text("part-0001.tar\n")
    capsys.readouterr()
    assert numbers(load(folder, exclude=str(tmp_path / "bad.txt"))) == [*range(20), *range(40, 50)]
    assert "not in the data" not in capsys.readouterr().err


def test_a_shard_without_an_end_is_told_of(folder, capsys):
    with tarfile.open(folder / "part-0002.tar") as tar:
        end = max(member.offset_data + 512 * -(-member.size // 512) for member in tar)
    os.truncate(folder / "part-0002.tar", end)
    assert numbers(load(folder)) == list(range(50))
    assert "part-0002.tar: the tar file has no end mark; it may have been cut short" in capsys.readouterr().err


def test_a_shard_that_shrinks_while_it_is_read(folder, capsys):
    data = load(folder)
    os.truncate(folder / "part-0002.tar", 512)
    assert numbers(data)[:40] == list(range(40))  # stood in for by images of the other shards
    assert len(data.corrupt) == 10


def test_few_files_are_open_and_all_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    paths = [write(tmp_path / "set" / f"{i}.tar", ("a.png", image(i))) for i in range(5)]
    data = load(tmp_path / "set")
    open_files = lambda: [p for p in os.listdir("/proc/self/fd") if _target(p) in map(str, paths)]  # noqa: E731
    assert numbers(data) == list(range(5))
    assert len(open_files()) == 2
    del data
    assert open_files() == []


def _target(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def test_a_folder_of_classes_is_no_folder_of_shards(folder):
    (folder / "class0").mkdir()
    (folder / "class0" / "0.png").write_bytes(image(3))
    assert numbers(load(folder)) == [3]  # archives that lie beside what was unpacked from them


def test_members_are_read_where_they_lie(tmp_path):
    """Long names have headers of their own, and what is not a file is no image."""
    path, name = tmp_path / "0.tar", f"{'d' * 120}/{'n' * 90}.png"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("d" * 120 + ".png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder, io.BytesIO())
        data_sets.add(tar, name, image(5))
    data = load(path)
    assert numbers(data) == [5]
    assert data.train_x.decoder.name(0) == f"0.tar/{name}"
