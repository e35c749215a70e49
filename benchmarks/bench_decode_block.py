"""One flow block on packed weights, `ops.decode_block`, against an eager KV-cached loop over the same block.

A step is one network evaluation, T - 1 of them a call; GFLOP/s count the linear layers, GB/s the weight matrices, read
once a step. What users call, a whole flow with checks and solvers, is timed by bench_decode.

    python -m benchmarks.bench_decode_block [--quick] [--configs S,M,L] [--batches 1,16] [--threads N] [--json PATH]
"""

import torch

from biflow import ops
from biflow.evaluate import eager_decode_block

from .flows import check_configs, random_flow
from .timing import interleaved, keep_memory, main

BATCHES = {"S": (1, 16, 64), "M": (1, 16, 64), "L": (1, 16), "B/2": (1,)}  # an eager block takes half a minute at L 64


def run(quick: bool = False, configs: list[str] | None = None, batches: list[int] | None = None) -> list[dict]:
    """A row per config and batch: ms, us per step of ours and of eager, x eager, rates, max abs difference."""
    check_configs(configs)
    keep_memory()
    rows = []
    for name in configs or (["S"] if quick else ["S", "M", "L"]):
        block = random_flow(name).blocks[-1]
        c = block.config
        packed = ops.pack_block(block.state_dict(), c)
        steps = block.sequential_passes
        parameters = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
        for batch in batches or BATCHES[name]:
            z = torch.randn(batch, c.tokens, c.channels, generator=torch.Generator().manual_seed(1))
            functions = {
                "ours": lambda z=z, packed=packed, c=c: ops.decode_block(z, packed, c),
                "eager": lambda z=z, block=block: eager_decode_block(block, z),
            }
            want = functions["eager"]()
            difference = (functions["ours"]() - want).abs().max().item()
            if not difference <= 1e-5 * want.abs().max():  # a wrong result has no speed; rounding is a tenth of it
                raise RuntimeError(f"{name}, batch {batch}: decode_block differs from the eager loop by {difference}")
            times = interleaved(functions, 3 if quick else 7)
            rows.append(
                {
                    "op": "decode_block",
                    "config": name,
                    "batch": batch,
                    "steps": steps,
                    "ms": times["ours"] * 1e3,
                    "us_step": times["ours"] * 1e6 / steps,
                    "eager_us_step": times["eager"] * 1e6 / steps,
                    "x_eager": times["eager"] / times["ours"],
                    "gb_s": 4 * parameters * steps / times["ours"] / 1e9,
                    "gflop_s": 2 * parameters * batch * steps / times["ours"] / 1e9,
                    "max_abs_difference": difference,
                }
            )
    return rows


if __name__ == "__main__":
    main(run, __doc__, configs=str, batches=int)
