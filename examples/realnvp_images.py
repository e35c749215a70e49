"""RealNVP couplings (arXiv 1605.08803) on images, with biflow.ops for the arithmetic only.

Checkerboard coupling: the mask of the op leaves half of the pixels alone; a convolution over those writes the params of
the others. Channel coupling: the first half of the channels writes the params of the second. Both are the affine op
over (B, H W, C) with causal=False; an NCHW image goes in as a strided view.

    python examples/realnvp_images.py
"""

import torch
from torch import Tensor, nn

from biflow import ops


def tokens(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C), a view."""
    return image.flatten(2).transpose(1, 2)


def image_of(x: Tensor, height: int) -> Tensor:
    """(B, H W, C) -> (B, C, H, W), a view."""
    return x.transpose(1, 2).unflatten(2, (height, -1))


def network(channels_in: int, channels_out: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
        nn.Conv2d(width, channels_out, 3, padding=1),
    )


class CheckerboardCoupling(nn.Module):
    """Pixels with (row + column) odd (even if `swap`) are transformed given the others."""

    def __init__(self, channels: int, width: int, swap: bool = False):
        super().__init__()
        self.swap = swap
        self.net = network(channels, 2 * channels, width)

    def moved(self, image: Tensor) -> Tensor:
        h, w = image.shape[2:]
        odd = (torch.arange(h)[:, None] + torch.arange(w)) % 2 == 1
        return odd != self.swap

    def _apply_op(self, op, image: Tensor, **options):
        moved = self.moved(image)
        params = tokens(self.net(image.masked_fill(moved, 0)))
        mask = moved.flatten().expand(image.shape[0], -1)
        return op(tokens(image), params, clip=("tanh", 2.0), clip_on="scale", causal=False, mask=mask, **options)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = self._apply_op(ops.affine_encode, image)
        return image_of(z, image.shape[2]), logdet

    def decode(self, image: Tensor) -> Tensor:
        return image_of(self._apply_op(ops.affine_decode, image), image.shape[2])


class ChannelCoupling(nn.Module):
    """The second half of the channels is transformed given the first; sigma = sigmoid(a + 2) + 1e-3."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.net = network(channels // 2, channels, width)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = image.chunk(2, dim=1)
        z, logdet = ops.affine_encode(tokens(moved), tokens(self.net(kept)), scale="sigmoid", causal=False)
        return torch.cat((kept, image_of(z, image.shape[2])), dim=1), logdet

    def decode(self, image: Tensor) -> Tensor:
        kept, moved = image.chunk(2, dim=1)
        x = ops.affine_decode(tokens(moved), tokens(self.net(kept)), scale="sigmoid", causal=False)
        return torch.cat((kept, image_of(x, image.shape[2])), dim=1)


def main() -> None:
    torch.manual_seed(0)
    flow = [
        CheckerboardCoupling(4, 16),
        CheckerboardCoupling(4, 16, swap=True),
        ChannelCoupling(4, 16),
    ]
    image = torch.rand(8, 4, 16, 16) * 2 - 1
    with torch.no_grad():
        z, logdet = image, torch.zeros(8)
        for coupling in flow:
            z, part = coupling.encode(z)
            logdet = logdet + part
            print(f"{type(coupling).__name__}: mean log-det {part.mean().item():.3f}")
        back = z
        for coupling in reversed(flow):
            back = coupling.decode(back)
    print(f"round trip max error {(back - image).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
