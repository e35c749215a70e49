"""The layout rules of CONTRIBUTING.md, executable.

Each rule is a checker `text -> problems`, run over the files it governs. `test_checkers_can_fail` feeds every checker a
snippet that breaks its rule, so a checker that has gone blind turns red too.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

from biflow import ops, reference

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "biflow"
CXX = ("*.h", "*.cpp", "*.cuh", "*.cu")
MAX_LINES = 500

# Which modules of biflow a module may import. Arrows point one way: train/sample -> models -> ops.
# A module that is not named here may import anything except the command line.
MAY_IMPORT = {
    "_library": set(),
    "config": {"config"},
    "reference": {"reference"},
    "ops": {"ops", "_library"},
    "solvers": {"solvers", "ops", "config"},
    "models": {"models", "ops", "solvers", "config"},
    "data": {"data", "config", "files"},
    "files": {"files"},
    "latents": {"latents", "data", "config", "files", "distributed"},
    "calibration": {"models", "solvers", "config"},
    "editing": {"editing", "models", "evaluate", "config"},
}
TOP = {"__main__", "ablation", "cli", "demo"}  # imported by nothing below them

# An op is a stem; `git ls-files '*affine*'` shows its whole life.
STEMS = ("affine", "alignment", "attention", "block_params", "decode_block", "gate", "jacobi_update", "norm")
# ops of a stem whose name does not begin with it
OTHER_NAMES = {"pack_block_": "decode_block", "add_norm": "norm"}
CPU_KERNEL_IS_TORCH = {"attention"}  # torch's own fused attention; attention_heads is of ours
WITH_CUDA_KERNEL = {"affine", "attention", "decode_block", "jacobi_update"}
# bound by bandwidth and simple: Triton on a GPU
KERNEL_IS_TRITON = {"alignment", "gate", "norm"}
# questions about the machine, about weights, about a size: no maths
NOT_OPS = {
    "cpu_isa",
    "force_cpu_isa",
    "weights_fingerprint",
    "block_cache_size",
    "packed_block_size",
    "decode_block_buffers",
}
PUBLIC = (
    "add_norm",
    "affine_encode",
    "affine_decode",
    "alignment_error",
    "attention",
    "attention_qkv",
    "block_params",
    "decode_block",
    "gate",
    "jacobi_update_",
    "norm",
)


def files(folder: str, *patterns: str) -> list[Path]:
    return sorted(p for pattern in patterns for p in (ROOT / folder).rglob(pattern) if p.is_file())


def violations(paths: list[Path], checker) -> list[str]:
    return [f"{p.relative_to(ROOT)}: {problem}" for p in paths for problem in checker(p.read_text())]


# --- checkers: text -> problems -------------------------------------------------------------------------------------


def without_comments(cxx: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", cxx, flags=re.DOTALL)


def sees_torch_or_python(cxx: str) -> list[str]:
    include = r'#\s*include\s*[<"]((?:torch|ATen|c10|caffe2|pybind11)/[^>"]*|Python\.h)[>"]'
    return [f"includes {m}" for m in re.findall(include, without_comments(cxx))]


def reads_environment_cxx(cxx: str) -> list[str]:
    return re.findall(r"\b(?:secure_)?getenv\b|\benviron\b", without_comments(cxx))


def uses_assembly(cxx: str) -> list[str]:
    pattern = r"\basm\b|\b__asm\w*|\b_mm\d*_\w+|\b__builtin_ia32_\w+|\b_tile_\w+|\w*intrin\.h|\barm_\w+\.h|<<<"
    return re.findall(pattern, without_comments(cxx))


def defines_schema(cxx: str) -> list[str]:
    return re.findall(r'\.def\(\s*"[^"]*\)\s*->[^"]*"', without_comments(cxx))


def reads_environment(python: str) -> list[str]:
    problems = []
    for node in ast.walk(ast.parse(python)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb", "putenv"):
            problems.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            problems += [f"line {node.lineno}: {a.name}" for a in node.names if a.name in ("environ", "getenv")]
    return problems


def runs_foreign_code(python: str) -> list[str]:
    """Ways in which a file that is read could run code."""
    problems = []
    for node in ast.walk(ast.parse(python)):
        if isinstance(node, ast.Import):
            problems += [f"line {node.lineno}: {a.name}" for a in node.names if a.name in ("dill", "shelve", "marshal")]
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            problems += [f"line {node.lineno}: {a.name}" for a in node.names if a.name != "UnpicklingError"]
        # naming the error that torch.load raises is all that pickle is good for
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr != "UnpicklingError":
            problems.append(f"line {node.lineno}: pickle.{node.attr}")
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (
            (name == "torch.load" and options.get("weights_only") != "True")
            or options.get("allow_pickle") == "True"
            or name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")
        ):
            problems.append(f"line {node.lineno}: {name}")
    return problems


def loops_over_tokens(python: str) -> list[str]:
    """A loop whose range is the sequence length: that is what decode_block and the solvers are for."""
    problems = []
    for node in ast.walk(ast.parse(python)):
        iterated = [ast.unparse(node.iter)] if isinstance(node, ast.For | ast.comprehension) else []
        problems += [
            f"line {node.iter.lineno}: loops over {source}"
            for source in iterated
            if re.search(r"\btokens\b|\bT\b|\bseq\w*\b|shape\[(1|-2)\]|size\((1|-2)\)|\.unbind\((dim=)?1\)", source)
        ]
        if isinstance(node, ast.While):
            problems.append(f"line {node.lineno}: while")
    return problems


def biflow_imports(python: str, module: str) -> set[str]:
    """First names under `biflow` that `module` (dotted, as "biflow.ops.affine") imports; "" is the package itself."""
    tree = ast.parse(python)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            found += [f"{source}.{a.name}" for a in node.names]
    return {name.split(".")[1] if "." in name else "" for name in found if name.split(".")[0] == "biflow"}


def wrong_arrows(python: str, module: str) -> list[str]:
    own, imports = module.split(".")[1], biflow_imports(python, module)
    allowed = MAY_IMPORT.get(own)
    bad = imports - allowed if allowed is not None else (imports & TOP if own not in TOP else set())
    return [f"imports biflow{'.' if name else ''}{name}" for name in sorted(bad)]


# --- C++ ------------------------------------------------------------------------------------------------------------


def test_csrc_sees_no_torch_and_no_python():
    assert violations(files("csrc", *CXX), sees_torch_or_python) == []


def test_only_bindings_see_torch_or_python():
    elsewhere = [p for folder in ("benchmarks", "tests", "examples") for p in files(folder, *CXX)]
    assert violations(elsewhere, sees_torch_or_python) == []


def test_no_cxx_reads_the_environment():
    assert violations(files("csrc", *CXX) + files("bindings", *CXX), reads_environment_cxx) == []


def test_assembly_and_intrinsics_only_in_arch_and_cpu():
    outside = [p for p in files("csrc", *CXX) if p.relative_to(ROOT / "csrc").parts[0] not in ("arch", "cpu")]
    assert violations(outside + files("bindings", *CXX), uses_assembly) == []


def test_schemas_are_in_library_cpp_only():
    others = [p for p in files("bindings", "*.cpp") if p.name != "library.cpp"]
    assert violations(others, defines_schema) == []


# --- Python ---------------------------------------------------------------------------------------------------------


def test_no_environment_variable_selects_behaviour():
    """But for what launchers say there: which of a job's processes this is."""
    assert violations([p for p in files("biflow", "*.py") if p != PACKAGE / "distributed.py"], reads_environment) == []


def test_nothing_is_unpickled():
    python = [p for folder in ("biflow", "benchmarks", "examples") for p in files(folder, "*.py")]
    assert violations(python, runs_foreign_code) == []


def test_models_do_not_loop_over_tokens():
    assert violations(files("biflow/models", "*.py"), loops_over_tokens) == []


def test_imports_point_one_way():
    problems = []
    for path in files("biflow", "*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 2 or parts[1] != "__init__":  # biflow/__init__.py gathers the public names
            problems += violations([path], lambda text, parts=parts: wrong_arrows(text, ".".join(parts)))
    assert problems == []


def test_reference_needs_only_torch():
    for file in files("biflow/reference", "*.py"):
        tree = ast.parse(file.read_text())
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level]
        assert {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) <= {"torch", "biflow"}


def test_no_source_file_is_too_long():
    folders = ("biflow", "csrc", "bindings", "tests", "benchmarks", "examples")
    sources = [p for folder in folders for p in files(folder, "*.py", *CXX)] + [ROOT / "setup.py"]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


# --- one op, one stem -----------------------------------------------------------------------------------------------


def schemas() -> dict[str, torch.FunctionSchema]:
    """Every op that libbiflow.so registers, by name."""
    names = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("biflow::")]
    return {n: getattr(torch.ops.biflow, n).default._schema for n in names if n not in NOT_OPS}


def test_every_registered_op_belongs_to_a_stem():
    assert [n for n in schemas() if not OTHER_NAMES.get(n, n).startswith(STEMS)] == []


def test_every_module_of_ops_and_reference_is_a_stem():
    for package in ("ops", "reference"):
        assert {p.stem for p in (PACKAGE / package).glob("*.py") if not p.stem.startswith("_")} == set(STEMS)


def compiled(stem: str) -> list[str]:
    """The source files of a stem's kernels and their bindings."""
    if stem in KERNEL_IS_TRITON:
        return []
    cpu = [] if stem in CPU_KERNEL_IS_TORCH else [f"csrc/cpu/{stem}.cpp", f"bindings/{stem}.cpp"]
    return cpu + ([f"csrc/cuda/{stem}.cu", f"bindings/{stem}_cuda.cpp"] if stem in WITH_CUDA_KERNEL else [])


@pytest.mark.parametrize("stem", STEMS)
def test_stem_has_every_floor(stem):
    floors = [f"biflow/ops/{stem}.py", f"tests/test_{stem}.py", f"benchmarks/bench_{stem}.py"]
    if stem in KERNEL_IS_TRITON:
        floors += [f"biflow/ops/_triton/{stem}.py"]
    else:
        floors += [f"csrc/{stem}.h"]
        assert compiled(stem)
    if stem in WITH_CUDA_KERNEL:
        floors += [f"csrc/cuda/{stem}.cuh", f"tests/kernels/test_{stem}.py"]
    assert [f for f in floors + compiled(stem) if not (ROOT / f).exists()] == []


def test_every_triton_kernel_belongs_to_a_stem():
    assert {p.stem for p in (PACKAGE / "ops" / "_triton").glob("*.py")} - {"__init__"} == KERNEL_IS_TRITON


def test_only_kernels_import_triton():
    """biflow works without it: it is imported when the first CUDA tensor comes."""

    def imports_triton(text):
        return re.findall(r"^(?:import|from) triton\b.*", text, re.MULTILINE)

    kernels = {PACKAGE / "ops" / "_triton" / f"{stem}.py" for stem in KERNEL_IS_TRITON}
    assert violations([p for p in files("biflow", "*.py") if p not in kernels], imports_triton) == []
    assert all(imports_triton(p.read_text()) for p in kernels)


@pytest.mark.parametrize("stem", STEMS)
def test_stem_is_compiled(stem):
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert [f for f in compiled(stem) if f not in cmake] == []
    assert any(n.startswith(stem) for n in schemas())


def test_every_cuda_kernel_belongs_to_a_stem():
    assert {p.stem.removesuffix("_cuda") for p in files("bindings", "*_cuda.cpp")} == WITH_CUDA_KERNEL


def test_every_op_has_a_fake_kernel():
    """Its own, or that of the torch ops which it is composed of."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("Meta", "CompositeImplicitAutograd")
    assert [n for n in schemas() if not any(has_kernel(f"biflow::{n}", key) for key in keys)] == []


def test_ops_that_write_into_buffers_say_so():
    """A schema that mutates an argument ends in `_` and returns nothing; one that does not, does not."""
    for name, schema in schemas().items():
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        assert name.endswith("_") == writes, schema
        assert not (writes and schema.returns), schema


@pytest.mark.parametrize("name", PUBLIC)
def test_reference_has_the_same_signature(name):
    """Same names, kinds and defaults; only `out` is the op's alone."""

    def shape(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.name != "out"]

    assert shape(getattr(ops, name)) == shape(getattr(reference, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_op_is_documented(name):
    """Every parameter, what comes back and what is raised; "as in <op>" refers to another op's text."""
    text = inspect.getdoc(getattr(ops, name)) or ""
    text += "".join(inspect.getdoc(getattr(ops, other)) for other in re.findall(r"as in (\w+)", text))
    words = [*inspect.signature(getattr(ops, name)).parameters, "ValueError", "TypeError"]
    assert [word for word in words if not re.search(rf"\b{word}\b", text)] == []


# --- the checkers themselves ----------------------------------------------------------------------------------------

BAD = [
    (sees_torch_or_python, "#include <torch/csrc/stable/tensor.h>"),
    (sees_torch_or_python, '# include "Python.h"'),
    (reads_environment_cxx, 'int n = std::atoi(std::getenv("N"));'),
    (uses_assembly, 'asm volatile("" ::: "memory");'),
    (uses_assembly, "__m512 v = _mm512_setzero_ps();"),
    (uses_assembly, "#include <immintrin.h>"),
    (uses_assembly, "kernel<<<grid, block>>>(p);"),
    (defines_schema, 'm.def("norm(Tensor x) -> Tensor");'),
    (reads_environment, "import os\nfast = os.environ.get('FAST')"),
    (reads_environment, "from os import getenv"),
    (runs_foreign_code, "import pickle\npickle.load(file)"),
    (runs_foreign_code, "from pickle import Unpickler"),
    (runs_foreign_code, "torch.load(path)"),
    (runs_foreign_code, "torch.load(path, weights_only=False)"),
    (runs_foreign_code, "numpy.load(path, allow_pickle=True)"),
    (runs_foreign_code, "yaml.load(text, yaml.Loader)"),
    (loops_over_tokens, "for t in range(c.tokens): pass"),
    (loops_over_tokens, "x = [f(x[:, t]) for t in range(x.shape[1])]"),
    (loops_over_tokens, "while True: pass"),
    (lambda s: wrong_arrows(s, "biflow.ops.affine"), "from biflow.models import TarFlow"),
    (lambda s: wrong_arrows(s, "biflow.ops.affine"), "def f():\n    from ..models import TarFlow"),
    (lambda s: wrong_arrows(s, "biflow.models.tarflow"), "import biflow.train"),
    (lambda s: wrong_arrows(s, "biflow.models.tarflow"), "from biflow import evaluate"),
    (lambda s: wrong_arrows(s, "biflow.models.tarflow"), "import biflow"),
    (lambda s: wrong_arrows(s, "biflow.solvers.policy"), "from biflow.models import TarFlow"),
    (lambda s: wrong_arrows(s, "biflow.reference"), "from biflow import ops"),
    (lambda s: wrong_arrows(s, "biflow.train.loop"), "from biflow.cli import main"),
]
GOOD = [
    (sees_torch_or_python, '// #include <torch/torch.h>\n#include "cpu/isa.h"'),
    (uses_assembly, "// no _mm512_add_ps here\nint x = y << 3;"),
    (defines_schema, 'm.def("build_info", [] { return 1; });'),
    (runs_foreign_code, "try: torch.load(path, weights_only=True)\nexcept pickle.UnpicklingError: pass"),
    (loops_over_tokens, "for block in self.blocks: pass\nfor _ in range(c.class_tokens): pass"),
    (lambda s: wrong_arrows(s, "biflow.models.tarflow"), "from biflow import ops, solvers\nfrom .layers import Layer"),
    (lambda s: wrong_arrows(s, "biflow.cli"), "from biflow import demo, train"),
    (lambda s: wrong_arrows(s, "biflow.reference"), "if TYPE_CHECKING:\n    from biflow.ops import BlockConfig"),
]


@pytest.mark.parametrize("folder", ["csrc", "bindings", "biflow", "biflow/models", "biflow/ops", "tests", "benchmarks"])
def test_rules_govern_files(folder):
    """A folder that moved would leave its rules with nothing to look at."""
    assert files(folder, "*.py", *CXX)


@pytest.mark.parametrize(("checker", "snippet"), BAD)
def test_checkers_can_fail(checker, snippet):
    assert checker(snippet)


@pytest.mark.parametrize(("checker", "snippet"), GOOD)
def test_checkers_let_good_code_pass(checker, snippet):
    assert checker(snippet) == []
