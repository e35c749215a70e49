"""Readers: scikit-learn's digits, .npz files, image folders. Each checks what it read and names the file in errors."""

import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from biflow.data.images import (
    BYTES,
    DIGITS,
    FLOATS,
    PIXEL_CHANNELS,
    DataConfig,
    ImageData,
    ImageFiles,
    Images,
    decode_image,
    split_indices,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CACHE_BYTES = 1 << 30  # folders whose decoded uint8 images are larger are decoded batch by batch
NPZ_KEYS = "x_train [y_train] [x_test [y_test]], or images [labels]"


def load(config: DataConfig) -> ImageData:
    """Read and split the data that `config` names. The same configuration and files give the same data.

    Sources:
        "digits": scikit-learn's 1,797 handwritten digits, 8x8, values v = 0..16 as x = v / 8 - 1, ten classes.
        *.npz: arrays x_train (with y_train, x_test, y_test) or images (with labels); images (N,H,W) or (N,H,W,1|3),
            square, uint8 (v -> (v + 0.5) / 128 - 1) or floating point in [-1, 1]; labels (N,) integers 0..K-1, each
            of them in use. Floating-point arrays (N,H,W,C) of another C are latents of an autoencoder: any finite
            values, used as stored. Never unpickled.
        folder: images in one sub-folder per class (classes in the order of the sub-folders' names), or directly in
            the folder (no labels). Gray if every file is, RGB otherwise. Held in memory as uint8 up to 1 GiB, beyond
            that decoded batch by batch. Transparency is dropped; hidden files and other suffixes are passed over.

    Raises:
        ImportError: scikit-learn is not installed. FileNotFoundError: no such file or folder.
        ValueError: the source is not as above; names the file, what was expected and what came.
    """
    if config.source == "digits":
        return _digits(config)
    path = Path(config.source).expanduser()
    if path.is_dir():
        return _folder(path, config)
    if path.suffix == ".npz":
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        return _npz(path, config)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected 'digits', a .npz file or an image folder; there is no such path")
    raise ValueError(f"{path}: expected 'digits', a .npz file or an image folder, got a file of another kind")


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
    return _assemble(images, torch.from_numpy(raw.target.astype(np.int64)), None, config, tuple("0123456789"))


def _npz(path: Path, config: DataConfig) -> ImageData:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, Mapping):
            raise ValueError("got a single array (.npy)")
        with file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a .npz file of plain arrays ({NPZ_KEYS}); {error}") from None
    train, labels = ("images", "labels") if "images" in arrays else ("x_train", "y_train")
    allowed = {train, labels} if train == "images" else {train, labels, "x_test", "y_test"}
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
    return _assemble(images, y, test, config, names)


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
        array = array.astype(np.float32)
        low, high = float(array.min()), float(array.max())
        if latents and not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{path}: {name}: expected finite latents, got values in [{low:g}, {high:g}]")
        if not latents and not (low >= -1 and high <= 1):  # also false for NaN
            raise ValueError(f"{path}: {name}: expected values in [-1, 1], got values in [{low:g}, {high:g}]")
    pixels = torch.from_numpy(array[:, None] if gray else np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
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
    classes = train.unique()
    if len(classes) != int(classes[-1]) + 1:
        gap = next(k for k, found in enumerate(classes.tolist()) if k != found)
        raise ValueError(
            f"{path}: expected labels 0..K-1 without gaps, got no training image of class {gap} below {classes[-1]}"
        )
    if test is not None and int(test.max()) >= len(classes):
        raise ValueError(f"{path}: y_test: expected labels in [0, {len(classes)}) as in y_train, got {int(test.max())}")


def _folder(path: Path, config: DataConfig) -> ImageData:
    from PIL import Image

    if config.img_size is None:
        raise ValueError(f"{path}: expected img_size with an image folder (images are resized to it), got None")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    flat = _image_paths(path)
    if folders and flat:
        raise ValueError(f"{path}: expected images in class sub-folders or directly in the folder, got both")
    if not folders and not flat:
        raise ValueError(f"{path}: expected images ({' '.join(IMAGE_SUFFIXES)}), got none")
    files, labels = flat, None
    if folders:
        groups = [_image_paths(folder) for folder in folders]
        empty = [folder for folder, group in zip(folders, groups, strict=True) if not group]
        if empty:
            raise ValueError(
                f"{empty[0]}: expected images ({' '.join(IMAGE_SUFFIXES)}) in every class folder, got none"
            )
        files = [file for group in groups for file in group]
        labels = torch.tensor([k for k, group in enumerate(groups) for _ in group])
    gray = True
    for file in files:
        try:
            with Image.open(file) as image:  # reads the header only
                gray = gray and image.mode in ("1", "L")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file}: expected an image that Pillow can decode; {error}") from None
    channels = 1 if gray else 3
    images: Images | ImageFiles = ImageFiles(files, channels, config.img_size)
    if len(files) * channels * config.img_size**2 <= CACHE_BYTES:
        images = Images(torch.stack([decode_image(file, channels, config.img_size) for file in files]), BYTES)
    return _assemble(images, labels, None, config, tuple(folder.name for folder in folders))


def _image_paths(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_file() and not e.name.startswith(".")]
    return [folder / name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES)]


def _assemble(
    images: Images | ImageFiles,
    labels: Tensor | None,
    test: tuple[Images, Tensor | None] | None,
    config: DataConfig,
    class_names: tuple[str, ...],
) -> ImageData:
    train_y, (val_x, val_y) = labels, test or (None, None)
    if test is None:
        train, held_out = split_indices(len(images), labels, config.val_fraction, config.seed)
        images, val_x = images.take(train), images.take(held_out)
        train_y, val_y = (None, None) if labels is None else (labels[train], labels[held_out])
    first = images.batch(torch.tensor([0]))
    quantisation = images.quantisation
    return ImageData(
        train_x=images,
        val_x=val_x,
        train_y=train_y,
        val_y=val_y,
        num_classes=len(class_names),
        class_names=class_names,
        channels=first.shape[1],
        img_size=first.shape[2],
        levels=quantisation.levels,
        bin_width=quantisation.bin_width,
    )
