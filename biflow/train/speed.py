"""How fast training steps are: time, waiting for data, images a second, MFU."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

# what a line of metrics.jsonl says that no two runs have alike
CLOCK = ("seconds", "step_seconds", "data_seconds", "data_share", "images_per_second", "mfu")


class Speed:
    """Time of the training steps since the last report; what happens between steps, validation say, is not in it.

    Args:
        images: of a step.
        flops: model FLOPs of a step (`flops.training`, times its images).
        peak: FLOP/s that the devices of the run reach at most, together; None: unknown, no MFU is reported.
        clock: seconds.
    """

    def __init__(self, images: int, flops: float, peak: float | None, clock: Callable[[], float] = time.perf_counter):
        self.images, self.flops, self.peak, self.clock = images, flops, peak, clock
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        start = self.clock()
        yield
        self._steps, self._seconds = self._steps + 1, self._seconds + self.clock() - start

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Around the place in a step where it may have to wait for its batch."""
        start = self.clock()
        yield
        self._waited += self.clock() - start

    def report(self) -> dict[str, float]:
        """Means over the steps since the last report, then from 0 again; {} without steps.

        step_seconds, and of these data_seconds; data_share = data_seconds / step_seconds; images_per_second; mfu =
        FLOPs a step / (step_seconds peak), the model FLOPs utilization of PaLM (arXiv 2204.02311, appendix B).
        """
        steps, seconds, waited = self._steps, self._seconds, self._waited
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        if not steps or seconds <= 0:
            return {}
        rates = {
            "step_seconds": seconds / steps,
            "data_seconds": waited / steps,
            "data_share": waited / seconds,
            "images_per_second": self.images * steps / seconds,
        }
        return rates if self.peak is None else {**rates, "mfu": self.flops * steps / (seconds * self.peak)}


def in_progress_bar(line: dict[str, Any]) -> dict[str, str | float]:
    """What a line of metrics.jsonl adds to the progress bar: loss by split, images/s, waiting for data, MFU."""
    shown = {line["split"]: line["loss"]}
    for name, text, form in (
        ("images_per_second", "images/s", "{:.4g}"),
        ("data_share", "wait", "{:.0%}"),
        ("mfu", "mfu", "{:.0%}"),
    ):
        if name in line:
            shown[text] = form.format(line[name])
    return shown
