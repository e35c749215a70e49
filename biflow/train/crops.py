"""Random resized crops: the same boxes for as many images as have to match, drawn from a generator."""

import math

import torch
from torch import Tensor

from biflow.train.draws import draw_rows

ATTEMPTS = 10


def random_boxes(
    count: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Boxes in images of `size` (H, W), distributed as those of torchvision's RandomResizedCrop.

    Area H W u with u ~ U(scale), width / height exp(v) with v ~ U(log ratio), both rounded to pixels; the first of ten
    draws that fits the image, at a uniform place; where none fits, the largest box in the middle that `ratio` allows.

    Args:
        count: N. size: (H, W) in pixels. scale, ratio: (smallest, largest).
        generator: always gives 22 N numbers, whatever fits; the boxes are on its device.

    Returns:
        (N, 4) int64: top, left, height, width.
    """
    height, width = size
    kind = {"dim": 1, "device": generator.device, "dtype": torch.float64}
    u, v = draw_rows(torch.rand, (2, count, ATTEMPTS), generator, **kind)
    place = draw_rows(torch.rand, (2, count), generator, **kind)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * v)
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    middle = min(max(width / height, ratio[0]), ratio[1])
    fallback = (min(height, round(width / middle)), min(width, round(height * middle)))
    found = fits.any(1)
    h, w = (
        torch.where(found, side.gather(1, first)[:, 0], float(most))
        for side, most in zip((h, w), fallback, strict=True)
    )
    top, left = (
        torch.where(found, (p * (side - s + 1)).floor().clamp_max(side - s), ((side - s) / 2).floor())
        for p, side, s in zip(place, size, (h, w), strict=True)
    )
    return torch.stack([top, left, h, w], 1).long()


def resized_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Each image's box, resized bilinearly with antialiasing: (N,C,H,W) and (N,4) -> (N,C,size,size), same dtype.

    What torch.nn.functional.interpolate(mode="bilinear", antialias=True) makes of every box, for all of them at once:
    resizing is linear in rows and in columns, so it is two matrix products, R_n x_n C_n^T, and differentiable.
    """
    rows = _resizing(boxes[:, 0], boxes[:, 2], images.shape[2], size, images)
    columns = _resizing(boxes[:, 1], boxes[:, 3], images.shape[3], size, images)
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def _resizing(start: Tensor, extent: Tensor, length: int, size: int, like: Tensor) -> Tensor:
    """(N, size, length): pixel p of a line has the weight max(0, 1 - |p + 1/2 - m| / r) in output k, over their sum.

    m = start + (k + 1/2) extent / size is the output's middle, r = max(1, extent / size), and p is inside the box.
    """
    start, extent = (t.to(like.device, torch.float64).view(-1, 1, 1) for t in (start, extent))
    pixel = torch.arange(length, device=like.device, dtype=torch.float64)
    output = torch.arange(size, device=like.device, dtype=torch.float64).view(1, -1, 1)
    step = extent / size
    weight = (1 - (pixel + 0.5 - start - (output + 0.5) * step).abs() / step.clamp_min(1)).clamp_min(0)
    weight = torch.where((pixel >= start) & (pixel < start + extent), weight, 0.0)
    return (weight / weight.sum(2, keepdim=True)).to(like.dtype)
