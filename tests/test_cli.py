"""Every command on tiny runs, and what wrong input is answered with."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import biflow
from biflow import cli, evaluate, presets, solvers
from biflow.cli.common import data_config
from biflow.train import trainer

TINY = [
    "model.width=16", "model.head_dim=8", "model.num_blocks=2", "optim.steps=4", "optim.batch_size=16",
    "run.checkpoint_every=2", "run.tensorboard=false", "run.threads=1", "--quiet",
]  # fmt: skip
TINY_FLOW = ["digits_flow", "model.layers_per_block=1", *TINY]
TINY_INVERSE = ["digits_inverse", "model.layers_per_group=1", *TINY]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with flow/ and inverse/, trained by the commands."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", *TINY_FLOW, "--out", f"{folder}/flow"]) == 0
    flow = f"{folder}/flow/model.safetensors"
    assert cli.main(["distill", *TINY_INVERSE, "--flow", flow, "--out", f"{folder}/inverse"]) == 0
    return folder


def test_train_and_distill_apply_overrides(runs):
    config = yaml.safe_load((runs / "flow" / "config.yaml").read_text())
    kept = presets.read("digits_flow")["model"]["noise_std"]
    assert (config["model"]["width"], config["optim"]["steps"], config["model"]["noise_std"]) == (16, 4, kept)
    assert isinstance(biflow.load(runs / "flow" / "model.safetensors"), biflow.TarFlow)
    assert isinstance(biflow.load(runs / "inverse" / "model.safetensors"), biflow.BiFlow)


def test_train_resumes_a_finished_run_into_the_same_weights(runs):
    before = biflow.load(runs / "flow" / "model.safetensors").state_dict()
    assert cli.main(["train", *TINY_FLOW, "--out", f"{runs}/flow", "--resume"]) == 0
    after = biflow.load(runs / "flow" / "model.safetensors").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_train_reads_a_yaml_file(tmp_path, capsys):
    settings = {**presets.read("digits_flow"), "optim": {"steps": 1, "batch_size": 4, "warmup_steps": 0}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    overrides = ["model.width=16", "model.head_dim=8", "run.tensorboard=false", "run.threads=1", "--quiet"]
    assert cli.main(["train", str(tmp_path / "my.yaml"), *overrides, "--out", str(tmp_path / "run")]) == 0
    assert "trained" in capsys.readouterr().out


def test_sample_npz_is_what_the_model_draws(runs, tmp_path):
    out = tmp_path / "s.npz"
    assert cli.main(["sample", f"{runs}/inverse", "--n", "5", "--class", "3", "--seed", "7", "--out", str(out)]) == 0
    got = np.load(out)
    model, y = biflow.load(runs / "inverse" / "model.safetensors"), torch.full((5,), 3)
    want = model.sample(5, y, guidance=1.0, generator=torch.Generator().manual_seed(7)).clamp(-1, 1)
    np.testing.assert_array_equal(got["images"], want.permute(0, 2, 3, 1).numpy())
    assert got["labels"].tolist() == [3] * 5


def test_sample_options_reach_an_exact_flow(runs, tmp_path):
    def draw(name, *options):
        out = tmp_path / f"{name}.npz"
        assert cli.main(["sample", f"{runs}/flow", "--n", "4", *options, "--out", str(out)]) == 0
        return np.load(out)["images"]

    plain = draw("plain")
    for options in (
        ["--no-denoise"],
        ["--temperature", "0.5"],
        ["--seed", "1"],
        ["--class", "none"],
        ["--precision", "bf16"],
        ["--guide", "a"],
        ["--no-anneal"],
        ["--attn-temp", "2"],
    ):
        assert np.abs(draw(options[0], *options) - plain).max() > 0
    np.testing.assert_array_equal(draw("again", "--class", "all"), plain)
    np.testing.assert_allclose(draw("jacobi", "--solver", "jacobi"), plain, atol=1e-4)


def test_sample_certifies_what_an_exact_flow_did(runs, tmp_path, monkeypatch, capsys):
    def draw(*options):
        out = tmp_path / "s.npz"
        assert cli.main(["sample", f"{runs}/flow", "--n", "7", "--batch", "3", *options, "--out", str(out)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f"{out}: 7 images"
        return np.load(out)["images"], lines[:-1]

    plain, lines = draw()
    assert lines == []
    certified, lines = draw("--certify")
    np.testing.assert_array_equal(certified, plain)
    assert re.fullmatch(r"largest residual: [\d.]+e-\d+", lines[0])
    assert lines[1:] == [f"block {i}: sequential, 15 passes, 0 fallbacks" for i in range(2)]
    images, lines = draw("--solver", "windowed", "--window", "5", "--certify")
    np.testing.assert_allclose(images, plain, atol=1e-4)
    assert all(re.fullmatch(rf"block {i}: windowed 5, \d+ passes, 0 fallbacks", lines[1 + i]) for i in range(2))
    given, original = [], biflow.TarFlow.sample
    monkeypatch.setattr(biflow.TarFlow, "sample", lambda *a, **o: given.append(o) or original(*a, **o))
    draw("--solver", "jacobi", "--tol", "1e-3")
    assert {options["tol"] for options in given} == {1e-3}


def test_the_certificate_of_several_batches():
    def info(residual, names, windows, passes, fallbacks):
        return solvers.DecodeInfo(torch.tensor(residual), names, windows, passes, fallbacks)

    infos = [
        info([1e-7, 2e-5], ("jacobi", "windowed"), (None, 8), (9, 30), ((), (0, 1))),
        info([3e-6], ("jacobi", "sequential"), (None, None), (11, 15), ((0,), ())),
    ]
    assert cli.sampling._certificate(infos) == [
        "largest residual: 2e-05",
        "block 0: jacobi, 11 passes, 1 fallbacks",
        "block 1: windowed 8 or sequential, 30 passes, 2 fallbacks",
    ]
    infos[0].residual[0] = torch.nan
    assert cli.sampling._certificate(infos)[0] == "largest residual: nan"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sample_on_a_gpu(runs, tmp_path):
    """The noise of a seed is the same as on the CPU; the flow decodes and denoises there."""
    for model in ("inverse", "flow"):
        images = []
        for device in ("cpu", "cuda"):
            out = tmp_path / f"{model}-{device}.npz"
            assert cli.main(["sample", f"{runs}/{model}", "--n", "4", "--device", device, "--out", str(out)]) == 0
            images.append(np.load(out)["images"])
        np.testing.assert_allclose(*images, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_calibrate_and_evaluate_on_a_gpu(runs, tmp_path, capsys):
    flow = tmp_path / "flow.safetensors"
    flow.write_bytes((runs / "flow" / "model.safetensors").read_bytes())
    small = ["--batches", "2", "--repetitions", "1", "--quiet"]
    for device in ("cpu", "cuda"):
        assert cli.main(["calibrate", str(flow), *small, "--device", device]) == 0
    model = biflow.load(flow)
    assert {e.device for e in model.policy.entries} == {"cpu", "cuda"}
    assert model.policy.choose("cuda", "fp32", 2, 0.0).name == torch.cuda.get_device_name()
    reports = []
    for device in ("cpu", "cuda"):
        capsys.readouterr()
        words = ["--data", "digits", "--samples", "40", "--guidance", "0", "--device", device]
        assert cli.main(["evaluate", str(flow), *words]) == 0
        reports.append(json.loads(capsys.readouterr().out)["exact"])
    here, there = reports
    assert there["held_out_nats_per_dim"] == pytest.approx(here["held_out_nats_per_dim"], abs=1e-4)
    assert there["round_trip_max_error"] < 1e-3
    assert there["samples"][0]["pixel_std"] == pytest.approx(here["samples"][0]["pixel_std"], abs=1e-3)


def test_sampling_moves_model_and_labels_but_not_the_noise(runs, tmp_path, monkeypatch):
    moved = []

    def to(self, *arguments, **options):
        moved.append(arguments)
        return self

    def spy(self, n, y, *, generator, **options):
        moved.append((y.device,))
        assert generator.device.type == "cpu"
        return torch.zeros(n, 1, 8, 8)

    monkeypatch.setattr(biflow.BiFlow, "to", to)
    monkeypatch.setattr(biflow.BiFlow, "sample", spy)
    monkeypatch.setattr("biflow.ops._checks.local_device", torch.device)
    out = tmp_path / "s.npz"
    assert cli.main(["sample", f"{runs}/inverse", "--device", "meta", "--out", str(out)]) == 0
    assert moved[-2:] == [(torch.device("meta"),)] * 2  # the model, then the labels


def test_sampled_npz_is_data(runs, tmp_path):
    out = tmp_path / "s.npz"
    assert cli.main(["sample", f"{runs}/flow", "--n", "40", "--out", str(out)]) == 0
    data = biflow.data.load(biflow.data.DataConfig(source=str(out)))
    assert (data.num_classes, data.img_size, data.channels) == (10, 8, 1)


def test_samples_are_drawn_in_batches_and_bad_ones_are_counted(runs, tmp_path, monkeypatch, capsys):
    def draw(name, *options):
        out = tmp_path / f"{name}.npz"
        assert cli.main(["sample", f"{runs}/flow", "--n", "10", *options, "--out", str(out)]) == 0
        return np.load(out)

    whole, sizes, original = draw("whole"), [], biflow.TarFlow.sample
    assert capsys.readouterr().err == ""

    def spy(self, n, *arguments, **options):
        images = original(self, n, *arguments, **options)
        if not sizes:
            images[1:3, 0, 0, 0] = torch.tensor([torch.nan, torch.inf])
        sizes.append(n)
        return images

    monkeypatch.setattr(biflow.TarFlow, "sample", spy)
    parts = draw("parts", "--batch", "4")
    assert sizes == [4, 4, 2]
    assert parts["labels"].tolist() == whole["labels"].tolist()
    np.testing.assert_allclose(parts["images"][3:], whole["images"][3:], atol=1e-4)
    assert "2 of 10 images are not finite" in capsys.readouterr().err


def test_batches_of_any_size_have_the_same_noise(runs, tmp_path, capsys):
    """Where torch draws it alike; models of 25 numbers an image need a multiple of 16."""

    def draw(model, *options):
        out = tmp_path / "s.npz"
        assert cli.main(["sample", str(model), "--n", "40", *options, "--out", str(out)]) == 0
        return np.load(out)["images"]

    whole = draw(runs / "inverse")
    np.testing.assert_allclose(draw(runs / "inverse", "--batch", "7"), whole, atol=1e-4)
    odd = tmp_path / "odd.safetensors"
    config = dict(img_size=5, in_channels=1, patch_size=1, width=16, head_dim=8, num_blocks=2, layers_per_block=1)
    biflow.save(biflow.TarFlow(biflow.TarFlowConfig(**config)), odd)
    np.testing.assert_allclose(draw(odd, "--batch", "16"), draw(odd), atol=1e-4)
    np.testing.assert_array_equal(draw(odd, "--batch", "41"), draw(odd))
    assert cli.main(["sample", str(odd), "--n", "40", "--batch", "8", "--out", str(tmp_path / "s.npz")]) == 2
    assert "--batch: expected a multiple of 16, so that images of 25 numbers" in capsys.readouterr().err


def test_sample_png_is_a_grid(runs, tmp_path):
    from PIL import Image

    for name, options in {"all": [], "one": ["--class", "2"]}.items():
        out = tmp_path / f"{name}.png"
        assert cli.main(["sample", f"{runs}/inverse", "--n", "20", *options, "--out", str(out)]) == 0
        image = np.asarray(Image.open(out))
        assert min(image.shape[:2]) > 100
        assert image.std() > 1


def test_evaluate_flow_and_inverse(runs, tmp_path, capsys, monkeypatch):
    short = functools.partial(evaluate.EvaluationConfig, judge_steps=60)
    monkeypatch.setattr(evaluate, "EvaluationConfig", short)
    small = ["--samples", "40", "--guidance", "0", "--guidance", "1"]
    assert cli.main(["evaluate", f"{runs}/flow", *small]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact"]["round_trip_max_error"] < 1e-4
    assert report["data"]["classifier_held_out_accuracy"] > 0.9
    assert cli.main(["evaluate", f"{runs}/flow", *small, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    out = tmp_path / "report.json"
    line = ["evaluate", f"{runs}/inverse", "--flow", f"{runs}/flow", "--data", "digits", *small, "--out", str(out)]
    assert cli.main([*line, "--noise-draws", "2"]) == 0
    report = json.loads(out.read_text())
    assert report["exact"]["noise_draws"] == 2
    names = ("held_out_bits_per_dim_importance_weighted", "held_out_bits_per_dim")
    assert report["exact"][names[0]] < report["exact"][names[1]]
    assert [s["guidance"] for s in report["learned"]["samples"]] == [0.0, 1.0]
    assert report["learned"]["reconstruction_mse"] > 0


def test_held_out_images_are_those_of_the_run(runs, tmp_path, capsys):
    """An explicit --data that names the run's source must not bring another split: its images were trained on."""
    run = tmp_path / "run"
    shutil.copytree(runs / "flow", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"seed": 7, "val_fraction": 0.2}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    newest = max((run / "checkpoints").iterdir()) / "model.safetensors"
    for checkpoint in (run, newest):
        for source in (None, "digits"):
            assert data_config(source, str(checkpoint), 8) == biflow.data.DataConfig(seed=7, val_fraction=0.2)
    assert capsys.readouterr().err == ""
    assert data_config("other.npz", str(run), 8) == biflow.data.DataConfig(source="other.npz")
    assert "held out by the default split" in capsys.readouterr().err
    (tmp_path / "alone.safetensors").write_bytes(newest.read_bytes())
    assert data_config("digits", str(tmp_path / "alone.safetensors"), 8) == biflow.data.DataConfig()
    assert "held out by the default split" in capsys.readouterr().err


def test_info(runs, capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"biflow: {biflow.__version__}" in text
    assert f"cpu instruction set: {torch.ops.biflow.cpu_isa()}" in text
    assert cli.main(["info", f"{runs}/flow"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["kind"], found["config"]["width"]) == ("TarFlow", 16)
    assert found["parameters"] > 1000


def test_bench_prints_the_rows_of_a_checkout(monkeypatch, tmp_path, capsys):
    """bench runs benchmarks/bench_<op>.py of the checkout around the package, and says where there is none."""
    folder, project = tmp_path / "benchmarks", tmp_path / "pyproject.toml"
    folder.mkdir()
    shutil.copy(Path(__file__).parents[1] / "benchmarks" / "timing.py", folder)
    code = "def run(quick): return [{'case': 'S', 'us': 1.23456, 'shape': [2, 3], 'quick': quick}]"
    (folder / "bench_attention.py").write_text(code)
    monkeypatch.setattr(cli.tools, "__file__", str(tmp_path / "biflow" / "cli" / "tools.py"))
    path, out = list(sys.path), tmp_path / "rows.json"
    project.write_text('[project]\nname = "biflow"\n')
    assert cli.main(["bench", "--op", "attention", "--quick", "--json", str(out)]) == 0
    assert capsys.readouterr().out.split() == ["case", "us", "shape", "quick", "S", "1.235", "2x3", "True"]
    found = json.loads(out.read_text())
    assert (found["rows"][0]["us"], found["machine"]["torch"]) == (1.23456, torch.__version__)
    assert sys.path == path
    assert cli.main(["bench", "--op", "affine"]) == 2
    assert f"no {folder / 'bench_affine.py'}" in capsys.readouterr().err
    project.write_text('[project]\nname = "another"\n')
    assert cli.main(["bench", "--op", "attention"]) == 2
    assert "belongs to another project" in capsys.readouterr().err


BAD = {
    "no such command": ("fly", "No such command 'fly'"),
    "no such option": ("info --fast", "No such option: --fast"),
    "missing option": ("train digits_flow", "Missing option '--out'"),
    "wrong type": ("sample {runs}/flow --n many", "Invalid value for '--n'"),
    "no such preset": ("train digit_flow --out {new}", "a preset (digits_aligned_flow, digits_flow, digits_inverse"),
    "no such yaml": ("train none.yaml --out {new}", "none.yaml: no such file"),
    "broken yaml": ("train {tmp}/broken.yaml --out {new}", "broken.yaml: not valid YAML"),
    "deep yaml": ("train {tmp}/deep.yaml --out {new}", "deep.yaml: expected settings of fewer nested levels"),
    "yaml in itself": ("train {tmp}/self.yaml --out {new}", "expected settings that do not contain themselves"),
    "deep override": ("train digits_flow data.source=" + "[" * 2000 + " --out {new}", "fewer nested levels"),
    "no such device": ("train digits_flow run.device=cuda:99 --out {new}", "device: expected"),
    "yaml list": ("train {tmp}/list.yaml --out {new}", "expected a mapping of settings, got list"),
    "wrong stage": ("train digits_inverse --out {new}", "expected a configuration of stage 'flow', got 'inverse'"),
    "unknown field": ("train digits_flow model.widht=3 --out {new}", "unknown field 'widht'; expected one of"),
    "wrong value": ("train digits_flow optim.lr=fast --out {new}", "lr: expected float, got str 'fast'"),
    "impossible value": ("train digits_flow model.width=100 --out {new}", "a multiple of head_dim 64, got 100"),
    "not an override": ("train digits_flow width --out {new}", "expected key=value, got 'width'"),
    "data of another size": ("train digits_flow model.img_size=16 --out {new}", "expected img_size 8"),
    "no such data": ("train digits_flow data.source=none.npz --out {new}", "none.npz: no such file"),
    "folder in use": ("train digits_flow --out {runs}/flow", "the folder is not empty"),
    "other settings": ("train digits_flow --out {runs}/flow --resume", "the run to resume has model.width"),
    "no such checkpoint": ("sample none.safetensors", "none.safetensors: no such file"),
    "unfinished run": ("sample {tmp}", "expected a finished run with model.safetensors"),
    "foreign checkpoint": ("sample {tmp}/broken.yaml", "expected a complete safetensors file"),
    "inverse instead of flow": (
        "distill digits_inverse --flow {runs}/inverse --out {new}", "expected a TarFlow, got a BiFlow",
    ),
    "class out of range": ("sample {runs}/flow --class 10", "expected a class in [0, 10), all or none, got '10'"),
    "class not a number": ("sample {runs}/flow --class three", "expected a class in [0, 10), all or none, got 'three'"),
    "negative guidance": ("sample {runs}/flow --guidance=-1", "guidance: expected a finite number >= 0, got -1"),
    "guidance not trained": ("sample {runs}/inverse --guidance 9", "guidance: expected at most 2 (as trained), got 9"),
    "solver of an inverse": ("sample {runs}/inverse --solver jacobi", "--solver: expected with an exact flow"),
    "window of an inverse": ("sample {runs}/inverse --window 4", "--window: expected with an exact flow"),
    "tol of an inverse": ("sample {runs}/inverse --tol 1e-3", "--tol: expected with an exact flow"),
    "certificate of an inverse": ("sample {runs}/inverse --certify", "--certify: expected with an exact flow"),
    "anneal of an inverse": ("sample {runs}/inverse --no-anneal", "--no-anneal: expected with an exact flow"),
    "temperature without guidance": (
        "sample {runs}/flow --guidance 0 --attn-temp 2", "--attn-temp: expected with --guidance above 0, got 0",
    ),
    "guide of nothing": ("sample {runs}/flow --guide c", "guide: expected 'a', 'b' or 'ab', got 'c'"),
    "window of another solver": (
        "sample {runs}/flow --window 4", "window: expected None with solver='auto', which chooses the windows; got 4",
    ),
    "tol of nothing": ("sample {runs}/flow --tol 0", "tol: expected a finite number > 0, got 0"),
    "precision of an inverse": ("sample {runs}/inverse --precision fp16", "precision: expected one of fp32, bf16, got"),
    "no-denoise of an inverse": ("sample {runs}/inverse --no-denoise", "--no-denoise: expected with an exact flow"),
    "sample nowhere": ("sample {runs}/inverse --device cuda:99", "device: expected"),
    "sample on no device": ("sample {runs}/inverse --device abacus", "device: expected 'cpu'"),
    "evaluate nowhere": ("evaluate {runs}/flow --device cuda:99", "device: expected"),
    "evaluate on no device": ("evaluate {runs}/flow --device abacus", "device: expected 'cpu'"),
    "output of another kind": ("sample {runs}/flow --out s.gif", "expected a file ending in .png or .npz"),
    "output nowhere": ("sample {runs}/flow --out {new}/s.png", "--out: expected an existing folder"),
    "inverse alone": ("evaluate {runs}/inverse", "--flow: expected with a learned inverse"),
    "checkpoint without a run": ("evaluate {tmp}/alone.safetensors", "expected --data"),
    "no such op": ("bench --op fft", "attention, norm, gate, alignment, got 'fft'"),
    "demo in a used folder": ("demo --out {runs}/flow", "the folder is not empty"),
    "demo resumed elsewhere": ("demo --out {runs}/flow --resume", "expected the configuration of a demo"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_input_is_one_line_and_exit_code_2(line, message, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    (tmp_path / "self.yaml").write_text("stage: flow\nmodel: &a {inner: *a}\n")
    (tmp_path / "alone.safetensors").write_bytes((runs / "flow" / "model.safetensors").read_bytes())
    words = [w.format(runs=runs, tmp=tmp_path, new=tmp_path / "new") for w in line.split()]
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("biflow: error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_failures_and_interrupts_have_their_own_exit_codes(monkeypatch, capsys, tmp_path):
    def fail(error):
        def train(*arguments, **options):
            raise error

        monkeypatch.setattr("biflow.train.train_flow", train)
        return cli.main(["train", "digits_flow", "--out", str(tmp_path)]), capsys.readouterr().err

    code, err = fail(FloatingPointError("step 3: loss is nan"))
    assert (code, err) == (1, "biflow: error: FloatingPointError: step 3: loss is nan (--debug shows where)\n")
    code, err = fail(KeyboardInterrupt("stopped at step 3"))
    assert (code, err) == (130, "biflow: error: stopped at step 3\n")


def test_sigterm_says_that_a_checkpoint_was_written(tmp_path, monkeypatch, capsys):
    original = trainer.Trainer._train_step

    def step_with_signal(self):
        signal.raise_signal(signal.SIGTERM)
        original(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", step_with_signal)
    assert cli.main(["train", *TINY_FLOW, "--out", str(tmp_path / "run")]) == 143
    text = "biflow: stopped by a signal at step 1 of 4, after writing a checkpoint to resume from\n"
    assert capsys.readouterr().err == text


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["info", "none.safetensors", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("biflow: error: none.safetensors: no such file\n")


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "distill",
        "compare",
        "sample",
        "calibrate",
        "evaluate",
        "score",
        "info",
        "classify",
        "demo",
        "bench",
        "inpaint",
        "edit",
        "interpolate",
    ],
)
def test_help_has_examples(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert f"  biflow {command}" in capsys.readouterr().out.split("Examples:")[1]


def test_help_and_version_do_not_wait_for_torch():
    code = (
        "import sys; from biflow.cli import main; assert main(['--version']) == 0; assert main(['train', '-h']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"biflow {biflow.__version__}\n")


@pytest.mark.parametrize("name", presets.names())
def test_presets_are_valid(name):
    settings = presets.training(name)
    assert (settings.model.img_size // settings.model.patch_size) ** 2 == settings.model.tokens
