"""A TARFlow block (arXiv 2412.06329) that is not biflow's: its own transformer, biflow.ops for the coupling only.

The network reads the tokens causally and writes [log-scale | shift] for each; affine_encode shifts that by one token,
transforms and sums the log-determinant in one pass. Odd blocks read the tokens backwards with flip=True.

    python examples/tarflow_block.py
"""

import torch
from torch import Tensor, nn

from biflow import ops


class TarFlowBlock(nn.Module):
    def __init__(self, tokens: int, channels: int, width: int, layers: int, heads: int, flip: bool = False):
        super().__init__()
        self.flip = flip
        self.proj_in = nn.Linear(channels, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.proj_out = nn.Linear(width, 2 * channels)

    def params(self, x: Tensor) -> Tensor:
        """(B, T, 2D) for (B, T, D); row t depends on the tokens up to t in block order."""
        steps = torch.arange(x.shape[1])
        future = steps[None, :] < steps[:, None] if self.flip else steps[None, :] > steps[:, None]
        return self.proj_out(self.layers(self.proj_in(x) + self.pos_embed, mask=future))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.affine_encode(x, self.params(x), flip=self.flip)

    def decode(self, z: Tensor) -> Tensor:
        # after k sweeps the first k tokens in block order are exact: as many sweeps as tokens
        x = z
        for _ in range(z.shape[1]):
            x = ops.affine_decode(z, self.params(x), flip=self.flip)
        return x


def main() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(TarFlowBlock(16, 4, 32, 1, 2, flip=i % 2 == 1) for i in range(2))
    x = torch.randn(8, 16, 4)
    optimizer = torch.optim.Adam(blocks.parameters(), 3e-3)
    for step in range(21):
        z, logdet = x, 0.0
        for block in blocks:
            z, block_logdet = block.encode(z)
            logdet = logdet + block_logdet
        loss = (0.5 * z.square().sum(dim=(1, 2)) - logdet).mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2d}: loss {loss.item():.4f} per dimension, mean log-det {logdet.mean().item():.3f}")
    with torch.no_grad():
        for block in blocks:
            x, y = block.encode(x)[0], x
            print(f"flip={block.flip}: round trip max error {(block.decode(x) - y).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
