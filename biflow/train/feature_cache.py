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
from biflow.files import replacing


class FeatureCache:
    """Targets of training images as `encode` gives them, read from a memory-mapped .npy file that is written once.

    The file's name has a hash of `made_from` and of the images' digest, so that another encoder or other images have
    another file; a folder can be shared by runs. A file of the wrong size is written anew. It appears when it is
    complete.

    Args:
        folder: made if it is not there.
        images: the training images, N of them.
        made_from: what the features depend on beside the images: JSON values.
        flip: also keep those of mirrored images.
        encode: images (n,C,S,S) -> (n,T,F) fp16, on any device.
        batch: images that `encode` is given at once, always as many, as a training step has.
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
        progress: bool,
    ):
        with torch.no_grad():
            shape = tuple(encode(images.batch(torch.zeros(batch, dtype=torch.int64))).shape[1:])
        shape = (2 if flip else 1, len(images), *shape)
        made_from = {**made_from, "images": images.digest(), "shape": shape}
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"features-{key}.npy"
        found = _open(self.path, shape)
        if found is None:
            size = 2 * int(np.prod(shape)) / 1e9
            tqdm.write(f"biflow: {self.path}: writing the encoder's features of {len(images)} images, {size:.2g} GB")
            self._write(images, shape, encode, batch, progress)
            found = _open(self.path, shape)
        self.rows = found.reshape(-1, *shape[2:])

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (n,) int64, i of image i and N + i of it mirrored -> (n,T,F) fp16 on the CPU."""
        return torch.from_numpy(self.rows[rows.cpu().numpy()])

    def _write(
        self, images: Images | EncodedImages | Latents, shape: tuple, encode: Callable, batch: int, progress: bool
    ) -> None:
        parts = torch.arange(shape[1]).split(batch)

        def full(step: int) -> Tensor:  # the last one too: its size may change the last bits
            part = parts[step]
            return part[torch.arange(batch) % len(part)]

        bar = tqdm(total=shape[0] * len(parts), desc="features", unit="batch", disable=not progress)
        with replacing(self.path) as temporary, temporary.open("wb") as file, bar:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
            for turned in range(shape[0]):
                latents = isinstance(images, Latents)  # those of a mirrored image are not its latents, mirrored
                source = images.mirrored() if latents and turned else images
                with contextlib.closing(Stream(source, full, len(parts))) as stream:
                    for step, part in enumerate(parts):
                        x = images.quantisation.values(stream.read(step).pixels)
                        x = x.flip(-1) if turned and not latents else x
                        file.write(encode(x)[: len(part)].cpu().numpy().tobytes())
                        bar.update()


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
    return found
