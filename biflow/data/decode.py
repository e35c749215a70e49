"""Encoded images (PNG, JPEG, ...) to pixels: decoding, and the crops of ADM (openai/guided-diffusion)."""

import io
import math
import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

GRAY_MODES = ("1", "L", "LA")
SMALLEST_SHARE = 0.8  # of a random crop in the shorter side, as in ADM


class CorruptImage(ValueError):
    """Bytes that are not an image of 8 bits a channel which Pillow can decode; str(...) is the reason."""


def open_image(data: bytes) -> "Image":
    """The decoded image, turned as its EXIF says, in the mode of the file. CorruptImage."""
    from PIL import Image, ImageOps

    if not data:
        raise CorruptImage("empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":  # converting would clip 16 bits to 8
                raise CorruptImage(f"expected 8 bits a channel, got mode {image.mode}")
            image.load()
            return ImageOps.exif_transpose(image)
    except CorruptImage:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        text = " ".join(str(error).split()).replace("<_io.BytesIO object at", "<").split(" <")[0]
        raise CorruptImage(f"expected an image that Pillow can decode; {text or type(error).__name__}") from None


def header_mode(data: bytes) -> str | None:
    """The mode of an image by its header; None if that cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode
    except MemoryError:
        raise
    except Exception:
        return None


def crop_numbers(seed: int, step: int, position: int) -> tuple[float, float, float]:
    """Three numbers in [0, 1) for the image `position` in a step of a run, whichever process decodes it."""
    draw = random.Random((seed << 128) | (step << 64) | position).random  # the same sequence in every version of Python
    return draw(), draw(), draw()


def decode(data: bytes, channels: int, img_size: int, crop: tuple[float, float, float] | None = None) -> np.ndarray:
    """An image file's bytes -> pixels (C, img_size, img_size) uint8. Transparency is dropped.

    The shorter side is halved by box filters while it stays at least the wanted one, then resized to it bicubically,
    and a square of img_size is cut out (the longer side is rounded as Python rounds), as in ADM.

    Args:
        channels: 1 or 3. A colour image becomes gray with 1.
        crop: None: the shorter side becomes img_size and the centre is cut out. Numbers in [0, 1): the shorter side
            becomes one of img_size ... ceil(img_size / 0.8) by the first, the square's place is by the others.

    Raises:
        CorruptImage.
    """
    from PIL.Image import Resampling

    image = open_image(data).convert("L" if channels == 1 else "RGB")
    side = img_size
    if crop is not None:
        side += int(crop[0] * (math.ceil(img_size / SMALLEST_SHARE) - img_size + 1))
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    spare_x, spare_y = image.width - img_size, image.height - img_size
    if crop is None:
        left, top = spare_x // 2, spare_y // 2
    else:
        top, left = int(crop[1] * (spare_y + 1)), int(crop[2] * (spare_x + 1))
    pixels = np.asarray(image)[top : top + img_size, left : left + img_size]
    return pixels.reshape(img_size, img_size, channels).transpose(2, 0, 1)
