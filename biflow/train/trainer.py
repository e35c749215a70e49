"""The training loop of both stages: steps, averaged weights, validation, logs, checkpoints, resuming bit for bit."""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from biflow import checkpoint, distributed
from biflow.data import Batch, ImageData, Stream, kind_of
from biflow.models.layers import device_name
from biflow.train import environment, flops, grids, runs
from biflow.train.configs import FlowTraining, InverseTraining
from biflow.train.distributed import Losses, rows_of, spread
from biflow.train.draws import BatchGenerator, draw_rows
from biflow.train.memory import checkpoint_layers
from biflow.train.metrics import Metrics, check_writers
from biflow.train.optim import Average, DataOrder, learning_rate, make_optimizer
from biflow.train.speed import Speed, in_progress_bar

STATE_KIND = "training state"
HASHES = set(runs.GUARDED_FIELDS.values())
SHARDS = "shards"  # what the metadata of a sharded state says of them
OWN = "objective."  # what names of the objective's own parameters begin with in a state
VALIDATION_SEED = 0x5EED  # its noise is the same in every validation


class Objective(Protocol):
    """A stage: its name, the model class's loss, and what else must not change when a run is resumed.

    module: what is trained beside the model and kept in training states only, without averaged weights; may be empty.
    flops: model FLOPs of a training step an image.
    """

    stage: str
    identity: dict[str, Any]
    module: nn.Module
    flops: int

    def prepare(self, out: Path, progress: bool) -> None:
        """Before the first step of a sitting, with the run's folder there: make or read what the loss needs.

        All processes call it together.
        """
        ...

    def loss(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor | None,
        generator: torch.Generator,
        *,
        training: bool,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B,C,H,W) clean, y (B,) or None -> (scalar loss, terms to log), means over rows. training: drop labels.

        generator: by `draw_rows`. rows: (B,) of the N training images, i of image i, N + i of it mirrored; None:
        held-out ones.
        """
        ...

    def settle(self, model: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
        """Once a step, after its last gradient: move what no gradient moves. mean: of a tensor over processes."""
        ...


class Trainer:
    """One run. The state that a checkpoint holds: weights, moments, averaged weights, step, generator, log sums."""

    def __init__(
        self, model: nn.Module, objective: Objective, data: ImageData, config: FlowTraining | InverseTraining, out: Path
    ):
        self.config, self.objective, self.data, self.out = config, objective, data, out
        self.data_sha256 = data.digest()
        self.processes = distributed.join(config.run.torch_device())
        self.processes.wait()  # the others may still be reading what the main one read first
        self.parallel = spread(config.parallel, self.processes, config.optim.batch_size)
        self.device = self.processes.device
        self.dtype = config.run.torch_dtype
        self.mapping = {"stage": objective.stage, **checkpoint.to_mapping(config)}
        self.model = model.to(self.device, self.dtype).train()
        self.average = Average(self.model, config.optim.ema)
        if config.run.activation_checkpointing:
            checkpoint_layers(self.model)
        if config.run.compile:
            self.model.compile(fullgraph=True, dynamic=False)
        self.own = objective.module.to(self.device, self.dtype).train()
        self.losses = self.parallel.trained(Losses(self.model, objective, trained=True))
        self.averaged_losses = self.parallel.averaged(Losses(self.average.model, objective, trained=False))
        self.optimizer = make_optimizer(self.model, config.optim, self.own)
        self.order = DataOrder(len(data.train_x), config.optim.batch_size, config.run.seed)
        indices = rows_of(self.order.indices, self.parallel.own)
        self.stream = Stream(data.train_x, indices, config.optim.steps, seed=config.run.seed)
        self.generator = BatchGenerator(self.device).manual_seed(config.run.seed)
        peak = config.run.peak_flops or flops.peak(device_name(self.device), config.run.precision)
        peak = None if peak is None else peak * self.processes.count
        self.speed = Speed(config.optim.batch_size, config.optim.batch_size * objective.flops, peak)
        self.step = 0
        self.signals: list[int] = []  # that came to this process
        self.stop = 0  # the one by which all stop
        self.seconds = 0.0
        self.window: dict[str, float] = {}  # sums of what is logged as means, over the steps since the last log

    def run(self, resume: bool, progress: bool) -> nn.Module:
        """Train to the last step; returns the averaged model.

        Errors: `check_writers`, `runs.prepare`, FloatingPointError.
        """
        main = self.processes.main
        check_writers(self.config.run)
        if main and self.device.type == "cpu" and torch.cuda.is_available():
            tqdm.write("biflow: training on the CPU; run.device=cuda takes the GPU", file=sys.stderr)
        with self.processes.main_first():
            pixels = grids.pixels_of(self.config.run, self.data) if main else None
            if main:
                runs.prepare(self.out, self.mapping, resume)
        self.objective.prepare(self.out, progress and main)
        self._restore_newest()
        if main:
            runs.write_config(self.out, self.mapping)
            runs.cut_metrics(self.out, self.step)
            environment.record(self.out, self.step, self.device)
        started = time.perf_counter() - self.seconds
        steps = self.config.optim.steps
        tqdm.set_lock(threading.RLock())  # the default is a semaphore of the system, which a killed process leaks
        shown: dict[str, Any] = {}
        bar = tqdm(
            total=steps, initial=self.step, desc=self.objective.stage, unit="step", disable=not (progress and main)
        )
        with (
            runs.delayed_signals() as self.signals,
            Metrics(self.out, self.step, self.config.run, self.mapping) if main else contextlib.nullcontext() as log,
            contextlib.closing(self.stream),
            bar,
        ):
            self._means({})  # a signal may have come already
            while self.step < steps and not self.stop:
                with self.speed.step():
                    self._train_step()
                self.seconds = time.perf_counter() - started
                for line in self._reports():
                    if main:
                        log.write(line)
                    shown |= in_progress_bar(line)
                    bar.set_postfix(shown, refresh=False)
                bar.update()
                if self._due(self.config.run.checkpoint_every) or self.stop:
                    if main:
                        log.sync()
                    self.save()
                if self.config.run.sample_every is not None and self._due(self.config.run.sample_every):
                    average = self.parallel.whole_model(self.average.model, keep=main)
                    with self.processes.main_first():  # the others wait, however long a flow takes to decode
                        if main:
                            log.image(grids.draw(average, self.config.run, self.out, self.step, pixels), self.step)
        if self.data.corrupt and main:
            text = f"{len(self.data.corrupt)} corrupt images were met and replaced: {self.out / 'corrupt.txt'}"
            tqdm.write(f"biflow: {text}", file=sys.stderr)
        model = self.parallel.whole_model(self.average.model, keep=self.step == steps)
        if self.step == steps and main:
            self._save_result(model, self.out / "model.safetensors")
        self.processes.wait()
        if self.stop:
            text = f"stopped by a signal at step {self.step} of {steps}, after writing a checkpoint to resume from"
            if self.stop == signal.SIGINT:
                raise KeyboardInterrupt(text)
            if main:
                tqdm.write(f"biflow: {text}", file=sys.stderr)  # the exit code takes the place of SystemExit's text
            raise SystemExit(128 + self.stop)
        return model.to(self.device)

    def _means(self, values: dict[str, float]) -> dict[str, float]:
        """The values' means over processes. With them goes which signals have come: `stop` is the same on all."""
        came = {number.name: float(self.signals[:1] == [number]) for number in runs.SIGNALS}
        means = self.parallel.mean(values | came)
        self.stop = max(int(number) if means.pop(number.name) else 0 for number in runs.SIGNALS)
        return means

    def _save_result(self, model: nn.Module, path: Path) -> None:
        """Write the averaged model, unless it is there: what was added to the file since, a policy say, stays."""
        try:
            written = checkpoint.fingerprint(checkpoint.load(path))
        except (FileNotFoundError, ValueError):
            written = None
        if written != checkpoint.fingerprint(model):
            checkpoint.save(model, path, self._about())

    def _about(self) -> dict[str, Any]:
        """The metadata of model files: of a flow of latents also what decodes them."""
        return {"step": self.step, **({} if self.data.latents is None else {"latents": self.data.latents})}

    def save(self) -> None:
        """Write checkpoints/step_XXXXXXXX/{model,state}.safetensors, and shards/ of a sharded run."""
        main = self.processes.main

        def fill(folder: Path) -> None:
            tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
            tensors |= {f"{OWN}{k}": v for k, v in self.own.state_dict().items()}
            for name, parameter in self._parameters():
                tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
            tensors["generator"] = self.generator.get_state()
            metadata = {"step": self.step, "seconds": self.seconds, "window": self.window, **self.objective.identity}
            metadata["data_sha256"] = self.data_sha256
            tensors, shards = self.parallel.write_shards(folder, tensors)
            metadata |= {SHARDS: shards} if shards else {}
            average = self.parallel.whole_model(self.average.model, keep=main)
            if main:
                checkpoint.write(folder / "state.safetensors", STATE_KIND, tensors, self.mapping, metadata)
                checkpoint.save(average, folder / "model.safetensors", self._about())

        if self.data.corrupt is not None:
            self.data.corrupt.reasons.update(self.processes.gather(list(self.data.corrupt.reasons.items())))
            if main and self.data.corrupt:
                self.data.corrupt.write(self.out / "corrupt.txt")
        runs.write_checkpoint(self.out, self.step, fill, self.config.run.keep, self.processes)

    def restore(self, state: checkpoint.Contents, average: nn.Module, folder: Path) -> None:
        """Continue from what a checkpoint holds. ValueError: it is of a run with another configuration."""
        tensors, metadata = state.tensors, state.metadata
        found = {**runs.with_defaults(state.config), **metadata}
        # a run of before there was a hash goes on with the paths that it has
        identity = {k: v for k, v in self.objective.identity.items() if k in metadata or k not in HASHES}
        free = {name for name, guard in runs.GUARDED_FIELDS.items() if guard in metadata}
        if kind_of(self.config.data.source) == "table":  # of its rows only labels are hashed
            free.discard("data.source")
        runs.check_same(found, {**self.mapping, **identity}, str(self.out), free)
        if metadata.get("data_sha256", self.data_sha256) != self.data_sha256:
            raise ValueError(
                f"{self.out}: expected the images of {found['data']['source']} that the run began with, got others in "
                f"{self.config.data.source} (arrays, names, labels or what is left out differ): the order of the epoch "
                "would be another"
            )
        like = {f"model.{k}": p for k, p in self.model.named_parameters()}
        like |= {f"{OWN}{k}": p for k, p in self.own.named_parameters()}
        like |= {f"{key}.{name}": p for name, p in self._parameters() for key in ("exp_avg", "exp_avg_sq")}
        if SHARDS in metadata:
            tensors |= self.parallel.read_shards(folder, metadata[SHARDS], like)
        tensors = {name: self.parallel.placed(tensor, like.get(name)) for name, tensor in tensors.items()}
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.own.load_state_dict({k[len(OWN) :]: v for k, v in tensors.items() if k.startswith(OWN)})
        means = dict(self.average.model.named_parameters())
        found = average.state_dict()
        self.average.model.load_state_dict({k: self.parallel.placed(v, means.get(k)) for k, v in found.items()})
        for name, parameter in self._parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            if keys:  # a parameter that had no gradient yet has no moments
                self.optimizer.state[parameter] = {k: tensors[f"{k}.{name}"].to(self.device) for k in keys}
        self.step, self.seconds, self.window = metadata["step"], metadata["seconds"], metadata["window"]
        if len(tensors["generator"]) == len(self.generator.get_state()):
            self.generator.set_state(tensors["generator"])
        else:  # of another kind of device: from here on other noise
            self.generator.manual_seed((self.config.run.seed * 1_000_003 + self.step) % 2**63)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and terms of the averaged weights on held-out images, with the same noise every time."""
        count, limit = len(self.data.val_x), self.config.run.validate_images
        chosen = torch.linspace(0, count - 1, min(count, limit), dtype=torch.float64).round().long()
        generator = BatchGenerator(self.device).manual_seed(VALIDATION_SEED)
        total: Tensor | float = 0.0
        parts = chosen.split(self.config.optim.batch_size)
        shares = [self.processes.split(len(part)) for part in parts]
        own = [share or range(1) for share in shares]  # nobody has no rows: sharded weights are gathered by all
        read = [part[rows.start : rows.stop] for part, rows in zip(parts, own, strict=True)]
        with contextlib.closing(Stream(self.data.val_x, read.__getitem__, len(read))) as stream:
            for part, (share, rows) in enumerate(zip(shares, own, strict=True)):
                x, y = self._images(stream.read(part), self.data.val_y)
                generator.part = (rows.start, len(parts[part])) if self.processes.count > 1 else None
                with self._autocast():
                    loss, terms = self.averaged_losses(x, y, generator, training=False)
                terms = {"loss": loss, **terms}
                total = total + _stacked(terms.values()) * len(share) / len(chosen)
        sums = dict(zip(terms, total.tolist(), strict=True))
        return {name: value * self.processes.count for name, value in self.parallel.mean(sums).items()}

    def _train_step(self) -> None:
        """A step. Between the loss and the optimizer the host waits for the device, once, and for all processes: what
        is not finite must not reach the weights. What else it waits for: docs/distributed.md."""
        optim = self.config.optim
        rate = learning_rate(self.step, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.speed.data():
            batch = self.stream.read(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total: Tensor | float = 0.0
        for part in self.parallel.micro_batches(self.losses, self.generator):
            loss, terms = self._loss(batch.part(part))
            (loss / self.parallel.accumulate).backward()
            terms = {"loss": loss.detach(), **terms}
            total = total + _stacked(terms.values()) / self.parallel.accumulate
        self.objective.settle(self.model, self.parallel.mean_tensor)
        norm = self.parallel.clip([parameter for _, parameter in self._parameters()], optim.grad_clip)
        *found, norm = torch.cat([total, _stacked([norm])]).tolist()
        values = dict(zip(terms, found, strict=True))
        if self.data.corrupt is not None:
            values["replaced"] = float(batch.replaced * self.processes.count)  # a sum over processes
        values = {**self._means(values), "grad_norm": norm}
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if bad:
            raise FloatingPointError(
                f"step {self.step + 1}: {bad[0]} is {values[bad[0]]}; training stopped, the checkpoints before it are "
                f"intact in {self.out / 'checkpoints'}. A lower optim.lr, a clip or more noise usually helps"
            )
        self.optimizer.step()
        self.average.update(self.model, self.step)
        self.step += 1
        for name, value in {**values, "count": 1.0}.items():
            self.window[name] = self.window.get(name, 0.0) + value

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`Objective.loss` of training images, half of them mirrored where the data is flipped."""
        x, y = self._images(batch, self.data.train_y)
        rows = batch.indices
        if batch.turned is not None:  # the data has mirrored images of its own
            rows = rows + len(self.data.train_x) * batch.turned
        elif self.config.data.flip:
            turned = draw_rows(torch.rand, (len(x),), self.generator, device=self.device) < 0.5
            x = torch.where(turned.view(-1, 1, 1, 1), x.flip(-1), x)
            rows = rows.to(self.device) + len(self.data.train_x) * turned
        with self._autocast():
            return self.losses(x, y, self.generator, training=True, rows=rows)

    def _reports(self) -> Iterator[dict[str, Any]]:
        """The lines for metrics.jsonl that are due after this step."""
        if self._due(self.config.run.log_every):
            count = self.window.pop("count")
            means = {name: total / count for name, total in self.window.items()}
            self.window = {}
            values = {**means, "lr": self.optimizer.param_groups[0]["lr"], **self.speed.report()}
            yield {"step": self.step, "split": "train", **values, "seconds": round(self.seconds, 3)}
        if self._due(self.config.run.validate_every) and len(self.data.val_x):
            values = {k: v if math.isfinite(v) else None for k, v in self.validate().items()}
            yield {"step": self.step, "split": "val", **values, "seconds": round(self.seconds, 3)}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All that is trained, by its name in a state."""
        yield from self.model.named_parameters()
        yield from self.own.named_parameters(OWN[:-1])

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.optim.steps

    def _images(self, batch: Batch, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = None if labels is None or not self.config.model.num_classes else labels[batch.indices].to(self.device)
        return self.data.train_x.quantisation.values(batch.pixels.to(self.device)).to(self.dtype), y

    def _autocast(self) -> torch.autocast:
        options = {"enabled": self.config.run.precision == "bf16", "cache_enabled": self.parallel.keeps_casts}
        return torch.autocast(self.device.type, torch.bfloat16, **options)

    def _restore_newest(self) -> None:
        """Continue from the newest checkpoint that all processes can read, if there is one."""
        unreadable = []
        for folder in self.processes.same(runs.checkpoints(self.out)):
            problem = ""
            try:
                state = checkpoint.read(folder / "state.safetensors")
                if state.kind != STATE_KIND:
                    raise ValueError(f"{folder}: expected a training state, got {state.kind!r}")
                average = checkpoint.load(folder / "model.safetensors")
                if SHARDS in state.metadata:
                    self.parallel.check_shards(folder, state.metadata[SHARDS])
            except (OSError, ValueError) as error:
                problem = str(error)
            problems = list(filter(None, self.processes.gather([problem])))
            if problems:
                unreadable.append(problems[0])
                continue
            self.restore(state, average, folder)
            break
        else:
            if unreadable:
                raise ValueError(f"{self.out}: no checkpoint of the run can be read: {'; '.join(unreadable)}")
        for reason in unreadable if self.processes.main else ():
            tqdm.write(f"biflow: continuing from step {self.step}, an older checkpoint: {reason}", file=sys.stderr)


def _stacked(values: Iterable[Tensor]) -> Tensor:
    """Scalars as one fp64 tensor where they are."""
    return torch.stack([value.detach().to(torch.float64) for value in values])


def fit(
    model: nn.Module,
    objective: Objective,
    data: ImageData,
    config: FlowTraining | InverseTraining,
    out: str | Path,
    *,
    resume: bool,
    progress: bool,
) -> nn.Module:
    """Run a stage with `config.run.threads` CPU threads; returns the averaged model in eval mode."""
    threads = torch.get_num_threads()
    try:
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        return Trainer(model, objective, data, config, Path(out)).run(resume, progress)
    finally:
        torch.set_num_threads(threads)


def check_data(data: ImageData, img_size: int, in_channels: int, num_classes: int) -> None:
    """ValueError unless the model's images and classes are the data's (a model may ignore labels: num_classes = 0)."""
    if (img_size, in_channels) != (data.img_size, data.channels):
        raise ValueError(
            f"model: expected img_size {data.img_size} and in_channels {data.channels} as the data has, "
            f"got {img_size} and {in_channels}"
        )
    if num_classes not in (0, data.num_classes):
        raise ValueError(f"model.num_classes: expected {data.num_classes} (as the data) or 0, got {num_classes}")
