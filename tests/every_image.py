"""No image is lost: every loader gives every image once an epoch, tells of all corrupt ones, and resumes at any step.

    PYTHONPATH=tests python tests/every_image.py --images 100000 --workers 2

writes a data set of each kind with 0.1% corrupt images, 8x8 PNG, and prints a line of JSON a kind: counts, and images a
second of the first epoch in this process and by worker processes (decoding only, everything in the cache of the disk).
With --speed: images a second of other sizes and formats, nothing is checked.
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

import data_sets
import numpy as np
import torch
from PIL import Image

from biflow import data as datasets
from biflow.data import DataConfig, Stream
from biflow.data.check import check as check_data
from biflow.train.optim import DataOrder

BATCH = 128


def make(kind, folder, count):
    """Write the set; -> (its path, the numbers of corrupt images, all names)."""
    step = 1000 if count >= 10_000 else 50
    corrupt = set(range(step // 2, count, step))
    images = []
    for i in range(count):
        data = data_sets.numbered_png(i)
        images.append((i % data_sets.CLASSES, data_sets.spoiled(data, i // step) if i in corrupt else data))
    options = {"per_shard": 1000} if kind == "shards" else {}
    return data_sets.WRITERS[kind](folder, images, **options), corrupt, data_sets.names(kind, images, **options)


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
    return hashlib.sha256(batch.pixels.numpy().tobytes() + batch.indices.numpy().tobytes()).hexdigest()


def check(kind, folder, count, workers):
    """AssertionError if anything is lost; -> what was counted and measured."""
    path, corrupt, names = make(kind, folder / kind, count)
    names_of_corrupt = {names[i] for i in corrupt}
    config = DataConfig(source=str(path), img_size=8, val_fraction=0.0, workers=workers)

    started = time.perf_counter()
    report, lines = check_data(config, progress=False)
    check_seconds = time.perf_counter() - started
    assert (report["images"], report["corrupt"]) == (count - len(corrupt), len(corrupt))
    assert {line.split("\t")[0] for line in lines} == names_of_corrupt

    data, batches, seconds = epoch(DataConfig(source=str(path), img_size=8, val_fraction=0.0))
    name = data.train_x.decoder.name
    seen = torch.zeros(count, dtype=torch.int64)
    replaced = drawn = 0
    for batch in batches:
        left = min(count - drawn, len(batch.indices))  # the last batch runs into the next epoch
        drawn += left
        for index, number in zip(
            batch.indices[:left].tolist(), data_sets.numbers(batch.pixels)[:left].tolist(), strict=True
        ):
            own = _number(name(index))
            if own in corrupt:
                replaced += 1
                assert number not in corrupt, "a corrupt image stands in for another"
                assert number % data_sets.CLASSES == own % data_sets.CLASSES, "another class stands in"
            else:
                assert number == own, "an image in the place of another"
                seen[own] += 1
    assert seen.sum() == count - len(corrupt), "images are lost"
    assert seen.max() == 1, "images are seen twice"
    assert replaced == len(corrupt)
    assert data.corrupt.reasons.keys() == names_of_corrupt
    again = sum(batch.replaced for batch in batches) - replaced
    assert again == sum(_number(name(i)) in corrupt for i in batches[-1].indices.tolist()[count % BATCH or BATCH :])

    wanted = [digest(batch) for batch in batches]
    _, by_workers, worker_seconds = epoch(config)
    assert [digest(batch) for batch in by_workers] == wanted
    for start in (1, len(wanted) // 3, len(wanted) - 2):  # killed there, resumed with and without workers
        for other in (0, workers):
            resumed = epoch(DataConfig(**{**vars(config), "workers": other}), start, steps=20)[1]
            assert [digest(batch) for batch in resumed] == wanted[start : start + 20]
    return {
        "kind": kind,
        "images": count,
        "corrupt": len(corrupt),
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
    parser.add_argument("--kinds", default=",".join(data_sets.KINDS))
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds.split(","):
            if options.speed:
                rows = speed(kind, Path(folder), options.workers)
            else:
                rows = [check(kind, Path(folder), options.images, options.workers)]
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
