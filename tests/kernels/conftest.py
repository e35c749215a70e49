"""The fixture of the kernel tests."""

from pathlib import Path

import pytest

from .backends import BUILD, NAMES, get


def pytest_addoption(parser):
    parser.addoption("--emulator", type=Path, default=BUILD, help="folder of the emulated libraries")
    parser.addoption("--backends", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("--backends", ",".join(NAMES)).split(",")
        gpu = pytest.mark.gpu
        metafunc.parametrize(
            "backend", [pytest.param(n, marks=gpu if n == "cuda" else ()) for n in names], indirect=True
        )


@pytest.fixture
def backend(request):
    """Runs the test on every backend: the emulator with the race checker and in several orders, and a GPU."""
    return get(request.param, request.config.getoption("--emulator", BUILD))
