"""Stage two: the learned inverse follows the frozen flow's trajectory backwards.

Source: BiFlow (arXiv 2512.10953): naive and hidden distillation, hidden alignment, learned denoising, guidance at
training time, norm control. What the paper leaves open is decided in docs/decisions/0016.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biflow import checkpoint, distributed
from biflow import data as datasets
from biflow.models import BiFlow, TarFlow
from biflow.models.layers import patchify, unpatchify
from biflow.train import flops
from biflow.train.configs import AlignmentConfig, InverseTraining
from biflow.train.draws import draw_rows
from biflow.train.likelihood import add_noise, drop_labels
from biflow.train.perceptual import Perceptual
from biflow.train.trainer import check_data, fit

SQUARE_FLOOR = 1e-2  # targets whose mean square is smaller (an even gray patch) do not blow up their errors


def term(
    read: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    config: AlignmentConfig,
    guide: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, error) of one prediction h (B,T,D) of one target t (B,T,D).

    e = (h - t)^2 / s, s by config.normalize: 1; the mean of t^2 over the token's channels; its mean over the sample's
    tokens and channels; the latter two at least 0.01. error = mean_b of m_b, m_b = mean of e.
    loss = error for p = 0; else mean_b of sg((D_b + c)^-p) D_b, with D_b the sum of e over the sample.

    Args:
        read: h, as (target, scale) -> (B,): the sum of scale (h - target)^2 over each sample, scale (B,T). So h itself
            need not be kept.
        guide: (u, w), u (B,T,D) without gradient and w (B,): in the place of h stands (h + w u) / (1 + w), whose error
            is of the same form: e = (h - t - w (t - u))^2 / ((1 + w)^2 s).
    """
    if config.normalize == "token_rms":
        square = target.square().mean(2).clamp_min(SQUARE_FLOOR)
    elif config.normalize == "mean_square":
        square = target.square().mean((1, 2))[:, None].clamp_min(SQUARE_FLOOR)
    else:
        square = torch.ones_like(target[:, :1, 0])
    scale = (1 / square).expand(target.shape[:2])
    if guide is not None:
        free, w = guide
        scale = scale / (1 + w[:, None]) ** 2
        target = target + w.view(-1, 1, 1) * (target - free)
    total = read(target, scale)
    mean = total.mean() / target[0].numel()
    if config.adaptive_power == 0:
        return mean, mean.detach()
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
    perceptual: Perceptual | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """BiFlow's stage two loss (arXiv 2512.10953, section 3), with trained-in guidance.

    x~ = x + noise (as the flow was trained), x_0 .. x_B = z the trajectory of flow.encode(x~, y), and G = inverse:
    loss = weight_output term(h_out, patches(x)) + sum_i weight_states_i term(h_i, x_i / s_i), i = 0 .. B-1, `term` as
    above, s_i by normalize_targets (`normalized`), and by the strategy
        naive: no sum.
        hidden_distillation: h_i is what G's next group starts from (model.reembed_states).
        hidden_alignment: h_i is what a head reads from a hidden state that is free to be anything.
    Without learned denoising h_out predicts x_0 in place of the clean patches, and the sum starts at i = 1.
    `Perceptual.loss` of h_out and its target, both as images, is added.

    With max_guidance > 0 every h, the output's and the states', is (G(z | y, w) + w sg(G(z | none, 0))) / (1 + w) with
    w drawn per sample (`draw_guidance`) and w = 0 where the label was dropped. The paper gives the mixture for the
    output; to mix the states' heads as well is a choice of ours.

    The flow always encodes with the sample's own label: labels are dropped for G only, so that G(z | none) learns to
    decode the z of every class. (Both do without labels if the inverse has no classes.) The trajectory is computed
    without gradients and outside autocast.

    Args:
        inverse, flow: the model that is trained, and the frozen forward model, left as it is.
        x: clean images (B,C,H,W) fp32. y: labels (B,) int64 or None.
        generator: source of the noise, then of the dropped labels, then of w, then of crops.
        config: alignment, label_drop, guidance_draw; model.max_guidance, learned_denoising, reembed_states.
        bin_width: of the data, for a flow with noise_std = 0.
        training: False: no label is dropped and w = 0.
        perceptual: the prepared terms of config.perceptual, if there are any; ValueError without them.

    Returns:
        loss, a scalar; to log (detached): the terms' errors "output", "state_0", ..., "state_{B-1}", and the norms of
        the trajectory "norm_0", ..., "norm_B": mean_b ||x_i|| / sqrt(T D); those that `Perceptual.loss` names.
    """
    own, weights = inverse.config, config.alignment
    if config.perceptual and perceptual is None:
        raise ValueError("perceptual: expected the prepared terms of config.perceptual, got None")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        noisy = add_noise(x, flow.config.noise_std, bin_width, generator)
        flow_y = y if flow.config.num_classes and own.num_classes else None
        z, _, states = flow.encode(noisy, flow_y, return_states=True)
        norms = {f"norm_{i}": s.square().mean((1, 2)).sqrt().mean() for i, s in enumerate(states)}
        targets = {"output": patchify(x, own.patch_size) if own.learned_denoising else states[0]}
        first = 0 if own.learned_denoising else 1  # without, the output is the prediction of x_0
        if weights.has_states:
            targets |= {
                f"state_{i}": normalized(states[i], weights.normalize_targets) for i in range(first, own.num_blocks)
            }
    label = y if own.num_classes else None
    w = None
    if training:
        label = drop_labels(label, config.label_drop, generator)
        if own.max_guidance:
            w = draw_guidance(len(x), own.max_guidance, config.guidance_draw, generator, x.device).to(z.dtype)
            w = torch.zeros_like(w) if label is None else torch.where(label < 0, 0.0, w)
    output, found = _follow(inverse, z, label, w, weights.has_states)
    guides = [None] * len(found)
    if w is not None:
        with torch.no_grad():
            free, *others = _predict(inverse, z, None, None, weights.has_states)
        mix, guides = w.view(-1, 1, 1), [(u, w) for u in others]
        output = (output + mix * free) / (1 + mix)
    loss, errors = x.new_zeros(()), {}
    terms = zip([partial(squared_error, output), *found], [None, *guides], strict=True)
    shares = (weights.weight_output, *(weights.state_weights(len(found)) if weights.has_states else ()))
    for (name, target), (read, guide), share in zip(targets.items(), terms, shares, strict=True):
        value, errors[name] = term(read, target, weights, guide)
        loss = loss + share * value
    if perceptual is not None:
        pair = (unpatchify(h, own.patch_size) for h in (output, targets["output"]))
        value, distances = perceptual.loss(*pair, generator, weights)
        loss, errors = loss + value, errors | distances
    return loss, errors | norms


def normalized(state: Tensor, kind: str) -> Tensor:
    """A trajectory state (B,T,D) as a target: state / s, of the same shape.

    s by kind: "none": 1; "token_rms": sqrt of the mean of state^2 over each token's channels; "global": over each
    sample's tokens and channels. s is at least 0.1, so that an even gray patch is not blown up.
    """
    dims = {"token_rms": (2,), "global": (1, 2)}.get(kind)
    if dims is None:
        return state
    return state / state.square().mean(dims, keepdim=True).clamp_min(SQUARE_FLOOR).sqrt()


def draw_guidance(
    count: int, largest: float, draw: str, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Guidance strengths (count,) fp32 in [0, largest], from u ~ U(0, 1).

    draw "uniform": u largest; "log_uniform": expm1(u log1p(largest)), so that log(1 + w) is uniform and small
    strengths are seen most.
    """
    u = draw_rows(torch.rand, (count,), generator, device=device)
    return torch.expm1(u * math.log1p(largest)).clamp_max(largest) if draw == "log_uniform" else largest * u


def squared_error(prediction: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """(B,): the sum of scale (prediction - target)^2 over each sample; (B,T,D) both, scale (B,T)."""
    return ((prediction - target).square().sum(2) * scale).sum(1)


def _predict(inverse: BiFlow, z: Tensor, y: Tensor | None, w: Tensor | None, states: bool) -> list[Tensor]:
    """[output, x_0, ..., x_{B-1}] (from x_1 on, where x_0 is the output), or [output]: G's predictions in z's dtype."""
    if not states:
        return [inverse(z, y, w).to(z.dtype)]
    output, predictions = inverse(z, y, w, return_states=True)
    return [h.to(z.dtype) for h in (output, *predictions[0 if inverse.config.learned_denoising else 1 :])]


def _follow(
    inverse: BiFlow, z: Tensor, y: Tensor | None, w: Tensor | None, states: bool
) -> tuple[Tensor, list[Callable[[Tensor, Tensor], Tensor]]]:
    """The output as `_predict` has it, and how `term` reads each state: if nothing else does, without predictions."""
    if not states or inverse.config.reembed_states:
        output, *predictions = _predict(inverse, z, y, w, states)
        return output, [partial(squared_error, h) for h in predictions]
    output, hidden = inverse(z, y, w, return_hidden=True)
    heads = reversed(inverse.heads[:-1])
    return output.to(z.dtype), [partial(head.error, h) for head, h in zip(heads, hidden, strict=True)]


class Alignment:
    """The objective of stage two for `trainer.fit`."""

    stage = "inverse"

    def __init__(
        self, config: InverseTraining, flow: TarFlow, bin_width: float | None, perceptual: Perceptual | None = None
    ):
        self.config, self.flow, self.bin_width, self.perceptual = config, flow, bin_width, perceptual
        self.module = nn.Module()
        self.identity: dict[str, Any] = {"flow_sha256": checkpoint.fingerprint(flow)}
        self.flops = flops.training(config, flow.config)
        if config.run.compile:
            flow.compile(fullgraph=True, dynamic=False)

    def prepare(self, out: Path, progress: bool) -> None:
        if self.perceptual is not None:
            with distributed.join(self.config.run.device).main_first():
                self.identity["perceptual_weights_sha256"] = self.perceptual.prepare(out, progress=progress)

    def loss(
        self,
        model: BiFlow,
        x: Tensor,
        y: Tensor | None,
        generator: torch.Generator,
        *,
        training: bool,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        options = {"bin_width": self.bin_width, "training": training, "perceptual": self.perceptual}
        if self.config.run.compile and not training:  # the last batch of a validation may be smaller
            with torch.compiler.set_stance("force_eager"):
                return alignment_loss(model, self.flow, x, y, generator, self.config, **options)
        return alignment_loss(model, self.flow, x, y, generator, self.config, **options)

    def settle(self, model: BiFlow, mean: Callable[[Tensor], Tensor]) -> None:
        """Nothing moves but by gradients."""


def train_inverse(
    config: InverseTraining, flow: TarFlow, out: str | Path, *, resume: bool = False, progress: bool = True
) -> BiFlow:
    """Train the learned inverse of `flow`, which is left as it is. Folder, resuming and errors as in `train_flow`.

    Raises:
        ValueError: also if `flow` does not fit config.model, or if a run is resumed with another flow, or with other
        weights of a perceptual term. ImportError, FileNotFoundError: a term's library or weights are missing.
    """
    own, device = config.model, config.run.torch_device()
    processes = distributed.join(config.run.device)
    if not isinstance(flow, TarFlow):
        raise TypeError(f"flow: expected a TarFlow, got {type(flow).__name__}")
    for name in ("img_size", "in_channels", "patch_size", "num_blocks"):
        if getattr(own, name) != getattr(flow.config, name):
            raise ValueError(
                f"model.{name}: expected {getattr(flow.config, name)} as in the flow, got {getattr(own, name)}"
            )
    if own.num_classes and flow.config.num_classes not in (0, own.num_classes):
        raise ValueError(f"model.num_classes: expected {flow.config.num_classes} as in the flow, got {own.num_classes}")
    with processes.main_first():
        data = datasets.load(config.data)
    check_data(data, own.img_size, own.in_channels, own.num_classes)
    if flow.config.noise_std == 0 and data.bin_width is None:
        raise ValueError("flow: expected noise_std more than 0 for data stored as floats, which has no bins; got 0")
    frozen = copy.deepcopy(flow).to(device, config.run.torch_dtype).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = BiFlow(own)
    perceptual = Perceptual(config, data) if config.perceptual else None
    objective = Alignment(config, frozen, data.bin_width, perceptual)
    return fit(model, objective, data, config, out, resume=resume, progress=progress)
