"""biflow inpaint, edit and interpolate."""

import re

import numpy as np
import pytest
import tiny
import tiny_training
import torch

import biflow
from biflow import cli, editing, evaluate, train


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """flow, inverse (8x8, two classes) and images.npz, which neither was trained on, in a folder."""
    folder = tmp_path_factory.mktemp("editing")
    tiny_training.write_images(folder / "images.npz")
    rng = np.random.RandomState(1)
    shape, labels = (40, 8, 8), np.arange(40) % 2
    x = {name: rng.randint(0, 256, shape).astype(np.uint8) for name in ("x_train", "x_test")}
    for name in x:
        x[name][labels == 0, :, 4:] = 255
    np.savez(folder / "split.npz", **x, y_train=labels, y_test=labels)
    torch.manual_seed(0)
    biflow.save(tiny_training.random_flow(tiny_training.flow_config("none").model), folder / "flow.safetensors")
    inverse = biflow.BiFlow(tiny_training.inverse_config("none").model)
    biflow.save(tiny.randomize(inverse, 0.1), folder / "inverse.safetensors")
    return folder


def run(files, line, out=None, source="images.npz"):
    words = [word.format(files=files) for word in line.split()]
    words[1:1] = [f"{files}/flow.safetensors", "--images", f"{files}/{source}"]
    return cli.main(words + (["--out", str(out)] if out else []))


@pytest.mark.parametrize("inverse", ["", " --inverse {files}/inverse.safetensors"], ids=["exact", "learned"])
def test_inpaint_writes_what_the_function_returns(files, tmp_path, capsys, monkeypatch, inverse):
    monkeypatch.setattr(cli.editing, "BATCH", 3)
    out = tmp_path / "i.npz"
    assert run(files, f"inpaint --half right --n 7 --seed 4{inverse}", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"known pixels as decoded: root mean square error( [\d.e-]+)+", lines[0])
    assert re.fullmatch(r"known pixels of the clean result: [\d.e-]+, largest [\d.e-]+", lines[1])
    assert lines[2:] == [f"{out}: 7 images"]
    got = np.load(out)
    data = biflow.data.load(biflow.data.DataConfig(source=f"{files}/images.npz", val_fraction=0.0))
    rows = torch.arange(7) * 60 // 7
    mask = torch.arange(8).expand(8, 8) < 4
    model = biflow.load(files / "inverse.safetensors") if inverse else None
    x, y = data.train_x.batch(rows), data.train_y[rows]
    want = editing.inpaint(biflow.load(files / "flow.safetensors"), x, mask, y, inverse=model, generator=seeded(4))
    np.testing.assert_allclose(got["images"][..., 0], want.images[:, 0].clamp(-1, 1), atol=1e-5)
    assert got["labels"].tolist() == y.tolist()
    assert len(lines[0].split("error ")[1].split()) == (1 if inverse else 4)


def test_masks_of_the_command_line(files, tmp_path):
    from PIL import Image

    pixels = np.full((8, 8), 255, np.uint8)
    pixels[1:4, 2:7] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    drawn = cli.editing._mask(8, str(tmp_path / "mask.png"), None, None)
    assert torch.equal(drawn, torch.from_numpy(pixels == 255))
    assert torch.equal(cli.editing._mask(8, None, None, "1,2,3,5"), drawn)
    shown = {half: cli.editing._mask(5, None, half, None) for half in ("left", "right", "top", "bottom")}
    assert shown["left"].tolist() == [[False] * 2 + [True] * 3] * 5
    assert torch.equal(shown["right"], ~shown["left"])
    assert torch.equal(shown["top"], shown["left"].T)
    assert torch.equal(shown["bottom"], ~shown["top"])


def test_edit_and_interpolate_write_what_the_functions_return(files, tmp_path):
    flow = biflow.load(files / "flow.safetensors")
    data = biflow.data.load(biflow.data.DataConfig(source=f"{files}/images.npz", val_fraction=0.0))
    assert run(files, "edit --from 1 --to 0 --n 5 --no-denoise", tmp_path / "e.npz") == 0
    got = np.load(tmp_path / "e.npz")
    rows = (data.train_y == 1).nonzero()[:, 0][torch.arange(5) * 30 // 5]
    want = editing.edit_class(flow, data.train_x.batch(rows), 1, 0, denoise=False, generator=seeded())
    np.testing.assert_allclose(got["images"][..., 0], want[:, 0].clamp(-1, 1), atol=1e-5)
    assert got["labels"].tolist() == [0] * 5
    assert run(files, "interpolate --n 2 --steps 3 --linear --class 1", tmp_path / "w.npz") == 0
    got = np.load(tmp_path / "w.npz")
    rows = (data.train_y == 1).nonzero()[:, 0][torch.arange(4) * 30 // 4]
    x, y = data.train_x.batch(rows), torch.ones(2, dtype=torch.int64)
    want = editing.interpolate(flow, x[:2], x[2:], 3, y, spherical=False, generator=seeded())
    np.testing.assert_allclose(got["images"][..., 0], want.flatten(0, 1)[:, 0].clamp(-1, 1), atol=1e-5)
    assert got["labels"].tolist() == [1] * 6


@pytest.mark.parametrize("line", ["inpaint --half top", "edit --from 0 --to 1", "interpolate --n 2 --steps 4"])
def test_pictures(files, tmp_path, line):
    from PIL import Image

    out = tmp_path / "p.png"
    assert run(files, line, out) == 0
    image = np.asarray(Image.open(out))
    assert min(image.shape[:2]) > 100
    assert image.std() > 1


def test_inpaint_tells_the_class_agreement(files, tmp_path, capsys, monkeypatch):
    import functools

    monkeypatch.setattr(evaluate, "EvaluationConfig", functools.partial(evaluate.EvaluationConfig, judge_steps=30))
    line = "inpaint --half left --n 20 --agreement --inverse {files}/inverse.safetensors"
    assert run(files, line, tmp_path / "i.npz", "split.npz") == 0
    (found,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("class agreement")]
    shares = re.fullmatch(
        r"class agreement: ([\d.]+); the same images whole ([\d.]+), hidden part gray ([\d.]+)", found
    ).groups()
    assert float(shares[1]) > 0.9  # the classes differ on the right, which stays
    assert run(files, "inpaint --half left --agreement", tmp_path / "i.npz") == 2
    assert "--agreement: expected --images with a test split, or a flow in the folder" in capsys.readouterr().err


def test_class_agreement_of_foreign_images_by_the_runs_classifier(files, tmp_path, capsys, monkeypatch):
    import functools

    monkeypatch.setattr(evaluate, "EvaluationConfig", functools.partial(evaluate.EvaluationConfig, judge_steps=30))
    config = tiny_training.flow_config(files / "split.npz", 1, 1)
    folder = tmp_path / "run"
    train.train_flow(config, folder, progress=False)
    line = ["inpaint", str(folder), "--half", "left", "--n", "4", "--agreement", "--out", str(tmp_path / "i.npz")]
    assert cli.main([*line, "--images", str(files / "images.npz")]) == 0
    assert "class agreement: " in capsys.readouterr().out


BAD_LINES = {
    "no mask": ("inpaint", "expected one of --mask, --half and --box, got none"),
    "two masks": ("inpaint --half left --box 0,0,1,1", "one of --mask, --half and --box, got --half and --box"),
    "half of what": ("inpaint --half middle", "--half: expected one of left, right, top, bottom, got 'middle'"),
    "box of three": ("inpaint --box 1,2,3", "--box: expected four integers TOP,LEFT,HEIGHT,WIDTH, got '1,2,3'"),
    "box outside": ("inpaint --box 4,4,5,1", "--box: expected a rectangle inside images of 8x8 pixels"),
    "no mask file": ("inpaint --mask {files}/none.png", "none.png: no such file"),
    "mask not an image": ("inpaint --mask {files}/images.npz", "images.npz: expected an image that Pillow can decode"),
    "class": ("inpaint --half left --class 2", "--class: expected a class in [0, 2), own or none, got '2'"),
    "solver": (
        "inpaint --half left --solver jacobi --inverse {files}/inverse.safetensors", "--solver: expected without --inv",
    ),
    "no-denoise": (
        "edit --from 0 --to 1 --no-denoise --inverse {files}/inverse.safetensors", "--no-denoise: expected with",
    ),
    "flow as inverse": ("inpaint --half left --inverse {files}/flow.safetensors", "expected a BiFlow, got a TarFlow"),
    "guidance": (
        "inpaint --half left --guidance 9 --inverse {files}/inverse.safetensors", "guidance: expected at most 2",
    ),
    "from": ("edit --from 2 --to 1", "--from: expected a class in [0, 2), got 2"),
    "to": ("edit --from 0 --to 5", "--to: expected a class in [0, 2), got 5"),
    "own": ("interpolate --class own", "--class: expected a class or none, got 'own'"),
    "pairs": ("interpolate --n 40", "--n: expected at most 30 pairs of the 60 images, got 40"),
    "data of another size": ("inpaint --half left --images digits.npz", "digits.npz: no such file"),
    "output": ("inpaint --half left --out x.gif", "expected a file ending in .png or .npz"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines(files, line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(files, line) == 2
    err = capsys.readouterr().err
    assert err.startswith("biflow: error: ")
    assert err.count("\n") == 1
    assert message in err
