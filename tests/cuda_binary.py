"""What nvcc made of the kernels: registers, stack, shared memory and instructions of each, read off libbiflow.so.

    python tests/cuda_binary.py        prints a table, Triton's kernels too

Spilled registers live in the stack frame, so a kernel without one has no spills.
"""

import collections
import importlib.util
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import biflow

LIBRARY = Path(biflow.__file__).with_name("libbiflow.so")
ARCHITECTURES = ("sm_80", "sm_90a")  # CMakeLists.txt


@dataclass
class Kernel:
    """One kernel for one architecture. shared: static bytes. instructions: SASS opcodes with modifiers -> count."""

    architecture: str
    name: str
    registers: int
    stack: int
    shared: int
    instructions: collections.Counter = field(default_factory=collections.Counter)

    def uses(self, pattern: str) -> int:
        """How many instructions match, as in r"HMMA"."""
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))


def cuobjdump() -> str | None:
    """The disassembler: on the PATH, beside nvcc, or of the packages triton and nvidia-cuda-cuobjdump."""
    packages = Path(sysconfig.get_path("purelib"))
    places = [
        shutil.which("cuobjdump"),
        *packages.glob("nvidia/cu*/bin/cuobjdump"),
        packages / "triton/backends/nvidia/bin/cuobjdump",
    ]
    return next((str(p) for p in places if p and Path(p).exists()), None)


def kernels(tool: str, library: Path = LIBRARY) -> list[Kernel]:
    """Every kernel of the library, demangled names."""
    found: dict[tuple[str, str], Kernel] = {}
    architecture = name = None
    for line in _run(tool, "-res-usage", library):
        if match := re.match(r"arch = (\S+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):$", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found[architecture, name] = Kernel(architecture, name, registers, stack + local, shared)
    kernel = None
    for line in _run(tool, "-sass", library):
        if match := re.match(r"arch = (\S+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = found[architecture, match[1]]
        elif kernel and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            kernel.instructions[match[1]] += 1
    names = _demangle([k.name for k in found.values()])
    for kernel, name in zip(found.values(), names, strict=True):
        kernel.name = name
    return list(found.values())


def _run(tool: str, *arguments: object) -> list[str]:
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout.splitlines()


def _demangle(names: list[str]) -> list[str]:
    """Without the namespaces and the parameters; the names as they are where there is no c++filt."""
    if not names or shutil.which("c++filt") is None:
        return names
    out = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\bbiflow::(cuda::|arch::)?|\(anonymous namespace\)::", "", line) for line in out.splitlines()]


def table(found: list[Kernel]) -> list[str]:
    columns = {"HMMA": r"HMMA", "LDSM": r"LDSM", "cp.async": r"LDGSTS", "128 bit": r"(LDG|STG|LDGSTS)\..*128"}
    head = "".join(f"{c:>10}" for c in columns)
    lines = [f"{'arch':8}{'registers':>10}{'stack':>7}{'shared':>8}{head}  kernel"]
    for k in sorted(found, key=lambda k: (k.name, k.architecture)):
        counts = "".join(f"{k.uses(pattern):>10}" for pattern in columns.values())
        lines.append(f"{k.architecture:8}{k.registers:>10}{k.stack:>7}{k.shared:>8}{counts}  {k.name}")
    return lines


def triton_kernels() -> list[Kernel]:
    """Those that tests/kernels/test_triton.py compiles, named by what it compiles them for."""
    if importlib.util.find_spec("triton") is None:
        return []
    cases = importlib.import_module("kernels.test_triton")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (stem, call, _) in cases.COMPILED.items():
            for architecture in (80, 90):
                for kernel in cases.compiled(stem, call, architecture, Path(folder)):
                    kernel.name, kernel.architecture = f"{kernel.name} of {name}", f"sm_{architecture}"
                    found.append(kernel)
    return found


if __name__ == "__main__":
    disassembler = cuobjdump()
    if disassembler is None:
        raise SystemExit("expected cuobjdump on the PATH, or: pip install nvidia-cuda-cuobjdump")
    print("\n".join(table(kernels(disassembler))))
    print("\n".join(table(triton_kernels())))
