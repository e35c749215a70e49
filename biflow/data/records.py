"""Encoded images by number: where their bytes lie, and what they are called. Nothing is decoded here."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Names:
    """An immutable sequence of strings in two arrays: worker processes share it, and a name costs its bytes.

    data (sum of lengths,) uint8, ends (N,) int64.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Any strings that file names can be."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.data[start : self.ends[index]].tobytes())


class Rows:
    """Names of the rows of a table: "row 0", "row 1", ..."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return f"row {index}"


class Records(Protocol):
    """Encoded images 0 ... len - 1; can be pickled and forked."""

    names: Names | Rows

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """The bytes of the images `rows`. OSError: they cannot be read, which is not a fault of the image."""
        ...

    def digest(self, rows: Sequence[int]) -> str:
        """SHA-256 (hex) of where the images `rows` lie, with sizes and times of change; their bytes are not read."""
        ...


class Files:
    """A file an image. names: paths below `root`."""

    def __init__(self, root: Path, names: Names):
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: Sequence[int]) -> list[bytes]:
        return [(self.root / self.names[row]).read_bytes() for row in rows]

    def digest(self, rows: Sequence[int]) -> str:
        return digest_of(self.root / self.names[row] for row in rows)


def digest_of(paths: Iterable[Path], *more: object) -> str:
    """SHA-256 (hex) of the files' paths, sizes and times of change, and of JSON values or arrays beside them."""
    total = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        total.update(json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns]).encode())
    for value in more:
        total.update(value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode())
    return total.hexdigest()
