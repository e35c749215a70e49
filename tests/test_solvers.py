"""Exact decoding of real flows: all solvers agree, the certificate tells good from bad, bad options are named."""

import copy
import math
import re

import pytest
import torch
from tiny import BATCH, VARIANTS, make_condition, make_flow, noise
from torch.utils._python_dispatch import TorchDispatchMode

from biflow import ops, solvers
from biflow.solvers import Condition, Guidance, Measurement, Method
from biflow.solvers.fixed_point import MAX_DRAFTS, MAX_PASSES, fixed_point

LONG = {"img_size": 10, "num_blocks": 2}  # 25 tokens


class Altered:
    """A block whose sequential decode is changed by `change`, whose iterate reports by `report`."""

    def __init__(self, block, change=lambda x: x, report=lambda measured: measured):
        self.block, self.change, self.report = block, change, report

    def __getattr__(self, name):
        return getattr(self.block, name)

    def decode_sequential(self, z, condition):
        return self.change(self.block.decode_sequential(z, condition))

    def iterate(self, z, condition):
        iterate = self.block.iterate(z, condition)
        update = iterate.update
        iterate.update = lambda *window, **options: self.report(update(*window, **options))
        return iterate


def decode(blocks, z, condition, method):
    return solvers.decode(blocks, z, condition, [method] * len(blocks), 1e-5, certify=True)


# --- agreement

METHODS = [Method("jacobi"), Method("windowed", 1), Method("windowed", 3), Method("windowed", 16)]


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("name", VARIANTS)
def test_all_solvers_agree(name, precision, apart):
    """In bf16 to the tolerance of that, in each of two blocks. The certificate, of exact passes, shows its rounding."""
    flow = make_flow(std=0.08, **{**VARIANTS[name], **LONG, "layers_per_block": 1})
    z, (y, context) = noise(flow), make_condition(flow, BATCH)
    plain = Guidance(0.0), Guidance(1.5, attn_temp=0.7), Guidance(1.0, "a", anneal=False), Guidance(1.0, "b")
    for guidance in plain:
        condition = Condition(y, context, guidance, precision)
        want, info = decode(flow.blocks, z, condition, Method("sequential"))
        assert info.fallbacks == ((), ())
        allowed = info.residual.max() + 2 * solvers.effective_tol(1e-5, precision)
        for method in METHODS:
            x, info = decode(flow.blocks, z, condition, method)
            assert info.fallbacks == ((), ()), (method, guidance)
            assert info.residual.max() <= allowed, (method, guidance)
            torch.testing.assert_close(x, want, rtol=apart, atol=apart)


@pytest.mark.parametrize("start_token", [False, True])
def test_decode_runs_the_solver_asked_for(start_token):
    flow = make_flow(start_token=start_token, num_classes=3, **LONG)
    z, y = noise(flow), torch.tensor([0, 1, 2, -1])
    want = flow.decode(z, y, guidance=1.0, solver="sequential")
    for options, solver, window in (
        ({"solver": "sequential"}, "sequential", None),
        ({"solver": "jacobi"}, "jacobi", None),
        ({"solver": "windowed"}, "windowed", 16),
        ({"solver": "windowed", "window": 5}, "windowed", 5),
        ({"solver": "windowed", "window": 24}, "windowed", 24),
        ({"solver": "windowed", "window": 25}, "jacobi", None),
        ({"solver": "windowed", "window": 1000}, "jacobi", None),
    ):
        x, info = flow.decode(z, y, guidance=1.0, return_info=True, **options)
        assert torch.equal(x, flow.decode(z, y, guidance=1.0, **options)), "the same input, the same bits"
        assert (info.solver, info.window) == ((solver,) * 2, (window,) * 2)
        assert (x - want).abs().max() <= 1e-4
        if solver == "sequential":
            assert info.passes == (25 - (not start_token),) * 2
        elif window is None:
            assert max(info.passes) < 20, "it converges"
        else:
            assert min(info.passes) >= 2 * math.ceil(25 / window), "two passes a window at least"


def test_a_window_without_coupling_to_the_rest_is_that_of_jacobi():
    """One window of T tokens is Jacobi, bit for bit."""
    flow = make_flow(**LONG)
    z = noise(flow)
    a, b = (decode(flow.blocks, z, Condition(), m)[0] for m in (Method("jacobi"), Method("windowed", 25)))
    assert torch.equal(a, b)


def test_tol_decides_when_to_stop():
    flow = make_flow(std=0.1, **LONG)
    z = noise(flow)
    loose, tight = (flow.decode(z, solver="jacobi", tol=tol, return_info=True)[1] for tol in (1e-1, 1e-5))
    assert all(a < b for a, b in zip(loose.passes, tight.passes, strict=True))
    assert tight.residual.max() <= 2e-5 < loose.residual.max()
    assert torch.equal(flow.decode(z, tol=1e-1), flow.decode(z, tol=1e-5)), "the sequential solver ignores it"


def test_a_tolerance_below_rounding_ends_in_sequential_decoding():
    flow = make_flow(std=0.1, **LONG)
    z = noise(flow)
    x, info = flow.decode(z, solver="jacobi", tol=1e-30, return_info=True)
    assert info.fallbacks == (tuple(range(BATCH)),) * 2
    assert torch.equal(x, flow.decode(z, solver="sequential"))


def test_tolerances_that_bf16_cannot_meet_are_raised():
    assert solvers.effective_tol(1e-5, "fp32") == 1e-5
    assert solvers.effective_tol(1e-5, "bf16") == 1e-2
    assert solvers.effective_tol(0.1, "bf16") == 0.1


def test_an_empty_batch():
    flow = make_flow(num_classes=3)
    for solver in solvers.SOLVERS:
        x, info = flow.decode(torch.zeros(0, 4, 4), torch.zeros(0).long(), solver=solver, return_info=True)
        assert x.shape == (0, 1, 4, 4)
        assert info.residual.shape == (0,)


# --- what the iteration cannot do


def strong_flow(scale=1.0, **options):
    """Clipped parameters stay bounded however strongly the tokens hang together: nothing overflows."""
    flow = make_flow(std=0.2, clip=("tanh", 1.0), **{"img_size": 16, "num_blocks": 2, **options})
    with torch.no_grad():
        for block in flow.blocks:
            block.proj_out.weight.mul_(10 * scale)
            if block.class_embed is not None:
                block.class_embed.mul_(0.1)  # that the other tokens count
    return flow


@pytest.mark.parametrize("options", [{"solver": "jacobi"}, {"solver": "windowed", "window": 32}])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_coupling_too_strong_to_iterate_still_decodes_right(options, guidance, isa):
    """With drafts, which settle some tokens before the passes that are counted, some samples of block 0 converge."""
    flow = strong_flow(3.0, num_classes=3)
    z, y = noise(flow), torch.tensor([0, 1, 2, -1])
    want, exact = flow.decode(z, y, guidance=guidance, solver="sequential", return_info=True)
    x, info = flow.decode(z, y, guidance=guidance, return_info=True, **options)
    drafts, windows, everyone = ops.has_fast_bf16(), 64 // options.get("window", 64), tuple(range(BATCH))
    failed = list(info.fallbacks[0])
    assert info.fallbacks[1] == everyone, "reported"
    assert failed if drafts else info.fallbacks[0] == everyone
    assert max(info.passes) <= windows * (drafts * MAX_DRAFTS + MAX_PASSES) + 63, "bounded"
    assert torch.equal(x[failed], want[failed])
    assert torch.equal(info.residual[failed], exact.residual[failed])
    largest = want.flatten(1).abs().amax(1).clamp_min(1)  # 39 in one of the samples
    assert (info.residual <= 1e-5 * largest).all()
    assert (x - want).abs().max() <= 1e-3


def test_coupling_is_what_makes_it_fall_back(isa):
    """The same flow, weaker and weaker: at some point the iteration takes over, and is right on both sides."""
    kinds, y = set(), torch.tensor([0, 1, 2, -1])
    for scale in (3.0, 0.3, 0.1, 0.03, 0.01):
        flow = strong_flow(scale, num_classes=3)
        x, info = flow.decode(noise(flow), y, solver="jacobi", return_info=True)
        assert (x - flow.decode(noise(flow), y, solver="sequential")).abs().max() <= 1e-3
        assert (info.residual <= 1e-4).all()
        kinds |= {len(f) for f in info.fallbacks}
    assert {0, BATCH} <= kinds


def test_a_decode_that_overflows_is_that_of_the_sequential_solver():
    flow = make_flow(std=0.1, **LONG)
    with torch.no_grad():
        flow.blocks[1].proj_out.bias[:4] = 80.0
    z = 1e5 * noise(flow)
    want = flow.decode(z, solver="sequential")
    assert not want.isfinite().all()
    for options in ({"solver": "jacobi"}, {"solver": "windowed", "window": 8}):
        x, info = flow.decode(z, return_info=True, **options)
        torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)
        assert info.fallbacks[1] == (0, 1, 2, 3)
        assert not (info.residual <= 1e-5).any()


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("name", ["context-and-class-tokens", "classes"])
def test_a_fallback_takes_its_own_condition(name, guidance):
    """Samples 1 and 2 of 4 are declared lost: they get their rows of labels and context, the others keep their bits."""
    flow = make_flow(**{**VARIANTS[name], **LONG})
    z, (y, context) = noise(flow), make_condition(flow, BATCH)
    condition = Condition(y, context, Guidance(guidance))
    lost = torch.tensor([0.0, torch.nan, torch.nan, 0.0])
    for block in flow.blocks:
        altered = Altered(block, report=lambda measured: measured + lost)
        kept, converged, _ = fixed_point(altered, z, condition, 25, 1e-5)
        assert converged.tolist() == [True, False, False, True]
        x, passes, fallbacks = solvers.solve(altered, z, condition, Method("jacobi"), 1e-5)
        assert fallbacks == (1, 2)
        assert passes > block.sequential_passes
        assert torch.equal(x[[0, 3]], kept[[0, 3]])
        assert torch.equal(x[[1, 2]], block.decode_sequential(z, condition)[[1, 2]])
        assert not torch.equal(x[[1, 2]], kept[[1, 2]])


# --- the iterate of a block


@pytest.mark.parametrize("name", ["classes", "start-token", "modern", "shift-only", "context", "softplus"])
def test_a_pass_is_jacobi_on_its_window_only(name):
    flow = make_flow(**{**VARIANTS[name], **LONG, "layers_per_block": 2})
    y, context = make_condition(flow, BATCH)
    condition, z = Condition(y, context, Guidance(1.0)), noise(flow)
    for block in flow.blocks:
        order = slice(None) if not block.config.flip else torch.arange(24, -1, -1)
        iterate = block.iterate(z, condition)
        assert torch.equal(iterate.x, z), "it starts at z"
        first = iterate.update(0, 25)
        full = iterate.x.clone()
        torch.testing.assert_close(
            first[1], ((block_encode(block, z, condition) - z).abs() / z.abs().clamp_min(1)).amax((1, 2))
        )
        torch.testing.assert_close(first[0], ((full - z).abs() / full.abs().clamp_min(1)).amax((1, 2)))
        other = block.iterate(z, condition)
        for _ in range(6):  # the window before, until it is exact
            part = other.update(0, 5)
        assert part.shape == (2, BATCH)
        assert part.dtype == torch.float32
        assert part[0].max() == 0
        fresh = block.iterate(z, condition)
        fresh.x.copy_(other.x)
        other.update(5, 12)
        fresh.update(0, 25)
        torch.testing.assert_close(other.x[:, order][:, :12], fresh.x[:, order][:, :12])
        assert torch.equal(other.x[:, order][:, 12:], z[:, order][:, 12:])


def block_encode(block, x, condition):
    """G(x), data order."""
    x = x.flip(1) if block.config.flip else x
    z, _ = block.affine(x, block.guided_params(x, condition, block.project_context(condition.context, len(x))))
    return z.flip(1) if block.config.flip else z


def test_z_is_not_changed_by_an_iteration():
    flow = make_flow(**LONG)
    z = noise(flow)
    before = z.clone()
    flow.decode(z, solver="jacobi")
    assert torch.equal(z, before)


def test_samples_do_not_meet():
    """A sample that overflows leaves the others where they are."""
    flow = make_flow(std=0.1, **LONG)
    z = noise(flow)
    bad = z.clone()
    bad[2] = torch.inf
    for block in flow.blocks:
        good = solvers.solve(block, z, Condition(), Method("jacobi"), 1e-5)[0]
        x, _, fallbacks = solvers.solve(block, bad, Condition(), Method("jacobi"), 1e-5)
        assert fallbacks == (2,)
        torch.testing.assert_close(x[[0, 1, 3]], good[[0, 1, 3]])


# --- the certificate


@pytest.mark.parametrize("solver", ["sequential", "jacobi"])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_the_certificate_sees_a_wrong_token_in_any_block(where, guidance, solver):
    flow = make_flow(std=0.1, num_classes=3)
    y, _ = make_condition(flow, 3)
    z = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = Condition(y, None, Guidance(guidance))
    exact, info = decode(flow.blocks, z, condition, Method(solver))
    assert info.residual.dtype == torch.float32
    assert info.residual.max() <= 1e-5

    def spoil(x):
        x[-1, 2, 3] += 0.1
        return x

    lost = torch.tensor([0.0, 0.0, torch.nan])  # a sample that falls back is spoilt there
    blocks = list(flow.blocks)
    blocks[where] = Altered(blocks[where], spoil, lambda measured: measured + lost)
    x, info = decode(blocks, z, condition, Method(solver))
    assert info.residual[2] > 0.02, "the spoilt sample passed"
    assert info.residual[[0, 1]].max() <= 1e-5, "a sound sample was blamed"
    assert (x[[0, 1]] - exact[[0, 1]]).abs().max() <= (0 if solver == "sequential" else 1e-4)


def test_the_certificate_knows_the_guidance():
    """An exact decode of other guidance is not exact for this one."""
    flow = make_flow(std=0.1, num_classes=3)
    y, z = torch.tensor([0, 1]), torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    block = flow.blocks[1]
    options = [Guidance(0.0), Guidance(1.0), Guidance(1.0, anneal=False), Guidance(1.0, guide="a"),
               Guidance(1.0, attn_temp=0.3)]  # fmt: skip
    for made in options:
        x = block.decode_sequential(z, Condition(y, None, made))
        for asked in options:
            residual = block.residual(x, z, Condition(y, None, asked)).max()
            assert (residual <= 1e-5) == (made == asked), (made, asked, residual)


def test_a_decode_that_overflows_is_not_certified():
    flow = make_flow(std=0.1)
    with torch.no_grad():
        flow.blocks[1].proj_out.bias[:4] = 100.0  # x grows by exp(100) a block
    z = torch.ones(1, 4, 4)
    _, info = flow.decode(z, return_info=True)
    assert not info.residual.max() <= 1e-5


class NoLook(TorchDispatchMode):
    """Refuses what makes a host wait for a GPU: a tensor's value in Python, shapes that depend on values."""

    LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op._schema.name.removeprefix("aten::") not in self.LOOKS, f"the host looks at a value: {op}"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["tarflow", "classes", "context-and-class-tokens"])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_certified_sequential_decode_makes_no_host_wait(name, guidance):
    """The blocks are queued one after the other, their residuals with them."""
    flow = make_flow(**VARIANTS[name])
    condition = Condition(*make_condition(flow, BATCH), Guidance(guidance))
    z, plan = noise(flow), [Method("sequential")] * len(flow.blocks)
    solvers.decode(flow.blocks, z, condition, plan, 1e-5, certify=True)  # packs
    with torch.no_grad(), NoLook():
        _, info = solvers.decode(flow.blocks, z, condition, plan, 1e-5, certify=True)
    assert 0 < info.residual.max() < 1e-4
    with pytest.raises(AssertionError, match="the host looks at a value"), NoLook():
        info.residual.max().item()


def test_info_counts_passes_per_block():
    _, info = make_flow().decode(torch.zeros(1, 4, 4), return_info=True)
    assert info.solver == ("sequential",) * 3
    assert info.window == (None,) * 3
    assert info.fallbacks == ((),) * 3
    assert info.passes == (3, 3, 3), "the first of 4 tokens is given"
    _, info = make_flow(start_token=True).decode(torch.zeros(1, 4, 4), solver="sequential", return_info=True)
    assert info.passes == (4, 4, 4)
    coupled, free = make_flow(num_blocks=2, **{k: v for k, v in LONG.items() if k != "num_blocks"}), make_flow(**LONG)
    with torch.no_grad():
        for p in free.blocks[1].proj_out.parameters():
            p.zero_()  # the identity: z is right from the beginning
    assert coupled.decode(noise(coupled), solver="jacobi", return_info=True)[1].passes[1] > 3
    passes = free.decode(noise(free), solver="jacobi", return_info=True)[1].passes
    assert passes[1] == 1 + ops.has_fast_bf16(), "in encode order; a draft counts"


# --- auto


def test_auto_without_a_policy_is_sequential():
    flow, z = make_flow(), torch.ones(2, 4, 4)
    assert torch.equal(flow.decode(z, solver="auto"), flow.decode(z, solver="sequential"))


def test_auto_follows_the_policy_by_block():
    flow = make_flow(num_classes=3, **{**LONG, "num_blocks": 3})
    blocks = (Measurement("jacobi", None, 9, 1.0), Measurement("windowed", 5, 20, 2.0), Measurement("sequential"))
    flow.policy = solvers.Policy((solvers.Entry("cpu", "any", 1, "fp32", 4, 0.0, blocks),))
    z, y = noise(flow), torch.tensor([0, 1, 2, -1])
    x, info = flow.decode(z, y, return_info=True)
    assert info.solver == ("jacobi", "windowed", "sequential")
    assert info.window == (None, 5, None)
    want, given = flow.decode(z, y, solver="sequential", return_info=True)
    assert given.solver == ("sequential",) * 3, "a solver that is asked for is used"
    assert (x - want).abs().max() <= 1e-4
    assert not torch.equal(x, want)
    tight = flow.decode(z, y, tol=1e-7, return_info=True)[1]
    assert tight.solver == ("sequential",) * 3, "what was measured at 1e-5 says nothing about 1e-7"
    assert tight.fallbacks == ((),) * 3
    assert "policy" not in " ".join(flow.state_dict())
    assert copy.deepcopy(flow).policy == flow.policy
    drawn = flow.sample(2, generator=torch.Generator().manual_seed(0), solver="windowed", window=3)
    assert drawn.shape == (2, 1, 10, 10)
    flow.policy = solvers.Policy((solvers.Entry("cpu", "any", 1, "fp32", 4, 0.0, blocks[:2]),))
    with pytest.raises(ValueError, match="policy: expected methods of 3 blocks, as the model has, got 2"):
        flow.decode(z, y)
    flow.policy = {"entries": []}
    with pytest.raises(TypeError, match=r"policy: expected a solvers\.Policy or None, got dict"):
        flow.decode(z, y)


# --- bad options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "newton"}, ValueError, "solver: expected one of sequential, jacobi, windowed, auto, got 'newton'"),
        ({"solver": None}, ValueError, "solver: expected one of sequential, jacobi, windowed, auto, got None"),
        ({"precision": "fp8"}, ValueError, "precision: expected one of fp32, bf16, got 'fp8'"),
        ({"window": 16}, ValueError, "window: expected None with solver='auto', which chooses the windows; got 16"),
        ({"window": 4, "solver": "jacobi"}, ValueError,
         "window: expected None with solver='jacobi', which uses no windows; got 4"),
        ({"window": 4, "solver": "sequential"}, ValueError, "window: expected None with solver='sequential'"),
        ({"window": 0, "solver": "windowed"}, ValueError, "window: expected at least 1 token, got 0"),
        ({"window": 2.0, "solver": "windowed"}, TypeError, "window: expected an int, got float 2.0"),
        ({"window": True, "solver": "windowed"}, TypeError, "window: expected an int, got bool True"),
        ({"tol": 0.0}, ValueError, "tol: expected a finite number > 0, got 0"),
        ({"tol": None}, TypeError, "tol: expected a number, got NoneType None"),
        ({"guidance": float("nan")}, ValueError, "guidance: expected a finite number >= 0, got nan"),
        ({"guidance": "high"}, TypeError, "guidance: expected a number, got str 'high'"),
        ({"guide": "c"}, ValueError, "guide: expected 'a', 'b' or 'ab', got 'c'"),
        ({"guide": ""}, ValueError, "guide: expected 'a', 'b' or 'ab', got ''"),
        ({"anneal": 1}, TypeError, "anneal: expected bool, got int 1"),
        ({"attn_temp": 0.0}, ValueError, "attn_temp: expected a finite number > 0, got 0"),
        ({"guidance": 1e300}, ValueError, "guidance: expected a finite number >= 0 as float32, got 1e+300"),
        ({"attn_temp": 1e300}, ValueError, "attn_temp: expected a finite number > 0 as float32, got 1e+300"),
        ({"attn_temp": 1e-300}, ValueError, "attn_temp: expected a finite number > 0 as float32, got 1e-300"),
        ({"tol": 1e300}, ValueError, "tol: expected a finite number > 0 as float32, got 1e+300"),
        ({"tol": 1e-300}, ValueError, "tol: expected a finite number > 0 as float32, got 1e-300"),
    ],
)  # fmt: skip
def test_refuses(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_flow().decode(torch.zeros(1, 4, 4), **options)


def test_guidance_itself_refuses_what_fp32_cannot_hold():
    for fields in ({"scale": 1e300}, {"attn_temp": 1e300}, {"attn_temp": 1e-300}):
        with pytest.raises(ValueError, match=r"expected a finite number .* as float32"):
            Guidance(**fields)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_refuses_noise_that_is_not_finite(solver):
    z = torch.zeros(2, 4, 4)
    z[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="z: expected finite values, got 1 NaN or infinite of 32"):
        make_flow().decode(z, solver=solver)
