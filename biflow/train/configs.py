"""Configuration of a training run: one dataclass a stage, the same fields in YAML, on the command line and in files."""

import math
from dataclasses import dataclass, field

import torch

from biflow.config import check_fields
from biflow.data import DataConfig
from biflow.models import BiFlowConfig, TarFlowConfig
from biflow.ops._checks import local_device, parse_device

NORMALIZATIONS = ("none", "token_rms", "mean_square")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a learning rate that rises linearly for `warmup_steps`, then falls along a cosine to `min_lr`.

    steps, batch_size: optimizer steps, and images in each.
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
        _at_least(self, 1, "steps", "batch_size")
        _at_least(self, 0, "warmup_steps", "min_lr", "weight_decay")
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
    """How a run is carried out. A resumed run may change the `*_every` fields and `keep`, nothing else.

    seed: of the initial weights, the order of the data and all noise.
    log_every, validate_every, checkpoint_every: in steps; the last step does all three.
    validate_images: at most so many held-out images, evenly spread, are used in a validation.
    keep: number of newest checkpoints kept.
    precision: "fp32", or "bf16" for autocast (weights and optimizer stay fp32).
    device: where to train, one that the ops have kernels for.
    threads: CPU threads (None: as torch has it); another number may change the last bits.
    tensorboard: also write TensorBoard event files.
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

    def __post_init__(self):
        check_fields(self)
        _at_least(self, 0, "seed")
        _at_least(self, 1, "log_every", "validate_every", "checkpoint_every", "validate_images", "keep")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.threads is not None:
            _at_least(self, 1, "threads")
        parse_device(self.device)

    def torch_device(self) -> torch.device:
        """`device`; ValueError where this machine has none. Not asked before: configurations travel in checkpoints."""
        return local_device(self.device)


@dataclass(frozen=True)
class AlignmentConfig:
    """Hidden alignment (arXiv 2512.10953; see `alignment_loss`).

    weight_output, weight_states: weights of the clean output's term and of each trajectory state's term.
    normalize: what squared errors are divided by: "none"; "token_rms": the mean square of the target's token;
        "mean_square": the mean square of the sample's target.
    adaptive_power, adaptive_constant: p and c of the adaptive weight (D + c)^-p; p = 0: off.
    """

    weight_output: float = 2.0
    weight_states: float = 0.5
    normalize: str = "mean_square"
    adaptive_power: float = 0.0
    adaptive_constant: float = 0.01

    def __post_init__(self):
        check_fields(self)
        _at_least(self, 0, "weight_output", "weight_states", "adaptive_power")
        if self.weight_output + self.weight_states == 0:
            raise ValueError("weight_output, weight_states: expected at least one of them above 0")
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected one of {', '.join(NORMALIZATIONS)}, got {self.normalize!r}")
        if not (0 < self.adaptive_constant < math.inf):
            raise ValueError(f"adaptive_constant: expected a finite number > 0, got {self.adaptive_constant}")


@dataclass(frozen=True, kw_only=True)
class FlowTraining:
    """Stage one. model.noise_std > 0: Gaussian noise of that size on the data; 0: uniform dequantisation noise.

    label_drop: share of the labels replaced by -1 (unconditional) in training.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: TarFlowConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    label_drop: float = 0.1

    def __post_init__(self):
        check_fields(self)
        _check_drop(self.label_drop)
        if self.model.context_dim:
            raise ValueError(f"model.context_dim: expected 0 (data has no context), got {self.model.context_dim}")


@dataclass(frozen=True, kw_only=True)
class InverseTraining:
    """Stage two. Guidance strengths are drawn from U(0, model.max_guidance)."""

    data: DataConfig = field(default_factory=DataConfig)
    model: BiFlowConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    label_drop: float = 0.1
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)

    def __post_init__(self):
        check_fields(self)
        _check_drop(self.label_drop)
        if self.model.max_guidance and not self.label_drop:
            raise ValueError("label_drop: expected more than 0 with max_guidance, which needs an unconditional output")


def flatten(mapping: dict, prefix: str = "") -> dict[str, object]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat = {}
    for key, value in mapping.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _at_least(config, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (low <= value < math.inf):
            raise ValueError(f"{name}: expected a finite number of at least {low}, got {value}")


def _check_drop(label_drop: float) -> None:
    if not (0 <= label_drop < 1):
        raise ValueError(f"label_drop: expected a number in [0, 1), got {label_drop}")
