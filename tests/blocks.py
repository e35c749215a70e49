"""Flow blocks that the tests of decode_block and block_params share: named cases, random weights, bf16 arithmetic."""

import contextlib
import importlib

import torch

from biflow.ops.decode_block import BlockConfig, block_shapes

BASE = dict(tokens=9, channels=4, width=32, layers=2, head_dim=8, mlp_hidden=64)
# name: (config fields over BASE, decode options, prefix tokens of context); every option occurs, most with a tail
CASES = {
    "tarflow": ({}, {}, 0),  # the maths of FACTS 1: layernorm, gelu, shift by one, exp
    "classes": (dict(num_classes=5), dict(y=True), 0),  # class vector, with a -1 in the batch
    "guided_annealed": (dict(num_classes=5, flip=True), dict(y=True, guidance=1.5), 0),
    "guided_constant_a": (dict(num_classes=5), dict(y=True, guidance=0.8, guide="a", anneal=False), 0),
    "guided_b_interleaved": (
        dict(num_classes=5, layout="interleaved"),
        dict(y=True, guidance=0.8, guide="b", anneal=False),
        0,
    ),
    "attention_temperature": (dict(flip=True), dict(guidance=2.0, attn_temp=0.6), 0),  # guidance without classes
    "flip": (dict(flip=True, layout="shift_scale"), {}, 0),
    "start_token": (dict(start_token=True, scale="softplus", clip=("tanh", 4.0)), {}, 0),  # STARFlow's block
    "start_token_flip": (dict(start_token=True, flip=True, layout="interleaved"), {}, 0),
    "modern": (dict(norm="rmsnorm", gate="swiglu", qk_norm=True, rope=True, pos_embed=False, flip=True), {}, 0),
    "class_tokens": (dict(num_classes=3, class_tokens=4, rope=True), dict(y=True, guidance=1.0), 0),
    "context": (dict(rope=True, qk_norm=True), dict(guidance=1.0, attn_temp=1.3), 5),
    "context_and_class_tokens": (dict(num_classes=3, class_tokens=2, layers=3), dict(y=True), 60),  # prefill in pieces
    "shift_only": (dict(shift_only=True, flip=True, scale="sigmoid", clip=("hard", 0.3)), {}, 0),
    "sigmoid_clip_scale": (dict(scale="sigmoid", clip=("hard", 0.2), clip_on="scale"), {}, 0),
    "one_token": (dict(tokens=1), {}, 0),  # no network evaluation at all
    "one_token_start": (dict(tokens=1, start_token=True, num_classes=2), dict(y=True, guidance=1.0), 0),
    # no multiple of 16 anywhere
    "tails": (dict(tokens=35, channels=3, width=30, head_dim=6, mlp_hidden=37, gate="swiglu"), {}, 0),
    # heads of whole AMX tiles, tokens of more than one, one head for each of two members of a crew
    "tiles": (
        dict(tokens=40, width=128, head_dim=64, mlp_hidden=96, num_classes=3, flip=True, gate="swiglu"),
        dict(y=True, guidance=0.7),
        3,
    ),
    # work for a crew of several members at batch 1
    "crew": (dict(width=256, head_dim=32, mlp_hidden=1024, qk_norm=True), dict(guidance=0.5, attn_temp=0.8), 0),
    # the largest head, sums of more than one block
    "wide_head": (dict(tokens=18, width=256, head_dim=256, mlp_hidden=200, layers=1), {}, 0),
    # a partial panel, sums of 3.4 blocks
    "wide_panels": (dict(width=160, head_dim=80, mlp_hidden=432, channels=40), {}, 0),
}
BATCH = 7  # one full tile of 6 rows and one of 1


def random_weights(config, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in block_shapes(config).items():
        w = torch.randn(shape, generator=g, dtype=torch.float64)
        if name.endswith(("norm1.weight", "norm2.weight", "q_norm.weight", "k_norm.weight")):
            w = 1 + 0.2 * w
        elif name.startswith("proj_out"):
            w = 0.1 * w * shape[-1] ** -0.5 if len(shape) == 2 else 0.1 * w
        elif name.endswith("bias"):
            w = 0.1 * w
        elif name.endswith(".weight"):
            w = w * shape[-1] ** -0.5
        weights[name] = w
    if config.rope:
        angle = torch.rand(config.tokens, config.head_dim // 2, generator=g, dtype=torch.float64) * 6
        weights["rope_cos"], weights["rope_sin"] = angle.cos(), angle.sin()
    return {name: w.float().to(dtype) for name, w in weights.items()}  # the values that fp32 can hold


def make_case(name, batch=BATCH):
    fields, options, context_tokens = CASES[name]
    config = BlockConfig(**{**BASE, **fields})
    g = torch.Generator().manual_seed(1)
    z = torch.randn(batch, config.tokens, config.channels, generator=g)
    options = dict(options)
    if options.get("y"):
        y = torch.randint(config.num_classes, (batch,), generator=g)
        y[-1:] = -1
        options["y"] = y
    if context_tokens:
        options["context"] = torch.randn(batch, context_tokens, config.width, generator=g)
        if options.get("guidance"):
            options["null_context"] = torch.randn(context_tokens, config.width, generator=g)
    return config, random_weights(config), z, options


def to(dtype, value):
    if isinstance(value, dict):
        return {k: to(dtype, v) for k, v in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def error_and_allowed(got, plain, exact):
    """The error of `got`, and what a reference of the same precision allows: twice its own, and one rounding."""
    error, same = ((t - exact).abs().max().item() for t in (got, plain))
    return error, 2 * same + torch.finfo(torch.float32).eps * exact.abs().max().item()


def decoded_by(config):
    """The affine op's options for a block's raw parameters, which belong to the token whose row they are in."""
    names = ("layout", "scale", "clip", "clip_on")
    return dict({name: getattr(config, name) for name in names}, causal=False)


@contextlib.contextmanager
def bf16_arithmetic(tiles=False):
    """The reference with the roundings of precision="bf16": the layers' weights, what they multiply, keys, values.

    tiles: queries and the softmax's exponentials too, as in AMX's attention of many queries.
    """
    module = importlib.import_module("biflow.reference.block_params")
    linear, attend = module._linear, module._attend

    def rounded(t):
        return t.bfloat16().to(t.dtype)

    def rounded_linear(x, weights, name):
        if not name.startswith("layers."):
            return linear(x, weights, name)
        bias = weights[f"{name}.bias"]
        return linear(rounded(x), {f"{name}.weight": rounded(weights[f"{name}.weight"]), f"{name}.bias": bias}, name)

    def rounded_attend(q, k, v, temperature):
        if not tiles:
            return attend(q, rounded(k), rounded(v), temperature)
        logits = rounded(q) @ rounded(k).transpose(-1, -2) / (q.shape[-1] ** 0.5 * temperature)
        later = torch.ones_like(logits, dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        return rounded(weights) @ rounded(v) / weights.sum(-1, keepdim=True)

    module._linear, module._attend = rounded_linear, rounded_attend
    try:
        yield
    finally:
        module._linear, module._attend = linear, attend
