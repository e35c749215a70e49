"""Frozen encoders that a flow's features are aligned with: DINOv2, a module that the user names, one of the run's own.

An encoder is given what the data set yields, pixels or latents (B,C,S,S), and gives one feature map (B,F,h,w). timm
(`pip install 'biflow[representation]'`) is imported when a run asks for it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from biflow import checkpoint
from biflow.config import to_mapping
from biflow.data import ImageData, spread
from biflow.data.images import PIXEL_CHANNELS
from biflow.evaluate.probe import linear_probe
from biflow.ops._checks import check_choice
from biflow.train import frozen, self_supervised
from biflow.train.frozen import Frozen
from biflow.train.term_configs import EncoderConfig

DINOV2 = "vit_base_patch14_dinov2.lvd142m"
DINOV2_SIZE = 224  # 16 x 16 patches of 14 pixels
KIND = "self-supervised network"
TRAIN_IMAGES, HELD_OUT_IMAGES = 4000, 2000  # of the encoders' probes
PIXEL_WEIGHTS = 100_000  # of a probe of the pixels, at most: of more it would take minutes
PIXEL_ITERATIONS = 200


class Encoder(Frozen):
    """Images or latents (B,C,S,S) -> targets (B,T,F): unit vectors in fp16, one a token of the flow, without a graph.

    The feature map is resized to the tokens' grid (bilinear, antialiased), its positions made directions. fp16 rounds a
    direction by 1e-3 at most, and what is rounded is the same whether it comes from a cache or not.

    Attributes:
        config: the settings by name, of a network read from a file those that it was made by; what
            `checkpoint.fingerprint` covers, so one and the same network has one, wherever it comes from.
        known: of `probed` and more, what is said of a self-supervised network.

    Args:
        settings: as the user gave them.
        module, inputs: as in `Frozen`; the module returns (B,F,h,w).
        size: side that images are resized to (bicubic, antialiased); None: as they are.
        grid: tokens a side, T = grid^2.
    """

    def __init__(self, settings: EncoderConfig, module: nn.Module, *, inputs: str, size: int | None, grid: int):
        super().__init__(module, inputs)
        self.settings, self.size, self.grid = settings, size, grid
        self.config = {k: v for k, v in to_mapping(settings).items() if k != "seed" or v is not None}
        self.known: Mapping[str, Any] = {}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            found = self.maps(images)
        with torch.autocast(images.device.type, enabled=False):
            found = resized(found.float(), self.grid, "bilinear")
            return F.normalize(found.flatten(2).transpose(1, 2), dim=-1).half().contiguous()

    def maps(self, images: Tensor) -> Tensor:
        """The feature map (B,F,h,w) as the module gives it."""
        if self.size is not None:
            images = resized(images, self.size, "bicubic")
        return self.module(self.prepared(images))


def resized(images: Tensor, side: int, mode: str) -> Tensor:
    """Images or maps (B,C,h,w) of `side` positions a side; as they are if they have it."""
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode=mode, antialias=True, align_corners=False)


def build(config: EncoderConfig, data: ImageData, grid: int, seed: int) -> tuple[Encoder, int]:
    """The encoder that `config` names, on the CPU, and its F; a self-supervised one without weights is not trained yet.

    Args:
        data: what it is given. grid: tokens a side of the flow. seed: of the run.

    Raises:
        ImportError: a library is missing. FileNotFoundError: no such file of weights, or no network to get them from.
        ValueError, TypeError: unknown names, weights that do not fit, latents for an encoder of pixels, a function that
        returns no module, a module that gives no feature map.
    """
    with frozen.building(f"representation.encoder {config.name!r}", self_supervised.SEED + seed_of(config, seed)):
        encoder = BUILDERS.get(config.name, _named)(config, data, grid)
        if encoder.inputs == "imagenet" and data.channels not in PIXEL_CHANNELS:
            raise ValueError(
                f"expected images of 1 or 3 channels, got latents of {data.channels}: self_supervised takes them as "
                "they are, and so does a module of your own with inputs: raw, which may decode them to pixels"
            )
        return encoder, _width(encoder, data)


class PatchTokens(nn.Module):
    """A vision transformer of timm's: images (B,3,S,S) -> its last norm's patch tokens as a map (B,F,h,w)."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, images: Tensor) -> Tensor:
        height, width = (s // p for s, p in zip(images.shape[2:], self.transformer.patch_embed.patch_size, strict=True))
        tokens = self.transformer.forward_features(images)[:, self.transformer.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, (height, width))


def dinov2(name: str, weights: str | None, *, extra: str = "representation", option: str = "weights=PATH") -> nn.Module:
    """timm's DINOv2 of that name, with the weights of a file, or of timm's cache or a download. Errors as `build`.

    extra, option: of pip and of the command, for errors.
    """
    timm = frozen.library("timm", extra)
    check_choice("model", name.partition(".")[0], timm.list_models("*_dinov2"))

    def make(own: bool) -> nn.Module:  # dynamic: the table of positions has the size of the weights' own images
        return timm.create_model(name, pretrained=own, num_classes=0, dynamic_img_size=True)

    return frozen.with_weights(make, "timm", weights, option=option)


def _dinov2(config: EncoderConfig, data: ImageData, grid: int) -> Encoder:
    name, size = config.model or DINOV2, config.size or DINOV2_SIZE
    model = dinov2(name, config.weights)
    patch = model.patch_embed.patch_size[0]
    if size % patch:
        raise ValueError(f"size: expected a multiple of {patch}, the patches of {name}, got {size}")
    return Encoder(config, PatchTokens(model), inputs="imagenet", size=size, grid=grid)


def _named(config: EncoderConfig, data: ImageData, grid: int) -> Encoder:
    module = frozen.named(config.name, config.weights, "name")
    return Encoder(config, module, inputs=config.inputs or "imagenet", size=config.size, grid=grid)


def _self_supervised(config: EncoderConfig, data: ImageData, grid: int) -> Encoder:
    module = self_supervised.SmallEncoder(data.channels, data.img_size, grid)
    encoder = Encoder(config, module, inputs="raw", size=None, grid=grid)
    if config.weights is not None:
        _read(encoder, Path(config.weights).expanduser(), data.img_size)
    return encoder


def _read(encoder: Encoder, path: Path, img_size: int) -> None:
    """Weights and what is known of them from the file that a run keeps. ValueError: it does not fit, is damaged."""
    found = checkpoint.read(path)
    if found.kind != KIND:
        raise ValueError(f"{path}: expected a {KIND}, encoder.safetensors of a run, got a {found.kind}")
    made_from, own = found.config, encoder.settings
    wanted = {"img_size": img_size, "grid": encoder.grid, "steps": own.steps, "seed": own.seed}
    have = {name: made_from.get(name, made_from["encoder"].get(name)) for name in wanted}
    for name, value in wanted.items():
        if value is not None and have[name] != value:
            raise ValueError(f"{path}: expected an encoder of {name} {value}, got one of {name} {have[name]}")
    try:
        encoder.module.load_state_dict(found.tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: expected the weights of this encoder, got others: {reason}") from None
    encoder.config = {**made_from["encoder"], "precision": own.precision}
    encoder.known = found.metadata


def seed_of(config: EncoderConfig, seed: int) -> int:
    """The encoder's own, or the run's."""
    return seed if config.seed is None else config.seed


@torch.no_grad()
def _width(encoder: Encoder, data: ImageData) -> int:
    """F. ValueError unless the encoder takes what the data yields and gives a feature map."""
    images = torch.zeros(2, data.channels, data.img_size, data.img_size)
    try:
        found = encoder.maps(images)
    except Exception as error:  # of code that is not ours
        raise ValueError(
            f"expected a module that takes {tuple(images.shape)} (size resizes them), got {type(error).__name__}: "
            f"{error}"
        ) from error
    got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if not isinstance(found, Tensor) or found.dim() != 4 or len(found) != 2 or not found.numel():
        raise ValueError(f"expected one feature map (B,F,h,w) for a batch B of 2, got {got}")
    return found.shape[1]


def prepare(encoder: Encoder, data: ImageData, out: Path | None, *, seed: int, flip: bool, progress: bool) -> None:
    """Train a self-supervised encoder where it is, or read out/encoder.safetensors, what an earlier sitting trained.

    `described` is its `known`, in the file's metadata, and on stdout. Other encoders, and one that came from a file,
    are left as they are.
    """
    settings = encoder.settings
    if settings.name != "self_supervised" or settings.weights is not None:
        return
    steps, seed = settings.steps or self_supervised.STEPS, seed_of(settings, seed)

    def train(module: nn.Module) -> dict:
        untrained = probed(encoder, data)
        self_supervised.train_encoder(module, data, steps=steps, seed=seed, flip=flip, progress=progress)
        return described(encoder, data, untrained)

    made_from = {
        "encoder": {**encoder.config, "steps": steps},
        "img_size": data.img_size,
        "grid": encoder.grid,
        "seed": seed,
        "flip": flip,
    }
    path = None if out is None else out / "encoder.safetensors"
    encoder.known = frozen.trained_once(encoder.module, train, path, KIND, made_from)
    encoder.config = made_from["encoder"]
    said = summary(encoder.known)
    if said:
        tqdm.write(f"biflow: the encoder's features: {said}")


def described(encoder: Encoder, data: ImageData, untrained: Mapping[str, float]) -> dict[str, float | None]:
    """`probed`, beside what it is read against: `untrained`, the same of the network before its training, and pixels,
    held-out accuracy from the images themselves (None: of large images or many classes, which would take long)."""
    found: dict[str, float | None] = {**probed(encoder, data)}
    if found:
        found |= {f"untrained_{name}": value for name, value in untrained.items()}
        found["pixels"] = _probed_pixels(data)
    return found


def summary(known: Mapping[str, Any]) -> str:
    """`described` in words; "" if nothing is known."""
    if "pooled" not in known:
        return ""
    parts = [("", "pooled", "token"), ("untrained ", "untrained_pooled", "untrained_token")]
    said = [
        f"{who}{known[pooled]:.3f} of held-out labels from their mean, {known[token]:.3f} from one token"
        for who, pooled, token in parts
        if pooled in known
    ]
    pixels = known.get("pixels")
    return "; ".join([*said, *([] if pixels is None else [f"raw pixels {pixels:.3f}"])])


@torch.no_grad()
def probed(encoder: Encoder, data: ImageData) -> dict[str, float]:
    """What linear probes read off the encoder: a report, on which nothing depends. {} without labels of two classes or
    scikit-learn.

    pooled: held-out accuracy from the mean over tokens of the targets; token: from that of one token an image, which is
    what a token of the flow is aligned with. At most 4,000 training and 2,000 held-out images.
    """
    device, sides = next(encoder.module.parameters()).device, []
    generator = torch.Generator().manual_seed(0)
    for images, labels, rows in _probe_rows(data):
        targets = torch.cat([encoder(images.batch(part).to(device)).cpu().float() for part in rows.split(500)])
        token = torch.randint(targets.shape[1], (len(rows),), generator=generator)
        sides.append((targets.mean(1), targets[torch.arange(len(rows)), token], labels[rows]))
    if not sides or len(sides[0][2].unique()) < 2:
        return {}
    (pooled, token, y), (val_pooled, val_token, val_y) = sides
    try:
        return {
            "pooled": linear_probe(pooled, y, val_pooled, val_y)["accuracy"],
            "token": linear_probe(token, y, val_token, val_y)["accuracy"],
        }
    except ImportError:
        return {}


def _probed_pixels(data: ImageData) -> float | None:
    if data.channels * data.img_size**2 * data.num_classes > PIXEL_WEIGHTS:
        return None
    train, val = ((images.batch(rows).flatten(1), y[rows]) for images, y, rows in _probe_rows(data))
    return linear_probe(*train, *val, iterations=PIXEL_ITERATIONS)["accuracy"]


def _probe_rows(data: ImageData) -> list[tuple]:
    """(images, labels, which) of both splits; [] without labels or without held-out images."""
    if data.train_y is None or data.val_y is None or not len(data.val_x):
        return []
    splits = ((data.train_x, data.train_y, TRAIN_IMAGES), (data.val_x, data.val_y, HELD_OUT_IMAGES))
    return [(images, labels, spread(len(images), limit)) for images, labels, limit in splits]


BUILDERS = {"dinov2": _dinov2, "self_supervised": _self_supervised}
