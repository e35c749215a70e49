"""A tiny random AutoencoderKL, and folders of latents as `biflow latents encode` writes them, shared by tests."""

import json

import data_sets
import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from tiny_training import changed, flow_config

from biflow import latents
from biflow.data import DataConfig
from biflow.data.latents import ENTRY, FORMAT, write_index

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
    save_file(tensors, folder / "train-00000.safetensors", metadata={ENTRY: json.dumps({"names": []})})
    unit = {"shift": [0.0] * 4, "scale": [1.0] * 4}
    shard = {"file": "train-00000.safetensors", "split": "train", "images": count, "sha256": "0"}
    index = {
        "format": FORMAT,
        "img_size": 8 * side,
        "autoencoder": {},
        "shape": [4, side, side],
        "mirrored": True,
        "dtype": "fp16",
        "class_names": [str(k) for k in range(classes)],
        "normalization": {"scaling": unit, "channels": unit},
        "shards": [shard],
    }
    write_index(folder, index)
    return folder


COUNT, CORRUPT = 22, (3, 12)


def write_images(folder):
    """COUNT images of two classes, two of them corrupt."""
    rng = np.random.RandomState(0)
    files = [data_sets.encode(rng.randint(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(COUNT)]
    images = [(i % 2, data_sets.spoiled(file, 0) if i in CORRUPT else file) for i, file in enumerate(files)]
    return data_sets.write_folder(folder, images)


def encode(place, out, **config):
    """place/images by place/vae into `out`, in fp32, shards of 8 images."""
    config = latents.EncodingConfig(**{"batch_size": 3, "shard_images": 8, "dtype": "fp32", **config})
    data = DataConfig(source=str(place / "images"), img_size=SIDE)
    return latents.encode_images(data, str(place / "vae"), out, config, progress=False)


def make_place(place):
    """vae, images and latents in a folder."""
    write_autoencoder(place / "vae")
    write_images(place / "images")
    encode(place, place / "latents")
    return place


def read_moments(folder):
    """(N,2,2,4,8,8), read with safetensors and json alone, as docs/latents.md has it."""
    index = json.loads((folder / "latents.json").read_text())
    return np.concatenate([load_file(folder / shard["file"])["moments"] for shard in index["shards"]])


def source(place, name="latents", **fields):
    return DataConfig(source=str(place / name), val_fraction=0.0, **fields)


def configured(place, steps=12, make=flow_config, **fields):
    """A tiny run on the latents."""
    config = changed(make(place / "latents", steps=steps, every=4, keep=10), "model", in_channels=4)
    return changed(config, "data", **{"flip": True, "val_fraction": 0.2, **fields})
