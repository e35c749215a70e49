"""A tiny random AutoencoderKL, and folders of latents as `biflow latents encode` writes them, shared by tests."""

import json

import torch
from safetensors.torch import save_file

from biflow.data import latents

SIDE = 16  # of images; their latents have half of it


def write_autoencoder(folder, seed=0, **config):
    """2x smaller, 4 channels; random weights, as `save_pretrained` writes them."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "sample_size": SIDE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKL(**blocks, **shape, **{"shift_factor": 0.1, "scaling_factor": 0.5, **config})
    model.save_pretrained(folder)
    return str(folder)


def write_latents(folder, count, classes, side):
    """Random latents of `count` images in one shard, of the ground that the command makes them on."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(count, 2, 2, 4, side, side, generator=generator)
    moments[:, :, 1] = 0.1 * moments[:, :, 1].abs()
    tensors = {"moments": moments.half(), "labels": torch.arange(count) % classes}
    save_file(tensors, folder / "train-00000.safetensors", metadata={latents.ENTRY: json.dumps({"names": []})})
    unit = {"shift": [0.0] * 4, "scale": [1.0] * 4}
    shard = {"file": "train-00000.safetensors", "split": "train", "images": count, "sha256": "0"}
    index = {
        "format": latents.FORMAT,
        "img_size": 8 * side,
        "autoencoder": {},
        "shape": [4, side, side],
        "mirrored": True,
        "dtype": "fp16",
        "class_names": [str(k) for k in range(classes)],
        "normalization": {"scaling": unit, "channels": unit},
        "shards": [shard],
    }
    latents.write_index(folder, index)
    return folder
