"""The fixture of the kernel tests."""

from pathlib import Path

import pytest

from .backends import BUILD, NAMES, get


def pytest_addoption(parser):
    parser.addoption("--emulator", type=Path, default=BUILD, help="folder of the emulated libraries")
    parser.addoption("--every-order", action="store_true", help="also what is left out on some backends for time")
    parser.addoption("--decodes", type=int, default=30, help="of test_decode_block_soak.py (default: %(default)s)")
    parser.addoption("--backends", default=",".join(NAMES), help="where the kernel tests run (default: %(default)s)")


def pytest_collection_modifyitems(config, items):
    left_out = set(NAMES) - set(config.getoption("--backends", ",".join(NAMES)).split(","))
    backend_of = {item: getattr(item, "callspec", None) and item.callspec.params.get("backend") for item in items}
    config.hook.pytest_deselected(items=[item for item in items if backend_of[item] in left_out])
    items[:] = [item for item in items if backend_of[item] not in left_out]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in NAMES])
def backend(request):
    """Runs the test on every backend: the emulator with the race checker and in several orders, and a GPU."""
    return get(request.param, request.config.getoption("--emulator", BUILD))


@pytest.fixture
def leave_out(request):
    """leave_out(why): skips what takes long, unless `--every-order` asks for it."""
    every = request.config.getoption("--every-order", False)
    return lambda why: None if every else pytest.skip(f"for time: {why}")
