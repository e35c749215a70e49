"""CuPy's arrays in the place of tensors, streams, and a second GPU: every op that has CUDA kernels."""

import pytest
import torch

from biflow import ops

from .backends import get

pytestmark = pytest.mark.gpu


AFFINE, HEADS = ((3, 50, 8), (3, 50, 16)), ((2, 3, 70, 64),) * 3
CASES = {  # a function, and the shapes and dtype of its tensors
    "affine_encode": (lambda *t: ops.affine_encode(*t, clip=("tanh", 2.0)), AFFINE, torch.float32),
    "affine_decode": (lambda *t: ops.affine_decode(*t, flip=True), AFFINE, torch.float32),
    "attention": (lambda *t: ops.attention(*t, causal=True), HEADS, torch.float32),
    "attention, fp16": (lambda *t: ops.attention(*t, causal=True), HEADS, torch.float16),
    "norm": (lambda *t: ops.norm(*t, kind="layernorm", eps=1e-6), ((300, 96), (96,), (96,)), torch.float32),
    "gate": (lambda m: ops.gate(m, "swiglu"), ((300, 192),), torch.float32),
}
LONG = 20_000_000  # cycles of a wait that a kernel on another stream would overtake


@pytest.fixture(params=CASES)
def case(request):
    """An op, and its tensors on the GPU."""
    get("cuda")
    op, shapes, dtype = CASES[request.param]
    g = torch.Generator().manual_seed(0)
    return op, [torch.randn(shape, generator=g).to("cuda", dtype) for shape in shapes]


def results(value):
    return value if isinstance(value, tuple) else (value,)


def test_cupy_arrays(case, monkeypatch):
    """The values of tensors, as CuPy arrays; what goes in is not copied."""
    cupy = pytest.importorskip("cupy")
    op, tensors = case
    arrays = [cupy.from_dlpack(t) for t in tensors]
    seen, original = [], torch.from_dlpack

    def spy(array):
        tensor = original(array)
        seen.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch, "from_dlpack", spy)
    got = results(op(*arrays))
    assert seen == [a.data.ptr for a in arrays] == [t.data_ptr() for t in tensors]
    for a, want in zip(got, results(op(*tensors)), strict=True):
        assert isinstance(a, cupy.ndarray)
        assert torch.equal(torch.as_tensor(a, device="cuda"), want)


def test_results_for_cupy_are_not_copied(case, monkeypatch):
    cupy = pytest.importorskip("cupy")
    op, tensors = case
    handed, original = [], cupy.from_dlpack

    def spy(tensor):
        handed.append(tensor.data_ptr())
        return original(tensor)

    arrays = [cupy.from_dlpack(t) for t in tensors]
    monkeypatch.setattr(cupy, "from_dlpack", spy)
    assert [a.data.ptr for a in results(op(*arrays))] == handed


def test_streams_wait_for_each_other(case):
    """Inputs that a CuPy stream still has to write; results that CuPy reads on its stream, torch on another."""
    cupy = pytest.importorskip("cupy")
    op, tensors = case
    want = [t.clone() for t in results(op(*tensors))]
    late = [torch.zeros_like(t) for t in tensors]
    torch.cuda.synchronize()
    theirs, ours = cupy.cuda.Stream(non_blocking=True), torch.cuda.Stream()
    with theirs, torch.cuda.stream(ours):
        arrays = [cupy.from_dlpack(t) for t in late]
        with torch.cuda.stream(torch.cuda.ExternalStream(theirs.ptr)):
            torch.cuda._sleep(LONG)
        for array, values in zip(arrays, tensors, strict=True):
            array[...] = cupy.from_dlpack(values)
        got = op(*arrays)  # must wait for theirs
        copies = [a.copy() for a in results(got)]  # on theirs, must wait for ours
    theirs.synchronize()
    for a, values in zip(copies, want, strict=True):
        assert torch.equal(torch.as_tensor(a, device="cuda"), values)
    # the other way: ours is late, and theirs must wait for the results
    arrays = [cupy.from_dlpack(t) for t in tensors]
    torch.cuda.synchronize()
    with theirs, torch.cuda.stream(ours):
        torch.cuda._sleep(LONG)
        copies = [a.copy() for a in results(op(*arrays))]
    theirs.synchronize()
    for a, values in zip(copies, want, strict=True):
        assert torch.equal(torch.as_tensor(a, device="cuda"), values)


def test_a_device_that_is_not_current(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    op, tensors = case
    want = results(op(*tensors))
    with torch.cuda.device(0):
        got = results(op(*(t.to("cuda:1") for t in tensors)))
        assert torch.cuda.current_device() == 0
    for a, b in zip(got, want, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu())
