"""Configuration of a training run: one dataclass a stage, the same fields in YAML, on the command line and in files."""

import math
import re
from dataclasses import dataclass, field

import torch

from biflow.config import check_fields
from biflow.data import DataConfig
from biflow.data.images import PIXEL_CHANNELS
from biflow.models import BiFlowConfig, TarFlowConfig
from biflow.ops._checks import local_device, parse_device
from biflow.train.distributed import ParallelConfig, check_parallel

STRATEGIES = ("naive", "hidden_distillation", "hidden_alignment")
NORMALIZATIONS = ("none", "token_rms", "mean_square")
TARGET_NORMS = ("none", "token_rms", "global")
GUIDANCE_DRAWS = ("uniform", "log_uniform")
PRECISIONS = ("fp32", "bf16")
RUN_PRECISIONS = (*PRECISIONS, "fp64")
LIBRARY_BACKBONES = ("lpips", "convnext_v2", "vgg")
BACKBONES = (*LIBRARY_BACKBONES, "classifier")
INPUTS = ("imagenet", "raw")
REPRESENTATION_STRATEGIES = ("forward", "detach", "reverse")
REVERSE_CONTEXTS = ("cached", "live")
ENCODERS = ("dinov2", "self_supervised")
OWN_FUNCTION = r"\w+(\.\w+)*:\w+"  # "package.module:function"


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
    """How a run is carried out. A resumed run may change the `*_every` fields and `keep`, nothing else here.

    seed: of the initial weights, the order of the data and all noise.
    log_every, validate_every, checkpoint_every: in steps; the last step does all three.
    validate_images: at most so many held-out images, evenly spread, are used in a validation.
    keep: number of newest checkpoints kept.
    precision: "fp32", or "bf16" for autocast (weights and optimizer stay fp32). "fp64" is for comparing runs; it takes
        no other networks in the loss, and sampling does not take its models.
    device: where to train, one that the ops have kernels for; "cuda" in several processes: a GPU each.
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
        _one_of(self, RUN_PRECISIONS, "precision")
        if self.threads is not None:
            _at_least(self, 1, "threads")
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
        _at_least(self, 0, "weight_output", "adaptive_power")
        _one_of(self, STRATEGIES, "strategy")
        _one_of(self, NORMALIZATIONS, "normalize")
        _one_of(self, TARGET_NORMS, "normalize_targets")
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
class PerceptualConfig:
    """A perceptual term: how far apart a frozen network finds the output and its target (`perceptual.Perceptual`).

    backbone: "lpips": LPIPS (arXiv 1801.03924). "convnext_v2": timm's. "vgg": torchvision's. "classifier": a small one
        that is trained on the labelled training images when the run starts. "package.module:function": a function
        without arguments that returns a torch.nn.Module; it maps images to one feature map (B,K,...) or several.
    weight: of the term in the loss.
    name: what the metrics call it, "perceptual_NAME"; None: the backbone, or the function's name.
    model: which of the library's networks. lpips: "vgg" (the default), "alex" or "squeeze"; convnext_v2: a name of
        timm's ("convnextv2_base"); vgg: a name of torchvision's ("vgg16").
    weights: a file of weights, .safetensors or what torch.save makes of a state dict. None: those that the library
        has in its cache or downloads; a function's module as it comes. lpips: the trunk's, as torchvision has it.
    layers: names of the submodules whose outputs are compared. None: vgg: the last layer before each pooling;
        convnext_v2, classifier: every stage; a function's module: what it returns. lpips has its own.
    crop: side to which crops are resized, the same random one of output and target; None: the whole image as it is.
    crop_scale, crop_ratio: ranges of a crop's share of the area, and of width / height, as of torchvision's
        RandomResizedCrop. (1, 1) both: no crop, the whole image resized.
    inputs: what a function's module takes. "imagenet" (None): three channels (gray is repeated) normalised by
        ImageNet's mean and standard deviation; "raw": the data's channels in [-1, 1].
    steps: training steps of the classifier; None: 600.
    """

    backbone: str
    weight: float
    name: str | None = None
    model: str | None = None
    weights: str | None = None
    layers: tuple[str, ...] | None = None
    crop: int | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    inputs: str | None = None
    steps: int | None = None

    def __post_init__(self):
        check_fields(self)
        if self.backbone not in BACKBONES and not re.fullmatch(OWN_FUNCTION, self.backbone):
            known = ", ".join(BACKBONES)
            raise ValueError(f"backbone: expected one of {known}, or 'package.module:function', got {self.backbone!r}")
        if not (0 < self.weight < math.inf):
            raise ValueError(f"weight: expected a finite number > 0, got {self.weight}")
        if not re.fullmatch(r"\w+", self.label):
            raise ValueError(f"name: expected letters, digits and underscores, got {self.name!r}")
        own = self.backbone not in BACKBONES
        for field_name, takes, where in (
            ("model", self.backbone in LIBRARY_BACKBONES, ", ".join(LIBRARY_BACKBONES)),
            ("weights", self.backbone != "classifier", "all but classifier"),
            ("layers", self.backbone != "lpips", "all but lpips"),
            ("inputs", own, "'package.module:function'"),
            ("steps", self.backbone == "classifier", "classifier"),
        ):
            _only_where(self, field_name, takes, f"backbone {self.backbone!r}", where)
        if self.layers == ():
            raise ValueError("layers: expected at least one name, or None, got none")
        if self.inputs is not None:
            _one_of(self, INPUTS, "inputs")
        for field_name in ("crop", "steps"):
            if getattr(self, field_name) is not None:
                _at_least(self, 1, field_name)
        low, high = self.crop_scale
        if not (0 < low <= high <= 1):
            raise ValueError(f"crop_scale: expected 0 < smallest <= largest <= 1, got {self.crop_scale}")
        low, high = self.crop_ratio
        if not (0 < low <= high < math.inf):
            raise ValueError(f"crop_ratio: expected 0 < smallest <= largest, got {self.crop_ratio}")

    @property
    def label(self) -> str:
        """`name`, or what stands for it."""
        return self.name if self.name is not None else self.backbone.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The frozen encoder whose features a flow's are aligned with; see docs/flowback.md.

    name: "dinov2": DINOv2 (arXiv 2304.07193) by timm. "self_supervised": a small network that is trained without labels
        on the training images when the run starts (`self_supervised`). "package.module:function": a function without
        arguments that returns a torch.nn.Module; it maps what the data yields, (B,C,S,S), to one feature map (B,F,h,w).
    model: dinov2: which of timm's DINOv2 models; None: "vit_base_patch14_dinov2.lvd142m", the paper's.
    weights: a file of weights, .safetensors or what torch.save makes of a state dict. None: those that timm has in its
        cache or downloads; a function's module as it comes.
    size: side to which images are resized (bicubic, antialiased) for the encoder. None: 224 for dinov2, else as they
        are. The feature map is resized to the flow's tokens in any case.
    inputs: what a function's module takes. "imagenet" (None): three channels (gray is repeated) normalised by
        ImageNet's mean and standard deviation; "raw": the data as it is, pixels in [-1, 1] or latents.
    precision: "fp32", or "bf16" for autocast; of the encoder alone, whatever the run's is.
    steps: training steps of self_supervised; None: 600.
    """

    name: str = "self_supervised"
    model: str | None = None
    weights: str | None = None
    size: int | None = None
    inputs: str | None = None
    precision: str = "fp32"
    steps: int | None = None

    def __post_init__(self):
        check_fields(self)
        own = self.name not in ENCODERS
        if own and not re.fullmatch(OWN_FUNCTION, self.name):
            known = ", ".join(ENCODERS)
            raise ValueError(f"name: expected one of {known}, or 'package.module:function', got {self.name!r}")
        trained = self.name == "self_supervised"
        for field_name, takes, where in (
            ("model", self.name == "dinov2", "dinov2"),
            ("weights", not trained, "all but self_supervised"),
            ("size", not trained, "all but self_supervised"),
            ("inputs", own, "'package.module:function'"),
            ("steps", trained, "self_supervised"),
        ):
            _only_where(self, field_name, takes, f"name {self.name!r}", where)
        if self.inputs is not None:
            _one_of(self, INPUTS, "inputs")
        _one_of(self, PRECISIONS, "precision")
        for field_name in ("size", "steps"):
            if getattr(self, field_name) is not None:
                _at_least(self, 1, field_name)


@dataclass(frozen=True, kw_only=True)
class RepresentationConfig:
    """Alignment of a flow's features with a frozen encoder's in stage one (FlowBack, arXiv 2511.22345, section 4.2).

    features: (block, layer) pairs whose features are aligned, both from 0, blocks in encode order, -1 the last. The
        paper's best for samples is layer 6 of 8, by its count, of the last two blocks: [[-1, 5], [-2, 5]].
    strategy: which weights the loss of a block's features reaches. "forward": that block and those before it. "detach":
        that block. "reverse": `biflow.pseudo_reverse`, by `context`.
    context: "live" (None): that block and those after it, the gradient of a decode. "cached": the paper's algorithm 2,
        whose features and gradients are those of "detach", at a higher price. With "reverse" only.
    weight: lambda, of the alignment in the loss.
    projector_width: of both hidden layers of the projector, Linear, SiLU, Linear, SiLU, Linear.
    shared_projector: one projector for all features; False: one each.
    encoder: what the features are aligned with.
    cache_features: keep the encoder's features of all training images on disk: True: in the run's folder; a folder, for
        several runs; False: compute them in every step. The same bits. A resumed run may change it. Not with random
        crops.
    """

    features: tuple[tuple[int, int], ...]
    strategy: str = "detach"
    context: str | None = None
    weight: float = 0.1
    projector_width: int = 1024
    shared_projector: bool = True
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    cache_features: bool | str = False

    def __post_init__(self):
        check_fields(self)
        if not self.features:
            raise ValueError("features: expected at least one (block, layer), got none")
        _one_of(self, REPRESENTATION_STRATEGIES, "strategy")
        _only_where(self, "context", self.strategy == "reverse", f"strategy {self.strategy!r}", "reverse")
        if self.context is not None:
            _one_of(self, REVERSE_CONTEXTS, "context")
        if not (0 < self.weight < math.inf):
            raise ValueError(f"weight: expected a finite number > 0, got {self.weight}")
        _at_least(self, 1, "projector_width")
        if self.cache_features == "":
            raise ValueError("cache_features: expected true, false or a folder, got an empty string")

    def pairs(self, model: TarFlowConfig) -> tuple[tuple[int, int], ...]:
        """`features` of that model, counted from 0. ValueError: one that it does not have, or one twice."""
        found = []
        for block, layer in self.features:
            if not -model.num_blocks <= block < model.num_blocks:
                raise ValueError(f"features: expected blocks below {model.num_blocks}, got ({block}, {layer})")
            block %= model.num_blocks
            layers = model.block(block).layers
            if not -layers <= layer < layers:
                raise ValueError(f"features: expected layers of block {block} below {layers}, got ({block}, {layer})")
            found.append((block, layer % layers))
        if len(set(found)) < len(found):
            raise ValueError(f"features: expected each (block, layer) once, got {found}")
        return tuple(found)


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
    perceptual: terms on the output as an image, beside those of `alignment`. The data has to be images, not latents.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: BiFlowConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    label_drop: float = 0.1
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    guidance_draw: str = "uniform"
    perceptual: tuple[PerceptualConfig, ...] = ()
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        check_fields(self)
        _check_drop(self.label_drop)
        check_parallel(self, "perceptual", bool(self.perceptual))
        _one_of(self, GUIDANCE_DRAWS, "guidance_draw")
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
        if labels and self.model.in_channels not in PIXEL_CHANNELS:
            raise ValueError(
                "perceptual: expected images of 1 or 3 channels, got model.in_channels "
                f"{self.model.in_channels}: latents would have to be decoded to pixels first, which biflow does not do"
            )
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


def _one_of(config, choices: tuple[str, ...], name: str) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _only_where(config, name: str, takes: bool, given: str, where: str) -> None:
    """ValueError: a field that is set beside a setting that does not take it."""
    got = getattr(config, name)
    if got is not None and not takes:
        raise ValueError(f"{name}: expected None with {given} (for {where}), got {got!r}")


def _check_drop(label_drop: float) -> None:
    if not (0 <= label_drop < 1):
        raise ValueError(f"label_drop: expected a number in [0, 1), got {label_drop}")
