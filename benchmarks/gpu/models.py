"""Whole passes: the learned inverse and the density, as milliseconds an image; an eager step of the exact inverse."""

import torch

from biflow.evaluate.eager import eager_decode_block
from biflow.models import BiFlow, BiFlowConfig, TarFlow, TarFlowConfig

from .limits import rate
from .timing import Call, Timer

# iTARFlow-B/2 and TARFlow-64, and a reverse model for the former (PERFORMANCE: 133 M parameters)
FLOWS = {
    "B/2": dict(img_size=32, in_channels=4, patch_size=2, width=768, num_blocks=8, layers_per_block=2),
    "TARFlow-64": dict(img_size=64, in_channels=3, patch_size=2, width=768, num_blocks=8, layers_per_block=8),
}
REVERSE = dict(
    img_size=32, in_channels=4, patch_size=2, num_blocks=8, layers_per_group=2, width=768, num_classes=1000,
    class_tokens=8, max_guidance=4.0, guidance_tokens=4,
)  # fmt: skip
REVERSE_BATCHES = (1, 64, 256)
DENSITY_BATCHES = {"B/2": (1, 64, 256), "TARFlow-64": (1, 32)}
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


def run(timer: Timer, limits: list[dict], dry: bool, ml_tarflow: str | None) -> list[dict]:
    return [*reverse(timer, limits, dry), *density(timer, limits, dry, ml_tarflow), *eager_step(timer, dry)]


def _row(item: str, batch: int, times: dict[str, float], limit_seconds: float) -> dict:
    ours = times["ours"]
    row = {"item": item, "batch": batch, "ms_image": ours / batch * 1e3, "percent_of_limit": 100 * limit_seconds / ours}
    return row | {f"x_{name}": t / ours for name, t in times.items() if name != "ours"}


def _limit(model: torch.nn.Module, tokens: int, batch: int, limits: list[dict]) -> float:
    """Seconds: the products at the GEMM's rate, or the bf16 weights at the copy's."""
    arithmetic = batch * linear_flops(model, tokens) / rate(limits, "bf16 GEMM")
    return max(arithmetic, 2 * sum(p.numel() for p in model.parameters()) / rate(limits, "copy"))


def reverse(timer: Timer, limits: list[dict], dry: bool) -> list[dict]:
    """BiFlow.decode in bf16, guidance trained in. Timed as users call it: checks and launches included."""
    model = BiFlow(BiFlowConfig(**(REVERSE | SMALL if dry else REVERSE))).to(timer.device).eval()
    randomize(model)
    c, rows = model.config, []
    for batch in (1,) if dry else REVERSE_BATCHES:
        z = torch.randn(batch, c.tokens, c.channels, device=timer.device)
        y = torch.randint(c.num_classes, (batch,), device=timer.device)
        w = torch.full((batch,), 1.5, device=timer.device)
        autocast = torch.autocast(timer.device.type, torch.bfloat16)

        @torch.no_grad()
        def eager(z=z, y=y, w=w, autocast=autocast):
            with autocast:
                return model(z, y, w)

        calls = {
            "ours": Call(lambda z=z, y=y: model.decode(z, y, guidance=1.5, precision="bf16"), graph=False),
            "eager": Call(eager, graph=False),
        }
        if batch == 64:
            calls["compile"] = Call(torch.compile(eager, mode="reduce-overhead"), graph=False)
        with model.passes.frozen():
            times = timer(calls, cold=True, seconds=4)
        tokens = c.tokens + c.class_tokens + c.guidance_tokens
        rows.append(_row("one-pass reverse B/2", batch, times, _limit(model, tokens, batch, limits)))
        # the device's time alone: the recorded pass without checks
        if timer.device.type == "cuda":
            graph = next(reversed(model.passes._graphs.values()))[1]
            alone = timer({"ours": Call(graph.replay, graph=False)}, cold=True)
            rows.append(_row("  its kernels alone", batch, alone, _limit(model, tokens, batch, limits)))
    return rows


def density(timer: Timer, limits: list[dict], dry: bool, ml_tarflow: str | None) -> list[dict]:
    """TarFlow.encode in bf16: z and log-determinant."""
    rows = []
    for name, batches in DENSITY_BATCHES.items():
        flow = TarFlow(TarFlowConfig(head_dim=64, **(FLOWS[name] | SMALL if dry else FLOWS[name])))
        flow = flow.to(timer.device).eval()
        randomize(flow)
        c = flow.config
        peer = _peer(flow, ml_tarflow)
        for batch in (1,) if dry else batches:
            x = torch.randn(batch, c.in_channels, c.img_size, c.img_size, device=timer.device)

            @torch.no_grad()
            def autocast(f, x=x):
                with torch.autocast(timer.device.type, torch.bfloat16):
                    return f(x)

            @torch.no_grad()
            def ours(x=x, flow=flow):
                return flow.encode(x, precision="bf16")

            calls = {"ours": Call(ours, graph=False), "eager": Call(lambda f=flow, a=autocast: a(f), graph=False)}
            if peer is not None:
                calls["ml-tarflow"] = Call(lambda a=autocast, p=peer: a(p), graph=False)
            with flow.frozen():
                times = timer(calls, cold=True, seconds=4)
            rows.append(_row(f"density {name}", batch, times, _limit(flow, c.tokens, batch, limits)))
        del flow, peer
    return rows


def _peer(flow: TarFlow, path: str | None):
    """ml-tarflow's own Model with the flow's weights, unmodified: x -> z, outputs, logdets."""
    if path is None:
        return None
    from benchmarks.peers.ml_tarflow import load_model

    return load_model(flow, path).to(flow.var.device)


def eager_step(timer: Timer, dry: bool) -> list[dict]:
    """One token of the exact inverse of a B/2 block as eager torch makes it, a cache that grows by concatenation."""
    flow = TarFlow(TarFlowConfig(head_dim=64, **(FLOWS["B/2"] | SMALL | {"img_size": 8} if dry else FLOWS["B/2"])))
    randomize(flow)
    block, rows = flow.blocks[0].to(timer.device), []
    for batch in (1,) if dry else (1, 64):
        z = torch.randn(batch, block.tokens, block.config.channels, device=timer.device)
        with torch.autocast(timer.device.type, torch.bfloat16):
            seconds = timer({"step": Call(lambda z=z: eager_decode_block(block, z), graph=False)}, cold=True, seconds=1)
        rows.append({"item": "eager step B/2", "batch": batch, "us_step": seconds["step"] / block.tokens * 1e6})
    return rows
