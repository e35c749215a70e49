"""The exact inverse of a TARFlow as eager PyTorch code does it: one Python step per token and layer, keys and values in
a cache that grows by concatenation, tokens of flipped blocks reversed by a copy. The baseline of bench_decode_block."""

import torch
import torch.nn.functional as F
from torch import Tensor


class _Cache:
    """Keys and values of the tokens seen so far, per layer."""

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys[layer] is not None:
            k = torch.cat([self.keys[layer], k], dim=2)
            v = torch.cat([self.values[layer], v], dim=2)
        self.keys[layer], self.values[layer] = k, v
        return k, v


def _step(token: Tensor, w: dict[str, Tensor], config, position: Tensor, label, cache: _Cache, temperature: float):
    """Raw (scale, shift) of the next token from one token (B, 1, D)."""
    h = F.linear(token, w["proj_in.weight"], w["proj_in.bias"]) + position
    if label is not None:
        h = h + label
    batch, width, scale = h.shape[0], config.width, config.head_dim**-0.5 / temperature
    for j in range(config.layers):
        name = f"layers.{j}"
        y = F.layer_norm(h, (width,), w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"])
        qkv = F.linear(y, w[f"{name}.qkv.weight"], w[f"{name}.qkv.bias"])
        q, k, v = qkv.view(batch, 1, 3, -1, config.head_dim).permute(2, 0, 3, 1, 4)
        k, v = cache.append(j, k, v)
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
        y = y.transpose(1, 2).reshape(batch, 1, width)
        h = h + F.linear(y, w[f"{name}.proj.weight"], w[f"{name}.proj.bias"])
        y = F.layer_norm(h, (width,), w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"])
        y = F.gelu(F.linear(y, w[f"{name}.fc1.weight"], w[f"{name}.fc1.bias"]))
        h = h + F.linear(y, w[f"{name}.fc2.weight"], w[f"{name}.fc2.bias"])
    return F.linear(h, w["proj_out.weight"], w["proj_out.bias"])[:, 0].chunk(2, dim=-1)


def decode_block(z, weights, config, *, y=None, guidance=0.0, guide="ab", anneal=True, attn_temp=1.0) -> Tensor:
    """x (B, T, D) of one block (TARFlow's options of BlockConfig only); options as in ops.decode_block."""
    x = z.flip(1) if config.flip else z.clone()
    positions = weights["pos_embed"].flip(0) if config.flip else weights["pos_embed"]
    label = null_label = None
    if config.num_classes:
        table = weights["class_embed"]
        null_label = table.mean(0)
        label = null_label if y is None else torch.where((y < 0)[:, None, None], null_label, table[y.clamp(min=0)])
    cache, null_cache = _Cache(config.layers), _Cache(config.layers)
    for i in range(config.tokens - 1):
        token, position = x[:, i : i + 1], positions[i]
        a, b = _step(token, weights, config, position, label, cache, 1.0)
        if guidance > 0:
            null_a, null_b = _step(token, weights, config, position, null_label, null_cache, attn_temp)
            g = guidance * (i + 1) / (config.tokens - 1) if anneal else guidance
            a = a + g * (a - null_a) if "a" in guide else a
            b = b + g * (b - null_b) if "b" in guide else b
        x[:, i + 1] = x[:, i + 1] * a.exp() + b
    return x.flip(1) if config.flip else x


@torch.no_grad()
def decode(z: Tensor, blocks: list, **options) -> Tensor:
    """x of a whole flow: blocks [(weights, config), ...] in encode order, inverted from the last to the first."""
    for weights, config in reversed(blocks):
        z = decode_block(z, weights, config, **options)
    return z
