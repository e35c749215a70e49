"""The training loop of both stages: steps, averaged weights, validation, logs, checkpoints, resuming bit for bit."""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from biflow import checkpoint
from biflow.data import Batch, ImageData, Stream
from biflow.models.layers import device_name
from biflow.train import environment, flops, grids, runs
from biflow.train.configs import FlowTraining, InverseTraining
from biflow.train.memory import checkpoint_layers
from biflow.train.metrics import Metrics, check_writers
from biflow.train.optim import Average, DataOrder, learning_rate, make_optimizer
from biflow.train.speed import Speed, in_progress_bar

STATE_KIND = "training state"
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
        """Before the first step of a sitting, with the run's folder there: make or read what the loss needs."""
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
        """x (B,C,H,W) clean, y (B,) or None -> (scalar loss, terms to log). training: drop labels, move buffers.

        rows: (B,) of the N training images, i of image i, N + i of it mirrored; None: held-out ones.
        """
        ...


class Trainer:
    """One run. The state that a checkpoint holds: weights, moments, averaged weights, step, generator, log sums."""

    def __init__(
        self, model: nn.Module, objective: Objective, data: ImageData, config: FlowTraining | InverseTraining, out: Path
    ):
        self.config, self.objective, self.data, self.out = config, objective, data, out
        self.device = config.run.torch_device()
        self.mapping = {"stage": objective.stage, **checkpoint.to_mapping(config)}
        self.model = model.to(self.device).train()
        self.average = Average(self.model, config.optim.ema)
        if config.run.activation_checkpointing:
            checkpoint_layers(self.model)
        if config.run.compile:
            self.model.compile(fullgraph=True, dynamic=False)
        self.own = objective.module.to(self.device).train()
        self.optimizer = make_optimizer(self.model, config.optim, self.own)
        self.order = DataOrder(len(data.train_x), config.optim.batch_size, config.run.seed)
        self.stream = Stream(data.train_x, self.order.indices, config.optim.steps, seed=config.run.seed)
        self.generator = torch.Generator(self.device).manual_seed(config.run.seed)
        peak = config.run.peak_flops or flops.peak(device_name(self.device), config.run.precision)
        self.speed = Speed(config.optim.batch_size, config.optim.batch_size * objective.flops, peak)
        self.step = 0
        self.seconds = 0.0
        self.window: dict[str, float] = {}  # sums of what is logged as means, over the steps since the last log

    def run(self, resume: bool, progress: bool) -> nn.Module:
        """Train to the last step; returns the averaged model.

        Errors: `check_writers`, `runs.prepare`, FloatingPointError.
        """
        check_writers(self.config.run)
        runs.prepare(self.out, self.mapping, resume)
        self.objective.prepare(self.out, progress)
        self._restore_newest()
        runs.cut_metrics(self.out, self.step)
        environment.record(self.out, self.step, self.device)
        started = time.perf_counter() - self.seconds
        steps = self.config.optim.steps
        tqdm.set_lock(threading.RLock())  # the default is a semaphore of the system, which a killed process leaks
        shown: dict[str, Any] = {}
        bar = tqdm(total=steps, initial=self.step, desc=self.objective.stage, unit="step", disable=not progress)
        with (
            runs.delayed_signals() as signals,
            Metrics(self.out, self.step, self.config.run, self.mapping) as log,
            contextlib.closing(self.stream),
            bar,
        ):
            while self.step < steps and not signals:
                with self.speed.step():
                    self._train_step()
                self.seconds = time.perf_counter() - started
                for line in self._reports():
                    log.write(line)
                    shown |= in_progress_bar(line)
                    bar.set_postfix(shown, refresh=False)
                bar.update()
                if self._due(self.config.run.checkpoint_every) or signals:
                    log.sync()
                    self.save()
                if self.config.run.sample_every is not None and self._due(self.config.run.sample_every):
                    log.image(grids.draw(self.average.model, self.config.run, self.out, self.step), self.step)
        if self.data.corrupt:
            text = f"{len(self.data.corrupt)} corrupt images were met and replaced: {self.out / 'corrupt.txt'}"
            tqdm.write(f"biflow: {text}", file=sys.stderr)
        if self.step == steps:
            self._save_result(self.out / "model.safetensors")
        if signals:
            text = f"stopped by a signal at step {self.step} of {steps}, after writing a checkpoint to resume from"
            if signals[0] == signal.SIGINT:
                raise KeyboardInterrupt(text)
            tqdm.write(f"biflow: {text}", file=sys.stderr)  # the exit code takes the place of SystemExit's text
            raise SystemExit(128 + signals[0])
        return self.average.model

    def _save_result(self, path: Path) -> None:
        """Write the averaged model, unless it is there: what was added to the file since, a policy say, stays."""
        try:
            written = checkpoint.fingerprint(checkpoint.load(path))
        except (FileNotFoundError, ValueError):
            written = None
        if written != checkpoint.fingerprint(self.average.model):
            checkpoint.save(self.average.model, path, self._about())

    def _about(self) -> dict[str, Any]:
        """The metadata of model files: of a flow of latents also what decodes them."""
        return {"step": self.step, **({} if self.data.latents is None else {"latents": self.data.latents})}

    def save(self) -> None:
        """Write checkpoints/step_XXXXXXXX/{model,state}.safetensors."""

        def fill(folder: Path) -> None:
            tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
            tensors |= {f"{OWN}{k}": v for k, v in self.own.state_dict().items()}
            for name, parameter in self._parameters():
                tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
            tensors["generator"] = self.generator.get_state()
            metadata = {"step": self.step, "seconds": self.seconds, "window": self.window, **self.objective.identity}
            if self.data.fingerprint is not None:
                metadata["data_sha256"] = self.data.fingerprint
            checkpoint.write(folder / "state.safetensors", STATE_KIND, tensors, self.mapping, metadata)
            checkpoint.save(self.average.model, folder / "model.safetensors", self._about())

        if self.data.corrupt:
            self.data.corrupt.write(self.out / "corrupt.txt")
        runs.write_checkpoint(self.out, self.step, fill, self.config.run.keep)

    def restore(self, state: checkpoint.Contents, average: nn.Module) -> None:
        """Continue from what a checkpoint holds. ValueError: it is of a run with another configuration."""
        found = {**runs.with_defaults(state.config), **state.metadata}
        runs.check_same(found, {**self.mapping, **self.objective.identity}, str(self.out))
        tensors, metadata = state.tensors, state.metadata
        if metadata.get("data_sha256", self.data.fingerprint) != self.data.fingerprint:
            raise ValueError(
                f"{self.out}: expected the images of {self.config.data.source} that the run began with, got others "
                "(names, labels or what is left out have changed): the order of the epoch would be another"
            )
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.own.load_state_dict({k[len(OWN) :]: v for k, v in tensors.items() if k.startswith(OWN)})
        self.average.model.load_state_dict(average.state_dict())
        for name, parameter in self._parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            if keys:  # a parameter that had no gradient yet has no moments
                self.optimizer.state[parameter] = {k: tensors[f"{k}.{name}"].to(self.device) for k in keys}
        self.generator.set_state(tensors["generator"])
        self.step, self.seconds, self.window = metadata["step"], metadata["seconds"], metadata["window"]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and terms of the averaged weights on held-out images, with the same noise every time."""
        count, limit = len(self.data.val_x), self.config.run.validate_images
        chosen = torch.linspace(0, count - 1, min(count, limit), dtype=torch.float64).round().long()
        generator = torch.Generator(self.device).manual_seed(VALIDATION_SEED)
        sums: dict[str, float] = {}
        parts = chosen.split(self.config.optim.batch_size)
        with contextlib.closing(Stream(self.data.val_x, parts.__getitem__, len(parts))) as stream:
            for part, indices in enumerate(parts):
                x, y = self._images(stream.read(part), self.data.val_y)
                with self._autocast():
                    loss, terms = self.objective.loss(self.average.model, x, y, generator, training=False)
                for name, value in {"loss": loss, **terms}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(indices) / len(chosen)
        return sums

    def _train_step(self) -> None:
        optim = self.config.optim
        rate = learning_rate(self.step, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.speed.data():
            batch = self.stream.read(self.step)
        x, y = self._images(batch, self.data.train_y)
        rows = batch.indices
        if batch.turned is not None:  # the data has mirrored images of its own
            rows = rows + len(self.data.train_x) * batch.turned
        elif self.config.data.flip:
            turned = torch.rand(len(x), generator=self.generator, device=self.device) < 0.5
            x = torch.where(turned.view(-1, 1, 1, 1), x.flip(-1), x)
            rows = rows.to(self.device) + len(self.data.train_x) * turned
        with self._autocast():
            loss, terms = self.objective.loss(self.model, x, y, self.generator, training=True, rows=rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [parameter for _, parameter in self._parameters()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip or math.inf)
        values = {"loss": float(loss.detach()), **{k: float(v) for k, v in terms.items()}, "grad_norm": float(norm)}
        if self.data.corrupt is not None:
            values["replaced"] = float(batch.replaced)
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
        return self.data.train_x.quantisation.values(batch.pixels.to(self.device)), y

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    def _restore_newest(self) -> None:
        """Continue from the newest checkpoint that can be read, if there is one."""
        unreadable = []
        for folder in runs.checkpoints(self.out):
            try:
                state = checkpoint.read(folder / "state.safetensors")
                if state.kind != STATE_KIND:
                    raise ValueError(f"{folder}: expected a training state, got {state.kind!r}")
                average = checkpoint.load(folder / "model.safetensors", self.device)
            except (OSError, ValueError) as error:
                unreadable.append(str(error))
                continue
            self.restore(state, average)
            break
        else:
            if unreadable:
                raise ValueError(f"{self.out}: no checkpoint of the run can be read: {'; '.join(unreadable)}")
        for reason in unreadable:
            tqdm.write(f"biflow: continuing from step {self.step}, an older checkpoint: {reason}", file=sys.stderr)


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
