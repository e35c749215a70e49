"""Builds libbiflow.so (the torch ops) and biflow._C (build information) with CMake; the rest is in pyproject.toml."""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 11)  # the first one with the stable-ABI headers that bindings/ is written against
STABLE_ABI_HEADER = Path("torch/csrc/stable/library.h")

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones cannot read pyproject.toml and do not say why
    raise SystemExit(
        f"\nbiflow: expected setuptools >= 77, found {setuptools.__version__}. "
        "Without build isolation, run first: pip install -U setuptools wheel cmake ninja pybind11"
    )


def torch_folder() -> Path:
    """The installed torch package, found without importing it.

    pip's build isolation hides the target environment from sys.path, but sysconfig still reports its site-packages.
    The environment below a virtual one comes last: any torch that is new enough serves, the binary is not tied to one.
    """
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    roots = [
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *sys.path,
        site.getusersitepackages(),
        sysconfig.get_path("purelib", vars=base),
    ]
    for root in roots:
        if root and (Path(root) / "torch" / "version.py").exists():
            return Path(root) / "torch"
    raise SystemExit(
        "\nbiflow: expected torch >= 2.11 to be installed before biflow is built (its headers are needed), "
        f"found none in {sysconfig.get_path('purelib')}.\n"
        "Run: pip install 'torch>=2.11'   and then build again.\n"
        "A front end that builds in an environment of its own (python -m build, uv) cannot see your torch: "
        "pass it --no-isolation or --no-build-isolation."
    )


def torch_include() -> Path:
    """The header folder of a torch that is new enough; SystemExit says what was expected and what was found."""
    torch = torch_folder()
    version = re.search(r"__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", (torch / "version.py").read_text())
    got = version.group(1) if version else "one of unknown version"
    if not version or (int(version.group(2)), int(version.group(3))) < OLDEST_TORCH:
        raise SystemExit(f"\nbiflow: expected torch >= 2.11, found {got} in {torch}.\nRun: pip install 'torch>=2.11'")
    if not (torch / "include" / STABLE_ABI_HEADER).exists():
        raise SystemExit(f"\nbiflow: expected include/{STABLE_ABI_HEADER} of torch {got}, not found in {torch}")
    return torch / "include"


def find_tool(name: str) -> str:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise SystemExit(
            f"\nbiflow: expected cmake >= 3.24 and ninja, found no {name}. Run: pip install cmake ninja pybind11"
        )
    return tool


class CheckedDistInfo(dist_info):
    """Metadata is what pip asks for first: a missing torch is reported before pip downloads the dependencies."""

    def run(self) -> None:
        torch_include()
        super().run()


class FreshBuildPy(build_py):
    """setuptools never empties its build folder: a module deleted since would still go into the wheel."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "biflow", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libbiflow"):  # a plain shared library, the same for every Python
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        include = torch_include()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        try:
            import pybind11
        except ImportError:
            raise SystemExit("\nbiflow: expected pybind11 >= 2.12, found none. Run: pip install pybind11") from None

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DTORCH_INCLUDE={include}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DBIFLOW_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        # CMake remembers absolute paths: after a move of the checkout, or when an isolated build brings its tools
        # in a new place, only a fresh configuration is safe. The same paths keep the objects that are up to date.
        stamp, paths = build / "configured-with.txt", "\n".join(configure)
        if not stamp.exists() or stamp.read_text() != paths:
            shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(configure)
        stamp.write_text(paths)
        subprocess.check_call([cmake, "--build", str(build), "-j", os.environ.get("MAX_JOBS", str(os.cpu_count()))])
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
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuildPy, "dist_info": CheckedDistInfo},
)
