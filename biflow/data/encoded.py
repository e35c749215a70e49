"""Images that stay encoded and are decoded when a batch asks for them; what stands in for corrupt ones."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from biflow.data.decode import GRAY_MODES, CorruptImage, crop_numbers, decode, header_mode
from biflow.data.images import BYTES, DataConfig
from biflow.data.records import Records
from biflow.files import replacing

CACHE_BYTES = 1 << 30  # sets whose decoded uint8 images are not larger keep those that they have decoded
LOOKED_AT = 1000  # images by whose headers it is decided whether a set is gray
SHOWN = 10  # corrupt images that are written to stderr one by one


class Corrupt:
    """The corrupt images of a data set that were met: each is told of once, and counted."""

    def __init__(self):
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: str) -> None:
        if name in self.reasons:
            return
        self.reasons[name] = reason
        if len(self) <= SHOWN:
            last = "; further ones are only counted" if len(self) == SHOWN else ""
            tqdm.write(f"biflow: corrupt image {len(self)}: {name}: {reason}{last}", file=sys.stderr)

    def write(self, path: Path) -> None:
        """Add those that are not in the file yet, as lines NAME<TAB>REASON, which `data.exclude` reads."""
        have = set(listed(path)) if path.exists() else set()
        new = [f"{name}\t{reason}\n" for name, reason in self.reasons.items() if name not in have]
        if not new:
            return
        old = path.read_bytes() if path.exists() else b""
        with replacing(path) as temporary:
            temporary.write_bytes(old + "".join(new).encode("utf-8", "surrogateescape"))


def listed(path: Path) -> list[str]:
    """The names in a file of lines NAME or NAME<TAB>REASON; lines that begin with # are comments."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return [line.split("\t")[0] for line in lines if line.strip() and not line.startswith("#")]


@dataclass(frozen=True)
class Decoder:
    """How positions 0 ... N - 1 become pixels; a function of the files only. Goes to worker processes.

    rows (N,) int64: which of the records. labels: (N,) int64 or None.
    checked: the images were found gray by a look at some: a colour image is an error. seed: of random crops.
    """

    records: Records
    rows: np.ndarray
    labels: np.ndarray | None
    channels: int
    img_size: int
    checked: bool

    def decode(
        self, positions: Sequence[int], seed: int = 0, step: int | None = None
    ) -> tuple[Tensor, list[tuple[int, str]]]:
        """Pixels (n,C,S,S) uint8 of the images at `positions`, and (position, reason) of corrupt ones that were met.

        In the place of a corrupt image stands the next one of its class that can be decoded, in the order of positions
        and from the last to the first; without labels, the next one.

        Args:
            step: None: the centre of each image. Otherwise crops by `crop_numbers(seed, step, position)`.

        Raises:
            ValueError: none of the class can be decoded; a colour image in a set that was found gray.
            OSError: what holds the images cannot be read.
        """
        pixels = np.empty((len(positions), self.channels, self.img_size, self.img_size), dtype=np.uint8)
        corrupt: dict[int, str] = {}
        for i, (position, data) in enumerate(zip(positions, self.records.read(self.rows[positions]), strict=True)):
            crop = None if step is None else crop_numbers(seed, step, position)
            try:
                pixels[i] = self._pixels(position, data, crop)
            except CorruptImage as error:
                corrupt[position] = str(error)
                pixels[i] = self._stand_in(position, crop, corrupt)
        return torch.from_numpy(pixels), list(corrupt.items())

    def take(self, indices: np.ndarray) -> "Decoder":
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, rows=self.rows[indices], labels=labels)

    def name(self, position: int) -> str:
        return self.records.names[int(self.rows[position])]

    def _pixels(self, position: int, data: bytes, crop: tuple[float, float, float] | None) -> np.ndarray:
        if self.checked and self.channels == 1 and header_mode(data) not in (*GRAY_MODES, None):
            raise ValueError(
                f"{self.name(position)}: expected a gray image as all of {LOOKED_AT} that were looked at, got "
                f"{header_mode(data)}; data.channels says what the images are (1: gray, 3: RGB)"
            )
        return decode(data, self.channels, self.img_size, crop)

    def _stand_in(self, position: int, crop: tuple[float, float, float] | None, corrupt: dict[int, str]) -> np.ndarray:
        if self.labels is None:
            others = np.arange(len(self.rows))
        else:
            others = np.flatnonzero(self.labels == self.labels[position])
        start = int(np.searchsorted(others, position))
        for other in np.roll(others, -start)[1:].tolist():
            try:
                return self._pixels(other, self.records.read(self.rows[[other]])[0], crop)
            except CorruptImage as error:
                corrupt[other] = str(error)
        of_class = "" if self.labels is None else f" of class {int(self.labels[position])}"
        raise ValueError(
            f"{self.name(position)}: expected at least one image{of_class} that can be decoded, got none; "
            f"this one: {corrupt[position]}"
        )


class EncodedImages:
    """Images decoded from their records when they are asked for. Same use as `Images`.

    random_crop: whether training draws crops. workers: processes that a `Stream` decodes in.
    corrupt: what was found corrupt so far, shared with the other part of the split.
    """

    quantisation = BYTES

    def __init__(self, decoder: Decoder, *, random_crop: bool, workers: int, corrupt: Corrupt):
        self.decoder, self.random_crop, self.workers, self.corrupt = decoder, random_crop, workers, corrupt
        self.channels, self.img_size = decoder.channels, decoder.img_size
        shape = (len(self), self.channels, self.img_size, self.img_size)
        keep = not random_crop and np.prod(shape, dtype=np.int64) <= CACHE_BYTES
        self._cache = torch.empty(shape, dtype=torch.uint8) if keep else None  # pages are taken when written to
        self._cached = torch.zeros(len(self), dtype=torch.bool)
        self._replaced = torch.zeros(len(self), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.decoder.rows)

    def batch(self, indices: Tensor | None = None) -> Tensor:
        """The centres of the images, as `Images.batch`. Errors as `Decoder.decode`."""
        indices = torch.arange(len(self)) if indices is None else indices
        missing = self.missing(indices)
        return BYTES.values(self.complete(indices, missing, *self.decoder.decode(missing.tolist())))

    def take(self, indices: Tensor) -> "EncodedImages":
        """The images `indices`, in that order."""
        decoder, options = self.decoder.take(indices.numpy()), {"workers": self.workers, "corrupt": self.corrupt}
        return EncodedImages(decoder, random_crop=self.random_crop, **options)

    def digest(self) -> str:
        """SHA-256 (hex) of all that `batch` depends on; of the files only their places, sizes and times of change."""
        own = self.decoder
        total = hashlib.sha256(json.dumps([own.channels, own.img_size, own.records.digest(own.rows)]).encode())
        if own.labels is not None:  # they say what stands in for a corrupt image
            total.update(own.labels.tobytes())
        return total.hexdigest()

    @property
    def varies(self) -> bool:
        """Whether what training sees of an image depends on the step."""
        return self.random_crop

    @property
    def held(self) -> bool:
        """Whether the pixels of all images are held in memory."""
        return self._cache is not None and bool(self._cached.all())

    def missing(self, indices: Tensor) -> Tensor:
        """Those of the indices whose pixels are not held in memory."""
        return indices if self._cache is None else indices[~self._cached[indices]]

    def complete(self, indices: Tensor, missing: Tensor, pixels: Tensor, corrupt: list[tuple[int, str]]) -> Tensor:
        """Pixels (n,C,S,S) uint8 of `indices` from what `Decoder.decode(missing)` gave and what is held in memory."""
        for position, reason in corrupt:
            self._replaced[position] = True
            self.corrupt.add(self.decoder.name(position), reason)
        if self._cache is None:
            return pixels
        self._cache[missing], self._cached[missing] = pixels, True
        return self._cache[indices]

    def replaced(self, indices: Tensor) -> int:
        """How many of the images, all decoded before, are corrupt."""
        return int(self._replaced[indices].sum())


def encoded(records: Records, rows: np.ndarray, labels: Tensor | None, config: DataConfig) -> EncodedImages:
    """The images `rows` of the records as `config` wants them. ValueError: none that was looked at can be decoded."""
    channels = config.channels
    if channels is None:
        channels = _channels(records, rows)
    numbers = None if labels is None else labels.numpy()
    decoder = Decoder(records, rows, numbers, channels, config.img_size, checked=config.channels is None)
    options = {"random_crop": config.crop == "random", "workers": config.workers}
    return EncodedImages(decoder, **options, corrupt=Corrupt())


def _channels(records: Records, rows: np.ndarray) -> int:
    """1 if each of at most LOOKED_AT images, evenly spaced, is gray, else 3."""
    count = min(len(rows), LOOKED_AT)
    some = rows[np.arange(count) * len(rows) // count]
    modes = [header_mode(records.read([row])[0]) for row in some.tolist()]
    if not any(modes):
        raise ValueError(
            f"{records.names[int(some[0])]}: expected an image that Pillow can decode, got none in {count} files"
        )
    return 1 if all(mode in (*GRAY_MODES, None) for mode in modes) else 3
