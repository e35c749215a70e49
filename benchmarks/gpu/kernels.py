"""Every kernel against eager torch, torch.compile and CuPy: microseconds, share of the limit that bounds it.

Nothing is timed before its result was found right, against biflow.reference in fp64 ("error", parity.py).
Bytes by the model of one pass (each input once, each output once); FLOPs of attention: 4 B H T^2 d, half when causal;
with the backward pass three times that. torch.compile takes long to start: only for few rows, in a part of their own.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from biflow import ops, reference
from biflow.ops.attention import apply_rope

from .limits import Case, bound, share
from .parity import BOUNDS, error
from .timing import Call, Timer, Times

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# name, (B, T, D), dtype of data, of params, options
AFFINE = [
    ("B/2 batch 1", (1, 256, 16), F32, BF16, {}),
    ("B/2 batch 64", (64, 256, 16), F32, BF16, {}),
    ("TARFlow-64 batch 64", (64, 1024, 12), F32, BF16, {}),
    ("fp32, 403 MB", (32, 1024, 768), F32, F32, {}),
    ("bf16, 403 MB", (64, 1024, 768), BF16, BF16, {}),
    ("fp32 and bf16 params, 302 MB", (32, 1024, 768), F32, BF16, {}),
    ("B/2 batch 6144, 403 MB", (6144, 256, 16), F32, F32, {}),
    ("TARFlow-64 batch 2048, 403 MB", (2048, 1024, 12), F32, F32, {"flip": True}),
    ("interleaved, 403 MB", (32, 1024, 768), F32, F32, {"layout": "interleaved"}),
    ("softplus tanh, 403 MB", (32, 1024, 768), F32, F32, {"scale": "softplus", "clip": ("tanh", 4.0)}),
]
# name, (B, T, D), window, options
JACOBI = [
    ("B/2 batch 1", (1, 256, 16), 256, {}),
    ("B/2 batch 64", (64, 256, 16), 256, {}),
    ("B/2 batch 64, window 16", (64, 256, 16), 16, {}),
    ("TARFlow-64 batch 64", (64, 1024, 12), 1024, {"flip": True}),
    ("503 MB", (32, 1024, 768), 1024, {}),
]
# name, (B, H, T, d), causal, QK-norm and RoPE
ATTENTION = [
    ("B/2 reverse batch 1", (1, 12, 264, 64), False, True),
    ("B/2 reverse batch 64", (64, 12, 264, 64), False, True),
    ("B/2 reverse batch 256", (256, 12, 264, 64), False, True),
    ("B/2 forward batch 64", (64, 12, 256, 64), True, False),
    ("TARFlow-64 batch 16", (16, 12, 1024, 64), True, False),
    ("d = 32, T = 256", (64, 12, 256, 32), False, True),
    ("d = 128, T = 1024", (16, 8, 1024, 128), False, True),
]
TRAINED = ("B/2 reverse batch 64", "B/2 forward batch 64")
# name, rows, width
NORM = [("B/2 batch 1", 264, 768), ("B/2 batch 64", 64 * 264, 768), ("B/2 batch 256", 256 * 264, 768)]
# name, (B, T, C, D), dtype of the products: None: fp32
ALIGNMENT = [
    ("B/2 batch 64", (64, 256, 768, 16), None),
    ("B/2 batch 64, bf16 products", (64, 256, 768, 16), BF16),
]
COMPILED = {("affine_encode", "fp32, 403 MB"), ("attention_qkv", "B/2 reverse batch 64")}
COMPILED |= {(op, "B/2 batch 64") for op in ("add_norm", "gate swiglu")}
BACKENDS = {False: "inductor", True: "eager"}  # a dry run has of the compiler what is before the code generator
L2_BYTES = 30e6  # sets above this are timed from memory, others from the cache


def cases(timer: Timer, limits: list[dict], dry: bool) -> Iterator[Case]:
    yield from affine(timer, limits, dry)
    yield from jacobi_update(timer, limits, dry)
    yield from attention(timer, limits, dry)
    yield from norm_and_gate(timer, limits, dry)
    yield from alignment(timer, limits, dry)


def compiled(timer: Timer, limits: list[dict], dry: bool) -> Iterator[Case]:
    for case in cases(timer, limits, dry):
        if (case.labels["op"], case.labels["case"]) in COMPILED:
            yield Case(case.labels, partial(case.run, backend=BACKENDS[dry]), needs=10.0, limit=90.0)


def _contestants(calls: dict[str, Call | Callable[[], Call]], backend: str | None) -> dict:
    """backend: of torch.compile, then ours against the compiled "eager" alone."""
    if backend is None:
        return calls
    eager = calls["eager"].f
    function = torch.compile(eager.func, dynamic=False, backend=backend)
    return {"ours": calls["ours"], "compile": Call(partial(function, *eager.args, **eager.keywords))}


def _wide(value: object) -> object:
    """In fp64, what floats there are in it: the reference's arguments."""
    if isinstance(value, torch.Tensor):
        return value.detach().double()
    return tuple(map(_wide, value)) if isinstance(value, tuple) else value


def _check(f: Callable, inputs: tuple, options: dict, gradients: bool = False) -> Callable[[object], float]:
    """The error of a result, or of its gradients, against f of the same inputs in fp64."""
    inputs, options = _wide(inputs), {name: _wide(value) for name, value in options.items()}
    if gradients:
        want = _backward(f, inputs, options).f()
    else:
        with torch.no_grad():
            want = f(*inputs, **options)
    return partial(error, want=want)


def _row(times: Times, limit: float | None, moved: float, **amounts: float) -> dict:
    """amounts: of what the row says how much there is a second."""

    def per_call(seconds: float) -> dict:
        rates = {name: amount / seconds for name, amount in amounts.items()}
        return {"us": seconds * 1e6} | share(seconds, limit) | {"mb": moved / 1e6} | rates

    return times.row(per_call)


def _randn(timer: Timer, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(timer.device).manual_seed(sum(shape)), device=timer.device)


def affine(timer: Timer, limits: list[dict], dry: bool) -> Iterator[Case]:
    for case in AFFINE:
        for direction in ("encode", "decode"):
            for what in ("", " backward"):
                labels = {"op": f"affine_{direction}{what}", "case": case[0]}
                yield Case(labels, partial(_affine, timer, limits, dry, case, direction, bool(what)))


def _affine(timer, limits, dry, case, direction, gradients, backend=None) -> dict:
    _, (B, T, D), data, net, options = case
    B = B if not dry else 1
    x = _randn(timer, B, T, D).to(data)
    params = (0.5 * _randn(timer, B, T, 2 * D)).to(net)
    functions = {who: getattr(m, f"affine_{direction}") for who, m in (("ours", ops), ("eager", reference))}
    check = _check(functions["eager"], (x, params), options, gradients)
    if gradients:
        moved = x.numel() * (3 * data.itemsize + 4 * net.itemsize)
        calls = {who: partial(_backward, f, (x, params), options) for who, f in functions.items()}
        times = timer(calls, cold=moved > L2_BYTES, check=check)
    else:
        moved = x.numel() * (2 * data.itemsize + 2 * net.itemsize)
        calls = {who: Call(partial(f, x, params, **options)) for who, f in functions.items()}
        if (
            direction == "encode"
            and data == net == F32
            and not options
            and not dry
            and importlib.util.find_spec("cupy")
        ):
            calls["cupy"] = partial(_cupy_encode, x, params)
        with torch.no_grad():
            times = timer(_contestants(calls, backend), cold=moved > L2_BYTES, check=check)
    return _row(times, bound(limits, {"copy": moved}), moved, gb_s=moved / 1e9)


def _backward(f: Callable, leaves: tuple, options: dict) -> Call:
    leaves = [t.clone().requires_grad_() for t in leaves]
    out = f(*leaves, **options)
    out = out if isinstance(out, tuple) else (out,)
    grads = [torch.ones_like(o) for o in out]
    return Call(lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True), graph=False)


def _cupy_encode(x: torch.Tensor, params: torch.Tensor) -> Call:
    """An independent kernel of the same bytes: z, without the log-determinant's sum. CuPy launches it itself."""
    import cupy

    kernel = cupy.ElementwiseKernel(
        "raw T x, raw T params, int64 T_, int64 D",
        "T z",
        """const long long c = i % D, t = (i / D) % T_, params_of = (i / D - 1) * 2 * D + c;
           const float a = t > 0 ? (float)params[params_of] : 0.f, b = t > 0 ? (float)params[params_of + D] : 0.f;
           z = (T)(((float)x[i] - b) * expf(-a));""",
        "affine_encode_cupy",
    )
    given = [cupy.from_dlpack(t) for t in (x, params)]
    out = cupy.empty(given[0].shape, given[0].dtype)
    z = torch.from_dlpack(out)
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def call():
        with stream:
            kernel(*given, x.shape[1], x.shape[2], out)
        return z

    return Call(call, graph=False)


def jacobi_update(timer: Timer, limits: list[dict], dry: bool) -> Iterator[Case]:
    for case in JACOBI:
        labels = {"op": "jacobi_update_", "case": case[0]}
        yield Case(labels, partial(_jacobi_update, timer, limits, dry, case))


def _jacobi_update(timer, limits, dry, case) -> dict:
    _, (B, T, D), window, options = case
    B = B if not dry else 1
    x, raw = _randn(timer, B, T, D), 0.5 * _randn(timer, B, T, 2 * D)
    z, moved_by = x.roll(1, 1), torch.empty(2, B, device=timer.device)
    options = options | {"start": T - window, "stop": T}

    def updated(update: Callable, x: torch.Tensor, z: torch.Tensor, raw: torch.Tensor) -> tuple:
        """Of copies: what is timed writes into x."""
        x, moved = x.clone(), torch.empty_like(moved_by, dtype=x.dtype)
        update(x, z, raw, moved, **options)
        return x, moved

    functions = {who: m.jacobi_update_ for who, m in (("ours", ops), ("eager", reference))}
    check = _check(partial(updated, functions["eager"]), (x, z, raw), {})
    calls = {
        who: Call(partial(f, x.clone(), z, raw, moved_by, **options), result=partial(updated, f, x, z, raw))
        for who, f in functions.items()
    }
    moved = 5 * 4 * B * window * D
    with torch.no_grad():
        times = timer(calls, cold=moved > L2_BYTES, check=check)
    return _row(times, bound(limits, {"copy": moved}), moved, gb_s=moved / 1e9)


def attention(timer: Timer, limits: list[dict], dry: bool) -> Iterator[Case]:
    for case in ATTENTION:
        yield Case({"op": "attention_qkv", "case": case[0]}, partial(_attention, timer, limits, dry, case))
    for case in ATTENTION:
        if case[0] in TRAINED:
            labels = {"op": "attention_qkv forward + backward", "case": case[0]}
            yield Case(labels, partial(_attention_trained, timer, limits, dry, case))


def _attention_inputs(timer: Timer, dry: bool, case: tuple) -> tuple[torch.Tensor, dict, float]:
    """qkv, options, FLOPs of the forward pass."""
    _, (B, H, T, d), causal, normed = case
    B = B if not dry else 1
    options = {"heads": H, "causal": causal}
    if normed:
        angle, weight = _randn(timer, T - 8, d // 2), torch.ones(d, device=timer.device)
        options |= {"q_norm": weight, "k_norm": weight, "rope": (angle.cos(), angle.sin()), "prefix": 8}
    return _randn(timer, B, T, 3 * H * d).to(BF16), options, 4 * B * H * T * T * d * (0.5 if causal else 1)


def _attention(timer, limits, dry, case, backend=None) -> dict:
    qkv, options, flops = _attention_inputs(timer, dry, case)
    check = _check(reference.attention_qkv, (qkv,), options)
    heads = torch_heads(qkv, **{key: value for key, value in options.items() if key != "causal"})
    alone = partial(F.scaled_dot_product_attention, *heads, is_causal=options["causal"])
    calls = {
        "ours": Call(partial(ops.attention_qkv, qkv, **options)),
        "eager": Call(partial(torch_attention, qkv, **options)),
        "sdpa_alone": Call(alone, result=lambda: alone().transpose(1, 2).flatten(2)),
    }
    moved = qkv.numel() * 2 * 4 / 3
    with torch.no_grad():
        times = timer(_contestants(calls, backend), cold=moved > L2_BYTES, check=check)
    return _row(times, bound(limits, {"copy": moved, "bf16 GEMM": flops}), moved, tflop_s=flops / 1e12)


def _attention_trained(timer, limits, dry, case) -> dict:
    """Training goes through torch's fused attention: ours is eager's, with checks."""
    qkv, options, flops = _attention_inputs(timer, dry, case)
    check = _check(reference.attention_qkv, (qkv,), options, gradients=True)
    qkv.requires_grad_()
    grad = torch.ones_like(qkv[..., : qkv.shape[2] // 3])

    def call(f):
        return torch.autograd.grad(f(qkv, **options), qkv, grad)

    functions = {"ours": ops.attention_qkv, "eager": torch_attention}
    calls = {who: Call(partial(call, f), graph=False) for who, f in functions.items()}
    moved, flops = qkv.numel() * 2 * 4, 3 * flops
    times = timer(calls, cold=moved > L2_BYTES, check=check)
    return _row(times, bound(limits, {"copy": moved, "bf16 GEMM": flops}), moved, tflop_s=flops / 1e12)


def torch_attention(qkv, *, causal, **options):
    """What a model does without a fused op: norms, rotation, torch's fused attention, a transpose."""
    o = F.scaled_dot_product_attention(*torch_heads(qkv, **options), is_causal=causal)
    return o.transpose(1, 2).flatten(2)


def torch_heads(qkv, *, heads, q_norm=None, k_norm=None, rope=None, prefix=0):
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if q_norm is not None:
        q, k = (F.rms_norm(t.float(), t.shape[-1:], w, 1e-6).to(t.dtype) for t, w in ((q, q_norm), (k, k_norm)))
    if rope is not None:
        q, k = apply_rope(q, *rope, prefix), apply_rope(k, *rope, prefix)
    return q, k, v


def norm_and_gate(timer: Timer, limits: list[dict], dry: bool) -> Iterator[Case]:
    """bf16 beside an fp32 residual stream, as in the bf16 passes."""
    for name, count, width in NORM:
        for op in ("add_norm", "gate swiglu", "gate gelu"):
            for what in ("", " backward"):
                run = partial(_norm_or_gate, timer, limits, op, count if not dry else 8, width, bool(what))
                yield Case({"op": op + what, "case": name}, run)


def _norm_or_gate(timer, limits, op, count, width, gradients, backend=None) -> dict:
    # name and options of the op, eager, bytes an element of the first input: forward and backward
    name, options, eager, *bytes_each = {
        "add_norm": ("add_norm", {"kind": "rmsnorm", "eps": 1e-6}, torch_add_norm, 12, 16),
        "gate swiglu": ("gate", {"kind": "swiglu"}, torch_gate, 3, 5),
        "gate gelu": ("gate", {"kind": "gelu"}, F.gelu, 4, 6),
    }[op]
    ours = partial(getattr(ops, name), **options)
    if op == "add_norm":
        weight = torch.ones(width, device=timer.device)
        given = (_randn(timer, count, width).to(BF16), _randn(timer, count, width), weight)
    else:
        given = (_randn(timer, count, 2 * 2048).to(BF16),)
    moved = bytes_each[gradients] * given[0].numel()
    check = _check(getattr(reference, name), given, options, gradients)
    if gradients:
        calls = {who: partial(_backward, f, given, {}) for who, f in (("ours", ours), ("eager", eager))}
        times = timer(calls, cold=moved > L2_BYTES, check=check)
    else:
        calls = {who: Call(partial(f, *given)) for who, f in (("ours", ours), ("eager", eager))}
        with torch.no_grad():
            times = timer(_contestants(calls, backend), cold=moved > L2_BYTES, check=check)
    return _row(times, bound(limits, {"copy": moved}), moved, gb_s=moved / 1e9)


def torch_add_norm(delta, h, weight):
    h = h + delta
    return F.rms_norm(h, h.shape[-1:], weight, 1e-6).to(delta.dtype), h


def torch_gate(m):
    a, b = m.chunk(2, dim=-1)
    return F.silu(a) * b


def alignment(timer: Timer, limits: list[dict], dry: bool) -> Iterator[Case]:
    for case in ALIGNMENT:
        labels = {"op": "alignment_error forward + backward", "case": case[0]}
        yield Case(labels, partial(_alignment, timer, limits, dry, case))


def _alignment(timer, limits, dry, case) -> dict:
    """One head of a training step, with a LayerNorm."""
    _, (B, T, C, D), dtype = case
    B = B if not dry else 1
    h, target, head = _randn(timer, B, T, C), _randn(timer, B, T, D), _randn(timer, D, C) / C**0.5
    norm = torch.ones(C, device=timer.device)
    leaves = tuple(t.requires_grad_() for t in (h, norm, torch.zeros_like(norm), head, torch.zeros_like(head[:, 0])))

    def call(f, leaves=leaves, target=target, dtype=dtype):
        e = f(leaves[0], target, *leaves[1:], kind="layernorm", eps=1e-5, dtype=dtype)
        return e.detach(), *torch.autograd.grad(e.sum(), leaves)

    wide = tuple(t.requires_grad_() for t in _wide(leaves))
    want = call(reference.alignment_error, wide, target.double(), None)
    check = partial(error, want=want, bound=BOUNDS[dtype or F32])
    functions = {"ours": ops.alignment_error, "eager": torch_alignment}
    calls = {who: Call(partial(call, f), graph=False) for who, f in functions.items()}
    moved = 3 * h.nbytes  # h for the errors and for the gradients, and its gradient
    times = timer(calls, cold=moved > L2_BYTES, check=check)
    return _row(times, bound(limits, {"copy": moved}), moved, gb_s=moved / 1e9)


def torch_alignment(h, target, norm_weight, norm_bias, head_weight, head_bias, *, kind, eps, dtype):
    y = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, eps)
    if dtype is not None:
        y, head_weight, head_bias = (t.to(dtype) for t in (y, head_weight, head_bias))
    return (F.linear(y, head_weight, head_bias).float() - target).square().sum((1, 2))
