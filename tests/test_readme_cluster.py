"""The README's way from an ImageNet folder and eight GPUs to a score, each command on a tiny stand-in, on two CPUs."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tiny_inception
import tiny_latents
from test_readme import ROOT, SMALL, blocks

from biflow import cli

VAE, REFERENCE = "stabilityai/sd-vae-ft-ema", "VIRTUAL_imagenet256_labeled.npz"
# the stand-in: 22 images of 16x16 in two classes, two of them corrupt, an autoencoder that makes them 4x8x8
STAND_IN = {
    "--nproc-per-node 8": "--nproc-per-node 2",
    "run.device=cuda": "run.device=cpu",
    "--device cuda": "--device cpu",
    "--workers 16": "--workers 1",
    "--img-size 256": "--img-size 16",
    "--count 50000": "--count 10",
    VAE: "vae",
}
SHAPE = ["model.img_size=8", "model.num_classes=2"]


def lines() -> list[str]:
    """The commands, without the installation."""
    (block,) = blocks("sh")
    return [line for line in block.splitlines() if not line.startswith("pip ")]


def test_the_section_goes_from_a_folder_to_a_score():
    words = [re.sub(r"^torchrun \S+ 8 -m ", "", line).split()[1] for line in lines()]
    assert words == ["data", "latents", "train", "distill", "sample", "score"]
    for old in STAND_IN:
        assert any(old in line for line in lines()), f"{old} is not in the README any more"


@pytest.mark.slow
def test_commands_run_on_a_stand_in(tmp_path, monkeypatch):
    tiny_latents.write_images(tmp_path / "imagenet" / "train")
    tiny_latents.write_autoencoder(tmp_path / "vae")
    *commands, score = lines()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for line in commands:
        for old, new in STAND_IN.items():
            line = line.replace(old, new)
        words = shlex.split(line)
        if words[0] == "torchrun":
            words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        else:
            words = [sys.executable, "-m", *words]
        if "train" in words or "distill" in words:
            words += [*SMALL, *SHAPE]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    found = np.load(tmp_path / "samples.npz")
    assert found["arr_0"].shape == (10, 16, 16, 3)
    assert json.loads((tmp_path / "latents" / "latents.json").read_text())["shape"] == [4, 8, 8]
    assert len((tmp_path / "corrupt.txt").read_text().splitlines()) == len(tiny_latents.CORRUPT)

    # the score in this process: without torchvision torch-fidelity needs help (tiny_inception)
    monkeypatch.chdir(tmp_path)
    np.savez(REFERENCE, arr_0=np.random.RandomState(0).randint(0, 256, (12, 16, 16, 3), np.uint8))
    tiny_inception.write_inception(tmp_path / "inception.pth")
    words = shlex.split(score.replace("--device cuda", "--device cpu"))
    words = words[words.index("biflow") + 1 :]
    assert cli.main([*words, "--inception", "inception.pth", "--quiet"]) == 0
    report = json.loads((tmp_path / "score.json").read_text())
    assert report["samples"]["images"] == 10
    assert report["fid"] > 0
