"""Sets of images beside a reference: score."""

from pathlib import Path
from typing import Annotated

import typer

from biflow.cli.common import Device, examples, give_report


def score(
    samples: Annotated[
        str, typer.Argument(metavar="SAMPLES", help="A .npz (ADM's, or biflow's), a folder of images, any data source.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Fields of data for sources but .npz: img_size=256 workers=8."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="The same, ADM's reference .npz, or a file of --save-statistics."),
    ] = None,
    inception: Annotated[
        str,
        typer.Option(
            "--inception", metavar="PATH|cached|none", help="Weights as torch-fidelity's; cached: or downloaded."
        ),
    ] = "cached",
    dinov2: Annotated[
        str,
        typer.Option("--dinov2", metavar="PATH|cached|none", help="Weights of DINOv2 ViT-L/14, for the FD on DINOv2."),
    ] = "none",
    save_statistics: Annotated[
        str | None,
        typer.Option("--save-statistics", metavar="FILE.npz", help="Keep what SAMPLES are reduced to, as a reference."),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Write the JSON here.  [default: print it]")] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images at once; changes no number but by rounding.")
    ] = 64,
    device: Device = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """FID, sFID, Inception Score, precision and recall of samples, and the Frechet distance on DINOv2, as JSON.

    By Inception-v3 as torch-fidelity has it, with the definitions of ADM's evaluator; docs/evaluation.md says what each
    number is. Without --reference only the Inception Score and what --save-statistics keeps. Under torchrun each
    process reads and measures a share of the images.
    """
    from biflow import distributed, evaluate
    from biflow.config import apply_overrides, from_mapping
    from biflow.data import DataConfig, is_encoded
    from biflow.ops._checks import local_device

    if inception == dinov2 == "none":
        raise ValueError("--inception, --dinov2: expected at least one network, got none for both")
    if reference is None and save_statistics is None and inception == "none":
        raise ValueError("--reference: expected a reference, or --save-statistics FILE.npz; got neither")
    if save_statistics is not None and not save_statistics.endswith(".npz"):
        raise ValueError(f"--save-statistics: expected a file ending in .npz, got {save_statistics!r}")
    kept, path = (None if name is None else Path(name).expanduser() for name in (save_statistics, out))
    for option, file in (("--save-statistics", kept), ("--out", path)):
        if file is not None and not file.parent.is_dir():
            raise FileNotFoundError(f"{option}: expected an existing folder, got {file.parent}")

    sources = [source for source in (samples, reference) if source is not None]
    if settings and not any(map(is_encoded, sources)):
        raise ValueError(
            f"KEY=VALUE: expected only with a folder, shards or a Hugging Face data set, got {settings[0]!r}"
        )

    def config(source: str) -> DataConfig:
        values = settings if settings and is_encoded(source) else []
        return from_mapping(DataConfig, apply_overrides({"source": source}, values), "data")

    with distributed.joined(local_device(device)) as processes:
        networks: list[evaluate.Network] = []
        with processes.main_first():  # the index of shards is made once, weights are downloaded once
            sets = [evaluate.ImageSet.of(config(source)) for source in sources]
            for choice, kind in ((inception, evaluate.Inception), (dinov2, evaluate.DINOv2)):
                if choice != "none":
                    networks.append(kind(None if choice == "cached" else choice, processes.device))
        options = {"batch_size": batch_size, "progress": not quiet, "processes": processes}
        other = None if reference is None else evaluate.measure_reference(sets[1], networks, **options)
        found = evaluate.measure_set(sets[0], networks, **options)
        corrupt = [len(set(processes.gather(list(one.corrupt())))) for one in sets]
    if not processes.main:
        return
    report: dict = {"samples": {"source": samples, "images": sets[0].count, "corrupt": corrupt[0]}}
    if other is not None:
        counts = {name: moments.count for name, moments in other.moments.items()}
        pool = None if other.pool is None else len(other.pool)
        report["reference"] = {"source": reference, "images": counts, "precision_recall_images": pool}
        report["reference"]["corrupt"] = corrupt[1]
    report |= evaluate.score(found, other, processes.device)
    if kept is not None:
        found.save(kept)
    give_report(report, path)


COMMANDS = (
    (
        "score",
        score,
        examples(
            "biflow score samples.npz --reference VIRTUAL_imagenet256_labeled.npz --device cuda",
            "biflow score samples/ img_size=64 --reference images/train --inception inception.pth",
            "biflow score images/train img_size=64 workers=8 --save-statistics imagenet64.npz",
            "biflow score samples.npz --reference imagenet64.npz --dinov2 dinov2_vitl14_pretrain.pth --out score.json",
        ),
    ),
)
