"""The parallel pass of a block over plain weights, in torch and the ops: `block_params` and `BlockWindows` on a GPU.

Knows no device; works in block order inside. Buffers are made once, and a pass writes into them alone, so that a CUDA
graph may record it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from biflow.ops.attention import apply_rope, attention
from biflow.ops.gate import gate
from biflow.ops.norm import add_norm, norm

if TYPE_CHECKING:
    from biflow.ops.decode_block import BlockConfig, BlockWeights, Condition

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of what the layers' linear maps multiply
_EPS = {"layernorm": 1e-5, "rmsnorm": 1e-6}


class BlockPass:
    """Raw parameters of windows of tokens, over the keys and values of earlier tokens as the passes before left them.

    `raw` (B, T, 2D or D) fp32 in data order is what calls write. Guided, the rows of a batch are B conditional and B
    unconditional sequences. In bf16 the layers' linear maps, keys and values are bf16; residual stream, norms, proj_in,
    proj_out and all sums are fp32. A value that is not finite may reach all tokens of its sample and window.

    weights: with `plain`; batch: B; cache: for keys and values, of `cache_shape` and the precision's dtype; None: its
    own. Nothing is checked.
    """

    def __init__(self, weights: BlockWeights, given: Condition, batch: int, cache: Tensor | None = None):
        c, like = weights.config, weights.plain["proj_in.bias"]
        self._weights, self.config, self.batch = weights.plain, c, batch
        self._sequences, self._prefix_tokens = batch * given.passes, given.prefix_tokens
        self._layers = [f"layers.{j}" for j in range(c.layers)]
        self._dtype = DTYPES[weights.precision]
        shape = cache_shape(c, given, batch)
        self._cache = torch.zeros(shape, dtype=self._dtype, device=like.device) if cache is None else cache
        columns = c.channels if c.shift_only else 2 * c.channels
        self.raw = like.new_zeros(batch, c.tokens, columns)
        self._added = None if given.tensors[0] is None else like.new_empty(self._sequences, 1, c.width)
        self._prefix = like.new_empty(self._sequences, self._prefix_tokens, c.width) if self._prefix_tokens else None
        options = given.options
        self._temperature = options["attn_temp"] if given.passes == 2 else 1.0
        if given.passes == 2:
            self._guidance = _guidance_by_token(c, options["guidance"], options["anneal"], like)
            self._moves = _moved_columns(c, options["guide"], columns, like.device)
        self.fill(given)

    def fill(self, given: Condition) -> None:
        """Take the tensors of a condition whose shapes and options are those of the first one; then `prefill`."""
        for own, halves in ((self._added, given.tensors[::2]), (self._prefix, given.tensors[1::2])):
            if own is not None:
                for part, half in zip(own.view(given.passes, self.batch, *own.shape[1:]), halves, strict=False):
                    part.copy_(half.view(part.shape))

    def prefill(self) -> None:
        """Keys and values of the prefix tokens: once for a condition, before the first window."""
        if self._prefix is not None and self._sequences:
            self._through_layers(self._prefix, 0, None, keys_only=True)

    def __call__(self, x: Tensor, start: int, stop: int) -> None:
        """Writes the rows of the tokens start .. stop-1 in block order from x (B, T, D) in data order."""
        c, w = self.config, self._weights
        shift = 0 if c.start_token else 1  # of tokens against the rows of the sequence that their parameters come from
        if self.batch == 0:
            return
        if shift and start == 0:
            self._rows(self.raw, 0, 1).zero_()
        first, last = max(start - shift, 0), stop - shift
        if first == last:
            return
        if shift:
            tokens = self._in_order(x, first, last)
        else:
            tokens = self._in_order(x, max(first - 1, 0), last - 1)
            if first == 0:
                tokens = torch.cat([w["start_token"].expand(self.batch, 1, -1), tokens], 1)
        h = F.linear(tokens, w["proj_in.weight"], w["proj_in.bias"])
        if c.pos_embed:
            h = h + self._in_order(w["pos_embed"], first, last, 0)
        if self._sequences > self.batch:
            h = torch.cat([h, h])
        if self._added is not None:
            h = h + self._added
        rope = [self._in_order(w[name], first, last, 0) for name in ("rope_cos", "rope_sin")] if c.rope else None
        h = self._through_layers(h, self._prefix_tokens + first, rope)
        raw = F.linear(h, w["proj_out.weight"], w["proj_out.bias"])
        if self._sequences > self.batch:
            raw, null = raw.chunk(2)
            guidance = self._guidance[first + shift : last + shift]
            raw = torch.where(self._moves, raw + guidance * (raw - null), raw)
        self._rows(self.raw, first + shift, last + shift).copy_(raw.flip(1) if c.flip else raw)

    def _rows(self, t: Tensor, start: int, stop: int, dim: int = 1) -> Tensor:
        """The tokens start .. stop-1 of block order, of a tensor in data order and in that order."""
        return t.narrow(dim, self.config.tokens - stop if self.config.flip else start, stop - start)

    def _in_order(self, t: Tensor, start: int, stop: int, dim: int = 1) -> Tensor:
        """The same in block order."""
        rows = self._rows(t, start, stop, dim)
        return rows.flip(dim) if self.config.flip else rows

    def _through_layers(self, h: Tensor, first: int, rope, keys_only: bool = False) -> Tensor | None:
        """The residual stream (N, rows, C) after all layers; its rows are the tokens from `first` on, prefix included.

        keys_only: nothing is wanted but the keys and values.
        """
        c = self.config
        last, delta = first + h.shape[1], None
        for layer, (keys, values) in zip(self._layers, self._cache, strict=True):
            x, h = self._norm(f"{layer}.norm1", h, delta)
            qkv = self._linear(f"{layer}.qkv", x).unflatten(2, (3, c.width // c.head_dim, c.head_dim))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            keys[:, :, first:last] = self._turned(f"{layer}.k_norm", k, rope)
            values[:, :, first:last] = v
            if keys_only and layer == self._layers[-1]:
                return None
            q = self._turned(f"{layer}.q_norm", q, rope)
            o = self._attend(q, keys[:, :, :last], values[:, :, :last])
            x, h = self._norm(f"{layer}.norm2", h, self._linear(f"{layer}.proj", o))
            delta = self._linear(f"{layer}.fc2", gate(self._linear(f"{layer}.fc1", x), c.gate))
        return h + delta

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, name: str, h: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of h + delta as the next linear map reads it, and h + delta."""
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        options = dict(kind=self.config.norm, eps=_EPS[self.config.norm], dtype=self._dtype)
        return (norm(h, weight, bias, **options), h) if delta is None else add_norm(delta, h, weight, bias, **options)

    def _turned(self, name: str, x: Tensor, rope) -> Tensor:
        """Queries or keys (N, H, rows, d) after norm and rotation, rounded once."""
        if self.config.qk_norm:
            x = F.rms_norm(x.float(), x.shape[-1:], self._weights[f"{name}.weight"], _EPS["rmsnorm"])
        if rope is not None:
            x = apply_rope(x.float(), *rope)
        return x.to(self._dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, rows, C); the unconditional half at its own temperature."""
        scale = self.config.head_dim**-0.5
        parts = [(slice(None), scale)]
        if self._temperature != 1.0:
            parts = [(slice(0, self.batch), scale), (slice(self.batch, None), scale / self._temperature)]
        o = [attention(q[part], k[part], v[part], causal=True, scale=s).transpose(1, 2).flatten(2) for part, s in parts]
        return o[0] if len(o) == 1 else torch.cat(o)


def cache_shape(config: BlockConfig, given: Condition, batch: int) -> tuple[int, ...]:
    """(layer, key or value, sequence, head, token with the prefix before, channel)"""
    tokens = given.prefix_tokens + config.tokens
    return config.layers, 2, batch * given.passes, config.width // config.head_dim, tokens, config.head_dim


def _guidance_by_token(config: BlockConfig, guidance: float, anneal: bool, like: Tensor) -> Tensor:
    """(T, 1), in block order."""
    if not anneal:
        return like.new_full((config.tokens, 1), guidance)
    index = torch.arange(config.tokens, dtype=like.dtype, device=like.device)
    return (guidance * index / max(config.tokens - 1, 1))[:, None]


def _moved_columns(config: BlockConfig, guide: str, columns: int, device: torch.device) -> Tensor:
    """(columns,) bool: which raw parameters guidance moves."""
    column = torch.arange(columns, device=device)
    if config.shift_only:
        shift = column >= 0
    elif config.layout == "interleaved":
        shift = column % 2 == 1
    else:
        shift = (column < config.channels) == (config.layout == "shift_scale")
    return shift if guide == "b" else ~shift if guide == "a" else column >= 0
