"""Training runs of a second or two, shared by the tests of training and resuming."""

import dataclasses
import shutil

import numpy as np
import torch

import biflow
from biflow.data import DataConfig
from biflow.train import FlowTraining, InverseTraining, OptimConfig, RunConfig, runs


def write_images(path, count=60):
    """A .npz of 8x8 gray images of two classes (bright left, bright top) with pixel noise."""
    rng = np.random.RandomState(0)
    labels = np.arange(count) % 2
    images = rng.randint(0, 60, (count, 8, 8))
    images[labels == 0, :, :4] += 180
    images[labels == 1, :4, :] += 180
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return path


def settings(data, steps, every, **run):
    """What both stages share; `every` steps there is a log line, a validation and a checkpoint."""
    times = {"log_every": every, "validate_every": every, "checkpoint_every": every}
    return {
        "data": DataConfig(source=str(data), flip=True),
        "optim": OptimConfig(steps=steps, batch_size=16, lr=3e-3, warmup_steps=5, ema=0.9),
        "run": RunConfig(**{**times, "threads": 1, "tensorboard": False, **run}),
    }


def flow_config(data, steps=40, every=10, **run):
    model = biflow.TarFlowConfig(
        img_size=8, in_channels=1, patch_size=4, width=16, head_dim=8, num_blocks=2, layers_per_block=1,
        num_classes=2, noise_std=0.1,
    )  # fmt: skip
    return FlowTraining(model=model, **settings(data, steps, every, **run))


def inverse_config(data, steps=40, every=10, **run):
    model = biflow.BiFlowConfig(
        img_size=8, in_channels=1, patch_size=4, width=16, head_dim=8, num_blocks=2, layers_per_group=1,
        num_classes=2, class_tokens=1, max_guidance=2.0, guidance_tokens=1,
    )  # fmt: skip
    return InverseTraining(model=model, **settings(data, steps, every, **run))


def random_flow(config):
    """A flow whose blocks do something: the zero-initialised output layers are replaced."""
    torch.manual_seed(1)
    flow = biflow.TarFlow(config)
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    return flow


def changed(config, group, **fields):
    """`config` with some fields of one group replaced."""
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **fields)})


def interrupted(out, tmp_path, step):
    """A copy of a finished run as a kill after `step`'s checkpoint leaves it: later lines, no later checkpoint."""
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "model.safetensors").unlink()
    for folder in runs.checkpoints(copy):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return copy


def same_weights(a, b):
    """Whether two models have the same bits."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
