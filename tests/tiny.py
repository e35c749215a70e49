"""Tiny random models for the tests: every weight drawn, because fresh models are the identity."""

import torch

import biflow

# the variants that change the maths, by the name of what a failure would point at
VARIANTS = {
    "tarflow": {},
    "classes": {"num_classes": 3},
    "start-token": {"start_token": True, "num_classes": 3},
    "hard-clip": {"clip": ("hard", 0.3)},
    "tanh-clip-scale": {"clip": ("tanh", 0.3), "clip_on": "scale"},
    "softplus": {"scale": "softplus", "clip": ("tanh", 0.5)},
    "sigmoid": {"scale": "sigmoid", "start_token": True},
    "shift-only": {"shift_only": True, "num_classes": 3},
    "shift-only-start-clip": {"shift_only": True, "start_token": True, "clip": ("tanh", 0.4)},
    "modern": {
        "norm": "rmsnorm", "gate": "swiglu", "qk_norm": True, "rope": True, "pos_embed": False,
        "num_classes": 3, "class_tokens": 2,
    },
    "context": {"context_dim": 5, "rope": True, "layers_per_block": (2, 1, 1)},
    "context-and-class-tokens": {"context_dim": 5, "num_classes": 3, "class_tokens": 2, "start_token": True},
}  # fmt: skip


BATCH = 4


def randomize(model, std, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = std * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
            p.copy_(noise + (1.0 if p.dim() == 1 and "norm" in name and name.endswith("weight") else 0.0))
            if "class" in name or "context" in name:
                p.mul_(5)  # conditions that matter
    return model


def make_flow(std=0.1, dtype=torch.float32, seed=0, **config):
    """4 tokens of 4 channels unless the config says otherwise."""
    shape = {"img_size": 4, "in_channels": 1, "patch_size": 2, "width": 16, "head_dim": 8, "num_blocks": 3}
    flow = biflow.TarFlow(biflow.TarFlowConfig(**{**shape, "layers_per_block": 1, **config}))
    flow = randomize(flow, std, seed)
    # not ones, with a scale or without: files may bring any prior
    flow.var.copy_(0.5 + torch.rand(flow.var.shape, generator=torch.Generator().manual_seed(seed)))
    return flow.to(dtype)


def make_condition(flow, batch):
    """Labels with one unconditional sample, and context, as far as the flow takes them."""
    c, g = flow.config, torch.Generator().manual_seed(3)
    y = torch.arange(batch) % (c.num_classes + 1) - 1 if c.num_classes else None
    context = torch.randn(batch, 3, c.context_dim, generator=g).to(flow.var.dtype) if c.context_dim else None
    return y, context


def images(flow, batch=BATCH, seed=0):
    c = flow.config
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(batch, c.in_channels, c.img_size, c.img_size, generator=g, dtype=torch.float64) - 1
    return x.to(flow.var.dtype)


def noise(flow, batch=BATCH, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, flow.config.tokens, flow.config.channels, generator=g)


def make_reverse(std=0.1, seed=0, **config):
    shape = {"img_size": 4, "in_channels": 1, "patch_size": 2, "width": 16, "head_dim": 8, "num_blocks": 3}
    return randomize(biflow.BiFlow(biflow.BiFlowConfig(**{**shape, "layers_per_group": 1, **config})), std, seed)
