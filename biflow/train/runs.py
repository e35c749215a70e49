"""The run folder: config.yaml, metrics.jsonl, checkpoints/step_XXXXXXXX/. All of it survives a kill at any instant."""

import contextlib
import json
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import yaml

from biflow import presets
from biflow.config import completed
from biflow.distributed import Processes
from biflow.files import TEMPORARY, replacing, sync
from biflow.train.configs import FlowTraining, InverseTraining, flatten

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # by which a run stops after a step
# these do not change what a step sees, nor its bits
FREE_FIELDS = {f"run.{name}" for name in ("log_every", "validate_every", "checkpoint_every", "keep", "tensorboard")}
FREE_FIELDS |= {f"run.{name}" for name in ("wandb", "peak_flops", "activation_checkpointing")}
FREE_FIELDS |= {f"run.{name}" for name in ("sample_every", "sample_images", "sample_guidance", "sample_vae")}
FREE_FIELDS |= {"data.workers", "data.index", "representation.cache_features"}
FREE_FIELDS |= {"parallel.strategy", "parallel.accumulate"}
FREE_FIELDS |= {"run.device"}  # another one has other bits
# paths, which may change where the run's state says by this hash what was found there
GUARDED_FIELDS = {name: "data_sha256" for name in ("data.source", "data.exclude", "data.classes")}
GUARDED_FIELDS |= {name: "perceptual_weights_sha256" for name in ("decoder", "perceptual.weights")}
GUARDED_FIELDS |= {"representation.encoder.weights": "encoder_weights_sha256"}


def prepare(out: Path, config: dict, resume: bool) -> None:
    """Make the run folder, or check the one to resume; leftovers of a killed process are removed.

    Paths are not compared here (GUARDED_FIELDS): the state of a checkpoint says what they have to lead to.

    Raises:
        FileExistsError: a folder that is not empty, without resume; or that holds something other than a run.
        ValueError: the run in the folder has another configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    entries = [p for p in out.iterdir() if not p.name.startswith(TEMPORARY)]
    if entries and not resume:
        raise FileExistsError(
            f"{out}: the folder is not empty; resume the run in it (resume=True, --resume) or choose another folder"
        )
    if entries and not (out / "config.yaml").exists():
        raise FileExistsError(f"{out}: expected a run to resume (config.yaml), got a folder that holds something else")
    if entries:
        found = with_defaults(presets.read(str(out / "config.yaml")))
        check_same(found, config, str(out / "config.yaml"), GUARDED_FIELDS)
    for leftover in [*out.glob(f"{TEMPORARY}*"), *(out / "checkpoints").glob(f"{TEMPORARY}*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if not entries:
        write_config(out, config)
    (out / "checkpoints").mkdir(exist_ok=True)


def write_config(out: Path, config: dict) -> None:
    """config.yaml; of a resumed run when it is known that it goes on."""
    with replacing(out / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False))


def train_seconds(out: Path) -> float:
    """Seconds that the finished run in a folder trained, over all its sittings."""
    return round(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["seconds"], 1)


def with_defaults(found: dict) -> dict:
    """The configuration of a run, `stage` and all, with the defaults of fields that are newer than the run."""
    cls = {"flow": FlowTraining, "inverse": InverseTraining}.get(found.get("stage"))
    if cls is None:
        return found
    fields = {name: value for name, value in found.items() if name != "stage"}
    return {"stage": found["stage"], **completed(cls, fields)}


def check_same(found: dict, config: dict, where: str, free: Collection[str] = ()) -> None:
    """ValueError naming the first field in which the run's configuration differs from the one given.

    free: names of GUARDED_FIELDS that may differ beside FREE_FIELDS.
    """
    old, new = flatten(found), flatten(config)
    if "perceptual.weights" in free:
        for flat in (old, new):
            flat["perceptual"] = [{**term, "weights": None} for term in flat.get("perceptual") or ()]
    for name in new:
        had = old.get(name)
        if name not in old:  # a group of settings where there is none now
            had = {key: value for key, value in old.items() if key.startswith(f"{name}.")} or None
        if name not in FREE_FIELDS and name not in free and had != new[name]:
            raise ValueError(
                f"{where}: the run to resume has {name} = {had!r}, this configuration {new[name]!r}; "
                "resume with the configuration of the run, or start another one in a new folder (another --out)"
            )


def checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in (out / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def write_checkpoint(out: Path, step: int, fill: Callable[[Path], None], keep: int, processes: Processes) -> None:
    """Let `fill` write the files of a checkpoint into a new folder, make it appear at once, drop all but `keep`.

    All processes call it; each fills, the main one does the rest. When it returns the checkpoint is there.
    """
    folder = out / "checkpoints"
    target = folder / f"step_{step:08d}"
    temporary = folder / f"{TEMPORARY}{target.name}-{processes.same(secrets.token_hex(4))}"
    with processes.main_first():
        if processes.main:
            temporary.mkdir()
    fill(temporary)
    processes.wait()
    with processes.main_first():
        if processes.main:
            sync(temporary)
            if target.exists():  # one that could not be read, from which this run did not continue
                _remove(target)
            temporary.rename(target)
            sync(folder)
            for old in checkpoints(out)[keep:]:
                _remove(old)


def cut_metrics(out: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, and a line that a kill left incomplete."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("step", step + 1) <= step:
            kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept))


@contextlib.contextmanager
def delayed_signals() -> Iterator[list[int]]:
    """Yield a list that SIGINT and SIGTERM are noted in; a second one acts at once. In the main thread only."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in SIGNALS:
        previous[number] = signal.signal(number, note) or signal.SIG_DFL
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill on the way leaves a leftover, never a checkpoint with files missing."""
    doomed = folder.parent / f"{TEMPORARY}{folder.name}-{secrets.token_hex(4)}"
    folder.rename(doomed)
    shutil.rmtree(doomed)
