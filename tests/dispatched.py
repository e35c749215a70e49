"""Which of biflow's torch ops are called."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Within, the names of biflow's ops that the dispatcher sees are kept in `names`."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: torch._ops.OpOverload, types, args=(), kwargs=None):
        space, name = op.name().split("::")
        self.names += [name] if space == "biflow" else []
        return op(*args, **(kwargs or {}))
