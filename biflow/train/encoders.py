"""Frozen encoders that a flow's features are aligned with: DINOv2, a module that the user names, one of the run's own.

An encoder is given what the data set yields, pixels or latents (B,C,S,S), and gives one feature map (B,F,h,w). timm
(`pip install 'biflow[representation]'`) is imported when a run asks for it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

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


class Encoder(Frozen):
    """Images or latents (B,C,S,S) -> targets (B,T,F): unit vectors in fp16, one a token of the flow, without a graph.

    The feature map is resized to the tokens' grid (bilinear, antialiased), its positions made directions. fp16 rounds a
    direction by 1e-3 at most, and what is rounded is the same whether it comes from a cache or not.

    Args:
        config: `checkpoint.fingerprint` covers it.
        module, inputs: as in `Frozen`; the module returns (B,F,h,w).
        size: side that images are resized to (bicubic, antialiased); None: as they are.
        grid: tokens a side, T = grid^2.
    """

    def __init__(self, config: EncoderConfig, module: nn.Module, *, inputs: str, size: int | None, grid: int):
        super().__init__(module, inputs)
        self.config, self.size, self.grid = config, size, grid

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
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
    """The encoder that `config` names, on the CPU, and its F; a self-supervised one is not trained yet.

    Args:
        data: what it is given. grid: tokens a side of the flow. seed: of the run.

    Raises:
        ImportError: a library is missing. FileNotFoundError: no such file of weights, or no network to get them from.
        ValueError, TypeError: unknown names, weights that do not fit, latents for an encoder of pixels, a function that
        returns no module, a module that gives no feature map.
    """
    with frozen.building(f"representation.encoder {config.name!r}", self_supervised.SEED + seed):
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
    return Encoder(config, module, inputs="raw", size=None, grid=grid)


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

    `probed` is in the file's metadata and on stdout. Other encoders are left as they are.
    """
    if encoder.config.name != "self_supervised":
        return
    steps = encoder.config.steps or self_supervised.STEPS

    def train(module: nn.Module) -> dict:
        self_supervised.train_encoder(module, data, steps=steps, seed=seed, flip=flip, progress=progress)
        found = probed(encoder, data)
        if found:
            tqdm.write(
                f"biflow: the encoder's features: {found['pooled']:.3f} of held-out labels from their mean, "
                f"{found['token']:.3f} from one token"
            )
        return found

    made_from = {"encoder": to_mapping(encoder.config), "grid": encoder.grid, "seed": seed, "flip": flip}
    path = None if out is None else out / "encoder.safetensors"
    frozen.trained_once(encoder.module, train, path, KIND, made_from)


@torch.no_grad()
def probed(encoder: Encoder, data: ImageData) -> dict[str, float]:
    """What linear probes read off the encoder: a report, on which nothing depends. {} without labels of two classes or
    scikit-learn.

    pooled: held-out accuracy from the mean over tokens of the targets; token: from that of one token an image, which is
    what a token of the flow is aligned with. At most 4,000 training and 2,000 held-out images.
    """
    if data.train_y is None or data.val_y is None or not len(data.val_x):
        return {}
    device, sides = next(encoder.module.parameters()).device, []
    generator = torch.Generator().manual_seed(0)
    for images, labels, limit in ((data.train_x, data.train_y, 4000), (data.val_x, data.val_y, 2000)):
        rows = spread(len(images), limit)
        targets = torch.cat([encoder(images.batch(part).to(device)).cpu().float() for part in rows.split(500)])
        token = torch.randint(targets.shape[1], (len(rows),), generator=generator)
        sides.append((targets.mean(1), targets[torch.arange(len(rows)), token], labels[rows]))
    (pooled, token, y), (val_pooled, val_token, val_y) = sides
    if len(y.unique()) < 2:
        return {}
    try:
        return {
            "pooled": linear_probe(pooled, y, val_pooled, val_y)["accuracy"],
            "token": linear_probe(token, y, val_token, val_y)["accuracy"],
        }
    except ImportError:
        return {}


BUILDERS = {"dinov2": _dinov2, "self_supervised": _self_supervised}
