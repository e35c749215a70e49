"""CuPy's arrays in the place of tensors, streams, and a second GPU: every op that has CUDA kernels."""

import functools

import pytest
import torch
from blocks import make_case
from torch.utils._pytree import tree_leaves, tree_map

from biflow import ops

from .backends import get

pytestmark = pytest.mark.gpu


F32, F16, BOOL = torch.float32, torch.float16, torch.bool
AFFINE, HEADS = [((3, 50, 8), F32), ((3, 50, 16), F32)], [(2, 3, 70, 64)] * 3
CONFIG, WEIGHTS, Z, _ = make_case("context", batch=3)
BLOCK = [(tuple(Z.shape), F32)]
CONTEXT = {"context": ((3, 5, CONFIG.width), F32), "null_context": ((5, CONFIG.width), F32)}
NORM = {"kind": "layernorm", "eps": 1e-6}


def block(op, z, **options):
    device = z.device if isinstance(z, torch.Tensor) else torch.device("cuda")
    return op(z, packed(device), CONFIG, guidance=1.0, **options)


@functools.cache
def packed(device):
    return ops.pack_block({name: t.to(device) for name, t in WEIGHTS.items()}, CONFIG)


CASES = {  # a function, and the tensors that are its arguments: shape and dtype of each; keywords, tuples of tensors
    "affine_encode": (
        lambda *t, **o: ops.affine_encode(*t, clip=("tanh", 2.0), **o), AFFINE, {"mask": ((3, 50), BOOL)}),
    "affine_decode": (lambda *t: ops.affine_decode(*t, flip=True), AFFINE, {}),
    "attention": (lambda *t: ops.attention(*t, causal=True), [(s, F32) for s in HEADS], {}),
    "attention, fp16": (
        lambda *t, **o: ops.attention(*t, causal=True, **o), [(s, F16) for s in HEADS], {"mask": ((2, 70), BOOL)}),
    "attention_qkv, fp16": (
        lambda t, **o: ops.attention_qkv(t, heads=2, prefix=3, **o),
        [((2, 70, 384), F16)],
        {"mask": ((2, 70), BOOL), "q_norm": ((64,), F32), "k_norm": ((64,), F32),
         "rope": (((67, 32), F32), ((67, 32), F32))},
    ),
    "norm": (lambda *t: ops.norm(*t, **NORM), [((300, 96), F32), ((96,), F32), ((96,), F32)], {}),
    "add_norm": (
        lambda *t, **o: ops.add_norm(*t, **NORM, **o), [((300, 96), F16), ((300, 96), F32)],
        {"weight": ((96,), F32), "bias": ((96,), F32)},
    ),
    "alignment_error": (
        lambda *t, **o: ops.alignment_error(*t, **NORM, **o),
        [((3, 50, 96), F32), ((3, 50, 8), F32), ((96,), F32), ((96,), F32), ((8, 96), F32), ((8,), F32)],
        {"scale": ((3, 50), F32)},
    ),
    "gate": (lambda m: ops.gate(m, "swiglu"), [((300, 192), F32)], {}),
    "block_params": (lambda *t, **o: block(ops.block_params, *t, **o), BLOCK, CONTEXT),
    "decode_block": (lambda *t, **o: block(ops.decode_block, *t, **o), BLOCK, CONTEXT),
}  # fmt: skip
LONG = 20_000_000  # cycles of a wait that a kernel on another stream would overtake


class Given:
    """Arguments of a call, positional and by name."""

    def __init__(self, args, options):
        self.args, self.options = args, options

    def map(self, convert):
        return Given(*tree_map(convert, (self.args, self.options)))

    def call(self, op):
        return results(op(*self.args, **self.options))

    def leaves(self):
        return tree_leaves((self.args, self.options))


@pytest.fixture(params=CASES)
def case(request):
    """An op, and its tensors on the GPU."""
    get("cuda")
    op, args, options = CASES[request.param]
    g = torch.Generator().manual_seed(0)

    def draw(leaf):
        values = torch.randn(leaf[0], generator=g)
        return (values > -0.5 if leaf[1] is BOOL else values.to(leaf[1])).to("cuda")

    def is_leaf(value):
        return isinstance(value, tuple) and isinstance(value[1], torch.dtype)

    return op, Given(*tree_map(draw, (args, options), is_leaf=is_leaf))


def test_every_public_op_is_here():
    takes_arrays = {name for name in ops.__all__ if hasattr(getattr(ops, name), "__wrapped__")}
    assert takes_arrays == {name.split(",")[0] for name in CASES} | {"jacobi_update_"}  # which is tested below


def results(value):
    return value if isinstance(value, tuple) else (value,)


def test_cupy_arrays(case, monkeypatch):
    """The values of tensors, as CuPy arrays; what goes in is not copied."""
    cupy = pytest.importorskip("cupy")
    op, tensors = case
    arrays = tensors.map(cupy.from_dlpack)
    seen, original = [], torch.from_dlpack

    def spy(array):
        tensor = original(array)
        seen.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch, "from_dlpack", spy)
    got = arrays.call(op)
    assert sorted(seen) == sorted(a.data.ptr for a in arrays.leaves()) == sorted(t.data_ptr() for t in tensors.leaves())
    for a, want in zip(got, tensors.call(op), strict=True):
        assert isinstance(a, cupy.ndarray)
        assert torch.equal(torch.as_tensor(a, device="cuda"), want)


def test_results_for_cupy_are_not_copied(case, monkeypatch):
    cupy = pytest.importorskip("cupy")
    op, tensors = case
    handed, original = [], cupy.from_dlpack

    def spy(tensor):
        handed.append(tensor.data_ptr())
        return original(tensor)

    arrays = tensors.map(cupy.from_dlpack)
    monkeypatch.setattr(cupy, "from_dlpack", spy)
    assert [a.data.ptr for a in arrays.call(op)] == handed


def test_buffers_of_cupy_are_written():
    cupy = pytest.importorskip("cupy")
    get("cuda")
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, generator=g).cuda() for shape in ((3, 50, 8), (3, 50, 8), (3, 50, 16), (2, 3))]
    want = [t.clone() for t in given]
    ops.jacobi_update_(*want, start=5, stop=40)
    assert ops.jacobi_update_(*map(cupy.from_dlpack, given), start=5, stop=40) is None
    assert all(torch.equal(a, b) for a, b in zip(given, want, strict=True))


def test_streams_wait_for_each_other(case):
    """Inputs that a CuPy stream still has to write; results that CuPy reads on its stream, torch on another."""
    cupy = pytest.importorskip("cupy")
    op, tensors = case
    want = [t.clone() for t in tensors.call(op)]
    late = tensors.map(torch.zeros_like)
    torch.cuda.synchronize()
    theirs, ours = cupy.cuda.Stream(non_blocking=True), torch.cuda.Stream()
    with theirs, torch.cuda.stream(ours):
        arrays = late.map(cupy.from_dlpack)
        with torch.cuda.stream(torch.cuda.ExternalStream(theirs.ptr)):
            torch.cuda._sleep(LONG)
        for array, values in zip(arrays.leaves(), tensors.leaves(), strict=True):
            array[...] = cupy.from_dlpack(values)
        got = arrays.call(op)  # must wait for theirs
        copies = [a.copy() for a in got]  # on theirs, must wait for ours
    theirs.synchronize()
    for a, values in zip(copies, want, strict=True):
        assert torch.equal(torch.as_tensor(a, device="cuda"), values)
    # the other way: ours is late, and theirs must wait for the results
    arrays = tensors.map(cupy.from_dlpack)
    torch.cuda.synchronize()
    with theirs, torch.cuda.stream(ours):
        torch.cuda._sleep(LONG)
        copies = [a.copy() for a in arrays.call(op)]
    theirs.synchronize()
    for a, values in zip(copies, want, strict=True):
        assert torch.equal(torch.as_tensor(a, device="cuda"), values)


def test_a_device_that_is_not_current(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    op, tensors = case
    want = tensors.call(op)
    with torch.cuda.device(0):
        got = tensors.map(lambda t: t.to("cuda:1")).call(op)
        assert torch.cuda.current_device() == 0
    for a, b in zip(got, want, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu())
