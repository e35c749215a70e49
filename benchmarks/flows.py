"""The flows that decoding is timed on: shapes, and random weights with a mild coupling."""

import torch

from biflow.models import TarFlow, TarFlowConfig

CONFIGS = {  # head_dim 64, F = 4 width; T = 16, 49, 256, 256 tokens of D = 4, 16, 12, 16 channels
    "S": dict(img_size=8, in_channels=1, patch_size=2, width=128, num_blocks=4, layers_per_block=2),
    "M": dict(img_size=28, in_channels=1, patch_size=4, width=256, num_blocks=4, layers_per_block=4),
    "L": dict(img_size=32, in_channels=3, patch_size=2, width=384, num_blocks=4, layers_per_block=4),
    "B/2": dict(img_size=32, in_channels=4, patch_size=2, width=768, num_blocks=8, layers_per_block=2),
}
BATCHES = {"S": (1, 16, 64), "M": (1, 16, 64), "L": (1, 16, 64), "B/2": (1,)}
LARGE = {  # for GPUs; T = 1024 tokens of D = 12 and 192 channels: the published TARFlows of ImageNet 64 and AFHQ 256
    "TARFlow-64": dict(img_size=64, in_channels=3, patch_size=2, width=768, num_blocks=8, layers_per_block=8),
    "AFHQ": dict(img_size=256, in_channels=3, patch_size=8, width=768, num_blocks=8, layers_per_block=8),
}


def check_configs(names: list[str] | None) -> None:
    unknown = [name for name in names or [] if name not in CONFIGS]
    if unknown:
        raise ValueError(f"configs: expected some of {', '.join(CONFIGS)}, got {unknown[0]!r}")


def random_flow(name: str, *, device: str | torch.device = "cpu", **changes: object) -> TarFlow:
    """One of CONFIGS or LARGE with random weights: every tensor drawn, because a fresh flow is the identity.

    Made and drawn on `device`, whose generator has numbers of its own. changes: fields of its config.
    """
    config = TarFlowConfig(head_dim=64, **{**(CONFIGS | LARGE)[name], **changes})
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        flow = TarFlow(config).eval()
    with torch.no_grad():
        for key, p in flow.named_parameters():
            spread = (p.shape[-1] ** -0.5 if p.dim() == 2 else 0.1) * (0.1 if "proj_out" in key else 1.0)
            noise = torch.randn(p.shape, generator=generator, device=device)
            p.copy_(spread * noise + ("norm" in key and key.endswith("weight")))
    return flow
