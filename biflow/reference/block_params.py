"""The parallel pass of one flow block in plain torch; formulas and shapes: biflow.ops.block_params."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from biflow.ops.decode_block import BlockConfig

Weights = dict[str, Tensor]


def _norm(x: Tensor, weights: Weights, name: str, kind: str) -> Tensor:
    if kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2)


def _condition(weights: Weights, config: BlockConfig, batch: int, y: Tensor | None, context: Tensor | None):
    """(vector added to every token (B, 1, C) or 0, prefix tokens (B, S, C))."""
    table = weights["proj_in.bias"].new_empty(0, 0, config.width) if not config.num_classes else weights["class_embed"]
    added: Tensor | float = 0.0
    prefix = table.new_empty(batch, 0, config.width)
    if config.num_classes:
        mean = table.mean(0)
        labels = [-1] * batch if y is None else y.tolist()
        classes = torch.stack([mean if label < 0 else table[label] for label in labels])
        if config.class_tokens:
            prefix = classes
        else:
            added = classes
    if context is not None:
        prefix = torch.cat([prefix, context.expand(batch, -1, -1)], 1)
    return added, prefix


def _attend(q: Tensor, k: Tensor, v: Tensor, temperature: float) -> Tensor:
    length = q.shape[-2]
    logits = q @ k.transpose(-1, -2) / (math.sqrt(q.shape[-1]) * temperature)
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return logits.masked_fill(later, -math.inf).softmax(-1) @ v


def _attention(h: Tensor, weights: Weights, config: BlockConfig, name: str, prefix: int, temperature: float) -> Tensor:
    batch, length, width = h.shape
    qkv = _linear(h, weights, f"{name}.qkv").view(batch, length, 3, -1, config.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, S + T, d)
    if config.qk_norm:
        q = _norm(q, weights, f"{name}.q_norm", "rmsnorm")
        k = _norm(k, weights, f"{name}.k_norm", "rmsnorm")
    if config.rope:
        cosine, sine = weights["rope_cos"], weights["rope_sin"]
        if config.flip:
            cosine, sine = cosine.flip(0), sine.flip(0)
        q = torch.cat([q[:, :, :prefix], _rotate(q[:, :, prefix:], cosine, sine)], 2)
        k = torch.cat([k[:, :, :prefix], _rotate(k[:, :, prefix:], cosine, sine)], 2)
    out = _attend(q, k, v, temperature)
    return _linear(out.transpose(1, 2).reshape(batch, length, width), weights, f"{name}.proj")


def _mlp(h: Tensor, weights: Weights, config: BlockConfig, name: str) -> Tensor:
    h = _linear(h, weights, f"{name}.fc1")
    if config.gate == "swiglu":
        gate, value = h.chunk(2, -1)
        h = F.silu(gate) * value
    else:
        h = F.gelu(h)
    return _linear(h, weights, f"{name}.fc2")


def _raw(x: Tensor, weights: Weights, config: BlockConfig, y, context, attn_temp: float) -> Tensor:
    """The network's output (B, T, 2D or D), rows in data order, moved to the tokens that they belong to."""
    if config.flip:
        x = x.flip(1)
    if config.start_token:
        x = torch.cat([weights["start_token"].expand(x.shape[0], 1, -1), x[:, :-1]], 1)
    h = _linear(x, weights, "proj_in")
    if config.pos_embed:
        h = h + (weights["pos_embed"].flip(0) if config.flip else weights["pos_embed"])
    added, prefix = _condition(weights, config, x.shape[0], y, context)
    h = torch.cat([prefix, h + added], 1)
    for j in range(config.layers):
        name = f"layers.{j}"
        normed = _norm(h, weights, f"{name}.norm1", config.norm)
        h = h + _attention(normed, weights, config, name, prefix.shape[1], attn_temp)
        h = h + _mlp(_norm(h, weights, f"{name}.norm2", config.norm), weights, config, name)
    raw = _linear(h[:, prefix.shape[1] :], weights, "proj_out")
    if not config.start_token:
        raw = torch.cat([torch.zeros_like(raw[:, :1]), raw[:, :-1]], 1)
    return raw.flip(1) if config.flip else raw


def _guided(raw: Tensor, null: Tensor, config: BlockConfig, guidance: float, guide: str, anneal: bool) -> Tensor:
    tokens, channels = raw.shape[1], config.channels
    g = torch.full((tokens, 1), guidance, dtype=raw.dtype, device=raw.device)
    if anneal:
        n = torch.arange(tokens, dtype=raw.dtype, device=raw.device)[:, None]
        g = g * (n.flip(0) if config.flip else n) / max(tokens - 1, 1)
    column = torch.arange(raw.shape[2], device=raw.device)
    if config.shift_only:
        shift = column >= 0
    elif config.layout == "interleaved":
        shift = column % 2 == 1
    else:
        shift = (column < channels) == (config.layout == "shift_scale")
    moves = shift & ("b" in guide) | ~shift & ("a" in guide)
    return torch.where(moves, raw + g * (raw - null), raw)


def block_params(
    x: Tensor,
    weights: Weights,
    config: BlockConfig,
    *,
    y: Tensor | None = None,
    context: Tensor | None = None,
    null_context: Tensor | None = None,
    guidance: float = 0.0,
    guide: str = "ab",
    anneal: bool = True,
    attn_temp: float = 1.0,
) -> Tensor:
    """`ops.block_params` in plain torch; weights: the state_dict of one block, in x's dtype."""
    raw = _raw(x, weights, config, y, context, 1.0)
    if guidance > 0:
        null = _raw(x, weights, config, None, null_context, attn_temp)
        raw = _guided(raw, null, config, guidance, guide, anneal)
    return raw
