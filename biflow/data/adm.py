"""Images as ADM (openai/guided-diffusion) stores them: a .npz with arr_0 (N,H,W,3) uint8 and arr_1 (N,) int64 labels;
and in floating point.

Large ones are written and read in batches, since the arrays of a .npz lie one after the other.
"""

import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from biflow.data.images import FLOATS, PIXEL_CHANNELS, in_range
from biflow.files import replacing

IMAGES, LABELS = "arr_0", "arr_1"
KEYS = (IMAGES, "images", "x_train")  # arrays of images, as ADM and as `biflow.data.load` have them


def to_bytes(images: Tensor) -> Tensor:
    """Images (N,1|3,H,W) in [-1, 1] -> (N,3,H,W) uint8, gray repeated: v = floor(128 (x + 1)), clamped to 0..255.

    The inverse of how uint8 images are read (v -> (v + 0.5) / 128 - 1): each value goes to the bin that it lies in. NaN
    becomes gray, 128; uint8 stays as it is. ValueError: another number of channels, such as latents.
    """
    if images.dim() != 4 or images.shape[1] not in PIXEL_CHANNELS:
        raise ValueError(f"expected images (N,1,H,W) or (N,3,H,W), got shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.expand(-1, 3, -1, -1)
    values = ((in_range(images.float()).nan_to_num(0.0) + 1) * 128).floor().clamp(0, 255)
    return values.to(torch.uint8).expand(-1, 3, -1, -1)


def write_adm(path: str | Path, batches: Iterable[Tensor], count: int, labels: Tensor | None = None) -> None:
    """Write `count` images, which come as batches (n,1|3,H,W) for `to_bytes`, and labels (count,) to a .npz of ADM's.

    No more than a batch is held in memory; the file is there whole or not at all. ValueError: as `to_bytes`, or not
    `count` images of one size.
    """
    _write((IMAGES, LABELS), path, map(to_bytes, batches), count, labels)


def write_floats(path: str | Path, batches: Iterable[Tensor], count: int, labels: Tensor | None = None) -> None:
    """As `write_adm`, but images (n,C,H,W) as fp32 `images` (N,H,W,C), pixels clamped to [-1, 1], and `labels`."""
    _write(("images", "labels"), path, (in_range(batch.float()) for batch in batches), count, labels)


def _write(
    names: tuple[str, str], path: str | Path, batches: Iterable[Tensor], count: int, labels: Tensor | None
) -> None:
    """Batches (n,C,H,W) of one dtype to an array (N,H,W,C) and labels, by their names."""
    with replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(f"{names[0]}.npy", "w", force_zip64=True) as file:
            written, shape = 0, None
            for batch in batches:
                pixels = batch.permute(0, 2, 3, 1).contiguous().numpy()
                if shape is None:
                    shape, dtype = pixels.shape[1:], npy.dtype_to_descr(pixels.dtype)
                    header = {"descr": dtype, "fortran_order": False, "shape": (count, *shape)}
                    npy.write_array_header_1_0(file, header)
                if pixels.shape[1:] != shape:
                    raise ValueError(f"expected images of shape {shape} as the first, got {pixels.shape[1:]}")
                file.write(pixels.data)
                written += len(pixels)
        if written != count:
            raise ValueError(f"expected {count} images, got {written}")
        if labels is not None:
            with archive.open(f"{names[1]}.npy", "w") as file:
                npy.write_array(file, labels.cpu().numpy().astype(np.int64), allow_pickle=False)


class NpzImages:
    """The images of a .npz, read in batches: arr_0, images or x_train, uint8 or floating point in [-1, 1].

    count: N, 0 if the file has no such array (statistics alone).
    """

    def __init__(self, path: str | Path):
        """FileNotFoundError: no such file. ValueError: not a .npz, or not images (N,H,W) or (N,H,W,1|3)."""
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.keys = tuple(name.removesuffix(".npy") for name in archive.namelist())
                self.key = next((key for key in KEYS if key in self.keys), None)
                if self.key is None:
                    self.count = 0
                    return
                with archive.open(f"{self.key}.npy") as file:
                    shape, dtype = _header(file)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: expected a .npz with images; {error}") from None
        self.count, self.shape, self.dtype = shape[0], shape[1:], dtype
        usable = dtype == np.uint8 or (dtype.kind == "f" and dtype.itemsize in (2, 4, 8))
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in PIXEL_CHANNELS) or 0 in shape or not usable:
            raise ValueError(
                f"{path}: {self.key}: expected images (N,H,W) or (N,H,W,1|3), uint8 or floating point in [-1, 1]; got "
                f"{dtype} {shape}"
            )

    def batches(self, size: int, rows: range | None = None) -> Iterator[Tensor]:
        """The images `rows`, consecutive ones (None: all), as (n,3,H,W) uint8 in order, n = `size` but for the last.

        ValueError: values out of range, a file cut off.
        """
        rows = range(self.count) if rows is None else rows
        row = int(np.prod(self.shape)) * self.dtype.itemsize
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.key}.npy") as file:
            _header(file)
            if rows.start:
                file.seek(rows.start * row, os.SEEK_CUR)
            for start in range(rows.start, rows.stop, size):
                n = min(size, rows.stop - start)
                data = file.read(n * row)
                if len(data) != n * row:
                    raise ValueError(f"{self.path}: {self.key}: expected {self.count} images, got fewer")
                yield self._bytes(np.frombuffer(data, self.dtype).reshape(n, *self.shape))

    def _bytes(self, array: np.ndarray) -> Tensor:
        array = array[..., None] if array.ndim == 3 else array
        if self.dtype == np.uint8:
            return torch.from_numpy(array.transpose(0, 3, 1, 2).copy()).expand(-1, 3, -1, -1)
        values = torch.from_numpy(array.transpose(0, 3, 1, 2).astype(np.float32))
        if not bool((values.abs() <= 1).all()):  # also false for NaN
            raise ValueError(
                f"{self.path}: {self.key}: expected values in [-1, 1], got values in [{values.min():g}, "
                f"{values.max():g}]"
            )
        return to_bytes(FLOATS.values(values))


def _header(file) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"expected version 1.0 or 2.0 of numpy's format, got {version}")
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 1:
        raise ValueError("expected arrays in C order, got Fortran order")
    return shape, dtype
