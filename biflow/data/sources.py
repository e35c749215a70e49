"""Where images come from: digits, .npz files, latents, encoded images in folders, shards, Hugging Face data sets.

Each source checks what it read and names the file in errors.
"""

import hashlib
import os
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from biflow.data import shards, tables
from biflow.data.arrays import assemble, read_npz
from biflow.data.encoded import encoded, listed
from biflow.data.images import DIGITS, DataConfig, ImageData, Images
from biflow.data.labels import kept_rows, numbered
from biflow.data.latents import is_latents, read_latents
from biflow.data.records import Files, Names, Records

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
KINDS = {".npz": "npz", ".tar": "shards", ".parquet": "table"}  # of files, and patterns of files
EXPECTED = "'digits', a .npz file, a folder of images or of latents, .tar shards, or a Hugging Face data set"
# fields of DataConfig that a kind of source takes beside those that all do
ENCODED = {"crop", "channels", "classes", "exclude", "workers"}
TAKES = {
    "digits": set(),
    "npz": set(),
    "latents": {"normalize_latents", "posterior", "workers"},
    "folder": ENCODED,
    "shards": ENCODED | {"image_key", "label_key", "index"},
    "table": ENCODED | {"split", "image_key", "label_key"},
}


@dataclass(frozen=True)
class Listing:
    """Encoded images, before any of them was looked at.

    records, rows (N,) int64: the images that are not left out. labels (N,) int64 or None, class_names: () without.
    broken: names of parts that cannot be read at all, and why. excluded: how many images were left out by data.exclude.
    """

    records: Records
    rows: np.ndarray
    labels: Tensor | None
    class_names: tuple[str, ...]
    broken: dict[str, str] = field(default_factory=dict)
    excluded: int = 0


def kind_of(source: str) -> str:
    """What a source is, by its name or what lies in a folder: "digits", "npz", "latents", "folder", "shards", "table".

    Raises:
        FileNotFoundError: no such path, and no suffix says what it is. ValueError: a file of another kind.
    """
    if source == "digits":
        return "digits"
    if source.startswith(tables.HUB):
        return "table"
    path = Path(source).expanduser()
    if path.is_dir():
        if is_latents(path):
            return "latents"
        if tables.is_saved(path) or tables.has_parquet(path):
            return "table"
        return "shards" if shards.shard_paths(source) and not _folders(path) + _image_names(path) else "folder"
    if path.suffix in KINDS:
        return KINDS[path.suffix]
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected {EXPECTED}; there is no such path")
    raise ValueError(f"{path}: expected {EXPECTED}, got a file of another kind")


def is_encoded(source: str) -> bool:
    """Whether images of a source are resized to data.img_size; of others it is what they have. Errors as `kind_of`."""
    return TAKES[kind_of(source)] >= ENCODED


def load(config: DataConfig) -> ImageData:
    """Read and split the data that `config` names. The same configuration and files give the same data.

    Sources:
        "digits": scikit-learn's 1,797 handwritten digits, 8x8, values v = 0..16 as x = v / 8 - 1, ten classes.
        *.npz: arrays x_train (with y_train, x_test, y_test), images (with labels) or, as ADM's samples, arr_0 (with
            arr_1); images (N,H,W) or (N,H,W,1|3), square, uint8 (v -> (v + 0.5) / 128 - 1) or floating point in
            [-1, 1]; labels (N,) integers 0..K-1, each of them in use. Floating-point arrays (N,H,W,C) of another C are
            latents of an autoencoder: any finite values, used as stored. Never unpickled.
        latents: a folder of `biflow latents encode` (docs/latents.md): posteriors of an autoencoder, memory-mapped, see
            `Latents`.
        folder: images in one sub-folder per class (classes in the order of the sub-folders' names), or directly in
            the folder (no labels); hidden files and other suffixes are passed over.
        *.tar: WebDataset shards; a sample's label is its .cls or the "label" of its .json.
        Hugging Face: a folder of `save_to_disk` or of parquet files, a .parquet file, "hf:NAME".

    Images of the last three stay encoded and are decoded when a batch asks for them: see `EncodedImages`, and
    `Decoder.decode` for corrupt ones. Transparency is dropped. Sets of up to 1 GiB of decoded uint8 images keep what
    they have decoded in memory, unless training draws random crops.

    Raises:
        ImportError: scikit-learn or datasets is not installed. FileNotFoundError: no such file, folder or data set.
        ValueError: the source is not as above; names the file, what was expected and what came.
    """
    kind = check_kind(config)
    if kind == "digits":
        return _digits(config)
    if kind == "npz":
        path = Path(config.source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        return read_npz(path, config)
    if kind == "latents":
        return read_latents(config)
    found = list_images(config)
    if config.img_size is None:
        raise ValueError(f"{config.source}: expected img_size with encoded images (they are resized to it), got None")
    if found.broken:
        name, reason = next(iter(found.broken.items()))
        raise ValueError(
            f"{config.source}: {len(found.broken)} shards cannot be read and would be lost; {name}: {reason}. Replace "
            "them, or name them in the file of data.exclude to train without"
        )
    images = encoded(found.records, found.rows, found.labels, config)
    data = assemble(images, found.labels, None, config, found.class_names)
    return replace(data, fingerprint=_fingerprint(found), corrupt=images.corrupt)


def check_kind(config: DataConfig) -> str:
    """`kind_of` the source. ValueError: a field that is not for such a source is set; errors as `kind_of`."""
    kind = kind_of(config.source)
    for name in sorted(set.union(*TAKES.values()) - TAKES[kind]):
        value, default = getattr(config, name), next(f.default for f in fields(config) if f.name == name)
        if value != default and name != "workers":
            takers = ", ".join(k for k, names in TAKES.items() if name in names)
            raise ValueError(f"{name}: expected {default!r} with {config.source} (it is for {takers}), got {value!r}")
    return kind


def list_images(config: DataConfig) -> Listing:
    """The encoded images of a source, none of them decoded. Errors as `load`."""
    kind = kind_of(config.source)
    if kind == "folder":
        records, labels, known = _folder(Path(config.source).expanduser())
        broken = {}
    elif kind == "shards":
        records, labels, broken = _shards(config)
        known = ()
    else:
        records, labels, known = tables.open_table(config.source, config.split, config.image_key, config.label_key)
        broken = {}
    excluded = set()
    if config.exclude is not None:
        if not Path(config.exclude).expanduser().is_file():
            raise FileNotFoundError(f"data.exclude: {config.exclude}: no such file")
        excluded = set(listed(Path(config.exclude).expanduser()))
    rows, used = kept_rows(records.names, excluded)
    left_out, unused = len(records) - len(rows), len(excluded - used - broken.keys())
    if config.exclude is not None:
        more = f"; {unused:,} of its names are not in the data" if unused else ""
        tqdm.write(f"biflow: {config.source}: {left_out:,} images are left out by {config.exclude}{more}", sys.stderr)
    if not len(rows):
        raise ValueError(f"{config.source}: expected at least one image, got none")
    names: tuple[str, ...] = ()
    numbers = None
    if labels is not None:
        texts = labels if len(rows) == len(labels) else [labels[i] for i in rows.tolist()]
        source, name = config.source, lambda i: records.names[int(rows[i])]
        numbers, names = numbered(texts, name, source, config.classes, known)
    elif config.classes is not None:
        raise ValueError(f"classes: expected None with images without labels, got {config.classes!r}")
    broken = {name: reason for name, reason in broken.items() if name not in excluded}
    return Listing(records, rows, numbers, names, broken, left_out)


def _digits(config: DataConfig) -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "the digits data set comes with scikit-learn, which is not installed: pip install 'biflow[train]'"
        ) from None
    if config.img_size not in (None, 8):
        raise ValueError(f"digits: expected img_size 8 or None, got {config.img_size}")
    raw = load_digits()
    images = Images(torch.from_numpy(raw.images.astype(np.uint8))[:, None], DIGITS)
    return assemble(images, torch.from_numpy(raw.target.astype(np.int64)), None, config, tuple("0123456789"))


def _shards(config: DataConfig) -> tuple[Records, list[str] | None, dict[str, str]]:
    paths = shards.shard_paths(config.source)
    index = shards.indexed(paths, IMAGE_SUFFIXES, config.image_key, config.label_key, config.index)
    if config.label_key is not None and index.labels is None:
        raise ValueError(f"{config.source}: label_key: expected an extension in the shards, got {config.label_key!r}")
    return shards.Shards(paths, index), None if index.labels is None else list(index.labels), index.broken


def _folder(path: Path) -> tuple[Records, list[str] | None, tuple[str, ...]]:
    folders = _folders(path)
    flat = _image_names(path)
    if folders and flat:
        raise ValueError(f"{path}: expected images in class sub-folders or directly in the folder, got both")
    if not folders and not flat:
        raise ValueError(f"{path}: expected images ({' '.join(IMAGE_SUFFIXES)}), got none")
    if not folders:
        return Files(path, Names.of(flat)), None, ()
    groups = [_image_names(path / folder) for folder in folders]
    empty = [folder for folder, group in zip(folders, groups, strict=True) if not group]
    if empty:
        raise ValueError(
            f"{path / empty[0]}: expected images ({' '.join(IMAGE_SUFFIXES)}) in every class folder, got none"
        )
    names = Names.of(f"{folder}/{name}" for folder, group in zip(folders, groups, strict=True) for name in group)
    labels = [folder for folder, group in zip(folders, groups, strict=True) for _ in group]
    return Files(path, names), labels, tuple(folders)


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and e.name.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(name for name in names if (folder / name).is_file())


def _fingerprint(found: Listing) -> str:
    """SHA-256 (hex) over what decides which image a number means."""
    digest = hashlib.sha256()
    for name in found.class_names:
        digest.update(os.fsencode(name) + b"\n")
    if found.labels is not None:
        digest.update(found.labels.numpy().tobytes())
    digest.update(found.rows.tobytes())
    names = found.records.names
    if isinstance(names, Names):
        digest.update(names.ends.tobytes())
        digest.update(names.data.tobytes())
    return digest.hexdigest()
