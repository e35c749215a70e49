"""A training step of both stages: this repository's modules against the same network in plain torch.

A step is what both do with a batch: forward, backward, gradient clipping, AdamW (torch's fused one on both sides), in
fp32, and in bf16 as mixed precision has it: weights in fp32, products under autocast. Stage one maximises the
likelihood of a flow without classes; stage two regresses the images from noise with the learned inverse of the preset's
options, a squared error of the output (alignment is measured by bench_alignment). The gradients of both sides are
compared first. Speed-ups are medians of the ratios within each turn. With --peer-ml-tarflow also the step of the
checkout's own Model with the same weights, of which stage one alone exists.

    python -m benchmarks.bench_training [--quick] [--configs S,M,L] [--batches 64] [--threads N] [--json PATH]
      [--peer-ml-tarflow PATH]
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from biflow import interop
from biflow.models import BiFlow, BiFlowConfig, TarFlow, TarFlowConfig
from biflow.models.layers import patchify

from .flows import CONFIGS, check_configs, random_flow
from .peers.ml_tarflow import load_model
from .peers.plain import PlainDensity, PlainReverse
from .timing import keep_memory, main, ratio, turns

BATCHES = {"S": (64,), "M": (16,), "L": (4,), "B/2": (2,)}
# the largest distance of all gradients, over their norm: sums in another order; activations rounded to bf16
BOUNDS = {"fp32": 1e-4, "bf16": 0.1}


def random_inverse(name: str, *, device: str | torch.device = "cpu", **changes: object) -> BiFlow:
    """A learned inverse of a flow of that config's shape, guidance trained in; no weight is left at 0."""
    own = {k: v for k, v in (CONFIGS[name] | changes).items() if k != "layers_per_block"}
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
    return model.to(device)


def _likelihood(z: Tensor, logdet: Tensor) -> Tensor:
    return (0.5 * z.square().sum((1, 2)) - logdet).mean() / z[0].numel()


@dataclass
class Side:
    """module: with the parameters. loss: of one batch. names: gradients by the module's names -> by our model's."""

    module: nn.Module
    loss: Callable[[], Tensor]
    names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def sides(
    stage: str,
    name: str,
    batch: int,
    device: str | torch.device = "cpu",
    ml_tarflow: str | None = None,
    **changes: object,
) -> dict[str, Side]:
    """ "ours", "eager", and of flows "ml-tarflow", the checkout at that path. changes: fields of the model's config."""
    generator = torch.Generator().manual_seed(1)

    def images(c: TarFlowConfig | BiFlowConfig) -> Tensor:
        return (2 * torch.rand(batch, c.in_channels, c.img_size, c.img_size, generator=generator) - 1).to(device)

    if stage == "flow":
        flow = random_flow(name, device=device, **changes).train()
        plain, x = PlainDensity(flow), images(flow.config)
        found = {
            "ours": Side(flow, lambda: _likelihood(*flow(x))),
            "eager": Side(plain, lambda: _likelihood(*plain(x)), _without_prefix),
        }
        return found if ml_tarflow is None else found | {"ml-tarflow": _checkout(flow, x, ml_tarflow)}
    inverse = random_inverse(name, device=device, **changes).train()
    plain, c = PlainReverse(inverse), inverse.config
    z = torch.randn(batch, c.tokens, c.channels, generator=generator).to(device)
    y, w, x = torch.arange(batch, device=device) % 10, torch.linspace(0, 4, batch, device=device), images(c)
    patches = patchify(x, c.patch_size)
    return {
        "ours": Side(inverse, lambda: (inverse(z, y, w).float() - patches).square().mean()),
        "eager": Side(plain, lambda: (plain(z, y, w).float() - x).square().mean(), _without_prefix),
    }


def _without_prefix(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain modules hold the model."""
    return {name.split(".", 1)[1]: g for name, g in gradients.items()}


def _checkout(flow: TarFlow, x: Tensor, path: str) -> Side:
    theirs, c = load_model(flow, path).to(x.device).train(), flow.config

    def loss() -> Tensor:
        z, _, logdets = theirs(x)
        return theirs.get_loss(z, logdets)

    def names(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        state, images = theirs.state_dict() | gradients, {"img_size": c.img_size, "in_channels": c.in_channels}
        return dict(interop.from_ml_tarflow(state, patch_size=c.patch_size, **images).to(x.device).named_parameters())

    return Side(theirs, loss, names)


def step(side: Side, precision: str) -> Callable[[], None]:
    """A step of rate 0: the weights stay those whose gradients were compared."""
    optimizer = torch.optim.AdamW(side.module.parameters(), lr=0.0, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        _backward(side, precision)
        nn.utils.clip_grad_norm_([p for p in side.module.parameters() if p.grad is not None], 1.0)
        optimizer.step()

    return step


def gradients(side: Side, precision: str, like: TarFlow | BiFlow) -> Tensor:
    """All gradients as one vector, in the order of the parameters of our model `like`.

    Positions lie in another order in the plain flow: of their gradients the sum is taken. What has none has 0: ours may
    write a gradient of 0 where a batch does not use a parameter.
    """
    side.module.zero_grad()
    _backward(side, precision)
    found = side.names({name: p.grad for name, p in side.module.named_parameters() if p.grad is not None})
    every = ((name, found.get(name, torch.zeros_like(p))) for name, p in like.named_parameters())
    return torch.cat([(g.sum(0) if name.endswith("pos_embed") else g).flatten() for name, g in every]).detach()


def _backward(side: Side, precision: str) -> None:
    device = next(side.module.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        value = side.loss()
    value.backward()


def run(
    quick: bool = False,
    configs: list[str] | None = None,
    batches: list[int] | None = None,
    peer_ml_tarflow: list[str] | None = None,
) -> list[dict]:
    """A row per stage, config, batch and precision: ms of ours and of each other, how many times as long they take in
    the same precision ("x_eager", "x_ml_tarflow") and in the one in which they are fastest ("x_best_...")."""
    check_configs(configs)
    keep_memory()
    checkout = peer_ml_tarflow[0] if peer_ml_tarflow else None
    rows = []
    for stage in ("flow", "inverse"):
        for name in configs or (["S"] if quick else ["S", "M", "L"]):
            for batch in batches or BATCHES[name]:
                rows += _rows(stage, name, batch, checkout, 3 if quick else 7)
    return rows


def _rows(stage: str, name: str, batch: int, checkout: str | None, rounds: int) -> list[dict]:
    off, steps = {}, {}
    for precision, most in BOUNDS.items():
        found = sides(stage, name, batch, ml_tarflow=checkout)
        model = found["ours"].module
        vectors = {who: gradients(side, precision, model) for who, side in found.items()}
        base = vectors.pop("eager")
        off[precision] = max(((g - base).norm() / base.norm()).item() for g in vectors.values())
        if not off[precision] <= most:  # a wrong gradient has no speed
            raise RuntimeError(f"{stage} {name}, {precision}: gradients are {off[precision]} apart")
        steps |= {(who, precision): step(side, precision) for who, side in found.items()}
    times = turns(steps, rounds)
    rows = []
    for precision in BOUNDS:
        ours = times["ours", precision]
        row = {"op": "training step", "stage": stage, "config": name, "batch": batch, "precision": precision}
        row["ms"] = 1e3 * statistics.median(ours)
        for who in (who for who, p in times if p == precision and who != "ours"):
            best, key = min((times[who, p] for p in BOUNDS), key=statistics.median), who.replace("-", "_")
            row[f"{key}_ms"] = 1e3 * statistics.median(times[who, precision])
            row |= {f"x_{key}": ratio(ours, times[who, precision]), f"x_best_{key}": ratio(ours, best)}
        rows.append(row | {"gradient_distance": off[precision]})
    return rows


if __name__ == "__main__":
    main(run, __doc__, configs=str, batches=int, peer_ml_tarflow=str)
