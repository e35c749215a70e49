"""A small classifier of small images: features for the Frechet distance, predictions for class agreement."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 32
BATCH = 128
LEARNING_RATE = 3e-3


class Classifier(nn.Module):
    """Convolutions (3x3, halving the image down to at most 4 pixels a side), one hidden layer, class scores.

    images (B,C,S,S) in [-1, 1] -> features (B, 32) after the ReLU of the hidden layer, scores (B, classes).
    """

    def __init__(self, channels: int, img_size: int, num_classes: int, width: int = 16):
        super().__init__()
        self.shape = (channels, img_size, img_size)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        side = img_size
        while True:
            wider = min(2 * width, 128)
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
            width = wider
            if side <= 4:
                break
            layers.append(nn.MaxPool2d(2))
            side //= 2
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3))
        self.hidden = nn.Linear(width * side * side, FEATURES)
        self.scores = nn.Linear(FEATURES, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.hidden(self.trunk(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.features(x))


@dataclass(frozen=True)
class Judge:
    """A trained classifier and how good it is.

    held_out_accuracy: share of the held-out images that it classifies right.
    """

    model: Classifier
    held_out_accuracy: float

    def predict(self, images: Tensor) -> Tensor:
        """images (N,C,S,S) -> classes (N,) int64."""
        return self._batched(self.model, images).argmax(1)

    def features(self, images: Tensor) -> Tensor:
        """images (N,C,S,S) -> features (N, 32) fp32."""
        return self._batched(self.model.features, images)

    def agreement(self, images: Tensor, y: Tensor) -> float:
        """Share of the images that are classified as their label."""
        return float((self.predict(images) == y).double().mean())

    @torch.no_grad()
    def _batched(self, call, images: Tensor) -> Tensor:
        if images.shape[1:] != self.model.shape:
            raise ValueError(
                f"images: expected (N, {', '.join(map(str, self.model.shape))}), got {tuple(images.shape)}"
            )
        # what a sampler makes may leave [-1, 1] by far; the classifier has only seen pixels inside
        return torch.cat([call(part.clamp(-1, 1)) for part in images.split(500)])


def train_judge(
    train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor, num_classes: int, *, steps: int = 200, seed: int = 0
) -> Judge:
    """Train a `Classifier` on real images: Adam, one cosine cycle, cross-entropy, images moved by up to an eighth.

    The same inputs, seed and thread count give the same weights; the global random state is left alone.

    Args:
        train_x, val_x: images (N,C,S,S) fp32 in [-1, 1].
        train_y, val_y: labels (N,) int64 in [0, num_classes).
        steps: optimizer steps of 128 images.

    Raises:
        ValueError: no images, or labels that do not fit.
    """
    for name, x, y in (("training", train_x, train_y), ("held-out", val_x, val_y)):
        if len(x) == 0 or len(x) != len(y):
            raise ValueError(f"{name} data: expected as many images as labels, at least 1; got {len(x)} and {len(y)}")
        if int(y.min()) < 0 or int(y.max()) >= num_classes:
            raise ValueError(
                f"{name} labels: expected values in [0, {num_classes}), got [{int(y.min())}, {int(y.max())}]"
            )
    reach = train_x.shape[-1] // 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(train_x.shape[1], train_x.shape[2], num_classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
        model.train()
        for _ in range(steps):
            rows = torch.randint(len(train_x), (min(BATCH, len(train_x)),))
            loss = F.cross_entropy(model(_moved(train_x[rows], reach)), train_y[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    judge = Judge(model, held_out_accuracy=math.nan)
    return Judge(model, judge.agreement(val_x, val_y))


def _moved(x: Tensor, reach: int) -> Tensor:
    """Half of the images shifted by up to `reach` pixels each way; what comes in repeats the border."""
    if reach == 0:
        return x
    down, right = (int(v) for v in torch.randint(-reach, reach + 1, (2,)))
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    side = x.shape[-1]
    moved = padded[:, :, reach + down : reach + down + side, reach + right : reach + right + side]
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, moved, x)
