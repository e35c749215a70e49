"""Checks that the ops share; each names the argument, what was expected and what came."""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from biflow import _library  # noqa: F401

LAYOUTS = ("scale_shift", "shift_scale", "interleaved")
SCALES = ("exp", "softplus", "sigmoid")
CLIPS = ("hard", "tanh")
CLIP_ON = ("both", "scale")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Kernels of fp32 take numbers as fp32: from OVERFLOWS on that is infinite, up to VANISHES it is 0.
OVERFLOWS, VANISHES = 2.0**128 - 2.0**103, 2.0**-150
# device types that this build has kernels for: the CUDA kernels are built together, where nvcc is
DEVICES = tuple(
    kind
    for kind, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("biflow::affine_encode", key)
)


def check_tensor(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")


def check_floats_beside(name: str, t: object, x: Tensor, x_name: str) -> None:
    """t has one of the dtypes FLOATS, float64 beside float64 x only, and is where x, called x_name, is."""
    check_tensor(name, t)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {t.dtype}")
    if t.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(f"{name}: float64 goes with float64 {x_name} only, got {t.dtype} beside {x_name} {x.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like {x_name}, got {t.device}")


def no_kernels(kind: str) -> str:
    """Why there are none for a device type that is not in DEVICES, and what to do."""
    if kind == "cuda":
        return "this build has no CUDA kernels: install the CUDA toolkit, so that nvcc is found, and build biflow again"
    return f"this build has no kernels for {kind}"


def parse_device(text: str) -> torch.device:
    """A device of a kind that this build has kernels for; this machine need not have it."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICES:
        have = " or ".join(map(repr, DEVICES))
        why = f"; {no_kernels('cuda')}" if device is not None and device.type == "cuda" else ""
        raise ValueError(f"device: expected {have}, for which this build has kernels, got {text!r}{why}")
    return device


def local_device(text: str) -> torch.device:
    """The same, one that this machine has."""
    device = parse_device(text)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device: expected one of this machine, got {text!r}: torch sees {count} CUDA devices")
    return device


def check_device(name: str, t: Tensor, kinds: tuple[str, ...] = ("cpu",)) -> None:
    """t is on one of the device types `kinds` that its op has kernels for, and this build has them."""
    kind = t.device.type
    if kind in kinds and kind in DEVICES:
        return
    wanted = " or ".join(k.upper() for k in kinds if k in DEVICES)
    why = f"the op has no kernel for {kind}" if kind in DEVICES else no_kernels(kind)
    raise ValueError(f"{name}: expected a {wanted} tensor, got one on {t.device}: {why}")


def check_float32(name: str, t: object) -> None:
    """A float32 tensor on a device that has kernels."""
    check_tensor(name, t)
    if t.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {t.dtype}")
    check_device(name, t, ("cpu", "cuda"))


def check_beside(name: str, t: Tensor, device: torch.device, like: str) -> None:
    """t is on the device that `like` is on."""
    if t.device != device:
        raise ValueError(f"{name}: expected device {device} like {like}, got {t.device}")


def check_shape(name: str, t: Tensor, *shapes: tuple) -> None:
    """One of `shapes`; a string in one stands for any size."""
    for shape in shapes:
        if t.dim() == len(shape) and all(
            isinstance(want, str) or want == got for want, got in zip(shape, t.shape, strict=True)
        ):
            return
    wanted = " or ".join(f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})" for shape in shapes)
    raise ValueError(f"{name}: expected shape {wanted}, got {tuple(t.shape)}")


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def backwards_only() -> bool:
    """Whether derivatives can come by backward passes alone: no transform of torch.func, no forward mode is at work."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def check_buffer(name: str, buffer: object, shape: tuple, reads: tuple[Tensor | None, ...] = ()) -> None:
    """A contiguous float32 buffer of `shape`; neither it nor what is read with it may want a gradient."""
    check_float32(name, buffer)
    check_shape(name, buffer, shape)
    if not buffer.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {buffer.stride()}")
    if torch.is_grad_enabled() and any_requires_grad(buffer, *reads):
        raise RuntimeError(f"{name}: expected a call under torch.no_grad(): what is written there has no graph")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__} {value!r}")


def check_number(name: str, value: object, *, above: float = -math.inf, minimum: float = -math.inf) -> float:
    """A number that is finite, and more than `above` and at least `minimum`, as fp32 too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    good = above < value < math.inf and value >= minimum
    if not (good and fits_float32(value, positive=above == 0)):
        bound = f">= {minimum:g}" if minimum > -math.inf else f"> {above:g}"
        raise ValueError(f"{name}: expected a finite number {bound}{' as float32' if good else ''}, got {value!r}")
    return float(value)


def fits_float32(value: float, *, positive: bool) -> bool:
    """Whether a finite number is finite as fp32 and, if it has to be positive, not 0."""
    return abs(value) < OVERFLOWS and not (positive and value <= VANISHES)


def check_window(start: object, stop: object, tokens: int) -> None:
    """The tokens start <= n < stop of `tokens`, at least one."""
    for name, value in (("start", start), ("stop", stop)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if not 0 <= start < stop <= tokens:
        raise ValueError(f"start, stop: expected 0 <= start < stop <= {tokens}, got {start} and {stop}")


def check_clip(clip: object) -> tuple[str, float] | None:
    """None or (kind, c) with c a float."""
    if clip is None:
        return None
    if not isinstance(clip, (tuple, list)) or len(clip) != 2 or clip[0] not in CLIPS:
        raise ValueError(f'clip: expected None, ("hard", c) or ("tanh", c), got {clip!r}')
    kind, c = clip
    good = not isinstance(c, bool) and isinstance(c, numbers.Real) and 0 < c < math.inf
    if not (good and fits_float32(c, positive=True)):
        raise ValueError(f"clip: expected a finite c > 0{' as float32' if good else ''}, got {c!r}")
    return kind, float(c)
