"""A token step over a static KV cache, called T - 1 times a block: as it is, under torch.compile, in a CUDA graph.

One compiled function serves all blocks of a flow: weights, caches and the position are its inputs. Attention reads the
whole cache and masks what is not written yet, since shapes are static. Each layer has a cache of its own: with one
stacked tensor the compiler copies all of it at each write, which doubles the time of batches. A CUDA graph holds the
whole step of one block and moves the position on itself.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from biflow.models import TarFlow, TarFlowConfig
from biflow.models.layers import class_rows

from . import Peer

BACKEND, MODE = "inductor", "default"
# what plain networks here can do, of TarFlowConfig
FIXED = {
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


def check_options(peer: str, config: TarFlowConfig) -> None:
    for name, only in FIXED.items():
        if getattr(config, name) != only:
            raise ValueError(f"{name}: the {peer} peer has {only!r} only, got {getattr(config, name)!r}")


def _step(
    w: dict[str, Tensor], added: Tensor | None, caches: list[tuple[Tensor, Tensor]], masks: Tensor, z: Tensor,
    x: Tensor, n: Tensor,
) -> None:  # fmt: skip
    """Token n + 1 of x (B,T,D) from token n and z (B,T,D), in block order. caches (B,H,T,d); masks (T,T); n (1,).

    The network runs in the dtype of its weights, the affine map in that of x.
    """
    batch, heads, _, d = caches[0][0].shape
    h = F.linear(x.index_select(1, n).to(masks.dtype), w["proj_in.weight"], w["proj_in.bias"])
    h = h + w["pos_embed"].index_select(0, n)
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
        # plain products: faster on a CPU than scaled_dot_product_attention with a mask
        o = torch.softmax(q @ keys.transpose(-1, -2) * d**-0.5 + mask, dim=-1) @ values
        h = h + F.linear(o.transpose(1, 2).reshape(batch, 1, heads * d), w[p + "proj.weight"], w[p + "proj.bias"])
        m = F.layer_norm(h, h.shape[-1:], w[p + "norm2.weight"], w[p + "norm2.bias"])
        m = F.gelu(F.linear(m, w[p + "fc1.weight"], w[p + "fc1.bias"]))
        h = h + F.linear(m, w[p + "fc2.weight"], w[p + "fc2.bias"])
    a, b = F.linear(h, w["proj_out.weight"], w["proj_out.bias"]).to(x.dtype).chunk(2, dim=-1)
    x.index_copy_(1, n + 1, z.index_select(1, n + 1) * a.exp() + b)


def static_cache(
    flow: TarFlow,
    y: Tensor | None,
    batch: int,
    *,
    backend: str | None = BACKEND,
    graph: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Peer:
    """The peer for `batch` samples of `flow`, on its device, named after the backend; it compiles at its first call.

    Its decode_block also takes the first P tokens of the block order, in data order: (B,P,D), 1 <= P <= T.

    Args:
        backend: of torch.compile; None: not compiled.
        graph: each step is one CUDA graph, replayed; needs a flow on a GPU.
        dtype: of weights, activations, keys and values; x and z stay fp32.

    Raises ValueError for a configuration that the step does not have (the message names the field), and for a graph of
    a flow that is not on a GPU.
    """
    c, device = flow.config, flow.var.device
    check_options("compiled", c)
    if graph and device.type != "cuda":
        raise ValueError(f"graph: expected a flow on a GPU, got one on {device}")
    step = _step
    if backend is not None:
        torch._dynamo.reset()  # an earlier case's graphs would count against the limit of recompilations
        step = torch.compile(_step, fullgraph=True, dynamic=False, backend=backend)
    cache = (batch, c.width // c.head_dim, c.tokens, c.head_dim)
    layers = max(block.config.layers for block in flow.blocks)
    # zeros: what is masked must be finite
    caches = [tuple(torch.zeros(cache, dtype=dtype, device=device) for _ in range(2)) for _ in range(layers)]
    masks = torch.full((c.tokens, c.tokens), -torch.inf, device=device).triu(1).to(dtype)
    positions = torch.arange(c.tokens, device=device).unsqueeze(1).unbind()
    buffers = torch.zeros(2, batch, c.tokens, c.channels, device=device).unbind()
    weights, recorded = {}, {}

    def prepared(i: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Of block i: one that is never decoded takes no memory."""
        if i not in weights:
            block = flow.blocks[i]
            w = {key: p.detach().to(dtype) for key, p in block.named_parameters() if key != "class_embed"}
            if block.config.flip:
                w["pos_embed"] = w["pos_embed"].flip(0)
            rows = None if block.class_embed is None else class_rows(block.class_embed, y, batch)
            weights[i] = w, None if rows is None else rows.detach().to(dtype).contiguous()
        return weights[i]

    def steps(i: int, tokens: int) -> None:
        arguments = (*prepared(i), caches[: flow.blocks[i].config.layers], masks, *buffers)
        if not graph:
            for n in positions[: tokens - 1]:
                step(*arguments, n)
            return
        if i not in recorded:
            recorded[i] = _recorded(lambda n: step(*arguments, n), device)
        n, replay = recorded[i]
        n.zero_()
        for _ in range(tokens - 1):
            replay()

    def decode_block(i: int, z: Tensor) -> Tensor:
        config, tokens, (source, x) = flow.blocks[i].config, z.shape[1], buffers
        source[:, :tokens] = z.flip(1) if config.flip else z
        x[:, 0] = source[:, 0]
        steps(i, tokens)
        return x[:, :tokens].flip(1) if config.flip else x[:, :tokens].clone()

    how = "eager" if backend is None else f"{backend}, mode {MODE}, full graph, static shapes"
    name = "static" if backend is None else "compiled"
    return Peer(name, decode_block, notes={"compile": how + (", CUDA graph" if graph else "")})


def compiled(flow: TarFlow, y: Tensor | None, batch: int, *, backend: str = BACKEND) -> Peer:
    """`static_cache` in fp32, compiled."""
    return static_cache(flow, y, batch, backend=backend)


def _recorded(step: Callable[[Tensor], None], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """The position that the graph reads and moves on, and a function that replays it."""
    n = torch.zeros(1, dtype=torch.int64, device=device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step(n)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(n)
        n.add_(1)
    return n, graph.replay
