"""A small encoder trained without labels on a run's own images, by VICReg (Bardes et al. 2022, arXiv 2105.04906).

Two views of an image are to have the same embedding (invariance), every channel of which varies over the batch
(variance) and says something of its own (covariance). It needs no negatives, momentum network or large batches.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from biflow import ops
from biflow.data import ImageData
from biflow.train.blocks import Residual
from biflow.train.crops import random_boxes, resized_crops

SEED = 0x5E1F  # added to the run's
STEPS = 3000
BATCH = 128
RATE = 3e-3
WEIGHT_DECAY = 1e-4
WIDTHS = (32, 64, 128)  # of the stages
FEATURES = WIDTHS[-2] + WIDTHS[-1]  # F
EMBEDDING = 256  # of the expander that is thrown away after training
INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0  # the paper's weights
FLOOR = 1e-4  # added to variances, as in the paper
AREA, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of crops
CONTRAST, BRIGHTNESS, NOISE = 0.4, 0.2, 0.1  # of views, in standard deviations of the image for the last two


class SmallEncoder(nn.Module):
    """Images (B,C,S,S) -> features (B,192,s,s), each channel of mean 0 and variance 1 over positions and images.

    Three residual stages; of them as many halve the image as leave s >= `grid`. Features are the outputs of the last
    two, the earlier one's averaged to s positions a side where it has more: it knows of an image what the last one,
    whose mean is trained to be the same for all views, is taught to forget. The last layer standardises with the
    running statistics of training, so that a cosine between features is not that of their mean.
    """

    def __init__(self, channels: int, img_size: int, grid: int):
        super().__init__()
        halvings = min(len(WIDTHS), int(math.log2(max(img_size // grid, 1))))
        stages = []
        for index, width in enumerate(WIDTHS):
            down = nn.Conv2d(channels, width, 3, stride=2 if index < halvings else 1, padding=1)
            stages.append(nn.Sequential(down, nn.BatchNorm2d(width), nn.SiLU(), Residual(width)))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.standardise = nn.BatchNorm2d(FEATURES, affine=False)
        self.to(memory_format=torch.channels_last)  # faster on a CPU

    def forward(self, x: Tensor) -> Tensor:
        before = self.stages[:-1](x.contiguous(memory_format=torch.channels_last))
        last = self.stages[-1](before)
        return self.standardise(torch.cat([F.adaptive_avg_pool2d(before, last.shape[2:]), last], 1))


def vicreg_loss(a: Tensor, b: Tensor) -> Tensor:
    """25 mean|a - b|^2 + 25 (v(a) + v(b)) + c(a) + c(b) of embeddings (N,E) of two views (arXiv 2105.04906, eq. 1-6).

    v(z) = mean_j max(0, 1 - sqrt(var_j + 1e-4)); c(z) = sum_{i != j} cov_ij^2 / E; var, cov over the batch.
    """
    loss = INVARIANCE * F.mse_loss(a, b)
    for z in (a, b):
        z = z - z.mean(0)
        cov = z.T @ z / (len(z) - 1)
        off = cov - torch.diag(cov.diagonal())
        loss = loss + VARIANCE * F.relu(1 - (cov.diagonal() + FLOOR).sqrt()).mean()
        loss = loss + COVARIANCE * off.square().sum() / len(cov)
    return loss


def views(x: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """A random view of each image (N,C,S,S): a crop of 20% to 100% of the area, contrast, brightness, noise; a flip.

    Contrast is a factor exp(0.4 u), brightness a shift of 0.2 u s, u ~ N(0, 1), and noise 0.1 s N(0, 1), s the image's
    standard deviation; all of them also make sense for latents.
    """
    count, size = len(x), x.shape[-1]
    x = resized_crops(x, random_boxes(count, (size, size), AREA, RATIO, generator), size)
    u = torch.randn(2, count, 1, 1, 1, generator=generator)
    mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * torch.exp(CONTRAST * u[0]) + BRIGHTNESS * std * u[1]
    x = x + NOISE * std * torch.randn(x.shape, generator=generator)
    if flip:
        x = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
    return x


@torch.enable_grad()
def train_encoder(
    model: SmallEncoder, data: ImageData, *, steps: int, seed: int, flip: bool, progress: bool = False
) -> None:
    """Train on the training images, of which labels are never looked at; frozen afterwards.

    AdamW, one cosine cycle, batches of 128, convolutions in bf16 where that is fast; the embedding is an expander's of
    the last stage's mean over positions. The same inputs, seed, threads and (CPU) device give the same weights; the
    global random state is left alone.

    flip: images are also mirrored.

    ValueError: fewer than 2 images.
    """
    if len(data.train_x) < 2:
        raise ValueError(f"encoder: expected at least 2 training images to learn from, got {len(data.train_x)}")
    generator = torch.Generator().manual_seed(SEED + seed)
    device, width = next(model.parameters()).device, WIDTHS[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + seed)
        expander = nn.Sequential(
            nn.Linear(width, EMBEDDING),
            nn.BatchNorm1d(EMBEDDING),
            nn.ReLU(),
            nn.Linear(EMBEDDING, EMBEDDING),
        ).to(device)
    model.train().requires_grad_(True)
    parameters = [*model.parameters(), *expander.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
    count = min(BATCH, len(data.train_x))
    for _ in tqdm(range(steps), desc="encoder", unit="step", disable=not progress):
        x = data.train_x.batch(torch.randint(len(data.train_x), (count,), generator=generator))
        both = torch.cat([views(x, generator, flip), views(x, generator, flip)]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=ops.has_fast_bf16(device)):
            found = model(both)
        loss = vicreg_loss(*expander(found[:, -width:].float().mean((2, 3))).chunk(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    model.zero_grad(set_to_none=True)
    model.eval().requires_grad_(False)
