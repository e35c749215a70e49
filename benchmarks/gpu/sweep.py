"""How a kernel's work is divided, tried out: every plan near the chosen one, microseconds, the best first.

    python -m benchmarks.gpu.sweep [--json PATH]

For the sequential inverse (csrc/decode_block.h, DecodePlan) and attention (csrc/attention.h, AttentionPlan), whose
plans are chosen by estimates and earlier measurements. error: of a plan's result, against the chosen plan's.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from biflow import ops
from biflow.ops.decode_block import call_options, condition, gpu_plan

from .kernels import ATTENTION
from .subject import Subject
from .timing import Call, Timer, reason

DECODES = (("B/2", 1), ("B/2", 8), ("B/2", 16), ("B/2", 64), ("B/2", 256), ("TARFlow-64", 1), ("TARFlow-64", 64))
TOKENS = 512  # of a block, at most: others are left out
SHOWN = 4


def decode_plans(chosen: list[int], batch: int, processors: int) -> Iterator[list[int]]:
    """[persistent, row_tiles, blocks, splits, warps, norm_in_place]"""
    yield chosen
    for row_tiles, splits, warps, in_place in itertools.product((1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8), (0, 1)):
        groups = -(-batch // (16 * row_tiles))
        if groups > processors or (in_place and row_tiles > 1) or (row_tiles > 1 and batch <= 8 * row_tiles):
            continue
        if (splits > 1) and (warps < 8 or batch > 16):
            continue
        for share in (1.0, 0.75, 0.5):
            blocks = max(int(processors * share) // groups, 1) * groups
            yield [1, row_tiles, blocks, splits, warps, in_place]


@torch.inference_mode()
def decodes(timer: Timer, name: str, batch: int, precision: str) -> list[dict]:
    subject = Subject(name, timer.device, False)
    tokens = min(subject.block.tokens, TOKENS)
    block, z = subject.first(tokens), subject.z(batch, tokens)
    weights = ops.pack_block(block.weights(), block.config, precision)
    given = condition(weights, batch, None, None, None, 0.0, "ab", True, 1.0)
    chosen, _ = gpu_plan(weights, batch, given)
    options, rows, want = call_options(weights, given), [], None
    processors = torch.cuda.get_device_properties(timer.device).multi_processor_count
    seen = set()
    for plan in decode_plans(chosen, batch, processors):
        if tuple(plan) in seen:
            continue
        seen.add(tuple(plan))
        x = torch.empty_like(z)

        def call(plan: list[int] = plan, x: Tensor = x) -> Tensor:
            torch.ops.biflow.decode_block_(z, weights.packed, *given.tensors, x, plan=plan, **options)
            return x

        row = {"decode": name, "batch": batch, "precision": precision, "plan": plan, "chosen": plan == chosen}
        try:
            got = call().double()
            want = got if want is None else want
            row["error"] = ((got - want).norm() / (want - z).norm()).item()
            row["us_step"] = timer.few(call, seconds=0.05, most=3) / (tokens - 1) * 1e6
        except Exception as error:
            row["failed"] = reason(error)
        rows.append(row)
    return rows


@torch.no_grad()
def attentions(timer: Timer, case: tuple) -> list[dict]:
    name, (batch, heads, tokens, d), causal, _ = case
    q, k, v = (
        torch.randn(batch, heads, tokens, d, device=timer.device, dtype=torch.bfloat16) for _ in range(3)
    )  # fmt: skip
    keys = -(-tokens // 64)
    plans, rows, want = [[]], [], ops.attention(q, k, v, causal=causal).double()
    for row_tiles, warps in itertools.product((1, 2) if d <= 64 else (1,), (2, 4, 8)):
        turns = -(-tokens // (16 * row_tiles * warps))
        plans += [[row_tiles, warps, blocks, keys] for blocks in sorted({1, -(-turns // 2), turns})]
        plans += [[row_tiles, warps, turns, 3]] if keys > 3 else []
    calls = {}
    for plan in plans:

        def call(plan: list[int] = plan) -> Tensor:
            no_norms = (None, None, 0.0, None, None, 0)
            return torch.ops.biflow.attention_forward(q, k, v, causal, d**-0.5, None, *no_norms, plan)

        calls[str(plan)] = Call(call)

    def check(got: Tensor) -> float:
        """got: (B,H,T,d) as the op returns it, or (B,T,H,d) as its kernel does."""
        got = got.double() if got.shape == want.shape else got.transpose(1, 2).double()
        return ((got - want).norm() / want.norm()).item()

    times = timer(calls, cold=q.numel() * 8 > 30e6, seconds=3.0, check=check)
    for plan in plans:
        row = {"attention": name, "plan": plan, "chosen": not plan}
        if str(plan) in times.seconds:
            row |= {"us": times.seconds[str(plan)] * 1e6, "error": times.errors[str(plan)]}
        else:
            row["failed"] = times.failed.get(str(plan), "no time")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    timer, every = Timer(torch.device("cuda")), []
    runs = [(decodes, (name, batch, "bf16")) for name, batch in DECODES] + [(decodes, ("B/2", 64, "fp32"))]
    runs += [(attentions, (case,)) for case in ATTENTION if not case[3]]
    for run, arguments in runs:
        rows = run(timer, *arguments)
        every += rows
        if args.json:
            args.json.write_text("".join(json.dumps(row) + "\n" for row in every))
        key = "us_step" if run is decodes else "us"
        good = sorted((r for r in rows if key in r), key=lambda r: r[key])
        print(arguments[0] if run is decodes else arguments[0][0], *arguments[1:], flush=True)
        for row in [r for r in good if r["chosen"]] + good[:SHOWN]:
            print(f"  {row[key]:9.2f} us  {row['plan']}{' chosen' if row['chosen'] else ''}  error {row['error']:.2g}")
        print("  failed:", sum("failed" in r for r in rows), "of", len(rows), flush=True)


if __name__ == "__main__":
    main()
