"""Exact sequential decoding of a whole flow: ops.decode_block against an eager KV-cached loop (peers/eager_tarflow.py).

Random weights; all blocks of the flow; medians of interleaved runs. A step is one network evaluation of one block:
blocks x (T - 1) of them per decode. GFLOP/s count the linear layers.

    python benchmarks/bench_decode_block.py [--quick] [--configs S,M,L] [--batches 1,16,64] [--threads N] [--json PATH]
"""

import argparse

import torch
from peers import eager_tarflow
from timing import interleaved, keep_memory, write_json

from biflow.ops.decode_block import BlockConfig, block_shapes, decode_block, pack_block

CONFIGS = {  # width, blocks, layers, T, D (PERFORMANCE.md); head_dim 64, F = 4 width
    "S": (128, 4, 2, 16, 4),
    "M": (256, 4, 4, 49, 16),
    "L": (384, 4, 4, 256, 12),
}


def random_flow(name: str) -> list[tuple[dict[str, torch.Tensor], BlockConfig]]:
    """Blocks [(weights, config), ...] of one of CONFIGS, odd ones flipped, with a mild coupling."""
    width, blocks, layers, tokens, channels = CONFIGS[name]
    generator = torch.Generator().manual_seed(0)
    flow = []
    for i in range(blocks):
        config = BlockConfig(tokens, channels, width, layers, 64, 4 * width, flip=i % 2 == 1)
        weights = {}
        for key, shape in block_shapes(config).items():
            spread = (shape[-1] ** -0.5 if len(shape) == 2 else 0.1) * (0.1 if key.startswith("proj_out") else 1.0)
            weights[key] = spread * torch.randn(shape, generator=generator)
            if "norm" in key and key.endswith("weight"):
                weights[key] += 1
        flow.append((weights, config))
    return flow


def run(
    quick: bool = False, configs: list[str] | None = None, batches: list[int] | None = None, rounds: int = 5
) -> list[dict]:
    """One row per config and batch: ms and us per step of both, x eager, GFLOP/s, max abs difference of the results."""
    keep_memory()
    rows = []
    for name in configs or (["S"] if quick else list(CONFIGS)):
        flow = random_flow(name)
        packed = [(pack_block(weights, config), config) for weights, config in flow]
        _, config = flow[0]
        steps = len(flow) * (config.tokens - 1)
        parameters = sum(w.numel() for k, w in flow[0][0].items() if w.dim() == 2 and k != "pos_embed")
        for batch in batches or [1, 16, 64]:
            z = torch.randn(batch, config.tokens, config.channels, generator=torch.Generator().manual_seed(1))

            def ours(x=z, packed=packed):
                for weights, config in reversed(packed):
                    x = decode_block(x, weights, config)
                return x

            def eager(z=z, flow=flow):
                return eager_tarflow.decode(z, flow)

            difference = (ours() - eager()).abs().max().item()
            times = interleaved({"ours": ours, "eager": eager}, 3 if quick else rounds)
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
                    "gflop_s": 2 * parameters * batch * steps / times["ours"] / 1e9,
                    "max_abs_difference": difference,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="config S, fewer rounds")
    parser.add_argument("--configs", help="comma-separated names of S, M, L")
    parser.add_argument("--batches", help="comma-separated batch sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's")
    parser.add_argument("--json", help="write machine information and rows there")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = run(
        args.quick,
        args.configs.split(",") if args.configs else None,
        [int(b) for b in args.batches.split(",")] if args.batches else None,
        args.rounds,
    )
    print(f"{'config':>6} {'batch':>5} {'ms':>9} {'us/step':>9} {'eager':>9} {'x eager':>8} {'GFLOP/s':>8} {'diff':>9}")
    for r in rows:
        print(
            f"{r['config']:>6} {r['batch']:>5} {r['ms']:9.2f} {r['us_step']:9.1f} {r['eager_us_step']:9.1f} "
            f"{r['x_eager']:8.2f} {r['gflop_s']:8.1f} {r['max_abs_difference']:9.1e}"
        )
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
