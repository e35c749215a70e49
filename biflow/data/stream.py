"""Batches in the order of the steps, decoded ahead of time by worker processes."""

import atexit
import collections
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from biflow.data.encoded import Decoder, EncodedImages
from biflow.data.images import Images
from biflow.data.latents import Latents

AHEAD = 2  # batches that a worker may be ahead
STOPPING = (signal.SIGINT, signal.SIGTERM)
_started: weakref.WeakSet = weakref.WeakSet()  # streams that have had workers


class Batch(NamedTuple):
    """indices: (n,) int64, which images. pixels: (n,C,H,W) as stored; replaced: how many of them are corrupt.

    turned: (n,) bool, which of them come mirrored; None: none, it is left to whoever trains on them.
    """

    indices: Tensor
    pixels: Tensor
    replaced: int
    turned: Tensor | None = None

    def part(self, rows: slice) -> "Batch":
        """Those rows; replaced is not known of them, and 0."""
        return Batch(self.indices[rows], self.pixels[rows], 0, None if self.turned is None else self.turned[rows])


class Stream:
    """Batches by step. The same bits whatever the number of workers and wherever it starts."""

    def __init__(
        self,
        images: Images | EncodedImages | Latents,
        indices: Callable[[int], Tensor],
        steps: int,
        *,
        seed: int | None = None,
    ):
        """indices: step -> (n,) int64, for 0 ... steps - 1.

        seed: of random crops, where `images` has them; None: the centres of the images. Of latents: of draws of the
            posterior and of mirrored ones; None: the same draw every time, none mirrored.
        """
        self.images, self.indices, self.steps = images, indices, steps
        by_number = not isinstance(images, Images)
        self.seed = seed if by_number and images.varies else None
        self.workers = images.workers if by_number else 0
        self._ready: Iterator | None = None
        self._next = -1

    def read(self, step: int) -> Batch:
        """The batch of a step; steps that follow each other are decoded ahead. Errors as `Decoder.decode`."""
        images = self.images
        if isinstance(images, Images):
            indices = self.indices(step)
            return Batch(indices, images.pixels[indices], 0)
        if not self.workers or (self._ready is None and images.held):
            indices = self.indices(step)
            missing = images.missing(indices)
            found = images.decoder.decode(*self._task(step, missing))
        else:
            if self._ready is None or step != self._next:
                self._start(step)
            found = next(self._ready)
            if isinstance(found, Exception):
                self.close()
                raise found
            indices, missing = self._planned.popleft()
            self._next = step + 1
        turned = images.turned(indices.tolist(), self.seed, step) if isinstance(images, Latents) else None
        return Batch(indices, images.complete(indices, missing, *found), images.replaced(indices), turned)

    def close(self) -> None:
        """End the workers."""
        self._ready = None

    def _task(self, step: int, missing: Tensor) -> tuple[list[int], int, int | None]:
        return missing.tolist(), self.seed or 0, None if self.seed is None else step

    def _plan(self, start: int) -> Iterator[tuple[list[int], int, int | None]]:
        for step in range(start, self.steps):
            indices = self.indices(step)
            missing = self.images.missing(indices)  # what is held in memory now still is when the others come
            self._planned.append((indices, missing))
            yield self._task(step, missing)

    def _start(self, step: int) -> None:
        self._ready = None
        self._planned: collections.deque[tuple[Tensor, Tensor]] = collections.deque()
        loader = DataLoader(
            _Tasks(self.images.decoder),
            batch_size=None,
            sampler=_Sampler(self._plan(step)),
            num_workers=self.workers,
            prefetch_factor=AHEAD,
            collate_fn=_same,
            worker_init_fn=_ignore_what_stops_a_run,
            generator=torch.Generator(),  # or else it draws from torch's global one
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # the workers inherit it
        try:
            self._ready = iter(loader)
            _started.add(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Tasks(Dataset):
    """A dataset whose items are what `Decoder.decode` makes of the arguments that stand in the place of an index."""

    def __init__(self, decoder: Decoder | Latents):
        self.decoder = decoder

    def __getitem__(self, task: tuple[list[int], int, int | None]) -> tuple[Tensor, list[tuple[int, str]]] | Exception:
        try:
            return self.decoder.decode(*task)
        except (ValueError, OSError) as error:
            return error  # raised where the batch is used, as without workers


class _Sampler:
    def __init__(self, tasks: Iterator):
        self.tasks = tasks

    def __iter__(self) -> Iterator:
        return self.tasks


def _same(item: object) -> object:
    return item


def _ignore_what_stops_a_run(worker: int) -> None:
    """SIGINT and SIGTERM are sent to all processes of a run; the step in progress still needs its images.

    Ignored, not blocked: a thread that a library started before would take what others block.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@atexit.register
def _close_all() -> None:
    """Whatever still refers to a stream: else Python would end its workers by SIGTERM, and wait."""
    for stream in list(_started):
        stream.close()
