"""Training and sampling in two processes (gloo, CPU) against one: the same numbers, whatever stops a run."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker as worker
import kill_resume
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_training import changed, flow_config, interrupted, random_flow, same_weights, write_images

import biflow
from biflow import checkpoint, cli, distributed, train
from biflow.train import ParallelConfig, runs
from biflow.train.draws import BatchGenerator, draw_rows

TESTS = Path(__file__).parent
CALM = ("gathers", "ddp", "fsdp", "inverses", "stopped", "not_finite", "does_not_divide", "grids", "counted")
CALM += ("compiled", "two", "halves", "cached", "sample")
slow = pytest.mark.slow


def start(command: list[str], **variables: str) -> subprocess.Popen:
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | variables, text=True, **pipes)


def started(*arguments: str, module: bool = False, count: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += ["-m", "biflow"] if module else [str(TESTS / "distributed_worker.py")]
    return start([*command, *arguments])


def finished(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def torchrun(*arguments: str, **options) -> subprocess.CompletedProcess:
    return finished(started(*arguments, **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs are."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "images.npz")
    checkpoint.save(random_flow(flow_config(folder).model), folder / "flow.safetensors")
    return folder


@pytest.fixture(scope="module")
def calm(folder):
    """What two processes did undisturbed."""
    done = torchrun(str(folder), *CALM)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The run of `worker.ddp` in one process."""
    return train.train_flow(worker.flow(folder), folder / "alone", progress=False)


@pytest.fixture(scope="module")
def killed(folder):
    done = torchrun(str(folder), "killed")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    return folder / "killed"


def model(run: Path) -> biflow.TarFlow:
    return biflow.load(run / "model.safetensors")


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def gradients(run: Path) -> dict[str, torch.Tensor]:
    """Of the first step: the first moment is (1 - 0.9) of it."""
    state = load_file(run / "checkpoints" / "step_00000001" / "state.safetensors")
    return {name: value / 0.1 for name, value in state.items() if name.startswith("exp_avg.")}


def assert_same_curves(found: Path, wanted: Path, tolerance: float) -> None:
    for line, other in zip(kill_resume.metrics(found), kill_resume.metrics(wanted), strict=True):
        assert line.keys() == other.keys()
        assert line["split"] == other["split"]
        for name in line.keys() - {"split"}:
            assert line[name] == pytest.approx(other[name], abs=tolerance, rel=tolerance), (line["step"], name)


# --- two processes against one --------------------------------------------------------------------------------------


@slow
def test_gradients_are_those_of_one_process(calm, alone):
    found, wanted = gradients(calm / "ddp"), gradients(calm / "alone")
    assert found.keys() == wanted.keys()
    assert max(float(value.abs().max()) for value in wanted.values()) > 1e-3
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-12


@slow
@pytest.mark.parametrize("run", ["ddp", "fsdp"])
def test_loss_curve_and_weights_are_those_of_one_process(run, calm, alone):
    assert_same_curves(calm / run, calm / "alone", 1e-9)
    assert largest_difference(model(calm / run), alone) < 1e-9
    assert not torch.equal(alone.var, torch.ones_like(alone.var))


@slow
@pytest.mark.parametrize("run", ["inverse_ddp", "inverse_fsdp", "naive_ddp", "naive_fsdp"])
def test_the_learned_inverse_is_that_of_one_process(run, calm, tmp_path):
    kind, _, strategy = run.partition("_")
    config = getattr(worker, kind)(calm)
    worker.train_inverse(config, calm, f"{run}_alone")
    assert_same_curves(calm / run, calm / f"{run}_alone", 1e-9)
    assert largest_difference(model(calm / run), model(calm / f"{run}_alone")) < 1e-9
    last = f"checkpoints/step_{worker.INVERSE_STEPS:08d}/state.safetensors"
    found, wanted = (checkpoint.read(calm / name / last) for name in (run, f"{run}_alone"))
    names = found.tensors.keys() | set(found.metadata["shards"]["tensors"] if strategy == "fsdp" else ())
    assert names == wanted.tensors.keys()  # a head that has no gradient has no moments


def test_micro_batches_are_the_batch(alone, folder, tmp_path):
    config = worker.flow(folder, accumulate=4, every=5)
    found = train.train_flow(config, tmp_path / "run", progress=False)
    assert_same_curves(tmp_path / "run", folder / "alone", 1e-9)
    assert 0 < largest_difference(found, alone) < 1e-9


@pytest.mark.parametrize("function", [torch.rand, torch.randn])
def test_rows_of_a_split_batch_have_the_numbers_of_the_whole(function):
    whole, part = BatchGenerator().manual_seed(1), BatchGenerator().manual_seed(1)
    plain = torch.Generator().manual_seed(1)
    for size, dim in (((12, 3), 0), ((2, 12, 5), 1)):
        part.part = (4, 12)
        wanted = draw_rows(function, size, whole, dim=dim)
        assert torch.equal(wanted, function(size, generator=plain))
        own = (*size[:dim], 5, *size[dim + 1 :])
        assert torch.equal(draw_rows(function, own, part, dim=dim), wanted.narrow(dim, 4, 5))
    assert torch.equal(part.get_state(), whole.get_state())


# --- what stops a run -----------------------------------------------------------------------------------------------


@slow
def test_a_killed_process_ends_the_job_and_resuming_loses_nothing(calm, killed, tmp_path):
    assert not (killed / "model.safetensors").exists()
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == ["step_00000005", "step_00000010"]
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    fields = checkpoint.to_mapping(worker.flow(calm, every=5))
    (tmp_path / "flow.yaml").write_text(yaml.safe_dump({"stage": "flow", **fields}))
    done = torchrun("train", str(tmp_path / "flow.yaml"), "--out", str(out), "--resume", "--quiet", module=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained; next:") == 1
    assert same_weights(model(out), model(calm / "ddp"))
    assert kill_resume.raw_state(out, worker.STEPS) == kill_resume.raw_state(calm / "ddp", worker.STEPS)
    assert kill_resume.metrics(out) == kill_resume.metrics(calm / "ddp")


@slow
def test_a_signal_for_torchrun_stops_all_with_a_checkpoint(folder, tmp_path):
    config = changed(changed(flow_config(folder / "images.npz"), "optim", steps=100_000), "run", log_every=1)
    fields = checkpoint.to_mapping(changed(config, "run", checkpoint_every=100_000, validate_every=100_000))
    (tmp_path / "flow.yaml").write_text(yaml.safe_dump({"stage": "flow", **fields}))
    run = tmp_path / "run"
    process = started("train", str(tmp_path / "flow.yaml"), "--out", str(run), "--quiet", module=True)
    try:
        deadline = time.monotonic() + 120
        while kill_resume.last_step(run) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        done = finished(process)
    finally:
        process.kill()
    assert done.returncode not in (0, None), done.stderr
    assert done.stderr.count("stopped by a signal at step") == 1, done.stderr
    (written,) = runs.checkpoints(run)
    assert int(written.name[5:]) == kill_resume.last_step(run) >= 3
    assert checkpoint.read(written / "state.safetensors").metadata["step"] == kill_resume.last_step(run)
    assert not (run / "model.safetensors").exists()


@slow
def test_three_processes_resume_bit_for_bit(folder):
    """Where a + b + c depends on the order: DDP's buckets must not change after the first step."""
    done = torchrun(str(folder), "thirds", "left", count=3)
    assert done.returncode == 0, done.stderr
    assert kill_resume.raw_state(folder / "thirds_again", 8) == kill_resume.raw_state(folder / "thirds", 8)
    for rank in range(3):  # a thread of the group that outlives it can abort a process that ends
        assert "gloo" not in (folder / f"left_{rank}").read_text()


@slow
def test_one_process_continues_what_two_began(calm, killed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    found = train.train_flow(worker.flow(calm, every=5), out, resume=True, progress=False)
    assert largest_difference(found, model(calm / "ddp")) < 1e-9
    assert_same_curves(out, calm / "ddp", 1e-9)


@slow
def test_a_signal_for_one_process_stops_all_after_the_same_step(calm):
    assert [(calm / f"stopped_{rank}").read_text() for rank in (0, 1)] == ["exit code 143"] * 2
    run = calm / "stopped"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000005", "step_00000007"]
    assert kill_resume.raw_state(run, 7) == kill_resume.raw_state(calm / "ddp", 7)


@slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all(calm):
    for rank in (0, 1):
        assert (calm / f"not_finite_{rank}").read_text().startswith("step 3: loss is nan")


@slow
def test_a_batch_has_to_divide(calm):
    for rank in (0, 1):
        said = (calm / f"does_not_divide_{rank}").read_text()
        assert "expected a multiple of 2 (2 processes x parallel.accumulate 1), got 15" in said


# --- sharded runs ---------------------------------------------------------------------------------------------------


@slow
def test_a_sharded_run_resumes_bit_for_bit(calm):
    assert same_weights(model(calm / "fsdp_again"), model(calm / "fsdp"))
    assert kill_resume.metrics(calm / "fsdp_again") == kill_resume.metrics(calm / "fsdp")


@slow
def test_three_processes_continue_what_two_sharded(calm, tmp_path):
    done = torchrun(str(calm), "three", count=3)
    assert done.returncode == 0, done.stderr
    newest = runs.checkpoints(calm / "three")[0]
    assert len(list((newest / "shards").iterdir())) == 3
    found = train.train_flow(worker.small(calm), tmp_path / "alone", progress=False)
    assert largest_difference(found, model(calm / "three")) < 1e-9
    assert_same_curves(calm / "three", tmp_path / "alone", 1e-9)


@slow
def test_one_process_continues_a_sharded_run(calm, alone, tmp_path):
    newest = runs.checkpoints(calm / "fsdp_alone")[0]
    state = checkpoint.read(newest / "state.safetensors")
    assert len(list((newest / "shards").iterdir())) == 2
    assert not any(name.startswith("exp_avg") for name in state.tensors)
    found = train.train_flow(worker.flow(calm), calm / "fsdp_alone", resume=True, progress=False)
    assert largest_difference(found, alone) < 1e-9


@slow
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_shards_are_passed_over(damage, calm, alone, tmp_path, capsys):
    out = interrupted(calm / "fsdp", tmp_path, 14)
    file = sorted((runs.checkpoints(out)[0] / "shards").iterdir())[1]
    if damage == "flipped":
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    found = train.train_flow(worker.flow(calm), out, resume=True, progress=False)
    assert "continuing from step 13, an older checkpoint" in capsys.readouterr().err
    assert largest_difference(found, alone) < 1e-9


# --- helpers and commands -------------------------------------------------------------------------------------------


@slow
def test_processes_share_and_gather(calm):
    first, second = (json.loads((calm / f"gathers_{rank}").read_text()) for rank in (0, 1))
    rows = [[float(i), i / 2] for i in range(7)]
    assert first == [2, [0, 1, 2], 0, 1, [0, 1], rows, True]
    assert second == [2, [3, 4, 5, 6], 0, 1, [0, 1], None, False]


@slow
def test_a_step_talks_once_about_values_and_signals(calm):
    """And once about the prior variance that shift_only flows learn."""
    assert json.loads((calm / "counted_0").read_text()) == [["all_reduce"] * 2] * 4


@slow
@pytest.mark.parametrize("run", ["compiled", "compiled_again"])
def test_compiled_passes_under_ddp(run, calm, tmp_path):
    found = train.train_flow(worker.small(calm), tmp_path / "alone", progress=False)
    assert_same_curves(calm / run, tmp_path / "alone", 1e-9)
    assert largest_difference(found, model(calm / run)) < 1e-9


@slow
def test_sharded_in_bf16_no_weight_stays_cast(calm, tmp_path):
    found = json.loads((calm / "casts").read_text())
    assert found == [[True, False]] * len(found) != []
    train.train_flow(changed(worker.small(calm), "run", precision="bf16"), tmp_path / "alone", progress=False)
    assert_same_curves(calm / "halves", tmp_path / "alone", 2e-2)
    assert {p.dtype for p in model(calm / "halves").parameters()} == {torch.float32}


@slow
def test_processes_share_the_features_of_an_encoder(calm, tmp_path):
    """fp16 features, whatever the batch: the curves are those of features that each step computes."""
    assert len(list((calm / "cached" / "features").iterdir())) == 6
    train.train_flow(worker.with_features(calm, False), tmp_path / "alone", progress=False)
    assert_same_curves(calm / "cached", tmp_path / "alone", 1e-4)


# --- without torchrun -----------------------------------------------------------------------------------------------


@slow
def test_processes_of_any_launcher_connect_and_wait_for_what_one_does_alone(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(TESTS / "distributed_worker.py"), str(folder), "patient"]
    known = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for done in map(finished, [start(command, RANK=rank, **known) for rank in "01"]):
        assert done.returncode == 0, done.stderr
    assert [json.loads((folder / f"patient_{rank}").read_text()) for rank in (0, 1)] == [[0, 2, 1], [1, 2, 1]]


STEP = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "device", "reason"),
    [
        (STEP, "cpu", "WORLD_SIZE: expected in the environment of each of 4 tasks that srun started, got none: each"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "cpu",
            "2 tasks that mpirun started, got none: .* Start one torchrun a machine",
        ),
        ({"PMI_SIZE": "3"}, "cpu", "each of 3 tasks that an MPI launcher started"),
        ({"WORLD_SIZE": "2"}, "cpu", "RANK: expected in the environment beside WORLD_SIZE=2, got none"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "cpu", "MASTER_PORT: expected in the environment"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "cuda",
            "LOCAL_RANK: expected the process's number on its machine, for its GPU, in the environment beside",
        ),
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE: expected the number of processes in the environment, got 'two'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_processes_that_cannot_connect_do_not_each_do_the_whole(variables, device, reason, unlaunched):
    for name, value in variables.items():
        unlaunched.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        distributed.join(device)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the script of sbatch
        {"SLURM_NTASKS": "4"},  # the shell of salloc
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # its shell as a step of its own
        {**STEP, "SLURM_PTY_PORT": "40000"},  # srun --pty -n 4 bash
        {**STEP, "WORLD_SIZE": "1"},  # four jobs side by side
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
    ],
    ids=str,
)
def test_a_process_that_a_scheduler_started_alone_is_alone(variables, unlaunched):
    for name, value in variables.items():
        unlaunched.setenv(name, value)
    assert distributed.join().count == 1
    assert not torch.distributed.is_initialized()


@pytest.fixture
def unlaunched(monkeypatch):
    """An environment in which nothing was launched."""
    launchers = ("SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_")
    for name in os.environ:
        if name.startswith(launchers) or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    return monkeypatch


# --- alone ----------------------------------------------------------------------------------------------------------


def test_alone_everything_is_one_s_own():
    own = distributed.join()
    assert (own.rank, own.count, own.main, own.split(5)) == (0, 1, True, range(5))
    assert (own.same("a"), own.most(3), own.gather([1])) == ("a", 3, [1])
    assert torch.equal(own.gather_rows(torch.ones(2, 3)), torch.ones(2, 3))
    assert not torch.distributed.is_initialized()


@slow
def test_activation_checkpointing_and_pictures_of_several_processes(calm, tmp_path):
    config = worker.pictured(calm)
    train.train_flow(changed(config, "run", activation_checkpointing=False), tmp_path / "one", progress=False)
    for strategy in ("ddp", "fsdp"):
        run = calm / f"grids_{strategy}"
        assert_same_curves(run, tmp_path / "one", 1e-4)
        names = [file.name for file in sorted((run / "samples").iterdir())]
        assert names == ["step_00000002.png", "step_00000004.png"]
        assert len(json.loads((run / "environment.json").read_text())) == 1, "the main process alone writes"


@slow
def test_samples_do_not_depend_on_the_number_of_processes(calm, tmp_path):
    out = tmp_path / "many.npz"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        words = ["sample", calm / "flow.safetensors", "--n", "600", "--format", "adm", "--out", out]
        assert cli.main([*map(str, words)]) == 0
    finally:
        torch.set_num_threads(threads)
    found, wanted = np.load(calm / "many.npz"), np.load(out)
    assert found["arr_0"].shape == (600, 8, 8, 3)
    assert found["arr_0"].std() > 10
    for name in ("arr_0", "arr_1"):
        assert np.array_equal(found[name], wanted[name])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"strategy": "zero"}, "strategy: expected one of ddp, fsdp, got 'zero'"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
    ],
)
def test_bad_settings(fields, reason):
    with pytest.raises(ValueError, match=reason):
        ParallelConfig(**fields)


def test_settings_that_do_not_go_together(folder):
    config = flow_config(folder / "images.npz")
    with pytest.raises(ValueError, match=r"optim\.batch_size: expected a multiple of parallel\.accumulate 3, got 16"):
        dataclasses.replace(config, parallel=ParallelConfig(accumulate=3))
    with pytest.raises(ValueError, match=r"run\.compile: expected false with parallel\.strategy fsdp"):
        dataclasses.replace(changed(config, "run", compile=True), parallel=ParallelConfig(strategy="fsdp"))
    double = changed(config, "run", precision="fp64")
    with pytest.raises(ValueError, match=r"run\.sample_every: expected None with run\.precision fp64"):
        changed(double, "run", sample_every=1)
    with pytest.raises(ValueError, match=r"run\.precision: expected fp32 or bf16 with representation"):
        dataclasses.replace(double, representation=train.RepresentationConfig(features=((-1, 0),)))
