"""Small data sets of every kind with corrupt images in them, shared by the tests of data."""

import io
import tarfile

import numpy as np
from PIL import Image

KINDS = ("folder", "shards", "table")
CLASSES = 3


def numbered_png(number, side=8, rng=None):
    return encode(numbered(number, side, rng))


def numbered(number, side=8, rng=None):
    """An RGB image (S,S,3) whose first pixel is `number` in base 256; else noise, or gray without `rng`."""
    pixels = np.full((side, side, 3), 128, np.uint8) if rng is None else rng.randint(0, 256, (side, side, 3), np.uint8)
    pixels[0, 0] = [number >> 16, number >> 8 & 255, number & 255]
    return pixels


def encode(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def spoiled(data, number):
    """What a disk, a broken download or a wrong script make of an image."""
    return (data[: len(data) // 2], b"", b"<html>404</html>", b"\0" * len(data), data[8:])[number % 5]


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_folder(folder, images):
    """images: (class number, bytes) each; sub-folders class0, class1, ..."""
    for i, (k, data) in enumerate(images):
        (folder / f"class{k}").mkdir(parents=True, exist_ok=True)
        (folder / f"class{k}" / f"{i:06d}.png").write_bytes(data)
    return folder


def write_shards(folder, images, per_shard=20):
    folder.mkdir(parents=True)
    for first in range(0, len(images), per_shard):
        with tarfile.open(folder / f"part-{first // per_shard:04d}.tar", "w") as tar:
            for i, (k, data) in enumerate(images[first : first + per_shard], first):
                add(tar, f"{i:06d}.png", data)
                add(tar, f"{i:06d}.cls", str(k).encode())
    return folder


def write_table(folder, images):
    """`save_to_disk`'s folder; needs datasets."""
    import datasets

    classes = max(k for k, _ in images) + 1
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class{k}" for k in range(classes)])}
    columns = {"image": [{"bytes": d, "path": None} for _, d in images], "label": [k for k, _ in images]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.disable_progress_bars()
    table.save_to_disk(str(folder))
    return folder


WRITERS = {"folder": write_folder, "shards": write_shards, "table": write_table}


def names(kind, images, per_shard=20):
    """What the images are called, in the order of `images`."""
    if kind == "folder":
        return [f"class{k}/{i:06d}.png" for i, (k, _) in enumerate(images)]
    if kind == "shards":
        return [f"part-{i // per_shard:04d}.tar/{i:06d}.png" for i in range(len(images))]
    return [f"row {i}" for i in range(len(images))]


def numbers(pixels):
    """The numbers of images (n,3,S,S) uint8 of `numbered_png`."""
    r, g, b = pixels[:, :, 0, 0].long().unbind(1)
    return (r << 16) + (g << 8) + b
