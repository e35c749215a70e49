"""What an image costs: the learned inverse's one pass against the exact inverse, guided and denoised.

Each makes images from the same noise and labels. "learned": `BiFlow.decode`. "exact": `TarFlow.decode`, then
`TarFlow.denoise` where the flow was trained with noise; the solver "auto" is calibrated here, for these batches (its
iterations stop at TOL). "eager": the same token by token in plain PyTorch, score step included. Both exact ones in fp32
agree, which is checked first; bf16 is what the argument `precision` makes of them. x_learned: how many times as long as
the learned inverse in fp32.

    python -m benchmarks.bench_sampling --flow CHECKPOINT --inverse CHECKPOINT [--batches 1,64] [--guidance 1.0]
                                        [--quick] [--threads N] [--json PATH]
"""

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import biflow
from biflow.calibration import calibrate
from biflow.evaluate import eager_decode
from biflow.models import BiFlow, TarFlow

from .timing import keep_memory, main, ratio, turns

TOL = 1e-3  # of the iterative solvers: far below what training noise adds
BOUND = 1e-3  # of the exact inverse against eager, relative to the largest value: fp32 sums through all blocks


def ways(flow: TarFlow, inverse: BiFlow, batch: int, guidance: float) -> dict[str, Callable[[], Tensor]]:
    """By name: a call that makes the images."""
    c, generator = flow.config, torch.Generator().manual_seed(0)
    z = torch.randn(batch, c.tokens, c.channels, generator=generator)
    y = torch.arange(batch) % c.num_classes if c.num_classes else None

    def finished(decode: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return (lambda: flow.denoise(decode(), y)) if c.noise_std else decode

    def exact(**options) -> Callable[[], Tensor]:
        return finished(functools.partial(flow.decode, z, y, guidance=guidance, **options))

    found = {}
    for precision in ("fp32", "bf16"):
        found[f"learned {precision}"] = functools.partial(inverse.decode, z, y, guidance=guidance, precision=precision)
        found[f"exact sequential {precision}"] = exact(solver="sequential", precision=precision)
        found[f"exact auto {precision}"] = exact(solver="auto", precision=precision, tol=TOL)
    found["eager"] = finished(functools.partial(eager_decode, flow, z, y, guidance=guidance))
    return found


@torch.no_grad()
def run(
    quick: bool = False,
    flow: list[str] | None = None,
    inverse: list[str] | None = None,
    batches: list[int] | None = None,
    guidance: list[float] | None = None,
) -> list[dict]:
    """A row a way and batch: milliseconds an image, and how many times as long as the learned inverse."""
    if not flow or not inverse:
        raise SystemExit("bench_sampling: expected --flow and --inverse, checkpoints of the two stages")
    keep_memory()
    forward, learned, (strength, *_) = biflow.load(flow[0]).eval(), biflow.load(inverse[0]).eval(), guidance or [1.0]
    batches = batches or ([2] if quick else [1, 64])
    calibrate(forward, batches=batches, tol=TOL, guidances=(strength,), repetitions=1 if quick else 3)
    rows = []
    for batch in batches:
        calls = ways(forward, learned, batch, strength)
        want, got = calls["eager"](), calls["exact sequential fp32"]()
        error = ((got - want).abs().max() / want.abs().max()).item()
        if not error <= BOUND:
            raise RuntimeError(f"expected the exact inverse within {BOUND:g} of eager, got {error:.3g}: nothing timed")
        times = turns(calls, 3 if quick else 7)
        for way, seconds in times.items():
            milliseconds = 1e3 * statistics.median(seconds) / batch
            row = {"op": "sampling", "way": way, "batch": batch, "guidance": strength, "ms_image": milliseconds}
            rows.append(row | {"x_learned": 1 / ratio(seconds, times["learned fp32"])})
    return rows


if __name__ == "__main__":
    main(run, __doc__, flow=str, inverse=str, batches=int, guidance=float)
