"""Raw parameters of one flow block on packed weights, `ops.block_params`, against the model's parallel pass in torch.

Whole passes over all T tokens, and passes over one window from the middle on with the keys and values before it kept
(`ops.BlockWindows`), which torch's pass has no way to do: it is beside the whole pass there too. bf16 is compared with
torch's pass under bf16 autocast. GFLOP/s count the linear layers of the tokens that are evaluated, percent of the rate
of a torch matmul of the same dtype. Every result is checked against the torch pass in fp32 first.

    python -m benchmarks.bench_block_params [--quick] [--configs S,M,L] [--batches 1,16] [--threads N] [--json PATH]
"""

import torch

from biflow import ops

from .flows import check_configs, random_flow
from .timing import interleaved, keep_memory, main

BATCHES = {"S": (1, 16, 64), "M": (1, 16, 64), "L": (1, 16), "B/2": (1,)}
WINDOW = 16
# the largest difference from fp32, over the largest parameter: sums in another order; weights and activations rounded
PRECISIONS = {"fp32": (torch.float32, 1e-4), "bf16": (torch.bfloat16, 5e-2)}


def _functions(block, packed, x):
    """Our calls by name, how many tokens each evaluates for a sample, torch's whole pass."""
    c = block.config
    order = x.flip(1) if c.flip else x
    windows = ops.BlockWindows(packed, c, len(x))
    start = c.tokens // 2
    stop = min(start + WINDOW, c.tokens)
    windows(x, 0, start)  # keys and values before the window
    dtype, _ = PRECISIONS[packed.precision]

    def torch_pass():
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return block.params(order)

    passes = c.tokens - (0 if c.start_token else 1)
    calls = {"whole": lambda: ops.block_params(x, packed, c), "window": lambda: windows(x, start, stop)}
    return calls, {"whole": passes, "window": stop - start}, torch_pass


def _difference(block, raw, x):
    """The largest difference from torch's pass in fp32, over the largest parameter."""
    c = block.config
    with torch.no_grad():
        want = block.params(x.flip(1) if c.flip else x)
    if not c.start_token:
        want = torch.cat([torch.zeros_like(want[:, :1]), want[:, :-1]], 1)
    want = want.flip(1) if c.flip else want
    return ((raw - want).abs().max() / want.abs().max()).item()


def run(quick: bool = False, configs: list[str] | None = None, batches: list[int] | None = None) -> list[dict]:
    """A row per config, batch, precision and kind of pass: ms, ms of torch's whole pass, x torch, rates, difference."""
    check_configs(configs)
    keep_memory()
    rows = []
    for name in configs or (["S"] if quick else ["S", "M", "L"]):
        block = random_flow(name).blocks[-1]
        c = block.config
        parameters = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
        for precision, (dtype, allowed) in PRECISIONS.items():
            packed = ops.pack_block(block.state_dict(), c, precision)
            a, b = (torch.randn(1024, 1024, dtype=dtype) for _ in range(2))
            for batch in batches or BATCHES[name]:
                x = torch.randn(batch, c.tokens, c.channels, generator=torch.Generator().manual_seed(1))
                calls, tokens, torch_pass = _functions(block, packed, x)
                difference = _difference(block, calls["whole"](), x)
                if not difference <= allowed:  # a wrong result has no speed
                    raise RuntimeError(f"{name}, batch {batch}, {precision}: block_params is {difference} from torch")
                times = interleaved({**calls, "torch": torch_pass, "matmul": lambda a=a, b=b: a @ b}, 3 if quick else 7)
                limit = 2 * 1024**3 / times["matmul"] / 1e9
                for what in calls:
                    rate = 2 * parameters * batch * tokens[what] / times[what] / 1e9
                    rows.append(
                        {
                            "op": "block_params",
                            "config": name,
                            "batch": batch,
                            "precision": precision,
                            "pass": what,
                            "tokens": tokens[what],
                            "ms": times[what] * 1e3,
                            "torch_ms": times["torch"] * 1e3,
                            "x_torch": times["torch"] / times[what],
                            "gflop_s": rate,
                            "matmul_gflop_s": limit,
                            "percent_of_matmul": 100 * rate / limit,
                            "difference": difference,
                        }
                    )
    return rows


if __name__ == "__main__":
    main(run, __doc__, configs=str, batches=int)
