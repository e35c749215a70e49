"""A STARFlow block (arXiv 2506.06276) that is not biflow's: biflow.ops for attention and the coupling only.

Against TARFlow: sigma = softplus(a + 0.5413) instead of exp(a), a soft clip 4 tanh(. / 4) of both halves, and a learned
start token in data space in front of the sequence instead of the shift, so all T tokens transform (causal=False).

    python examples/starflow_block.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biflow import ops

COUPLING = {"scale": "softplus", "clip": ("tanh", 4.0), "clip_on": "both", "causal": False}


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        B, T, C = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        h = h + self.proj(ops.attention(q, k, v, causal=True).transpose(1, 2).reshape(B, T, C))
        n = self.norm2(h)
        return h + self.down(F.gelu(self.gate(n), approximate="tanh") * self.up(n))


class StarFlowBlock(nn.Module):
    def __init__(self, channels: int, width: int, layers: int, heads: int):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, channels))
        self.proj_in = nn.Linear(channels, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.proj_out = nn.Linear(width, 2 * channels)

    def params(self, x: Tensor) -> Tensor:
        """(B, T, 2D): row t depends on the start token and the tokens before t."""
        inputs = torch.cat((self.start.expand(x.shape[0], -1, -1), x[:, :-1]), dim=1)
        return self.proj_out(self.layers(self.proj_in(inputs)))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.affine_encode(x, self.params(x), **COUPLING)

    def decode(self, z: Tensor) -> Tensor:
        x = torch.zeros_like(z)
        for _ in range(z.shape[1]):  # each sweep makes one more token exact
            x = ops.affine_decode(z, self.params(x), **COUPLING)
        return x


def main() -> None:
    torch.manual_seed(0)
    block = StarFlowBlock(channels=16, width=64, layers=2, heads=2)
    x = torch.randn(4, 16, 16)
    with torch.no_grad():
        z, logdet = block.encode(x)
        error = (block.decode(z) - x).abs().max().item()
    print(f"log-det per sample: {[round(v, 3) for v in logdet.tolist()]}")
    print(f"first token moved by {(z[:, 0] - x[:, 0]).abs().mean().item():.3f}: the start token transforms it too")
    print(f"round trip max error {error:.1e}")


if __name__ == "__main__":
    main()
