"""What a data set is after it was read: batches of images in [-1, 1], labels, and how the values were quantised."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biflow.config import check_fields

if TYPE_CHECKING:
    from biflow.data.encoded import Corrupt, EncodedImages
    from biflow.data.latents import Latents


CROPS = ("center", "random")
LATENT_NORMALIZATIONS = ("scaling", "channels")
POSTERIORS = ("sample", "mean")
PIXEL_CHANNELS = (1, 3)  # gray, RGB; arrays with another number of channels are latents


def spread(count: int, limit: int) -> Tensor:
    """At most `limit` of the indices 0..count-1, evenly spaced, int64."""
    return torch.arange(count) if count <= limit else torch.arange(limit) * count // limit


@dataclass(frozen=True)
class DataConfig:
    """Where images come from.

    source: "digits" (scikit-learn's, 8x8); the path of a .npz file, of an image folder, of WebDataset shards (a folder,
        a .tar file, a pattern such as "train-{000..127}.tar" or "*.tar") or of a Hugging Face data set (a folder of
        `save_to_disk` or of parquet files, a .parquet file); "hf:NAME", a data set of the hub; a folder of latents. See
        `load`.
    img_size: side of the square images; required where images lie encoded (folders, shards, Hugging Face), which are
        resized and cropped to it; None otherwise.
    val_fraction: share held out, class by class, where the source has no test split of its own.
    flip: train with random horizontal flips; of latents, with those of mirrored images in half of the cases.
    seed: of the split.
    crop: what training sees of an encoded image, as ADM does it: "center"; "random": a random square of the image
        resized so that the square is at least 0.8 of its shorter side. Held-out images are always centre crops.

    Of encoded images only:
    channels: 1 or 3; None: 1 if all of 1,000 images, evenly spaced, are gray.
    classes: a class map, a text file with the name of a class a line or a .json file {name: number}. None: the class
        folders, names or numbers of the data, in order.
    exclude: a file with the name of an image, a class folder or a shard a line to be left out, such as `biflow data
        check --out` and training (corrupt.txt) write.
    split: of a Hugging Face data set; None: "train", or the only one.
    image_key, label_key: of a Hugging Face data set: columns; of shards: extensions, such as "jpg" and "cls", or
        "json.KEY" for a label. None: the only images; labels where they usually are.
    index: the file that keeps the index of shards; None: one beside the first shard.
    workers: processes that decode training images, or read latents, ahead of time; the result does not depend on it.
        0: none.

    Of latents only:
    normalize_latents: x = (z - shift) / scale of a latent z. "scaling": by the autoencoder's shift_factor and
        scaling_factor, x = (z - shift_factor) scaling_factor, or by its latents_mean and latents_std if it has them;
        "channels": by the mean and the standard deviation of each channel over the whole set.
    posterior: "sample": every step draws z from the autoencoder's posterior anew, held-out images have one draw;
        "mean": z is its mean.
    """

    source: str = "digits"
    img_size: int | None = None
    val_fraction: float = 0.1
    flip: bool = False
    seed: int = 0
    crop: str = "center"
    channels: int | None = None
    classes: str | None = None
    exclude: str | None = None
    split: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    index: str | None = None
    workers: int = 0
    normalize_latents: str = "scaling"
    posterior: str = "sample"

    def __post_init__(self):
        check_fields(self)
        if not self.source:
            raise ValueError("source: expected 'digits' or where the images are, got an empty string")
        if self.img_size is not None and self.img_size < 1:
            raise ValueError(f"img_size: expected at least 1, got {self.img_size}")
        if not (0 <= self.val_fraction < 1):
            raise ValueError(f"val_fraction: expected a number in [0, 1), got {self.val_fraction}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")
        if self.crop not in CROPS:
            raise ValueError(f"crop: expected one of {', '.join(CROPS)}, got {self.crop!r}")
        for name, choices in (("normalize_latents", LATENT_NORMALIZATIONS), ("posterior", POSTERIORS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.channels not in (None, *PIXEL_CHANNELS):
            raise ValueError(f"channels: expected 1, 3 or None, got {self.channels}")
        if self.workers < 0:
            raise ValueError(f"workers: expected 0 or more, got {self.workers}")


@dataclass(frozen=True)
class Quantisation:
    """Stored value v -> x = v * scale + offset. levels: number of values of v, None for floats stored as they are."""

    levels: int | None
    scale: float
    offset: float

    @property
    def bin_width(self) -> float | None:
        """Distance of neighbouring values of x; None for floats."""
        return None if self.levels is None else self.scale

    def values(self, pixels: Tensor) -> Tensor:
        """Stored values as x, fp32 and contiguous. The same bits on every device."""
        return pixels.float().contiguous() * self.scale + self.offset


DIGITS = Quantisation(17, 1 / 8, -1.0)
BYTES = Quantisation(256, 1 / 128, 1 / 256 - 1)  # bin centres: x +- half a bin stays in [-1, 1]
FLOATS = Quantisation(None, 1.0, 0.0)


def in_range(images: Tensor) -> Tensor:
    """Images (N,C,H,W) clamped to [-1, 1], as they are looked at and stored; latents (C not 1 or 3) as they are."""
    return images.clamp(-1, 1) if images.shape[1] in PIXEL_CHANNELS else images


class Images:
    """Images held in memory. pixels: (N,C,H,W) uint8, or float32 or float16 in [-1, 1] or latents; any strides."""

    def __init__(self, pixels: Tensor, quantisation: Quantisation):
        self.pixels = pixels
        self.quantisation = quantisation
        self.channels, self.img_size = pixels.shape[1], pixels.shape[2]

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def batch(self, indices: Tensor | None = None) -> Tensor:
        """Images `indices` (n,) int64, or all of them, as (n,C,H,W) fp32 in [-1, 1]. The same bits every time."""
        return self.quantisation.values(self.pixels if indices is None else self.pixels[indices])

    def take(self, indices: Tensor) -> "Images":
        """The images `indices`, in that order."""
        return Images(self.pixels[indices], self.quantisation)

    def digest(self) -> str:
        """SHA-256 (hex) of all that `batch` depends on."""
        about = [str(self.pixels.dtype), *self.pixels.shape, repr(self.quantisation)]
        total = hashlib.sha256(json.dumps(about).encode())
        for part in self.pixels.split(1024):  # strides may be any: no copy of all of them
            total.update(part.contiguous().numpy())
        return total.hexdigest()


@dataclass(frozen=True)
class ImageData:
    """A data set, split.

    train_x, val_x: images; `len(...)` and `.batch(indices)` -> (n,C,H,W) fp32 in [-1, 1]. val_x may be empty.
    train_y, val_y: labels (N,) int64 in [0, num_classes), or None.
    num_classes, class_names: 0 and () without labels.
    channels, img_size: C, and H = W.
    levels, bin_width: number of pixel values and their distance in x; None for images stored as floats.
    fingerprint: SHA-256 (hex) over the names and labels of encoded images in their order, or over all latents; None for
        arrays, see `digest`.
    corrupt: which encoded images were found corrupt so far; None for arrays and latents.
    latents: what decodes latents, JSON values: img_size of the images, autoencoder (its config and SHA-256), shift and
        scale of z = x scale + shift, a number a channel; None for anything else.
    """

    train_x: "Images | EncodedImages | Latents"
    val_x: "Images | EncodedImages | Latents"
    train_y: Tensor | None
    val_y: Tensor | None
    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    img_size: int
    levels: int | None
    bin_width: float | None
    fingerprint: str | None = None
    corrupt: "Corrupt | None" = None
    latents: dict | None = None

    def digest(self) -> str:
        """`fingerprint`, or of arrays the SHA-256 (hex) over all images and labels of both parts."""
        if self.fingerprint is not None:
            return self.fingerprint
        total = hashlib.sha256()
        for images, labels in ((self.train_x, self.train_y), (self.val_x, self.val_y)):
            total.update(images.digest().encode())
            total.update(b"" if labels is None else labels.numpy().tobytes())
        return total.hexdigest()


def split_indices(count: int, labels: Tensor | None, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(train, held out) indices, each ascending: round(fraction n) of each class's n images, at most n - 1.

    The choice depends on the seed, the labels and the fraction only.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.arange(count)] if labels is None else [(labels == k).nonzero()[:, 0] for k in labels.unique()]
    held_out = torch.zeros(count, dtype=torch.bool)
    for group in groups:
        size = min(math.floor(fraction * len(group) + 0.5), len(group) - 1)
        held_out[group[torch.randperm(len(group), generator=generator)[:size]]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
