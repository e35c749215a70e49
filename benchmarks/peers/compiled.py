"""A token step over a static KV cache under torch.compile, called T - 1 times a block.

One graph serves all blocks of a flow: weights, caches and the position are its inputs. Attention reads the whole cache
and masks what is not written yet, since shapes are static. Each layer has a cache of its own: with one stacked tensor
the compiler copies all of it at each write, which doubles the time of batches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from biflow.models import TarFlow
from biflow.models.layers import class_rows

from . import Peer

BACKEND, MODE = "inductor", "default"
# what the step can do, of TarFlowConfig
_FIXED = {
    "class_tokens": 0,
    "context_dim": 0,
    "norm": "layernorm",
    "gate": "gelu",
    "qk_norm": False,
    "rope": False,
    "pos_embed": True,
    "start_token": False,
    "shift_only": False,
    "scale": "exp",
    "clip": None,
}


def _step(
    w: dict[str, Tensor], added: Tensor | None, caches: list[tuple[Tensor, Tensor]], masks: Tensor, z: Tensor,
    x: Tensor, n: Tensor,
) -> None:  # fmt: skip
    """Token n + 1 of x (B,T,D) from token n and z (B,T,D), in block order. caches (B,H,T,d); masks (T,T); n (1,)."""
    batch, heads, _, d = caches[0][0].shape
    h = F.linear(x.index_select(1, n), w["proj_in.weight"], w["proj_in.bias"]) + w["pos_embed"].index_select(0, n)
    if added is not None:
        h = h + added
    mask = masks.index_select(0, n)
    for i, (keys, values) in enumerate(caches):
        p = f"layers.{i}."
        m = F.layer_norm(h, h.shape[-1:], w[p + "norm1.weight"], w[p + "norm1.bias"])
        qkv = F.linear(m, w[p + "qkv.weight"], w[p + "qkv.bias"])
        q, k, v = qkv.view(batch, 1, 3, heads, d).permute(2, 0, 3, 1, 4)
        keys.index_copy_(2, n, k)
        values.index_copy_(2, n, v)
        # plain products: faster here than scaled_dot_product_attention with a mask
        o = torch.softmax(q @ keys.transpose(-1, -2) * d**-0.5 + mask, dim=-1) @ values
        h = h + F.linear(o.transpose(1, 2).reshape(batch, 1, heads * d), w[p + "proj.weight"], w[p + "proj.bias"])
        m = F.layer_norm(h, h.shape[-1:], w[p + "norm2.weight"], w[p + "norm2.bias"])
        m = F.gelu(F.linear(m, w[p + "fc1.weight"], w[p + "fc1.bias"]))
        h = h + F.linear(m, w[p + "fc2.weight"], w[p + "fc2.bias"])
    a, b = F.linear(h, w["proj_out.weight"], w["proj_out.bias"]).chunk(2, dim=-1)
    x.index_copy_(1, n + 1, z.index_select(1, n + 1) * a.exp() + b)


def compiled(flow: TarFlow, y: Tensor | None, batch: int, *, backend: str = BACKEND) -> Peer:
    """The peer for `batch` samples of `flow`, fp32 on the CPU; it compiles at its first call.

    Raises ValueError for a configuration that the step does not have (the message names the field).
    """
    c = flow.config
    for name, only in _FIXED.items():
        if getattr(c, name) != only:
            raise ValueError(f"{name}: the compiled peer has {only!r} only, got {getattr(c, name)!r}")
    torch._dynamo.reset()  # an earlier case's graphs would count against the limit of recompilations
    step = torch.compile(_step, fullgraph=True, dynamic=False, backend=backend)
    cache = (batch, c.width // c.head_dim, c.tokens, c.head_dim)
    layers = max(block.config.layers for block in flow.blocks)
    caches = [(torch.zeros(cache), torch.zeros(cache)) for _ in range(layers)]  # zeros: what is masked must be finite
    masks = torch.full((c.tokens, c.tokens), -torch.inf).triu(1)
    positions = [torch.tensor([n]) for n in range(c.tokens - 1)]
    weights, added = [], []
    for block in flow.blocks:
        w = {key: value.detach() for key, value in block.named_parameters() if key != "class_embed"}
        if block.config.flip:
            w["pos_embed"] = w["pos_embed"].flip(0)
        weights.append(w)
        rows = None if block.class_embed is None else class_rows(block.class_embed, y, batch)
        added.append(None if rows is None else rows.detach().contiguous())
    buffers = torch.zeros(batch, c.tokens, c.channels), torch.zeros(batch, c.tokens, c.channels)

    def decode_block(i: int, z: Tensor) -> Tensor:
        config, (source, x) = flow.blocks[i].config, buffers
        source.copy_(z.flip(1) if config.flip else z)
        x[:, 0] = source[:, 0]
        for n in positions:
            step(weights[i], added[i], caches[: config.layers], masks, source, x, n)
        return x.flip(1) if config.flip else x.clone()

    return Peer("compiled", decode_block, notes={"compile": f"{backend}, mode {MODE}, full graph, static shapes"})
