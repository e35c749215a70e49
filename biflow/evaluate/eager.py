"""Exact decoding as plain eager PyTorch does it: the baseline that the fused op is timed against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from biflow import reference
from biflow.models.layers import Layer, Norm, class_rows, unpatchify
from biflow.models.tarflow import Block, TarFlow
from biflow.ops.attention import apply_rope
from biflow.solvers import Guidance


@torch.no_grad()
def eager_decode(
    flow: TarFlow,
    z: Tensor,
    y: Tensor | None = None,
    context: Tensor | None = None,
    *,
    guidance: float = 0.0,
    guide: str = "ab",
    anneal: bool = True,
    attn_temp: float = 1.0,
) -> Tensor:
    """`TarFlow.decode` in plain PyTorch: one token at a time, keys and values of earlier tokens in a cache that grows
    by concatenation.

    With guidance the conditional and the unconditional pass run as one batch of 2 B, the faster way in eager mode.

    Args:
        flow: the model; every option of TarFlowConfig.
        z, y, context, guidance, guide, anneal, attn_temp: as in `TarFlow.decode`.

    Returns:
        x (B,C,H,W) fp32, equal to `flow.decode` up to rounding.
    """
    c = flow.config
    strength = Guidance(guidance, guide, anneal, attn_temp)
    x = z * flow.var.sqrt()
    for block in reversed(flow.blocks):
        x = eager_decode_block(block, x, y, context, strength)
    return unpatchify(x, c.patch_size)


@torch.no_grad()
def eager_decode_block(
    block: Block, z: Tensor, y: Tensor | None = None, context: Tensor | None = None, guidance: Guidance | None = None
) -> Tensor:
    """One block of `eager_decode`: z (B,T,D) -> x (B,T,D), both in data order, in the dtype of the weights.

    guidance: None means none. Other arguments as in `TarFlow.decode`.
    """
    guidance = guidance or Guidance()
    c, batch = block.config, z.shape[0]
    guided = guidance.scale > 0
    if c.flip:
        z = z.flip(1)
    positions = [
        t.flip(0) if c.flip and t is not None else t for t in (block.pos_embed, block.rope_cos, block.rope_sin)
    ]
    # rows [conditional | unconditional]; the temperature of the second half divides its queries
    classes = None
    if block.class_embed is not None:
        classes = class_rows(block.class_embed, y, batch)
        if guided:
            classes = torch.cat([classes, class_rows(block.class_embed, None, batch)])
    prefix = block.project_context(context, batch)
    if prefix is not None and guided:
        prefix = torch.cat([prefix, block.null_context.expand(batch, prefix.shape[1], -1)])
    temperature = None
    if guided and guidance.attn_temp != 1.0:
        temperature = z.new_ones(2 * batch, 1, 1, 1)
        temperature[batch:] = guidance.attn_temp

    caches: list[tuple[Tensor, Tensor] | None] = [None] * len(block.layers)
    start = [t for t in (classes if c.class_tokens else None, prefix) if t is not None]
    if start:
        _run_layers(block, torch.cat(start, dim=1), caches, None, temperature)

    x = [] if c.start_token else [z[:, :1]]  # without a start token the first token has parameters 0
    if not c.start_token and not c.shift_only:
        x = [_affine(block, z[:, :1], z.new_zeros(batch, 1, 2 * c.channels))]
    while len(x) < c.tokens:
        n = len(x) if c.start_token else len(x) - 1  # where the network reads
        token = block.start_token.expand(batch, 1, -1) if c.start_token and n == 0 else x[-1]
        h = block.proj_in(token)
        if positions[0] is not None:
            h = h + positions[0][n]
        if guided:
            h = torch.cat([h, h])
        if classes is not None and not c.class_tokens:
            h = h + classes
        rope = (positions[1][n : n + 1], positions[2][n : n + 1]) if c.rope else None
        raw = block.proj_out(_run_layers(block, h, caches, rope, temperature))
        if guided:
            raw, other = raw.chunk(2)
            weight = guidance.scale * (len(x) / max(c.tokens - 1, 1) if guidance.anneal else 1.0)
            delta = weight * (raw - other)
            if not c.shift_only:
                delta_a, delta_b = delta.chunk(2, dim=-1)
                delta = torch.cat([delta_a * ("a" in guidance.guide), delta_b * ("b" in guidance.guide)], dim=-1)
            elif "b" not in guidance.guide:
                delta = torch.zeros_like(delta)
            raw = raw + delta
        x.append(_affine(block, z[:, len(x) : len(x) + 1], raw))
    result = torch.cat(x, dim=1)
    return result.flip(1) if c.flip else result


def _run_layers(
    block: Block, h: Tensor, caches: list, rope: tuple[Tensor, Tensor] | None, temperature: Tensor | None
) -> Tensor:
    """h (B,N,C), new tokens, through all layers; appends their keys and values. N > 1 is the prefix, causal."""
    for i, layer in enumerate(block.layers):
        q, k, v = eager_heads(layer, h)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if temperature is not None:
            q = q / temperature
        if caches[i] is not None:
            k, v = torch.cat([caches[i][0], k], dim=2), torch.cat([caches[i][1], v], dim=2)
        caches[i] = (k, v)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=h.shape[1] > 1, scale=layer.head_dim**-0.5)
        h = h + layer.proj(o.transpose(1, 2).flatten(2))
        h = h + eager_mlp(layer, h)
    return h


# --- what any network in plain torch needs of a layer; benchmarks/peers/plain.py has the parallel passes


def eager_heads(layer: Layer, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B,H,N,d) of the residual stream h (B,N,C)."""
    x = layer.qkv(eager_norm(layer.norm1, h))
    q, k, v = x.unflatten(-1, (3, layer.heads, layer.head_dim)).permute(2, 0, 3, 1, 4)
    return (q, k, v) if layer.q_norm is None else (eager_norm(layer.q_norm, q), eager_norm(layer.k_norm, k), v)


def eager_mlp(layer: Layer, h: Tensor) -> Tensor:
    m = layer.fc1(eager_norm(layer.norm2, h))
    if layer.gate == "swiglu":
        a, b = m.chunk(2, dim=-1)
        return layer.fc2(F.silu(a) * b)
    return layer.fc2(F.gelu(m))


def eager_norm(norm: Norm, x: Tensor) -> Tensor:
    """torch's own: `norm(x)` would launch our kernel on a GPU."""
    if norm.kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def _affine(block: Block, z: Tensor, raw: Tensor) -> Tensor:
    """x = z sigma + b of one token, (B,1,D), from raw parameters (B,1,2D) or (B,1,D)."""
    c = block.config
    if c.shift_only:
        raw = torch.cat([torch.zeros_like(raw), raw], dim=-1)
    return reference.affine_decode(z, raw, layout=c.layout, scale=c.scale, clip=c.clip, clip_on=c.clip_on, causal=False)
