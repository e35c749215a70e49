"""Time per image of each way from noise to clean images, all doing the same job."""

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from biflow.evaluate.eager import eager_decode
from biflow.evaluate.metrics import check_pair
from biflow.models import BiFlow, TarFlow
from biflow.models.layers import device_clock


def time_decoders(
    rev: BiFlow,
    flow: TarFlow,
    *,
    guidance: float,
    batches: tuple[int, ...] = (1, 64),
    repetitions: int = 11,
    seed: int = 0,
) -> dict:
    """Milliseconds per image of learned and exact decoding: from z and classes to guided, clean images.

    The exact ways decode with guidance and then, if the flow was trained with noise, take one score step (a forward
    and a backward pass); the learned way is one pass, with that score step after it if it has no learned denoising. The
    ways take turns within a repetition, so that a slow moment of the machine hits all of them; the medians over the
    repetitions are reported, after one call to warm up.

    Args:
        guidance: of all ways; a model without classes is timed without.
        batches: batch sizes.
        repetitions: timed calls per way and batch size.

    Returns:
        {"unit", "guidance", "threads", "repetitions", "batches": [{"batch_size", "learned", "exact_eager",
        "exact_op", "exact_eager_decode", "exact_op_decode"}]}; *_decode is the share of the exact ways without the
        score step.
    """
    check_pair(rev, flow)
    if repetitions < 1:
        raise ValueError(f"repetitions: expected at least 1, got {repetitions}")
    c = flow.config
    guidance = guidance if c.num_classes else 0.0
    generator = torch.Generator().manual_seed(seed)
    device, rows = flow.var.device, []
    clock = functools.partial(_clock, device_clock(device))
    for batch in batches:
        z = torch.randn(batch, c.tokens, c.channels, generator=generator).to(device)
        y = torch.arange(batch, device=device) % c.num_classes if c.num_classes else None
        own_y = y if rev.config.num_classes else None
        own_denoiser = None if rev.config.learned_denoising else _denoiser(flow, own_y if c.num_classes else None)
        ways = {
            "learned": lambda z=z, y=own_y, after=own_denoiser: clock(
                lambda: rev.decode(z, y, guidance=guidance if rev.config.num_classes else 0.0), after
            ),
            "exact_eager": lambda z=z, y=y: clock(
                lambda: eager_decode(flow, z, y, guidance=guidance), _denoiser(flow, y)
            ),
            "exact_op": lambda z=z, y=y: clock(lambda: flow.decode(z, y, guidance=guidance), _denoiser(flow, y)),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for repetition in range(repetitions + 1):
            for name, run in ways.items():
                seconds = run()
                if repetition:
                    times[name].append(seconds)
        row: dict[str, float] = {"batch_size": batch}
        for name, seconds in times.items():
            row[name] = 1e3 * statistics.median(total for _, total in seconds) / batch
        for name in ("exact_eager", "exact_op"):
            row[f"{name}_decode"] = 1e3 * statistics.median(first for first, _ in times[name]) / batch
        rows.append(row)
    return {
        "unit": "ms per image",
        "guidance": guidance,
        "threads": torch.get_num_threads(),
        "repetitions": repetitions,
        "batches": rows,
    }


def _denoiser(flow: TarFlow, y: Tensor | None) -> Callable | None:
    return (lambda x: flow.denoise(x, y)) if flow.config.noise_std > 0 else None


def _clock(now: Callable[[], float], decode: Callable, after: Callable | None = None) -> tuple[float, float]:
    """Seconds of the decode, and of all."""
    start = now()
    x = decode()
    middle = now()
    if after is not None:
        after(x)
    return middle - start, now() - start
