"""decode_block's CUDA kernels against reference.decode_block in fp64 (DESIGN 8), and phase by phase against a twin."""

from dataclasses import replace

import pytest
import torch
from blocks import BASE, CASES, bf16_arithmetic, error_and_allowed, make_case, random_weights, to

from benchmarks.gpu.small_cases import DECODES
from biflow import reference
from biflow.ops.decode_block import BlockConfig, condition, pack_block

from .backends import get
from .decode_twin import Twin

PRECISIONS = ("fp32", "bf16")
# What takes the emulator seconds runs in one order of threads there, and some of it with the race checker;
# `--every-order` runs it all.
LONG = {"context_and_class_tokens", "tiles", "crew", "wide_head", "wide_panels", "tails"}
EVERY_ORDER = {"tarflow", "guided_annealed", "start_token_flip", "modern", "context", "shift_only"}
# [persistent, row_tiles, blocks, splits, warps, norm_in_place]
PLANS = {
    "persistent": [1, 1, 3, 1, 8, 1],
    "a launch a phase": [0, 1, 2, 1, 8, 1],
    "norms of their own": [1, 1, 2, 1, 4, 0],
    "two row tiles": [0, 2, 3, 1, 2, 0],
    "four row tiles, a warp a head": [1, 4, 2, 1, 1, 0],
    "two splits": [1, 1, 2, 2, 8, 1],
    "more splits than tokens": [0, 1, 1, 5, 8, 0],
}
ONE = [0, 1, 1, 1, 8, 1]  # the least for the emulator to do


def given_of(packed, z, options):
    o = dict(y=None, context=None, null_context=None, guidance=0.0, guide="ab", anneal=True, attn_temp=1.0) | options
    return condition(packed, z.shape[0], *o.values())


class Call:
    """One packed block on a backend."""

    def __init__(self, backend, config, weights, precision, options):
        self.backend, self.config, self.weights, self.precision = backend, config, weights, precision
        self.options = {k: backend.to(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        with backend.public():
            self.packed = pack_block({k: backend.to(v) for k, v in weights.items()}, config, precision)

    def given(self, z):
        return given_of(self.packed, z, self.options)

    def buffers(self, z, plan):
        """The plan as used, words of workspace, and where the buffers are."""
        c, given = self.config, self.given(z)
        names = ("tokens", "channels", "width", "layers", "head_dim", "mlp_hidden", "start_token", "shift_only")
        found = self.backend.ops.decode_block_buffers(
            batch=z.shape[0], guided=given.passes == 2, prefix_tokens=given.prefix_tokens, precision=self.precision,
            plan=plan, **{n: getattr(c, n) for n in names},
        )  # fmt: skip
        return found[:6], found[6], found[7:16]

    def __call__(self, z, plan=(), out=None, workspace=None, phases=-1):
        z = self.backend.to(z)
        out = torch.empty_like(z) if out is None else out
        given = self.given(z)
        options = dict(self.packed.shape_options, **self.packed.affine_options, **given.options)
        self.backend.ops.decode_block_(
            z, self.packed.packed, *given.tensors, out, plan=list(plan), workspace=workspace, phases=phases, **options
        )
        return out


def make_call(backend, name, precision, batch=3):
    config, weights, z, options = make_case(name, batch=batch)
    return Call(backend, config, weights, precision, options), z


def make_small(name, batch, context_tokens=3, **fields):
    """The case with other sizes: config, z, options."""
    own, options, context = CASES[name]
    config = BlockConfig(**{**BASE, **own, **fields})
    g = torch.Generator().manual_seed(3)
    z = torch.randn(batch, config.tokens, config.channels, generator=g)
    options = dict(options)
    if options.get("y"):
        options["y"] = torch.arange(batch) % (config.num_classes + 1) - 1
    if context:
        options["context"] = torch.randn(batch, context_tokens, config.width, generator=g)
        options["null_context"] = torch.randn(context_tokens, config.width, generator=g)
    return config, z, options


def references(config, weights, z, options, precision):
    """In fp64, and in the arithmetic of the precision."""
    exact = reference.decode_block(z.double(), to(torch.float64, weights), config, **to(torch.float64, options))
    if precision == "fp32":
        return exact, reference.decode_block(z, weights, config, **options)
    with bf16_arithmetic():
        return exact, reference.decode_block(z, weights, config, **options)


def check(call, z, plan=(), weights=None):
    exact, plain = references(call.config, call.weights, z, cpu(call.options), call.precision)
    error, allowed = error_and_allowed(call(z, plan).cpu(), plain, exact)
    assert error <= allowed, f"error {error:.2e} of decode_block, {allowed:.2e} allowed"


def cpu(options):
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_parity(backend, name, precision, leave_out):
    if backend.name in ("reverse", "random") and name not in EVERY_ORDER:
        leave_out("in forward order only; EVERY_ORDER runs in all")
    if backend.name == "race" and name in LONG - {"tails", "tiles"}:
        leave_out("ten seconds and more with the race checker")
    call, z = make_call(backend, name, precision)
    check(call, z)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_plans(backend, plan, precision, leave_out):
    if backend.name == "reverse":
        leave_out("forward, random, and with the race checker")
    call, z = make_call(backend, "modern", precision, batch=5)
    check(call, z, PLANS[plan])
    if PLANS[plan][3] > 1:  # for few sequences only
        return
    config, z, options = make_small("class_tokens", 17, tokens=4)  # guided: 34 sequences, three row tiles
    call, plan = Call(backend, config, random_weights(config), precision, options), list(PLANS[plan])
    plan[2] = max(plan[2], -(-34 // (16 * plan[1])))
    check(call, z, plan)


@pytest.mark.parametrize("plan", DECODES)
def test_plans_that_the_sanitizer_gets(backend, plan):
    """A plan that is refused there would end the run."""
    if backend.name not in ("forward", "cuda"):
        pytest.skip("the kernels of test_plans")
    config, z, options = make_small("context", 19, tokens=2)
    assert Call(backend, config, random_weights(config), "bf16", options)(z, plan).isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tokens", [1, 2, 17, 49])
def test_ragged_shapes(backend, tokens, precision):
    for batch, guidance, flip in [(1, 1.0, False), (3, 0.0, True), (3, 1.0, True), (16, 0.0, True), (16, 1.0, False)]:
        config = BlockConfig(**{**BASE, "tokens": tokens, "width": 24, "head_dim": 12, "mlp_hidden": 40, "layers": 1,
                                "channels": 5, "num_classes": 2, "flip": flip})  # fmt: skip
        z = torch.randn(batch, tokens, 5, generator=torch.Generator().manual_seed(batch))
        options = dict(y=torch.arange(batch) % 2, guidance=guidance)
        call = Call(backend, config, random_weights(config), precision, options)
        rows = batch * (2 if guidance else 1)
        check(call, z, [batch == 1, 1, -(-rows // 16), 1, 8, 1] if batch != 3 else [])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_tokens(backend, precision, leave_out):
    if backend.name in ("reverse", "random"):
        leave_out("in one order, and with the race checker")
    config = BlockConfig(**{**BASE, "tokens": 256, "width": 16, "head_dim": 16, "mlp_hidden": 16, "layers": 1})
    z = torch.randn(1, 256, 4, generator=torch.Generator().manual_seed(0))
    check(Call(backend, config, random_weights(config), precision, {}), z, ONE)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_wide_rows(backend, norm, precision, leave_out):
    """More channels than a lane keeps of a row, more inputs than two of the loads that are under way together hold."""
    if backend.name not in ("forward", "cuda"):
        leave_out("in one order")
    sizes = dict(tokens=3, width=832, head_dim=208, mlp_hidden=1700, layers=1, norm=norm)
    config = BlockConfig(**{**BASE, **sizes})
    call = Call(backend, config, random_weights(config), precision, {})
    z = torch.randn(3, 3, BASE["channels"], generator=torch.Generator().manual_seed(0))
    for plan in ([1, 1, 4, 1, 8, 1], [1, 1, 3, 1, 8, 0], [1, 2, 4, 1, 8, 0], [1, 4, 4, 1, 8, 0]):
        check(call, z, plan)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_whose_padding_is_a_block_of_inputs(backend, precision):
    """A norm in place writes it, too: within shared memory, which has room for no more than the rows."""
    config = BlockConfig(**{**BASE, "tokens": 2, "width": 528, "head_dim": 176, "mlp_hidden": 8, "layers": 1})
    z = torch.randn(1, 2, BASE["channels"], generator=torch.Generator().manual_seed(0))
    check(Call(backend, config, random_weights(config), precision, {}), z, ONE)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_do_not_depend_on_rows_and_blocks(backend, precision, leave_out):
    """Nor on how it is launched, nor on the samples beside one, nor on the run."""
    if backend.name in ("reverse", "random"):
        leave_out("forward, and with the race checker")
    config, z, options = make_small("guided_annealed", 17, tokens=3)  # 34 sequences
    call = Call(backend, config, random_weights(config), precision, options)
    want = call(z, [0, 1, 3, 1, 8, 0])
    for plan in ([0, 1, 3, 1, 8, 0], [1, 1, 4, 1, 8, 0], [1, 2, 3, 1, 8, 0], [0, 4, 2, 1, 8, 0], [0, 4, 1, 1, 8, 0]):
        assert torch.equal(call(z, plan), want), plan
    part = Call(backend, call.config, call.weights, precision, {**call.options, "y": call.options["y"][4:7]})
    assert torch.equal(part(z[4:7], [0, 1, 2, 1, 8, 0]), want[4:7])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["context", "modern", "class_tokens"])
def test_one_launch_has_the_bits_of_a_launch_a_phase(backend, name, precision, leave_out):
    """With a prefix, with SwiGLU, with the splits of attention joined."""
    if backend.name in ("reverse", "random"):
        leave_out("forward, and with the race checker")
    config, z, options = make_small(name, 2, tokens=4)
    call = Call(backend, config, random_weights(config), precision, options)
    for plan in ([1, 3, 1, 8, 1], [1, 2, 3, 8, 1], [1, 2, 1, 4, 0]):
        assert torch.equal(call(z, [1, *plan]), call(z, [0, *plan])), plan


def test_in_place_and_with_a_workspace(backend):
    call, z = make_call(backend, "start_token_flip", "bf16")
    want = call(z)
    own = backend.to(z.clone())
    assert torch.equal(call(own, out=own), want)
    plan, words, _ = call.buffers(z, [])
    memory = torch.full((words + 7,), float("nan"), device=backend.device)
    assert torch.equal(call(z, plan, workspace=memory), want)
    assert memory[words:].isnan().all()


def test_not_a_number_stays_in_its_sample(backend):
    for precision in PRECISIONS:
        call, z = make_call(backend, "tarflow", precision, batch=5)
        want = call(z)
        z = z.clone()
        z[2, 4, 1] = float("nan")
        got = call(z)
        assert got[2].isnan().any()
        got[2] = want[2]
        assert torch.equal(got, want)


def test_empty(backend):
    call, z = make_call(backend, "tarflow", "fp32")
    assert call(z[:0]).shape == (0, *z.shape[1:])


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        ([0, 3, 2, 1, 8, 0], "CUDA error 1: "),  # row tiles that there are no kernels for
        ([0, 1, 2, 1, 3, 0], "CUDA error 1: "),
        ([0, 0, 2, 1, 8, 0], "CUDA error 1: "),
        ([0, 1, 2, 1, 0, 0], "CUDA error 1: "),
        ([0, 2, 2, 1, 8, 1], "CUDA error 1: "),  # norm in place of more rows than it takes
        ([0, 1, 1, 1, 8, 0], "CUDA error 1: "),  # fewer blocks than row groups
        ([0, 1, 2, 0, 8, 0], "CUDA error 1: "),
        ([1, 1, 2], "plan must be .* got 3 numbers"),
    ],
)
def test_plans_that_do_not_suit(backend, plan, error):
    call, z = make_call(backend, "tarflow", "fp32", batch=20)
    with pytest.raises(RuntimeError, match=error):
        call(z, plan)
    assert call(z).isfinite().all()  # the next launch does not report the error again


def test_more_blocks_than_are_resident_at_once(backend):
    """A launch a phase in place of one for all."""
    call, z = make_call(backend, "tarflow", "fp32", batch=20)
    blocks = 2000 if backend.name == "cuda" else 40  # the emulator has four multiprocessors
    assert torch.equal(call(z, [1, 1, blocks, 1, 8, 0]), call(z, [1, 1, 2, 1, 8, 0]))


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [False, True])
def test_a_cooperative_launch_in_a_cuda_graph(in_place):
    """As a caller records it: replayed on other noise, the bits of a call without a graph."""
    backend = get("cuda")
    call, z = make_call(backend, "modern", "bf16")
    plan, words, _ = call.buffers(z, PLANS["persistent"])
    own = backend.to(z.clone())
    memory = torch.empty(words + in_place * z.numel(), device="cuda")  # then z is copied
    out = own if in_place else torch.empty_like(own)
    call(own, plan, out, memory)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(own, plan, out, memory)
    for seed in (1, 2):
        other = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        own.copy_(other)
        graph.replay()
        assert torch.equal(out, call(other, plan))


def test_a_workspace_that_is_too_small(backend):
    call, z = make_call(backend, "tarflow", "fp32")
    _, words, _ = call.buffers(z, [])
    with pytest.raises(RuntimeError, match=f"workspace must have {words} elements, got {words - 1}"):
        call(z, workspace=torch.empty(words - 1, device=backend.device))


def test_too_little_memory_for_packed_weights_is_torchs_error(backend, monkeypatch):
    """What callers catch to make room, as `iterate.Workspace.allocate` does, and not a RuntimeError of the op's."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "new_zeros", full)
    with pytest.raises(torch.OutOfMemoryError):
        make_call(backend, "tarflow", "fp32")


# --- phase by phase ---------------------------------------------------------------------------------------------------

TWINS = {
    "guided_annealed": dict(flip=True, tokens=3),
    "context": dict(tokens=2),  # a prefix, RoPE, QK-norm, attention temperature
    "modern": dict(tokens=3, start_token=True, layout="interleaved"),
    "shift_only": dict(tokens=3, width=30, head_dim=6, mlp_hidden=37),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", TWINS)
def test_every_phase_against_the_twin(backend, name, splits, precision, leave_out):
    """Stopped after each phase: what it wrote is what the twin makes of the buffers before, the rest is as it was."""
    if backend.name == "race":
        pytest.skip("stopped after a phase, the output is not complete, which it reports")
    if backend.name not in ("forward", "cuda"):
        leave_out("a launch a phase, stopped after each, in one order")
    config, z, options = make_small(name, 2, **TWINS[name])
    if splits > 1 and config.head_dim % 8:
        pytest.skip("splits need a head_dim of whole 16 bytes")
    call = Call(backend, config, random_weights(config), precision, options)
    plan, words, offsets = call.buffers(z, [0, 1, 2, splits, 4, splits == 1])
    given = call.given(z)
    given = replace(given, tensors=tuple(None if t is None else t.cpu() for t in given.tensors))
    twin = Twin(config, call.weights, precision, z, given, plan, words, offsets)
    unwritten = torch.full((words,), -1, dtype=torch.int32).view(torch.float32)  # NaN, in bf16 too
    out = torch.full_like(z, float("nan")).double()
    before = {k: v.zero_() if k in ("x", "y", "o", "h", "partial") else v for k, v in twin.buffers(unwritten).items()}
    for count, at in enumerate(twin.places()):
        memory = backend.to(unwritten.clone())
        result = call(z, plan, backend.to(out.float()).fill_(float("nan")), memory, count + 1).cpu().double()
        after = twin.buffers(memory.cpu())
        expected = twin.expected(at, before, out)
        for buffer, value in {**after, "out": result}.items():
            if buffer not in expected:
                same = out if buffer == "out" else before[buffer]
                assert torch.equal(value.nan_to_num(7.0), same.nan_to_num(7.0)), (at, buffer, "changed")
                continue
            want = expected[buffer]
            act = precision == "bf16" and buffer in ("y", "o", "h", "cache")
            bound = 2**-7 if act else 2e-5  # one spacing of bf16; sums of fp32
            finite = want.isfinite() & value.isfinite()
            assert torch.equal(want.isfinite(), finite), (at, buffer)
            error = (value - want)[finite].abs() / want[finite].abs().clamp(min=1)
            assert error.max() <= bound, (at, buffer, error.max())
        before, out = after, result
    assert count + 1 == len(list(twin.places()))
