"""What the optimizer needs: parameter groups, the learning rate schedule, averaged weights, the order of the data."""

import copy
import math

import torch
from torch import Tensor, nn

from biflow.train.configs import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig, other: nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW of the model's parameters, and of those of `other`; only the weights of linear layers are decayed."""
    model = nn.ModuleList([model] if other is None else [model, other])
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, config: OptimConfig) -> float:
    """Of step 0, 1, ..., steps - 1: lr (step + 1) / warmup, then a cosine that ends at min_lr in the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(config.steps - 1 - config.warmup_steps, 1)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(share, 1.0)))


class Average:
    """Exponential moving average of a model's parameters; buffers are copied.

    Step k = 0, 1, ...: average += (1 - d) (weights - average), d = min(decay, (1 + k) / (10 + k)), so that the random
    initial weights fade whatever the decay.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
        for mean, value in zip(self.model.buffers(), model.buffers(), strict=True):
            mean.copy_(value)


class DataOrder:
    """Which images a step sees: a fresh permutation of all images each epoch, a function of (seed, step) only.

    Batches run across the ends of epochs, so that every batch is full and a run can continue at any step.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._cache: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """(batch_size,) int64."""
        position = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = position // self.count
        return torch.cat([self._epoch(e)[position[epochs == e] % self.count] for e in epochs.unique().tolist()])

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._cache:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            kept = {e: order for e, order in self._cache.items() if e == epoch - 1}
            self._cache = kept | {epoch: torch.randperm(self.count, generator=generator)}
        return self._cache[epoch]
