"""The CUDA kernel of jacobi_update_: the cases of tests/test_jacobi_update.py, and how the work is divided."""

import itertools
import math

import pytest
import torch
from jacobi_cases import OPTIONS, assert_parity, make, stepped

from biflow import ops, reference

from .backends import get

NAN, INF = float("nan"), float("inf")
# Vectors are of 1, 2 or 4 elements, the lanes of a sample 1 to 256 threads; a long window of few samples has chunks
SHAPES = [
    (2, 1, 4),
    (700, 2, 1),  # one or two lanes for each sample, several blocks
    (37, 6, 3),
    (9, 4, 14),
    (5, 20, 12),
    (3, 60, 16),
    (2, 40, 37),
    (1, 3, 1028),
]
LONG = [(1, 300, 16), (2, 900, 12), (3, 300, 35), (1, 2, 9002)]  # more than 4096 elements


def run(backend, tensors, **options):
    """(x after the step, moved), on the CPU"""
    with backend.public():
        return [t.cpu() for t in stepped(ops.jacobi_update_, [backend.to(t) for t in tensors], **options)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(backend, shape):
    """A seventh of the options with each shape: all of them with all together."""
    with backend.public():
        assert_parity(ops.jacobi_update_, shape, every=7, device=backend.device)


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_parity_where_samples_have_chunks(backend, shape):
    for options in ({}, dict(layout="interleaved", flip=True), dict(shift_only=True), dict(scale="softplus")):
        tensors = make(shape, **options)
        for start, stop in ((0, shape[1]), (shape[1] // 3, shape[1])):
            got = run(backend, tensors, start=start, stop=stop, **options)
            want = stepped(reference.jacobi_update_, tensors, start=start, stop=stop, **options)
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("at", [0, 4095, 4800, 14399])
def test_what_is_largest_may_be_anywhere(backend, at):
    """In the first and the last of a sample's chunks and at the edge between two; the other sample does not see it."""
    shape = (2, 900, 16)
    x, z, raw, moved = (torch.zeros_like(t) for t in make(shape))
    x[1].view(-1)[at], z[1].view(-1)[14399 - at] = 100.0, 0.5  # moves by 100, and by 0.5 where it is not 100
    moved = run(backend, (x, z, raw, moved), start=0, stop=900)[1]
    assert moved.tolist() == [[0.0, 100.0], [0.0, 100.0]]


@pytest.mark.parametrize("flip", [False, True])
def test_a_window_touches_nothing_else(backend, flip):
    x, z, raw, moved = make((3, 9, 5))
    for start, stop in [(0, 1), (0, 9), (2, 5), (8, 9)]:
        inside = torch.zeros(9, dtype=torch.bool)
        inside[9 - stop : 9 - start] = True
        inside = inside if flip else inside.flip(0)
        tensors = [t.clone() for t in (x, z, raw)]
        for t in tensors:
            t[:, ~inside] = NAN  # it is not read
        new, far = run(backend, (*tensors, moved), start=start, stop=stop, flip=flip)
        want, want_far = stepped(reference.jacobi_update_, (x, z, raw, moved), start=start, stop=stop, flip=flip)
        assert new[:, ~inside].isnan().all()
        torch.testing.assert_close(new[:, inside], want[:, inside])
        torch.testing.assert_close(far, want_far)


def test_moved_is_relative_where_values_are_large(backend):
    """x_new = 200, x = 100, z = 50: half of what it is now; G(x) = 100 / 4 is half of z away from z."""
    x, z, raw = torch.full((1, 1, 1), 100.0), torch.full((1, 1, 1), 50.0), torch.tensor([[[math.log(4.0), 0.0]]])
    new, moved = run(backend, (x, z, raw, torch.empty(2, 1)), start=0, stop=1)
    torch.testing.assert_close(new, torch.full((1, 1, 1), 200.0))
    torch.testing.assert_close(moved, torch.tensor([[0.5], [0.5]]))


@pytest.mark.parametrize("options", [{}, dict(scale="softplus", clip=("tanh", 0.9)), dict(shift_only=True)], ids=str)
def test_a_fixed_point_stays(backend, options):
    x, z, raw, moved = make((4, 6, 13), **options)
    fixed, _ = run(backend, (x, z, raw, moved), start=0, stop=6, **options)
    again, moved = run(backend, (fixed, z, raw, moved), start=0, stop=6, **options)
    assert torch.equal(again, fixed)
    assert moved[0].eq(0).all()
    assert moved[1].max() < 2e-6  # roundings of x, over the smallest sigma


@pytest.mark.parametrize("shape", [(3, 6, 19), (3, 6, 16), (3, 900, 12)], ids=str)
@pytest.mark.parametrize("poison", [NAN, -NAN, INF, -INF])
def test_what_is_not_finite_poisons_its_own_sample(backend, shape, poison):
    """In x, z or raw, at the first and the last place of the window."""
    _, T, D = shape
    for where, place in itertools.product(range(3), [(1, 2, 0), (1, T - 2, D - 1)]):
        tensors = make(shape, shift_only=True)
        tensors[where][place] = poison
        x, moved = run(backend, tensors, start=2, stop=T - 1, shift_only=True)
        assert moved[:, 1].isnan().all()
        assert moved[:, [0, 2]].isfinite().all()
        assert x[[0, 2]].isfinite().all()


def test_what_is_not_finite_outside_the_window_does_not_count(backend):
    tensors = make((2, 6, 5))
    for t in tensors[:3]:
        t[:, 0], t[:, 5] = NAN, INF
    assert run(backend, tensors, start=1, stop=5)[1].isfinite().all()


@pytest.mark.parametrize("a", [-200.0, 200.0])
def test_sigma_without_an_inverse_is_not_finite(backend, a):
    """exp(-200) is 0 in fp32: x_new is finite, G(x) is not; with 200 it is the other way round."""
    x, z, raw, moved = make((2, 3, 4))
    raw[0, 1, 2] = a
    x, moved = run(backend, (x, z, raw, moved), start=0, stop=3)
    assert x.isfinite().all() == (a < 0)
    assert moved[:, 0].isnan().all()
    assert moved[:, 1].isfinite().all()


@pytest.mark.parametrize("shape", [(5, 3, 5), (4, 20, 16), (9, 900, 12)], ids=str)
def test_batch_does_not_matter(backend, shape):
    """The same bits, though one sample alone is divided into more chunks than one of many."""
    x, z, raw, moved = make(shape)
    whole = run(backend, (x, z, raw, moved), start=1, stop=shape[1])
    for i in (0, shape[0] - 1):
        part = run(backend, (x[i : i + 1], z[i : i + 1], raw[i : i + 1], moved[:, i : i + 1]), start=1, stop=shape[1])
        assert torch.equal(part[0], whole[0][i : i + 1])
        assert torch.equal(part[1], whole[1][:, i : i + 1])


@pytest.mark.parametrize("shape", [(3, 5, 12), (2, 9, 14), (1, 600, 8)], ids=str)
def test_addresses_do_not_matter(backend, shape):
    """Contiguous tensors that begin an element or two behind an aligned address."""
    for options in ({}, dict(layout="interleaved"), dict(shift_only=True)):
        tensors = make(shape, **options)
        want = run(backend, tensors, start=0, stop=shape[1], **options)
        for by in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 2, 2)):
            moved = []
            for t, n in zip(tensors, (*by, 0), strict=True):
                room = backend.to(torch.zeros(t.numel() + n))
                room[n:] = backend.to(t).flatten()
                moved.append(room[n:].view(t.shape))
            with backend.public():
                ops.jacobi_update_(*moved, start=0, stop=shape[1], **options)
            assert torch.equal(moved[0].cpu(), want[0])
            assert torch.equal(moved[3].cpu(), want[1])


def test_many_samples(backend):
    x, z, raw, moved = make((70_000, 1, 1))
    new, moved = run(backend, (x, z, raw, moved), start=0, stop=1)
    want, far = stepped(reference.jacobi_update_, (x, z, raw, moved), start=0, stop=1)
    torch.testing.assert_close(new, want)
    torch.testing.assert_close(moved, far)


def test_empty(backend):
    for shape in [(0, 4, 3), (2, 4, 0), (300, 4, 0)]:
        moved = run(backend, make(shape), start=1, stop=3)[1]
        assert torch.equal(moved, torch.zeros(2, shape[0]))  # a maximum over nothing


def test_bad_tensors(backend):
    x, z, raw, moved = (backend.to(t) for t in make((2, 6, 5)))
    options = dict(start=0, stop=6, shift_only=False, layout="scale_shift", scale="exp", clip="none", clip_value=0.0)
    options |= dict(clip_on="both", flip=False)
    op = backend.ops.jacobi_update_
    with pytest.raises(RuntimeError, match=r"raw: expected shape \(2, 6, 10\), got \(2, 6, 5\)"):
        op(x, z, raw[..., :5].contiguous(), moved, **options)
    with pytest.raises(RuntimeError, match="z: expected float32, got Double"):
        op(x, z.double(), raw, moved, **options)
    with pytest.raises(RuntimeError, match="x: expected a contiguous"):
        op(torch.zeros_like(z).mT.contiguous().mT, z, raw, moved, **options)
    with pytest.raises(RuntimeError, match="x and moved must not overlap z or raw"):
        op(x, x, raw, moved, **options)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Replayed, it goes on from where x is; nothing is allocated."""
    backend = get("cuda")
    tensors = [backend.to(t) for t in make((2, 900, 12))]
    want = [t.clone() for t in tensors]
    for _ in range(3):
        reference.jacobi_update_(*want, start=0, stop=900)
    x = tensors[0].clone()
    ops.jacobi_update_(*tensors, start=0, stop=900)
    tensors[0].copy_(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()  # here: to begin a graph takes some
        ops.jacobi_update_(*tensors, start=0, stop=900)
        after = torch.cuda.memory_allocated()
    assert after == before
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(tensors[0], want[0])
    torch.testing.assert_close(tensors[3], want[3], rtol=1e-4, atol=1e-5)


def test_every_option_is_tried():
    """The sevenths of `test_parity` cover the options: what is left out with one shape comes with another."""
    taken = {n for shape in SHAPES for n in range(shape[2] % 7, len(OPTIONS), 7)}
    assert taken == set(range(len(OPTIONS)))
