"""Offsets that 32 bits do not hold: the last rows of tensors of more than 2^31 elements, against those rows alone.

Everything before the last rows is 0, and a row's result does not depend on how many there are: bits must be the same.
"""

import fcntl
import math
import tempfile
from pathlib import Path

import pytest
import torch

from biflow import ops, reference


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


DEVICE, ELEMENTS, ROWS = "cuda", 2**31, 8
BF16 = torch.bfloat16


@pytest.fixture
def room():
    """room(gigabytes) skips a test for which memory is short. One such test at a time, in all processes together."""

    def enough(gigabytes):
        if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < gigabytes << 30:
            pytest.skip(f"needs {gigabytes} GB of the GPU's memory")

    with (Path(tempfile.gettempdir()) / "biflow-large-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield enough
        if DEVICE == "cuda":
            torch.cuda.empty_cache()  # for the next process


def draw(*shape, seed, dtype=BF16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def long(tail, *front):
    """tail (n, C) as the last rows of zeros (*front, C)."""
    whole = torch.zeros(*front, tail.shape[-1], dtype=tail.dtype, device=DEVICE)
    whole.view(-1, tail.shape[-1])[-len(tail) :] = tail
    return whole


def same_rows(whole, alone):
    """The last rows of `whole` are those of `alone`; but the first, whose params may act on the token before it."""
    rows, same = (t.view(-1, t.shape[-1])[1 - ROWS :] for t in (whole, alone))
    assert torch.equal(rows, same)
    assert rows.any()


def close_sums(whole, alone, terms):
    """Sums of `terms` numbers in another order, and of zeros."""
    bound = torch.finfo(torch.float32).eps * math.sqrt(terms) * max(1, alone.abs().max().item())
    assert (whole.float() - alone.float()).abs().max() <= bound


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["one sample", "many samples"])
@on_gpu
def test_affine(room, kind, flip):
    room(40)
    D, T = 64, ELEMENTS // 64 + ROWS if kind == "one sample" else 512
    B = 1 if kind == "one sample" else ELEMENTS // (T * D) + 1
    assert B * T * D > ELEMENTS
    x, grad = draw(ROWS, D, seed=0), draw(ROWS, D, seed=1)
    params = draw(ROWS, 2 * D, seed=2)
    params[0] = 0  # what the token before these rows gets where they are flipped
    results = []
    for front in ((B, T), (1, ROWS)):
        leaves = [long(x, *front).requires_grad_(), long(params, *front).requires_grad_()]
        z, logdet = ops.affine_encode(*leaves, flip=flip)
        weight = torch.zeros_like(logdet)
        weight[-1] = 0.5
        grads = torch.autograd.grad((z, logdet), leaves, (long(grad, *front), weight))
        with torch.no_grad():
            back = ops.affine_decode(z, leaves[1], flip=flip)
        results.append([t.detach() for t in (z, *grads, back, logdet[-1:])])
        del z, logdet, grads, back, leaves
    for whole, alone in zip(*(r[:-1] for r in results), strict=True):
        same_rows(whole, alone)
    close_sums(results[0][-1], results[1][-1], ROWS * D)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@on_gpu
def test_norm(room, kind):
    room(40)
    C = 1024
    x, h, grad = (draw(ROWS, C, seed=i) for i in range(3))
    weight, bias = (draw(C, seed=i, dtype=torch.float32) for i in (3, 4))
    results = []
    for rows in (ELEMENTS // C + ROWS, ROWS):
        leaves = [long(x, rows).requires_grad_(), long(h, rows).requires_grad_(), weight.clone().requires_grad_()]
        y, total = ops.add_norm(*leaves, bias, kind=kind, eps=1e-5)
        grads = torch.autograd.grad(y, leaves, long(grad, rows))
        with torch.no_grad():
            alone = ops.norm(leaves[0], weight, bias, kind=kind, eps=1e-5)
        results.append([t.detach() for t in (y, total, *grads[:2], alone, grads[2])])
        del y, total, grads, alone, leaves
    for whole, alone in zip(*(r[:-1] for r in results), strict=True):
        same_rows(whole, alone)
    close_sums(results[0][-1], results[1][-1], ROWS)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@on_gpu
def test_gate(room, kind):
    room(24)
    m, grad = draw(ROWS, 2048, seed=0), draw(ROWS, 2048 if kind == "gelu" else 1024, seed=1)
    results = []
    for rows in (ELEMENTS // 2048 + ROWS, ROWS):
        leaf = long(m, rows).requires_grad_()
        y = ops.gate(leaf, kind)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, long(grad, rows))))
        del y, leaf
    for whole, alone in zip(*results, strict=True):
        same_rows(whole, alone)


@pytest.mark.parametrize("causal", [False, True])
@on_gpu
def test_attention_qkv(room, causal):
    room(12)
    T, H, d = 64, 16, 64
    tail = draw(T, 3 * H * d, seed=0)
    weight = torch.ones(d, device=tail.device)  # without norms it is torch's attention
    results = []
    for B in (ELEMENTS // tail.numel() + 1, 1):
        with torch.no_grad():
            qkv = long(tail, B, T)
            results.append(ops.attention_qkv(qkv, heads=H, causal=causal, q_norm=weight, k_norm=weight)[-1])
    assert torch.equal(*results)
    assert results[0].any()


@pytest.mark.parametrize("far", ["samples", "heads", "tokens"])
def test_attention_of_keys_far_apart(backend, far):
    """Without a GPU too: of the memory between, 4 GB, nobody touches anything."""
    if backend.name == "race":
        pytest.skip("a cell of the checker for every byte")
    B, H, T, d = 2, 3, 20, 32
    small = torch.randn(3, B, H, T, d, generator=torch.Generator().manual_seed(0)).half()
    size = {"samples": B, "heads": H, "tokens": T}[far]
    step = (2**31 // (size - 1) + 8) // 8 * 8  # elements, of 16-byte pieces
    inner = {"samples": (step, T * d, d), "heads": (T * d, step, d), "tokens": (H * d, d, step)}[far]
    memory = torch.empty(2**31 + 2**20, dtype=torch.float16, device=backend.device)
    want = []
    for i in range(3):
        given = [backend.to(t) for t in small]
        view = memory.as_strided((B, H, T, d), (*inner, 1)).copy_(given[i])
        assert memory.numel() > sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)) > 2**31
        given[i] = view
        out = backend.ops.attention_forward(*given, True, d**-0.5, None, None, None, 0.0, None, None, 0, [])
        want.append(out.transpose(1, 2).cpu())
    exact = reference.attention(*small.double(), causal=True)
    same = reference.attention(*small, causal=True)
    for got in want:
        assert torch.equal(got, want[0])
        error, allowed = (((t.double() - exact).abs() / (1 + exact.abs())).max() for t in (got, same))
        assert error <= 2 * allowed + torch.finfo(torch.float16).eps
