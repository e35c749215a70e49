"""Arrays of other libraries in the place of tensors, through DLPack."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor


def takes_arrays(op: Callable) -> Callable:
    """Lets a public op take arrays of any library that speaks DLPack (CuPy, NumPy, ...) in the place of its tensors.

    Nothing is copied: the op works on the array's memory, on its device, and the results share theirs with the arrays
    that come back, of the same library. On a GPU the two libraries' current streams wait for each other, as the
    protocol has it. Inputs of several libraries, or of one and torch, do not mix.
    """

    @functools.wraps(op)
    def call(*args, **options):
        if torch.compiler.is_compiling() or (args and isinstance(args[0], Tensor)):  # every call in torch
            return op(*args, **options)
        libraries = {library(a) for given in (args, options.values()) for a in _flat(given)} - {None}
        if not libraries or torch in libraries:  # the op says what it expected
            return op(*args, **options)
        if len(libraries) > 1:
            names = ", ".join(sorted(module.__name__ for module in libraries))
            raise TypeError(f"{op.__name__}: expected arrays of one library, got {names}")
        source = libraries.pop()
        args = [_map(torch.from_dlpack, a) for a in args]
        result = op(*args, **{name: _map(torch.from_dlpack, a) for name, a in options.items()})
        return _map(source.from_dlpack, result)

    return call


def library(value: object) -> ModuleType | None:
    """The library of an array, torch for a tensor, None for what is neither."""
    if isinstance(value, Tensor):
        return torch
    if not hasattr(type(value), "__dlpack__"):
        return None
    module = importlib.import_module(type(value).__module__.split(".")[0])
    return module if hasattr(module, "from_dlpack") else None


def _flat(values):
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)


def _map(convert: Callable, value: object) -> object:
    if isinstance(value, tuple):
        return tuple(_map(convert, v) for v in value)
    return convert(value) if library(value) is not None else value
