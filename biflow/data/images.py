"""What a data set is after it was read: batches of images in [-1, 1], labels, and how the values were quantised."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from biflow.config import check_fields


def spread(count: int, limit: int) -> Tensor:
    """At most `limit` of the indices 0..count-1, evenly spaced, int64."""
    return torch.arange(count) if count <= limit else torch.arange(limit) * count // limit


@dataclass(frozen=True)
class DataConfig:
    """Where images come from.

    source: "digits" (scikit-learn's, 8x8), the path of a .npz file, or the path of an image folder.
    img_size: side of the square images; required for folders (shorter side resized, centre cropped), None otherwise.
    val_fraction: share held out, class by class, where the source has no test split of its own.
    flip: train with random horizontal flips.
    seed: of the split.
    """

    source: str = "digits"
    img_size: int | None = None
    val_fraction: float = 0.1
    flip: bool = False
    seed: int = 0

    def __post_init__(self):
        check_fields(self)
        if not self.source:
            raise ValueError("source: expected 'digits', a .npz file or an image folder, got an empty string")
        if self.img_size is not None and self.img_size < 1:
            raise ValueError(f"img_size: expected at least 1, got {self.img_size}")
        if not (0 <= self.val_fraction < 1):
            raise ValueError(f"val_fraction: expected a number in [0, 1), got {self.val_fraction}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")


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


PIXEL_CHANNELS = (1, 3)  # gray, RGB; arrays with another number of channels are latents
DIGITS = Quantisation(17, 1 / 8, -1.0)
BYTES = Quantisation(256, 1 / 128, 1 / 256 - 1)  # bin centres: x +- half a bin stays in [-1, 1]
FLOATS = Quantisation(None, 1.0, 0.0)


def in_range(images: Tensor) -> Tensor:
    """Images (N,C,H,W) clamped to [-1, 1], as they are looked at and stored; latents (C not 1 or 3) as they are."""
    return images.clamp(-1, 1) if images.shape[1] in PIXEL_CHANNELS else images


class Images:
    """Images held in memory. pixels: (N,C,H,W) uint8, float32 in [-1, 1], or float32 latents."""

    def __init__(self, pixels: Tensor, quantisation: Quantisation):
        self.pixels = pixels
        self.quantisation = quantisation

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def batch(self, indices: Tensor | None = None) -> Tensor:
        """Images `indices` (n,) int64, or all of them, as (n,C,H,W) fp32 in [-1, 1]. The same bits every time."""
        pixels = self.pixels if indices is None else self.pixels[indices]
        return pixels.float() * self.quantisation.scale + self.quantisation.offset

    def take(self, indices: Tensor) -> "Images":
        """The images `indices`, in that order."""
        return Images(self.pixels[indices], self.quantisation)


class ImageFiles:
    """Images decoded from their files each time they are asked for; for folders too large to hold in memory."""

    def __init__(self, paths: Sequence[Path], channels: int, img_size: int):
        self.paths = tuple(paths)
        self.channels = channels
        self.img_size = img_size
        self.quantisation = BYTES

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor | None = None) -> Tensor:
        """As `Images.batch`. ValueError naming the file that cannot be decoded."""
        wanted = range(len(self)) if indices is None else indices.tolist()
        pixels = [decode_image(self.paths[i], self.channels, self.img_size) for i in wanted]
        shape = (0, self.channels, self.img_size, self.img_size)
        return Images(torch.stack(pixels) if pixels else torch.empty(shape, dtype=torch.uint8), BYTES).batch()

    def take(self, indices: Tensor) -> "ImageFiles":
        """The images `indices`, in that order."""
        return ImageFiles([self.paths[i] for i in indices.tolist()], self.channels, self.img_size)


@dataclass(frozen=True)
class ImageData:
    """A data set, split.

    train_x, val_x: images; `len(...)` and `.batch(indices)` -> (n,C,H,W) fp32 in [-1, 1]. val_x may be empty.
    train_y, val_y: labels (N,) int64 in [0, num_classes), or None.
    num_classes, class_names: 0 and () without labels.
    channels, img_size: C, and H = W.
    levels, bin_width: number of pixel values and their distance in x; None for images stored as floats.
    """

    train_x: Images | ImageFiles
    val_x: Images | ImageFiles
    train_y: Tensor | None
    val_y: Tensor | None
    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    img_size: int
    levels: int | None
    bin_width: float | None


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


def decode_image(path: Path, channels: int, img_size: int) -> Tensor:
    """An image file -> (C, img_size, img_size) uint8: turned as its EXIF says, shorter side resized, centre cropped."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # converting would clip 16 bits to 8
                raise ValueError(f"expected 8 bits a channel, got mode {image.mode}")
            image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (img_size, img_size), Image.Resampling.BICUBIC)
            pixels = np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected an image that Pillow can decode; {error}") from None
    return torch.from_numpy(pixels).reshape(img_size, img_size, channels).permute(2, 0, 1).contiguous()
