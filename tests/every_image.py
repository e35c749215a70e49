"""No image is lost: every loader gives every image once an epoch, tells of all corrupt ones, and resumes at any step.

    PYTHONPATH=tests python tests/every_image.py --images 100000 --workers 2

writes a data set of each kind with 0.1% corrupt images, 8x8 PNG, and prints a line of JSON a kind: counts, and images a
second of the first epoch in this process and by worker processes (decoding only, everything in the cache of the disk).
Latents are those of such files, corrupt ones and all, by a tiny random autoencoder. A .npz has one checksum for all of
its images: where any is damaged the file has to be refused. With --speed: images a second of other sizes and formats,
nothing is checked.
"""

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import data_sets
import numpy as np
import pytest
import tiny_latents
import torch
from PIL import Image

from biflow import data as datasets
from biflow import latents
from biflow.data import DataConfig, Stream
from biflow.data.check import check as check_data
from biflow.data.latents import read_index, read_shard
from biflow.train.optim import DataOrder

KINDS = (*data_sets.KINDS, "npz", "latents")
BATCH = 128


class Files:
    """Encoded images of one of data_sets.KINDS. The numbers in `corrupt` are those of the images that are spoiled."""

    varied = ()  # fields of DataConfig by which a step sees other values than the images' own

    def __init__(self, kind, folder, count, corrupt):
        self.corrupt = corrupt
        images = self._images(count)
        options = {"per_shard": 1000} if kind == "shards" else {}
        path = data_sets.WRITERS[kind](folder, images, **options)
        names = data_sets.names(kind, images, **options)
        self.names_of_corrupt = {names[i] for i in corrupt}
        self.config = DataConfig(source=str(path), img_size=8, val_fraction=0.0)

    def _images(self, count, noise=False):
        """[(class, file)]"""
        order = {number: k for k, number in enumerate(sorted(self.corrupt))}
        images = []
        for i in range(count):
            data = data_sets.numbered_png(i, rng=np.random.RandomState(i) if noise else None)
            images.append((i % data_sets.CLASSES, data_sets.spoiled(data, order[i]) if i in order else data))
        return images

    def reported(self, workers):
        """(images, names of corrupt ones) of the report that a user gets."""
        report, lines = check_data(replace(self.config, workers=workers), progress=False)
        assert report["corrupt"] == len(lines)
        return report["images"] + len(lines), {line.split("\t")[0] for line in lines}

    def met(self, data):
        """Names of the corrupt images that training has met."""
        return data.corrupt.reasons.keys()

    def written_as(self, data, positions):
        """Numbers by what the images are called."""
        return [_number(data.train_x.decoder.name(i)) for i in positions.tolist()]

    def seen_as(self, pixels):
        """Numbers by what the images look like."""
        return data_sets.numbers(pixels).tolist()


class Npz(Files):
    """Arrays, none of them corrupt; a copy of the file is, in one byte of each image that is corrupt elsewhere."""

    def __init__(self, kind, folder, count, corrupt):
        folder.mkdir()
        path, damaged = folder / "images.npz", folder / "damaged.npz"
        pixels = np.full((count, 8, 8, 3), 128, np.uint8)
        pixels[:, 0, 0] = np.arange(count)[:, None] >> np.array([16, 8, 0]) & 255
        np.savez(path, images=pixels, labels=np.arange(count) % data_sets.CLASSES)
        whole = bytearray(path.read_bytes())
        first = whole.index(pixels[:2].tobytes())
        for i in corrupt:
            whole[first + 192 * i] ^= 1
        damaged.write_bytes(whole)
        self.corrupt, self.names_of_corrupt = set(), set()
        self.config = DataConfig(source=str(path), val_fraction=0.0)

    def reported(self, workers):
        with pytest.raises(ValueError, match=r"damaged\.npz: expected a \.npz file of plain arrays"):
            datasets.load(replace(self.config, source=self.config.source.replace("images.npz", "damaged.npz")))
        return check_data(self.config, progress=False)[0]["images"], set()

    def met(self, data):
        return set()

    def written_as(self, data, positions):
        return positions.tolist()


class Latents(Files):
    """Latents of a folder of noise images, each near no other's: an image is the one whose own latent is nearest."""

    varied = (("posterior", "sample"), ("flip", True))

    def __init__(self, kind, folder, count, corrupt):
        self.corrupt = corrupt
        images = self._images(count, noise=True)
        vae = tiny_latents.write_autoencoder(folder / "vae")
        source = DataConfig(source=str(data_sets.write_folder(folder / "images", images)), img_size=8)
        encoding = latents.EncodingConfig(batch_size=256, dtype="fp32")
        self.report = latents.encode_images(source, vae, folder / "latents", encoding, progress=False)
        self.names_of_corrupt = {data_sets.names("folder", images)[i] for i in corrupt}
        self.config = DataConfig(source=str(folder / "latents"), val_fraction=0.0, posterior="mean")
        found = [read_shard(path)[0]["names"] for path in sorted((folder / "latents").glob("train-*"))]
        self.names = [name for names in found for name in names]
        self.own = self._encoded(latents.load(vae), count)

    def _encoded(self, vae, count):
        """(count, values): what the images' latents are."""
        pixels = torch.from_numpy(np.stack([data_sets.numbered(i, rng=np.random.RandomState(i)) for i in range(count)]))
        parts = (latents.encode(vae, part / 127.5 - 1)[:, 0] for part in pixels.permute(0, 3, 1, 2).split(256))
        return (torch.cat(list(parts)).flatten(1) - vae.config.shift_factor) * vae.config.scaling_factor

    def reported(self, workers):
        """Of `biflow latents encode`, and the images that `biflow data check` counts."""
        corrupt = read_index(Path(self.config.source))["corrupt"].keys()
        assert self.report["corrupt"] == len(corrupt)
        return check_data(replace(self.config, workers=workers), progress=False)[0]["images"], set(corrupt)

    def met(self, data):
        return self.names_of_corrupt  # training meets what stands in for them

    def written_as(self, data, positions):
        return [_number(self.names[i]) for i in positions.tolist()]

    def seen_as(self, pixels):
        rows = pixels.flatten(1)
        nearest = (self.own.square().sum(1) - 2 * rows @ self.own.T).argmin(1)
        assert (rows - self.own[nearest]).abs().max() < 1e-4, "the latent of no image"
        return nearest.tolist()


def make(kind, folder, count):
    """The set, written."""
    step = 1000 if count >= 10_000 else 50
    corrupt = set(range(step // 2, count, step))
    return {"npz": Npz, "latents": Latents}.get(kind, Files)(kind, folder, count, corrupt)


def epoch(config, start=0, steps=None):
    """-> (the data, batches, seconds from the first to the last)."""
    data = datasets.load(config)
    order = DataOrder(len(data.train_x), BATCH, seed=3)
    count = -(-len(data.train_x) // BATCH)
    stream = Stream(data.train_x, order.indices, count, seed=3)
    batches = []
    started = time.perf_counter()
    for step in range(start, count if steps is None else min(start + steps, count)):
        batches.append(stream.read(step))
    seconds = time.perf_counter() - started
    stream.close()
    return data, batches, seconds


def digest(batch):
    turned = b"" if batch.turned is None else batch.turned.numpy().tobytes()
    return hashlib.sha256(batch.pixels.numpy().tobytes() + batch.indices.numpy().tobytes() + turned).hexdigest()


def check(kind, folder, count, workers):
    """AssertionError if anything is lost; -> what was counted and measured."""
    began = time.perf_counter()
    own = make(kind, folder / kind, count)
    corrupt = own.corrupt

    started = time.perf_counter()
    assert own.reported(workers) == (count, own.names_of_corrupt)
    check_seconds = time.perf_counter() - started

    data, batches, seconds = epoch(own.config)
    seen = torch.zeros(count, dtype=torch.int64)
    replaced = drawn = 0
    for batch in batches:
        left = min(count - drawn, len(batch.indices))  # the last batch runs into the next epoch
        drawn += left
        for name, number in zip(
            own.written_as(data, batch.indices[:left]), own.seen_as(batch.pixels[:left]), strict=True
        ):
            if name in corrupt:
                replaced += 1
                assert number not in corrupt, "a corrupt image stands in for another"
                assert number % data_sets.CLASSES == name % data_sets.CLASSES, "another class stands in"
            else:
                assert number == name, "an image in the place of another"
                seen[name] += 1
    lost = count - len(corrupt) - int(seen.count_nonzero())
    assert lost == 0, "images are lost"
    assert seen.max() == 1, "images are seen twice"
    assert replaced == len(corrupt)
    assert own.met(data) == own.names_of_corrupt
    if kind in data_sets.KINDS:
        rest = own.written_as(data, batches[-1].indices[count % BATCH or BATCH :])
        assert sum(batch.replaced for batch in batches) - replaced == sum(name in corrupt for name in rest)

    config = replace(own.config, **dict(own.varied))
    wanted = [digest(batch) for batch in (epoch(config)[1] if own.varied else batches)]
    _, by_workers, worker_seconds = epoch(replace(config, workers=workers))
    assert [digest(batch) for batch in by_workers] == wanted
    resumed_at = (1, len(wanted) // 3, len(wanted) - 2)
    for start in resumed_at:  # killed there, resumed with and without workers
        for other in (0, workers):
            resumed = epoch(replace(config, workers=other), start, steps=20)[1]
            assert [digest(batch) for batch in resumed] == wanted[start : start + 20]
    return {
        "kind": kind,
        "images": count,
        "lost": lost,
        "corrupt": len(corrupt),
        "corrupt, reported": len(own.names_of_corrupt),
        "same bits when resumed at step": resumed_at,
        "of steps": len(wanted),
        "seconds": round(time.perf_counter() - began),
        "checked images/s": round(count / check_seconds),
        "images/s": round(count / seconds),
        f"images/s, {workers} workers": round(count / worker_seconds),
    }


def speed(kind, folder, workers):
    """Images a second: rows of PNG and JPEG files, each of noise that is blurred to about the bytes of a photograph."""
    rng = np.random.RandomState(0)
    for what, side, img_size, crop, count in (
        ("PNG 32x32 to 32", 32, 32, "center", 20_000),
        ("JPEG 64x64 to 64", 64, 64, "center", 10_000),
        ("JPEG 512x384 to 256", 384, 256, "center", 1000),
        ("JPEG 512x384 to 256, random crops", 384, 256, "random", 1000),
    ):
        some = []
        for _ in range(50):
            noise = Image.fromarray(rng.randint(0, 256, (side // 8, side // 6, 3), np.uint8))
            image = noise.resize((side if side < 100 else 512, side), Image.Resampling.BICUBIC)
            some.append(data_sets.encode(np.array(image), what.split()[0], **({} if side == 32 else {"quality": 90})))
        images = [(i % 3, some[i % len(some)]) for i in range(count)]
        path = data_sets.WRITERS[kind](folder / f"{kind} {what}", images)
        row = {"kind": kind, "files": what, "kB": round(sum(map(len, some)) / len(some) / 1000, 1)}
        for number in (0, workers):
            config = DataConfig(source=str(path), img_size=img_size, val_fraction=0.0, crop=crop, workers=number)
            busy = time.process_time()
            seconds = epoch(config)[2]
            if not number:  # what an idle core would do
                row["images per CPU second"] = round(count / (time.process_time() - busy))
            row[f"images/s, {number} workers"] = round(-(-count // BATCH) * BATCH / seconds)
        yield row


def _number(name):
    return int("".join(sign for sign in name.split("/")[-1] if sign.isdigit()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kinds", help="with commas between; all, with --speed those of files")
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds.split(",") if options.kinds else data_sets.KINDS if options.speed else KINDS:
            if options.speed:
                rows = speed(kind, Path(folder), options.workers)
            else:
                rows = [check(kind, Path(folder), options.images, options.workers)]
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
