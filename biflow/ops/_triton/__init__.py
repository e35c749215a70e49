"""Triton kernels of the ops on CUDA tensors. Imported when the first such tensor comes: biflow needs no Triton."""

import functools
from importlib import import_module
from types import ModuleType


@functools.cache
def kernels(op: str) -> ModuleType:
    """The kernels of an op; RuntimeError without Triton: a slower way that is taken in silence helps nobody."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"biflow.ops.{op}: CUDA tensors need Triton, which torch's CUDA wheels for Linux bring; "
            f"expected it to be installed, got: {error}. Run: pip install triton"
        ) from error
    return import_module(f"biflow.ops._triton.{op}")
