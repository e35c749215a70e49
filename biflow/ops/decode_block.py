"""K1: the exact sequential inverse of one autoregressive flow block, all T steps in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from biflow import _library  # noqa: F401
from biflow.ops._arrays import takes_arrays
from biflow.ops._block_pass import DTYPES
from biflow.ops._checks import (
    CLIP_ON,
    LAYOUTS,
    SCALES,
    any_requires_grad,
    check_beside,
    check_buffer,
    check_choice,
    check_clip,
    check_flag,
    check_float32,
    check_number,
    check_shape,
)

_NORMS = ("layernorm", "rmsnorm")
_GATES = ("gelu", "swiglu")
_GUIDES = ("a", "b", "ab")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class BlockConfig:
    """One flow block: a causal transformer over T tokens of D channels that gives each token its scale and shift.

    Sizes: tokens T, channels D, width C, layers, head_dim d (C / d heads), mlp_hidden F.
    norm: "layernorm" (eps 1e-5, weight and bias) or "rmsnorm" (eps 1e-6, weight).
    gate: "gelu" (exact; fc1 (F, C)) or "swiglu" (fc1 (2F, C): silu(first half) * second half).
    qk_norm: RMSNorm over d (eps 1e-6, weight (d,)) on queries and keys, before RoPE.
    rope: tables rope_cos, rope_sin (T, d/2), pairs (2i, 2i+1), rows in data order. pos_embed: learned (T, C), likewise.
    start_token: a learned token (D,) in data space is the first input, so that all T tokens transform; without it the
    network's output is shifted by one and the first token's raw parameters are 0.
    shift_only: the network writes D shifts; sigma = 1.
    num_classes, class_tokens: the class embedding is added to every token (class_tokens 0) or is K tokens in context.
    layout, scale, clip, clip_on: as in `ops.affine_decode`. flip: block order is reversed data order.
    Raises TypeError for a size that is no int or a flag that is no bool, ValueError for what no block can be.
    """

    tokens: int
    channels: int
    width: int
    layers: int
    head_dim: int
    mlp_hidden: int
    norm: str = "layernorm"
    gate: str = "gelu"
    qk_norm: bool = False
    rope: bool = False
    pos_embed: bool = True
    start_token: bool = False
    shift_only: bool = False
    num_classes: int = 0
    class_tokens: int = 0
    layout: str = "scale_shift"
    scale: str = "exp"
    clip: tuple[str, float] | None = None
    clip_on: str = "both"
    flip: bool = False

    def __post_init__(self) -> None:
        for name, low in [("tokens", 1), ("channels", 1), ("width", 1), ("layers", 1), ("head_dim", 2),
                          ("mlp_hidden", 1), ("num_classes", 0), ("class_tokens", 0)]:  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
            if not low <= value < 2**24:
                raise ValueError(f"{name}: expected {low} to 2^24 - 1, got {value}")
        for name in ("qk_norm", "rope", "pos_embed", "start_token", "shift_only", "flip"):
            check_flag(name, getattr(self, name))
        for name, choices in [("norm", _NORMS), ("gate", _GATES), ("layout", LAYOUTS), ("scale", SCALES),
                              ("clip_on", CLIP_ON)]:  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        if self.head_dim % 2 or self.head_dim > 256:
            raise ValueError(f"head_dim: expected an even number up to 256, got {self.head_dim}")
        if self.width % self.head_dim:
            raise ValueError(f"width: expected a multiple of head_dim {self.head_dim}, got {self.width}")
        if self.class_tokens and not self.num_classes:
            raise ValueError(f"class_tokens: expected 0 where num_classes is 0, got {self.class_tokens}")
        object.__setattr__(self, "clip", check_clip(self.clip))  # a YAML list becomes a tuple


@dataclass(frozen=True)
class BlockWeights:
    """A block's weights, packed for `decode_block` and `block_params` by `pack_block`.

    precision: of the layers' weights, of the activations they multiply and of cached keys and values, "fp32" or "bf16".
    class_embed is (N, max(K, 1), C) or None. plain: on a GPU, what `block_params` reads there, see `plain_weights`.
    """

    packed: Tensor | None
    class_embed: Tensor | None
    class_mean: Tensor | None
    config: BlockConfig
    precision: str
    shape_options: dict[str, object]  # what the torch ops take of the config: the network's shape,
    affine_options: dict[str, object]  # and the affine map
    plain: dict[str, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return (self.packed if self.plain is None else self.plain["proj_in.bias"]).device


def block_shapes(config: BlockConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a block's state_dict and its shape, in the order that packing reads them; class_embed is last."""
    c, d, hidden = config.width, config.head_dim, config.mlp_hidden
    layernorm = config.norm == "layernorm"

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (c,)} | ({f"{name}.bias": (c,)} if layernorm else {})

    shapes = linear("proj_in", c, config.channels)
    if config.pos_embed:
        shapes["pos_embed"] = (config.tokens, c)
    if config.start_token:
        shapes["start_token"] = (config.channels,)
    if config.rope:
        shapes["rope_cos"] = shapes["rope_sin"] = (config.tokens, d // 2)
    for j in range(config.layers):
        layer = f"layers.{j}"
        shapes |= norm(f"{layer}.norm1") | linear(f"{layer}.qkv", 3 * c, c)
        if config.qk_norm:
            shapes |= {f"{layer}.q_norm.weight": (d,), f"{layer}.k_norm.weight": (d,)}
        shapes |= linear(f"{layer}.proj", c, c) | norm(f"{layer}.norm2")
        shapes |= linear(f"{layer}.fc1", (2 if config.gate == "swiglu" else 1) * hidden, c)
        shapes |= linear(f"{layer}.fc2", c, hidden)
    shapes |= linear("proj_out", (1 if config.shift_only else 2) * config.channels, c)
    if config.num_classes:
        shapes["class_embed"] = (config.num_classes, max(config.class_tokens, 1), c)
    return shapes


def _shape_options(config: BlockConfig) -> dict[str, object]:
    names = ("width", "layers", "head_dim", "mlp_hidden", "norm", "gate", "qk_norm", "rope", "pos_embed", "start_token",
             "shift_only")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def plain_weights(state_dict: dict[str, Tensor], config: BlockConfig, precision: str) -> dict[str, Tensor]:
    """The given tensors in the order of `block_shapes`, without class_embed.

    bf16: the weights and biases of the layers' linear maps are rounded copies.
    """
    linear = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    plain = {name: state_dict[name].detach() for name in block_shapes(config) if name != "class_embed"}
    return {name: t.to(DTYPES[precision]) if name.endswith(linear) else t for name, t in plain.items()}


def packed_weights(state_dict: dict[str, Tensor], config: BlockConfig, precision: str) -> Tensor:
    """The given tensors, without class_embed, in the layout of csrc/block.h for the device that they are on."""
    weights = [state_dict[name].detach().contiguous() for name in block_shapes(config) if name != "class_embed"]
    options = dict(_shape_options(config), precision=precision, tokens=config.tokens, channels=config.channels)
    size = torch.ops.biflow.packed_block_size(weights, **options)
    packed = weights[0].new_zeros(size)  # the memory is taken here, where too little of it has torch's own error
    torch.ops.biflow.pack_block_(weights, packed, **options)
    return packed


def block_weights(
    state_dict: dict[str, Tensor],
    config: BlockConfig,
    precision: str,
    packed: Tensor | None,
    plain: dict[str, Tensor] | None,
) -> BlockWeights:
    """`BlockWeights` of a state_dict that has been checked, and of what was made of it."""
    class_embed = state_dict["class_embed"].detach().clone() if config.num_classes else None
    class_mean = None if class_embed is None else class_embed.mean(0)
    kind, bound = config.clip or ("none", 0.0)
    affine_options = dict(
        layout=config.layout, scale=config.scale, clip=kind, clip_value=bound, clip_on=config.clip_on, flip=config.flip
    )
    shape_options = dict(_shape_options(config), precision=precision)
    return BlockWeights(packed, class_embed, class_mean, config, precision, shape_options, affine_options, plain)


def pack_block(state_dict: dict[str, Tensor], config: BlockConfig, precision: str = "fp32") -> BlockWeights:
    """A copy of a block's weights in the layout that `decode_block` and `block_params` read (csrc/block.h).

    state_dict: fp32 tensors on one device, exactly the names and shapes of `block_shapes(config)`. On a GPU
    `block_params` reads these tensors themselves, and copies only where bf16 rounds.
    precision: "fp32", or "bf16": the layers' weights are rounded to bf16, and what they multiply will be; proj_in,
    proj_out, norms, biases, embeddings and all sums stay fp32.
    Raises ValueError for missing or unexpected names, wrong shapes, another precision or device, TypeError for other
    dtypes.
    """
    check_choice("pack_block: precision", precision, PRECISIONS)
    shapes = block_shapes(config)
    missing = [name for name in shapes if name not in state_dict]
    unexpected = [name for name in state_dict if name not in shapes]
    if missing or unexpected:
        raise ValueError(
            f"pack_block: missing weights: {missing or 'none'}; unexpected weights: {unexpected or 'none'}"
        )
    for name, shape in shapes.items():
        check_float32(f"pack_block: {name}", state_dict[name])
        check_shape(f"pack_block: {name}", state_dict[name], shape)
        check_beside(f"pack_block: {name}", state_dict[name], state_dict["proj_in.bias"].device, "proj_in.bias")
    with torch.no_grad():
        on_gpu = state_dict["proj_in.bias"].is_cuda
        plain = plain_weights(state_dict, config, precision) if on_gpu else None
        return block_weights(state_dict, config, precision, packed_weights(state_dict, config, precision), plain)


def has_fast_bf16(device: torch.device | None = None) -> bool:
    """Whether products in bf16 are several times faster than in fp32: on a CPU (None) with AMX, on a GPU."""
    if device is not None and device.type == "cuda":
        return True
    return torch.ops.biflow.cpu_isa() == "amx"


def check_block_call(name, x, weights, config, y, context, null_context, guidance, guide, anneal, attn_temp) -> None:
    """What all ops of a packed block check: x (called `name`), the weights, the condition, the guidance."""
    if not isinstance(weights, BlockWeights):
        raise TypeError(f"weights: expected the result of pack_block, got {type(weights).__name__}")
    if weights.config is not config and weights.config != config:
        raise ValueError(f"config: expected the one the weights were packed for, {weights.config}, got {config}")
    check_float32(name, x)
    check_beside(name, x, weights.device, "weights")
    check_shape(name, x, ("B", config.tokens, config.channels))
    batch = x.shape[0]
    if y is not None:
        if not config.num_classes:
            raise ValueError("y: expected None for a block without classes (num_classes=0), got labels")
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            raise TypeError(
                f"y: expected an int64 Tensor, got {y.dtype if isinstance(y, Tensor) else type(y).__name__}"
            )
        check_shape("y", y, (batch,))
        check_beside("y", y, x.device, name)
    check_number("guidance", guidance, minimum=0)
    check_choice("guide", guide, _GUIDES)
    check_flag("anneal", anneal)
    check_number("attn_temp", attn_temp, above=0)
    if context is not None:
        check_float32("context", context)
        check_beside("context", context, x.device, name)
        check_shape("context", context, (batch, "S", config.width))
    if null_context is not None:
        check_float32("null_context", null_context)
        check_beside("null_context", null_context, x.device, name)
        if context is None:
            raise ValueError("null_context: expected None without context, got a Tensor")
        length = context.shape[1]
        check_shape("null_context", null_context, (length, config.width), (batch, length, config.width))
    elif context is not None and guidance > 0:
        raise ValueError("null_context: expected a Tensor, which guidance with context needs, got None")


@dataclass(frozen=True)
class Condition:
    """What a pass is conditioned on, as the torch ops take it: tensors in order, options by name."""

    tensors: tuple[Tensor | None, ...]  # added, prefix, null_added, null_prefix
    options: dict[str, object]

    @property
    def prefix_tokens(self) -> int:
        return 0 if self.tensors[1] is None else self.tensors[1].shape[1]

    @property
    def passes(self) -> int:
        """Sequences a sample: 2 with guidance."""
        return 2 if self.options["guidance"] > 0 else 1


def condition(
    weights: BlockWeights, batch: int, y, context, null_context, guidance, guide, anneal, attn_temp
) -> Condition:
    """The condition of a call whose arguments have been checked."""
    # where both passes would see the same, the second changes nothing
    guided = guidance > 0 and (y is not None or context is not None or attn_temp != 1.0)
    added, prefix = _condition(weights, batch, y, context)
    null_added, null_prefix = _condition(weights, batch, None, null_context) if guided else (None, None)
    options = dict(guidance=float(guidance) if guided else 0.0, guide=guide, anneal=anneal, attn_temp=float(attn_temp))
    return Condition((added, prefix, null_added, null_prefix), options)


def _condition(weights: BlockWeights, batch: int, y: Tensor | None, context: Tensor | None):
    """(vector added to every token (B, C) or None, prefix tokens (B, S, C) or None) of one pass."""
    added = prefix = None
    if weights.class_embed is not None:
        if y is None:
            classes = weights.class_mean.expand(batch, -1, -1)
        else:
            unconditional = (y < 0)[:, None, None]
            classes = torch.where(unconditional, weights.class_mean, weights.class_embed[y.clamp(min=0)])
        if weights.config.class_tokens:
            prefix = classes.contiguous()
        else:
            added = classes[:, 0].contiguous()
    if context is not None:
        context = context.expand(batch, -1, -1)
        prefix = context.contiguous() if prefix is None else torch.cat([prefix, context], 1)
    return added, prefix


def call_options(weights: BlockWeights, given: Condition) -> dict[str, object]:
    """The keyword arguments of torch.ops.biflow.decode_block_."""
    return dict(weights.shape_options, **weights.affine_options, **given.options)


def gpu_plan(weights: BlockWeights, batch: int, given: Condition) -> tuple[list[int], int]:
    """How a decode of `batch` samples is divided on the current GPU (csrc/decode_block.h), and its words of workspace.

    The first number of the plan says whether it is one launch, and not one a phase. ValueError for a block that is too
    wide for the GPU.
    """
    names = ("width", "layers", "head_dim", "mlp_hidden", "start_token", "shift_only", "precision")
    found = torch.ops.biflow.decode_block_buffers(
        batch=batch, guided=given.passes == 2, prefix_tokens=given.prefix_tokens, tokens=weights.config.tokens,
        channels=weights.config.channels, **{name: weights.shape_options[name] for name in names},
    )  # fmt: skip
    shared, limit = found[16:]
    if shared > limit:
        c = weights.config
        raise ValueError(
            f"decode_block: expected tokens whose channels fit in this GPU's {limit} bytes of shared memory a block; "
            f"{c.channels} channels at width {c.width} need {shared}"
        )
    return found[:6], found[6]


@takes_arrays
def decode_block(
    z: Tensor,
    weights: BlockWeights,
    config: BlockConfig,
    *,
    y: Tensor | None = None,
    context: Tensor | None = None,
    null_context: Tensor | None = None,
    guidance: float = 0.0,
    guide: str = "ab",
    anneal: bool = True,
    attn_temp: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Inverts one flow block exactly, token by token: x with encode(x) = z.

    For n = 0 .. T-1 in block order: x_n = z_n sigma(clip a_n) + clip b_n, where the raw a_n, b_n are the causal
    transformer's output from x_0 .. x_{n-1} (0 for n = 0 without a start token). The keys and values of earlier tokens
    are kept, so a step costs one token. In the precision of the packed weights; z, x and all sums are fp32. On a CPU
    each sample's result is bitwise the same in any batch and for any number of threads; on a GPU it is the same in
    every run, but the order of attention's sums follows the size of the batch.

    z: (B, T, D) float32. weights: from `pack_block`; config: the one they were packed for. y: (B,) int64, -1 (or
    y=None) is the mean over the classes; the range is the caller's to check. context: (B, S, C), already at the block's
    width, before the tokens.
    guidance g > 0: a second, unconditional pass (mean class, null_context (S, C) or (B, S, C)), whose attention logits
    are divided by attn_temp; before clip and scale map raw_a += g (raw_a - raw_a of that pass) if 'a' is in guide, and
    likewise b. anneal: g n / max(T - 1, 1) in place of g for token n.
    out: contiguous (B, T, D) float32 that receives x and is returned; z itself is allowed.
    Not differentiable (train through the encode direction): the backward raises RuntimeError.
    Raises TypeError for wrong types and dtypes, ValueError for wrong shapes, options and devices.

    Source: TARFlow, arXiv 2412.06329, section 2 (sampling and guidance); start token: STARFlow, arXiv 2506.06276.
    """
    check_block_call("z", z, weights, config, y, context, null_context, guidance, guide, anneal, attn_temp)
    if out is not None:
        check_buffer("out", out, tuple(z.shape), (z, context, null_context))
        if not torch.compiler.is_compiling():  # there the binding alone checks: addresses are not known yet
            distance = abs(z.data_ptr() - out.data_ptr())
            if z.is_contiguous() and 0 < distance < 4 * z.numel():
                raise ValueError(f"out: expected z itself or no overlap with it, got one {distance} bytes from it")
    given = condition(weights, z.shape[0], y, context, null_context, guidance, guide, anneal, attn_temp)
    tensors = (z.contiguous(), weights.packed, *given.tensors)
    options = call_options(weights, given)
    if out is None and (torch.compiler.is_compiling() or (torch.is_grad_enabled() and any_requires_grad(*tensors))):
        return torch.ops.biflow.decode_block(*tensors, **options)
    # with nothing to record, the call that has no autograd formula: the formula's Python costs 25 us each time
    out = torch.empty_like(tensors[0]) if out is None else out
    if z.is_cuda and z.numel() and not torch.compiler.is_compiling():
        with torch.cuda.device_of(z):  # the memory is taken here, where too little of it has torch's own error
            options["plan"], words = gpu_plan(weights, z.shape[0], given)
            options["workspace"] = z.new_empty(words)
    torch.ops.biflow.decode_block_(*tensors, out, **options)
    return out


@torch.library.register_fake("biflow::pack_block_")
def _(weights, packed, **options):
    raise NotImplementedError("pack_block: weights are packed once, outside of compiled code")


@torch.library.register_fake("biflow::decode_block")
def _(z, packed, added, prefix, null_added, null_prefix, **options):
    return torch.empty_like(z)


@torch.library.register_fake("biflow::decode_block_")
def _(z, packed, added, prefix, null_added, null_prefix, out, **options):
    return None


def _no_backward(ctx, grad):
    raise RuntimeError("decode_block is exact inference and has no gradient; train through the encode direction")


torch.library.register_autograd("biflow::decode_block", _no_backward)
