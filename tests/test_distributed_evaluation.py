"""Scores, evaluations, latents and samples of two processes (gloo, CPU) against those of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import distributed_evaluation_worker as worker
import numpy as np
import pytest
import tiny_latents
import torch
from tiny_training import flow_config, inverse_config, random_flow, write_images

import biflow
from biflow import checkpoint, cli, distributed, evaluate

TESTS = Path(__file__).parent
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, images and an autoencoder."""
    folder = tmp_path_factory.mktemp("inputs")
    write_images(folder / "images.npz", 600)
    checkpoint.save(random_flow(flow_config(folder).model), folder / "flow.safetensors")
    torch.manual_seed(2)
    inverse = biflow.BiFlow(inverse_config(folder).model)
    for weight in inverse.parameters():  # a new one gives gray
        torch.nn.init.normal_(weight, std=0.2)
    checkpoint.save(inverse, folder / "inverse.safetensors")
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (81, 16, 16, 3)).astype(np.uint8)
    np.savez(folder / "other.npz", arr_0=pixels)
    np.savez(folder / "one.npz", arr_0=pixels[:1])
    tiny_latents.write_autoencoder(folder / "encoded" / "vae")
    tiny_latents.write_images(folder / "encoded" / "images")
    return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """What one process wrote."""
    out, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "Inception", lambda weights, device: worker.toy)
        try:
            torch.set_num_threads(1)
            for name, line in list(worker.commands(folder, out).items())[:-2]:
                if name == "encode_again":
                    continue
                more = [] if name in ("encode", "sample") else ["--out", str(out / f"{name}.json")]
                assert cli.main([*line, *more]) == 0, name
        finally:
            torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def shared(folder, alone, tmp_path_factory):
    """What two processes wrote, some of the latents after one that was killed."""
    out = tmp_path_factory.mktemp("shared")
    shutil.copytree(alone / "latents", out / "begun")
    (out / "begun" / "train-00001.safetensors").unlink()
    (out / "begun" / ".tmp-left").write_text("by a killed process")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command += [worker.__file__, str(folder), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in list(worker.commands(folder, out))[:-2]:
        for rank in (0, 1):
            assert (out / f"{name}_{rank}.code").read_text() == "0", (out / f"{name}_{rank}.err").read_text()
        assert (out / f"{name}_1.out").read_text() == "", "the main process alone prints"
        assert "no run folder says" not in (out / f"{name}_1.err").read_text()
    return out


def report(out: Path, name: str) -> dict:
    file = out / f"{name}.json"
    return json.loads((file if file.exists() else out / f"{name}_0.out").read_text())


def assert_close(found, wanted, tolerance: float, at: str = "") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_close(found[name], wanted[name], tolerance, f"{at}.{name}")
    elif isinstance(wanted, list):
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_close(one, other, tolerance, f"{at}[{i}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance), at
    else:
        assert found == wanted, at


def without(report: dict, name: str) -> dict:
    return {key: value for key, value in report.items() if key != name}


@slow
@pytest.mark.parametrize("name", ["score_arrays", "score_folder", "score_one"])
def test_scores_are_those_of_one_process(name, alone, shared):
    """To the rounding of merged moments; of one image, the main process has none."""
    found, wanted = report(shared, name), report(alone, name)
    assert_close(found, wanted, 1e-9)
    assert wanted["fid"] > 0
    if name == "score_folder":
        assert wanted["samples"] == {**wanted["samples"], "images": 22, "corrupt": 2}
    if name == "score_one":
        kept = [evaluate.read_statistics(out / "one.npz") for out in (shared, alone)]
        assert torch.equal(kept[0].pool, kept[1].pool)
        assert len(kept[0].pool) == 1


@slow
def test_evaluations_are_those_of_one_process(alone, shared):
    found, wanted = report(shared, "evaluate"), report(alone, "evaluate")
    assert_close(found, wanted, 1e-4)
    assert [one["guidance"] for one in wanted["learned"]["samples"]] == [0.0, 2.0]
    for part in (wanted["exact"], wanted["learned"]):
        assert all(one["frechet"] > 0 and one["pixel_std"] > 0.05 and one["count"] == 301 for one in part["samples"])
    assert wanted["data"]["frechet_held_out"] > 0
    assert wanted["learned"]["samples"][1]["distance_to_exact"] > 0
    assert report(shared, "evaluate_one")["exact"]["samples"][0]["count"] == 1
    assert_close(report(shared, "evaluate_one"), report(alone, "evaluate_one"), 1e-4)


@slow
@pytest.mark.parametrize("name", ["latents", "begun"])
def test_latents_are_those_of_one_process_to_the_byte(name, alone, shared):
    files = sorted(path.name for path in (alone / "latents").iterdir())
    assert files == ["latents.json", *(f"train-{k:05d}.safetensors" for k in range(3))]
    assert sorted(path.name for path in (shared / name).iterdir()) == files
    for file in files:
        assert (shared / name / file).read_bytes() == (alone / "latents" / file).read_bytes(), file
    assert report(shared, "encode")["corrupt"] == 2


@slow
def test_float_samples_are_those_of_one_process_to_the_bit(alone, shared):
    with np.load(shared / "samples.npz") as found, np.load(alone / "samples.npz") as wanted:
        assert found["images"].shape == (200, 8, 8, 1)
        for name in ("images", "labels"):
            assert np.array_equal(found[name], wanted[name])


@slow
@pytest.mark.parametrize(("file", "name"), [("info", "info"), ("check", "data check")])
def test_other_commands_refuse_several_processes(file, name, shared):
    for rank in (0, 1):
        assert (shared / f"{file}_{rank}.code").read_text() == "2"
        assert (shared / f"{file}_{rank}.out").read_text() == ""
        said = (shared / f"{file}_{rank}.err").read_text()
        assert (
            said
            == f"biflow: error: {name}: expected one process, got 2 (torchrun): this command does not share its work\n"
        )


def test_every_command_shares_its_work_or_refuses(monkeypatch):
    """Before it does anything; those that share it ask for what is missing."""
    monkeypatch.setattr(distributed, "join", lambda device="cpu": distributed.Processes(0, 3, torch.device("cpu")))
    monkeypatch.setattr(distributed, "leave", lambda: None)
    commands = {command.name: command.callback for command in cli.app.registered_commands}
    for group in cli.app.registered_groups:
        own = group.typer_instance.registered_commands
        commands |= {f"{group.name} {command.name}": command.callback for command in own}
    assert commands.keys() > set(cli.SHARED)
    for name, command in commands.items():
        if name in cli.SHARED:
            with pytest.raises(TypeError, match=r"missing .* required positional argument"):
                command()
        else:
            with pytest.raises(ValueError, match=rf"^{name}: expected one process, got 3 \(torchrun\)"):
                command()
