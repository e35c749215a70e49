"""Frozen networks for perceptual terms: LPIPS, ConvNeXt-V2, VGG, a module that the user names, a small classifier.

The libraries (lpips, timm, torchvision: `pip install 'biflow[perceptual]'`) are imported when a run asks for them.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from biflow.config import to_mapping
from biflow.data import ImageData, spread
from biflow.ops._checks import check_choice
from biflow.train import frozen
from biflow.train.blocks import Residual
from biflow.train.crops import random_boxes, resized_crops
from biflow.train.frozen import Frozen
from biflow.train.term_configs import PerceptualConfig

CLASSIFIER_KIND = "perceptual classifier"
CLASSIFIER_SEED = 0xC1A5  # added to the run's: not the judge of `biflow evaluate`, nor the inverse
CLASSIFIER_STEPS = 600
CLASSIFIER_BATCH = 128
CLASSIFIER_RATE = 3e-3


class Backbone(Frozen):
    """A frozen module and which of its outputs are compared.

    images (B,C,S,S) about [-1, 1] -> feature maps, each (B,K,...) with its own K.

    Args:
        config: of the term; `checkpoint.fingerprint` covers it.
        module, inputs: as in `Frozen`.
        layers: submodules whose outputs are the features; None: what the module returns, a tensor or several.
        channel_weights: (K,) for each feature map; None: 1 / (number of feature maps), each channel alike.
    """

    def __init__(
        self,
        config: PerceptualConfig,
        module: nn.Module,
        *,
        inputs: str,
        layers: tuple[str, ...] | None = None,
        channel_weights: list[Tensor] | None = None,
    ):
        super().__init__(module, inputs)
        self.config, self.layers = config, layers
        self.channel_weights = None if channel_weights is None else nn.ParameterList(channel_weights)
        self.requires_grad_(False)
        self._found: dict[str, Tensor] = {}
        known = dict(module.named_modules())
        for name in layers or ():
            if name not in known:
                some = ", ".join(list(known)[1:9])
                raise ValueError(f"layers: expected names of submodules ({some}, ...), got {name!r}")
            known[name].register_forward_hook(lambda part, given, output, name=name: self._found.update({name: output}))

    def forward(self, images: Tensor) -> list[Tensor]:
        output = self.module(self.prepared(images))
        if self.layers is not None:
            output = [self._found.pop(name) for name in self.layers]
        return [output] if isinstance(output, Tensor) else list(output)


def build(config: PerceptualConfig, data: ImageData, seed: int) -> Backbone:
    """The backbone that `config` names, on the CPU; a classifier is not trained yet.

    Raises:
        ImportError: a library is missing. FileNotFoundError: no such file of weights, or no network to get them from.
        ValueError, TypeError: unknown names, weights that do not fit, a classifier without labels, a function that
        returns no module.
    """
    with frozen.building(f"perceptual term {config.label!r}", CLASSIFIER_SEED + seed):
        return BUILDERS.get(config.backbone, _named)(config, data)


# --- the libraries ---------------------------------------------------------------------------------------------------


def _lpips(config: PerceptualConfig, data: ImageData) -> Backbone:
    """LPIPS with its own weights of channels. Its shift and scale are ImageNet's mean and standard deviation."""
    lpips = frozen.library("lpips")
    net = config.model or "vgg"
    check_choice("model", net, ("vgg", "alex", "squeeze"))

    def make(own: bool) -> nn.Module:
        return lpips.LPIPS(net=net, pnet_rand=not own, verbose=False)

    model = frozen.with_weights(make, "torchvision", config.weights, part="net", rename=_as_in_torchvision)
    channel_weights = [layer.model[-1].weight.detach().flatten() for layer in model.lins]
    return Backbone(config, model.net, inputs="imagenet", channel_weights=channel_weights)


def _as_in_torchvision(name: str) -> str:
    """slice3.12.weight of LPIPS' trunk is features.12.weight."""
    return f"features.{name.partition('.')[2]}"


def _convnext_v2(config: PerceptualConfig, data: ImageData) -> Backbone:
    timm = frozen.library("timm")
    name = config.model or "convnextv2_base"
    check_choice("model", name.partition(".")[0], timm.list_models("convnextv2_*"))
    model = frozen.with_weights(
        lambda own: timm.create_model(name, pretrained=own, num_classes=0), "timm", config.weights
    )
    layers = config.layers or tuple(f"stages.{k}" for k in range(len(model.stages)))
    return Backbone(config, model, inputs="imagenet", layers=layers)


def _vgg(config: PerceptualConfig, data: ImageData) -> Backbone:
    models = frozen.library("torchvision").models
    name = config.model or "vgg16"
    check_choice("model", name, models.list_models(include="vgg*"))

    def make(own: bool) -> nn.Module:
        model = models.get_model(name, weights="DEFAULT" if own else None)
        model.avgpool, model.classifier = nn.Identity(), nn.Identity()
        return model

    model = frozen.with_weights(make, "torchvision", config.weights)
    pools = [k for k, part in enumerate(model.features) if isinstance(part, nn.MaxPool2d)]
    layers = config.layers or tuple(f"features.{k - 1}" for k in pools)
    return Backbone(config, model, inputs="imagenet", layers=layers)


# --- a module that the user names ------------------------------------------------------------------------------------


def _named(config: PerceptualConfig, data: ImageData) -> Backbone:
    module = frozen.named(config.backbone, config.weights, "backbone")
    return Backbone(config, module, inputs=config.inputs or "imagenet", layers=config.layers)


# --- a classifier of the run's own -----------------------------------------------------------------------------------


class ResidualClassifier(nn.Module):
    """Images (B,C,S,S) -> class scores (B,classes), by residual stages of 16, 32, 64 and 64 channels.

    Stage 0 keeps the image's size, the others halve it, as many as leave 4 pixels a side; BatchNorm, SiLU, then the
    mean over positions and one linear layer. The classifier of biflow.evaluate, which scores samples, has another
    architecture and other weights, so training does not optimise the score directly.
    """

    WIDTHS = (16, 32, 64, 64)

    def __init__(self, channels: int, img_size: int, num_classes: int):
        super().__init__()
        count = min(len(self.WIDTHS), 1 + max(0, math.ceil(math.log2(img_size / 4))))
        stages = []
        for k, width in enumerate(self.WIDTHS[:count]):
            down = nn.Conv2d(channels, width, 3, stride=1 if k == 0 else 2, padding=1)
            stages.append(nn.Sequential(down, nn.BatchNorm2d(width), nn.SiLU(), Residual(width)))
            channels = width
        self.stages = nn.ModuleList(stages)
        self.scores = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.scores(x.mean((2, 3)))


def _classifier(config: PerceptualConfig, data: ImageData) -> Backbone:
    if data.train_y is None or data.num_classes < 2:
        raise ValueError("backbone: expected data with labels of two classes or more to train a classifier, got none")
    model = ResidualClassifier(data.channels, data.img_size, data.num_classes)
    layers = config.layers or tuple(f"stages.{k}" for k in range(len(model.stages)))
    return Backbone(config, model, inputs="raw", layers=layers)


def prepare_classifier(
    backbone: Backbone, data: ImageData, out: Path | None, *, seed: int, flip: bool, progress: bool
) -> None:
    """Train the classifier in `backbone`, where it is, or read what an earlier sitting of the run trained.

    It is kept in out/perceptual_NAME.safetensors, with its accuracy on held-out images (None: there are none) in the
    metadata. A file that is damaged, or of another configuration, is written anew.
    """
    steps = backbone.config.steps or CLASSIFIER_STEPS

    def train(module: nn.Module) -> dict:
        train_classifier(module, data, steps=steps, seed=seed, flip=flip, progress=progress)
        return {"held_out_accuracy": _accuracy(module, data)}

    path = None if out is None else out / f"perceptual_{backbone.config.label}.safetensors"
    made_from = {"term": to_mapping(backbone.config), "seed": seed, "flip": flip}
    frozen.trained_once(backbone.module, train, path, CLASSIFIER_KIND, made_from)


@torch.enable_grad()
def train_classifier(
    model: ResidualClassifier, data: ImageData, *, steps: int, seed: int, flip: bool, progress: bool = False
) -> None:
    """Train on the labelled training images: Adam, one cosine cycle, cross-entropy, random crops of 80% to 100% of the
    area; frozen afterwards. The same inputs, seed, threads and (CPU) device give the same weights."""
    generator = torch.Generator().manual_seed(CLASSIFIER_SEED + seed)
    device, size = next(model.parameters()).device, data.img_size
    model.train().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=CLASSIFIER_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
    count = min(CLASSIFIER_BATCH, len(data.train_x))
    for _ in tqdm(range(steps), desc="classifier", unit="step", disable=not progress):
        rows = torch.randint(len(data.train_x), (count,), generator=generator)
        boxes = random_boxes(count, (size, size), (0.8, 1.0), (0.9, 1.1), generator)
        x = resized_crops(data.train_x.batch(rows), boxes, size)
        if flip:
            x = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
        loss = F.cross_entropy(model(x.to(device)), data.train_y[rows].to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    model.zero_grad(set_to_none=True)
    model.eval().requires_grad_(False)


@torch.no_grad()
def _accuracy(model: ResidualClassifier, data: ImageData) -> float | None:
    """Share of at most 1,000 held-out images that are classified right."""
    if data.val_y is None or not len(data.val_x):
        return None
    rows = spread(len(data.val_x), 1000)
    device, right = next(model.parameters()).device, 0
    for part in rows.split(CLASSIFIER_BATCH):
        right += int((model(data.val_x.batch(part).to(device)).argmax(1).cpu() == data.val_y[part]).sum())
    return right / len(rows)


BUILDERS = {"lpips": _lpips, "convnext_v2": _convnext_v2, "vgg": _vgg, "classifier": _classifier}
