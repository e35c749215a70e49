"""Random resized crops: boxes and resizing against plain loops and torch's own functions."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from biflow.train.crops import random_boxes, resized_crops


def rng(seed=7):
    return torch.Generator().manual_seed(seed)


def test_crops_are_those_of_interpolate():
    """Shrinking and enlarging, to the rounding of fp64; the gradient is that of the cut-out pixels."""
    x = torch.rand(5, 2, 12, 9, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0, 0, 12, 9], [3, 2, 1, 1], [1, 4, 7, 5], [11, 0, 1, 9], [5, 5, 4, 3]])
    for size in (4, 16):
        got = resized_crops(x, boxes, size)
        for image, (top, left, h, w), crop in zip(x, boxes.tolist(), got, strict=True):
            cut = image[None, :, top : top + h, left : left + w]
            want = F.interpolate(cut, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
            torch.testing.assert_close(crop, want, rtol=1e-13, atol=1e-14)
    (gradient,) = torch.autograd.grad(got[2].sum(), x)
    inside = torch.zeros(12, 9, dtype=torch.bool)
    inside[1:8, 4:9] = True
    assert bool((gradient[2, :, inside] > 0).all())
    assert gradient.abs().sum() == gradient[2, :, inside].sum()


def test_boxes_are_distributed_as_those_of_random_resized_crop():
    """Against the algorithm written as a loop; bounds of five standard errors."""

    def draw(rng, height, width, scale, ratio):
        for _ in range(10):
            area = height * width * rng.uniform(*scale)
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
        raise AssertionError("never here")

    for size, scale, ratio in (((28, 28), (0.08, 1.0), (3 / 4, 4 / 3)), ((10, 20), (0.3, 0.9), (1.0, 3.0))):
        got = random_boxes(4000, size, scale, ratio, rng()).double()
        source = np.random.default_rng(0)
        want = torch.tensor([draw(source, *size, scale, ratio) for _ in range(4000)]).double()
        for moment in (got, want), (got.square(), want.square()), (got * got.roll(1, 1), want * want.roll(1, 1)):
            a, b = moment
            assert bool(((a.mean(0) - b.mean(0)).abs() <= 5 * (b.std(0) * math.sqrt(2 / 4000))).all())
        top, left, h, w = got.unbind(1)
        assert min(t.min() for t in (top, left, h - 1, w - 1)) >= 0
        assert (top + h).max() == size[0]
        assert (left + w).max() == size[1]


def test_boxes_that_never_fit_are_the_largest_in_the_middle():
    assert random_boxes(2, (28, 28), (0.9, 1.0), (1.2, 2.0), rng()).tolist() == [[2, 0, 23, 28]] * 2
    assert random_boxes(2, (20, 50), (0.9, 1.0), (0.5, 0.9), rng()).tolist() == [[0, 16, 20, 18]] * 2
