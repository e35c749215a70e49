"""Builds libbiflow.so (the torch ops) and biflow._C (build information) with CMake; the rest is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
STABLE_ABI_HEADER = Path("torch/csrc/stable/library.h")


def torch_include() -> Path:
    """The torch headers, without importing torch.

    pip's build isolation hides the target environment from sys.path, but sysconfig still reports its site-packages.
    """
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    for root in roots:
        include = Path(root or ".") / "torch" / "include"
        if (include / STABLE_ABI_HEADER).exists():
            return include
    raise SystemExit(
        "biflow: torch >= 2.11 must be installed before biflow is built (its headers are needed); "
        f"none was found in {sysconfig.get_path('purelib')}. Run: pip install 'torch>=2.11'"
    )


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libbiflow"):  # a plain shared library, the same for every Python
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        ninja, cmake = shutil.which("ninja"), shutil.which("cmake")
        if not (ninja and cmake):
            raise SystemExit(
                "biflow: cmake >= 3.24 and ninja are needed to build. Run: pip install cmake ninja pybind11"
            )
        import pybind11

        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.check_call(
            [
                cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_MAKE_PROGRAM={ninja}",  # an isolated build's ninja moves from one install to the next
                f"-DTORCH_INCLUDE={torch_include()}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DBIFLOW_VERSION={self.distribution.get_version()}",
            ]
        )  # fmt: skip
        subprocess.check_call([cmake, "--build", str(build), "-j", jobs])
        for ext in self.extensions:
            destination = Path(self.get_ext_fullpath(ext.name))
            destination.parent.mkdir(parents=True, exist_ok=True)
            built = build / ("libbiflow.so" if ext.name.endswith("libbiflow") else "_C.so")
            # a new inode: a process that has the old library mapped keeps it
            scratch = destination.with_suffix(".tmp")
            shutil.copy2(built, scratch)
            os.replace(scratch, destination)


setup(
    ext_modules=[Extension("biflow.libbiflow", []), Extension("biflow._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
