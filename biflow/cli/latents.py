"""Latents: latents encode."""

import json
from typing import Annotated

import typer

from biflow.cli.common import Device, examples


def encode(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder of images, .tar shards, a .npz, a Hugging Face data set; hf:NAME."
        ),
    ],
    vae: Annotated[str, typer.Option("--vae", help="A diffusers AutoencoderKL: a folder, or a name on the hub.")],
    out: Annotated[str, typer.Option("--out", help="Folder of the latents.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields of data, such as exclude=corrupt.txt.")
    ] = None,
    img_size: Annotated[
        int | None, typer.Option("--img-size", min=1, help="Side that images are resized and cropped to.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images encoded at once.")] = 32,
    shard: Annotated[int, typer.Option("--shard", min=1, help="Images a file: what a kill can lose.")] = 4096,
    no_mirrored: Annotated[
        bool, typer.Option("--no-mirrored", help="Without latents of mirrored images: no data.flip, half the size.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="What latents are stored in: fp16 or fp32.")] = "fp16",
    precision: Annotated[str, typer.Option("--precision", help="Of the autoencoder: fp32 or bf16.")] = "fp32",
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that decode images.")] = 0,
    device: Device = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Encode a data set's images by an autoencoder, to train on; prints JSON: counts, sizes, normalisation.

    The folder holds mean and standard deviation of each image's posterior, and of its mirrored image's: train with
    data.source=FOLDER. After an interruption the same command goes on. The next image of the class stands in for a
    corrupt one. Under torchrun the processes share the files.
    """
    from biflow import distributed
    from biflow.config import apply_overrides, from_mapping
    from biflow.data import DataConfig
    from biflow.latents import EncodingConfig, encode_images
    from biflow.ops._checks import local_device

    where = local_device(device)
    config = EncodingConfig(batch, shard, not no_mirrored, dtype, precision, device)
    values = {"source": source, "workers": workers} | ({} if img_size is None else {"img_size": img_size})
    data = from_mapping(DataConfig, apply_overrides(values, settings or []), "data")
    with distributed.joined(where) as processes:
        report = encode_images(data, vae, out, config, progress=not quiet)
    if processes.main:
        typer.echo(json.dumps(report, indent=2, allow_nan=False))


COMMANDS = (
    (
        "encode",
        encode,
        examples(
            "biflow latents encode images/train --vae stabilityai/sd-vae-ft-ema --img-size 256 --out latents",
            "biflow latents encode 'train-{000..127}.tar' --vae models/vae --img-size 256 --device cuda --out latents",
        ),
    ),
)
