"""What the small networks of a run's own, a classifier or an encoder, are built of."""

import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """x + conv(SiLU(norm(conv(x)))), width channels."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.outer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.silu(self.norm(self.inner(x))))
