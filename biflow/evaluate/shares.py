"""Rows that processes compute together: each its share, the main one gets all."""

from collections.abc import Callable

import torch
from torch import Tensor

from biflow.distributed import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


def own_rows(processes: Processes, n: int, size: int, call: Callable[[slice], Tensor]) -> Tensor:
    """call(rows) of this process's share of the rows 0 ... n - 1, n >= 1, at most `size` at once; all in one tensor."""
    share = processes.split(n)
    parts = [call(slice(start, min(start + size, share.stop))) for start in range(share.start, share.stop, size)]
    return like_others(processes, torch.cat(parts) if parts else None)


def like_others(processes: Processes, rows: Tensor | None) -> Tensor:
    """The rows, or in a process that has none (None) no rows of the others' shape and dtype, for `gather_rows`."""
    known = processes.gather([] if rows is None else [(rows.shape[1:], rows.dtype)])
    if rows is not None:
        return rows
    shape, dtype = known[0]
    return torch.empty(0, *shape, dtype=dtype)
