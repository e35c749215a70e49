"""FLOPs of both models and of a training step, an image, and the peak rates of known GPUs: what MFU is made of.

Counted are the multiplications and additions, two a pair, of all matrix products: linear layers and attention, q k^T
and the weighted sum of v over all pairs of tokens, causal or not (as PaLM, arXiv 2204.02311, appendix B). A backward
pass is two products for each of the forward pass; none goes to inputs that need no gradient. Activations that are
computed again, by activation checkpointing or inside an op, do not count; nor do norms, gates, tables of embeddings and
the affine map.
"""

import re

from biflow.models import BiFlowConfig, TarFlowConfig
from biflow.models.layers import mlp_width
from biflow.models.reverse import GuidanceEmbedding
from biflow.train.configs import FlowTraining, InverseTraining

# Dense FLOP/s by NVIDIA's data sheets, bf16 with fp32 sums and fp32 outside of tensor cores; by torch's name of the GPU
PEAKS = (
    (r"A100|A800", 312e12, 19.5e12),
    (r"A30", 165e12, 10.3e12),
    (r"A40", 149.7e12, 37.4e12),
    (r"A10", 125e12, 31.2e12),
    (r"RTX A6000", 154.8e12, 38.7e12),
    (r"L4", 121e12, 30.3e12),
    (r"L40S", 362e12, 91.6e12),
    (r"RTX 4090", 165.2e12, 82.6e12),
    (r"H100 PCIe", 756e12, 51.2e12),
    (r"H100 NVL|H200 NVL", 835e12, 60e12),
    (r"H100|H800|H200|GH200", 989.4e12, 66.9e12),
    (r"B200", 2250e12, 75e12),
)


def layer(tokens: int, width: int, mlp_hidden: int, gate: str) -> int:
    """Forward FLOPs of a layer of C = width on N tokens: 2 N C (4 C + (2 or, with swiglu, 3) F) + 4 N^2 C."""
    return 2 * tokens * width * (4 * width + (3 if gate == "swiglu" else 2) * mlp_hidden) + 4 * tokens**2 * width


def flow(config: TarFlowConfig) -> int:
    """Forward FLOPs of `TarFlow.encode` of an image, without context."""
    c, total = config, 0
    length = c.tokens + (c.class_tokens if c.num_classes else 0)
    for block in map(c.block, range(c.num_blocks)):
        outputs = block.channels * (1 if block.shift_only else 2)
        total += block.layers * layer(length, block.width, block.mlp_hidden, block.gate)
        total += 2 * c.tokens * block.width * (block.channels + outputs)
    return total


def inverse(config: BiFlowConfig, *, states: bool) -> int:
    """Forward FLOPs of `BiFlow.forward` of an image; states: with what its heads say of the trajectory."""
    c = config
    length = c.tokens + (c.class_tokens if c.num_classes else 0) + (c.guidance_tokens if c.max_guidance else 0)
    layers = c.num_groups * c.layers_per_group * layer(length, c.width, mlp_width(c.mlp_ratio, c.width), c.gate)
    heads = c.num_groups if states or c.reembed_states else 1
    embeddings = c.num_groups if c.reembed_states else 1
    guidance = 2 * c.width * (2 * GuidanceEmbedding.FREQUENCIES + c.guidance_tokens * c.width) if c.max_guidance else 0
    return layers + (heads + embeddings) * _token_map(c) + guidance


def training(config: FlowTraining | InverseTraining, forward_model: TarFlowConfig | None = None) -> int:
    """FLOPs of a training step an image.

    Stage one: forward and backward pass of the flow. Stage two: those of the learned inverse; the frozen flow's encode;
    with guidance trained in, the forward pass without a condition. Not counted: the frozen networks of perceptual
    terms, and all of `representation`, encoder, projectors and passes of its own.

    Args:
        forward_model: of the flow that stage two inverts; None in stage one.
    """
    c = config.model
    if isinstance(config, FlowTraining):
        return 3 * flow(c) - (0 if c.start_token else _token_map(c))  # images need no gradient, a start token does
    if forward_model is None:
        raise ValueError("forward_model: expected the configuration of the flow to invert with stage two, got None")
    once = inverse(c, states=config.alignment.has_states)
    still = _token_map(c) + (4 * c.width * GuidanceEmbedding.FREQUENCIES if c.max_guidance else 0)
    return flow(forward_model) + 3 * once - still + (once if c.max_guidance else 0)


def peak(device_name: str, precision: str) -> float | None:
    """FLOP/s of a GPU, by torch's name of it, in "bf16" or "fp32"; None: not in the table, a part (MIG), a laptop's."""
    name = re.sub(r"NVIDIA |GeForce |Tesla ", "", device_name)
    if re.search(r"MIG|Laptop|Max-Q|RTX 4090 D", name):
        return None
    for pattern, bf16, fp32 in PEAKS:
        if re.match(rf"(?:{pattern})(?![\w])", name):
            return bf16 if precision == "bf16" else fp32
    return None


def _token_map(c: TarFlowConfig | BiFlowConfig) -> int:
    """A linear map between the tokens' D channels and the width."""
    return 2 * c.tokens * c.channels * c.width
