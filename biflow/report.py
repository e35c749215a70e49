"""report.md of the demo: the numbers of report.json in words and tables, around the pictures."""

import platform
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """What else numbers depend on: versions, torch's threads, the CPU kernels' instruction set."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu_isa": torch.ops.biflow.cpu_isa(),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report of `biflow.demo.run_demo` as Markdown; pictures by relative links."""
    summary, data, exact, learned = report["summary"], report["data"], report["exact"], report["learned"]
    default, best = summary["learned"], summary["exact_at_its_best_guidance"]
    timings, configuration = report["timings"], report["configuration"]
    decoders = timings["decoders"]
    default_agreement = _share(default["class_agreement"])
    quick = "\n**Quick run: tiny models, few steps. It tests the machinery; the samples mean nothing.**\n"
    return f"""# biflow demo: {data["source"]}
{quick if report["quick"] else ""}
A flow was trained on {data["train_images"]} images by maximum likelihood, then its inverse was learned.
{data["held_out_images"]} images were held out.

| | |
|---|---|
| class agreement, learned, at its default guidance {_number(default["guidance"])} | {default_agreement} |
| class agreement, exact, at its best guidance {_number(best["guidance"])} | {_share(best["class_agreement"])} |
| held-out bits per dim | {_number(summary["held_out_bits_per_dim"])} |
| round trip of the exact inverse, largest error | {_number(summary["round_trip_max_error"])} |
| reconstruction by the learned inverse, mean squared error | {_number(learned["reconstruction_mse"])} |
| held-out accuracy of the classifier that judges | {_share(summary["classifier_held_out_accuracy"])} |

## Samples

Learned, one pass, guidance {_number(default["guidance"])}; each row is one class.

![learned samples](samples_learned.png)

Exact, token by token, then denoised by one score step, guidance {_number(best["guidance"])}.

![exact samples](samples_exact.png)

From z to a clean image, block by block, without guidance: exact, and as the learned inverse predicts it.

![trajectories](trajectory.png)

{_samples_table(exact["samples"], learned["samples"])}

- class agreement: share of {default["count"]} conditional samples that the classifier recognises as their class.
- Frechet: distance between the classifier's features of samples and of real training images
  (real held-out images: {_number(data["frechet_held_out"])}); lower is better.
- mean, std: pixel mean / real mean - 1 and pixel std / real std - 1, of samples clamped to [-1, 1].
- distance: root mean square difference between learned and exact output from the same z, class and guidance.
- Samples with non-finite pixels: exact {sum(s["non_finite"] for s in exact["samples"])},
  learned {sum(s["non_finite"] for s in learned["samples"])}.
- Bits per dim: of dequantised held-out images, pixel values {_number(data["bin_width"])} apart, under a density that
  was fitted to images with Gaussian noise of std {_number(exact["noise_std"])}; an upper bound on the code length.

## Time

The same job each way, z to a guided clean image: {decoders["unit"]}, median of {decoders["repetitions"]} interleaved
repetitions, {decoders["threads"]} CPU threads. In brackets: the exact decode without the denoising step.

{_timing_table(decoders["batches"])}

Training: stage one {_number(timings["train_flow_seconds"])} s, stage two {_number(timings["train_inverse_seconds"])} s;
evaluation and pictures {_number(timings["evaluation_seconds"])} s.

## Training

![curves](curves.png)

{_configuration_table(configuration, exact["parameters"], learned["parameters"])}

biflow {report["biflow"]}, torch {report["environment"]["torch"]}, Python {report["environment"]["python"]},
CPU kernels {report["environment"]["cpu_isa"]}. All numbers: [report.json](report.json).
"""


def _samples_table(exact: list[dict], learned: list[dict]) -> str:
    lines = [
        "| guidance | class agreement: exact | learned | Frechet: exact | learned | mean: exact | learned "
        "| std: exact | learned | distance |",
        "|---" * 10 + "|",
    ]
    by_guidance = {s["guidance"]: s for s in learned}
    for e in exact:
        s = by_guidance.get(e["guidance"], {})
        cells = [_number(e["guidance"]), _share(e["class_agreement"]), _share(s.get("class_agreement"))]
        cells += [_number(e["frechet"]), _number(s.get("frechet"))]
        for name in ("pixel_mean_difference", "pixel_std_difference"):
            cells += [_share(e[name]), _share(s.get(name))]
        lines.append(f"| {' | '.join(cells)} | {_number(s.get('distance_to_exact'))} |")
    return "\n".join(lines)


def _timing_table(batches: list[dict]) -> str:
    lines = ["| batch | learned | exact, eager PyTorch | exact, biflow op |", "|---|---|---|---|"]
    for row in batches:
        eager = f"{_number(row['exact_eager'])} ({_number(row['exact_eager_decode'])})"
        op = f"{_number(row['exact_op'])} ({_number(row['exact_op_decode'])})"
        lines.append(f"| {row['batch_size']} | {_number(row['learned'])} | {eager} | {op} |")
    return "\n".join(lines)


def _configuration_table(configuration: dict, flow_parameters: int, inverse_parameters: int) -> str:
    lines = ["| | stage one | stage two |", "|---|---|---|"]
    flow, inverse = configuration["flow"], configuration["inverse"]
    lines.append(f"| parameters | {flow_parameters:,} | {inverse_parameters:,} |")
    for name in ("width", "num_blocks"):
        lines.append(f"| {name} | {flow['model'][name]} | {inverse['model'][name]} |")
    lines.append(f"| layers a block | {flow['model']['layers_per_block']} | {inverse['model']['layers_per_group']} |")
    for name in ("steps", "batch_size", "lr", "ema"):
        lines.append(f"| {name} | {flow['optim'][name]} | {inverse['optim'][name]} |")
    lines.append(f"| seed | {flow['run']['seed']} | {inverse['run']['seed']} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
