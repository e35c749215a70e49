"""Exact decoding of flows with learned weights, two small ones of Fashion-MNIST: what random weights cannot show.

The data is no part of the repository: `shared/data/fashion_mnist.npz` beside the checkout (x_train, y_train as in the
official set).
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import biflow
from biflow import ops, solvers
from biflow.evaluate import eager_decode
from biflow.solvers import Condition, Method
from biflow.solvers.fixed_point import MAX_DRAFTS, MAX_PASSES

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "fashion_mnist.npz"
SMALL = {"in_channels": 1, "width": 64, "head_dim": 32, "num_blocks": 4, "layers_per_block": 2, "num_classes": 10}
FLOWS = {  # config, steps: T = 49 of 16 channels as in config M; T = 16 of 4 as in S, of the other kind of layers
    "plain": ({"img_size": 28, "patch_size": 4, "noise_std": 0.1}, 100),
    "modern": (
        {
            "img_size": 8, "patch_size": 2, "noise_std": 0.1, "norm": "rmsnorm", "gate": "swiglu", "qk_norm": True,
            "rope": True, "pos_embed": False, "class_tokens": 2,
        },
        120,
    ),
}  # fmt: skip
BATCH = 32
TOL = 1e-5
WAYS = [{"solver": "jacobi"}, {"solver": "windowed", "window": 8}, {"solver": "windowed", "window": 16}]


@dataclass(frozen=True)
class Case:
    """A trained flow and what it decodes. exact: images by fp64 eager decoding, floor: the error allowed in fp32."""

    flow: biflow.TarFlow
    z: Tensor
    y: Tensor
    exact: dict[float, Tensor]
    floor: dict[float, float]


def train(config, images, labels, steps):
    """A few steps of maximum likelihood on noisy images, AdamW with a cosine; the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = biflow.TarFlow(config)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        chosen = torch.randint(len(images), (64,), generator=generator)
        noisy = images[chosen] + config.noise_std * torch.randn(64, *images.shape[1:], generator=generator)
        y = torch.where(torch.rand(64, generator=generator) < 0.1, -1, labels[chosen])
        loss = -flow.log_prob(noisy, y).mean() / images[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < 1 < losses[0], "it has learned: nats a dimension"
    return flow.eval()


@pytest.fixture(scope="module")
def fashion():
    """Images (10000,1,28,28) in [-1, 1] and labels."""
    if not DATA.is_file():
        pytest.skip(f"needs Fashion-MNIST at {DATA}")
    with np.load(DATA, allow_pickle=False) as arrays:
        images, labels = (torch.from_numpy(arrays[key][:10000]) for key in ("x_train", "y_train"))
    return (images[:, None].float() + 0.5) / 128 - 1, labels.long()


@pytest.fixture(scope="module", params=FLOWS)
def case(request, fashion):
    options, steps = FLOWS[request.param]
    images, labels = fashion
    if options["img_size"] == 8:
        images = F.avg_pool2d(images[:, :, 2:26, 2:26], 3)
    torch.set_num_threads(1)
    flow = train(biflow.TarFlowConfig(**SMALL, **options), images, labels, steps)
    c = flow.config
    z = torch.randn(BATCH, c.tokens, c.channels, generator=torch.Generator().manual_seed(1))
    y, wide = torch.arange(BATCH) % 11 - 1, copy.deepcopy(flow).double()
    exact, floor = {}, {}
    for guidance in (0.0, 1.0):
        exact[guidance] = eager_decode(wide, z.double(), y, guidance=guidance)
        plain = eager_decode(flow, z, y, guidance=guidance)
        largest = exact[guidance].abs().max().item()
        rounding = math.sqrt(c.width) * torch.finfo(torch.float32).eps * largest  # decision 0007: sums over the width
        floor[guidance] = 2 * error(plain, exact[guidance]) + rounding
    return Case(flow, z, y, exact, floor)


def error(x, exact):
    return (x - exact).abs().max().item()


def most_passes(flow, window):
    """Of one block, whose samples may all fall back: drafts, passes, and the tokens one by one."""
    windows = -(-flow.config.tokens // window)
    return windows * (ops.has_fast_bf16() * MAX_DRAFTS + MAX_PASSES) + flow.config.tokens


# --- fp32


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_sequential_is_as_exact_as_eager_decoding(case, guidance, isa):
    x, info = case.flow.decode(case.z, case.y, guidance=guidance, solver="sequential", return_info=True)
    assert error(x, case.exact[guidance]) <= case.floor[guidance]
    assert info.residual.max() <= TOL


@pytest.mark.parametrize(("guidance", "tol"), [(0.0, 1e-5), (1.0, 1e-3)])
def test_iterative_solvers_are_within_the_tolerance(case, guidance, tol, isa):
    """Each block stops where update and residual are within tol: it may add that much, and rounding comes on top.

    A loose tolerance shows in the result, or nothing was iterated.
    """
    c = case.flow.config
    for way in WAYS:
        x, info = case.flow.decode(case.z, case.y, guidance=guidance, tol=tol, return_info=True, **way)
        assert error(x, case.exact[guidance]) <= c.num_blocks * tol + case.floor[guidance], way
        assert info.residual.max() <= 2 * tol, way
        assert max(info.passes) <= most_passes(case.flow, way.get("window", c.tokens))
    if tol > TOL:
        assert error(x, case.exact[guidance]) > case.floor[guidance]


def test_most_blocks_suit_the_iteration(case):
    """Learned blocks converge well before T passes, all samples of them; the one decoded first may not."""
    _, info = case.flow.decode(case.z, case.y, solver="jacobi", return_info=True)
    assert info.fallbacks[:3] == ((), (), ())
    if case.flow.config.tokens == 49:
        assert max(info.passes[:3]) < 25


def test_noise_that_is_not_finite_is_refused(case):
    z = case.z.clone()
    z[3, 2, 1] = torch.nan
    for solver in solvers.SOLVERS:
        for precision in solvers.PRECISIONS:
            with pytest.raises(ValueError, match="z: expected finite values, got 1 NaN or infinite of"):
                case.flow.decode(z, case.y, solver=solver, precision=precision)


# --- bf16


@pytest.mark.parametrize(
    ("guidance", "way"),
    [(0.0, {"solver": "sequential"}), (0.0, WAYS[2]), (1.0, WAYS[0])],
    ids=["sequential", "windowed", "jacobi"],
)
def test_samples_in_bf16_are_as_likely_as_those_in_fp32(case, guidance, way):
    """Bits per dimension, by the fp32 model, of decodes of the same noise in both precisions.

    The means differ by less than the noise of either (two standard errors over 256 samples, 0.03 bits) and by less than
    0.002 bits, no sample by more than 0.05. They do differ, by 1e-4 to 7e-4 bits: as the mean of differences of pairs,
    1024 of them, that is up to 16 standard errors.
    """
    count, c = 256, case.flow.config
    z = torch.randn(count, c.tokens, c.channels, generator=torch.Generator().manual_seed(2))
    y = torch.arange(count) % 10
    bits = {}
    for precision, options in (("fp32", {"solver": "sequential"}), ("bf16", way)):
        x = case.flow.decode(z, y, guidance=guidance, precision=precision, **options)
        bits[precision] = case.flow.bits_per_dim(x, y).double()
    difference = bits["bf16"] - bits["fp32"]
    assert 0 < difference.abs().max() <= 0.05, "bf16 is another precision, and no sample is lost"
    assert difference.mean().abs() <= min(2 * bits["fp32"].std() / count**0.5, 0.002)


def test_bf16_is_off_by_its_rounding(case, isa):
    """By about 1e-3 (root mean square; |x| is about 1), whatever the solver; at most by a few percent."""
    for way in ({"solver": "sequential"}, *WAYS):
        x, info = case.flow.decode(case.z, case.y, precision="bf16", return_info=True, **way)
        off = x - case.exact[0.0]
        assert 1e-4 < off.square().mean().sqrt() <= 4e-3, way
        assert off.abs().max() <= 0.05, way
        assert info.residual.max() <= 0.05, way


# --- coupling that is too strong


@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]], ids=lambda way: way["solver"])
@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_a_block_that_diverges_is_decoded_sequentially(case, way, isa):
    """The parameters of the block decoded last are scaled up until no sample of it converges."""
    flow, z, y = copy.deepcopy(case.flow), case.z[:8], case.y[:8]
    method, tokens = Method(way["solver"], way.get("window")), flow.config.tokens
    everyone, weight = tuple(range(8)), flow.blocks[0].proj_out.weight
    for scale in range(1, 17):
        with torch.no_grad():
            weight.copy_(scale * case.flow.blocks[0].proj_out.weight)
        want = flow.decode(z, y, solver="sequential")
        x, info = flow.decode(z, y, return_info=True, **way)
        assert want.isfinite().all(), "the sequential decode is sound, and a fair judge"
        assert error(x, want) <= 1e-4 * want.abs().max()
        assert max(info.passes) <= most_passes(flow, way.get("window", tokens))
        if info.fallbacks[0] == everyone:
            break
    assert info.fallbacks[0] == everyone, "reported"
    assert scale > 1
    given, block = z, flow.blocks[0]
    for before in reversed(flow.blocks[1:]):
        given = before.decode_sequential(given, Condition(y))
    x, _, fallbacks = solvers.solve(block, given, Condition(y), method, TOL)
    assert fallbacks
    for i in fallbacks:
        assert torch.equal(x[i], block.decode_sequential(given, Condition(y))[i]), "to the bit"


# --- auto


def test_a_calibrated_flow_is_as_exact(case):
    """Real times choose; whatever they choose is followed, and right."""
    flow = copy.deepcopy(case.flow)
    policy = biflow.calibrate(flow, batches=(BATCH,), guidances=(0.0, 1.0), repetitions=1)
    assert len(policy.entries) == 4
    for guidance in (0.0, 1.0):
        x, info = flow.decode(case.z, case.y, guidance=guidance, return_info=True)
        chosen = policy.choose("cpu", "fp32", BATCH, guidance).blocks
        assert (info.solver, info.window) == (tuple(m.solver for m in chosen), tuple(m.window for m in chosen))
        assert error(x, case.exact[guidance]) <= len(chosen) * TOL + case.floor[guidance]
        x, info = flow.decode(case.z, case.y, guidance=guidance, precision="bf16", return_info=True)
        assert info.solver == tuple(m.solver for m in policy.choose("cpu", "bf16", BATCH, guidance).blocks)
        assert error(x, case.exact[guidance]) <= 0.05
