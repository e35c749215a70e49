"""Configuration of what frozen networks add to a loss: perceptual terms, and alignment with an encoder."""

import math
import re
from dataclasses import dataclass, field

from biflow.config import check_fields
from biflow.models import TarFlowConfig
from biflow.train.checks import at_least, one_of, only_where

PRECISIONS = ("fp32", "bf16")
LIBRARY_BACKBONES = ("lpips", "convnext_v2", "vgg")
BACKBONES = (*LIBRARY_BACKBONES, "classifier")
INPUTS = ("imagenet", "raw")
REPRESENTATION_STRATEGIES = ("forward", "detach", "reverse")
REVERSE_CONTEXTS = ("cached", "live")
ENCODERS = ("dinov2", "self_supervised")
OWN_FUNCTION = r"\w+(\.\w+)*:\w+"  # "package.module:function"


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
            only_where(self, field_name, takes, f"backbone {self.backbone!r}", where)
        if self.layers == ():
            raise ValueError("layers: expected at least one name, or None, got none")
        if self.inputs is not None:
            one_of(self, INPUTS, "inputs")
        for field_name in ("crop", "steps"):
            if getattr(self, field_name) is not None:
                at_least(self, 1, field_name)
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
        cache or downloads; a function's module as it comes. self_supervised: the encoder.safetensors of an earlier run
        on images and tokens of the same size, of whose hash a damaged file fails; None: trained when the run starts.
    size: side to which images are resized (bicubic, antialiased) for the encoder. None: 224 for dinov2, else as they
        are. The feature map is resized to the flow's tokens in any case.
    inputs: what a function's module takes. "imagenet" (None): three channels (gray is repeated) normalised by
        ImageNet's mean and standard deviation; "raw": the data as it is, pixels in [-1, 1] or latents.
    precision: "fp32", or "bf16" for autocast; of the encoder alone, whatever the run's is.
    steps: training steps of self_supervised; None: 3000, or those of `weights`.
    seed: of the training of self_supervised; None: the run's, or that of `weights`. With one here runs of different
        seeds have the same encoder.
    """

    name: str = "self_supervised"
    model: str | None = None
    weights: str | None = None
    size: int | None = None
    inputs: str | None = None
    precision: str = "fp32"
    steps: int | None = None
    seed: int | None = None

    def __post_init__(self):
        check_fields(self)
        own = self.name not in ENCODERS
        if own and not re.fullmatch(OWN_FUNCTION, self.name):
            known = ", ".join(ENCODERS)
            raise ValueError(f"name: expected one of {known}, or 'package.module:function', got {self.name!r}")
        trained = self.name == "self_supervised"
        for field_name, takes, where in (
            ("model", self.name == "dinov2", "dinov2"),
            ("size", not trained, "all but self_supervised"),
            ("inputs", own, "'package.module:function'"),
            ("steps", trained, "self_supervised"),
            ("seed", trained, "self_supervised"),
        ):
            only_where(self, field_name, takes, f"name {self.name!r}", where)
        if self.inputs is not None:
            one_of(self, INPUTS, "inputs")
        one_of(self, PRECISIONS, "precision")
        for field_name, least in (("size", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, field_name) is not None:
                at_least(self, least, field_name)


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
        one_of(self, REPRESENTATION_STRATEGIES, "strategy")
        only_where(self, "context", self.strategy == "reverse", f"strategy {self.strategy!r}", "reverse")
        if self.context is not None:
            one_of(self, REVERSE_CONTEXTS, "context")
        if not (0 < self.weight < math.inf):
            raise ValueError(f"weight: expected a finite number > 0, got {self.weight}")
        at_least(self, 1, "projector_width")
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
