"""Builds the package's libraries in place with CMake alone, for the GPU that is there: half the time of all of them.

In a folder of its own, on all cores; fails unless they hold CUDA kernels. Other options: setup.py.
"""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import tomllib
import torch

from .tools import find

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu-check-cmake"


def architecture(nvcc: str) -> list[str]:
    """What tells CMake to compile for the GPU that is there alone; nothing where there is none, or nvcc is older."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise SystemExit(f"expected a GPU of compute capability 8.0 or newer, got {major}.{minor}")
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    if f"compute_{major}{minor}" not in known:
        return []  # it runs what the PTX of the default says
    return [f"-DBIFLOW_CUDA_ARCHITECTURES={major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"]


def main() -> None:
    cmake, ninja, nvcc = (find(name) for name in ("cmake", "ninja", "nvcc"))
    for name, path in (("cmake", cmake), ("ninja", ninja), ("nvcc", nvcc)):
        if path is None:
            raise SystemExit(f"expected {name} on the PATH, in $CUDA_HOME/bin or /usr/local/cuda/bin, found none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    configure = [
        cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DTORCH_INCLUDE={Path(torch.__file__).parent / 'include'}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DBIFLOW_VERSION={project['version']}",
        *architecture(nvcc),
    ]  # fmt: skip
    stamp, used = BUILD / "configured-with.txt", "\n".join([nvcc, *configure])
    if not stamp.exists() or stamp.read_text() != used:
        shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.check_call(configure, env={**os.environ, "CUDACXX": nvcc})
    stamp.write_text(used)
    subprocess.check_call([cmake, "--build", str(BUILD)])
    for built, name in (("libbiflow.so", "libbiflow.so"), ("_C.so", "_C" + sysconfig.get_config_var("EXT_SUFFIX"))):
        scratch = ROOT / "biflow" / (name + ".tmp")
        shutil.copy2(BUILD / built, scratch)
        os.replace(scratch, ROOT / "biflow" / name)  # a new inode: a process that has the old library mapped keeps it
    architectures = importlib.import_module("biflow._C").build_info()["cuda"]
    if not architectures:
        stamp.unlink()  # CMake remembers that it found no compiler that works
        raise SystemExit(f"expected CUDA kernels, CMake could not use {nvcc}")
    print("built for", *architectures)


if __name__ == "__main__":
    main()
