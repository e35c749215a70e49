"""Latents of an autoencoder by number: memory-mapped shards of posteriors' means and standard deviations.

A folder of `biflow latents encode`; docs/latents.md has the format.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from biflow.data.arrays import assemble
from biflow.data.decode import crop_numbers
from biflow.data.images import FLOATS, DataConfig, ImageData
from biflow.files import replacing

INDEX = "latents.json"  # what makes a folder one of latents
FORMAT = "biflow latents 1"
ENTRY = "biflow"  # of a shard's safetensors metadata: a JSON object
SPLITS = ("train", "val")
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents x = (z - shift) / scale, z drawn from a posterior N(mean, std^2) when a batch asks for it.

    Same use as `EncodedImages`. What a step sees of an image, the draw of z and whether it is mirrored, is a function
    of (seed, step, image) alone, whoever reads it. `batch`, and a `Stream` without a seed: the same draw every time.

    files, ends (S,): the shards, and the number of images up to the end of each. rows (N,) int64: which of them.
    shape: (C,h,w) of a latent. shift, scale: of each channel.
    posterior: "sample", or "mean": z is the mean. flip: half of what training sees is mirrored. side: 1: all is.
    workers: processes that a `Stream` reads in. fingerprint: SHA-256 (hex) of all shards.
    """

    files: tuple[Path, ...]
    ends: np.ndarray
    rows: np.ndarray
    shape: tuple[int, int, int]
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    posterior: str
    flip: bool
    workers: int
    fingerprint: str
    side: int = 0
    _open: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    quantisation = FLOATS
    held = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a worker process maps the files itself

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def img_size(self) -> int:
        return self.shape[1]

    @property
    def varies(self) -> bool:
        """Whether what training sees of an image depends on the step."""
        return self.flip or self.posterior == "sample"

    @property
    def decoder(self) -> "Latents":
        """What goes to worker processes."""
        return self

    def take(self, indices: Tensor) -> "Latents":
        """The images `indices`, in that order."""
        return replace(self, rows=self.rows[indices.numpy()])

    def mirrored(self) -> "Latents":
        """The latents of the mirrored images, none of them turned in training."""
        return replace(self, flip=False, side=1)

    def batch(self, indices: Tensor | None = None) -> Tensor:
        """Latents `indices` (n,) int64, or all of them, as (n,C,h,w) fp32. The same bits every time."""
        return self.decode((torch.arange(len(self)) if indices is None else indices).tolist())[0]

    def decode(self, positions: Sequence[int], seed: int = 0, step: int | None = None) -> tuple[Tensor, list]:
        """(n,C,h,w) fp32 of `positions` in a step of a run, see above; and no corrupt ones, as `Decoder.decode`.

        Raises:
            ValueError: a shard is truncated. FileNotFoundError: it is gone.
        """
        rows = self.rows[positions]
        turned = self.turned(positions, seed, step)
        sides = [self.side] * len(rows) if turned is None else turned.int().tolist()
        shards = np.searchsorted(self.ends, rows, side="right")
        starts = np.concatenate([[0], self.ends])[shards]
        moments = torch.empty(len(rows), 2, *self.shape)
        for i, (shard, row, side) in enumerate(zip(shards.tolist(), (rows - starts).tolist(), sides, strict=True)):
            moments[i] = self._shard(shard)[row, side]
        z, std = moments.unbind(1)
        if self.posterior == "sample":
            z = z + std * self._noise(rows, seed, step)
        shift, scale = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.shift, self.scale))
        return (z - shift) / scale, []

    def turned(self, positions: Sequence[int], seed: int | None, step: int | None) -> Tensor | None:
        """(n,) bool: which of the latents in a step are those of mirrored images; None: none ever is."""
        if not self.flip or seed is None or step is None:
            return None
        return torch.tensor([crop_numbers(seed, step, row)[0] < 0.5 for row in self.rows[positions].tolist()])

    def digest(self) -> str:
        """SHA-256 (hex) of all that `batch` depends on."""
        about = [self.fingerprint, self.shift, self.scale, self.posterior, self.side]
        return hashlib.sha256(json.dumps(about).encode() + self.rows.tobytes()).hexdigest()

    def missing(self, indices: Tensor) -> Tensor:
        return indices

    def complete(self, indices: Tensor, missing: Tensor, pixels: Tensor, corrupt: list) -> Tensor:
        return pixels

    def replaced(self, indices: Tensor) -> int:
        return 0

    def _noise(self, rows: np.ndarray, seed: int, step: int | None) -> Tensor:
        """(n,C,h,w) of N(0, 1): a stream of random numbers for each (seed, step, row), or (row) without a step."""
        noise = np.empty((len(rows), *self.shape), dtype=np.float32)
        key = np.array([seed % 2**64, 0 if step is None else step + 1], dtype=np.uint64)
        for out, row in zip(noise, rows.tolist(), strict=True):
            stream = np.random.Philox(key=key, counter=np.array([0, 0, 0, row], dtype=np.uint64))
            np.random.Generator(stream).standard_normal(dtype=np.float32, out=out)
        return torch.from_numpy(noise)

    def _shard(self, number: int) -> Tensor:
        if number not in self._open:
            self._open[number] = read_shard(self.files[number])[1]["moments"]
        return self._open[number]


def is_latents(path: Path) -> bool:
    """Whether a folder is one of `biflow latents encode`, finished or not."""
    return (path / INDEX).is_file()


def read_index(folder: Path) -> dict[str, Any]:
    """latents.json. ValueError: of another format; FileNotFoundError: there is none."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = index["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON as `biflow latents encode` writes it; {error!r}") from None
    if found != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, got {found!r}")
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    with replacing(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1, ensure_ascii=True, allow_nan=False) + "\n", encoding="utf-8")


def read_shard(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what its metadata says, tensors mapped from the file). ValueError: truncated or foreign; FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: the latents are not complete")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[ENTRY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            if "moments" not in tensors:
                raise ValueError("got no tensor 'moments'")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a shard of latents, got a truncated or foreign file ({error})") from None
    return about, tensors


def shard_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of a shard's tensors: of moments, and of labels if there are any."""
    total = hashlib.sha256()
    for name in ("moments", "labels"):
        if name in tensors:
            total.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def read_latents(config: DataConfig) -> ImageData:
    """The latents in the folder `config.source`, see `load`. Errors name the file, what was expected and what came."""
    folder = Path(config.source).expanduser()
    index = read_index(folder)
    if "shards" not in index:
        raise ValueError(f"{folder}: expected finished latents, got some: `biflow latents encode` goes on where it was")
    shape = tuple(index["shape"])
    if config.img_size not in (None, shape[1]):
        raise ValueError(
            f"{folder}: expected the latents' img_size {shape[1]} or None (they are used as stored), got "
            f"{config.img_size}"
        )
    if config.flip and not index["mirrored"]:
        raise ValueError(f"{folder}: flip: expected false with latents encoded without those of mirrored images")
    normalization = index["normalization"][config.normalize_latents]
    if not all(value > 0 for value in normalization["scale"]):
        raise ValueError(f"{folder}: expected channels that vary, got standard deviations {normalization['scale']}")
    shards, labels = [], []
    for entry in index["shards"]:
        path = folder / entry["file"]
        found = read_shard(path)[1]
        want = (entry["images"], 1 + index["mirrored"], 2, *shape)
        if tuple(found["moments"].shape) != want or found["moments"].dtype != DTYPES[index["dtype"]]:
            got = f"{tuple(found['moments'].shape)} {found['moments'].dtype}"
            raise ValueError(f"{path}: expected moments {want} in {index['dtype']}, got {got}")
        shards.append(path)
        labels.append(found["labels"].clone() if index["class_names"] else None)
    sizes = np.array([entry["images"] for entry in index["shards"]], dtype=np.int64)
    digests = [[entry["split"], entry["images"], entry["sha256"]] for entry in index["shards"]]
    fingerprint = hashlib.sha256(json.dumps([digests, index["class_names"]]).encode()).hexdigest()
    everything = Latents(
        tuple(shards), np.cumsum(sizes), np.arange(sizes.sum()), shape,
        tuple(normalization["shift"]), tuple(normalization["scale"]),
        config.posterior, config.flip, config.workers, fingerprint,
    )  # fmt: skip
    y = torch.cat(labels) if index["class_names"] else None
    split_of = np.repeat([entry["split"] for entry in index["shards"]], sizes)
    parts = {}
    for split in SPLITS:
        rows = torch.from_numpy(np.flatnonzero(split_of == split))
        parts[split] = (everything.take(rows), None if y is None else y[rows])
    about = {"img_size": index["img_size"], "autoencoder": index["autoencoder"], **normalization}
    test = parts["val"] if len(parts["val"][0]) else None
    extra = {"fingerprint": fingerprint, "latents": about}
    return assemble(*parts["train"], test, config, tuple(index["class_names"]), **extra)
