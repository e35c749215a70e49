"""Every kernel against eager torch, torch.compile and CuPy: microseconds, share of the limit that bounds it.

Bytes by the model of one pass (each input once, each output once); FLOPs of attention: 4 B H T^2 d, half when causal.
"""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F

from biflow import ops, reference
from biflow.ops.attention import apply_rope

from .limits import rate
from .timing import Call, Timer

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# name, (B, T, D), dtype of data, of params, options
AFFINE = [
    ("B/2 batch 1", (1, 256, 16), F32, BF16, {}),
    ("B/2 batch 64", (64, 256, 16), F32, BF16, {}),
    ("TARFlow-64 batch 64", (64, 1024, 12), F32, BF16, {}),
    ("fp32, 403 MB", (32, 1024, 768), F32, F32, {}),
    ("bf16, 403 MB", (64, 1024, 768), BF16, BF16, {}),
    ("fp32 and bf16 params, 302 MB", (32, 1024, 768), F32, BF16, {}),
    ("B/2 batch 8192, 403 MB", (6144, 256, 16), F32, F32, {}),
    ("TARFlow-64 batch 2048, 403 MB", (2048, 1024, 12), F32, F32, {"flip": True}),
    ("interleaved, 403 MB", (32, 1024, 768), F32, F32, {"layout": "interleaved"}),
    ("softplus tanh, 403 MB", (32, 1024, 768), F32, F32, {"scale": "softplus", "clip": ("tanh", 4.0)}),
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
# name, rows, width
NORM = [("B/2 batch 1", 264, 768), ("B/2 batch 64", 64 * 264, 768), ("B/2 batch 256", 256 * 264, 768)]
L2_BYTES = 30e6  # sets above this are timed from memory, others from the cache


def run(timer: Timer, limits: list[dict], dry: bool) -> list[dict]:
    rows = []
    for part in (affine, attention, norm_and_gate):
        rows += part(timer, limits, dry)
    return rows


def _row(op: str, case: str, times: dict[str, float], limit_seconds: float, **more: object) -> dict:
    ours = times["ours"]
    row = {"op": op, "case": case, "us": ours * 1e6, "percent_of_limit": 100 * limit_seconds / ours}
    row |= {f"x_{name}": t / ours for name, t in times.items() if name != "ours"}
    return row | more


def affine(timer: Timer, limits: list[dict], dry: bool) -> list[dict]:
    rows = []
    generator = torch.Generator(timer.device).manual_seed(0)
    for name, (B, T, D), data, net, options in AFFINE:
        B = B if not dry else 1
        x = torch.randn((B, T, D), generator=generator, device=timer.device).to(data)
        params = (0.5 * torch.randn((B, T, 2 * D), generator=generator, device=timer.device)).to(net)
        for direction in ("encode", "decode"):
            forward, backward = {}, {}
            moved = x.numel() * (2 * data.itemsize + 2 * net.itemsize)
            for who, module in (("ours", ops), ("eager", reference)):
                f = getattr(module, f"affine_{direction}")
                forward[who] = Call(partial(f, x, params, **options))
                backward[who] = _backward(f, (x, params), options)
            if not dry and not options:
                compiled = torch.compile(getattr(reference, f"affine_{direction}"), dynamic=False)
                forward["compile"] = Call(partial(compiled, x, params))
            if direction == "encode" and data == net and data != BF16 and not options and not dry:
                forward |= _cupy_encode(x, params)
            with torch.no_grad():
                times = timer(forward, cold=moved > L2_BYTES)
            limit = moved / rate(limits, "copy")
            rows.append(
                _row(f"affine_{direction}", name, times, limit, mb=moved / 1e6, gb_s=moved / times["ours"] / 1e9)
            )
            moved = x.numel() * (3 * data.itemsize + 4 * net.itemsize)
            times = timer(backward, cold=moved > L2_BYTES)
            limit = moved / rate(limits, "copy")
            rows.append(
                _row(
                    f"affine_{direction} backward", name, times, limit, mb=moved / 1e6, gb_s=moved / times["ours"] / 1e9
                )
            )
    return rows


def _backward(f, leaves, options) -> Call:
    leaves = [t.clone().requires_grad_() for t in leaves]
    out = f(*leaves, **options)
    out = out if isinstance(out, tuple) else (out,)
    grads = [torch.ones_like(o) for o in out]
    return Call(lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True), graph=False)


def _cupy_encode(x: torch.Tensor, params: torch.Tensor) -> dict[str, Call]:
    """An independent kernel of the same bytes: z, without the log-determinant's sum. CuPy launches it itself."""
    if importlib.util.find_spec("cupy") is None:
        return {}
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
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def call():
        with stream:
            kernel(*given, x.shape[1], x.shape[2], out)

    return {"cupy": Call(call, graph=False)}


def attention(timer: Timer, limits: list[dict], dry: bool) -> list[dict]:
    rows = []
    generator = torch.Generator(timer.device).manual_seed(0)
    for name, (B, H, T, d), causal, normed in ATTENTION:
        B = B if not dry else 1
        qkv = torch.randn((B, T, 3 * H * d), generator=generator, device=timer.device).to(BF16)
        angle = torch.randn((T - 8, d // 2), generator=generator, device=timer.device)
        weight = torch.ones(d, device=timer.device)
        options = {"heads": H, "causal": causal}
        if normed:
            options |= {"q_norm": weight, "k_norm": weight, "rope": (angle.cos(), angle.sin()), "prefix": 8}
        q, k, v = qkv.view(B, T, 3, H, d).permute(2, 0, 3, 1, 4)
        calls = {
            "ours": Call(partial(ops.attention_qkv, qkv, **options)),
            "torch": Call(partial(torch_attention, qkv, **options)),
            "sdpa_alone": Call(partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)),
        }
        if not dry:
            compiled = torch.compile(torch_attention, dynamic=False)
            calls["compile"] = Call(partial(compiled, qkv, **options))
        flops = 4 * B * H * T * T * d * (0.5 if causal else 1)
        moved = qkv.numel() * 2 * 4 / 3
        limit = max(flops / rate(limits, "bf16 GEMM"), moved / rate(limits, "copy"))
        with torch.no_grad():
            times = timer(calls, cold=moved > L2_BYTES)
        rows.append(_row("attention_qkv", name, times, limit, mb=moved / 1e6, tflop_s=flops / times["ours"] / 1e12))
    return rows


def torch_attention(qkv, *, heads, causal, q_norm=None, k_norm=None, rope=None, prefix=0):
    """What a model does without a fused op: norms, rotation, torch's fused attention, a transpose."""
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if q_norm is not None:
        q, k = (F.rms_norm(t.float(), t.shape[-1:], w, 1e-6).to(t.dtype) for t, w in ((q, q_norm), (k, k_norm)))
    if rope is not None:
        q, k = apply_rope(q, *rope, prefix), apply_rope(k, *rope, prefix)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return o.transpose(1, 2).reshape(batch, length, width // 3)


def norm_and_gate(timer: Timer, limits: list[dict], dry: bool) -> list[dict]:
    """bf16 beside an fp32 residual stream, as in the bf16 passes."""
    rows = []
    generator = torch.Generator(timer.device).manual_seed(0)
    for name, count, width in NORM:
        count = count if not dry else 8
        h = torch.randn((count, width), generator=generator, device=timer.device)
        delta = torch.randn((count, width), generator=generator, device=timer.device).to(BF16)
        weight = torch.ones(width, device=timer.device)
        m = torch.randn((count, 2 * 2048), generator=generator, device=timer.device).to(BF16)
        # ours, eager, inputs, bytes an element of the first one: forward and backward
        cases = {
            "add_norm": (partial(ops.add_norm, kind="rmsnorm", eps=1e-6), torch_add_norm, (delta, h, weight), 12, 16),
            "gate swiglu": (partial(ops.gate, kind="swiglu"), torch_gate, (m,), 3, 5),
            "gate gelu": (partial(ops.gate, kind="gelu"), F.gelu, (m,), 4, 6),
        }
        for op, (ours, eager, given, *bytes_each) in cases.items():
            forward = {"ours": Call(partial(ours, *given)), "eager": Call(partial(eager, *given))}
            if not dry:
                forward["compile"] = Call(partial(torch.compile(eager, dynamic=False), *given))
            backward = {who: _backward(f, given, {}) for who, f in (("ours", ours), ("eager", eager))}
            for what, calls, each in zip(("", " backward"), (forward, backward), bytes_each, strict=True):
                moved = each * given[0].numel()
                with torch.set_grad_enabled(bool(what)):
                    times = timer(calls, cold=moved > L2_BYTES)
                limit = moved / rate(limits, "copy")
                rows.append(_row(op + what, name, times, limit, mb=moved / 1e6, gb_s=moved / times["ours"] / 1e9))
    return rows


def torch_add_norm(delta, h, weight):
    h = h + delta
    return F.rms_norm(h, h.shape[-1:], weight, 1e-6).to(delta.dtype), h


def torch_gate(m):
    a, b = m.chunk(2, dim=-1)
    return F.silu(a) * b
