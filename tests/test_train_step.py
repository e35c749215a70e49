"""What a training step waits for, and what a run says of its device."""

import dataclasses

import pytest
import torch
from tiny_representation import aligned
from tiny_training import changed, flow_config, write_images

from biflow import train
from biflow.train import ParallelConfig, trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Without labels, whose range the model checks."""
    images = write_images(tmp_path_factory.mktemp("data") / "images.npz")
    return changed(flow_config(images, steps=3, every=1), "model", num_classes=0)


def test_the_host_reads_from_the_device_once_a_step(config, tmp_path, monkeypatch):
    """Loss, likelihood and alignment of two micro-batches, and the norm of the gradient."""
    read, step, steps = [], trainer.Trainer._train_step, []
    originals = {n: getattr(torch.Tensor, n) for n in ("__float__", "__bool__", "__int__", "item", "tolist", "cpu")}
    for name, original in originals.items():

        def noted(self, name=name, original=original):
            if self.is_floating_point():
                read.append((name, tuple(self.shape)))
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, noted)

    def watched(self):
        read.clear()
        step(self)
        steps.append(list(read))

    monkeypatch.setattr(trainer.Trainer, "_train_step", watched)
    config = dataclasses.replace(aligned(config), parallel=ParallelConfig(accumulate=2))
    train.train_flow(config, tmp_path / "run", progress=False)
    assert steps == [[("tolist", (4,))]] * 3


@pytest.mark.parametrize(("gpu", "device", "said"), [(True, "cpu", 1), (False, "cpu", 0)])
def test_a_run_on_the_cpu_beside_a_gpu_says_so(gpu, device, said, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    train.train_flow(changed(config, "run", device=device), tmp_path / "run", progress=False)
    line = "biflow: training on the CPU; run.device=cuda takes the GPU\n"
    assert capsys.readouterr().err.count(line) == said
