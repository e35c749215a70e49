"""The iteration itself, over blocks that are a few lines of torch and whose number of passes is known."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from biflow import solvers
from biflow.solvers import Condition, Method
from biflow.solvers.fixed_point import MAX_DRAFTS, MAX_PASSES, PATIENCE, fixed_point


class Chain:
    """x_t = z_t + a x_{t-1}: token t hangs on one other; a is gains[y] of the sample. T tokens of one channel.

    After pass k the error is a^k on the tokens t >= k, and 0 before them.
    """

    def __init__(self, tokens, gains=(0.1,), look_every=1, has_draft=False):
        self.has_draft = has_draft
        self.tokens = self.sequential_passes = tokens
        self.gains, self.look_every = torch.tensor(gains), look_every
        self.windows, self.decoded, self.drafts = [], [], 0

    def gain(self, condition, batch):
        y = torch.zeros(batch, dtype=torch.int64) if condition.y is None else condition.y
        return self.gains[y][:, None]

    def decode_sequential(self, z, condition):
        a, x = self.gain(condition, len(z)), z.clone()
        for t in range(1, self.tokens):
            x[:, t] = z[:, t] + a * x[:, t - 1]
        self.decoded.append(len(z))
        return x

    def iterate(self, z, condition):
        return ChainIterate(self, z, self.gain(condition, len(z)))

    def residual(self, x, z, condition):
        return (
            (torch.cat([x[:, :1], x[:, 1:] - self.gain(condition, len(z))[..., None] * x[:, :-1]], 1) - z)
            .abs()
            .amax((1, 2))
        )


class ChainIterate:
    def __init__(self, block, z, a):
        self.has_draft = block.has_draft
        self.block, self.z, self.a, self.x, self.look_every = block, z, a, z.clone(), block.look_every

    def update(self, start, stop, *, draft=False):
        self.block.windows.append((start, stop))
        self.block.drafts += draft
        before = torch.cat([torch.zeros_like(self.x[:, :1]), self.x[:, :-1]], 1)[:, start:stop, 0]
        old, new = self.x[:, start:stop, 0].clone(), self.z[:, start:stop, 0] + self.a * before
        self.x[:, start:stop, 0] = new
        update = ((new - old).abs() / new.abs().clamp_min(1)).amax(1)
        residual = ((old - new).abs() / self.z[:, start:stop, 0].abs().clamp_min(1)).amax(1)
        measured = torch.stack([update, residual])
        return measured.masked_fill(~measured.isfinite(), torch.nan)

    def result(self):
        return self.x


def ones(batch, tokens):
    return torch.ones(batch, tokens, 1)


@pytest.mark.parametrize(("gain", "tol", "passes"), [(0.1, 1.1e-5, 5), (0.1, 1.1e-3, 3), (0.5, 1.1 * 2**-12, 12)])
def test_jacobi_needs_as_many_passes_as_the_coupling_says(gain, tol, passes):
    """The error of pass k is a^k."""
    block = Chain(100, [gain])
    x, used, fallbacks = solvers.solve(block, ones(2, 100), Condition(), Method("jacobi"), tol)
    assert (used, fallbacks, block.decoded) == (passes, (), [])
    assert block.windows == [(0, 100)] * passes
    assert (x - block.decode_sequential(ones(2, 100), Condition())).abs().max() <= tol


def test_bf16_stops_at_the_tolerance_that_it_can_meet():
    _, passes, _ = solvers.solve(Chain(100), ones(1, 100), Condition(precision="bf16"), Method("jacobi"), 1e-9)
    assert passes in (2, 3), "a^k <= 1e-2"


@pytest.mark.parametrize(("gain", "drafts"), [(0.1, (2, 3)), (0.99, (MAX_DRAFTS,))])
def test_drafts_come_first_and_end_at_their_floor(gain, drafts):
    """They shorten the passes that count, which still end at tol."""
    block = Chain(100, [gain], has_draft=True)
    _, passes, _ = solvers.solve(block, ones(1, 100), Condition(), Method("jacobi"), 1.1e-5)
    assert block.drafts in drafts
    if gain < 0.5:
        assert passes == 5, "the same error after as many passes: here a draft is as good as a pass"
        plain = Chain(100, [gain])
        solvers.solve(plain, ones(1, 100), Condition(), Method("jacobi"), 1.1e-5)
        assert len(plain.windows) == passes


def test_drafts_alone_never_count():
    """A draft that is at rest at once is followed by a pass."""
    block = Chain(100, [0.0], has_draft=True)
    _, passes, fallbacks = solvers.solve(block, ones(1, 100), Condition(), Method("jacobi"), 1e-5)
    assert (block.drafts, passes, fallbacks) == (1, 2, ())


def test_a_window_is_exact_after_as_many_passes_as_it_has_tokens():
    """Whatever the coupling. One more pass finds that out; the first window starts with its first token right."""
    block = Chain(12, [3.0])
    x, converged, passes = fixed_point(block, ones(1, 12), Condition(), 4, 1e-30)
    assert converged.all()
    assert passes == 4 + 5 + 5
    assert block.windows == [(0, 4)] * 4 + [(4, 8)] * 5 + [(8, 12)] * 5
    assert torch.equal(x, block.decode_sequential(ones(1, 12), Condition()))


def test_the_last_window_may_be_short():
    block = Chain(7, [0.1])
    x, _, fallbacks = solvers.solve(block, ones(1, 7), Condition(), Method("windowed", 3), 1e-5)
    assert sorted(set(block.windows)) == [(0, 3), (3, 6), (6, 7)]
    assert fallbacks == ()
    assert (x - block.decode_sequential(ones(1, 7), Condition())).abs().max() <= 1e-5


def test_strong_coupling_is_given_up_early():
    """With a = 1 the error does not shrink before the end: waiting for it would take T passes."""
    block = Chain(1000, [1.0])
    x, passes, fallbacks = solvers.solve(block, ones(3, 1000), Condition(), Method("jacobi"), 1e-5)
    assert fallbacks == (0, 1, 2)
    assert passes == PATIENCE + 1 + 1000
    assert torch.equal(x, torch.arange(1.0, 1001).expand(3, -1)[..., None])


def test_slow_convergence_is_cut_off():
    """a = 0.67 converges at pass 29, a = 0.75 would at pass 41."""
    for gain, good in ((0.67, True), (0.75, False)):
        _, converged, passes = fixed_point(Chain(1000, [gain]), ones(1, 1000), Condition(), 1000, 1e-5)
        assert bool(converged) == good
        assert passes <= MAX_PASSES


def test_overflow_is_given_up_at_once_and_in_every_window():
    block = Chain(12, [1e30])
    _, converged, passes = fixed_point(block, ones(1, 12), Condition(), 4, 1e-5)
    assert not converged.any()
    assert passes == 2
    x, passes, fallbacks = solvers.solve(block, ones(1, 12), Condition(), Method("windowed", 4), 1e-5)
    assert (passes, fallbacks) == (2 + 12, (0,))
    assert x[0, 2:].isinf().all()


@pytest.mark.parametrize("bad", [1.0, 1e30], ids=["diverges", "overflows"])
def test_samples_fall_back_alone(bad):
    block, y = Chain(40, [0.1, bad, 0.05]), torch.tensor([0, 1, 2, 1, 0])
    z = torch.randn(5, 40, 1, generator=torch.Generator().manual_seed(0))
    kept, converged, _ = fixed_point(block, z, Condition(y), 40, 1e-5)
    assert converged.tolist() == [True, False, True, False, True]
    x, _, fallbacks = solvers.solve(block, z, Condition(y), Method("jacobi"), 1e-5)
    assert fallbacks == (1, 3)
    assert block.decoded == [2], "only the two are decoded sequentially"
    assert torch.equal(x[converged], kept[converged])
    exact = block.decode_sequential(z, Condition(y))
    torch.testing.assert_close(x[[1, 3]], exact[[1, 3]], rtol=0, atol=0, equal_nan=True)
    assert (x - exact)[[0, 2, 4]].abs().max() <= 1e-5


def test_later_windows_go_on_without_those_given_up():
    block, y = Chain(8, [0.1, 1e30]), torch.tensor([1, 0])
    x, _, fallbacks = solvers.solve(block, ones(2, 8), Condition(y), Method("windowed", 4), 1e-5)
    assert fallbacks == (0,)
    assert block.windows[-1] == (4, 8)
    assert (x[1] - 1 / 0.9).abs().min() <= 1e-5


@pytest.mark.parametrize("window", [1, 4, 100])
def test_a_device_may_be_asked_every_few_passes_only(window):
    condition, y = Condition(torch.tensor([0, 1])), [0.1, 0.2]
    each, rare = Chain(20, y), Chain(20, y, look_every=3)
    z = torch.randn(2, 20, 1, generator=torch.Generator().manual_seed(0))
    x, converged, passes = fixed_point(rare, z, condition, window, 1e-5)
    _, _, fewest = fixed_point(each, z, condition, window, 1e-5)
    assert converged.all()
    assert fewest <= passes <= fewest + 2 * -(-20 // window)
    assert (x - each.decode_sequential(z, condition)).abs().max() <= 1e-5
    _, converged, passes = fixed_point(Chain(1000, [1.0], look_every=3), ones(1, 1000), Condition(), 1000, 1e-5)
    assert not converged.any()
    assert PATIENCE < passes <= PATIENCE + 3


@pytest.mark.parametrize(("gain", "drafts"), [(0.01, (3,)), (0.1, (3,)), (0.99, (MAX_DRAFTS,))])
def test_drafts_too_are_looked_at_every_few_passes(gain, drafts):
    block = Chain(100, [gain, gain], look_every=3, has_draft=True)
    x, _, fallbacks = solvers.solve(block, ones(2, 100), Condition(), Method("jacobi"), 1e-5)
    assert block.drafts in drafts
    assert (fallbacks == ()) == (gain < 0.5)
    assert (x - block.decode_sequential(ones(2, 100), Condition())).abs().max() <= 1e-5


@pytest.mark.parametrize("window", [1, 7, 100])
def test_the_host_waits_for_a_device_at_its_looks_only(window, monkeypatch):
    """Between them nothing asks for a value: no item, no index whose length the device would have to tell."""
    looks, waits = [], []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            indices = args[1] if op.name().startswith("aten::index") else ()
            if op.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select") or any(
                getattr(i, "dtype", None) == torch.bool for i in indices
            ):
                waits.append(op.name())
            return op(*args, **(kwargs or {}))

    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: looks.append(1) or to_list(t))
    block = Chain(20, [0.1, 0.2], look_every=3, has_draft=True)
    with Waits():
        _, converged, passes = fixed_point(block, ones(2, 20), Condition(torch.tensor([0, 1])), window, 1e-5)
    windows, counted = -(-20 // window), passes - block.drafts
    assert 0 < len(looks) <= counted / 3 + windows
    assert len(waits) <= block.drafts / 3 + windows, waits
    assert converged.all()


def test_an_empty_batch():
    for method in (Method("jacobi"), Method("windowed", 4), Method("sequential")):
        x, _, fallbacks = solvers.solve(Chain(8), ones(0, 8), Condition(torch.zeros(0).long()), method, 1e-5)
        assert (x.shape, fallbacks) == ((0, 8, 1), ())


# --- rules of the loop, on errors that are told beforehand


class Script:
    """A block of 100 tokens whose passes measure the given errors, one list a sample; [update, residual] or both."""

    tokens = sequential_passes = 100
    look_every = 1
    has_draft = False

    def __init__(self, *errors):
        self.errors, self.passes = errors, 0
        self.x = torch.zeros(len(errors), 100, 1)

    def iterate(self, z, condition):
        return self

    def update(self, start, stop, *, draft=False):
        now = [e[min(self.passes, len(e) - 1)] for e in self.errors]
        self.passes += 1
        return torch.tensor([e if isinstance(e, list) else [e, e] for e in now]).T

    def result(self):
        return self.x

    def run(self, tol=1e-5):
        _, converged, passes = fixed_point(self, self.x, Condition(), 100, tol)
        assert passes == self.passes
        return converged.tolist(), passes


NAN = float("nan")


def test_update_and_residual_must_both_be_small():
    assert Script([[1e-6, 1.0], [1.0, 1e-9], [1e-9, 1e-9]]).run() == ([True], 3)


def test_what_rests_has_converged_whatever_a_small_sigma_makes_of_the_residual():
    """(x - b) / sigma is off by eps |b| / sigma at best."""
    assert Script([[1e-2, 1.0], [2e-7, 1e-3]]).run() == ([True], 2)
    assert Script([[1e-6, 1e-3]] * 8).run() == ([False], 7), "it still moves"


def test_a_draft_that_overflows_is_forgotten():
    class Wild(Script):
        has_draft = True

        def update(self, start, stop, *, draft=False):
            if not draft:
                assert self.x.isfinite().all(), "the passes that count begin at z"
                return super().update(start, stop)
            self.x[1] = NAN
            return torch.tensor([[1e-3, NAN], [1e-3, NAN]])

    script = Wild([1e-6], [1e-6])
    _, converged, _ = fixed_point(script, script.x, Condition(), 100, 1e-5)
    assert converged.tolist() == [True, True]


@pytest.mark.parametrize("bad", [NAN, [NAN, 0.0], [0.0, NAN], float("inf")])
def test_what_is_not_finite_has_not_converged(bad):
    assert Script([bad, 0.0]).run() == ([False], 1)
    assert Script([0.1, bad, 0.0], [0.1, 0.01, 0.0]).run() == ([False, True], 3), "and does not come back"


def test_no_sample_is_done_before_all_are():
    """What counts is the last pass: a sample that had converged and left again has not."""
    assert Script([1e-6, 1e-6, 1e-6], [1.0, 0.1, 1e-6]).run() == ([True, True], 3)
    assert Script([1e-6, 1.0, 1.0, 1e-6], [1.0, 1.0, 1e-6]).run() == ([True, True], 4)


def test_one_that_flickers_around_the_tolerance_is_not_given_up():
    waiting = [0.9e-5, 1.1e-5] * 5 + [0.9e-5]
    falling = [0.3**k for k in range(11)]
    assert Script(waiting, falling).run() == ([True, True], 11)


def test_the_rate_decides_who_stays():
    """1e-5 from 1 within MAX_PASSES needs 0.7 a pass; a slow start is forgiven if the last passes are fast."""
    assert Script([0.8**k for k in range(50)]).run() == ([False], PATIENCE + 1)
    assert Script([0.67**k for k in range(50)]).run()[0] == [True]
    plateau = [1.0] * (PATIENCE - 2)
    assert Script(plateau + [0.1**k for k in range(1, 9)]).run() == ([True], PATIENCE - 2 + 5)
    assert Script([1.0]).run() == ([False], PATIENCE + 1)
    assert Script([2.0**k for k in range(50)]).run() == ([False], PATIENCE + 1)


def test_one_that_is_exact_may_wait():
    assert Script([0.0], [0.3**k for k in range(11)]).run() == ([True, True], 11)


def test_the_rate_is_that_of_the_passes_also_where_few_are_looked_at():
    for rate, good in ((0.8, False), (0.67, True)):
        script = Script([rate**k for k in range(50)])
        script.look_every = 3
        converged, passes = script.run()
        assert converged == [good]
        assert passes == (30 if good else PATIENCE + 3)


def test_those_that_never_agree_are_cut_off():
    """Two samples at the edge of the tolerance, in turn above it."""
    even, odd = [0.9e-5, 1.1e-5] * 50, [1.1e-5, 0.9e-5] * 50
    converged, passes = Script(even, odd).run()
    assert passes == MAX_PASSES
    assert converged == [False, True], "what the last pass found"


@pytest.mark.parametrize("look_every", [1, 3])
def test_what_a_fallback_costs_at_most(look_every):
    """One that always seems to converge and never does: all drafts, all passes, then the sequential decode; no more."""

    class Promising(Script):
        has_draft = True

        def update(self, start, stop, *, draft=False):
            if draft:
                return torch.full((2, len(self.errors)), 1.0)
            return super().update(start, stop)

    block = Promising([max(0.68**k, 1.01e-5) for k in range(100)])  # its rate says pass 31
    block.look_every = look_every
    block.decode_sequential = lambda z, condition: z
    _, passes, fallbacks = solvers.solve(block, block.x, Condition(), Method("jacobi"), 1e-5)
    assert fallbacks == (0,)
    assert passes == MAX_DRAFTS + MAX_PASSES + block.sequential_passes


def test_passes_are_capped():
    steep = [0.6**k for k in range(20)]  # then it stalls above the tolerance, near enough not to be given up
    condition, passes = Script([*steep, *[1.02e-5 * 0.9999**k for k in range(100)]]).run()
    assert passes <= MAX_PASSES
    assert condition == [False]
