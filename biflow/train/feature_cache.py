"""An encoder's features of all training images on disk, so that no step has to compute them."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from biflow.data import EncodedImages, Images, Latents, Stream
from biflow.distributed import Processes
from biflow.files import replacing

PART = 2048  # images whose features are a file: what a killed write loses at most


class FeatureCache:
    """Targets of training images as `encode` gives them, read from memory-mapped .npy files that are written once.

    A file holds those of PART images, as they are or mirrored; processes share the files that are missing. They appear
    when they are complete, so that one that was killed goes on with the next. Their name has a hash of `made_from` and
    of the images' digest, so that another encoder or other images have other files; a folder can be shared by runs. A
    file of the wrong size is written anew.

    Args:
        folder: made if it is not there.
        images: the training images, N of them.
        made_from: what the features depend on beside the images: JSON values.
        flip: also keep those of mirrored images.
        encode: images (n,C,S,S) -> (n,T,F) fp16, on any device.
        batch: images that `encode` is given at once, always as many, as a process has in a training step.
        processes: that make the cache together.
    """

    def __init__(
        self,
        folder: Path,
        images: Images | EncodedImages | Latents,
        made_from: dict,
        *,
        flip: bool,
        encode: Callable[[Tensor], Tensor],
        batch: int,
        processes: Processes,
        progress: bool,
    ):
        with torch.no_grad():
            row = tuple(encode(images.batch(torch.zeros(batch, dtype=torch.int64))).shape[1:])
        self.count, self.size, sides = len(images), PART, 2 if flip else 1
        made_from = {**made_from, "images": images.digest(), "shape": (sides, self.count, *row)}
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        parts = [(side, rows) for side in range(sides) for rows in torch.arange(self.count).split(self.size)]
        self.paths = [folder / f"features-{key}-{number:04d}.npy" for number in range(len(parts))]
        shapes = [(len(rows), *row) for _, rows in parts]
        missing = [k for k, path in enumerate(self.paths) if processes.main and _open(path, shapes[k]) is None]
        missing = processes.same(missing)
        if missing and processes.main:
            size = 2 * sum(int(np.prod(shapes[k])) for k in missing) / 1e9
            what = f"writing the encoder's features of {self.count} images, {size:.2g} GB"
            files = f"{len(missing)} of {len(self.paths)} files"
            tqdm.write(f"biflow: {folder / 'features'}-{key}-*.npy: {what} in {files}")
        own = missing[processes.rank :: processes.count]
        with tqdm(total=sum(shapes[k][0] for k in own), desc="features", unit="image", disable=not progress) as bar:
            for side in range(sides):
                mine = [(self.paths[k], shapes[k], parts[k][1]) for k in own if parts[k][0] == side]
                latents = isinstance(images, Latents)  # those of a mirrored image are not its latents, mirrored
                source = images.mirrored() if latents and side else images
                mirror = side == 1 and not latents
                _write(mine, source, lambda x, mirror=mirror: encode(x.flip(-1) if mirror else x), batch, bar)
        processes.wait()
        self.parts = [_open(path, shape) for path, shape in zip(self.paths, shapes, strict=True)]

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (n,) int64, i of image i and N + i of it mirrored -> (n,T,F) fp16 on the CPU."""
        side, image = np.divmod(rows.cpu().numpy(), self.count)
        part, row = np.divmod(image, self.size)
        part += side * (len(self.parts) // 2)
        return torch.from_numpy(np.stack([self.parts[k][i] for k, i in zip(part.tolist(), row.tolist(), strict=True)]))


def _write(
    files: list[tuple[Path, tuple, Tensor]],
    images: Images | EncodedImages | Latents,
    encode: Callable[[Tensor], Tensor],
    batch: int,
    bar: tqdm,
) -> None:
    """Write files, given as (path, shape, which images), in batches that run across their ends."""
    batches = torch.cat([rows for _, _, rows in files]).split(batch) if files else ()

    def full(step: int) -> Tensor:  # the last one too: its size may change the last bits
        return batches[step][torch.arange(batch) % len(batches[step])]

    steps, found = iter(range(len(batches))), np.empty(0)
    with contextlib.closing(Stream(images, full, len(batches))) as stream:
        for path, shape, _ in files:
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
                missing = shape[0]
                while missing:
                    if not len(found):
                        step = next(steps)
                        x = images.quantisation.values(stream.read(step).pixels)
                        found = encode(x)[: len(batches[step])].cpu().numpy()
                    file.write(found[:missing].tobytes())
                    count = min(missing, len(found))
                    missing, found = missing - count, found[count:]
                    bar.update(count)


def _open(path: Path, shape: tuple) -> np.ndarray | None:
    """The file's array, memory-mapped; None if there is none of that shape in it."""
    if not path.exists():
        return None
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.shape != shape or found.dtype != np.float16:
            raise ValueError(f"expected fp16 {shape}, got {found.dtype} {found.shape}")
    except (EOFError, OSError, ValueError) as error:
        tqdm.write(f"biflow: {path}: damaged ({error})")
        return None
    return np.asarray(found)  # a plain view: a step reads row by row, which a memmap makes slow
