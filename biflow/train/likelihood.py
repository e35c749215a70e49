"""Stage one: a TarFlow by maximum likelihood on noisy data (TARFlow, arXiv 2412.06329, section 3).

With `representation` its features are also aligned with an encoder's (FlowBack, arXiv 2511.22345).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biflow import data as datasets
from biflow import distributed
from biflow.models import TarFlow
from biflow.train import flops
from biflow.train.configs import FlowTraining
from biflow.train.draws import draw_rows
from biflow.train.representation import Representation
from biflow.train.trainer import check_data, fit


def add_noise(x: Tensor, noise_std: float, bin_width: float | None, generator: torch.Generator) -> Tensor:
    """The data a flow is trained on: x + noise_std N(0, 1); for noise_std = 0, x + bin_width U(-1/2, 1/2).

    ValueError: noise_std = 0 and no bin_width (data stored as floats has no bins to fill).
    """
    if noise_std > 0:
        return x + noise_std * draw_rows(torch.randn, x.shape, generator, device=x.device)
    if bin_width is None:
        raise ValueError("noise_std: expected more than 0 for data stored as floats, which has no quantisation bins")
    return x + bin_width * (draw_rows(torch.rand, x.shape, generator, device=x.device) - 0.5)


def drop_labels(y: Tensor | None, share: float, generator: torch.Generator) -> Tensor | None:
    """y (B,) with about `share` of its entries replaced by -1 (unconditional)."""
    if y is None or share == 0:
        return y
    return torch.where(draw_rows(torch.rand, y.shape, generator, device=y.device) < share, -1, y)


def likelihood_loss(flow: TarFlow, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss, z): minus the mean of log p(x | y) over the batch, in nats a dimension; z (B,T,D) is the encoding.

    loss = mean_b(|z_b|^2 / 2 - logdet_b) / (T D) + log(2 pi) / 2.
    """
    z, logdet = flow.encode(x, y)
    return _nats(z, logdet), z


def _nats(z: Tensor, logdet: Tensor) -> Tensor:
    """`likelihood_loss` of an encoding."""
    dims = z[0].numel()
    square = z.to(logdet.dtype).flatten(1).square().sum(1)
    return ((0.5 * square - logdet) / dims).mean() + 0.5 * math.log(2 * math.pi)


class Likelihood:
    """The objective of stage one for `trainer.fit`."""

    stage = "flow"

    def __init__(self, config: FlowTraining, bin_width: float | None, representation: Representation | None = None):
        self.config, self.bin_width, self.representation = config, bin_width, representation
        self.module = nn.Module() if representation is None else representation.projectors
        self.identity: dict[str, Any] = {}
        self.flops = flops.training(config)
        self.encoded: list[Tensor] = []  # z of the step's micro-batches so far

    def prepare(self, out: Path, progress: bool) -> None:
        """Without representation nothing: the loss needs the model alone."""
        if self.representation is not None:
            self.identity["encoder_weights_sha256"] = self.representation.prepare(out, progress=progress)

    def loss(
        self,
        model: TarFlow,
        x: Tensor,
        y: Tensor | None,
        generator: torch.Generator,
        *,
        training: bool,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`likelihood_loss`; with representation that and weight times `representation_loss`, both of them logged."""
        noisy, terms = add_noise(x, self.config.model.noise_std, self.bin_width, generator), {}
        if training:
            y = drop_labels(y, self.config.label_drop, generator)
        if self.representation is None:
            loss, z = likelihood_loss(model, noisy, y)
        else:
            z, logdet, features = self.representation.encode(model, noisy, y)
            nats, alignment = _nats(z, logdet), self.representation.loss(features, x, rows)
            loss = nats + self.config.representation.weight * alignment
            terms = {"likelihood": nats.detach(), "alignment": alignment.detach()}
        if training and self.config.model.shift_only:
            self.encoded.append(z.detach())
        return loss, terms

    def settle(self, model: TarFlow, mean: Callable[[Tensor], Tensor]) -> None:
        """Move the prior variance of shift_only models by the second moment of the whole batch."""
        if self.encoded:
            model.update_prior(torch.cat(self.encoded), mean=mean)
            self.encoded.clear()


def train_flow(config: FlowTraining, out: str | Path, *, resume: bool = False, progress: bool = True) -> TarFlow:
    """Train a TarFlow, in one process or in all of a job's (docs/distributed.md).

    The run folder `out` gets config.yaml, environment.json, metrics.jsonl, tensorboard/, checkpoints/ and
    model.safetensors; by settings samples/ and wandb/; with a self-supervised encoder encoder.safetensors, with cached
    features features/.

    Args:
        config: the run's configuration.
        out: a new or empty folder, or with `resume` the folder of a run to continue. On a CPU, with as many threads,
            the continued run ends in the same bits as one that was never interrupted.
        progress: show a progress bar.

    Returns:
        The model with averaged weights, in eval mode.

    Raises:
        FileExistsError: `out` is not empty. ValueError: model and data do not fit, or `resume` with another
        configuration or encoder. ImportError, FileNotFoundError: the encoder's library or weights are missing.
        FloatingPointError: the loss is not finite; names the step. KeyboardInterrupt, SystemExit: SIGINT, SIGTERM; the
        step was finished and a checkpoint written.
    """
    config.run.torch_device()
    with distributed.join(config.run.device).main_first():
        data = datasets.load(config.data)
    check_data(data, config.model.img_size, config.model.in_channels, config.model.num_classes)
    if config.model.noise_std == 0 and data.bin_width is None:
        raise ValueError("model.noise_std: expected more than 0 for data stored as floats, which has no bins; got 0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = TarFlow(config.model)
    representation = None if config.representation is None else Representation(config, data)
    objective = Likelihood(config, data.bin_width, representation)
    return fit(model, objective, data, config, out, resume=resume, progress=progress)
