"""How good a flow and its learned inverse are: numbers on held-out data and on samples, all plain floats.

Models may be on any device; data, noise and samples are on the CPU, and so is the classifier. Several processes share
the work (`RealData.processes`): noise is drawn whole, each takes its rows, and the main one gathers what they found.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from biflow.config import check_fields, check_number
from biflow.data import ImageData, in_range, spread
from biflow.distributed import Processes
from biflow.evaluate.bits import bounds
from biflow.evaluate.classifier import FEATURES, Judge, train_judge
from biflow.evaluate.frechet import frechet_distance
from biflow.evaluate.precision_recall import precision_recall
from biflow.evaluate.shares import ALONE, own_rows
from biflow.models import BiFlow, TarFlow

CERTIFIED = 50  # samples whose residual is looked at


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation costs.

    samples: images drawn per way of decoding and guidance, their classes in equal shares.
    guidances: guidance strengths; those above a learned inverse's max_guidance are left out for it.
    noise_draws: draws of the dequantisation noise, over which the bounds on the bits per dim are taken.
    judge_steps: optimizer steps of the classifier that judges the samples.
    train_images, held_out_images: real images used at most of either split, evenly spaced.
    batch_size: images decoded at once, and samples that learned and exact outputs are compared on.
    seed: of z, of the noise and of the classifier.
    denoise: one score step (`TarFlow.denoise`) after what ends in noisy data: the exact inverse of a flow trained with
        noise, and a learned inverse of it without learned denoising. False: their noise stays.
    """

    samples: int = 500
    guidances: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0)
    noise_draws: int = 4
    judge_steps: int = 200
    train_images: int = 10_000
    held_out_images: int = 1000
    batch_size: int = 250
    seed: int = 0
    denoise: bool = True

    def __post_init__(self):
        check_fields(self)
        for name in ("samples", "noise_draws", "judge_steps", "train_images", "held_out_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.guidances:
            raise ValueError("guidances: expected at least one number >= 0, got none")
        for guidance in self.guidances:
            check_number("guidances", guidance, minimum=0)


@dataclass(frozen=True)
class RealData:
    """Clean real images of both splits, their labels (None: no labels), and the classifier trained on them.

    processes: who evaluate on it together. Each has all images; what is measured is returned by the main one.
    """

    train_x: Tensor
    train_y: Tensor | None
    val_x: Tensor
    val_y: Tensor | None
    num_classes: int
    bin_width: float | None
    judge: Judge | None
    processes: Processes = ALONE

    @classmethod
    def of(cls, data: ImageData, config: EvaluationConfig, processes: Processes = ALONE) -> "RealData":
        """Both splits of `data` as tensors; if there are labels, the main process trains the classifier for all.

        ValueError: nothing held out.
        """
        if len(data.val_x) == 0:
            raise ValueError("data: expected held-out images to evaluate on, got none (val_fraction or a test split)")
        train, val = spread(len(data.train_x), config.train_images), spread(len(data.val_x), config.held_out_images)
        train_x, val_x = data.train_x.batch(train), data.val_x.batch(val)
        train_y = None if data.train_y is None else data.train_y[train]
        val_y = None if data.val_y is None else data.val_y[val]
        judge = None
        if train_y is not None and val_y is not None and data.num_classes > 1:
            if processes.main:
                judge = train_judge(
                    train_x, train_y, val_x, val_y, data.num_classes, steps=config.judge_steps, seed=config.seed
                )
            judge = processes.same(judge)
        return cls(train_x, train_y, val_x, val_y, data.num_classes, data.bin_width, judge, processes)

    @cached_property
    def train_features(self) -> Tensor | None:
        """The classifier's features of the training images (N, F), None but on the main process; for data with labels.

        All processes ask for them at the same time.
        """
        return self.processes.gather_rows(self.judge.features(self.share(self.train_x)))

    def share(self, rows: Tensor) -> Tensor:
        """This process's."""
        own = self.processes.split(len(rows))
        return rows[own.start : own.stop]

    def dequantised(self, generator: torch.Generator) -> Tensor:
        """val_x + bin_width U(-1/2, 1/2); data without bins as it is."""
        if self.bin_width is None:
            return self.val_x
        return self.val_x + self.bin_width * (torch.rand(self.val_x.shape, generator=generator) - 0.5)


def describe_data(real: RealData) -> dict:
    """The real data and its classifier: what the samples' numbers are read against; {} but on the main process.

    frechet_held_out, precision_held_out, recall_held_out: of the real held-out images in the samples' place, the level
        that so many real images reach (None: too few, or no labels). All three depend on the number of images.
    """
    held_out = _feature_metrics(real, real.share(real.val_x))
    if not real.processes.main:
        return {}
    return {
        "train_images": len(real.train_x),
        "held_out_images": len(real.val_x),
        "num_classes": real.num_classes,
        "bin_width": real.bin_width,
        "pixel_mean": _mean(real.train_x),
        "pixel_std": _std(real.train_x),
        "classifier_held_out_accuracy": real.judge.held_out_accuracy if real.judge else None,
        **{f"{name}_held_out": value for name, value in held_out.items()},
    }


def evaluate_likelihood(flow: TarFlow, real: RealData, config: EvaluationConfig) -> dict:
    """The density of the held-out images.

    Returns, on the main process ({} on the others):
        held_out_nats_per_dim: mean of -log p(x | y) / (T D) over the held-out images and `noise_draws` draws of
            x + bin_width U(-1/2, 1/2), labels given to a model with classes.
        held_out_bits_per_dim, ..._standard_error, ..._importance_weighted, ..._importance_weighted_standard_error: of
            `bounds`, None for data without bins. A model trained with Gaussian noise (noise_std > 0) is evaluated in
            the same way, at data with uniform noise of one bin: still upper bounds, on the bits by its density, which
            is that of data convolved with N(0, noise_std^2) and so needs the more bits the more noise_std exceeds the
            bin width.
        noise_draws, noise_std: as configured.
    """
    generator, draws = torch.Generator().manual_seed(config.seed), []
    for _ in range(config.noise_draws):
        x = real.dequantised(generator)
        draws.append(own_rows(real.processes, len(x), config.batch_size, partial(_log_prob, flow, x, real.val_y)))
    gathered = real.processes.gather_rows(torch.stack(draws, 1))
    if gathered is None:
        return {}
    log_p = gathered.T.contiguous()
    dims = real.val_x[0].numel()
    return {
        **{f"held_out_bits_per_dim{name}": value for name, value in bounds(log_p, dims, real.bin_width).items()},
        "held_out_nats_per_dim": -float(log_p.mean()) / dims,
        "noise_draws": config.noise_draws,
        "noise_std": flow.config.noise_std,
    }


def evaluate_flow(flow: TarFlow, real: RealData, config: EvaluationConfig) -> dict:
    """The forward model and its exact inverse.

    Returns, on the main process ({} on the others):
        what `evaluate_likelihood` returns.
        denoising: of the samples, "score" or "none".
        round_trip_max_error: max |decode(encode(x)) - x| over the dequantised held-out images, without guidance.
        sample_residual_max: largest certificate (`DecodeInfo.residual`) over decoded samples at the largest guidance.
        samples: a list with one entry per guidance, see `describe_samples`.
    """
    processes = real.processes
    x = real.dequantised(torch.Generator().manual_seed(config.seed))
    errors = processes.gather_rows(
        own_rows(processes, len(x), config.batch_size, partial(_round_trip, flow, x, real.val_y))
    )
    z, y = noise(flow, config)
    few, strongest = min(len(z), CERTIFIED), max(_usable(flow, config))
    residual = processes.gather_rows(own_rows(processes, few, few, partial(_residual, flow, z, y, strongest)))
    found, samples = evaluate_likelihood(flow, real, config), []
    for guidance in _usable(flow, config):
        images = _decoded(partial(decode_exact, flow), z, y, guidance, real, config)
        samples.append(describe_samples(images, None if y is None else real.share(y), real, guidance))
    if not processes.main:
        return {}
    return {
        **found,
        "denoising": denoising(flow, flow, config),
        "round_trip_max_error": number(errors.max()),
        "sample_residual_max": number(residual.max()),
        "samples": samples,
    }


def evaluate_inverse(rev: BiFlow, flow: TarFlow, real: RealData, config: EvaluationConfig) -> dict:
    """The learned inverse, on the same z as `evaluate_flow`.

    Returns, on the main process ({} on the others):
        denoising: "learned", "score" (config.denoise: a step of the flow's score) or "none": how outputs become clean.
        reconstruction_mse: mean (rev(z) - x)^2 over held-out images x, z = flow.encode(x + noise) with the noise that
            the flow was trained with, labels given, no guidance, denoised as said.
        samples: one entry per guidance, see `describe_samples`, with distance_to_exact: root mean square difference
            between learned and exact output, each denoised as said, from the same z, class and guidance, over the
            first `batch_size` samples.
    """
    check_pair(rev, flow)
    processes, generator = real.processes, torch.Generator().manual_seed(config.seed + 1)
    std = flow.config.noise_std
    noisy = (
        real.val_x + std * torch.randn(real.val_x.shape, generator=generator) if std else real.dequantised(generator)
    )
    squares = processes.gather_rows(
        own_rows(processes, len(noisy), config.batch_size, partial(_reconstruction, rev, flow, noisy, real, config))
    )
    z, y = noise(flow, config)
    few = slice(0, config.batch_size)
    first = z[few], None if y is None else y[few]
    # of this process's share of all samples
    own = max(0, min(len(z), config.batch_size) - processes.split(len(z)).start)
    samples = []
    for guidance in _usable(rev, config):
        images = _decoded(partial(decode_learned, rev, flow), z, y, guidance, real, config)
        entry = describe_samples(images, None if y is None else real.share(y), real, guidance)
        learned = processes.gather_rows(images[:own])
        exact = processes.gather_rows(_decoded(partial(decode_exact, flow), *first, guidance, real, config))
        if exact is not None:
            ok = _finite_rows(exact)
            entry["distance_to_exact"] = number((learned[ok] - exact[ok]).double().square().mean().sqrt())
        samples.append(entry)
    if not processes.main:
        return {}
    return {
        "denoising": denoising(rev, flow, config),
        "reconstruction_mse": float(squares.mean()),
        "samples": samples,
    }


def describe_samples(images: Tensor, y: Tensor | None, real: RealData, guidance: float) -> dict:
    """Numbers of one set of samples (N,C,H,W) drawn for the classes y (N,); {} but on the main process.

    images, y: those of this process's share, of all samples by rank.

    non_finite: samples with NaN or infinite pixels; they agree with no class, the other numbers leave them out.
    frechet: `frechet_distance` between the classifier's features of samples and of real training images.
    precision, recall: `precision_recall` in these features, of as many real training images as there are samples.
    class_agreement: share of samples that the classifier recognises as the class they were drawn for.
    pixel_mean_difference, pixel_std_difference: mean / real mean - 1 and std / real std - 1, over all pixels of all
        images. The first is large for data whose mean is near the middle gray, 0.
    unclamped_std_difference: the same of the samples as they came; all other numbers are of samples clamped to [-1, 1],
        as they are looked at and stored (latents are not clamped).
    """
    processes, ok = real.processes, _finite_rows(images)
    count, right = sum(processes.gather([len(images)])), None
    clamped = in_range(images[ok])
    if real.judge and y is not None:
        right = processes.gather_rows(real.judge.predict(clamped) == y[ok])
    features, unclamped = _feature_metrics(real, clamped), processes.gather_rows(images[ok])
    if unclamped is None:
        return {}
    unclamped_std, images = _std(unclamped), in_range(unclamped)
    mean, std = _mean(images), _std(images)
    return {
        "guidance": guidance,
        "count": count,
        "non_finite": count - len(images),
        "class_agreement": None if right is None else float(right.double().sum() / count),
        **features,
        "pixel_mean": mean,
        "pixel_mean_difference": _relative(mean, _mean(real.train_x)),
        "pixel_std": std,
        "pixel_std_difference": _relative(std, _std(real.train_x)),
        "unclamped_std_difference": _relative(unclamped_std, _std(real.train_x)),
    }


def noise(model: TarFlow | BiFlow, config: EvaluationConfig) -> tuple[Tensor, Tensor | None]:
    """z (samples,T,D) ~ N(0, I) and the classes (samples,) in equal shares, the same for every model of that shape."""
    c = model.config
    generator = torch.Generator().manual_seed(config.seed)
    z = torch.randn(config.samples, c.tokens, c.channels, generator=generator)
    return z, torch.arange(config.samples) % c.num_classes if c.num_classes else None


def decode_exact(flow: TarFlow, z: Tensor, y: Tensor | None, guidance: float, config: EvaluationConfig) -> Tensor:
    """Exact, guided, and clean: decode, then one score step if the flow was trained with noise (and config.denoise).

    A sample that strong guidance drove to overflow stays NaN or infinite.
    """

    def decode(z: Tensor, y: Tensor | None) -> Tensor:
        y = _labels(flow, y)
        x = flow.decode(z, y, guidance=guidance if flow.config.num_classes else 0.0)
        return score_step(flow, x, y) if denoising(flow, flow, config) == "score" else x

    return _batched(decode, flow, z, y, config.batch_size)


def decode_learned(
    rev: BiFlow, flow: TarFlow, z: Tensor, y: Tensor | None, guidance: float, config: EvaluationConfig
) -> Tensor:
    """Learned, guided, and clean: one pass, and without learned denoising a score step as `decode_exact` has it.

    The score is that of the labels that `rev` was given.
    """

    def decode(z: Tensor, y: Tensor | None) -> Tensor:
        y = _labels(rev, y)
        x = rev.decode(z, y, guidance=guidance)
        return score_step(flow, x, y) if denoising(rev, flow, config) == "score" else x

    return _batched(decode, rev, z, y, config.batch_size)


def denoising(model: TarFlow | BiFlow, flow: TarFlow, config: EvaluationConfig) -> str:
    """How what `model` decodes becomes clean: "learned", "score" (a step of `flow`'s score) or "none"."""
    if isinstance(model, BiFlow) and model.config.learned_denoising:
        return "learned"
    return "score" if config.denoise and flow.config.noise_std > 0 else "none"


def score_step(flow: TarFlow, x: Tensor, y: Tensor | None) -> Tensor:
    """`flow.denoise` of the finite samples; the others as they are."""
    x, ok, y = x.clone(), _finite_rows(x), _labels(flow, y)
    x[ok] = flow.denoise(x[ok], None if y is None else y[ok])
    return x


def check_pair(rev: BiFlow, flow: TarFlow) -> None:
    """ValueError unless `rev` inverts a flow of the shape of `flow`."""
    for name in ("img_size", "in_channels", "patch_size", "num_blocks", "num_classes"):
        have, want = getattr(rev.config, name), getattr(flow.config, name)
        if have != want and not (name == "num_classes" and 0 in (have, want)):  # either may do without classes
            raise ValueError(f"the learned inverse does not belong to this flow: expected {name} {want}, got {have}")


def check_data(model: TarFlow | BiFlow, data: ImageData) -> None:
    """ValueError unless the images and classes of `data` fit the model."""
    c = model.config
    for name, want, have in (
        ("channels", c.in_channels, data.channels),
        ("img_size", c.img_size, data.img_size),
    ):
        if want != have:
            raise ValueError(f"data: expected {name} {want} as the model has, got {have}")
    if c.num_classes and data.num_classes > c.num_classes:
        raise ValueError(f"data: expected at most {c.num_classes} classes as the model has, got {data.num_classes}")


def _usable(model: TarFlow | BiFlow, config: EvaluationConfig) -> list[float]:
    if not model.config.num_classes:
        return [0.0]
    limit = getattr(model.config, "max_guidance", 0.0) or math.inf
    return [g for g in config.guidances if g <= limit] or [0.0]


def _labels(model: TarFlow | BiFlow, y: Tensor | None) -> Tensor | None:
    return y if model.config.num_classes else None


def _rows(rows: slice, device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor[rows].to(device) for tensor in tensors]


def _log_prob(flow: TarFlow, x: Tensor, y: Tensor | None, rows: slice) -> Tensor:
    with torch.no_grad():
        return flow.log_prob(*_rows(rows, _device(flow), x, _labels(flow, y))).double().cpu()


def _round_trip(flow: TarFlow, x: Tensor, y: Tensor | None, rows: slice) -> Tensor:
    """max |decode(encode(x)) - x| of each image (n,)."""
    x, y = _rows(rows, _device(flow), x, _labels(flow, y))
    with torch.no_grad():
        back = flow.decode(flow.encode(x, y)[0], y)
    return (back - x).abs().flatten(1).amax(1).cpu()


def _residual(flow: TarFlow, z: Tensor, y: Tensor | None, guidance: float, rows: slice) -> Tensor:
    _, info = flow.decode(*_rows(rows, _device(flow), z, y), guidance=guidance, return_info=True)
    return info.residual.cpu()


def _reconstruction(
    rev: BiFlow, flow: TarFlow, noisy: Tensor, real: RealData, config: EvaluationConfig, rows: slice
) -> Tensor:
    """Mean squared error of each image (n,), fp64."""
    x, clean, y = _rows(rows, _device(flow), noisy, real.val_x, real.val_y)
    with torch.no_grad():
        z, _ = flow.encode(x, _labels(flow, y) if rev.config.num_classes else None)
    back = decode_learned(rev, flow, z, y, 0.0, config)
    return (back - clean).double().square().flatten(1).mean(1).cpu()


def _decoded(
    decode: Callable, z: Tensor, y: Tensor | None, guidance: float, real: RealData, config: EvaluationConfig
) -> Tensor:
    """decode(z, y, guidance, config) of this process's share."""

    def call(rows: slice) -> Tensor:
        return decode(*_rows(rows, z.device, z, y), guidance, config)

    return own_rows(real.processes, len(z), config.batch_size, call)


def _batched(call: Callable, model: TarFlow | BiFlow, z: Tensor, y: Tensor | None, size: int) -> Tensor:
    """call(z, y) in parts on the model's device; the result is on that of z."""
    parts, device = [], _device(model)
    for rows in _parts(len(z), size):
        parts.append(call(*_rows(rows, device, z, y)).to(z.device))
        _trim_heap()
    return torch.cat(parts)


def _trim_heap() -> None:
    """Gives the system what glibc keeps of freed tensors, in pieces too small for the next ones: docs/measured.md."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def _device(model: TarFlow | BiFlow) -> torch.device:
    return next(model.parameters()).device


def _parts(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _feature_metrics(real: RealData, images: Tensor) -> dict[str, float | None]:
    """Of the images that all processes have; None but on the main one."""
    none, count = dict.fromkeys(("frechet", "precision", "recall")), sum(real.processes.gather([len(images)]))
    if real.judge is None or min(count, len(real.train_x)) <= FEATURES:
        return none
    train, features = real.train_features, real.processes.gather_rows(real.judge.features(images))
    if features is None:
        return none
    as_many = train[spread(len(train), len(features))]
    return dict(zip(none, (frechet_distance(features, train), *precision_recall(as_many, features)), strict=True))


def number(value: Tensor) -> float | None:
    """A scalar for a report; None (null in JSON) if it is NaN or infinite."""
    return float(value) if bool(torch.isfinite(value)) else None


def _relative(value: float | None, real: float) -> float | None:
    return value / real - 1 if value is not None and real else None


def _finite_rows(images: Tensor) -> Tensor:
    return torch.isfinite(images).flatten(1).all(1)


def _mean(images: Tensor) -> float | None:
    return number(images.double().mean()) if len(images) else None


def _std(images: Tensor) -> float | None:
    return number(images.double().std()) if len(images) else None
