"""A whole look at a data set: every image read and decoded once; `biflow data check`."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from biflow.data.decode import CorruptImage, open_image
from biflow.data.images import DataConfig, ImageData
from biflow.data.latents import read_index, read_shard, shard_digest
from biflow.data.records import Records
from biflow.data.sources import Listing, check_kind, list_images, load

PART = 64  # images that a worker looks at before it reports
EXAMPLES = 5


class Look(NamedTuple):
    """One image: bytes of its file, SHA-256 of them if asked for, and (width, height, mode) or why it is corrupt."""

    size: int
    digest: bytes
    shape: tuple[int, int, str] | None
    reason: str


def check(config: DataConfig, *, duplicates: bool = False, progress: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Read everything once. -> (report, a line NAME<TAB>REASON a corrupt image or shard, as data.exclude reads them).

    The report, numbers and texts only: kind, images (that can be decoded), corrupt, corrupt_examples, classes (name ->
    images that can be decoded; or None), bytes, sizes (of the images: smallest, median, largest width and height),
    modes (Pillow's: "RGB", "L", ...), excluded, unreadable_shards; with `duplicates`: duplicates, how many images have
    the bytes of an earlier one, and duplicate_examples. Of arrays and latents: kind, images, held_out, classes,
    img_size, channels; of latents also unreadable_shards, whose SHA-256 is not the one in latents.json.

    Args:
        config: of the data; img_size may be None. workers: processes that decode.
        duplicates: look for files of equal bytes. Of encoded images only.

    Raises:
        As `load`; but a corrupt image or shard is not an error, nor is a class all of whose images are corrupt.
    """
    kind = check_kind(config)
    if kind in ("digits", "npz", "latents"):
        if duplicates:
            raise ValueError(f"--duplicates: expected encoded images, got {config.source}")
        broken = {"unreadable_shards": _damaged(config, progress)} if kind == "latents" else {}
        return {"kind": kind, **_arrays(load(config)), **broken}, []
    found = list_images(config)
    report, lines = _encoded(found, config.workers, duplicates, progress)
    return {"kind": kind, **report}, lines


def _arrays(data: ImageData) -> dict[str, Any]:
    classes = None
    if data.train_y is not None:
        labels = data.train_y if data.val_y is None else torch.cat([data.train_y, data.val_y])
        classes = dict(zip(data.class_names, labels.bincount(minlength=data.num_classes).tolist(), strict=True))
    return {
        "images": len(data.train_x) + len(data.val_x),
        "held_out": len(data.val_x),
        "classes": classes,
        "img_size": data.img_size,
        "channels": data.channels,
    }


def _damaged(config: DataConfig, progress: bool) -> list[str]:
    """The shards of latents that do not hold what was written."""
    folder = Path(config.source).expanduser()
    shards = read_index(folder).get("shards", ())
    return [
        shard["file"]
        for shard in tqdm(shards, desc="check", unit="shard", disable=not progress)
        if shard_digest(read_shard(folder / shard["file"])[1]) != shard["sha256"]
    ]


def _encoded(found: Listing, workers: int, duplicates: bool, progress: bool) -> tuple[dict[str, Any], list[str]]:
    names, labels = found.records.names, found.labels
    good = torch.zeros(len(found.rows), dtype=torch.bool)
    sides = np.zeros((len(found.rows), 2), dtype=np.int32)
    modes, total = Counter(), 0
    lines = [f"{name}\t{reason}" for name, reason in found.broken.items()]
    seen: dict[bytes, int] = {}
    twins: list[tuple[int, int]] = []
    bar = tqdm(total=len(found.rows), desc="check", unit="image", disable=not progress)
    for position, look in enumerate(_looks(found.records, found.rows, workers, duplicates)):
        bar.update()
        total += look.size
        if look.shape is None:
            lines.append(f"{names[int(found.rows[position])]}\t{look.reason}")
            continue
        good[position] = True
        sides[position] = look.shape[:2]
        modes[look.shape[2]] += 1
        if duplicates and (first := seen.setdefault(look.digest, position)) != position:
            twins.append((first, position))
    bar.close()
    corrupt = lines[len(found.broken) :]
    classes = None
    if labels is not None:
        counts = labels[good].bincount(minlength=len(found.class_names)).tolist()
        classes = dict(zip(found.class_names, counts, strict=True))
    report = {
        "images": int(good.sum()),
        "corrupt": len(corrupt),
        "corrupt_examples": [": ".join(line.split("\t")) for line in corrupt[:EXAMPLES]],
        "unreadable_shards": [f"{name}: {reason}" for name, reason in found.broken.items()],
        "excluded": found.excluded,
        "classes": classes,
        "bytes": total,
        "sizes": _sizes(sides[good.numpy()]),
        "modes": dict(modes.most_common()),
    }
    if duplicates:
        pairs = [[names[int(found.rows[position])] for position in pair] for pair in twins[:EXAMPLES]]
        report |= {"duplicates": len(twins), "duplicate_examples": pairs}
    return report, lines


def _sizes(sides: np.ndarray) -> dict[str, list[int]] | None:
    if not len(sides):
        return None
    found = {"smallest": sides.min(0), "median": np.median(sides, axis=0), "largest": sides.max(0)}
    return {name: [int(side) for side in value] for name, value in found.items()}


def _looks(records: Records, rows: np.ndarray, workers: int, digest: bool) -> Iterator[Look]:
    options = {"prefetch_factor": 4} if workers else {}
    loader = DataLoader(
        _Parts(records, rows, digest), batch_size=None, num_workers=workers, generator=torch.Generator(), **options
    )
    for part in loader:
        yield from part


class _Parts(Dataset):
    def __init__(self, records: Records, rows: np.ndarray, digest: bool):
        self.records, self.rows, self.digest = records, rows, digest

    def __len__(self) -> int:
        return -(-len(self.rows) // PART)

    def __getitem__(self, part: int) -> list[Look]:
        rows = self.rows[part * PART : (part + 1) * PART].tolist()
        return [self._look(data) for data in self.records.read(rows)]

    def _look(self, data: bytes) -> Look:
        digest = hashlib.sha256(data).digest() if self.digest else b""
        try:
            image = open_image(data)
        except CorruptImage as error:
            return Look(len(data), digest, None, str(error))
        return Look(len(data), digest, (*image.size, image.mode), "")
