"""Frozen networks for perceptual terms: LPIPS, ConvNeXt-V2, VGG, a module that the user names, a small classifier.

The libraries (lpips, timm, torchvision: `pip install 'biflow[perceptual]'`) are imported when a run asks for them.
"""

import importlib
import math
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from biflow import checkpoint
from biflow.config import to_mapping
from biflow.data import ImageData, spread
from biflow.ops._checks import check_choice
from biflow.train.configs import PerceptualConfig
from biflow.train.crops import random_boxes, resized_crops

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]
CLASSIFIER_KIND = "perceptual classifier"
CLASSIFIER_SEED = 0xC1A5  # added to the run's: not the judge of `biflow evaluate`, nor the inverse
CLASSIFIER_STEPS = 600
CLASSIFIER_BATCH = 128
CLASSIFIER_RATE = 3e-3


class Backbone(nn.Module):
    """A frozen module and which of its outputs are compared.

    images (B,C,S,S) about [-1, 1] -> feature maps, each (B,K,...) with its own K.

    Args:
        config: of the term; `checkpoint.fingerprint` covers it.
        module: takes images as `inputs` says, "imagenet" or "raw" (`PerceptualConfig`); it is frozen here.
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
        super().__init__()
        self.config, self.inputs, self.layers = config, inputs, layers
        self.module = module
        self.channel_weights = None if channel_weights is None else nn.ParameterList(channel_weights)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, -1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        for part in module.modules():
            if getattr(part, "inplace", False):
                part.inplace = False  # it would overwrite what the layer before it gave
        self._found: dict[str, Tensor] = {}
        known = dict(module.named_modules())
        for name in layers or ():
            if name not in known:
                some = ", ".join(list(known)[1:9])
                raise ValueError(f"layers: expected names of submodules ({some}, ...), got {name!r}")
            known[name].register_forward_hook(lambda part, given, output, name=name: self._found.update({name: output}))

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.inputs == "imagenet":
            images = ((images.expand(-1, 3, -1, -1) + 1) / 2 - self.mean) / self.std
        output = self.module(images)
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
    try:
        with torch.random.fork_rng(devices=[]):  # weights that nobody sets are the same in every run of a seed
            torch.manual_seed(CLASSIFIER_SEED + seed)
            return BUILDERS.get(config.backbone, _named)(config, data)
    except (ImportError, FileNotFoundError, TypeError, ValueError) as error:
        kind = next(k for k in (ImportError, FileNotFoundError, TypeError, ValueError) if isinstance(error, k))
        raise kind(f"perceptual term {config.label!r}: {error}") from error


# --- the libraries ---------------------------------------------------------------------------------------------------


def _lpips(config: PerceptualConfig, data: ImageData) -> Backbone:
    """LPIPS with its own weights of channels. Its shift and scale are ImageNet's mean and standard deviation."""
    lpips = _library("lpips")
    net = config.model or "vgg"
    check_choice("model", net, ("vgg", "alex", "squeeze"))

    def make(own: bool) -> nn.Module:
        return lpips.LPIPS(net=net, pnet_rand=not own, verbose=False)

    model = _with_weights(make, "torchvision", config.weights, part="net", rename=_as_in_torchvision)
    channel_weights = [layer.model[-1].weight.detach().flatten() for layer in model.lins]
    return Backbone(config, model.net, inputs="imagenet", channel_weights=channel_weights)


def _as_in_torchvision(name: str) -> str:
    """slice3.12.weight of LPIPS' trunk is features.12.weight."""
    return f"features.{name.partition('.')[2]}"


def _convnext_v2(config: PerceptualConfig, data: ImageData) -> Backbone:
    timm = _library("timm")
    name = config.model or "convnextv2_base"
    check_choice("model", name.partition(".")[0], timm.list_models("convnextv2_*"))
    model = _with_weights(lambda own: timm.create_model(name, pretrained=own, num_classes=0), "timm", config.weights)
    layers = config.layers or tuple(f"stages.{k}" for k in range(len(model.stages)))
    return Backbone(config, model, inputs="imagenet", layers=layers)


def _vgg(config: PerceptualConfig, data: ImageData) -> Backbone:
    models = _library("torchvision").models
    name = config.model or "vgg16"
    check_choice("model", name, models.list_models(include="vgg*"))

    def make(own: bool) -> nn.Module:
        model = models.get_model(name, weights="DEFAULT" if own else None)
        model.avgpool, model.classifier = nn.Identity(), nn.Identity()
        return model

    model = _with_weights(make, "torchvision", config.weights)
    pools = [k for k, part in enumerate(model.features) if isinstance(part, nn.MaxPool2d)]
    layers = config.layers or tuple(f"features.{k - 1}" for k in pools)
    return Backbone(config, model, inputs="imagenet", layers=layers)


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch: its operators do not exist
        raise ImportError(
            f"expected {name}, which cannot be imported ({type(error).__name__}: {error}): "
            "pip install 'biflow[perceptual]'; torchvision has to be the release made for the installed torch, "
            f"{torch.__version__}"
        ) from error


def _with_weights(
    make: Callable[[bool], nn.Module],
    library: str,
    path: str | None,
    part: str = "",
    rename: Callable[[str], str] = str,
) -> nn.Module:
    """make(True), with the library's weights; or make(False) with those of submodule `part` read from the file."""
    if path is not None:
        model = make(False)
        _load(model.get_submodule(part), path, rename)
        return model
    try:
        return make(True)
    except Exception as error:  # the libraries' ways to fail at a download have nothing in common
        raise FileNotFoundError(
            f"expected weights in the cache of {library}, or a network to download them; got {type(error).__name__}: "
            f"{error}. Offline, give a file that was downloaded elsewhere: weights=PATH"
        ) from error


def _load(module: nn.Module, path: str, rename: Callable[[str], str] = str) -> None:
    """Read the module's weights from a file of tensors by name. What else the file has, a head for one, is not read."""
    found = _read(Path(path).expanduser())
    wanted = module.state_dict()
    state = {}
    for own, tensor in wanted.items():
        name = rename(own)
        shape = tuple(found[name].shape) if name in found else None
        if shape != tuple(tensor.shape):
            got = f"none of that name but {', '.join(list(found)[:3])}, ..." if shape is None else str(shape)
            raise ValueError(f"{path}: expected a tensor {name!r} of shape {tuple(tensor.shape)}, got {got}")
        state[own] = found[name]
    module.load_state_dict(state)


def _read(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        found = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        # torch's own text on what needs unpickling is the advice to trust the file
        why = "one that would have to be unpickled" if isinstance(error, pickle.UnpicklingError) else error
        raise ValueError(f"{path}: expected .safetensors or a state dict written by torch.save, got {why}") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: expected a state dict, tensors by name; got {type(found).__name__}")
    return found


# --- a module that the user names ------------------------------------------------------------------------------------


def _named(config: PerceptualConfig, data: ImageData) -> Backbone:
    where, _, name = config.backbone.partition(":")
    try:
        function = getattr(importlib.import_module(where), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"backbone: expected a function that can be imported, got {config.backbone!r}: {error}"
        ) from error
    module = function()
    if not isinstance(module, nn.Module):
        raise TypeError(f"{config.backbone}(): expected a torch.nn.Module, got {type(module).__name__}")
    if config.weights is not None:
        _load(module, config.weights)
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
            stages.append(nn.Sequential(down, nn.BatchNorm2d(width), nn.SiLU(), _Residual(width)))
            channels = width
        self.stages = nn.ModuleList(stages)
        self.scores = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.scores(x.mean((2, 3)))


class _Residual(nn.Module):
    """x + conv(SiLU(norm(conv(x)))), width channels."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.outer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.silu(self.norm(self.inner(x))))


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
    path = None if out is None else out / f"perceptual_{backbone.config.label}.safetensors"
    made_from = {"term": to_mapping(backbone.config), "seed": seed, "flip": flip}
    if path is not None and path.exists():
        try:
            found = checkpoint.read(path)
            if (found.kind, found.config) != (CLASSIFIER_KIND, made_from):
                raise ValueError(f"{path}: expected a classifier made from {made_from}, got {found.config}")
            backbone.module.load_state_dict(found.tensors)
            return
        except (RuntimeError, ValueError) as error:
            tqdm.write(f"biflow: training the classifier again: {error}", file=sys.stderr)
    train_classifier(
        backbone.module, data, steps=backbone.config.steps or CLASSIFIER_STEPS, seed=seed, flip=flip, progress=progress
    )
    if path is not None:
        metadata = {"held_out_accuracy": _accuracy(backbone.module, data)}
        checkpoint.write(path, CLASSIFIER_KIND, backbone.module.state_dict(), made_from, metadata)


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
