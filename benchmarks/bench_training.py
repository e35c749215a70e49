"""A training step of both stages: this repository's modules against the same network in plain torch.

A step is what both do with a batch: forward, backward, gradient clipping, AdamW (torch's fused one on both sides), in
fp32, and in bf16 as mixed precision has it: weights in fp32, products under autocast. Stage one maximises the
likelihood of a flow without classes; stage two regresses the images from noise with the learned inverse of the preset's
options, a squared error of the output (alignment is measured by bench_alignment). The gradients of both sides are
compared first. Speed-ups are medians of the ratios within each turn.

    python -m benchmarks.bench_training [--quick] [--configs S,M,L] [--batches 64] [--threads N] [--json PATH]
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from biflow.models import BiFlow, BiFlowConfig
from biflow.models.layers import patchify

from .flows import CONFIGS, check_configs, random_flow
from .peers.plain import PlainDensity, PlainReverse
from .timing import keep_memory, main, ratio, turns

BATCHES = {"S": (64,), "M": (16,), "L": (4,), "B/2": (2,)}
# the largest distance of all gradients, over their norm: sums in another order; activations rounded to bf16
BOUNDS = {"fp32": 1e-4, "bf16": 0.1}


def random_inverse(name: str) -> BiFlow:
    """A learned inverse of a flow of that config's shape, guidance trained in; no weight is left at 0."""
    own = {k: v for k, v in CONFIGS[name].items() if k != "layers_per_block"}
    model = BiFlow(
        BiFlowConfig(
            **own, head_dim=64, layers_per_group=CONFIGS[name]["layers_per_block"], num_classes=10, class_tokens=4,
            guidance_tokens=2, max_guidance=4.0
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def _likelihood(z: Tensor, logdet: Tensor) -> Tensor:
    return (0.5 * z.square().sum((1, 2)) - logdet).mean() / z[0].numel()


def losses(stage: str, name: str, batch: int) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """By side ("ours", "eager"): a module with the parameters, and the loss of one batch."""
    generator = torch.Generator().manual_seed(1)
    if stage == "flow":
        flow = random_flow(name).train()
        plain, c = PlainDensity(flow), flow.config
        x = 2 * torch.rand(batch, c.in_channels, c.img_size, c.img_size, generator=generator) - 1
        return {"ours": (flow, lambda: _likelihood(*flow(x))), "eager": (plain, lambda: _likelihood(*plain(x)))}
    inverse = random_inverse(name).train()
    plain, c = PlainReverse(inverse), inverse.config
    z = torch.randn(batch, c.tokens, c.channels, generator=generator)
    y, w = torch.arange(batch) % 10, torch.linspace(0, 4, batch)
    images = 2 * torch.rand(batch, c.in_channels, c.img_size, c.img_size, generator=generator) - 1
    patches = patchify(images, c.patch_size)
    return {
        "ours": (inverse, lambda: (inverse(z, y, w).float() - patches).square().mean()),
        "eager": (plain, lambda: (plain(z, y, w).float() - images).square().mean()),
    }


def _step(module: nn.Module, loss: Callable[[], Tensor], precision: str) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], 1.0)
        optimizer.step()

    return step


def distance(sides: dict[str, tuple[nn.Module, Callable[[], Tensor]]], precision: str) -> float:
    """Of the gradients of both sides, over their norm.

    Positions lie in another order in the plain flow: of their gradients the sum is compared. Ours may write a gradient
    of 0 where a batch does not use a parameter.
    """
    ours, eager = (_gradients(module, loss, precision) for module, loss in sides.values())
    eager = {name.split(".", 1)[1]: g for name, g in eager.items()}  # the plain modules hold the model
    zeros = {name: torch.zeros_like(g) for name, g in ours.items()}
    a, b = (torch.cat([(zeros | f)[name].flatten() for name in zeros]) for f in (ours, eager))
    return ((a - b).norm() / b.norm()).item()


def _gradients(module: nn.Module, loss: Callable[[], Tensor], precision: str) -> dict[str, Tensor]:
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        value = loss()
    value.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: g.sum(0) if name.endswith("pos_embed") else g for name, g in found.items()}


def run(quick: bool = False, configs: list[str] | None = None, batches: list[int] | None = None) -> list[dict]:
    """A row per stage, config, batch and precision: ms of ours and of eager torch, x eager, x its best precision."""
    check_configs(configs)
    keep_memory()
    rows = []
    for stage in ("flow", "inverse"):
        for name in configs or (["S"] if quick else ["S", "M", "L"]):
            for batch in batches or BATCHES[name]:
                off, steps = {}, {}
                for precision in BOUNDS:
                    sides = losses(stage, name, batch)
                    off[precision] = distance(sides, precision)
                    if not off[precision] <= BOUNDS[precision]:  # a wrong gradient has no speed
                        raise RuntimeError(f"{stage} {name}, {precision}: gradients are {off[precision]} apart")
                    for side, (module, loss) in sides.items():
                        steps[side, precision] = _step(module, loss, precision)
                times = turns(steps, 3 if quick else 7)
                best = min((times["eager", p] for p in BOUNDS), key=statistics.median)
                rows += [
                    {
                        "op": "training step",
                        "stage": stage,
                        "config": name,
                        "batch": batch,
                        "precision": p,
                        "ms": 1e3 * statistics.median(times["ours", p]),
                        "eager_ms": 1e3 * statistics.median(times["eager", p]),
                        "x_eager": ratio(times["ours", p], times["eager", p]),
                        "x_best_eager": ratio(times["ours", p], best),
                        "gradient_distance": off[p],
                    }
                    for p in BOUNDS
                ]
    return rows


if __name__ == "__main__":
    main(run, __doc__, configs=str, batches=int)
