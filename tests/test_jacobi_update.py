"""jacobi_update_: one fixed-point step on a window, against its reference in fp64 and against its formulas."""

import math

import pytest
import torch
from jacobi_cases import OPTIONS, assert_parity, make, stepped

from biflow import ops

NAN, INF = float("nan"), float("inf")
# (B, T, D): one token, one channel, less than a vector, a vector of AVX2 and one more, a vector, several and a rest
SHAPES = [(2, 1, 4), (3, 5, 1), (2, 6, 3), (2, 4, 9), (1, 3, 16), (2, 4, 37)]


def in_data_order(start, stop, tokens, flip):
    return slice(tokens - stop, tokens - start) if flip else slice(start, stop)


@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, isa):
    """The error is at most twice that of the fp32 reference, plus one rounding of 1 + |value|, for all options."""
    assert_parity(ops.jacobi_update_, shape)


@pytest.mark.parametrize("flip", [False, True])
def test_a_window_touches_nothing_else(flip, isa):
    x, z, raw, moved = make((3, 9, 5))
    for start, stop in [(0, 1), (0, 9), (2, 5), (8, 9)]:
        inside = torch.zeros(9, dtype=torch.bool)
        inside[in_data_order(start, stop, 9, flip)] = True
        new, far_z, far_raw, far = (t.clone() for t in (x, z, raw, moved))
        for t in (new, far_z, far_raw):
            t[:, ~inside] = NAN  # it is not read
        ops.jacobi_update_(new, far_z, far_raw, far, start=start, stop=stop, flip=flip)
        assert new[:, ~inside].isnan().all()
        a, b = raw.chunk(2, -1)
        want = z * a.exp() + b
        torch.testing.assert_close(new[:, inside], want[:, inside])
        update = ((want - x).abs() / want.abs().clamp(min=1))[:, inside].amax((1, 2))
        residual = (((x - b) / a.exp() - z).abs() / z.abs().clamp(min=1))[:, inside].amax((1, 2))
        torch.testing.assert_close(far, torch.stack([update, residual]))


def test_moved_is_relative_where_values_are_large(isa):
    """x_new = 200, x = 100, z = 50: half of what it is now; G(x) = 100 / 4 is half of z away from z."""
    x, z = torch.full((1, 1, 1), 100.0), torch.full((1, 1, 1), 50.0)
    raw, moved = torch.tensor([[[math.log(4.0), 0.0]]]), torch.empty(2, 1)
    ops.jacobi_update_(x, z, raw, moved, start=0, stop=1)
    torch.testing.assert_close(x, torch.full((1, 1, 1), 200.0))
    torch.testing.assert_close(moved, torch.tensor([[0.5], [0.5]]))


@pytest.mark.parametrize("options", [{}, dict(scale="softplus", clip=("tanh", 0.9)), dict(shift_only=True)])
def test_a_fixed_point_stays(options, isa):
    x, z, raw, moved = make((4, 6, 13), **options)
    ops.jacobi_update_(x, z, raw, moved, start=0, stop=6, **options)
    fixed = x.clone()
    ops.jacobi_update_(x, z, raw, moved, start=0, stop=6, **options)
    assert torch.equal(x, fixed)
    assert moved[0].eq(0).all()
    assert moved[1].max() < 2e-6  # roundings of x, over the smallest sigma


@pytest.mark.parametrize("where", ["x", "z", "raw"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_is_not_finite_poisons_its_own_sample(where, poison, isa):
    """At the first and the last place of the window, and in the channels past a whole vector."""
    for place in [(1, 2, 0), (1, 4, 18), (1, 3, 16)]:
        x, z, raw, moved = make((3, 6, 19), shift_only=True)
        dict(x=x, z=z, raw=raw)[where][place] = poison
        ops.jacobi_update_(x, z, raw, moved, start=2, stop=5, shift_only=True)
        assert moved[:, 1].isnan().all()
        assert moved[:, [0, 2]].isfinite().all()
        other = [sample for sample in range(3) if sample != 1]
        assert x[other].isfinite().all()


def test_what_is_not_finite_outside_the_window_does_not_count(isa):
    x, z, raw, moved = make((2, 6, 5))
    for t in (x, z, raw):
        t[:, 0], t[:, 5] = NAN, INF
    ops.jacobi_update_(x, z, raw, moved, start=1, stop=5)
    assert moved.isfinite().all()


@pytest.mark.parametrize("a", [-200.0, 200.0])
def test_sigma_without_an_inverse_is_not_finite(a, isa):
    """exp(-200) is 0 in fp32: x_new is finite, G(x) is not; with 200 it is the other way round."""
    x, z, raw, moved = make((2, 3, 4))
    raw[0, 1, 2] = a
    ops.jacobi_update_(x, z, raw, moved, start=0, stop=3)
    assert x.isfinite().all() == (a < 0)
    assert moved[:, 0].isnan().all()
    assert moved[:, 1].isfinite().all()


def test_the_same_bits_in_any_batch_and_for_any_number_of_threads(isa, threads):
    tensors = make((70, 40, 37))
    whole = stepped(ops.jacobi_update_, tensors, start=3, stop=33)
    for n in (2, 3):
        threads(n)
        for got, want in zip(stepped(ops.jacobi_update_, tensors, start=3, stop=33), whole, strict=True):
            assert torch.equal(got, want)
    x, z, raw, moved = tensors
    part = stepped(ops.jacobi_update_, (x[9:12], z[9:12], raw[9:12], moved[:, 9:12]), start=3, stop=33)
    assert torch.equal(part[0], whole[0][9:12])
    assert torch.equal(part[1], whole[1][:, 9:12])


def test_it_is_affine_decode():
    for options in OPTIONS[:: len(OPTIONS) // 12]:
        if not options.get("shift_only"):
            x, z, raw, moved = make((2, 5, 7))
            ops.jacobi_update_(x, z, raw, moved, start=0, stop=5, **options)
            torch.testing.assert_close(x, ops.affine_decode(z, raw, causal=False, **options), atol=1e-6, rtol=1e-6)


def test_empty():
    for shape in [(0, 4, 3), (2, 4, 0)]:
        x, z, raw, moved = make(shape)
        ops.jacobi_update_(x, z, raw, moved, start=1, stop=3)
        assert torch.equal(moved, torch.zeros(2, shape[0]))  # a maximum over nothing


def op_arguments():
    x, z, raw, moved = make((2, 6, 5))
    options = dict(start=1, stop=4, shift_only=False, layout="scale_shift", scale="exp", clip="none", clip_value=0.0)
    return (x, z, raw, moved), dict(options, clip_on="both", flip=True)


def test_opcheck():
    torch.library.opcheck(torch.ops.biflow.jacobi_update_.default, *op_arguments())


def test_compile():
    x, z, raw, moved = make((2, 6, 5))

    def step(x, z, raw, moved):
        new = x * 1.0
        ops.jacobi_update_(new, z, raw, moved, start=1, stop=4)
        return new + 1.0

    want_moved = moved.clone()
    want = step(x, z, raw, want_moved)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x, z, raw, moved), want)
    assert torch.equal(moved, want_moved)


@pytest.mark.parametrize("name", ["x", "z", "raw", "moved"])
def test_no_gradient(name):
    call = dict(zip(("x", "z", "raw", "moved"), make((2, 6, 5)), strict=True))
    call[name].requires_grad_()
    with pytest.raises(RuntimeError, match="no_grad"):
        ops.jacobi_update_(**call, start=0, stop=6)
    with torch.no_grad():
        ops.jacobi_update_(**call, start=0, stop=6)


x0, raw0 = torch.zeros(2, 6, 5), torch.zeros(2, 6, 10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.zeros(6, 5)), ValueError, r"x: expected shape \(B, T, D\), got \(6, 5\)"),
        (dict(x=x0.double()), TypeError, "x: expected float32, got torch.float64"),
        (dict(x=[0.0]), TypeError, "x: expected a Tensor, got list"),
        (dict(x=x0.to("meta")), ValueError, "x: expected a CPU.* tensor, got one on meta: this build"),
        (dict(x=torch.zeros(2, 5, 6).mT), ValueError, r"x: expected a contiguous tensor, got strides \(30, 1, 6\)"),
        (dict(z=torch.zeros(2, 6, 4)), ValueError, r"z: expected shape \(2, 6, 5\), got \(2, 6, 4\)"),
        (dict(z=x0.bfloat16()), TypeError, "z: expected float32, got torch.bfloat16"),
        (dict(raw=x0), ValueError, r"raw: expected shape \(2, 6, 10\), got \(2, 6, 5\)"),
        (dict(shift_only=True), ValueError, r"raw: expected shape \(2, 6, 5\), got \(2, 6, 10\)"),
        (dict(moved=torch.zeros(2, 3)), ValueError, r"moved: expected shape \(2, 2\), got \(2, 3\)"),
        (dict(start=3, stop=3), ValueError, "start, stop: expected 0 <= start < stop <= 6, got 3 and 3"),
        (dict(stop=7), ValueError, "start, stop: expected 0 <= start < stop <= 6, got 0 and 7"),
        (dict(start=-1), ValueError, "start, stop: expected 0 <= start < stop <= 6, got -1 and 6"),
        (dict(start="0"), TypeError, "start: expected an int, got str '0'"),
        (dict(stop=6.0), TypeError, "stop: expected an int, got float 6.0"),
        (dict(shift_only=1), TypeError, "shift_only: expected a bool, got int 1"),
        (dict(layout="ab"), ValueError, "layout: expected one of"),
        (dict(scale="tanh"), ValueError, "scale: expected one of exp, softplus, sigmoid, got 'tanh'"),
        (dict(clip=("soft", 1.0)), ValueError, "clip: expected None, .* got .*soft"),
        (dict(clip=("hard", -1.0)), ValueError, "clip: expected a finite c > 0, got -1.0"),
        (dict(clip_on="shift"), ValueError, "clip_on: expected one of both, scale, got 'shift'"),
        (dict(flip=None), TypeError, "flip: expected a bool, got NoneType None"),
    ],
)
def test_bad_arguments(arguments, error, message):
    call = dict(x=x0.clone(), z=x0, raw=raw0, moved=torch.zeros(2, 2), start=0, stop=6) | arguments
    with pytest.raises(error, match=message):
        ops.jacobi_update_(**call)


def test_the_torch_op_checks_again():
    (x, z, raw, moved), options = op_arguments()
    op = torch.ops.biflow.jacobi_update_
    with pytest.raises(RuntimeError, match=r"jacobi_update: raw: expected shape \(2, 6, 10\), got \(2, 6, 5\)"):
        op(x, z, raw[..., :5].contiguous(), moved, **options)
    with pytest.raises(RuntimeError, match=r"moved: expected shape \(2, 2\), got \(4,\)"):
        op(x, z, raw, moved.flatten(), **options)
    with pytest.raises(RuntimeError, match="jacobi_update: z: expected float32, got Double"):
        op(x, z.double(), raw, moved, **options)
    with pytest.raises(RuntimeError, match=r"z: expected a contiguous tensor, got strides \(30, 1, 6\)"):
        op(x, z.mT.contiguous().mT, raw, moved, **options)
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # such a call goes to the other device's kernel otherwise
    with pytest.raises(RuntimeError, match="z: expected a tensor on the device of the first, got one on"):
        op.default.redispatch(cpu, x, z.to("meta"), raw, moved, **options)
    with pytest.raises(RuntimeError, match="expected 0 <= start < stop <= 6, got 4 and 4"):
        op(x, z, raw, moved, **{**options, "start": 4})
    with pytest.raises(RuntimeError, match="unknown clip soft"):
        op(x, z, raw, moved, **{**options, "clip": "soft"})
    with pytest.raises(RuntimeError, match="x and moved must not overlap z or raw"):
        op(x, x, raw, moved, **options)
    with pytest.raises(RuntimeError, match="x and moved must not overlap"):
        op(x, z, raw, x.flatten()[:4].view(2, 2), **options)
