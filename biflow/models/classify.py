"""Classification with a class-conditional flow, without training: one encode and one backward pass, or Bayes' rule.

The gradient rule is FlowBack's (arXiv 2511.22345, section 4.1, algorithm 1).
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from biflow.models.layers import check_count, check_floats, check_generator, check_kernels, check_size

if TYPE_CHECKING:
    from biflow.models.tarflow import TarFlow

RULES = ("gradient", "bayes")


def classify(
    flow: "TarFlow",
    x: Tensor,
    context: Tensor | None = None,
    *,
    rule: str = "gradient",
    noise_draws: int = 0,
    top_k: int | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`TarFlow.classify`, which says what arguments, results and errors are."""
    c, weight = flow.config, flow.blocks[0].proj_in.weight
    if not c.num_classes:
        raise ValueError("classify: expected a model with classes, got one with num_classes=0")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"classify: expected weights of torch.float32 or torch.float64, got {weight.dtype}, which rounds away the "
            "small differences that classes make; convert by .float()"
        )
    check_kernels(weight)
    check_generator(generator)
    noise_draws, batch_size = check_count("noise_draws", noise_draws), check_count("batch_size", batch_size)
    check_size("batch_size", batch_size)
    if noise_draws and c.noise_std == 0:
        raise ValueError(f"noise_draws: expected 0 for a model with noise_std = 0, got {noise_draws}")
    if top_k is not None and not 1 <= check_count("top_k", top_k) <= c.num_classes:
        raise ValueError(f"top_k: expected None or 1 to {c.num_classes} (num_classes), got {top_k}")
    device = weight.device.type
    with torch.inference_mode(False), torch.autocast(device, enabled=False):
        check_floats("x", x, (None, c.in_channels, c.img_size, c.img_size), weight)
        flow._check_condition(None, context, x.shape[0])
        x, context = (None if t is None else _without_gradient(t) for t in (x, context))
        constant = _constant(flow)
        scores = 0.0
        for _ in range(max(noise_draws, 1)):
            images = (x + c.noise_std * _noise(x, generator) if noise_draws else x).split(batch_size)
            contexts = [None] * len(images) if context is None else context.split(batch_size)
            parts = zip(images, contexts, strict=True)
            scores = scores + torch.cat([_SCORES[rule](constant, *part) for part in parts])
        scores = scores / max(noise_draws, 1)
    bad = int((~torch.isfinite(scores)).any(1).sum())
    if bad:
        raise FloatingPointError(f"classify: expected finite scores, got NaN or infinite ones for {bad} of {len(x)} x")
    if top_k is None:
        return scores
    best = scores.topk(top_k, dim=1)
    return best.indices, best.values


def _gradient_scores(flow: "TarFlow", x: Tensor, context: Tensor | None) -> Tensor:
    """g (B,K) = p_k sum over blocks of (E_k - e) . d log p / de, p = 1 / K: each sample has its own e as a leaf."""
    tables = [block.class_embed for block in flow.blocks]
    with torch.enable_grad():
        mixed = [t.mean(0).expand(len(x), -1, -1).clone().requires_grad_() for t in tables]
        z, logdet = flow(x, None, context, classes=mixed)
        grads = torch.autograd.grad(flow._log_prob(z, logdet).sum(), mixed)
    by_block = [g.flatten(1) @ (t - t.mean(0)).flatten(1).T for g, t in zip(grads, tables, strict=True)]
    return torch.stack(by_block).sum(0) / flow.config.num_classes


@torch.no_grad()
def _bayes_scores(flow: "TarFlow", x: Tensor, context: Tensor | None) -> Tensor:
    """log p(x | k), (B,K), by one encode a class."""
    labels = (torch.full((len(x),), k, device=x.device) for k in range(flow.config.num_classes))
    return torch.stack([flow._log_prob(*flow(x, y, context)) for y in labels], dim=1)


_SCORES = {"gradient": _gradient_scores, "bayes": _bayes_scores}


def _constant(module: nn.Module) -> nn.Module:
    """The same module over the same memory, with weights that need no gradient, for which autograd keeps less.

    A module of its own, since other threads may use this one meanwhile; hooks are shared.
    """
    twin = copy.copy(module)
    twin._parameters = {k: None if p is None else _without_gradient(p) for k, p in module._parameters.items()}
    twin._buffers = {k: None if b is None else _without_gradient(b) for k, b in module._buffers.items()}
    twin._modules = {k: None if m is None else _constant(m) for k, m in module._modules.items()}
    return twin


def _without_gradient(t: Tensor) -> Tensor:
    """Over the same memory, but for inference tensors, which autograd does not take: those are copied."""
    return t.detach().clone() if t.is_inference() else t.detach()


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
