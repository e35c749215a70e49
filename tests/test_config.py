"""Dataclasses from YAML-like mappings: round trips, and messages that name the field."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import yaml

import biflow
from biflow.config import apply_overrides, check_fields, check_number, from_mapping, to_mapping
from biflow.data import DataConfig
from biflow.evaluate import EvaluationConfig
from biflow.train import AlignmentConfig, FlowTraining, InverseTraining, OptimConfig, RunConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: str = "a"

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate: expected 0 or more, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    size: int
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    layers: int | tuple[int, ...] = 2
    clip: tuple[str, float] | None = None
    on: bool = False
    name: str | None = None
    extra: dict[str, int] = field(default_factory=dict)
    anything: Any = None


def test_round_trip_through_yaml():
    config = Outer(
        3, Inner(0.5, "b"), Inner(2.0), (0.8, 0.9), (1, 2, 3), ("hard", 1.0), True, "x", {"a": 1}, [1, {"b": None}]
    )
    assert from_mapping(Outer, yaml.safe_load(yaml.safe_dump(to_mapping(config)))) == config
    assert from_mapping(Outer, to_mapping(Outer(1))) == Outer(1)


@pytest.mark.parametrize(
    "config",
    [
        biflow.TarFlowConfig(img_size=8, layers_per_block=(1, 2, 1, 4), clip=("tanh", 4.0), scale="softplus"),
        biflow.BiFlowConfig(img_size=8, num_classes=10, max_guidance=3.0),
    ],
    ids=["TarFlow", "BiFlow"],
)
def test_model_configs_round_trip_through_yaml(config):
    assert from_mapping(type(config), yaml.safe_load(yaml.safe_dump(to_mapping(config)))) == config


def test_values_are_converted():
    config = from_mapping(Outer, {"size": np.int64(3), "betas": [1, "1e-3"], "inner": {"rate": 2}, "clip": ["hard", 1]})
    assert config == Outer(3, Inner(2.0), betas=(1.0, 1e-3), clip=("hard", 1.0))
    assert type(config.size) is int
    assert type(config.inner.rate) is float
    assert type(config.clip) is tuple


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, ValueError, "Outer: missing field 'size'"),
        ({"size": 1, "sise": 2}, ValueError, "Outer: unknown field 'sise'; expected one of anything, betas"),
        ([1], TypeError, "Outer: expected a mapping of fields, got list [1]"),
        ({"size": 1.0}, TypeError, "Outer.size: expected int, got float 1.0"),
        ({"size": True}, TypeError, "Outer.size: expected int, got bool True"),
        ({"size": "3"}, TypeError, "Outer.size: expected int, got str '3'"),
        ({"size": None}, TypeError, "Outer.size: expected int, got NoneType None"),
        ({"size": 1, "on": 1}, TypeError, "Outer.on: expected bool, got int 1"),
        ({"size": 1, "name": 1}, TypeError, "Outer.name: expected str | None, got int 1"),
        ({"size": 1, "inner": {"rate": "fast"}}, TypeError, "Outer.inner.rate: expected float, got str 'fast'"),
        ({"size": 1, "inner": {"rate": 10**400}}, TypeError, "Outer.inner.rate: expected float, got int 1000"),
        ({"size": 1, "inner": None}, TypeError, "Outer.inner: expected a mapping of fields, got NoneType None"),
        ({"size": 1, "inner": {"rate": -1}}, ValueError, "Outer.inner: rate: expected 0 or more, got -1.0"),
        ({"size": 1, "other": {"rat": 1}}, ValueError, "Outer.other: unknown field 'rat'; expected one of kind, rate"),
        ({"size": 1, "betas": [1.0]}, TypeError, "Outer.betas: expected tuple[float, float], got list [1.0]"),
        ({"size": 1, "betas": [1.0, "x"]}, TypeError, "Outer.betas[1]: expected float, got str 'x'"),
        ({"size": 1, "layers": [1, 2.5]}, TypeError, "Outer.layers: expected int | tuple[int, ...], got list [1, 2.5]"),
        ({"size": 1, "extra": 3}, TypeError, "Outer.extra: expected dict[str, int], got int 3"),
    ],
)
def test_messages_name_the_field(values, error, message):
    with pytest.raises(error, match=re.escape(message)):
        from_mapping(Outer, values)


def test_model_configs_check_their_own_types():
    """A config built by hand is checked like one from a file."""
    with pytest.raises(TypeError, match=re.escape("img_size: expected int, got float 8.0")):
        biflow.TarFlowConfig(img_size=8.0)
    with pytest.raises(TypeError, match="norm: expected str, got int 3"):
        biflow.BiFlowConfig(img_size=8, norm=3)
    config = biflow.TarFlowConfig(img_size=8, layers_per_block=[1, 2, 1, 1], clip=["hard", 1])
    assert config.layers_per_block == (1, 2, 1, 1)
    assert config.clip == ("hard", 1.0)
    hash(config)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        ("TarFlowConfig", {"img_size": 7}, "img_size: expected a multiple of patch_size 2, got 7"),
        ("TarFlowConfig", {"in_channels": 0}, "in_channels: expected at least 1, got 0"),
        ("TarFlowConfig", {"width": 2**24}, "width: expected less than 2^24, got 16777216"),
        ("TarFlowConfig", {"img_size": 2**14, "patch_size": 1}, "(img_size / patch_size)^2: expected less than 2^24"),
        ("TarFlowConfig", {"mlp_ratio": 1e30}, "mlp_ratio * width: expected less than 2^24"),
        ("TarFlowConfig", {"width": 100}, "width: expected a multiple of head_dim 64, got 100"),
        ("TarFlowConfig", {"head_dim": 1, "width": 8}, "head_dim: expected an even number, got 1"),
        ("TarFlowConfig", {"head_dim": 512, "width": 512}, "head_dim: expected at most 256, the limit of exact"),
        ("TarFlowConfig", {"layers_per_block": (1, 2)}, "layers_per_block: expected 4 numbers (num_blocks), got 2"),
        ("TarFlowConfig", {"layers_per_block": 0}, "layers_per_block: expected at least 1, got 0"),
        ("TarFlowConfig", {"noise_std": float("inf")}, "noise_std: expected a finite number >= 0, got inf"),
        ("TarFlowConfig", {"noise_std": -0.1}, "noise_std: expected a finite number >= 0, got -0.1"),
        ("TarFlowConfig", {"mlp_ratio": float("nan")}, "mlp_ratio: expected a finite number > 0, got nan"),
        ("TarFlowConfig", {"class_tokens": 2}, "class_tokens: expected 0 when num_classes is 0, got 2"),
        ("TarFlowConfig", {"shift_only": True, "scale": "softplus"}, "shift_only: has no scale"),
        ("TarFlowConfig", {"norm": "batchnorm"}, "norm: expected one of layernorm, rmsnorm, got 'batchnorm'"),
        ("TarFlowConfig", {"gate": "relu"}, "gate: expected 'gelu' or 'swiglu', got 'relu'"),
        ("BiFlowConfig", {"num_classes": 10**30}, "num_classes: expected less than 2^24"),
        ("BiFlowConfig", {"layers_per_group": 0}, "layers_per_group: expected at least 1, got 0"),
        ("BiFlowConfig", {"num_classes": -1}, "num_classes: expected 0 or more, got -1"),
        ("BiFlowConfig", {"num_classes": 2, "class_tokens": 0}, "class_tokens: expected at least 1"),
        ("BiFlowConfig", {"max_guidance": 1.0}, "max_guidance: expected 0 without classes"),
        ("BiFlowConfig", {"num_classes": 2, "max_guidance": float("inf")}, "max_guidance: expected a finite number"),
        (
            "BiFlowConfig",
            {"num_classes": 2, "max_guidance": 1.0, "guidance_tokens": 0},
            "guidance_tokens: expected at least 1",
        ),
    ],
)
def test_model_configs_refuse(cls, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(biflow, cls)(**{"img_size": 8, **fields})


def test_the_learned_inverse_has_no_limit_of_head_dim():
    assert biflow.BiFlowConfig(img_size=8, head_dim=512, width=512).head_dim == 512


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(steps=10.5), "steps: expected int, got float 10.5"),
        (lambda: OptimConfig(betas=(0.9, "x")), "betas[1]: expected float, got str 'x'"),
        (lambda: RunConfig(seed=True), "seed: expected int, got bool True"),
        (lambda: RunConfig(device=0), "device: expected str, got int 0"),
        (lambda: AlignmentConfig(weight_output="much"), "weight_output: expected float, got str 'much'"),
        (lambda: DataConfig(source=3), "source: expected str, got int 3"),
        (lambda: DataConfig(flip="no"), "flip: expected bool, got str 'no'"),
        (lambda: EvaluationConfig(samples=1.5), "samples: expected int, got float 1.5"),
        (lambda: EvaluationConfig(guidances=1.0), "guidances: expected tuple[float, ...], got float 1.0"),
        (lambda: FlowTraining(model=3), "model: expected a mapping of fields, got int 3"),
        (
            lambda: InverseTraining(model=biflow.BiFlowConfig(img_size=8), label_drop=None),
            "label_drop: expected float, got NoneType None",
        ),
    ],
)
def test_configs_of_runs_check_their_own_types(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


def test_configs_of_runs_convert_like_those_from_files():
    config = OptimConfig(lr=1, betas=[0.5, 0.9])
    assert (config.betas, type(config.lr)) == ((0.5, 0.9), float)
    with pytest.raises(ValueError, match="guidances: expected a finite number >= 0, got nan"):
        EvaluationConfig(guidances=(0.0, float("nan")))


@pytest.mark.parametrize(
    "fields", [{"scale": "log"}, {"clip": ("soft", 1.0)}, {"clip": ("hard", 0.0)}, {"clip_on": "shift"}]
)
def test_model_configs_refuse_what_the_ops_refuse(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        biflow.TarFlowConfig(img_size=8, **fields)


def test_overrides():
    base = {"model": {"width": 8, "clip": None}, "seed": 1}
    result = apply_overrides(
        base, ["model.width=16", "model.clip=[hard, 1.0]", "optim.lr=1e-3", "seed=", "name=a=b", "on=true"]
    )
    assert result == {
        "model": {"width": 16, "clip": ["hard", 1.0]},
        "seed": None,
        "optim": {"lr": "1e-3"},
        "name": "a=b",
        "on": True,
    }
    assert base == {"model": {"width": 8, "clip": None}, "seed": 1}, "the input was changed"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("width", "override: expected key=value, got 'width'"),
        ("=3", "override: expected key=value, got '=3'"),
        ("model..width=3", "override 'model..width=3': expected names separated by single dots"),
        ("seed.x=3", "override 'seed.x=3': 'seed' holds a value, not a group of settings"),
        ("seed=[1", "override 'seed=[1': the value is not valid YAML"),
        ("seed=2024-13-45", "override 'seed=2024-13-45': the value is not valid YAML"),
    ],
)
def test_overrides_refuse(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_overrides({"seed": 1}, [override])


def test_check_number():
    assert check_number("n", 3, minimum=3) == 3.0
    assert isinstance(check_number("n", np.float32(0.5)), float)
    for bad in ("3", None, True, [1.0]):
        with pytest.raises(TypeError, match=r"n: expected a number, got"):
            check_number("n", bad)
    for bad, bounds in [(2, {"minimum": 3}), (0, {"above": 0}), (float("nan"), {}), (10**400, {})]:
        with pytest.raises(ValueError, match=r"n: expected a finite number"):
            check_number("n", bad, **bounds)


def test_numbers_that_fp32_cannot_hold():
    """What is used as fp32 must be finite there, and not 0 where it has to be positive; the last ones that are good."""
    largest, smallest = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_subnormal)
    over, under = largest + 2.0**103, smallest / 2  # halfway to the next one: rounded away
    for good in (largest, np.nextafter(over, 0), -largest, smallest, np.nextafter(under, 1)):
        assert 0 < abs(np.float32(good)) < np.inf
        assert check_number("n", good, single=True) == good
    for bad, bounds in ((over, {}), (-over, {}), (under, {"above": 0}), (1e-300, {"above": 0}), (1e300, {})):
        assert check_number("n", bad, **bounds) == bad
        with pytest.raises(ValueError, match=r"n: expected a finite number.* as float32, got "):
            check_number("n", bad, single=True, **bounds)
    assert check_number("n", 1e-300, minimum=0, single=True) == 1e-300


def test_check_fields_reaches_nested_values():
    outer = Outer(1, betas=[1, 2])
    check_fields(outer)
    assert outer.betas == (1.0, 2.0)
    with pytest.raises(TypeError, match=re.escape("betas[0]: expected float, got str 'x'")):
        check_fields(dataclasses.replace(outer, betas=("x", 1.0)))


def test_a_build_without_cuda_kernels_says_what_to_do(monkeypatch):
    monkeypatch.setattr("biflow.ops._checks.DEVICES", ("cpu",))
    with pytest.raises(
        ValueError, match=r"device: expected 'cpu', .*, got 'cuda'; this build has no CUDA kernels: install"
    ):
        RunConfig(device="cuda")
