"""The fixture of the kernel tests."""

import pytest

from .backends import NAMES, get


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in NAMES])
def backend(request):
    """Runs the test on every backend: the emulator in several orders and with the race checker, and a GPU."""
    return get(request.param)
