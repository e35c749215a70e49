"""Whole passes: the learned inverse and the density, as milliseconds an image.

torch.compile takes long to start: only at one batch size, in rows that come last.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch

from benchmarks.flows import CONFIGS, LARGE
from biflow.models import BiFlow, BiFlowConfig, TarFlow, TarFlowConfig

from .limits import Case, bound, share
from .timing import Call, Timer, Times

# iTARFlow-B/2 and TARFlow-64, and a reverse model for the former (PERFORMANCE: 133 M parameters)
FLOWS = {name: (CONFIGS | LARGE)[name] for name in ("B/2", "TARFlow-64")}
REVERSE = dict(
    img_size=32, in_channels=4, patch_size=2, num_blocks=8, layers_per_group=2, width=768, num_classes=1000,
    class_tokens=8, max_guidance=4.0, guidance_tokens=4,
)  # fmt: skip
REVERSE_BATCHES = (1, 64, 256)
DENSITY_BATCHES = {"B/2": (1, 64, 256), "TARFlow-64": (1, 32)}
COMPILED_BATCH = 64
SMALL = {"width": 128, "num_blocks": 2}  # a dry run's


def randomize(model: torch.nn.Module) -> None:
    """Every parameter drawn, because fresh heads are zero; linear maps keep the size of what they multiply."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() == 2 else 0.1))


def linear_flops(model: torch.nn.Module, tokens: int) -> float:
    """2 FLOPs a weight and token of all linear maps, and attention's 4 T^2 C a layer."""
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    layers = sum(hasattr(m, "qkv") for m in model.modules())
    width = model.config.width
    return 2 * tokens * sum(m.weight.numel() for m in linears) + 4 * tokens**2 * width * layers


def cases(timer: Timer, limits: list[dict], dry: bool, ml_tarflow: str | None) -> Iterator[Case]:
    yield from reverse(timer, limits, dry, REVERSE_BATCHES)
    for name, batches in DENSITY_BATCHES.items():
        yield from density(timer, limits, dry, name, batches, ml_tarflow)
    if not dry:
        yield from reverse(timer, limits, dry, (COMPILED_BATCH,), compiled=True)
        yield from density(timer, limits, dry, "B/2", (COMPILED_BATCH,), None, compiled=True)


def _row(times: Times, batch: int, limit: float | None) -> dict:
    return times.row(lambda seconds: {"ms_image": seconds / batch * 1e3} | share(seconds, limit))


def _bound(model: torch.nn.Module, tokens: int, batch: int, limits: list[dict]) -> float | None:
    """Seconds: the products at the GEMM's rate, or the bf16 weights at the copy's."""
    weights = 2 * sum(p.numel() for p in model.parameters())
    return bound(limits, {"bf16 GEMM": batch * linear_flops(model, tokens), "copy": weights})


def reverse(
    timer: Timer, limits: list[dict], dry: bool, batches: tuple[int, ...], compiled: bool = False
) -> Iterator[Case]:
    """BiFlow.decode in bf16, guidance trained in. Timed as users call it: checks and launches included."""

    @functools.cache
    def model() -> BiFlow:
        model = BiFlow(BiFlowConfig(**(REVERSE | SMALL if dry else REVERSE))).to(timer.device).eval()
        randomize(model)
        return model

    @functools.cache
    def inputs(batch):
        c = model().config
        z = torch.randn(batch, c.tokens, c.channels, device=timer.device)
        return z, torch.randint(c.num_classes, (batch,), device=timer.device)

    def limit(batch):
        c = model().config
        return _bound(model(), c.tokens + c.class_tokens + c.guidance_tokens, batch, limits)

    def decoded(batch, frozen):
        (z, y), w = inputs(batch), torch.full((batch,), 1.5, device=timer.device)
        network = torch.compile(model(), mode="reduce-overhead") if compiled else model()

        @torch.no_grad()
        def eager():
            with torch.autocast(timer.device.type, torch.bfloat16):
                return network(z, y, w)

        calls = {
            "ours": Call(lambda: model().decode(z, y, guidance=1.5, precision="bf16"), graph=False),
            "compile" if compiled else "eager": Call(eager, graph=False),
        }
        with model().frozen() if frozen else contextlib.nullcontext():
            times = timer(calls, cold=True, seconds=3)
        return _row(times, batch, limit(batch))

    def alone(batch):
        """The device's time: the recorded pass without checks."""
        z, y = inputs(batch)
        model().decode(z, y, guidance=1.5, precision="bf16")
        times = timer({"ours": Call(model().passes.replay_last, graph=False)}, cold=True)
        return _row(times, batch, limit(batch))

    item = "one-pass reverse B/2"
    for batch in (1,) if dry else batches:
        if compiled:
            yield Case({"item": f"{item}, compiled", "batch": batch}, functools.partial(decoded, batch, True))
            continue
        yield Case({"item": item, "batch": batch}, functools.partial(decoded, batch, True))
        yield Case({"item": "  weights looked at", "batch": batch}, functools.partial(decoded, batch, False))
        if timer.device.type == "cuda":
            yield Case({"item": "  its kernels alone", "batch": batch}, functools.partial(alone, batch))


def density(
    timer: Timer, limits: list[dict], dry: bool, name: str, batches: tuple, ml_tarflow: str | None, compiled=False
) -> Iterator[Case]:
    """TarFlow.encode in bf16: z and log-determinant."""

    @functools.cache
    def flow() -> TarFlow:
        flow = TarFlow(TarFlowConfig(head_dim=64, **(FLOWS[name] | SMALL if dry else FLOWS[name])))
        flow = flow.to(timer.device).eval()
        randomize(flow)
        return flow

    @functools.cache
    def peer():
        return _peer(flow(), ml_tarflow)

    def encoded(batch, frozen):
        c = flow().config
        x = torch.randn(batch, c.in_channels, c.img_size, c.img_size, device=timer.device)

        def autocast(make):
            network = make()

            @torch.no_grad()
            def call():
                with torch.autocast(timer.device.type, torch.bfloat16):
                    return network(x)

            return Call(call, graph=False)

        @torch.no_grad()
        def ours():
            return flow().encode(x, precision="bf16")

        calls = {"ours": Call(ours, graph=False)}
        if compiled:
            calls["compile"] = lambda: autocast(lambda: torch.compile(flow(), mode="reduce-overhead"))
        else:
            calls["eager"] = lambda: autocast(flow)
        if ml_tarflow is not None:
            calls["ml-tarflow"] = lambda: autocast(peer)
        with flow().frozen() if frozen else contextlib.nullcontext():
            times = timer(calls, cold=True, seconds=3)
        return _row(times, batch, _bound(flow(), c.tokens, batch, limits))

    item = f"density {name}"
    for batch in (1,) if dry else batches:
        if compiled:
            yield Case({"item": f"{item}, compiled", "batch": batch}, functools.partial(encoded, batch, True))
            continue
        yield Case({"item": item, "batch": batch}, functools.partial(encoded, batch, True))
        yield Case({"item": "  weights looked at", "batch": batch}, functools.partial(encoded, batch, False))


def _peer(flow: TarFlow, path: str):
    """ml-tarflow's own Model with the flow's weights, unmodified: x -> z, outputs, logdets."""
    from benchmarks.peers.ml_tarflow import load_model

    return load_model(flow, path).to(flow.var.device)
