"""The tables of docs/scaling.md: what ImageNet 256 costs on 8 and 64 GPUs, from measured rates and stated assumptions.

FLOPs are those of `biflow.train.flops`; what autograd keeps of an image is measured here, on the CPU, under
bf16 autocast; the rates are those of `benchmarks/results/nvidia-h200.json`. The constants below are assumptions, and
only they and the measured file make the tables: change them for your machine.

    python -m benchmarks.scaling [--measured PATH]      # prints Markdown; 2 minutes, and 15 GB for XL/2
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from biflow import presets
from biflow.models import BiFlow, TarFlow
from biflow.train import flops

MODELS = {"B/2": "b2", "L/2": "l2", "XL/2": "xl2"}
GPUS = (8, 64)  # of 8 a node
STAGES = ("flow", "inverse")  # steps and batch size are those of the presets
STATE_BYTES = 20  # a parameter: weight, gradient, two moments and averaged weight, fp32
MEMORY = 0.9 * 139 * 2**30  # bytes of a GPU that a training can use
SHARES = (0.5, 0.25)  # of the measured GEMM rate that a training step reaches: as the passes do; cautious
NVLINK, NETWORK = 300e9, 40e9  # bytes a second and GPU of an all-reduce: within a node, between nodes
PRICE = 2.5  # USD a GPU hour
LATENT_BYTES = 2 * 2 * 4 * 32 * 32 * 2  # an image: mean and spread, it and its mirror image, fp16
LATENTS_PER_CORE = 6900  # a second of a core's time, read and drawn (docs/latents.md)


def model_of(name: str) -> TarFlow | BiFlow:
    """The model of a preset, without memory for its weights."""
    config = presets.training(name).model
    with torch.device("meta"):
        return (TarFlow if name.endswith("flow") else BiFlow)(config)


def kept_bytes(model: TarFlow | BiFlow) -> int:
    """What autograd keeps of one image for a step under bf16 autocast, without the weights."""
    model = model.to_empty(device="cpu").train()
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.fill_(0.01)
        if isinstance(model, TarFlow):
            model.var.fill_(1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(s) for p in model.parameters() for s in (p.shape, p.shape[::-1])}
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        rounded_weight = t.dtype == torch.bfloat16 and tuple(t.shape) in shapes
        if t.untyped_storage().data_ptr() not in weights and not rounded_weight:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    c, y = model.config, torch.zeros(1, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        if isinstance(model, TarFlow):
            model.log_prob(torch.rand(1, c.in_channels, c.img_size, c.img_size), y).mean()
        else:
            model(torch.randn(1, c.tokens, c.channels), y, torch.ones(1)).square().mean()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def all_reduce_seconds(parameters: int, gpus: int) -> float:
    """Of fp32 gradients by a ring: 2 (n - 1) / n of the bytes through the slowest link. A step takes at least that."""
    return 2 * (gpus - 1) / gpus * 4 * parameters / (NVLINK if gpus <= 8 else NETWORK)


def line(cells: list) -> str:
    return f"| {' | '.join(str(c) for c in cells)} |"


def tables(measured: dict) -> list[str]:
    """Markdown lines: an image and a GPU's memory; whole runs."""
    limits = measured["parts"]["limits"]["rows"]
    rate = next(r["tflop_s"] for r in limits if r["limit"] == "bf16 GEMM") * 1e12
    first = ["| | parameters, M | GFLOP: a pass | a step | kept of an image, MB | state, GB | images that fit |"]
    first.append("|---" * 7 + "|")
    second = [
        "| | GPUs | batch a GPU | ms a step | all-reduce, ms | images/s | tokens/s | latents read, MB/s | by cores "
        "| days | USD |"
    ]
    second.append("|---" * 11 + "|")
    for title, short in MODELS.items():
        flow, inverse = (model_of(f"imagenet256_{short}_{stage}") for stage in STAGES)
        configs = {stage: presets.training(f"imagenet256_{short}_{stage}") for stage in STAGES}
        passes = {"flow": flops.flow(flow.config), "inverse": flops.inverse(inverse.config, states=False)}
        steps = {
            "flow": flops.training(configs["flow"]),
            "inverse": flops.training(configs["inverse"], flow.config),
        }
        for stage, model in (("flow", flow), ("inverse", inverse)):
            parameters = count(model)
            kept = kept_bytes(model_of(f"imagenet256_{short}_{stage}"))
            state = STATE_BYTES * parameters + (4 * count(flow) if stage == "inverse" else 0)
            fit = int((MEMORY - state) / kept)
            name = f"{title} {stage}"
            cells = [parameters / 1e6, passes[stage] / 1e9, steps[stage] / 1e9, kept / 1e6]
            first.append(line([name, *(f"{c:.0f}" for c in cells), f"{state / 1e9:.1f}", fit]))
            optim, tokens = configs[stage].optim, model.config.tokens
            batch = optim.batch_size
            for gpus in GPUS:
                reduce = all_reduce_seconds(parameters, gpus)
                seconds = [max(batch / gpus * steps[stage] / (share * rate), reduce) for share in SHARES]
                per = [batch / s for s in seconds]
                hours = [optim.steps * batch / p / 3600 for p in per]
                second.append(
                    line(
                        [
                            name,
                            gpus,
                            batch // gpus,
                            _range(seconds, 1e3),
                            f"{1e3 * reduce:.0f}",
                            _range(per),
                            _range([p * tokens for p in per]),
                            _range([p * LATENT_BYTES for p in per], 1e-6),
                            _range([p / LATENTS_PER_CORE for p in per]),
                            _range(hours, 1 / 24),
                            _range([h * gpus * PRICE for h in hours]),
                        ]
                    )
                )
    return [*first, "", *second]


def _range(values: list[float], factor: float = 1.0) -> str:
    """The values, once each."""
    shown = [f"{factor * v:,.3g}" if factor * v < 100 else f"{factor * v:,.0f}" for v in values]
    return " to ".join(dict.fromkeys(shown))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", default=str(Path(__file__).parent / "results" / "nvidia-h200.json"))
    print("\n".join(tables(json.loads(Path(parser.parse_args().measured).read_text()))))
