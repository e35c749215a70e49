"""Where kernel tests run: emulated kernels, in several orders of threads and with the race checker, and a GPU."""

import contextlib
import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

BUILD = Path(__file__).resolve().parents[2] / "build" / "emulator"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
COPIES = {"lazy": 0, "eager": 1, "random": 2}  # when cp.async lands: when waited for, at once, either

# An error that would crash the plain build is a message in the race build, so that comes first.
NAMES = ("race", "forward", "reverse", "random", "cuda")


@dataclass(frozen=True)
class Backend:
    """One place where the ops' CUDA kernels run."""

    name: str
    ops: object  # the namespace of torch.ops: backend.ops.affine_encode(...)
    device: str
    library: ctypes.CDLL | None = field(default=None, repr=False)

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def configure(self, order: str, *, seed: int = 1, copies: str = "lazy") -> None:
        """How the emulator runs the threads of the next launches, and when their asynchronous copies land."""
        self.library.emulator_configure(ORDERS[order], ctypes.c_uint64(seed), COPIES[copies])

    @contextlib.contextmanager
    def public(self):
        """Within, the functions of biflow.ops run on this backend."""
        with pytest.MonkeyPatch.context() as patch:
            if self.library is not None:
                patch.setattr(torch.ops, "biflow", self.ops)
            yield


_libraries: dict[str, ctypes.CDLL] = {}


def emulated(variant: str, name: str, build: Path = BUILD) -> Backend:
    """The emulator's "plain" or "race" build; skips the test where it is not built."""
    path = build / f"libbiflow_emulated_{variant}.so"
    if not path.exists():
        pytest.skip(f"no {path.name}: run `make emulator`")
    if variant not in _libraries:
        torch.ops.load_library(str(path))
        _libraries[variant] = ctypes.CDLL(str(path))
    return Backend(name, getattr(torch.ops, f"biflow_{variant}"), "cpu", _libraries[variant])


def get(name: str, build: Path = BUILD) -> Backend:
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return Backend(name, torch.ops.biflow, "cuda")
    backend = emulated("race" if name == "race" else "plain", name, build)
    if name == "race":
        backend.configure("forward", copies="lazy")
    else:
        backend.configure(name, copies={"forward": "lazy", "reverse": "eager", "random": "random"}[name])
    return backend
