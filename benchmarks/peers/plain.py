"""The parallel passes in plain PyTorch, as a user writes them: what whole passes of ours are timed against.

Modules over a copy of a model's weights; none of our ops runs in them. In bf16 the weights are bf16, and with them what
the layers read and write, the residual stream too: faster than autocast, which rounds the weights in every call.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biflow.evaluate.eager import eager_heads, eager_mlp, eager_norm
from biflow.models import BiFlow, TarFlow
from biflow.models.layers import Layer, patchify, unpatchify
from biflow.ops.attention import apply_rope

from .compiled import check_options


class PlainReverse(nn.Module):
    """`BiFlow.decode` of a model with classes and guidance trained in, rotary and learned positions: all defaults."""

    def __init__(self, model: BiFlow, dtype: torch.dtype = torch.float32):
        super().__init__()
        c = model.config
        if not (c.max_guidance and c.rope and c.pos_embed):
            raise ValueError(f"plain peer: expected max_guidance, rope and pos_embed, got {c}")
        self.model = copy.deepcopy(model).to(dtype)
        self.prefix = c.class_tokens + c.guidance_tokens
        # the prefix turns by an angle of 0: cheaper than to cut it off and put it back
        cos, sin = (F.pad(t, (0, 0, self.prefix, 0), value=v) for t, v in ((model.rope_cos, 1), (model.rope_sin, 0)))
        self.register_buffer("cos", cos.to(dtype))
        self.register_buffer("sin", sin.to(dtype))
        self.register_buffer("frequency", model.guidance_embed.frequency.clone())  # sinusoids need fp32

    def forward(self, z: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """z (B,T,D), y (B,) int64 >= 0, w (B,) -> x (B,C,H,W); z, w and x fp32 whatever the weights are."""
        m, dtype = self.model, self.cos.dtype
        embed = m.guidance_embed
        angle = torch.log1p(w)[:, None] * self.frequency
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)
        guidance = embed.fc2(F.silu(embed.fc1(waves))).unflatten(1, (embed.tokens, -1))
        h = torch.cat([m.class_embed[y], guidance, m.proj_in(z.to(dtype)) + m.pos_embed], dim=1)
        for group in m.groups:
            for layer in group:
                h = run_layer(layer, h, (self.cos, self.sin), causal=False)
        norm, linear = m.heads[-1]
        return unpatchify(linear(eager_norm(norm, h[:, self.prefix :])).to(z.dtype), m.config.patch_size)


class PlainDensity(nn.Module):
    """`TarFlow.encode` of a model without classes, of the options in compiled.py; the affine map in fp32."""

    def __init__(self, flow: TarFlow, dtype: torch.dtype = torch.float32):
        super().__init__()
        check_options("plain", flow.config)
        if flow.config.num_classes:
            raise ValueError(f"num_classes: the plain peer has 0 only, got {flow.config.num_classes}")
        self.flow, self.dtype = copy.deepcopy(flow).to(dtype), dtype
        for block in self.flow.blocks:
            if block.config.flip:
                block.pos_embed.data = block.pos_embed.data.flip(0)  # block order

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,C,H,W) -> z (B,T,D), logdet (B,), in x's dtype."""
        h, flipped, logdet = patchify(x, self.flow.config.patch_size), False, 0.0
        for block in self.flow.blocks:
            if block.config.flip != flipped:
                h, flipped = h.flip(1), block.config.flip
            stream = block.proj_in(h.to(self.dtype)) + block.pos_embed
            for layer in block.layers:
                stream = run_layer(layer, stream, None, causal=True)
            raw = block.proj_out(stream).to(x.dtype)
            a, b = F.pad(raw[:, :-1], (0, 0, 1, 0)).chunk(2, dim=-1)  # parameters are those of the next token
            h, logdet = (h - b) * torch.exp(-a), logdet - a.sum(dim=(1, 2))
        return h.flip(1) if flipped else h, logdet


def run_layer(layer: Layer, h: Tensor, rope: tuple[Tensor, Tensor] | None, *, causal: bool) -> Tensor:
    q, k, v = eager_heads(layer, h)
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    h = h + layer.proj(o.transpose(1, 2).flatten(2))
    return h + eager_mlp(layer, h)
