"""Stage two: BiFlow's hidden alignment. The learned inverse follows the frozen flow's trajectory backwards.

Source: BiFlow (arXiv 2512.10953): hidden alignment, learned denoising, guidance at training time, norm control.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor

from biflow import checkpoint
from biflow import data as datasets
from biflow.models import BiFlow, TarFlow
from biflow.models.layers import patchify
from biflow.train.configs import AlignmentConfig, InverseTraining
from biflow.train.likelihood import add_noise, drop_labels
from biflow.train.trainer import check_data, fit

SQUARE_FLOOR = 1e-2  # targets whose mean square is smaller (an even gray patch) do not blow up their errors


def term(prediction: Tensor, target: Tensor, config: AlignmentConfig) -> tuple[Tensor, Tensor]:
    """(loss, error) of one prediction (B,T,D) of one target (B,T,D).

    e = (prediction - target)^2 / s, s by config.normalize: 1; the mean of target^2 over the token's channels; its mean
    over the sample's tokens and channels; the latter two at least 0.01. error = mean_b of m_b, m_b = mean of e.
    loss = error for p = 0; else mean_b of sg((D_b + c)^-p) D_b, with D_b the sum of e over the sample.
    """
    square = target.square()
    if config.normalize == "token_rms":
        scale = square.mean(2, keepdim=True).clamp_min(SQUARE_FLOOR)
    elif config.normalize == "mean_square":
        scale = square.mean((1, 2), keepdim=True).clamp_min(SQUARE_FLOOR)
    else:
        scale = torch.ones_like(square[:, :1, :1])
    error = ((prediction.to(target.dtype) - target).square() / scale).flatten(1)
    mean = error.mean()
    if config.adaptive_power == 0:
        return mean, mean.detach()
    total = error.sum(1)
    weight = (total.detach() + config.adaptive_constant) ** -config.adaptive_power
    return (weight * total).mean(), mean.detach()


def alignment_loss(
    inverse: BiFlow,
    flow: TarFlow,
    x: Tensor,
    y: Tensor | None,
    generator: torch.Generator,
    config: InverseTraining,
    *,
    bin_width: float | None = None,
    training: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """BiFlow's stage two loss (arXiv 2512.10953): hidden alignment with learned denoising and trained-in guidance.

    x~ = x + noise (as the flow was trained), x_0 .. x_B = z the trajectory of flow.encode(x~, y), and G = inverse:
    loss = weight_output term(h_out, patches(x)) + weight_states sum_i term(h_i, x_i), i = 0 .. B-1, `term` as above.

    With max_guidance > 0 every h, the output's and the states', is (G(z | y, w) + w sg(G(z | none, 0))) / (1 + w) with
    w ~ U(0, max_guidance) per sample and w = 0 where the label was dropped. The paper gives the mixture for the output;
    to mix the states' heads as well is a choice of ours.

    The flow always encodes with the sample's own label: labels are dropped for G only, so that G(z | none) learns to
    decode the z of every class. (Both do without labels if the inverse has no classes.) The trajectory is computed
    without gradients and outside autocast.

    Args:
        inverse, flow: the model that is trained, and the frozen forward model, left as it is.
        x: clean images (B,C,H,W) fp32. y: labels (B,) int64 or None.
        generator: source of the noise, then of the dropped labels, then of w.
        config: alignment, label_drop; model.max_guidance.
        bin_width: of the data, for a flow with noise_std = 0.
        training: False: no label is dropped and w = 0.

    Returns:
        loss, a scalar; the terms' errors (detached): "output", "state_0", ..., "state_{B-1}".
    """
    own, weights = inverse.config, config.alignment
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        noisy = add_noise(x, flow.config.noise_std, bin_width, generator)
        flow_y = y if flow.config.num_classes and own.num_classes else None
        z, _, states = flow.encode(noisy, flow_y, return_states=True)
        targets = {"output": patchify(x, own.patch_size)}
        if weights.weight_states:
            targets |= {f"state_{i}": state for i, state in enumerate(states[:-1])}
    label = y if own.num_classes else None
    w = None
    if training:
        label = drop_labels(label, config.label_drop, generator)
        if own.max_guidance:
            w = own.max_guidance * torch.rand(len(x), generator=generator, device=x.device)
            w = torch.zeros_like(w) if label is None else torch.where(label < 0, 0.0, w)
    predictions = _predict(inverse, z, label, w, bool(weights.weight_states))
    if w is not None:
        with torch.no_grad():
            free = _predict(inverse, z, None, None, bool(weights.weight_states))
        mix = w.view(-1, 1, 1)
        predictions = [(h + mix * u) / (1 + mix) for h, u in zip(predictions, free, strict=True)]
    loss, errors = x.new_zeros(()), {}
    for (name, target), prediction in zip(targets.items(), predictions, strict=True):
        value, errors[name] = term(prediction, target, weights)
        loss = loss + (weights.weight_output if name == "output" else weights.weight_states) * value
    return loss, errors


def _predict(inverse: BiFlow, z: Tensor, y: Tensor | None, w: Tensor | None, states: bool) -> list[Tensor]:
    """[clean, x_0, ..., x_{B-1}], or [clean]: G's predictions in fp32."""
    if not states:
        return [inverse(z, y, w).float()]
    clean, hidden = inverse(z, y, w, return_states=True)
    return [h.float() for h in (clean, *hidden)]


class Alignment:
    """The objective of stage two for `trainer.fit`."""

    stage = "inverse"

    def __init__(self, config: InverseTraining, flow: TarFlow, bin_width: float | None):
        self.config, self.flow, self.bin_width = config, flow, bin_width
        self.identity = {"flow_sha256": checkpoint.fingerprint(flow)}

    def loss(
        self, model: BiFlow, x: Tensor, y: Tensor | None, generator: torch.Generator, *, training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return alignment_loss(
            model, self.flow, x, y, generator, self.config, bin_width=self.bin_width, training=training
        )


def train_inverse(
    config: InverseTraining, flow: TarFlow, out: str | Path, *, resume: bool = False, progress: bool = True
) -> BiFlow:
    """Train the learned inverse of `flow`, which is left as it is. Folder, resuming and errors as in `train_flow`.

    Raises:
        ValueError: also if `flow` does not fit config.model, or if a run is resumed with another flow.
    """
    own, device = config.model, config.run.torch_device()
    if not isinstance(flow, TarFlow):
        raise TypeError(f"flow: expected a TarFlow, got {type(flow).__name__}")
    for name in ("img_size", "in_channels", "patch_size", "num_blocks"):
        if getattr(own, name) != getattr(flow.config, name):
            raise ValueError(
                f"model.{name}: expected {getattr(flow.config, name)} as in the flow, got {getattr(own, name)}"
            )
    if own.num_classes and flow.config.num_classes not in (0, own.num_classes):
        raise ValueError(f"model.num_classes: expected {flow.config.num_classes} as in the flow, got {own.num_classes}")
    data = datasets.load(config.data)
    check_data(data, own.img_size, own.in_channels, own.num_classes)
    if flow.config.noise_std == 0 and data.bin_width is None:
        raise ValueError("flow: expected noise_std more than 0 for data stored as floats, which has no bins; got 0")
    frozen = copy.deepcopy(flow).to(device).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = BiFlow(own)
    objective = Alignment(config, frozen, data.bin_width)
    return fit(model, objective, data, config, out, resume=resume, progress=progress)
