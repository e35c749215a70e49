"""Model files: what is written comes back bit for bit; anything else is refused with a reason, and never unpickled."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

import biflow
from biflow import checkpoint
from biflow.config import to_mapping


def small_flow(**options):
    torch.manual_seed(0)
    shape = {"img_size": 8, "in_channels": 1, "patch_size": 4, "width": 8, "head_dim": 4, "num_blocks": 2}
    flow = biflow.TarFlow(biflow.TarFlowConfig(**{**shape, "layers_per_block": 1, "num_classes": 3, **options}))
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return flow


def small_inverse():
    torch.manual_seed(0)
    return biflow.BiFlow(
        biflow.BiFlowConfig(
            img_size=8, in_channels=1, patch_size=4, width=8, head_dim=4, num_blocks=2, layers_per_group=1,
            num_classes=3, class_tokens=2, max_guidance=2.0, guidance_tokens=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        small_flow,
        lambda: small_flow(layers_per_block=(1, 2), clip=("tanh", 4.0), rope=True, start_token=True),  # tuples, buffers
        lambda: small_flow(shift_only=True),  # var is saved
        lambda: small_flow(num_classes=0).double(),  # the dtype is the file's
        small_inverse,
    ],
    ids=["flow", "flow-variants", "shift-only", "fp64", "inverse"],
)
def test_a_saved_model_comes_back_bit_for_bit(make, tmp_path):
    model = make()
    if isinstance(model, biflow.TarFlow):
        model.var.uniform_(0.5, 2.0)
    path = tmp_path / "model.safetensors"
    biflow.save(model, path, {"note": "é", "step": 3})
    state = torch.get_rng_state()
    loaded = biflow.load(path)
    assert torch.equal(state, torch.get_rng_state())
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    want, got = model.state_dict(), loaded.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[k], got[k]) and want[k].dtype == got[k].dtype for k in want)
    for (name, a), (_, b) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    info = checkpoint.describe(path)
    assert info["kind"] == type(model).__name__
    assert info["version"] == biflow.__version__
    assert info["config"] == to_mapping(model.config)
    assert info["metadata"] == {"note": "é", "step": 3}
    assert info["parameters"] == sum(v.numel() for v in want.values())
    assert checkpoint.fingerprint(model) == checkpoint.fingerprint(loaded)


def test_weights_that_are_not_finite_are_kept(tmp_path):
    flow = small_flow()
    flow.blocks[0].proj_in.bias.data[0] = float("nan")
    biflow.save(flow, tmp_path / "m.safetensors")
    assert biflow.load(tmp_path / "m.safetensors").blocks[0].proj_in.bias[0].isnan()


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    biflow.save(small_flow(), path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    places = [*range(header), *rng.sample(range(header, len(good)), 200), len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"model\.safetensors: .*expected"):
            biflow.load(path)
    path.write_bytes(good)
    biflow.load(path)


@pytest.mark.parametrize(
    "cut", [0, 1, 8, 100, 0.5, -1], ids=["empty", "1-byte", "length-only", "in-header", "half", "last-byte"]
)
def test_a_truncated_file_is_refused(cut, tmp_path):
    path = tmp_path / "model.safetensors"
    biflow.save(small_flow(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a complete safetensors file"):
        biflow.load(path)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_file_is_refused_and_not_unpickled(zipped, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": Bomb(tmp_path / "exploded")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pt: expected a safetensors file, got a pickled one"):
        biflow.load(path)
    assert not (tmp_path / "exploded").exists()


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"written by biflow .* got entries: none"):
        biflow.load(path)
    save_file({"w": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"written by biflow .* got entries: format"):
        biflow.load(path)
    path.write_text("hello, this is not a model\n" * 10)
    with pytest.raises(ValueError, match="expected a complete safetensors file"):
        biflow.load(path)
    with pytest.raises(ValueError, match="got a folder"):
        biflow.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        biflow.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "Diffusion"}, "expected a model of kind TarFlow or BiFlow, got kind 'Diffusion'"),
        ({"config": {"colour": 1}}, "unknown field 'colour'"),
        ({"config": {"width": "wide"}}, "width: expected int, got str"),
        ({"config": {"width": 7}}, "width: expected a multiple"),
        ({"config": {"width": 16}}, "expected shape"),
        ({"config": {"num_blocks": 10**7}}, "the config names 10000000 layers"),
        ({"config": {"img_size": 4 * 10**9}}, "img_size: expected less than 2\\^24, got 4000000000"),
        ({"config": {"rope": True}}, None),  # fits the same tensors: fine
        ({"drop": "blocks.1.proj_out.bias"}, "tensor 'blocks.1.proj_out.bias' is missing"),
        ({"add": {"extra": torch.zeros(1)}}, "tensor 'extra' is unexpected"),
        ({"add": {"var": torch.ones(4, 15)}}, r"tensor 'var': expected shape \(4, 16\), got \(4, 15\)"),
        ({"add": {"var": torch.ones(4, 16, dtype=torch.int32)}}, "expected one floating-point dtype"),
    ],
    ids=str,
)
def test_well_formed_files_with_wrong_content_are_refused(change, reason, tmp_path):
    """The hash is right: whoever wrote this file meant it."""
    flow, path = small_flow(), tmp_path / "model.safetensors"
    tensors = {**flow.state_dict(), **change.get("add", {})}
    tensors.pop(change.get("drop"), None)
    config = {**to_mapping(flow.config), **change.get("config", {})}
    checkpoint.write(path, change.get("kind", "TarFlow"), tensors, config, {})
    if reason is None:
        biflow.load(path)
        return
    with pytest.raises(ValueError, match=reason) as error:
        biflow.load(path)
    assert str(path) in str(error.value)


def test_a_newer_format_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", "biflow 99")
    biflow.save(small_flow(), tmp_path / "m.safetensors")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="expected format 'biflow 1', got 'biflow 99'"):
        biflow.load(tmp_path / "m.safetensors")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    biflow.save(small_flow(), path)
    before = path.read_bytes()

    def fail(tensors, where, metadata):
        where.write_bytes(before[:100])
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        biflow.save(small_inverse(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_save_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(TypeError, match="expected one of TarFlow, BiFlow, got Linear"):
        biflow.save(torch.nn.Linear(2, 2), tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        biflow.save(small_flow(), tmp_path / "none" / "m.safetensors")
    with pytest.raises(TypeError):
        biflow.save(small_flow(), tmp_path / "m.safetensors", {"model": object()})
    assert not list(tmp_path.iterdir())


def test_the_configuration_is_readable_by_other_tools(tmp_path):
    from safetensors import safe_open

    biflow.save(small_flow(), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        document = json.loads(file.metadata()["biflow"])
    assert document["config"]["img_size"] == 8
    assert document["kind"] == "TarFlow"


def test_equal_models_are_equal_files(tmp_path):
    """Also across processes, whose hash seeds differ: tests/kill_resume.py compares bytes."""
    for name in ("a", "b"):
        biflow.save(small_flow(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
