"""FLOPs by formula against those that torch counts while it trains, and what MFU is made of."""

import dataclasses

import pytest
import torch
from tiny_training import changed, flow_config, inverse_config, random_flow
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import biflow
from biflow import ops, presets, reference
from biflow.train import AlignmentConfig, distill, flops, likelihood

BATCH = 3


def counted(step):
    """FLOPs an image of a forward and backward pass, as torch counts them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose gradient recomputes nothing
        step().backward()
    return counter.get_total_flops() / BATCH


def batch(config):
    generator = torch.Generator().manual_seed(0)
    c = config.model
    x = torch.rand(BATCH, c.in_channels, c.img_size, c.img_size, generator=generator) * 2 - 1
    return x, torch.arange(BATCH) % c.num_classes if c.num_classes else None


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_blocks": 3, "layers_per_block": (1, 3, 2), "class_tokens": 3, "gate": "swiglu", "mlp_ratio": 8 / 3},
        {"num_classes": 0, "shift_only": True},
        {"start_token": True, "qk_norm": True, "rope": True, "norm": "rmsnorm"},
    ],
    ids=["plain", "deep-shallow", "shift-only", "start-token"],
)
def test_stage_one_by_formula_is_what_torch_counts(shape):
    config = changed(flow_config("images.npz"), "model", **shape)
    flow, (x, y) = random_flow(config.model), batch(config)
    assert counted(lambda: likelihood.likelihood_loss(flow, x, y)[0]) == flops.training(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        flow.encode(x, y)
    assert counter.get_total_flops() / BATCH == flops.flow(config.model)


@pytest.mark.parametrize(
    ("shape", "alignment"),
    [
        ({}, {}),
        ({"max_guidance": 0.0}, {}),
        ({}, {"weight_states": 0.0}),
        ({"learned_denoising": False, "layers_per_group": 2, "gate": "gelu"}, {"strategy": "naive"}),
        ({"reembed_states": True}, {"strategy": "hidden_distillation"}),
        ({"num_classes": 0, "max_guidance": 0.0}, {}),
    ],
    ids=["guided", "unguided", "output-alone", "naive", "distillation", "no-classes"],
)
def test_stage_two_by_formula_is_what_torch_counts(shape, alignment, monkeypatch):
    """The frozen flow's encode and the second branch of guidance are in it."""
    monkeypatch.setattr(ops, "alignment_error", reference.alignment_error)  # ours hides its products from torch
    config = inverse_config("images.npz")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **shape), alignment=AlignmentConfig(**alignment)
    )
    flow = random_flow(changed(flow_config("images.npz"), "model", class_tokens=2).model)
    torch.manual_seed(2)
    inverse, (x, y) = biflow.BiFlow(config.model), batch(config)

    def step():
        return distill.alignment_loss(inverse, flow, x, y, torch.Generator().manual_seed(0), config)[0]

    assert counted(step) == flops.training(config, flow.config)


def test_a_large_model_is_about_six_flops_a_parameter_and_token():
    """PaLM's estimate, whose attention is 12 layers C T a token; embeddings and tables are what is beside it."""
    config = presets.training("imagenet256_xl2_flow")
    c, model = config.model, "imagenet256_xl2_flow"
    attention = 12 * sum(c.block(i).layers for i in range(c.num_blocks)) * c.width * c.tokens
    palm = c.tokens * (6 * presets.parameters(model) + attention)
    assert flops.training(config) == pytest.approx(palm, rel=0.1)


def test_stage_two_needs_the_flow():
    with pytest.raises(ValueError, match="forward_model: expected the configuration of the flow"):
        flops.training(inverse_config("images.npz"))


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A100X", None),
        ("Intel(R) Xeon(R) Processor", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name, bf16):
    assert flops.peak(name, "bf16") == bf16
    fp32 = flops.peak(name, "fp32")
    assert (fp32 is None) == (bf16 is None)
    assert fp32 is None or fp32 < bf16
