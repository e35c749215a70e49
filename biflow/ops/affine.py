"""Affine coupling with log-determinant: checks, fake kernels, autograd. The maths: affine_encode."""

import torch
from torch import Tensor

from biflow.ops._arrays import takes_arrays
from biflow.ops._checks import (
    CLIP_ON,
    LAYOUTS,
    SCALES,
    check_choice,
    check_clip,
    check_device,
    check_flag,
    check_tensor,
)

_MAX_CUDA_CHANNELS = 2**30  # offsets within a token's row take 32 bits in the kernels
_LOW = (torch.float32, torch.bfloat16, torch.float16)


@takes_arrays
def affine_encode(
    x: Tensor,
    params: Tensor,
    *,
    layout: str = "scale_shift",
    scale: str = "exp",
    clip: tuple[str, float] | None = None,
    clip_on: str = "both",
    causal: bool = True,
    flip: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z = (x - b) / sigma(a) per element, with log|det dz/dx| (TARFlow, arXiv 2412.06329, section 3; RealNVP's affine).

    Order of operations: params are split by `layout` into raw scale a and raw shift b -> both move by one token in
    block order if `causal` (token t uses what the network wrote at the token before it; the first token's a and b are
    0) -> `clip` -> sigma = `scale` map of a -> affine -> masked tokens replaced by x.

    Args:
        x: (B, T, D), float32, bfloat16, float16 or float64, any strides.
        params: (B, T, 2D) as the network wrote them; any of float32, bfloat16, float16 beside x in any of these
            (autocast), float64 beside float64.
        layout: "scale_shift" [a | b], "shift_scale" [b | a], "interleaved" [a b] per channel.
        scale: "exp" exp(a), "softplus" softplus(a + 0.541324854612918) (STARFlow: 1 at a = 0), "sigmoid"
            sigmoid(a + 2) + 1e-3.
        clip: None, ("hard", c) clamp to [-c, c], ("tanh", c) c tanh(. / c); c > 0.
        clip_on: "both" a and b, "scale" a only.
        causal: shift by one token; False takes the params of token t for token t (start token, RealNVP).
        flip: block order is reversed token order: the first token in block order is token T - 1. Nothing is copied.
        mask: (B, T) bool; False tokens pass through unchanged and add 0 to logdet. Applied last: positions do not move,
            and a token still reads the params written at a masked neighbour.

    Returns:
        z: (B, T, D), dtype of x, contiguous.
        logdet: (B,), -sum of log sigma over tokens and channels, in nats; float32 (float64 for float64 x). A sample has
            the same bits for any number of threads, on CUDA in any batch. Empty sums (T = 0 or D = 0) are 0.

    Gradients: first order, of z and logdet, to x and params; the last token's params in block order get 0 if causal.
    A second derivative raises RuntimeError. The transforms of torch.func (grad, vmap, jvp) do not see this gradient:
    use biflow.reference under them.

    Raises:
        TypeError: a tensor of a dtype not listed, a flag that is no bool. ValueError: a shape or option that does not
            fit, tensors of two devices or of one without a kernel, more than 2^30 channels on CUDA.
    """
    options = _check("x", x, params, layout, scale, clip, clip_on, causal, flip, mask)
    return torch.ops.biflow.affine_encode(x, params, *options, mask)


@takes_arrays
def affine_decode(
    z: Tensor,
    params: Tensor,
    *,
    layout: str = "scale_shift",
    scale: str = "exp",
    clip: tuple[str, float] | None = None,
    clip_on: str = "both",
    causal: bool = True,
    flip: bool = False,
    mask: Tensor | None = None,
    return_logdet: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x = z sigma(a) + b for all tokens at once, given their params: the inverse of affine_encode with the same params.

    Arguments, dtypes, errors and gradients as in affine_encode, with z in the place of x.

    Returns:
        x: (B, T, D), dtype of z, contiguous; with `return_logdet` also logdet (B,) = log|det dz/dx| = -sum log sigma,
        the same number affine_encode returns, not its negative.
    """
    options = _check("z", z, params, layout, scale, clip, clip_on, causal, flip, mask)
    check_flag("return_logdet", return_logdet)
    x, logdet = torch.ops.biflow.affine_decode(z, params, *options, mask, return_logdet)
    return (x, logdet) if return_logdet else x


def _check(name, x, params, layout, scale, clip, clip_on, causal, flip, mask):
    """Raises on bad input; returns the options the op takes: layout, scale, clip, clip_value, clip_on, causal, flip."""
    for what, t in ((name, x), ("params", params)):
        check_tensor(what, t)
        if t.dtype not in _LOW and t.dtype != torch.float64:
            raise TypeError(f"{what}: expected float32, bfloat16, float16 or float64, got {t.dtype}")
    if (x.dtype == torch.float64) != (params.dtype == torch.float64):
        raise TypeError(f"params: float64 goes with float64 only, got {name} {x.dtype} and params {params.dtype}")
    if x.dim() != 3:
        raise ValueError(f"{name}: expected (B, T, D), got shape {tuple(x.shape)}")
    expected = (x.shape[0], x.shape[1], 2 * x.shape[2])
    if tuple(params.shape) != expected:
        raise ValueError(f"params: expected (B, T, 2D) = {expected}, got {tuple(params.shape)}")
    check_device(name, x, ("cpu", "cuda"))
    if x.is_cuda and x.shape[2] > _MAX_CUDA_CHANNELS:
        raise ValueError(f"{name}: expected D <= 2^30 on CUDA, got {x.shape[2]}")
    if params.device != x.device:
        raise ValueError(f"params: expected device {x.device} like {name}, got {params.device}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool Tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if tuple(mask.shape) != tuple(x.shape[:2]):
            raise ValueError(f"mask: expected (B, T) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
        if mask.device != x.device:
            raise ValueError(f"mask: expected device {x.device} like {name}, got {mask.device}")
    check_choice("layout", layout, LAYOUTS)
    check_choice("scale", scale, SCALES)
    check_choice("clip_on", clip_on, CLIP_ON)
    check_flag("causal", causal)
    check_flag("flip", flip)
    return layout, scale, *(check_clip(clip) or ("none", 0.0)), clip_on, causal, flip


def _logdet_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty(like, shape=None):
    return like.new_empty(like.shape if shape is None else shape)


@torch.library.register_fake("biflow::affine_encode")
def _(x, params, layout, scale, clip, clip_value, clip_on, causal, flip, mask):
    return _empty(x), x.new_empty((x.shape[0],), dtype=_logdet_dtype(x))


@torch.library.register_fake("biflow::affine_decode")
def _(z, params, layout, scale, clip, clip_value, clip_on, causal, flip, mask, return_logdet):
    return _empty(z), z.new_empty((z.shape[0] if return_logdet else 0,), dtype=_logdet_dtype(z))


def _fake_backward(grad, grad_logdet, x, params, layout, scale, clip, clip_value, clip_on, causal, flip, mask):
    return _empty(x), _empty(params)


def _save(ctx, inputs, output):
    x, params, *options, mask = inputs[:10]
    ctx.save_for_backward(x, params, mask)
    ctx.options = options
    ctx.with_logdet = len(inputs) == 10 or inputs[10]


def _backward_of(op, extra):
    def backward(ctx, grad, grad_logdet):
        x, params, mask = ctx.saved_tensors
        grad = torch.zeros_like(x) if grad is None else grad
        grad_logdet = grad_logdet if ctx.with_logdet else None
        grads = op(grad, grad_logdet, x, params, *ctx.options, mask)
        return *grads, *([None] * (8 + extra))

    return backward


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("biflow: affine_encode and affine_decode have first derivatives only (use biflow.reference)")


for _name, _extra in (("affine_encode", 0), ("affine_decode", 1)):
    _op = getattr(torch.ops.biflow, f"{_name}_backward").default
    torch.library.register_fake(f"biflow::{_name}_backward")(_fake_backward)
    torch.library.register_autograd(f"biflow::{_name}", _backward_of(_op, _extra), setup_context=_save)
    torch.library.register_autograd(f"biflow::{_name}_backward", _no_second_derivative)
