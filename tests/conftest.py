"""What all tests share."""

import pytest
import torch

import biflow.ops  # noqa: F401  (the fixtures call its torch ops)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Times and last bits do not depend on the machine's cores; a test of threads sets its own number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """A test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets torch's number of threads; one again after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(params=("portable", "avx2", "avx512", "amx"))
def isa(request):
    """Runs the test on every instruction set of this machine."""
    try:
        torch.ops.biflow.force_cpu_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    torch.ops.biflow.force_cpu_isa("best")
