"""What one does with a checkpoint beside drawing from it: calibrate, evaluate, info."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biflow.cli.common import (
    Checkpoint,
    DataSource,
    Device,
    Seed,
    data_config,
    examples,
    give_report,
    load_model,
    model_file,
)

if TYPE_CHECKING:
    from biflow.solvers import Policy


def calibrate(
    checkpoint: Checkpoint,
    batches: Annotated[str, typer.Option("--batches", metavar="N,N,...", help="Batch sizes.")] = "1,16,64",
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="P,P,...", help="Precisions.  [default: all of this build]")
    ] = None,
    guidance: Annotated[
        list[float] | None, typer.Option("--guidance", help="Strength; may be repeated.  [default: 0]")
    ] = None,
    attn_temp: Annotated[
        float, typer.Option("--attn-temp", help="Of the unconditional pass of the guided decodes.")
    ] = 1.0,
    tol: Annotated[float, typer.Option("--tol", help="Tolerance of the iterative solvers.")] = 1e-5,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Timed runs of each solver.")] = 7,
    out: Annotated[str | None, typer.Option("--out", help="Write the model here.  [default: in place]")] = None,
    device: Device = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure which solver inverts which block of a flow fastest on a device, and keep that in the checkpoint.

    Exact decoding follows it (solver "auto"); without it every block is decoded sequentially. What was measured on
    other devices or threads, for other precisions, batch sizes and guidances, stays in the file.
    """
    import biflow
    from biflow import checkpoint as files
    from biflow import solvers

    sizes = []
    for word in batches.split(","):
        if not word.strip().isdecimal():
            raise ValueError(f"--batches: expected numbers separated by commas, got {batches!r}")
        sizes.append(int(word))
    source = model_file(checkpoint)
    path = source if out is None else Path(out).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out: expected an existing folder, got {path.parent}")
    flow = load_model(checkpoint, "TarFlow", device=device)
    policy = biflow.calibrate(
        flow,
        batches=sizes,
        precisions=solvers.PRECISIONS if precision is None else tuple(p.strip() for p in precision.split(",")),
        guidances=tuple(guidance or (0.0,)),
        attn_temp=attn_temp,
        tol=tol,
        repetitions=repetitions,
        progress=not quiet,
    )
    metadata = {k: v for k, v in files.read(source).metadata.items() if k != files.POLICY}
    files.save(flow, path, metadata)
    for line in _policy_table(policy):
        typer.echo(line)
    typer.echo(f"{path}: calibrated")


def evaluate(
    checkpoint: Checkpoint,
    flow: Annotated[str | None, typer.Option("--flow", help="The flow that a learned inverse inverts.")] = None,
    data: DataSource = None,
    out: Annotated[str | None, typer.Option("--out", help="Write the JSON here.  [default: print it]")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples per guidance.")] = 500,
    guidance: Annotated[
        list[float] | None, typer.Option("--guidance", help="Strength; may be repeated.  [default: 0 1 2 3]")
    ] = None,
    noise_draws: Annotated[
        int, typer.Option("--noise-draws", min=1, help="Draws of the noise that the bounds on the bits are taken over.")
    ] = 4,
    no_denoise: Annotated[
        bool, typer.Option("--no-denoise", help="No score step after what ends in noisy data.")
    ] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Also ms per image of each way of decoding.")] = False,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Measure a flow, or a learned inverse next to its flow, on held-out data and on samples.

    Bits per dim, round-trip error, class agreement and Frechet distance by a small classifier that is trained on the
    real images first, pixel statistics, and for an inverse its reconstruction error and distance to the exact output.
    Under torchrun the processes share images and samples.
    """
    from biflow import data as datasets
    from biflow import distributed
    from biflow import evaluate as metrics
    from biflow.models import BiFlow
    from biflow.ops._checks import local_device

    path = None if out is None else Path(out).expanduser()
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"--out: expected an existing folder, got {path.parent}")
    config = metrics.EvaluationConfig(
        samples=samples,
        guidances=tuple(guidance or metrics.EvaluationConfig.guidances),
        noise_draws=noise_draws,
        seed=seed,
        denoise=not no_denoise,
    )
    with distributed.joined(local_device(device)) as processes:
        model = load_model(checkpoint, device=device)
        learned = isinstance(model, BiFlow)
        if learned != (flow is not None):
            what = "a learned inverse, which is measured next to its flow" if learned else "a flow"
            raise ValueError(
                f"--flow: expected {'with' if learned else 'only with a learned inverse, not with'} {what}"
            )
        if timings and not learned:
            raise ValueError("--timings: expected with a learned inverse, whose speed is compared with its flow's")
        forward = load_model(flow, "TarFlow", device=device) if learned else model
        own = data_config(data, checkpoint, model.config.img_size, quiet=not processes.main)
        with processes.main_first():
            loaded = datasets.load(own)
        metrics.check_data(model, loaded)
        if learned:
            metrics.check_pair(model, forward)
        real = metrics.RealData.of(loaded, config, processes)
        report = {"data": metrics.describe_data(real), "exact": metrics.evaluate_flow(forward, real, config)}
        if learned:
            report["learned"] = metrics.evaluate_inverse(model, forward, real, config)
        if timings and processes.main:
            strength = min(1.0, model.config.max_guidance or 1.0)
            report["timings"] = metrics.time_decoders(model, forward, guidance=strength)
    if processes.main:
        give_report(report, path)


def info(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="[CKPT_OR_PRESET]", help="A model file, a finished run, or a preset."),
    ] = None,
) -> None:
    """What this build and this machine offer, what a checkpoint holds, or what a preset is and the data it expects."""
    import torch
    import yaml

    import biflow
    from biflow import ops, presets  # noqa: F401  (ops registers torch.ops.biflow)

    if checkpoint in presets.names() and not Path(checkpoint).exists():
        typer.echo(f"{presets.about(checkpoint)}\n\nparameters: {presets.parameters(checkpoint):,}\n")
        found = presets.read(checkpoint)
    elif checkpoint is not None:
        from biflow.checkpoint import POLICY, describe
        from biflow.solvers import Policy

        path = model_file(checkpoint)
        found = describe(path)
        if found["kind"] == "TarFlow" and POLICY in found["metadata"]:
            try:
                policy = Policy.from_mapping(found["metadata"].pop(POLICY), found["config"].get("num_blocks"))
            except ValueError as error:
                raise ValueError(f"{path}: expected a valid policy in the metadata; {error}") from None
            found[POLICY] = [
                {**entry, "blocks": [_method(block) for block in entry["blocks"]]}
                for entry in policy.to_mapping()["entries"]
            ]
    else:
        found = {
            "biflow": biflow.__version__,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "cpu instruction set": torch.ops.biflow.cpu_isa(),
            "cuda": torch.cuda.is_available(),
        }
        try:
            from biflow import _C
        except ImportError:
            found["build"] = "unknown: biflow._C is not built for this Python"
        else:
            found["build"] = {k: v for k, v in _C.build_info().items() if k != "version"}
    typer.echo(yaml.safe_dump(found, sort_keys=False, allow_unicode=True).rstrip())


def _policy_table(policy: "Policy") -> list[str]:
    """A line a block of each entry, below a line of headings."""
    head = ("device", "threads", "precision", "batch", "guidance", "tol", "block", "solver", "window", "passes", "ms")
    rows = [(*head, "on")]
    rows += [
        (
            entry.device,
            str(entry.threads),
            entry.precision,
            str(entry.batch),
            f"{entry.guidance:g}",
            f"{entry.tol:g}",
            str(index),
            found.solver,
            str(found.window or "-"),
            str(found.passes),
            f"{found.ms:.3g}",
            entry.name,
        )
        for entry in policy.entries
        for index, found in enumerate(entry.blocks)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _method(found: dict) -> str:
    window = f" {found['window']}" if found["window"] else ""
    return f"{found['solver']}{window}, {found['passes']} passes, {found['ms']:.3g} ms"


COMMANDS = (
    (
        "calibrate",
        calibrate,
        examples(
            "biflow calibrate runs/flow",
            "biflow calibrate flow.safetensors --batches 1,256 --guidance 0 --guidance 2 --out calibrated.safetensors",
            "biflow calibrate runs/flow --device cuda",
        ),
    ),
    (
        "evaluate",
        evaluate,
        examples(
            "biflow evaluate runs/flow",
            "biflow evaluate runs/inverse --flow runs/flow --out report.json",
            "biflow evaluate flow.safetensors --data digits --guidance 0 --guidance 1",
        ),
    ),
    ("info", info, examples("biflow info", "biflow info runs/flow", "biflow info fashion_flow")),
)
