"""Configuration of a training run: one dataclass a stage, the same fields in YAML, on the command line and in files."""

import math
from dataclasses import dataclass, field

import torch

from biflow.config import check_fields
from biflow.data import DataConfig
from biflow.data.images import PIXEL_CHANNELS
from biflow.models import BiFlowConfig, TarFlowConfig
from biflow.ops._checks import local_device, parse_device
from biflow.train.checks import at_least, one_of
from biflow.train.distributed import ParallelConfig, check_parallel
from biflow.train.term_configs import PRECISIONS, PerceptualConfig, RepresentationConfig

STRATEGIES = ("naive", "hidden_distillation", "hidden_alignment")
NORMALIZATIONS = ("none", "token_rms", "mean_square")
TARGET_NORMS = ("none", "token_rms", "global")
GUIDANCE_DRAWS = ("uniform", "log_uniform")
RUN_PRECISIONS = (*PRECISIONS, "fp64")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a learning rate that rises linearly for `warmup_steps`, then falls along a cosine to `min_lr`.

    steps, batch_size: optimizer steps, and images in each, of all processes together.
    weight_decay: of the linear layers' weight matrices; biases, norms, embeddings and tokens are not decayed.
    grad_clip: largest L2 norm of the gradient; None: not clipped.
    ema: decay of the averaged weights; at step k it is min(ema, (1 + k) / (10 + k)). 0: no averaging.
    """

    steps: int = 1000
    batch_size: int = 128
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    grad_clip: float | None = 1.0
    ema: float = 0.9999

    def __post_init__(self):
        check_fields(self)
        at_least(self, 1, "steps", "batch_size")
        at_least(self, 0, "warmup_steps", "min_lr", "weight_decay")
        if not (0 < self.lr < math.inf and self.min_lr <= self.lr):
            raise ValueError(f"lr: expected a finite number > 0, at least min_lr {self.min_lr}; got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip: expected a number > 0 or None, got {self.grad_clip}")
        if not (0 <= self.ema < 1):
            raise ValueError(f"ema: expected a number in [0, 1), got {self.ema}")


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out. A resumed run may change what does not change its weights (`runs.FREE_FIELDS`): the
    `*_every` fields, keep, tensorboard, wandb, peak_flops, activation_checkpointing and sample_*; also device, which
    changes their bits.

    seed: of the initial weights, the order of the data and all noise.
    log_every, validate_every, checkpoint_every: in steps; the last step does all three.
    validate_images: at most so many held-out images, evenly spread, are used in a validation.
    keep: number of newest checkpoints kept.
    precision: "fp32", or "bf16" for autocast (weights and optimizer stay fp32). "fp64" is for comparing runs; it takes
        no other networks in the loss, and sampling does not take its models.
    device: where to train, one that the ops have kernels for; "cuda" in several processes: a GPU each.
    threads: CPU threads (None: as torch has it); another number may change the last bits.
    tensorboard: also write TensorBoard event files.
    wandb: project of Weights & Biases that the metrics go to, too; None: not used.
    peak_flops: FLOP/s that the device reaches at most in `precision`, for the MFU; None: from a table of GPUs, without
        an MFU where that has no entry.
    compile: torch.compile of the models' passes, forward and backward. The first step takes long; another rounding.
    activation_checkpointing: compute activations again in the backward pass instead of keeping them: less memory, the
        same gradients, about a third more work.
    sample_every: steps after which the averaged model draws a grid of samples (the last step does, too); None: never. A
        flow is decoded exactly for it, which may take long on a CPU.
    sample_images: images of a grid.
    sample_guidance: strength; None: 1 with classes (at most max_guidance), 0 without.
    sample_vae: of a model of latents: the AutoencoderKL that makes images of the samples, a folder or its name on the
        hub, as `biflow sample --vae`.
    """

    seed: int = 0
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 500
    validate_images: int = 1024
    keep: int = 2
    precision: str = "fp32"
    device: str = "cpu"
    threads: int | None = None
    tensorboard: bool = True
    wandb: str | None = None
    peak_flops: float | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    sample_every: int | None = None
    sample_images: int = 16
    sample_guidance: float | None = None
    sample_vae: str | None = None

    def __post_init__(self):
        check_fields(self)
        at_least(self, 0, "seed")
        at_least(self, 1, "log_every", "validate_every", "checkpoint_every", "validate_images", "keep")
        one_of(self, RUN_PRECISIONS, "precision")
        at_least(self, 1, "sample_images")
        for name, low in (("threads", 1), ("sample_every", 1), ("sample_guidance", 0)):
            if getattr(self, name) is not None:
                at_least(self, low, name)
        if self.peak_flops is not None and not 0 < self.peak_flops < math.inf:
            raise ValueError(f"peak_flops: expected a finite number > 0, got {self.peak_flops}")
        for name, what in (("wandb", "the name of a project"), ("sample_vae", "an autoencoder's folder or name")):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: expected {what} or None, got an empty string")
        parse_device(self.device)

    def torch_device(self) -> torch.device:
        """`device`; ValueError where this machine has none. Not asked before: configurations travel in checkpoints."""
        return local_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float64 if self.precision == "fp64" else torch.float32


@dataclass(frozen=True)
class AlignmentConfig:
    """What the learned inverse is trained to match (arXiv 2512.10953, section 3; see `alignment_loss`).

    strategy: "naive": the output alone. "hidden_distillation": also the trajectory's states, which the hidden states
        have to be: the path is forced through data space (model.reembed_states). "hidden_alignment": also the
        trajectory's states, read from free hidden states by a learned head each.
    weight_output: weight of the output's term.
    weight_states: weight of each state's term: one number for all, or one a state x_0, ..., x_{B-1} (x_1, ...,
        x_{B-1} without learned denoising, where x_0 is the output). The naive strategy has no such terms.
    normalize: what squared errors are divided by: "none"; "token_rms": the mean square of the target's token;
        "mean_square": the mean square of the sample's target.
    normalize_targets: trajectory normalisation: what the states are divided by before they are targets, so that heads
        predict directions rather than sizes: "none"; "token_rms": the root mean square of the state's token; "global":
        that of the sample's state, ||x_i|| / sqrt(T D). The output's target is never divided.
    adaptive_power, adaptive_constant: p and c of the adaptive weight (D + c)^-p; p = 0: off.
    """

    strategy: str = "hidden_alignment"
    weight_output: float = 2.0
    weight_states: float | tuple[float, ...] = 0.5
    normalize: str = "mean_square"
    normalize_targets: str = "none"
    adaptive_power: float = 0.0
    adaptive_constant: float = 0.01

    def __post_init__(self):
        check_fields(self)
        at_least(self, 0, "weight_output", "adaptive_power")
        one_of(self, STRATEGIES, "strategy")
        one_of(self, NORMALIZATIONS, "normalize")
        one_of(self, TARGET_NORMS, "normalize_targets")
        several = isinstance(self.weight_states, tuple)
        for weight in self.weight_states if several else (self.weight_states,):
            if not (0 <= weight < math.inf):
                raise ValueError(f"weight_states: expected finite numbers of at least 0, got {self.weight_states}")
        if self.strategy == "naive" and self.weight_output == 0:
            raise ValueError("weight_output: expected more than 0 with the naive strategy, which has no other term")
        if self.weight_output == 0 and not self.has_states:
            raise ValueError("weight_output, weight_states: expected at least one of them above 0")
        if not (0 < self.adaptive_constant < math.inf):
            raise ValueError(f"adaptive_constant: expected a finite number > 0, got {self.adaptive_constant}")

    @property
    def has_states(self) -> bool:
        """Whether any trajectory state has a term of its own."""
        weights = self.weight_states if isinstance(self.weight_states, tuple) else (self.weight_states,)
        return self.strategy != "naive" and any(weights)

    def state_weights(self, count: int) -> tuple[float, ...]:
        """The weights of `count` states' terms."""
        return self.weight_states if isinstance(self.weight_states, tuple) else (self.weight_states,) * count


@dataclass(frozen=True, kw_only=True)
class FlowTraining:
    """Stage one. model.noise_std > 0: Gaussian noise of that size on the data; 0: uniform dequantisation noise.

    label_drop: share of the labels replaced by -1 (unconditional) in training.
    representation: alignment of the flow's features with an encoder's, beside the likelihood; None: likelihood alone.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: TarFlowConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    label_drop: float = 0.1
    representation: RepresentationConfig | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        check_fields(self)
        _check_drop(self.label_drop)
        _check_samples(self.run, self.model)
        check_parallel(self, "representation", self.representation is not None)
        if self.model.context_dim:
            raise ValueError(f"model.context_dim: expected 0 (data has no context), got {self.model.context_dim}")
        if self.representation is not None:
            try:
                self.representation.pairs(self.model)
            except ValueError as error:
                raise ValueError(f"representation.{error}") from None
            if self.representation.cache_features and self.data.crop == "random":
                raise ValueError(
                    "representation.cache_features: expected false with data.crop 'random', since every step sees "
                    f"another crop, got {self.representation.cache_features!r}"
                )


@dataclass(frozen=True, kw_only=True)
class InverseTraining:
    """Stage two.

    label_drop: share of the labels replaced by -1 (unconditional) in training.
    guidance_draw: how guidance strengths w in [0, model.max_guidance] are drawn, with u ~ U(0, 1): "uniform":
        w = u max_guidance. "log_uniform": w = expm1(u log1p(max_guidance)), whose 1 + w is log-uniform. The paper does
        not say; both are choices of ours.
    perceptual: terms on the output as an image, beside those of `alignment`.
    decoder: the AutoencoderKL by which these terms see latents, a folder or its name on the hub, as `biflow latents
        encode --vae`; for terms on latents alone.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: BiFlowConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    label_drop: float = 0.1
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    guidance_draw: str = "uniform"
    perceptual: tuple[PerceptualConfig, ...] = ()
    decoder: str | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        check_fields(self)
        _check_drop(self.label_drop)
        _check_samples(self.run, self.model, self.model.max_guidance or math.inf)
        check_parallel(self, "perceptual", bool(self.perceptual))
        one_of(self, GUIDANCE_DRAWS, "guidance_draw")
        strategy, weights = self.alignment.strategy, self.alignment.weight_states
        if self.model.reembed_states != (strategy == "hidden_distillation"):
            raise ValueError(
                f"model.reembed_states: expected {not self.model.reembed_states} with alignment.strategy {strategy!r} "
                f"(hidden distillation, and only that, forces the states), got {self.model.reembed_states}"
            )
        if isinstance(weights, tuple) and len(weights) != self.model.num_groups - 1:
            first = 0 if self.model.learned_denoising else 1
            raise ValueError(
                f"alignment.weight_states: expected one number, or {self.model.num_groups - 1} (states x_{first} to "
                f"x_{self.model.num_blocks - 1}), got {len(weights)}"
            )
        labels = [term.label for term in self.perceptual]
        if len(set(labels)) < len(labels):
            raise ValueError(f"perceptual: expected terms of different names (name=), got {', '.join(labels)}")
        latents = self.model.in_channels not in PIXEL_CHANNELS
        if labels and latents and self.decoder is None:
            raise ValueError(
                "decoder: expected the autoencoder by which perceptual terms see latents (model.in_channels "
                f"{self.model.in_channels}), got None"
            )
        if self.decoder is not None and not (labels and latents):
            raise ValueError(f"decoder: expected None but for perceptual terms on latents, got {self.decoder!r}")
        if self.model.max_guidance and not self.label_drop:
            raise ValueError("label_drop: expected more than 0 with max_guidance, which needs an unconditional output")


def flatten(mapping: dict, prefix: str = "") -> dict[str, object]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat = {}
    for key, value in mapping.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _check_samples(run: RunConfig, model: TarFlowConfig | BiFlowConfig, largest: float = math.inf) -> None:
    """That sample grids can be drawn, if they are wanted: ValueError. largest: guidance."""
    latents = model.in_channels not in PIXEL_CHANNELS
    if run.sample_vae is not None and not latents:
        raise ValueError(
            f"run.sample_vae: expected None with images (model.in_channels {model.in_channels}; it decodes latents), "
            f"got {run.sample_vae!r}"
        )
    if run.sample_every is None:
        return
    if latents and run.sample_vae is None:
        raise ValueError(
            f"run.sample_vae: expected with run.sample_every {run.sample_every} the autoencoder by which latents "
            f"(model.in_channels {model.in_channels}) can be seen, got None"
        )
    guidance = run.sample_guidance or 0.0
    if guidance > (largest if model.num_classes else 0.0):
        bound = f"at most model.max_guidance {largest:g}" if model.num_classes else "0 without classes"
        raise ValueError(f"run.sample_guidance: expected {bound}, got {guidance:g}")


def _check_drop(label_drop: float) -> None:
    if not (0 <= label_drop < 1):
        raise ValueError(f"label_drop: expected a number in [0, 1), got {label_drop}")
