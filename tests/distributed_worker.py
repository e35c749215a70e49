"""What tests/test_distributed.py runs under torchrun: `distributed_worker.py FOLDER JOB...`, one after the other."""

import dataclasses
import datetime
import functools
import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_representation import aligned
from tiny_training import changed, flow_config, interrupted, inverse_config, random_flow

from biflow import cli, distributed, train
from biflow.train import FlowTraining, InverseTraining, ParallelConfig, feature_cache, trainer

STEPS, INVERSE_STEPS = 20, 6


def flow(folder: Path, strategy: str = "ddp", accumulate: int = 1, every: int = 1) -> FlowTraining:
    """A shift_only flow (its prior variance moves by the whole batch) in fp64, with checkpoints every few steps."""
    options = {"checkpoint_every": every, "validate_every": 5, "keep": 30, "precision": "fp64"}
    config = flow_config(folder / "images.npz", STEPS, every=1, **options)
    return dataclasses.replace(
        changed(config, "model", shift_only=True), parallel=ParallelConfig(strategy=strategy, accumulate=accumulate)
    )


def inverse(folder: Path, strategy: str = "ddp", accumulate: int = 1) -> InverseTraining:
    """With guidance, a pass without gradients in each step."""
    config = inverse_config(folder / "images.npz", INVERSE_STEPS, every=1, keep=30, precision="fp64")
    return dataclasses.replace(config, parallel=ParallelConfig(strategy=strategy, accumulate=accumulate))


def naive(folder: Path, **options) -> InverseTraining:
    """Heads that no term reaches."""
    return changed(inverse(folder, **options), "alignment", strategy="naive")


def train_inverse(config: InverseTraining, folder: Path, name: str) -> None:
    train.train_inverse(config, random_flow(flow_config(folder).model), folder / name, progress=False)


def at_step(step: int | None, rank: int | None, act) -> None:
    """Let that process call `act(trainer)` before its step; None: all of them, before all."""
    original = trainer.Trainer._train_step

    def patched(self):
        if step is None or (self.step + 1, self.processes.rank) == (step, rank):
            act(self)
        original(self)

    trainer.Trainer._train_step = patched


def ddp(folder):
    train.train_flow(flow(folder), folder / "ddp", progress=False)


def fsdp(folder):
    """The run of `ddp` from step 4 on, sharded; then the second half of that again."""
    with distributed.join().main_first():
        if distributed.join().main:
            interrupted(folder / "ddp", folder, 4).rename(folder / "fsdp")
    config = flow(folder, "fsdp", accumulate=2)
    train.train_flow(config, folder / "fsdp", resume=True, progress=False)
    with distributed.join().main_first():
        if distributed.join().main:
            interrupted(folder / "fsdp", folder, 12).rename(folder / "fsdp_again")
            shutil.copytree(folder / "fsdp_again", folder / "fsdp_alone")
    train.train_flow(config, folder / "fsdp_again", resume=True, progress=False)


def inverses(folder):
    train_inverse(inverse(folder, "ddp", accumulate=2), folder, "inverse_ddp")
    train_inverse(inverse(folder, "fsdp", accumulate=2), folder, "inverse_fsdp")
    train_inverse(naive(folder), folder, "naive_ddp")
    train_inverse(naive(folder, strategy="fsdp"), folder, "naive_fsdp")


def stopped(folder):
    """SIGTERM for one process: all stop after the same step."""
    at_step(7, 1, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    try:
        train.train_flow(flow(folder, every=5), folder / "stopped", progress=False)
    except SystemExit as stop:
        said = f"exit code {stop.code}"
    (folder / f"stopped_{distributed.join().rank}").write_text(said)


def not_finite(folder):
    """A loss of NaN in one process: all stop."""

    def spoil(run):
        run.objective.loss = lambda *given, loss=run.objective.loss, **options: (
            loss(*given, **options)[0] * float("nan"),
            {},
        )

    at_step(3, 1, spoil)
    try:
        train.train_flow(flow(folder), folder / "not_finite", progress=False)
    except FloatingPointError as error:
        said = str(error)
    (folder / f"not_finite_{distributed.join().rank}").write_text(said)


def does_not_divide(folder):
    try:
        train.train_flow(changed(flow(folder), "optim", batch_size=15), folder / "odd", progress=False)
    except ValueError as error:
        said = str(error)
    (folder / f"does_not_divide_{distributed.join().rank}").write_text(said)


def counted(folder):
    """How often the processes talk to each other in each step but the last, beside DDP's gradients."""
    calls, starts = [], []
    originals = {
        name: getattr(torch.distributed, name) for name in ("all_reduce", "all_gather_object", "broadcast_object_list")
    }
    for name, original in originals.items():
        setattr(torch.distributed, name, lambda *given, name=name, original=original, **more: (
            calls.append(name), original(*given, **more))[1])  # fmt: skip
    at_step(None, None, lambda run: starts.append(len(calls)))
    config = changed(flow(folder, accumulate=2, every=100), "run", log_every=100, validate_every=100)
    train.train_flow(changed(config, "optim", steps=5), folder / "counted", progress=False)
    for name, original in originals.items():
        setattr(torch.distributed, name, original)
    counts = [calls[a:b] for a, b in itertools.pairwise(starts)]
    (folder / f"counted_{distributed.join().rank}").write_text(json.dumps(counts))


def compiled(folder):
    """torch.compile under DDP, with and without activation checkpointing."""
    original = torch.nn.Module.compile
    torch.nn.Module.compile = functools.partialmethod(original, backend="aot_eager")  # inductor takes a minute
    for name, again in (("compiled", False), ("compiled_again", True)):
        train.train_flow(small(folder, compile=True, activation_checkpointing=again), folder / name, progress=False)
    torch.nn.Module.compile = original


def halves(folder):
    """A sharded run in bf16, and whether autocast keeps casts of weights in it."""
    found = []

    def watch(run):
        loss = run.objective.loss
        run.objective.loss = lambda *given, **options: (
            found.append([torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()]),
            loss(*given, **options),
        )[1]

    at_step(1, 0, watch)
    train.train_flow(small(folder, "fsdp", precision="bf16"), folder / "halves", progress=False)
    if distributed.join().main:
        (folder / "casts").write_text(json.dumps(found))


def small(folder: Path, strategy: str = "ddp", **run) -> FlowTraining:
    """A run of a few steps, of 1, 2, 3 or 4 processes."""
    config = changed(flow(folder, strategy, every=2), "optim", steps=4, batch_size=12)
    return changed(config, "run", **run)


def two(folder):
    """A sharded run of two processes."""
    train.train_flow(small(folder, "fsdp"), folder / "two", progress=False)


def three(folder):
    """Its second half, by three."""
    with distributed.join().main_first():
        if distributed.join().main:
            interrupted(folder / "two", folder, 2).rename(folder / "three")
    train.train_flow(small(folder, "fsdp"), folder / "three", resume=True, progress=False)


def patient(folder):
    """The first job: one process works alone for longer than all may take for anything together."""
    rank = os.environ["RANK"]
    (folder / f"ready_{rank}").touch()
    while not (folder / "ready_0").exists() or not (folder / "ready_1").exists():
        time.sleep(0.1)  # imports take as long as they take
    distributed.TIMEOUT = datetime.timedelta(seconds=4)
    with distributed.join().main_first():
        if distributed.join().main:
            time.sleep(6)
    own = distributed.join()
    (folder / f"patient_{rank}").write_text(json.dumps([own.rank, own.count, own.most(own.rank)]))


def cached(folder):
    """Features of an encoder, computed by both."""
    train.train_flow(with_features(folder, True), folder / "cached", progress=False)


def with_features(folder: Path, cache: bool) -> FlowTraining:
    """Alignment with an encoder whose features are in files of 20 images."""
    feature_cache.PART = 20
    config = flow_config(folder / "images.npz", 4, every=2)
    return aligned(config, cache_features=cache)


def gathers(folder):
    """What helpers give each process."""
    own = distributed.join()
    share = own.split(7)
    rows = own.gather_rows(torch.arange(7)[share.start : share.stop, None] * torch.tensor([1.0, 0.5]))
    found = [own.count, list(share), own.same(own.rank), own.most(own.rank), own.gather([own.rank])]
    found += [None if rows is None else rows.tolist(), own.gather_rows(torch.zeros(own.rank, 2)) is not None]
    (folder / f"gathers_{own.rank}").write_text(json.dumps(found))


def killed(folder):
    """SIGKILL for one process, between two checkpoints."""
    at_step(13, 1, lambda run: os.kill(os.getpid(), signal.SIGKILL))
    train.train_flow(flow(folder, every=5), folder / "killed", progress=False)


def thirds(folder):
    """A run of any number of processes, and its second half again."""
    config = changed(flow_config(folder / "images.npz", 8, 4), "optim", batch_size=15)
    train.train_flow(config, folder / "thirds", progress=False)
    with distributed.join().main_first():
        if distributed.join().main:
            interrupted(folder / "thirds", folder, 4).rename(folder / "thirds_again")
    train.train_flow(config, folder / "thirds_again", resume=True, progress=False)


def left(folder):
    """The last job: what of the group is left then."""
    distributed.leave()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    (folder / f"left_{os.environ['RANK']}").write_text("\n".join(names))


def grids(folder):
    """Activations computed again, and pictures on the way."""
    for strategy in ("ddp", "fsdp"):
        train.train_flow(pictured(folder, strategy), folder / f"grids_{strategy}", progress=False)


def pictured(folder: Path, strategy: str = "ddp") -> FlowTraining:
    config = flow_config(folder / "images.npz", 4, every=2)
    config = changed(config, "run", activation_checkpointing=True, sample_every=2, sample_images=4)
    return dataclasses.replace(config, parallel=ParallelConfig(strategy=strategy))


def sample(folder):
    """The last job: the command leaves the group."""
    words = ["sample", folder / "flow.safetensors", "--n", "600", "--format", "adm", "--out", folder / "many.npz"]
    assert cli.main([*map(str, words)]) == 0


if __name__ == "__main__":
    for job in sys.argv[2:]:
        step = trainer.Trainer._train_step
        globals()[job](Path(sys.argv[1]))
        trainer.Trainer._train_step = step
