"""Fixtures that several test files use."""

import pytest
import torch


@pytest.fixture(params=("portable", "avx2", "avx512"))
def isa(request):
    """Runs the test on every instruction set of this machine."""
    try:
        torch.ops.biflow.force_cpu_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    torch.ops.biflow.force_cpu_isa("best")
