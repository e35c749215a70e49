"""Resuming: after any interruption the run ends in the bits of one that was never interrupted."""

import json
import shutil
import signal

import kill_resume
import numpy as np
import pytest
import torch
from tiny_training import changed, flow_config, interrupted, inverse_config, random_flow, same_weights, write_images

import biflow
from biflow import checkpoint, train
from biflow.train import runs, trainer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of 20 steps with a checkpoint every 5, all of them kept."""
    out = tmp_path_factory.mktemp("run") / "flow"
    config = flow_config(images, steps=20, every=5, keep=10)
    return config, out, train.train_flow(config, out, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", kill_resume.STAGES)
def test_kill_9_at_random_moments_loses_nothing(stage, tmp_path):
    kill_resume.check(stage, kills=3, folder=tmp_path, seed=1, steps=120)


def test_resume_continues_within_an_epoch_bit_for_bit(finished, tmp_path):
    config, _, model = finished
    out = interrupted(finished[1], tmp_path, 10)  # 16 images a step, 54 to train on: in the middle of the third epoch
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "split": "tra')  # and of a line
    resumed = train.train_flow(config, out, resume=True, progress=False)
    assert same_weights(resumed, model)
    assert kill_resume.raw_state(out, 20) == kill_resume.raw_state(finished[1], 20)
    assert kill_resume.metrics(out) == kill_resume.metrics(finished[1])  # no line twice, none missing


def test_leftovers_of_a_kill_are_removed(finished, tmp_path):
    out = interrupted(finished[1], tmp_path, 10)
    (out / ".tmp-model.safetensors-00000000").write_bytes(b"half a file")
    (out / "checkpoints" / ".tmp-step_00000015-00000000").mkdir()
    (out / "checkpoints" / ".tmp-step_00000015-00000000" / "state.safetensors").write_bytes(b"half a file")
    assert same_weights(train.train_flow(finished[0], out, resume=True, progress=False), finished[2])
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.parametrize("damage", ["flipped state", "cut model", "state missing"])
def test_a_damaged_checkpoint_is_passed_over(damage, finished, tmp_path, capsys):
    out = interrupted(finished[1], tmp_path, 15)
    newest = runs.checkpoints(out)[0]
    state, model = newest / "state.safetensors", newest / "model.safetensors"
    if damage == "flipped state":
        data = bytearray(state.read_bytes())
        data[-5] ^= 1
        state.write_bytes(data)
    elif damage == "cut model":
        model.write_bytes(model.read_bytes()[:-1])
    else:
        state.unlink()
    resumed = train.train_flow(finished[0], out, resume=True, progress=False)
    assert "continuing from step 10, an older checkpoint" in capsys.readouterr().err
    assert same_weights(resumed, finished[2])
    assert kill_resume.metrics(out) == kill_resume.metrics(finished[1])
    biflow.load(newest / "model.safetensors")  # written again


def test_no_readable_checkpoint_is_an_error(finished, tmp_path):
    out = interrupted(finished[1], tmp_path, 5)
    (runs.checkpoints(out)[0] / "state.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint of the run can be read: .*state\.safetensors"):
        train.train_flow(finished[0], out, resume=True, progress=False)


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(finished, tmp_path):
    out = interrupted(finished[1], tmp_path, 0)
    assert same_weights(train.train_flow(finished[0], out, resume=True, progress=False), finished[2])
    assert kill_resume.metrics(out) == kill_resume.metrics(finished[1])
    fresh = tmp_path / "fresh"  # nor does the folder have to exist
    assert same_weights(train.train_flow(finished[0], fresh, resume=True, progress=False), finished[2])


def test_resuming_a_finished_run_returns_its_model(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[1], out)
    (out / "model.safetensors").unlink()  # killed between the last checkpoint and this file
    assert same_weights(train.train_flow(finished[0], out, resume=True, progress=False), finished[2])
    assert same_weights(biflow.load(out / "model.safetensors"), finished[2])
    assert kill_resume.metrics(out) == kill_resume.metrics(finished[1])


def test_a_run_is_never_overwritten(finished, images, tmp_path):
    with pytest.raises(FileExistsError, match=r"not empty; resume the run in it .* or choose another folder"):
        train.train_flow(finished[0], finished[1], progress=False)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(FileExistsError, match="expected a run to resume"):
        train.train_flow(finished[0], tmp_path / "letters", resume=True, progress=False)
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["dear.txt"]


@pytest.mark.parametrize(
    ("group", "fields", "reason"),
    [
        ("optim", {"steps": 30}, r"optim\.steps = 20, this configuration 30"),
        ("run", {"seed": 5}, r"run\.seed = 0, this configuration 5"),
        ("model", {"noise_std": 0.2}, r"model\.noise_std = 0\.1, this configuration 0\.2"),
        ("data", {"flip": False}, r"data\.flip = True, this configuration False"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_another_configuration_is_refused_by_its_first_difference(group, fields, reason, finished, tmp_path):
    out = interrupted(finished[1], tmp_path, 10)
    with pytest.raises(ValueError, match=reason):
        train.train_flow(changed(finished[0], group, **fields), out, resume=True, progress=False)
    assert len(runs.checkpoints(out)) == 2


def test_how_often_things_are_written_may_change(finished, tmp_path):
    out = interrupted(finished[1], tmp_path, 10)
    config = changed(finished[0], "run", checkpoint_every=2, log_every=3, validate_every=7, keep=1)
    assert same_weights(train.train_flow(config, out, resume=True, progress=False), finished[2])
    assert [p.name for p in runs.checkpoints(out)] == ["step_00000020"]


def test_another_flow_and_another_stage_are_refused(finished, images, tmp_path):
    config = inverse_config(images, steps=5, every=5)
    flow = random_flow(flow_config(images).model)
    model = train.train_inverse(config, flow, tmp_path / "run", progress=False)
    assert same_weights(train.train_inverse(config, flow, tmp_path / "run", resume=True, progress=False), model)
    with pytest.raises(ValueError, match="flow_sha256"):
        train.train_inverse(config, finished[2], tmp_path / "run", resume=True, progress=False)
    with pytest.raises(ValueError, match="stage = 'inverse', this configuration 'flow'"):
        train.train_flow(finished[0], tmp_path / "run", resume=True, progress=False)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(number, kind, finished, tmp_path, monkeypatch):
    original = trainer.Trainer._train_step

    def step_with_signal(self):
        if self.step == 6:
            signal.raise_signal(number)
        original(self)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(trainer.Trainer, "_train_step", step_with_signal)
    with pytest.raises(kind) as stop:
        train.train_flow(finished[0], tmp_path / "run", progress=False)
    monkeypatch.undo()
    if kind is SystemExit:
        assert stop.value.code == 128 + signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert runs.checkpoints(tmp_path / "run")[0].name == "step_00000007"
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert same_weights(train.train_flow(finished[0], tmp_path / "run", resume=True, progress=False), finished[2])
    assert kill_resume.metrics(tmp_path / "run") == kill_resume.metrics(finished[1])


def test_the_state_file_is_checked_like_a_model(finished):
    path = finished[1] / "checkpoints/step_00000020/state.safetensors"
    contents = checkpoint.read(path)
    assert contents.metadata["step"] == 20
    assert torch.equal(contents.tensors["model.var"], torch.ones(4, 16))
    assert {"exp_avg.blocks.0.proj_in.bias", "exp_avg_sq.blocks.0.proj_in.bias", "generator"} <= contents.tensors.keys()
    assert json.loads(json.dumps(contents.config))["stage"] == "flow"
    with pytest.raises(ValueError, match="expected a model of kind TarFlow or BiFlow, got kind 'training state'"):
        biflow.load(path)


# --- paths ----------------------------------------------------------------------------------------------------------


def test_data_may_move_and_may_not_change(finished, images, tmp_path):
    """A copy for each job; config.yaml says where they are when the run goes on, and only then."""
    out, moved, other = interrupted(finished[1], tmp_path, 10), tmp_path / "scratch.npz", tmp_path / "other.npz"
    shutil.copy(images, moved)
    with np.load(images) as arrays:
        np.savez(other, images=arrays["images"][::-1], labels=arrays["labels"])
    before = (out / "config.yaml").read_text()
    with pytest.raises(ValueError, match=rf"expected the images of {images} that the run began with, got others in .*"):
        train.train_flow(changed(finished[0], "data", source=str(other)), out, resume=True, progress=False)
    assert (out / "config.yaml").read_text() == before
    resumed = train.train_flow(changed(finished[0], "data", source=str(moved)), out, resume=True, progress=False)
    assert same_weights(resumed, finished[2])
    assert kill_resume.raw_state(out, 20) == kill_resume.raw_state(finished[1], 20)
    assert (out / "config.yaml").read_text() == before.replace(str(images), str(moved))


def rewritten(out, change):
    """The newest training state, as `change(config, metadata, tensors)` makes it."""
    path = runs.checkpoints(out)[0] / "state.safetensors"
    found = checkpoint.read(path)
    change(found.config, found.metadata, found.tensors)
    checkpoint.write(path, found.kind, found.tensors, found.config, found.metadata)


def test_a_run_of_before_arrays_had_a_hash_goes_on_where_its_data_is(finished, images, tmp_path):
    out, moved = interrupted(finished[1], tmp_path, 10), tmp_path / "scratch.npz"
    shutil.copy(images, moved)
    rewritten(out, lambda config, metadata, tensors: metadata.pop("data_sha256"))
    with pytest.raises(ValueError, match=r"data\.source = '.*images\.npz', this configuration '.*scratch\.npz'"):
        train.train_flow(changed(finished[0], "data", source=str(moved)), out, resume=True, progress=False)
    assert same_weights(train.train_flow(finished[0], out, resume=True, progress=False), finished[2])
    assert kill_resume.raw_state(out, 20) == kill_resume.raw_state(finished[1], 20)


def test_a_run_may_go_on_on_another_device(finished, tmp_path):
    """With other noise: a GPU's generator has another state. Nothing else differs."""
    out = interrupted(finished[1], tmp_path, 10)

    def change(config, metadata, tensors):
        config["run"]["device"] = "cuda"
        tensors["generator"] = torch.zeros(16, dtype=torch.uint8)

    rewritten(out, change)
    path = out / "config.yaml"
    path.write_text(path.read_text().replace("device: cpu", "device: cuda"))
    resumed = train.train_flow(finished[0], out, resume=True, progress=False)
    assert not same_weights(resumed, finished[2])
    assert kill_resume.metrics(out)[-1]["loss"] == pytest.approx(kill_resume.metrics(finished[1])[-1]["loss"], abs=0.1)
    assert "device: cpu" in path.read_text()
