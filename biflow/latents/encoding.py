"""A data set's images to shards of latents on disk, going on where it was stopped."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from biflow import distributed
from biflow.config import check_fields
from biflow.data import DataConfig, EncodedImages, ImageData, Stream, is_encoded
from biflow.data import load as load_data
from biflow.data.images import BYTES
from biflow.data.latents import DTYPES, ENTRY, FORMAT, INDEX, read_index, read_shard, shard_digest, write_index
from biflow.files import TEMPORARY, replacing
from biflow.latents import autoencoder as vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FIXED = ("val_fraction", "flip", "seed", "crop", "channels", "normalize_latents", "posterior")  # not the data's here
FINAL = ("normalization", "rounding", "posterior_std", "corrupt", "shards")  # what the index gets at the end
EXAMPLES = 5


@dataclass(frozen=True)
class EncodingConfig:
    """How images become latents.

    batch_size: images encoded at once. Another one may change the last bits.
    shard_images: images a file; what a kill can lose.
    mirrored: also those of mirrored images, for data.flip: twice the size and time.
    dtype: of what is stored: "fp16" or "fp32".
    precision: of the autoencoder: "fp32", or "bf16" for autocast.
    device: where it runs.
    """

    batch_size: int = 32
    shard_images: int = 4096
    mirrored: bool = True
    dtype: str = "fp16"
    precision: str = "fp32"
    device: str = "cpu"

    def __post_init__(self):
        check_fields(self)
        for name in ("batch_size", "shard_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, choices in (("dtype", tuple(DTYPES)), ("precision", ("fp32", "bf16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")


class ChannelMoments:
    """Count, mean and sum of squared deviations of each channel, added to batch by batch in fp64 (Chan et al. 1979)."""

    def __init__(self, count: int, mean: Any, squares: Any):
        self.count, self.mean, self.squares = count, np.asarray(mean, np.float64), np.asarray(squares, np.float64)

    @classmethod
    def of(cls, moments: Tensor) -> "ChannelMoments":
        """Of latents drawn from posteriors (...,2,c,h,w): squares = sum of (mean - average)^2 + std^2."""
        values = moments.double().reshape(-1, *moments.shape[-4:]).transpose(0, 2).flatten(2)  # (c, 2, positions)
        average = values[:, 0].mean(1)
        squares = ((values[:, 0] - average[:, None]).square() + values[:, 1].square()).sum(1)
        return cls(values.shape[2], average.numpy(), squares.numpy())

    def __add__(self, other: "ChannelMoments") -> "ChannelMoments":
        total = self.count + other.count
        step = other.mean - self.mean
        squares = self.squares + other.squares + step**2 * (self.count * other.count / total)
        return ChannelMoments(total, self.mean + step * (other.count / total), squares)

    def to_mapping(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}


def encode_images(
    data: DataConfig, source: str, out: str | Path, config: EncodingConfig, *, progress: bool = True
) -> dict[str, Any]:
    """Encode all images of a data set into `out`, a folder that data.source reads; docs/latents.md has the format.

    Started again after it was stopped or killed, it goes on with the shards that are missing; the end is the same.
    A corrupt image's latent is that of the image that stands in for it, see `Decoder.decode`. Processes that call it
    together (torchrun) share the missing shards; the folder is the same for any number of them.

    Args:
        data: where the images are; img_size is the side that they are resized and cropped to (centre crops). A test
            split of the source stays one, nothing else is held out: that is for data.val_fraction of the training.
        source: of the autoencoder, see `autoencoder.load`.
        out: a new or empty folder, or one that this began.

    Returns:
        report of the whole folder, numbers and texts: images, held_out, corrupt, corrupt_examples, classes (how many),
        shape (c,h,w), dtype, bytes, normalization, posterior_std and rounding (root mean squares: of the posteriors'
        standard deviations, and of what storing in dtype changed in their means).

    Raises:
        As `data.load` and `autoencoder.load`. ValueError: images that the autoencoder does not take; another data set,
        autoencoder or configuration than the folder was begun with; latents that are not finite, or too large for fp16.
        FileExistsError: `out` holds something else. KeyboardInterrupt: finished shards stay.
    """
    out = Path(out)
    for name in FIXED:
        if getattr(data, name) != getattr(DataConfig(), name):
            raise ValueError(f"data.{name}: not for encoding (it is for training on the latents, or the autoencoder's)")
    processes = distributed.join(config.device)
    with processes.main_first():  # a download, an index of shards
        model = vae.load(source, processes.device)
    channels, factor = model.config.in_channels, vae.downsampling(model.config)
    encoded = is_encoded(data.source)
    with processes.main_first():
        loaded = load_data(replace(data, val_fraction=0.0, channels=channels if encoded else None))
    if loaded.channels != channels or loaded.img_size % factor:
        raise ValueError(
            f"{data.source}: expected images of {channels} channels and a side that {factor} divides, as the "
            f"autoencoder takes, got {loaded.channels} channels and side {loaded.img_size}"
        )
    autoencoder = vae.describe(model, source)
    with processes.main_first():
        if processes.main:
            _clear(out)
        index = _begin(out, loaded, data, autoencoder, config)
    shards = list(_shards(loaded, config.shard_images))
    # looked for by one process, before any of them makes one
    missing = processes.same([file for file, *_ in shards if not (out / file).exists()])
    mine = missing[processes.rank :: processes.count]
    done = sum(len(rows) for file, _, rows in shards if file not in missing)
    total = done + sum(len(rows) for file, _, rows in shards if file in mine)
    off = not (progress and processes.main)
    with tqdm(total=total, initial=done, desc="encode", unit="image", disable=off) as bar:
        try:
            for split in ("train", "val"):
                own = [(file, rows) for file, found, rows in shards if found == split and file in mine]
                _encode_split(model, loaded, split, own, out, config, bar)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped at {bar.n:,} of {total:,} images; the same command goes on with those that no shard has"
            ) from None
    processes.wait()
    return processes.same(_report(_finish(out, index, shards), out) if processes.main else None)


def _clear(out: Path) -> None:
    """Make the folder, without what a killed process left. No other process of the job writes there yet."""
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(f"{TEMPORARY}*"):
        leftover.unlink()


def _begin(
    out: Path, data: ImageData, config: DataConfig, autoencoder: dict[str, Any], encoding: EncodingConfig
) -> dict[str, Any]:
    """The index without its end; it is written, or compared with the one in the folder."""
    side = data.img_size // vae.downsampling(autoencoder["config"])
    index = {
        "format": FORMAT,
        "source": config.source,
        "img_size": data.img_size,
        "crop": "center",
        "autoencoder": autoencoder,
        "shape": [autoencoder["config"]["latent_channels"], side, side],
        "mirrored": encoding.mirrored,
        "dtype": encoding.dtype,
        "precision": encoding.precision,
        "shard_images": encoding.shard_images,
        "images_sha256": data.digest(),
        "class_names": list(data.class_names),
    }
    if not any(out.iterdir()):
        write_index(out, index)
    elif not (out / INDEX).is_file():
        raise FileExistsError(f"{out}: expected an empty folder, or latents to go on with, got something else")
    found = read_index(out)
    for name in index:
        old, new = found.get(name), index[name]
        if name == "autoencoder":
            old, new = old["encoder_sha256"], new["encoder_sha256"]
        if old != new and name != "source":
            raise ValueError(
                f"{out}: was begun with {name} = {old!r}, this is {new!r}; go on with the same images, autoencoder and "
                "options, or choose another folder"
            )
    return {name: value for name, value in found.items() if name not in FINAL}


def _shards(data: ImageData, size: int) -> Iterator[tuple[str, str, Tensor]]:
    """(file, split, images (n,) int64) of all shards."""
    for split, images in (("train", data.train_x), ("val", data.val_x)):
        for number, rows in enumerate(torch.arange(len(images)).split(size) if len(images) else ()):
            yield f"{split}-{number:05d}.safetensors", split, rows


def _encode_split(
    model: "AutoencoderKL",
    data: ImageData,
    split: str,
    shards: list[tuple[str, Tensor]],
    out: Path,
    config: EncodingConfig,
    bar: tqdm,
) -> None:
    images, labels = (data.train_x, data.train_y) if split == "train" else (data.val_x, data.val_y)
    parts = [rows.split(config.batch_size) for _, rows in shards]
    batches = [part for shard in parts for part in shard]
    step = 0
    with contextlib.closing(Stream(images, batches.__getitem__, len(batches))) as stream:
        for (file, rows), own in zip(shards, parts, strict=True):
            stored, statistics, change, spread = [], [], 0.0, 0.0
            for part in own:
                pixels = stream.read(step).pixels
                # bytes as everyone gives them to these autoencoders; other data as it is
                x = pixels.float() / 127.5 - 1 if images.quantisation == BYTES else images.quantisation.values(pixels)
                exact = _both(model, x.to(model.device), config)
                kept = exact.to(DTYPES[config.dtype])
                if not kept.isfinite().all():
                    _refuse(exact, images, part, config)
                stored.append(kept)
                statistics.append(ChannelMoments.of(kept))
                change += float((kept[:, :, 0].double() - exact[:, :, 0]).square().sum())
                spread += float(exact[:, :, 1].double().square().sum())
                step += 1
                bar.update(len(part))
            tensors = {"moments": torch.cat(stored)} | ({} if labels is None else {"labels": labels[rows]})
            about = {
                **_names(images, rows),
                "sha256": shard_digest(tensors),
                "statistics": sum(statistics[1:], statistics[0]).to_mapping(),
                "change": change,
                "spread": spread,
            }
            with replacing(out / file) as temporary:
                save_file(tensors, temporary, metadata={ENTRY: json.dumps(about, sort_keys=True)})


def _both(model: "AutoencoderKL", x: Tensor, config: EncodingConfig) -> Tensor:
    """(n,F,2,c,h,w) fp32 on the CPU: of the images, and with config.mirrored (F = 2) of them mirrored."""
    sides = [x, x.flip(-1)] if config.mirrored else [x]
    return torch.stack([vae.encode(model, side, config.precision) for side in sides], 1).cpu()


def _refuse(exact: Tensor, images: Any, part: Tensor, config: EncodingConfig) -> None:
    worst = int(part[int(exact.flatten(1).abs().nan_to_num(torch.inf).amax(1).argmax())])
    name = _name(images, worst)
    if exact.isfinite().all():
        raise ValueError(
            f"{name}: expected latents that {config.dtype} can hold, got {exact.abs().max():.3g}; use fp32"
        )
    raise ValueError(f"{name}: expected finite latents, got others (precision {config.precision})")


def _name(images: Any, position: int) -> str:
    return images.decoder.name(position) if isinstance(images, EncodedImages) else f"image {position}"


def _names(images: Any, rows: Tensor) -> dict[str, Any]:
    """What the images of a shard are called, and which of them are corrupt, and why."""
    names = [_name(images, position) for position in rows.tolist()]
    reasons = images.corrupt.reasons if isinstance(images, EncodedImages) else {}
    return {"names": names, "corrupt": {name: reasons[name] for name in names if name in reasons}}


def _finish(out: Path, index: dict[str, Any], shards: list[tuple[str, str, Tensor]]) -> dict[str, Any]:
    """The whole index, from what all shards say of themselves."""
    found = [read_shard(out / file)[0] for file, *_ in shards]
    statistics = [ChannelMoments(**about["statistics"]) for about in found]
    whole = sum(statistics[1:], statistics[0])
    numbers = whole.count * len(whole.mean)
    index |= {
        "normalization": {
            "scaling": vae.scaling(index["autoencoder"]["config"]),
            "channels": {"shift": whole.mean.tolist(), "scale": np.sqrt(whole.squares / whole.count).tolist()},
        },
        "posterior_std": (sum(about["spread"] for about in found) / numbers) ** 0.5,
        "rounding": (sum(about["change"] for about in found) / numbers) ** 0.5,
        "corrupt": {name: reason for about in found for name, reason in about["corrupt"].items()},
        "shards": [
            {"file": file, "split": split, "images": len(rows), "sha256": about["sha256"]}
            for (file, split, rows), about in zip(shards, found, strict=True)
        ],
    }
    write_index(out, index)
    if index["rounding"] > index["posterior_std"]:
        text = f"{index['dtype']} changes the means by {index['rounding']:.2g} (root mean square), more than the"
        tqdm.write(f"biflow: {out}: {text} posteriors' own {index['posterior_std']:.2g}; fp32 keeps them", sys.stderr)
    return index


def _report(index: dict[str, Any], out: Path) -> dict[str, Any]:
    counts = {split: sum(s["images"] for s in index["shards"] if s["split"] == split) for split in ("train", "val")}
    corrupt = [f"{name}: {reason}" for name, reason in index["corrupt"].items()]
    return {
        "images": counts["train"] + counts["val"],
        "held_out": counts["val"],
        "corrupt": len(corrupt),
        "corrupt_examples": corrupt[:EXAMPLES],
        "classes": len(index["class_names"]),
        "shape": index["shape"],
        "dtype": index["dtype"],
        "bytes": sum((out / shard["file"]).stat().st_size for shard in index["shards"]),
        **{name: index[name] for name in ("normalization", "posterior_std", "rounding")},
    }
