"""What the commands share: help texts, interrupts, and reading checkpoints and run folders."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from biflow.data import DataConfig, ImageData
    from biflow.models import BiFlow, TarFlow

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="A model .safetensors file, or a finished run's folder.")
]
DataSource = Annotated[
    str | None,
    typer.Option("--data", metavar="SOURCE", help="digits, a .npz, a folder, shards.  [default: the run's]"),
]
Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")]


class Interrupted(Exception):
    """Ctrl-C, with what the interrupted job says about it."""


def guarded(command: Callable, name: str, shared: bool) -> Callable:
    """`command` with KeyboardInterrupt as `Interrupted`, which typer passes on with its message.

    shared: several processes can run it together. ValueError for another one in a job of several.
    """

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            if not shared:
                _check_alone(name)
            return command(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error)) from error

    return run


def _check_alone(name: str) -> None:
    from biflow import distributed

    processes = distributed.join()
    if processes.count > 1:
        distributed.leave()
        raise ValueError(
            f"{name}: expected one process, got {processes.count} (torchrun): this command does not share its work"
        )


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "Examples:\n\n\b\n" + "\n".join(f"  {line}" for line in lines)


def version(wanted: bool) -> None:
    """Callback of --version."""
    if wanted:
        import biflow

        typer.echo(f"biflow {biflow.__version__}")
        raise typer.Exit


def model_file(checkpoint: str) -> Path:
    """The model file that the user named: a .safetensors file, or the folder of a finished run."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if not (path / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"{checkpoint}: expected a finished run with model.safetensors, found none in the folder"
            )
        return path / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{checkpoint}: no such file")
    return path


def load_model(checkpoint: str, kind: str | None = None, device: str = "cpu") -> "TarFlow | BiFlow":
    """The model of a checkpoint or run folder; ValueError unless it is of the wanted kind ("TarFlow", "BiFlow").

    device: as the user wrote it; ValueError unless this build has kernels for it and this machine has it.
    """
    from biflow.checkpoint import load
    from biflow.ops._checks import local_device

    where = local_device(device)
    model = load(model_file(checkpoint), where)
    if kind is not None and type(model).__name__ != kind:
        raise ValueError(f"{checkpoint}: expected a {kind}, got a {type(model).__name__}")
    return model


def data_config(source: str | None, checkpoint: str, img_size: int, *, quiet: bool = False) -> "DataConfig":
    """The data that the user named, or else the data of the run that the checkpoint lies in.

    Of a source that the run was trained on, the run's own split, so that nothing it has seen counts as held out;
    of another one stderr says, unless `quiet`, that this is not known.
    """
    from biflow.data import DataConfig, is_encoded, kind_of

    own = _run_data(checkpoint)
    if source is None:
        if own is None:
            raise ValueError(
                f"{checkpoint}: expected --data, since the checkpoint does not lie in a run folder with config.yaml"
            )
        return own
    if own is not None and _same_source(own.source, source):
        return own
    if not quiet:
        typer.echo(
            f"biflow: {checkpoint}: no run folder says that it was trained on {source}; images are held out by the "
            "default split, and may include some that it was trained on",
            err=True,
        )
    more = {"img_size": img_size} if is_encoded(source) else {}
    if own is not None and kind_of(source) == "latents":
        more = {"normalize_latents": own.normalize_latents, "posterior": own.posterior}
    config = DataConfig(source=source, **more)
    check_latents(checkpoint, config)
    return config


def check_latents(checkpoint: str, config: "DataConfig") -> None:
    """ValueError: a model of latents, and latents of another encoder, or normalised by other numbers."""
    from biflow.checkpoint import read
    from biflow.data import kind_of, load

    own = read(model_file(checkpoint)).metadata.get("latents")
    if own is None or kind_of(config.source) != "latents":
        return
    found = load(config).latents
    if found["autoencoder"]["encoder_sha256"] != own["autoencoder"]["encoder_sha256"]:
        names = own["autoencoder"]["name"], found["autoencoder"]["name"]
        raise ValueError(
            f"{config.source}: expected latents of the model's encoder, {names[0]}, got those of {names[1]}"
        )
    for name in ("shift", "scale"):
        if found[name] != own[name]:
            raise ValueError(
                f"{config.source}: expected latents normalised as the model's ({name} {own[name]}), got {found[name]} "
                f"(data.normalize_latents={config.normalize_latents}; the channels of another set have other numbers)"
            )


def own_data(checkpoint: str, source: str | None) -> bool:
    """Whether `source` is what the run that the checkpoint lies in was trained on; None: whatever that is."""
    own = _run_data(checkpoint)
    return source is None or (own is not None and _same_source(own.source, source))


def picture_file(out: str) -> Path:
    """The file of --out: a .png or .npz in a folder that exists."""
    path = Path(out).expanduser()
    if path.suffix not in (".png", ".npz"):
        raise ValueError(f"--out: expected a file ending in .png or .npz, got {out!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out: expected an existing folder, got {path.parent}")
    return path


def check_picture(path: Path, channels: int, more: str = "") -> None:
    """ValueError: a .png of what has another number of channels than 1 or 3. more: what else to give."""
    if path.suffix == ".png" and channels not in (1, 3):
        raise ValueError(f"--out: expected {more}a file ending in .npz for latents of {channels} channels, got {path}")


def give_report(report: dict, path: Path | None) -> None:
    """Write a report as JSON to `path` and print where it is; None: print the report. ValueError: NaN or infinite."""
    from biflow.files import replacing

    text = json.dumps(report, indent=2, allow_nan=False)
    if path is None:
        typer.echo(text)
        return
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")
    typer.echo(str(path))


def _run_data(checkpoint: str) -> "DataConfig | None":
    """The data of the run that the checkpoint lies in, from its config.yaml; None: no run folder."""
    from biflow import presets
    from biflow.config import from_mapping
    from biflow.data import DataConfig

    folder = model_file(checkpoint).parent
    for candidate in (folder / "config.yaml", folder.parent.parent / "config.yaml"):
        if candidate.is_file():
            values = presets.read(str(candidate))
            if values.get("stage") in presets.STAGES and "data" in values:
                return from_mapping(DataConfig, values["data"], f"{candidate}: data")
    return None


def _same_source(a: str, b: str) -> bool:
    return a == b or ("digits" not in (a, b) and Path(a).expanduser().resolve() == Path(b).expanduser().resolve())


def pick_images(data: "ImageData", n: int | None, label: int | None = None) -> "tuple[Tensor, Tensor | None]":
    """At most n images (None: all), and their labels: held-out ones if there are any, evenly spaced, of class `label`.

    ValueError: none of that class.
    """
    import torch

    from biflow.data import spread

    held_out = len(data.val_x) > 0
    images, labels = (data.val_x, data.val_y) if held_out else (data.train_x, data.train_y)
    rows = torch.arange(len(images))
    if label is not None and labels is not None:
        rows = rows[labels == label]
        if len(rows) == 0:
            raise ValueError(f"--images: expected images of class {label}, got none of {len(images)}")
    if n is not None:
        rows = rows[spread(len(rows), n)]
    return images.batch(rows), None if labels is None else labels[rows]
