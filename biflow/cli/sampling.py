"""`biflow sample`: images from noise, by the exact inverse of a flow or by a learned one."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biflow.cli.common import (
    Checkpoint,
    Device,
    Seed,
    check_picture,
    examples,
    load_model,
    model_file,
    picture_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Generator, Tensor

    from biflow.distributed import Processes
    from biflow.models import BiFlow, TarFlow
    from biflow.solvers import DecodeInfo

DRAWN = 16  # torch draws normal numbers by so many: parts of a multiple of it hold those of the whole


def sample(
    checkpoint: Checkpoint,
    n: Annotated[int, typer.Option("--n", "--count", min=1, help="Number of images.")] = 16,
    out: Annotated[str, typer.Option("--out", help="A .png (a grid) or .npz (images, labels).")] = "samples.png",
    label: Annotated[
        str,
        typer.Option("--class", metavar="K|all|none", help="Class to draw; all: each in turn; none: unconditional."),
    ] = "all",
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Strength >= 0.  [default: 1 for a class, 0 without]")
    ] = None,
    guide: Annotated[
        str | None, typer.Option("--guide", help="Exact flow: what guidance changes: a, b or ab.  [default: ab]")
    ] = None,
    no_anneal: Annotated[
        bool, typer.Option("--no-anneal", help="Exact flow: full guidance at all tokens, not rising from the first.")
    ] = False,
    attn_temp: Annotated[
        float | None,
        typer.Option("--attn-temp", help="Exact flow: of the unconditional pass; guidance without classes needs one."),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Standard deviation of the noise.")] = 1.0,
    seed: Seed = 0,
    no_denoise: Annotated[bool, typer.Option("--no-denoise", help="Exact flow: keep the training noise.")] = False,
    flow: Annotated[
        str | None,
        typer.Option("--flow", help="Of an inverse without learned denoising: the flow whose score removes the noise."),
    ] = None,
    solver: Annotated[
        str | None, typer.Option("--solver", help="Exact flow: sequential, jacobi, windowed or auto.  [default: auto]")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="With --solver windowed: tokens a window.  [default: 16]")
    ] = None,
    tol: Annotated[
        float | None, typer.Option("--tol", help="Exact flow: tolerance of the iterative solvers.  [default: 1e-5]")
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify", help="Exact flow: print how exact the decode was; costs one encode.")
    ] = False,
    precision: Annotated[str, typer.Option("--precision", help="Of the decode: fp32 or bf16.")] = "fp32",
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Images a process draws at once; changes them by rounding alone.")
    ] = 256,
    arrays: Annotated[
        str, typer.Option("--format", metavar="float|adm", help="Of a .npz; adm: for evaluators, as ADM writes it.")
    ] = "float",
    vae: Annotated[
        str | None, typer.Option("--vae", help="Of a model of latents: the AutoencoderKL that makes images of them.")
    ] = None,
    vae_batch: Annotated[int, typer.Option("--vae-batch", min=1, help="With --vae: latents decoded at once.")] = 8,
    vae_tile: Annotated[
        int, typer.Option("--vae-tile", min=8, help="With --vae: side of the tiles that larger latents are decoded in.")
    ] = 64,
    device: Device = "cpu",
) -> None:
    """Draw images from a flow (exact) or from a learned inverse (one pass).

    A .npz holds images (N,H,W,C) fp32 in [-1, 1] (or latents, as the model has them) and labels (N,) int64; with
    --format adm, and always with --vae, arr_0 (N,H,W,3) uint8, gray repeated, and arr_1 (N,) int64 labels. Either is
    written batch by batch; a .png is held in memory. --data and data.source read both.
    A seed draws the same noise for every device and --batch, and under torchrun for any number of processes, which
    share the work. Of another --batch images differ by rounding, and by --tol where a solver iterates.
    """
    import torch

    from biflow import distributed
    from biflow.data.adm import write_adm, write_floats
    from biflow.models import TarFlow
    from biflow.ops._checks import check_choice, local_device

    path = picture_file(out)
    check_choice("--format", arrays, ("float", "adm"))
    if arrays == "adm" and path.suffix != ".npz":
        raise ValueError(f"--format: expected adm only with --out FILE.npz, got {out!r}")
    where = local_device(device)
    processes, model = distributed.join(where), load_model(checkpoint, device=device)
    decoder = None if vae is None else _decoder(checkpoint, vae, device, vae_batch, vae_tile, precision)
    if decoder is None:
        check_picture(path, model.config.in_channels, "or --vae with the autoencoder, or ")
    numbers = model.config.tokens * model.config.channels
    if n > batch and batch * numbers % DRAWN:
        raise ValueError(
            f"--batch: expected a multiple of {DRAWN // math.gcd(numbers, DRAWN)}, so that images of {numbers} numbers "
            f"are the same in all batches, got {batch}"
        )
    y = _labels(model, label, n)
    if guidance is None:
        limit = getattr(model.config, "max_guidance", 0.0) or 1.0
        guidance = min(1.0, limit) if y is not None else 0.0
    options = {}
    guided = {"guide": guide, "anneal": False if no_anneal else None, "attn_temp": attn_temp}
    exact = {"solver": solver, "window": window, "tol": tol, "return_info": certify or None, **guided}
    exact = {name: value for name, value in exact.items() if value is not None}
    idle = next((name for name in guided if name in exact and not guidance), None)
    if idle is not None:
        raise ValueError(f"{_option(idle)}: expected with --guidance above 0, got 0")
    if isinstance(model, TarFlow):
        options |= {"denoise": False if no_denoise else None, **exact}
    elif no_denoise:
        raise ValueError(
            "--no-denoise: expected with an exact flow; a learned inverse ends in clean images, or without learned "
            "denoising in noisy ones unless --flow is given"
        )
    elif exact:
        name, value = next(iter(exact.items()))
        raise ValueError(f"{_option(name)}: expected with an exact flow; a learned inverse has one pass; got {value!r}")
    options |= {"guidance": guidance, "temperature": temperature, "generator": torch.Generator().manual_seed(seed)}
    options["precision"] = precision
    score = _score(model, flow, device)
    infos, bad = [], 0

    def rounds() -> "Iterator[Tensor | None]":
        """What all processes draw in a round, on the main one; the others have to go along."""
        nonlocal bad
        with model.frozen():
            for rows in _rounds(processes, n, batch, model, options["generator"]):
                images = torch.empty(0)
                if rows:
                    labels = None if y is None else y[rows.start : rows.stop].to(where)
                    drawn = model.sample(len(rows), labels, **options)
                    drawn, *info = drawn if certify else (drawn,)
                    images = (drawn if score is None else score(drawn, labels)).cpu()
                    bad += len(rows) - int(images.isfinite().flatten(1).all(1).sum())
                    infos.extend(replace(one, residual=one.residual.cpu()) for one in info)
                    if decoder is not None:
                        images = torch.cat(list(decoder(images)))
                yield processes.gather_rows(images)

    if not processes.main:
        for _ in rounds():
            pass
    elif path.suffix == ".npz":
        write = write_adm if arrays == "adm" or decoder is not None else write_floats
        write(path, rounds(), n, y)
    else:
        _save_grid(torch.cat([x if decoder is None else x.float() / 127.5 - 1 for x in rounds()]), y, path)
    bad, infos = int(processes.sum(torch.tensor(bad))), processes.gather(infos)
    distributed.leave()
    if not processes.main:
        return
    if bad:
        typer.echo(f"biflow: {bad} of {n} images are not finite; less guidance or temperature helps", err=True)
    for line in _certificate(infos) if certify else []:
        typer.echo(line)
    typer.echo(f"{path}: {n} images")


def _option(name: str) -> str:
    """The option of `sample` that sets this argument of `TarFlow.sample`."""
    return {"return_info": "--certify", "anneal": "--no-anneal"}.get(name, "--" + name.replace("_", "-"))


def _labels(model: "TarFlow | BiFlow", label: str, n: int) -> "Tensor | None":
    import torch

    classes = model.config.num_classes
    if label == "none" or (label == "all" and not classes):
        return None
    if label == "all":
        return torch.arange(n) % classes
    if not label.isdecimal() or int(label) >= classes:
        have = f"a class in [0, {classes}), all or none" if classes else "none for a model without classes"
        raise ValueError(f"--class: expected {have}, got {label!r}")
    return torch.full((n,), int(label))


def _rounds(
    processes: "Processes", n: int, batch: int, model: "TarFlow | BiFlow", generator: "Generator"
) -> "Iterator[range]":
    """The rows that this process draws in each round; a round is a batch of each process, by rank.

    Empty where the last round has fewer batches. The noise of the others' batches is drawn and thrown away: the batches
    are the same for any number of processes, and with them all bits of sample i. Another size of them leaves its noise;
    what kernels round, when a batch's iterations end and which solver "auto" takes depend on the size.
    """
    import torch

    for first in range(0, n, batch * processes.count):
        for rank in range(processes.count):
            start = min(first + batch * rank, n)
            rows = range(start, min(start + batch, n))
            if rank == processes.rank:
                yield rows
            else:
                torch.randn(len(rows), model.config.tokens, model.config.channels, generator=generator)


def _decoder(
    checkpoint: str, vae: str, device: str, batch: int, tile: int, precision: str
) -> "Callable[[Tensor], Iterator[Tensor]]":
    """Latents (N,c,h,w) as the model draws them -> parts of images (n,C,H,W) uint8, by the autoencoder of --vae."""
    import torch

    from biflow import checkpoint as files
    from biflow import latents

    about = files.read(model_file(checkpoint)).metadata.get("latents")
    if about is None:
        raise ValueError(f"--vae: expected a model trained on latents of `biflow latents encode`, got {checkpoint}")
    autoencoder = latents.load(vae, device)
    latents.check_same(autoencoder, about["autoencoder"], vae)
    shift, scale = (torch.tensor(about[name], dtype=torch.float32).view(-1, 1, 1) for name in ("shift", "scale"))

    def decode(x: "Tensor") -> "Iterator[Tensor]":
        return latents.decode(autoencoder, x * scale + shift, batch_size=batch, tile=tile, precision=precision)

    decode(torch.empty(0, len(scale), 1, 1))  # wrong options are told of before anything is drawn
    return decode


def _score(
    model: "TarFlow | BiFlow", flow: str | None, device: str
) -> "Callable[[Tensor, Tensor | None], Tensor] | None":
    """(x, y) -> denoised x by the score of the flow that --flow names; None without --flow."""
    from biflow.evaluate import check_pair, score_step
    from biflow.models import BiFlow

    if flow is None:
        return None
    if not isinstance(model, BiFlow) or model.config.learned_denoising:
        what = "a flow, which has its own score" if not isinstance(model, BiFlow) else "learned denoising"
        raise ValueError(f"--flow: expected with a learned inverse without learned denoising, got {what}")
    forward = load_model(flow, "TarFlow", device=device)
    check_pair(model, forward)
    if forward.config.noise_std == 0:
        raise ValueError("--flow: expected a flow trained with noise (noise_std more than 0), got noise_std = 0")
    return lambda x, y: score_step(forward, x, y)


def _certificate(infos: list["DecodeInfo"]) -> list[str]:
    """What the decodes of all batches say together: the largest residual and, by block, the most passes of a batch."""
    import torch

    lines = [f"largest residual: {torch.cat([info.residual for info in infos]).max():.2g}"]
    for block in range(len(infos[0].solver)):
        ways = [(info.solver[block], info.window[block]) for info in infos]
        names = dict.fromkeys(solver if window is None else f"{solver} {window}" for solver, window in ways)
        passes, lost = max(info.passes[block] for info in infos), sum(len(info.fallbacks[block]) for info in infos)
        lines.append(f"block {block}: {' or '.join(names)}, {passes} passes, {lost} fallbacks")
    return lines


def _save_grid(images: "Tensor", y: "Tensor | None", path: Path) -> None:
    from biflow.evaluate import plots

    if y is not None and len(y.unique()) > 1:
        classes = y.unique().tolist()
        plots.save_grid([images[y == k] for k in classes], path, labels=[f"class {k}" for k in classes])
    else:
        columns = max(1, round(len(images) ** 0.5))
        plots.save_grid(images.split(columns), path)


COMMANDS = (
    (
        "sample",
        sample,
        examples(
            "biflow sample runs/inverse --n 50",
            "biflow sample runs/flow --class 3 --guidance 2 --out threes.png",
            "biflow sample runs/flow --class none --guidance 1 --attn-temp 1.5",
            "biflow sample runs/flow --solver windowed --window 32 --tol 1e-4 --certify",
            "biflow sample runs/inverse/model.safetensors --n 1000 --seed 7 --out samples.npz",
            "biflow sample runs/inverse --n 50000 --format adm --out samples.npz --device cuda",
            "biflow sample runs/noisy_inverse --flow runs/flow",
            "biflow sample runs/latent_flow --vae models/vae --n 64 --out samples.png",
        ),
    ),
)
