"""Arrays of other libraries through DLPack: NumPy's on a CPU, CuPy's on a GPU (tests/kernels)."""

import re

import numpy as np
import pytest
import torch

from biflow import ops


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def test_values_are_those_of_tensors():
    x, params = arrays((2, 5, 4), (2, 5, 8))
    mask = np.array([[True, False, True, True, True], [True] * 5])
    z, logdet = ops.affine_encode(x, params, clip=("tanh", 2.0), flip=True, mask=mask)
    expected = ops.affine_encode(
        torch.tensor(x), torch.tensor(params), clip=("tanh", 2.0), flip=True, mask=torch.tensor(mask)
    )
    assert isinstance(z, np.ndarray)
    assert isinstance(logdet, np.ndarray)
    for got, want in zip((z, logdet), expected, strict=True):
        np.testing.assert_array_equal(got, want.numpy())
    back = ops.affine_decode(z, params, clip=("tanh", 2.0), flip=True, mask=mask)
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_options_and_positions():
    q, k, v = arrays((2, 3, 6, 8), (2, 3, 6, 8), (2, 3, 6, 8))
    got = ops.attention(q, k, v=v, causal=True)
    np.testing.assert_array_equal(got, ops.attention(*map(torch.tensor, (q, k, v)), causal=True).numpy())


def test_tuples_of_arrays_and_masks():
    qkv, cos, sin, weight = arrays((2, 6, 24), (5, 2), (5, 2), (4,))
    mask = np.arange(12).reshape(2, 6) % 5 != 1
    options = {"q_norm": weight, "k_norm": weight, "mask": mask, "rope": (cos, sin)}
    got = ops.attention_qkv(qkv, heads=2, prefix=1, **options)
    assert isinstance(got, np.ndarray)
    same = torch.utils._pytree.tree_map(torch.tensor, options)
    np.testing.assert_array_equal(got, ops.attention_qkv(torch.tensor(qkv), heads=2, prefix=1, **same).numpy())


def test_buffers_are_written_in_place():
    x, z, raw = arrays((2, 4, 3), (2, 4, 3), (2, 4, 6))
    moved = np.zeros((2, 2), dtype=np.float32)
    expected = [torch.tensor(a) for a in (x, z, raw, moved)]
    ops.jacobi_update_(*expected, start=0, stop=4)
    assert ops.jacobi_update_(x, z, raw, moved, start=0, stop=4) is None
    for got, want in zip((x, moved), (expected[0], expected[3]), strict=True):
        np.testing.assert_array_equal(got, want.numpy())
    assert moved.any()


def test_nothing_is_copied():
    """The op reads where the array lies, and the result lies where the op wrote."""
    x, params = arrays((2, 5, 4), (2, 5, 8))
    seen = {}
    original = torch.ops.biflow.affine_encode

    def spy(x, params, *rest):
        seen["in"] = x.data_ptr()
        z, logdet = original(x, params, *rest)
        seen["out"] = z.data_ptr()
        return z, logdet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.biflow, "affine_encode", spy)
        z, _ = ops.affine_encode(x, params)
    assert seen == {"in": x.ctypes.data, "out": z.ctypes.data}


@pytest.mark.parametrize("order", [1, -1])
def test_libraries_do_not_mix(order):
    x, params = arrays((2, 5, 4), (2, 5, 8))
    given = (x, torch.tensor(params)) if order > 0 else (torch.tensor(x), params)
    with pytest.raises(TypeError, match=re.escape("expected a Tensor, got ndarray")):
        ops.affine_encode(*given)


def test_other_types_are_refused():
    for wrong in ([1.0], None, 3):
        with pytest.raises(TypeError, match="x: expected a Tensor, got"):
            ops.affine_encode(wrong, wrong)
