"""Where a run's metrics and sample grids go: metrics.jsonl, TensorBoard, Weights & Biases."""

import importlib.util
import json
import os
import secrets
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from biflow.files import replacing
from biflow.train.configs import RunConfig


def check_writers(run: RunConfig) -> None:
    """ImportError, before anything is done, if Weights & Biases is wanted and not installed."""
    if run.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ImportError(
            f"run.wandb: expected the package wandb for the project {run.wandb!r}, which is not installed: "
            "pip install 'biflow[wandb]'"
        )


class Metrics:
    """metrics.jsonl (one JSON object a line, appended), TensorBoard event files, if installed and wanted, and a run of
    Weights & Biases, if wanted; of one process of a run only.

    A resumed run goes on in the same run of W&B, whose id is in wandb_id.txt. Its x axis is the metric "step": what was
    logged after the checkpoint from which a killed run goes on is logged again, at the same steps.

    Args:
        out: the run's folder. step: the last one that is done.
        run: tensorboard, wandb. configuration: what W&B shows of it.
    """

    def __init__(self, out: Path, step: int, run: RunConfig, configuration: dict[str, Any]):
        self._file = (out / "metrics.jsonl").open("a")
        self._tensorboard = _tensorboard(out, step) if run.tensorboard else None
        self._wandb = None if run.wandb is None else _wandb(out, run.wandb, configuration)

    def write(self, line: dict[str, Any]) -> None:
        """line: "step", "split", and numbers."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        named = {f"{line['split']}/{name}": value for name, value in line.items() if isinstance(value, float)}
        if self._tensorboard is not None:
            for name, value in named.items():
                self._tensorboard.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log({**named, "step": line["step"]})

    def image(self, path: Path, step: int) -> None:
        """A PNG of samples; to TensorBoard and W&B, which show it as "samples"."""
        if self._tensorboard is not None:
            import numpy as np
            from PIL import Image

            self._tensorboard.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"samples": wandb.Image(str(path)), "step": step})

    def sync(self) -> None:
        """Make the lines durable."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def _tensorboard(out: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        text = "biflow: tensorboard is not installed (pip install 'biflow[train]'); metrics go to metrics.jsonl"
        tqdm.write(text, file=sys.stderr)
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


def _wandb(out: Path, project: str, configuration: dict[str, Any]):
    import wandb

    path = out / "wandb_id.txt"
    if not path.is_file():
        with replacing(path) as temporary:
            temporary.write_text(f"{secrets.token_hex(8)}\n")
    run = wandb.init(
        project=project,
        id=path.read_text().strip(),
        resume="allow",
        name=out.resolve().name,
        dir=str(out),
        config=configuration,
        allow_val_change=True,  # what a resumed run may change
    )
    run.define_metric("*", step_metric="step")
    return run
