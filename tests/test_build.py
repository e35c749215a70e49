"""The build: what an sdist carries, what setup.py says when torch is missing or old, what the binary reports."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools

import biflow
from biflow import _C

ROOT = Path(__file__).resolve().parents[1]
SKIP = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__", ".*_cache")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A clean copy of the checkout: building from it leaves nothing behind in this one."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("build") / "sources", ignore=SKIP)


def setup_py(sources: Path, *arguments: str, site_packages: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs setup.py; with `site_packages`, in an interpreter that has this folder and setuptools, nothing else."""
    command = [str(sources / "setup.py"), *arguments]
    if site_packages is not None:
        for entry in Path(setuptools.__file__).parents[1].glob("setuptools*"):
            (site_packages / entry.name).symlink_to(entry)
        program = (
            "import sys, sysconfig, site, runpy\n"
            f"sysconfig.get_path = lambda *a, **k: {str(site_packages)!r}\n"
            f"site.getusersitepackages = lambda: {str(site_packages)!r}\n"
            f"sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{str(site_packages)!r}]\n"
            f"sys.argv = {command!r}\n"
            f"runpy.run_path({command[0]!r}, run_name='__main__')\n"
        )
        command = ["-c", program]
    return subprocess.run([sys.executable, *command], cwd=sources, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_sdist_has_all_that_a_build_needs(sources, tmp_path):
    done = setup_py(sources, "-q", "sdist", "--formats=gztar", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("biflow-*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {
        ".clang-format",
        "CHANGELOG.md",
        "CMakeLists.txt",
        "CONTRIBUTING.md",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
        "README.md",
        "pyproject.toml",
        "setup.py",
    }
    for folder in (".ci", "benchmarks", "biflow", "bindings", "csrc", "docs", "examples", "requirements", "tests"):
        found = {str(p.relative_to(sources)) for p in (sources / folder).rglob("*") if p.is_file()}
        assert found, folder
        wanted |= found
    assert wanted - packed == set()
    assert [name for name in packed if name.endswith((".so", ".pyc"))] == []


def test_missing_torch_is_reported_before_anything_is_built(sources, tmp_path):
    done = setup_py(sources, "build_ext", site_packages=tmp_path)
    assert done.returncode != 0
    assert "expected torch >= 2.11" in done.stderr
    assert "found none" in done.stderr
    assert "pip install 'torch>=2.11'" in done.stderr
    assert not (sources / "build").exists()


def test_missing_torch_stops_pip_at_the_metadata(sources, tmp_path):
    """Later, pip would have downloaded every dependency first."""
    done = setup_py(sources, "dist_info", "--output-dir", str(tmp_path), site_packages=tmp_path)
    assert done.returncode != 0
    assert "expected torch >= 2.11" in done.stderr


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.0", "unknown"])
def test_old_torch_is_refused_with_expected_and_got(sources, tmp_path, version):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    done = setup_py(sources, "build_ext", site_packages=tmp_path)
    assert done.returncode != 0
    assert "expected torch >= 2.11" in done.stderr
    assert ("found one of unknown version" if version == "unknown" else f"found {version}") in done.stderr


def test_torch_without_headers_is_refused(sources, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0+cpu'\n")
    done = setup_py(sources, "build_ext", site_packages=tmp_path)
    assert done.returncode != 0
    assert "expected include/torch/csrc/stable/library.h of torch 2.11.0+cpu" in done.stderr


def test_versions_agree():
    """pyproject.toml, the package and the compiled library are of one version."""
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert declared == biflow.__version__
    assert declared == _C.build_info()["version"]


def test_library_is_tied_to_no_python_and_no_torch_build():
    """libbiflow.so asks torch for C functions of the stable ABI only, and Python for nothing."""
    library = Path(biflow.__file__).with_name("libbiflow.so")
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert any(s.startswith("aoti_torch_") for s in symbols)  # nm saw the library
    assert [s for s in symbols if re.match(r"_?Py|_ZN?K?(2at|3c10|5torch)|GOMP_", s)] == []


def test_build_info():
    info = _C.build_info()
    assert info["instruction_sets"][0] == "portable"
    assert _C.best_isa() in info["instruction_sets"]
    assert info["compiler"]


def test_build_information_needs_no_torch():
    """biflow._C tells what is wrong on a machine whose torch does not import."""
    spec = importlib.util.find_spec("biflow._C")
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {spec.origin!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules; print(module.best_isa())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == _C.best_isa()


@pytest.mark.slow
def test_moved_checkout_is_configured_anew(sources, tmp_path):
    """CMake's cache holds absolute paths; a copy of a built checkout must configure afresh, not fail."""
    moved = shutil.copytree(sources, tmp_path / "moved")
    cache = moved / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeCache.txt"
    cache.parent.mkdir(parents=True)
    cache.write_text(f"CMAKE_HOME_DIRECTORY:INTERNAL={sources}\nCMAKE_MAKE_PROGRAM:FILEPATH=/nowhere/ninja\n")
    (cache.parent / "configured-with.txt").write_text("cmake -S elsewhere")
    program = (  # configure only: stop at the compile step
        "import subprocess, runpy, sys\n"
        "call = subprocess.check_call\n"
        "def configure_only(command):\n"
        "    if '--build' in command: raise SystemExit('configured')\n"
        "    call(command)\n"
        "subprocess.check_call = configure_only\n"
        "sys.argv = ['setup.py', 'build_ext']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=moved, capture_output=True, text=True, timeout=120)
    assert "configured" in done.stderr, done.stderr
    assert f"CMAKE_HOME_DIRECTORY:INTERNAL={moved}" in cache.read_text()


@pytest.mark.slow
def test_wheel_holds_what_the_package_holds(sources, tmp_path):
    """Presets included, and no module deleted since: setuptools keeps its build folder between builds."""
    stale = tmp_path / "lib" / "biflow" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    done = setup_py(sources, "-q", "build_py", "--build-lib", str(tmp_path / "lib"))
    assert done.returncode == 0, done.stderr
    package = {str(p.relative_to(ROOT)) for suffix in ("py", "yaml") for p in (ROOT / "biflow").rglob(f"*.{suffix}")}
    built = {str(p.relative_to(tmp_path / "lib")) for p in (tmp_path / "lib").rglob("*") if p.is_file()}
    assert built == package
