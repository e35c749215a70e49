"""Exact sequential decoding of a whole flow against an eager KV-cached loop (biflow.evaluate.eager_decode).

Two rows a case: ops.decode_block on packed weights, block after block, and flow.decode, which adds what users pay for:
checks of the input, the look for changed weights, the prior and the patches. Random weights; medians of interleaved
runs. A step is one network evaluation of one block: blocks x (T - 1) of them per decode. GFLOP/s count the linear
layers.

    python -m benchmarks.bench_decode_block [--quick] [--configs S,M,L] [--batches 1,16] [--threads N] [--json PATH]
"""

import torch

from biflow.evaluate import eager_decode
from biflow.models import TarFlow, TarFlowConfig
from biflow.ops import decode_block

from .timing import interleaved, keep_memory, main

CONFIGS = {  # 4 blocks, head_dim 64, F = 4 width; T = 16, 49, 256 tokens of D = 4, 16, 12 channels
    "S": dict(img_size=8, in_channels=1, patch_size=2, width=128, layers_per_block=2),
    "M": dict(img_size=28, in_channels=1, patch_size=4, width=256, layers_per_block=4),
    "L": dict(img_size=32, in_channels=3, patch_size=2, width=384, layers_per_block=4),
}


BATCHES = {"S": [1, 16, 64], "M": [1, 16, 64], "L": [1, 16]}  # the eager loop takes minutes at L 64


def random_flow(name: str) -> TarFlow:
    """One of CONFIGS with random weights and a mild coupling."""
    flow = TarFlow(TarFlowConfig(num_blocks=4, head_dim=64, **CONFIGS[name])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in flow.named_parameters():
            spread = (p.shape[-1] ** -0.5 if p.dim() == 2 else 0.1) * (0.1 if "proj_out" in key else 1.0)
            p.copy_(spread * torch.randn(p.shape, generator=generator) + ("norm" in key and key.endswith("weight")))
    return flow


def run(quick: bool = False, configs: list[str] | None = None, batches: list[int] | None = None) -> list[dict]:
    """Two rows per config and batch: ms and us per step of ours and of eager, x eager, GFLOP/s, max abs difference."""
    keep_memory()
    rows = []
    for name in configs or (["S"] if quick else list(CONFIGS)):
        flow = random_flow(name)
        c = flow.config
        packed = [(block.packed(), block.config) for block in flow.blocks]
        steps = c.num_blocks * (c.tokens - 1)
        parameters = sum(p.numel() for k, p in flow.blocks[0].named_parameters() if p.dim() == 2 and k != "pos_embed")
        for batch in batches or BATCHES[name]:
            z = torch.randn(batch, c.tokens, c.channels, generator=torch.Generator().manual_seed(1))

            def op(x=z, packed=packed):
                for weights, config in reversed(packed):
                    x = decode_block(x, weights, config)
                return x

            functions = {
                "decode_block": op,
                "flow.decode": lambda z=z, flow=flow: flow.decode(z),
                "eager": lambda z=z, flow=flow: eager_decode(flow, z),
            }
            want = eager_decode(flow, z)
            difference = (flow.decode(z) - want).abs().max().item()
            if not difference <= 1e-3 * want.abs().max():  # a wrong result has no speed; rounding is a hundredth of it
                raise RuntimeError(f"{name}, batch {batch}: flow.decode differs from the eager loop by {difference}")
            times = interleaved(functions, 3 if quick else 7)
            for what in ("decode_block", "flow.decode"):
                rows.append(
                    {
                        "op": what,
                        "config": name,
                        "batch": batch,
                        "steps": steps,
                        "ms": times[what] * 1e3,
                        "us_step": times[what] * 1e6 / steps,
                        "eager_us_step": times["eager"] * 1e6 / steps,
                        "x_eager": times["eager"] / times[what],
                        "gflop_s": 2 * parameters * batch * steps / times[what] / 1e9,
                        "max_abs_difference": difference,
                    }
                )
    return rows


if __name__ == "__main__":
    main(run, __doc__, configs=str, batches=int)
