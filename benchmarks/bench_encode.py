"""The density of whole flows: `flow.encode(x)` in torch against the packed kernels of a CPU, in fp32 and bf16.

What a user calls, checks and patches included, on frozen weights. Every result is checked against an fp64 encode first.
Speed-ups are medians of the ratios within each turn.

    python -m benchmarks.bench_encode [--quick] [--configs S,M,L] [--batches 1,16] [--threads N] [--json PATH]
"""

import copy
import functools
import statistics

import torch

from biflow import solvers
from biflow.models import TarFlow

from .flows import check_configs, random_flow
from .timing import keep_memory, main, ratio, turns

BATCHES = {"S": (64,), "M": (16,), "L": (4,), "B/2": (1,)}
# the largest root mean square error of z, over that of z itself: sums in another order; weights and activations rounded
BOUNDS = {None: 1e-5, "fp32": 1e-5, "bf16": 5e-2}


def _errors(flow: TarFlow, x: torch.Tensor, precisions: list[str | None]) -> dict[str | None, tuple[float, float]]:
    """By precision the relative root mean square error of z and the largest error of bits per dim, against fp64."""
    exact, dims = copy.deepcopy(flow).double(), x[0].numel()
    wide, logdet = exact.encode(x.double())
    errors = {}
    for precision in precisions:
        z, got = flow.encode(x, precision=precision)
        off = ((z - wide).square().mean() / wide.square().mean()).sqrt().item()
        bits = (flow._log_prob(z, got) - exact._log_prob(wide, logdet)).abs().max().item() / (dims * 0.6931471805599453)
        errors[precision] = off, bits
    return errors


@torch.no_grad()
def run(quick: bool = False, configs: list[str] | None = None, batches: list[int] | None = None) -> list[dict]:
    """A row per config, batch and way (torch, packed fp32, packed bf16): ms, x torch, errors against fp64."""
    check_configs(configs)
    keep_memory()
    rows = []
    precisions = [None, *solvers.PRECISIONS]
    for name in configs or (["S"] if quick else ["S", "M", "L"]):
        flow = random_flow(name)
        c = flow.config
        for batch in batches or BATCHES[name]:
            x = torch.rand(batch, c.in_channels, c.img_size, c.img_size, generator=torch.Generator().manual_seed(1))
            x = 2 * x - 1
            errors = _errors(flow, x, precisions)
            for precision, (off, _) in errors.items():
                if not off <= BOUNDS[precision]:  # a wrong result has no speed
                    raise RuntimeError(f"{name}, batch {batch}, {precision or 'torch'}: encode is {off} from fp64")
            with flow.frozen():
                times = turns(
                    {p: functools.partial(flow.encode, x, precision=p) for p in precisions}, 3 if quick else 7
                )
            for precision, own in times.items():
                rows.append(
                    {
                        "op": "encode",
                        "config": name,
                        "batch": batch,
                        "by": "torch" if precision is None else "packed",
                        "precision": precision or "fp32",
                        "ms": 1e3 * statistics.median(own),
                        "x_torch": ratio(own, times[None]),
                        "z_rms_error": errors[precision][0],
                        "bits_per_dim_error": errors[precision][1],
                    }
                )
    return rows


if __name__ == "__main__":
    main(run, __doc__, configs=str, batches=int)
