"""WebDataset shards: tar files whose members are samples (KEY.jpg, KEY.cls, ...), read at random through an index."""

import contextlib
import hashlib
import json
import os
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from biflow.data.records import Names, digest_of
from biflow.files import replacing

OPEN_FILES = 64
INDEX_VERSION = 1


@dataclass(frozen=True)
class Index:
    """Where the images of some shards lie.

    shard (N,) int32: which of the paths; offset, size (N,) int64: of the image's bytes in it.
    names: SHARD.tar/MEMBER. labels: the label's text, or None without labels.
    broken: shard name -> why it cannot be read as a tar file; its images are missing here.
    notes: what else is to be told of.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    names: Names
    labels: Names | None
    broken: dict[str, str]
    notes: tuple[str, ...]


class Shards:
    """The images of tar files."""

    def __init__(self, paths: Sequence[Path], index: Index):
        self.paths, self.index, self.names = tuple(paths), index, index.names
        self._files: dict[int, int] = {}  # shard -> descriptor

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: Sequence[int]) -> list[bytes]:
        index = self.index
        return [_pread(self._open(int(index.shard[r])), int(index.size[r]), int(index.offset[r])) for r in rows]

    def digest(self, rows: Sequence[int]) -> str:
        index, rows = self.index, np.asarray(rows)
        return digest_of(self.paths, index.shard[rows], index.offset[rows], index.size[rows])

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._files[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def shard_paths(source: str) -> list[Path]:
    """The .tar files that a folder, a file or a pattern (`*`, `?`, `{000..099}`, `{a,b}`) names, in order.

    FileNotFoundError: one of the names of the pattern, or any, does not exist.
    """
    root = Path(source).expanduser()
    if root.is_dir():
        return sorted(p for p in root.iterdir() if p.suffix == ".tar" and not p.name.startswith("."))
    found = []
    for text in expand(str(root)):
        if any(sign in text for sign in "*?["):
            parts = Path(text).parts
            first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
            matches = sorted(Path(*parts[:first]).glob(str(Path(*parts[first:]))))
            if not matches:
                raise FileNotFoundError(f"{text}: expected .tar files, found none")
            found += matches
        elif not Path(text).is_file():
            raise FileNotFoundError(f"{text}: no such file")
        else:
            found.append(Path(text))
    return found


def expand(pattern: str) -> Iterator[str]:
    """`a{08..10}{x,y}` -> a08x, a08y, a09x, ..."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        yield pattern
        return
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if ends:
        numbers = range(int(ends[1]), int(ends[2]) + 1)
        parts = [str(n).zfill(len(ends[1])) for n in numbers]
    else:
        parts = brace[1].split(",")
    for part in parts:
        yield from expand(pattern[: brace.start()] + part + pattern[brace.end() :])


def indexed(
    paths: Sequence[Path], suffixes: tuple[str, ...], image_key: str | None, label_key: str | None, file: str | None
) -> Index:
    """The index of the shards, from `file` if it is theirs as they are now, else made and written there.

    Args:
        suffixes: of images, ".png" and so on.
        image_key: which extension is the image, such as "jpg"; None: the only one that is in `suffixes`.
        label_key: the extension of the label's text, such as "cls", or "json.KEY" for a value of KEY.json; None: "cls"
            or "json.label", whichever is in the first sample, else no labels.
        file: None: .biflow-index-XXXXXXXX.npz beside the first shard; where that cannot be written, none is kept.

    Raises:
        ValueError: two images or the same member twice in a sample. OSError: a shard, or the `file` that was asked
        for, cannot be read or written.
    """
    stats = [path.stat() for path in paths]
    state = [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]
    wanted = json.dumps([INDEX_VERSION, suffixes, image_key, label_key, state])
    key = hashlib.sha256(json.dumps([image_key, label_key, [s[0] for s in state]]).encode()).hexdigest()[:12]
    target = Path(file).expanduser() if file else paths[0].parent / f".biflow-index-{key}.npz"
    index = _read(target, wanted)
    if index is None:
        index = _scan(paths, suffixes, image_key, label_key)
        try:
            _write(target, index, wanted)
        except OSError as error:
            if file is not None:
                raise
            _say(f"{target}: the index of the shards cannot be kept and is made anew each time ({error.strerror}); "
                 "data.index=FILE puts it elsewhere")  # fmt: skip
    for note in index.notes:
        _say(note)
    return index


def _scan(paths: Sequence[Path], suffixes: tuple[str, ...], image_key: str | None, label_key: str | None) -> Index:
    shard: list[int] = []
    places: list[tuple[int, int]] = []
    names: list[str] = []
    labels: list[str] = []
    broken: dict[str, str] = {}
    notes: list[str] = []
    where = _names(paths)
    for number, path in enumerate(
        tqdm(paths, desc="index", unit="shard", leave=False, disable=None if len(paths) >= 10 else True)
    ):
        try:
            samples, end = _samples(path, where[number], suffixes, image_key, label_key)
        except tarfile.TarError as error:
            broken[where[number]] = f"expected an uncompressed tar file; {error}"
            continue
        if not end:
            notes.append(f"{path}: the tar file has no end mark; it may have been cut short between two members")
        without = [key for key, sample in samples.items() if "image" not in sample]
        if without:
            notes.append(f"{path}: {len(without)} samples without an image are passed over, the first is {without[0]}")
        if label_key is None:
            label_key = next((sample["key"] for sample in samples.values() if "key" in sample), None)
        for sample in samples.values():
            if "image" in sample:
                shard.append(number)
                places.append(sample["place"])
                names.append(f"{where[number]}/{sample['image']}")
                labels.append(sample.get("label", "") if sample.get("key", label_key) == label_key else "")
    offset, size = np.array(places, dtype=np.int64).reshape(-1, 2).T
    texts = Names.of(labels) if label_key is not None else None
    return Index(np.array(shard, dtype=np.int32), offset.copy(), size.copy(), Names.of(names), texts, broken,
                 tuple(notes))  # fmt: skip


def _names(paths: Sequence[Path]) -> list[str]:
    """What the shards are called: file names, or paths where those are not different."""
    short = [path.name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _samples(
    path: Path, name: str, suffixes: tuple[str, ...], image_key: str | None, label_key: str | None
) -> tuple[dict[str, dict], bool]:
    """Samples by key, each with image, place (offset, size), label and key as far as they are there; an end mark?

    tarfile.TarError: not a tar file, compressed, cut short, or a header that is none.
    """
    samples: dict[str, dict] = {}
    extension, _, field = (label_key or "").partition(".")
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[misc]  # else every header stays in memory
            folder, _, base = member.name.rpartition("/")
            if not member.isreg() or base.startswith(".") or "." not in base:
                continue
            stem, _, kind = base.partition(".")
            kind, sample = kind.lower(), samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
            if kind == image_key or (image_key is None and f".{kind}" in suffixes):
                if "image" in sample:
                    raise ValueError(
                        f"{name}: expected one image a sample, got {sample['image']} and {member.name} "
                        "(data.image_key chooses one)"
                    )
                sample.update(image=member.name, place=(member.offset_data, member.size))
            elif kind == "json" and (extension == "json" or (label_key is None and sample.get("key") != "cls")):
                _json_label(sample, tar.extractfile(member).read(), field or "label", label_key)
            elif kind == extension or (label_key is None and kind == "cls"):
                text = tar.extractfile(member).read().decode("utf-8", "replace").strip()
                sample.update(label=text, key=kind)
        tar.fileobj.seek(tar.offset)
        block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"what lies at byte {tar.offset} is not a header")
    return samples, len(block) == tarfile.BLOCKSIZE


def _json_label(sample: dict, data: bytes, field: str, label_key: str | None) -> None:
    """Put the value of `field` into the sample, if there is one."""
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(data)
        if isinstance(values, dict) and isinstance(values.get(field), int | str):
            sample.update(label=str(values[field]).strip(), key=label_key or f"json.{field}")


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    parts = []
    while size:
        part = os.pread(descriptor, size, offset)
        if not part:
            break  # the file has become shorter: the image is cut short
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)


def _read(path: Path, wanted: str) -> Index | None:
    """The index in a file that `_write` wrote; None if there is none, or not of these shards as they are."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays["about"].tobytes())
        if about["wanted"] != wanted:
            return None
        labels = Names(arrays["label_data"], arrays["label_ends"]) if "label_data" in arrays else None
        names = Names(arrays["name_data"], arrays["name_ends"])
        return Index(
            arrays["shard"], arrays["offset"], arrays["size"], names, labels, about["broken"], tuple(about["notes"])
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        return None


def _write(path: Path, index: Index, wanted: str) -> None:
    about = json.dumps({"wanted": wanted, "broken": index.broken, "notes": index.notes}).encode()
    arrays = {
        "about": np.frombuffer(about, dtype=np.uint8),
        "shard": index.shard,
        "offset": index.offset,
        "size": index.size,
        "name_data": index.names.data,
        "name_ends": index.names.ends,
    }
    if index.labels is not None:
        arrays |= {"label_data": index.labels.data, "label_ends": index.labels.ends}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _say(text: str) -> None:
    tqdm.write(f"biflow: {text}", file=sys.stderr)
