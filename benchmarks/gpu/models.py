"""Whole passes: the learned inverse and the density, as milliseconds an image, beside plain torch (peers/plain.py).

eager: weights and activations in bf16. autocast: fp32 weights under autocast, which rounds them in every call. compile:
eager's network under torch.compile, with CUDA graphs; it takes long to start: at one batch size only, in a part of its
own. Nothing is timed before its result was found within BOUND of the plain network in fp32 ("error").
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.flows import random_flow
from benchmarks.peers.ml_tarflow import load_model
from benchmarks.peers.plain import PlainDensity, PlainReverse
from biflow.models import BiFlow, BiFlowConfig, TarFlow
from biflow.models.layers import Norm
from biflow.train import flops

from .limits import Case, bound, share
from .parity import error
from .timing import Call, Timer, Times

# a reverse model for iTARFlow-B/2 (PERFORMANCE: 133 M parameters)
REVERSE = dict(
    img_size=32, in_channels=4, patch_size=2, num_blocks=8, layers_per_group=2, width=768, num_classes=1000,
    class_tokens=8, max_guidance=4.0, guidance_tokens=4,
)  # fmt: skip
REVERSE_BATCHES = (1, 64, 256)
DENSITY_BATCHES = {"B/2": (1, 64, 256), "TARFlow-64": (1, 32)}
COMPILED_BATCH = 64
SMALL = {"width": 128, "num_blocks": 2}  # a dry run's
BOUND = 5e-2  # of bf16, relative to the norm
ROWS = 4  # samples, spread over the batch, that are checked
NEEDS = {"needs": 20.0, "limit": 120.0}  # of what is compiled: seconds


def randomize(model: nn.Module) -> None:
    """Every parameter drawn, because fresh heads are zero; linear maps and norms keep the size of what they get."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator).mul_(p.shape[-1] ** -0.5 if p.dim() == 2 else 0.1)
        for norm in (m for m in model.modules() if isinstance(m, Norm)):
            norm.weight += 1


def cases(timer: Timer, limits: list[dict], dry: bool, ml_tarflow: str | None) -> Iterator[Case]:
    every = [(Reverse(timer, limits, dry), REVERSE_BATCHES)]
    every += [(Density(timer, limits, dry, name, ml_tarflow), batches) for name, batches in DENSITY_BATCHES.items()]
    for passes, batches in every:
        for batch in (2,) if dry else batches:
            yield from passes.cases(batch)


def compiled(timer: Timer, limits: list[dict], dry: bool) -> Iterator[Case]:
    for passes in (Reverse(timer, limits, dry), Density(timer, limits, dry, "B/2", None)):
        batch = 2 if dry else COMPILED_BATCH
        run = functools.partial(passes.row, batch, frozen=True, compiled=True)
        yield Case({"item": passes.item, "batch": batch}, run, **NEEDS)


class Passes:
    """The rows of one model: `ours(*inputs)` against `plain(dtype)(*inputs)`, checks and launches included."""

    item: str
    flops: int  # of an image

    def __init__(self, timer: Timer, limits: list[dict], dry: bool):
        self.timer, self.limits, self.dry = timer, limits, dry

    def cases(self, batch: int) -> Iterator[Case]:
        yield Case({"item": self.item, "batch": batch}, functools.partial(self.row, batch, frozen=True))
        yield Case({"item": "  weights looked at", "batch": batch}, functools.partial(self.row, batch, frozen=False))
        yield Case({"item": "  its kernels alone", "batch": batch}, functools.partial(self.kernels, batch))

    def row(self, batch: int, *, frozen: bool, compiled: bool = False) -> dict:
        """Only frozen weights are others' match."""
        inputs = self.inputs(batch)
        calls = {"ours": Call(lambda: self.ours(*inputs), graph=False)}
        if frozen:
            calls |= self.compiled(inputs) if compiled else self.others(inputs)
        with self.model.frozen() if frozen else contextlib.nullcontext():
            times = self.timer(calls, cold=True, seconds=3, check=self.check(inputs))
        return self._row(times, batch)

    def kernels(self, batch: int) -> dict:
        """The device's time: the recorded pass without checks, beside eager as one CUDA graph."""
        inputs = self.inputs(batch)
        ours = functools.partial(self.ours, *inputs)
        replay = self.model.passes.replay_last if self.timer.device.type == "cuda" else ours
        calls = {
            "ours": Call(replay, graph=False, result=ours),  # which records the pass, or finds it recorded
            "graph": lambda: Call(_call(self.plain(torch.bfloat16), inputs)),
        }
        with self.model.frozen():
            times = self.timer(calls, cold=True, check=self.check(inputs))
        return self._row(times, batch)

    def others(self, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Call]]:
        def eager() -> Call:
            return Call(_call(self.plain(torch.bfloat16), inputs), graph=False)

        def autocast() -> Call:
            return Call(_autocast(self.plain(torch.float32), inputs), graph=False)

        return {"eager": eager, "autocast": autocast}

    def compiled(self, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Call]]:
        """A dry run has of the compiler what is before the code generator."""
        how = {"backend": "eager"} if self.dry else {"mode": "reduce-overhead"}

        def compiled() -> Call:
            network = torch.compile(self.plain(torch.bfloat16), fullgraph=True, dynamic=False, **how)
            return Call(_call(network, inputs), graph=False)

        return {"compile": compiled}

    def check(self, inputs: tuple[Tensor, ...]) -> Callable[[object], float]:
        """Samples do not see each other."""
        batch = len(inputs[0])
        rows = torch.linspace(0, batch - 1, min(batch, ROWS), device=self.timer.device).round().long()
        want = self.compared(_call(self.plain(torch.float32), tuple(t[rows] for t in inputs))())

        def checked(got: object) -> float:
            got = tuple(t[rows] for t in got) if isinstance(got, tuple) else got[rows]
            return error(self.compared(got), want, BOUND)

        return checked

    def compared(self, result: object) -> object:
        return result

    def _row(self, times: Times, batch: int) -> dict:
        """The limit: the products at the GEMM's rate, or the bf16 weights at the copy's."""
        flops = batch * self.flops
        weights = 2 * sum(p.numel() for p in self.model.parameters())
        limit = bound(self.limits, {"bf16 GEMM": flops, "copy": weights})
        return times.row(lambda seconds: {"ms_image": seconds / batch * 1e3} | share(seconds, limit))


class Reverse(Passes):
    """BiFlow.decode in bf16, guidance trained in."""

    item = "one-pass reverse B/2"

    @functools.cached_property
    def model(self) -> BiFlow:
        model = BiFlow(BiFlowConfig(**(REVERSE | SMALL if self.dry else REVERSE))).to(self.timer.device).eval()
        randomize(model)
        return model

    @functools.cache  # noqa: B019 (as long as the part lives)
    def plain(self, dtype: torch.dtype) -> nn.Module:
        return PlainReverse(self.model, dtype).to(self.timer.device)

    @property
    def flops(self) -> int:
        return flops.inverse(self.model.config, states=False)

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        c, device = self.model.config, self.timer.device
        generator = torch.Generator(device).manual_seed(1)
        z = torch.randn(batch, c.tokens, c.channels, generator=generator, device=device)
        y = torch.randint(c.num_classes, (batch,), generator=generator, device=device)
        return z, y, torch.full((batch,), 1.5, device=device)

    def ours(self, z: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self.model.decode(z, y, guidance=1.5, precision="bf16")


class Density(Passes):
    """TarFlow.encode in bf16: z and log-determinant."""

    def __init__(self, timer: Timer, limits: list[dict], dry: bool, name: str, ml_tarflow: str | None):
        super().__init__(timer, limits, dry)
        self.name, self.item, self.path = name, f"density {name}", ml_tarflow

    @functools.cached_property
    def model(self) -> TarFlow:
        return random_flow(self.name, device=self.timer.device, **(SMALL if self.dry else {}))

    @functools.cache  # noqa: B019
    def plain(self, dtype: torch.dtype) -> nn.Module:
        return PlainDensity(self.model, dtype).to(self.timer.device)

    @property
    def flops(self) -> int:
        return flops.flow(self.model.config)

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        c, device = self.model.config, self.timer.device
        generator = torch.Generator(device).manual_seed(1)
        return (torch.randn(batch, c.in_channels, c.img_size, c.img_size, generator=generator, device=device),)

    @torch.no_grad()
    def ours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode(x, precision="bf16")

    def compared(self, result: Tensor | tuple[Tensor, Tensor]) -> object:
        """z, and the log-determinant: relative to itself or to sqrt(T D), whichever is larger, for it may be near 0."""
        if isinstance(result, Tensor):
            return result
        z, logdet = result
        return z, F.pad(logdet[:, None] / z[0].numel() ** 0.5, (0, 1), value=1.0)

    def others(self, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Call]]:
        """And ml-tarflow's own Model under autocast, as its authors run it; of its results z alone is compared."""

        def ml_tarflow() -> Call:
            call = _autocast(load_model(self.model, self.path).to(self.timer.device), inputs)
            return Call(call, graph=False, result=lambda: call()[0])

        return super().others(inputs) | ({} if self.path is None else {"ml-tarflow": ml_tarflow})


def _call(network: Callable, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return network(*inputs)

    return call


def _autocast(network: Callable, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def call() -> object:
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return plain()

    plain = _call(network, inputs)
    return call
