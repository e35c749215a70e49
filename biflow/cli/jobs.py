"""Long jobs: train, distill, demo, ablate. Each can be interrupted and resumed."""

import json
from pathlib import Path
from typing import Annotated

import typer

from biflow.cli.common import check_latents, examples, load_model

Config = Annotated[str, typer.Argument(metavar="CONFIG_OR_PRESET", help="A .yaml file, or the name of a preset.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as optim.lr=1e-4.")
]
Out = Annotated[str, typer.Option("--out", help="Folder of the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def train(config: Config, out: Out, overrides: Overrides = None, resume: Resume = False, quiet: Quiet = False) -> None:
    """Train a flow by maximum likelihood (stage one).

    The folder gets config.yaml, environment.json, metrics.jsonl, tensorboard/, checkpoints/ and, when done,
    model.safetensors; docs/training.md says what is in them. Presets:
    digits_flow, fashion_flow, folder_flow, imagenet256_b2_flow, imagenet256_l2_flow, imagenet256_xl2_flow; with
    features aligned with an encoder's (representation): digits_aligned_flow, fashion_aligned_flow,
    imagenet64_aligned_flow, imagenet256_aligned_flow. SIGINT (Ctrl-C) and SIGTERM finish the step and write a
    checkpoint to --resume from; exit codes 130 and 143. Under torchrun all processes train together
    (docs/distributed.md).
    """
    from biflow import distributed, presets
    from biflow.train import train_flow

    settings = presets.training(config, overrides or (), "flow")
    with distributed.joined(settings.run.device) as processes:
        train_flow(settings, out, resume=resume, progress=not quiet)
    if processes.main:
        typer.echo(f"{out}/model.safetensors: trained; next: biflow sample {out}")


def distill(
    config: Config,
    out: Out,
    flow: Annotated[str, typer.Option("--flow", help="Checkpoint or finished run of the flow to invert.")],
    overrides: Overrides = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Learn the one-pass inverse of a trained flow (stage two).

    The flow stays frozen. The folder is as of `biflow train`. Presets: digits_inverse,
    fashion_inverse, imagenet256_b2_inverse, imagenet256_l2_inverse, imagenet256_xl2_inverse.
    """
    from biflow import distributed, presets
    from biflow.train import train_inverse

    settings = presets.training(config, overrides or (), "inverse")
    with distributed.joined(settings.run.device) as processes:
        check_latents(flow, settings.data)
        train_inverse(settings, load_model(flow, "TarFlow"), out, resume=resume, progress=not quiet)
    if processes.main:
        typer.echo(f"{out}/model.safetensors: trained; next: biflow sample {out}")


def demo(
    out: Annotated[str, typer.Option("--out", help="Folder of the report, the pictures and both runs.")],
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models, few steps: tests the machinery.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of training and sampling.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the demo in --out where it stopped.")] = False,
    quiet: Quiet = False,
) -> None:
    """Both stages on real handwritten digits, with pictures and a report.

    Trains a flow and its learned inverse on scikit-learn's digits (a few minutes on two CPU cores) and compares exact
    and learned samples: report.md, report.json, samples_exact.png, samples_learned.png, trajectory.png, curves.png.
    """
    from biflow.demo import run_demo

    summary = run_demo(out, quick=quick, seed=seed, progress=not quiet, resume=resume)["summary"]
    learned, exact = summary["learned"], summary["exact_at_its_best_guidance"]
    typer.echo(
        f"class agreement: learned {learned['class_agreement']:.3f} (guidance {learned['guidance']:g}), "
        f"exact {exact['class_agreement']:.3f} (guidance {exact['guidance']:g})\n{out}/report.md"
    )


def ablate(
    rows: Annotated[list[str], typer.Argument(metavar="ROW.yaml...", help="Files with a row each.")],
    out: Annotated[str, typer.Option("--out", help="Folder of the results, the runs and the table.")],
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of training, separated by commas.")] = "0,1,2",
    data: Annotated[str | None, typer.Option("--data", help="In place of the rows' data.source.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of all rows; flow.KEY=, inverse.KEY=: one stage."),
    ] = None,
    orderings: Annotated[
        str | None, typer.Option("--orderings", metavar="FILE.yaml", help="Orderings of rows that the table checks.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train and compare variants: a table over rows and seeds.

    Every row trains a flow, shared by rows that have the same one, and a learned inverse if it names one. Results are
    in --out/results, one JSON a row and seed, and are not computed again; the table is --out/table.md, the plot
    table.png. Start it again to go on after an interruption.
    """
    from biflow.ablation import read_orderings, run_ablation

    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: expected integers separated by commas, got {seeds!r}") from None
    changes = [*(settings or ()), *([] if data is None else [f"data.source={json.dumps(data)}"])]
    claims = read_orderings(orderings) if orderings else ()
    run_ablation(rows, out, seeds=numbers, settings=changes, orderings=claims, progress=not quiet)
    typer.echo(Path(out, "table.md").read_text() + f"{out}/table.md")


COMMANDS = (
    (
        "train",
        train,
        examples(
            "biflow train digits_flow --out runs/flow",
            "biflow train digits_flow optim.steps=200 model.width=64 --out runs/small",
            "biflow train fashion_flow data.source=fashion_mnist.npz --out runs/fashion",
            "biflow train fashion_flow run.sample_every=1000 run.precision=bf16 run.wandb=flows --out runs/fashion",
            "biflow train digits_flow 'representation={features: [[-1, 0]]}' --out runs/aligned",
            "biflow train my.yaml --out runs/mine --resume",
            "torchrun --nproc-per-node 8 -m biflow train my.yaml run.device=cuda --out runs/mine",
        ),
    ),
    (
        "distill",
        distill,
        examples(
            "biflow distill digits_inverse --flow runs/flow --out runs/inverse",
            "biflow distill digits_inverse optim.steps=200 --flow runs/flow --out runs/short",
            "biflow distill digits_inverse alignment.strategy=hidden_distillation model.reembed_states=true "
            "--flow runs/flow --out runs/forced",
            "biflow distill digits_inverse 'perceptual=[{backbone: classifier, weight: 0.5}]' "
            "--flow runs/flow --out runs/perceptual",
        ),
    ),
    (
        "ablate",
        ablate,
        examples(
            "biflow ablate configs/ablations/*.yaml --data fashion_mnist.npz --orderings "
            "configs/ablations/base/orderings.yaml --out runs/ablations",
            "biflow ablate configs/flowback/*.yaml --data fashion_mnist.npz --out runs/flowback",
            "biflow ablate naive.yaml alignment.yaml --seeds 0,1 --set optim.steps=500 --out runs/short",
            "biflow ablate *.yaml --set run.device=cuda --set flow.optim.steps=20000 --set inverse.optim.steps=8000 "
            "--out runs/long",
        ),
    ),
    ("demo", demo, examples("biflow demo --out runs/demo", "biflow demo --out runs/demo --resume")),
)
