"""Images that come as arrays: .npz files; and the split of what was read."""

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from biflow.data.images import BYTES, FLOATS, PIXEL_CHANNELS, DataConfig, ImageData, Images, split_indices
from biflow.data.labels import unused_class

if TYPE_CHECKING:
    from biflow.data.encoded import EncodedImages
    from biflow.data.latents import Latents

NPZ_KEYS = "x_train [y_train] [x_test [y_test]], images [labels], or arr_0 [arr_1]"
PAIRS = {"images": "labels", "arr_0": "arr_1", "x_train": "y_train"}  # arr_0, arr_1: as ADM names them


def read_npz(path: Path, config: DataConfig) -> ImageData:
    """The data in a .npz file, see `load`. ValueError names the file, the array, what was expected and what came."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, Mapping):
            raise ValueError("got a single array (.npy)")
        with file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a .npz file of plain arrays ({NPZ_KEYS}); {error}") from None
    train = next((name for name in PAIRS if name in arrays), "x_train")
    labels = PAIRS[train]
    allowed = {train, labels} | ({"x_test", "y_test"} if train == "x_train" else set())
    if train not in arrays or not arrays.keys() <= allowed:
        raise ValueError(f"{path}: expected arrays {NPZ_KEYS}; got {', '.join(sorted(arrays)) or 'none'}")
    if "y_test" in arrays and "x_test" not in arrays:
        raise ValueError(f"{path}: expected x_test beside y_test, got y_test alone")
    images = _array_images(path, train, arrays[train])
    y = _array_labels(path, labels, arrays[labels], len(images)) if labels in arrays else None
    test = None
    if "x_test" in arrays:
        test_images = _array_images(path, "x_test", arrays["x_test"])
        if test_images.pixels.shape[1:] != images.pixels.shape[1:] or test_images.quantisation != images.quantisation:
            raise ValueError(
                f"{path}: expected x_test like x_train {tuple(images.pixels.shape[1:])} {images.pixels.dtype}, "
                f"got {tuple(test_images.pixels.shape[1:])} {test_images.pixels.dtype}"
            )
        if (y is None) != ("y_test" not in arrays):
            raise ValueError(f"{path}: expected labels for both of x_train and x_test or for none, got one of them")
        test_y = None if y is None else _array_labels(path, "y_test", arrays["y_test"], len(test_images))
        test = (test_images, test_y)
    if y is not None:
        _check_classes(path, y, None if test is None else test[1])
    if config.img_size not in (None, images.pixels.shape[-1]):
        raise ValueError(
            f"{path}: expected images of the configured img_size {config.img_size}, got {images.pixels.shape[-1]} "
            "(images in a .npz are used as stored: resize them, or leave img_size out)"
        )
    names = () if y is None else tuple(str(k) for k in range(int(y.max()) + 1))
    return assemble(images, y, test, config, names)


def _array_images(path: Path, name: str, array: np.ndarray) -> Images:
    gray = array.ndim == 3
    latents = array.ndim == 4 and array.dtype.kind == "f" and array.shape[3] not in (0, *PIXEL_CHANNELS)
    if not gray and not latents and (array.ndim != 4 or array.shape[3] not in PIXEL_CHANNELS):
        raise ValueError(
            f"{path}: {name}: expected shape (N,H,W) or (N,H,W,1|3), or (N,H,W,C) in floating point for latents; got "
            f"{array.dtype} {array.shape}"
        )
    if array.shape[0] < 1 or array.shape[1] < 1 or array.shape[1] != array.shape[2]:
        raise ValueError(f"{path}: {name}: expected at least one square image, got shape {array.shape}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{path}: {name}: expected uint8, or floating point in [-1, 1]; got {array.dtype}")
    if array.dtype.kind == "f":
        if array.dtype not in (np.float16, np.float32):
            array = array.astype(np.float32)
        low, high = float(array.min()), float(array.max())
        if latents and not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{path}: {name}: expected finite latents, got values in [{low:g}, {high:g}]")
        if not latents and not (low >= -1 and high <= 1):  # also false for NaN
            raise ValueError(f"{path}: {name}: expected values in [-1, 1], got values in [{low:g}, {high:g}]")
    pixels = torch.from_numpy(array[:, None] if gray else array.transpose(0, 3, 1, 2))
    return Images(pixels, BYTES if array.dtype == np.uint8 else FLOATS)


def _array_labels(path: Path, name: str, array: np.ndarray, count: int) -> Tensor:
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise ValueError(
            f"{path}: {name}: expected {count} integers, shape ({count},); got {array.dtype} {array.shape}"
        )
    if int(array.min()) < 0 or int(array.max()) >= 2**31:
        raise ValueError(
            f"{path}: {name}: expected labels counted from 0, got values in [{array.min()}, {array.max()}]"
        )
    return torch.from_numpy(array.astype(np.int64))


def _check_classes(path: Path, train: Tensor, test: Tensor | None) -> None:
    gap, largest = unused_class(train), int(train.max())
    if gap is not None:
        raise ValueError(
            f"{path}: expected labels 0..K-1 without gaps, got no training image of class {gap} below {largest}"
        )
    if test is not None and int(test.max()) > largest:
        raise ValueError(f"{path}: y_test: expected labels in [0, {largest + 1}) as in y_train, got {int(test.max())}")


def assemble(
    images: "Images | EncodedImages | Latents",
    labels: Tensor | None,
    test: "tuple[Images | Latents, Tensor | None] | None",
    config: DataConfig,
    class_names: tuple[str, ...],
    **more: Any,
) -> ImageData:
    """A data set and its split: `test` (images, labels), or held out as `config` says. more: fields of `ImageData`."""
    train_y, (val_x, val_y) = labels, test or (None, None)
    if test is None:
        train, held_out = split_indices(len(images), labels, config.val_fraction, config.seed)
        images, val_x = images.take(train), images.take(held_out)
        train_y, val_y = (None, None) if labels is None else (labels[train], labels[held_out])
    quantisation = images.quantisation
    return ImageData(
        train_x=images,
        val_x=val_x,
        train_y=train_y,
        val_y=val_y,
        num_classes=len(class_names),
        class_names=class_names,
        channels=images.channels,
        img_size=images.img_size,
        levels=quantisation.levels,
        bin_width=quantisation.bin_width,
        **more,
    )
