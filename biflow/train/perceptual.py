"""Perceptual terms of stage two: how far apart frozen networks find the decoded image and the clean one.

Source: BiFlow (arXiv 2512.10953) adds LPIPS and ConvNeXt-V2 features to its loss on images; the form is LPIPS' (arXiv
1801.03924, equation 1). What the paper leaves open is decided in docs/decisions/0018.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from biflow import checkpoint, latents
from biflow.data import ImageData
from biflow.data.images import PIXEL_CHANNELS
from biflow.train import backbones
from biflow.train.backbones import Backbone
from biflow.train.configs import AlignmentConfig, InverseTraining
from biflow.train.crops import random_boxes, resized_crops

LENGTH_FLOOR = 1e-10  # added to squared lengths: a position without any feature has direction 0 and a finite gradient


def feature_distance(
    features: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """d_b = sum_l mean_p sum_k w_lk (f^_lkp - g^_lkp)^2, the distance of two images' features (LPIPS, equation 1).

    f^ = f / sqrt(sum_k f_k^2 + 1e-10): each position's features as a direction, so no layer outweighs another by its
    size. Without weights w_lk = 1 / L, and d is the mean over layers of the squared distance of unit vectors, twice one
    minus their cosine: in [0, 4].

    Args:
        features, targets: L maps (B,K_l,...) each, of any float dtype; computed in fp32, or fp64 for fp64.
        weights: L tensors (K_l,).

    Returns:
        (B,), differentiable in all arguments.
    """
    total = 0
    for k, (f, g) in enumerate(zip(features, targets, strict=True)):
        square = (_direction(f) - _direction(g)).square()
        square = (
            square.sum(1) / len(features)
            if weights is None
            else torch.einsum("bkp,k->bp", square, weights[k].to(square.dtype))
        )
        total = total + square.mean(1)
    return total


def _direction(f: Tensor) -> Tensor:
    """(B,K,...) -> (B,K,P) of unit length over K."""
    f = f if f.dtype == torch.float64 else f.float()
    f = f.reshape(*f.shape[:2], -1)
    return f * (f.square().sum(1, keepdim=True) + LENGTH_FLOOR).rsqrt()


class Pixels(nn.Module):
    """Latents x as the data yields them -> images, by the frozen autoencoder that made the latents z = x scale + shift.

    Differentiable; the decoder's activations are computed again in the backward pass, since they are large.

    Args:
        source: of the autoencoder. field: of the configuration, by which it was named.

    Raises:
        ValueError: the data are not latents of `biflow latents encode`, or another encoder made them; and as
        `latents.load`.
    """

    def __init__(self, source: str, data: ImageData, field: str = "decoder"):
        super().__init__()
        if data.latents is None:
            raise ValueError(f"{field}: expected data made by `biflow latents encode`, got others, of unknown scale")
        self.autoencoder = latents.load(source)
        self.sha256 = latents.check_same(self.autoencoder, data.latents["autoencoder"], source)["sha256"]
        self.autoencoder.enable_gradient_checkpointing()
        self.factor = latents.downsampling(self.autoencoder.config)
        for name in ("shift", "scale"):
            self.register_buffer(name, torch.tensor(data.latents[name], dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B,c,h,w) -> (B,C,H,W), nothing clamped."""
        return self.autoencoder.decode(x * self.scale + self.shift).sample


class Perceptual:
    """The perceptual terms of a run: config.perceptual, with their backbones on the run's device.

    Latents are decoded first, by config.decoder. Backbones and decoder are frozen and belong to no checkpoint.
    `prepare` has to be called before `loss`.

    Args:
        config: of the run. data: what a classifier is trained on, and what the images look like.

    Raises:
        ValueError: data that are not images of 1 or 3 channels or latents that the decoder's encoder made, a backbone
        that does not take them, a classifier of latents; and as `backbones.build`, `latents.load`.
    """

    def __init__(self, config: InverseTraining, data: ImageData):
        self.config, self.data, self.pixels = config, data, None
        self.device = config.run.torch_device()
        if config.perceptual and data.channels not in PIXEL_CHANNELS:
            if any(term.backbone == "classifier" for term in config.perceptual):
                raise ValueError("backbone: expected another than the classifier with latents: it is trained on images")
            self.pixels = Pixels(config.decoder, data)
            channels = self.pixels.autoencoder.config.out_channels
            data = replace(data, channels=channels, img_size=data.img_size * self.pixels.factor)
        self.backbones = [backbones.build(term, data, config.run.seed) for term in config.perceptual]
        for backbone in self.backbones:
            _try(backbone, data)
        self.ready = False

    def prepare(self, out: Path | None = None, *, progress: bool = False) -> dict[str, str]:
        """Move the backbones to the device and train classifiers, kept in the run folder `out` and read from there.

        Returns:
            name of a term -> SHA-256 of its backbone, wherever its file lies, and of "the decoder": a run is resumed
            with the same ones only.
        """
        for backbone in self.backbones:
            backbone.to(self.device)
            if backbone.config.backbone == "classifier":
                run, flip = self.config.run, self.config.data.flip
                backbones.prepare_classifier(backbone, self.data, out, seed=run.seed, flip=flip, progress=progress)
        self.ready = True
        found = {b.config.label: checkpoint.fingerprint(b, without=("weights",)) for b in self.backbones}
        if self.pixels is not None:
            found["the decoder"] = self.pixels.to(self.device).sha256
        return found

    def loss(
        self, prediction: Tensor, target: Tensor, generator: torch.Generator, alignment: AlignmentConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """sum_k weight_k mean_b sg((d_kb + c)^-p) d_kb, p and c of `alignment`, d_k term k's `feature_distance`.

        Each term draws a box an image, the same for prediction and target, if it has crops. Nothing is clamped to
        [-1, 1]: that would take the gradient from pixels outside. Crops and distances are computed in fp32 or fp64;
        the backbone runs under the caller's autocast, since it is what costs.

        Args:
            prediction, target: images (B,C,S,S), or latents. Only the prediction has a gradient.
            generator: source of the boxes, on the images' device.

        Returns:
            loss, a scalar; to log (detached): "perceptual_NAME", the mean of d_k over the batch.
        """
        if not self.ready:
            raise RuntimeError("perceptual: expected prepare() to be called before loss()")
        loss, errors = prediction.new_zeros(()), {}
        if self.pixels is not None:
            with torch.no_grad():
                target = self.pixels(target)
            prediction = self.pixels(prediction)
        for backbone in self.backbones:
            term = backbone.config
            distance = _distance(backbone, prediction, target, generator)
            weight = (distance.detach() + alignment.adaptive_constant) ** -alignment.adaptive_power
            loss = loss + term.weight * (weight * distance).mean()
            errors[f"perceptual_{term.label}"] = distance.detach().mean()
        return loss, errors


def _distance(backbone: Backbone, prediction: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """(B,): the distance of one term, on crops drawn here."""
    term = backbone.config
    if term.crop is not None:
        boxes = random_boxes(len(target), target.shape[2:], term.crop_scale, term.crop_ratio, generator)
        with torch.autocast(target.device.type, enabled=False):
            prediction, target = (resized_crops(images, boxes, term.crop) for images in (prediction, target))
    with torch.no_grad():
        targets = backbone(target)
    features = backbone(prediction)
    with torch.autocast(prediction.device.type, enabled=False):
        return feature_distance(features, targets, backbone.channel_weights)


@torch.no_grad()
def _try(backbone: Backbone, data: ImageData) -> None:
    """ValueError unless the backbone takes images of the term's size and gives feature maps."""
    side = backbone.config.crop or data.img_size
    images = torch.zeros(2, data.channels, side, side)
    where = f"perceptual term {backbone.config.label!r}"
    try:
        features = backbone(images)
    except Exception as error:  # of code that is not ours
        raise ValueError(
            f"{where}: expected a backbone that takes images {tuple(images.shape)} (crop resizes them), got "
            f"{type(error).__name__}: {error}"
        ) from error
    shapes = [tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__ for f in features]
    if not features or not all(isinstance(f, Tensor) and f.dim() > 1 and len(f) == 2 and f.numel() for f in features):
        raise ValueError(f"{where}: expected feature maps (B,K,...) for a batch B of 2, got {shapes}")
