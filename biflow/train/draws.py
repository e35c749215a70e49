"""Random numbers of a batch that is split over processes and micro-batches; see docs/decisions/0023."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class BatchGenerator(torch.Generator):
    """A generator that every process has the same copy of, and which rows of the batch are computed here.

    part: (first row, rows of the whole batch); None: all rows.
    """

    part: tuple[int, int] | None = None


def draw_rows(
    function: Callable[..., Tensor], size: Sequence[int], generator: torch.Generator, *, dim: int = 0, **options
) -> Tensor:
    """function(size, generator=generator, **options), of torch.rand or torch.randn, with rows in dimension `dim`.

    With a `BatchGenerator` whose batch is split, what is drawn is that of the whole batch, and these rows of it are
    returned: a row has the same numbers however the batch is split, and the generator is the same afterwards.
    """
    part = getattr(generator, "part", None)
    if part is None:
        return function(size, generator=generator, **options)
    start, whole = part
    drawn = function([*size[:dim], whole, *size[dim + 1 :]], generator=generator, **options)
    return drawn.narrow(dim, start, size[dim])
