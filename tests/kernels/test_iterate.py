"""The iterative solvers on a GPU: the block's pass against the reference, graphs against direct calls, streams and
threads. What does not need a GPU: tests/test_block_pass.py, tests/test_iterate.py."""

import threading

import pytest
import torch
from blocks import CASES, bf16_arithmetic, error_and_allowed, make_case, to
from tiny import BATCH, VARIANTS, make_condition, make_flow, noise

from biflow import reference
from biflow.models import iterate as module
from biflow.ops import BlockWindows, block_params, pack_block
from biflow.solvers import Condition, Guidance, fixed_point

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda", 0)
LONG = {"img_size": 10, "num_blocks": 2, "layers_per_block": 1}  # 25 tokens
SHAPES = {"odd heads": {}, "the attention kernel's": {"width": 64, "head_dim": 32}}


def there(value):
    if isinstance(value, dict):
        return {k: there(v) for k, v in value.items()}
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def rms(t):
    return t.double().square().mean().sqrt().item()


def plain(weights, config, precision="fp32"):
    """Of tensors on the GPU, whether or not `pack_block` packs there too."""
    weights = there(weights)
    return module.block_weights(weights, config, precision, None, module.plain_weights(weights, config, precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_pass_against_the_reference(name, precision):
    config, weights, x, options = make_case(name)
    raw = block_params(there(x), plain(weights, config, precision), config, **there(options)).cpu()
    exact = reference.block_params(x.double(), to(torch.float64, weights), config, **to(torch.float64, options))
    if precision == "fp32":
        same = reference.block_params(x, weights, config, **options)
        error, allowed = error_and_allowed(raw, same, exact)
        assert error <= allowed, f"error {error:.2e}, {allowed:.2e} allowed"
    else:
        with bf16_arithmetic(tiles=True):
            same = reference.block_params(x, weights, config, **options)
        assert rms(raw - exact) <= 2 * rms(same - exact)


def test_pack_block_keeps_plain_weights():
    config, weights, x, options = make_case("modern")
    packed = pack_block(there(weights), config, "bf16")
    assert packed.plain["layers.0.qkv.weight"].dtype == torch.bfloat16
    assert packed.plain["layers.0.qkv.weight"].is_cuda
    windows = BlockWindows(packed, config, len(x), **there(options))
    for start in range(0, config.tokens, 4):
        windows(there(x), start, min(start + 4, config.tokens))
    whole = block_params(there(x), packed, config, **there(options))
    assert rms(windows.raw - whole) <= 2e-2 * rms(whole)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_it_converges_to_what_the_cpu_decodes(name, shape):
    """By recorded windows and by replayed ones, in both precisions; guided too."""
    config = {**VARIANTS[name], **LONG, **SHAPES[shape]}
    flow, flow_there = make_flow(std=0.05, **config), make_flow(std=0.05, **config).to(DEVICE)
    y, context = make_condition(flow, BATCH)
    for guidance in (Guidance(), Guidance(1.5, attn_temp=0.7)):
        for window in (25, 7):
            for seed in (0, 1):
                z = noise(flow, seed=seed)
                for block, own in zip(flow.blocks, flow_there.blocks, strict=True):
                    want = block.decode_sequential(z, Condition(y, context, guidance))
                    for precision, tol, far in (("fp32", 1e-5, 1e-4), ("bf16", 1e-2, 5e-2)):
                        condition = Condition(there(y), there(context), guidance, precision)
                        x, converged, _ = fixed_point(own, there(z), condition, window, tol)
                        assert converged.all()
                        assert (x.cpu() - want).abs().max() <= far
    assert [len(b._iterates.states) for b in flow_there.blocks] == [4] * 2


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_passes_are_those_without_graphs(precision):
    """Bit for bit, also where a window is recorded."""
    flow = make_flow(num_classes=3, context_dim=5, **LONG, **SHAPES["the attention kernel's"]).to(DEVICE)
    y, context = make_condition(flow, BATCH)
    condition = Condition(there(y), there(context), Guidance(1.0, attn_temp=0.8), precision)
    for block in flow.blocks:
        z = there(noise(flow))
        iterate = block.iterate(z, condition)
        draft = plain(block.weights(), block.config, "bf16") if precision == "fp32" else None
        same = module.BlockIterate(
            plain(block.weights(), block.config, precision), draft, z, block._condition(condition, BATCH)
        )
        assert iterate.has_draft == (precision == "fp32")
        for start, stop in ((0, 25), (0, 25), (0, 5), (5, 25), (5, 25)):
            for drafts in (True, False) if iterate.has_draft else (False,):
                got, want = (i.update(start, stop, draft=drafts) for i in (iterate, same))
                assert torch.equal(got, want)
                assert torch.equal(iterate.x, same.x)


@torch.no_grad()
def test_streams_and_threads():
    """Iterations of several blocks share memory for keys and values; those at one time do not."""
    flow = make_flow(num_classes=3, std=0.05, **LONG, **SHAPES["the attention kernel's"]).to(DEVICE)
    given = [(there(noise(flow, seed=k)), Condition(there(torch.tensor([0, 1, 2, -1])))) for k in range(3)]

    def solved(k, window):
        return [fixed_point(block, given[k][0], given[k][1], window, 1e-5)[0] for block in flow.blocks]

    want = [solved(k, window) for k, window in enumerate((25, 7, 25))]
    torch.cuda.synchronize()
    wrong = []

    def work(k, window):
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            for _ in range(20):
                got = solved(k, window)
                if not all(torch.equal(a, b) for a, b in zip(got, want[k], strict=True)):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k, window)) for k, window in enumerate((25, 7, 25))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@torch.no_grad()
def test_no_memory_grows():
    flow = make_flow(num_classes=3, std=0.05, **LONG).to(DEVICE)
    condition = Condition(there(torch.tensor([0, 1, 2, -1])))

    def solve():
        for block in flow.blocks:
            fixed_point(block, there(noise(flow)), condition, 7, 1e-5)

    for _ in range(2):
        solve()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        solve()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    flow.cpu()
    assert all(b._iterates.states == [] for b in flow.blocks)
