"""The Triton kernels: in Triton's interpreter, compiled for GPUs that need not be there, and on a GPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_binary import Kernel, cuobjdump, kernels

from biflow import ops
from biflow.models.layers import Layer
from biflow.ops import _triton
from biflow.ops.alignment import _Head

from .triton_cases import BF16, F32, cases, needs_gpu

triton = pytest.importorskip("triton", reason="no triton: see requirements/dev.txt")
CASES = cases()
EMULATED = [name for name in CASES if not needs_gpu(name)]  # Triton's interpreter truncates where bf16 rounds


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


# --- in the interpreter ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """What was wrong, by case: Triton decides at import whether it interprets, so another process does."""
    script = Path(__file__).with_name("triton_cases.py")
    path = os.pathsep.join(filter(None, [str(Path(ops.__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", EMULATED)
def test_interpreter(interpreted, case):
    assert interpreted[case] is None, interpreted[case]


# --- compiled -------------------------------------------------------------------------------------------------------


class Recorder:
    """In the place of a kernel: keeps what a launch would have compiled."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, num_warps=4, **options):
            args += tuple(options[name] for name in self.kernel.arg_names[len(args) :])
            self.launches.append((self.kernel, args, num_warps))

        return launch


def specialised(kernel, args: list) -> tuple[dict, dict, dict]:
    """signature, constants and attributes as Triton derives them from a launch's arguments."""
    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        number = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (number and value == 1):
            signature[parameter.name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            assert value.data_ptr() % 16 == 0
            signature[parameter.name], attributes[i,] = names[value.dtype], [["tt.divisibility", 16]]
        elif number:
            signature[parameter.name] = "i32"
            attributes |= {(i,): [["tt.divisibility", 16]]} if value % 16 == 0 else {}
        else:
            signature[parameter.name] = "fp32"
    return signature, constants, attributes


def compiled(stem: str, call, architecture: int, folder: Path) -> list[Kernel]:
    """The kernels that call(module) launches, compiled for an architecture; nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, launches, found = importlib.import_module(f"biflow.ops._triton.{stem}"), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        for name in ("forward", "backward", "add_partials", "products"):
            if hasattr(module, name):
                patch.setattr(module, name, Recorder(getattr(module, name), launches))
        call(module)
    for kernel, args, warps in launches:
        source = ASTSource(kernel, *specialised(kernel, args))
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
        cubin = folder / f"{kernel.__name__}.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        (one,) = kernels(cuobjdump(), cubin)
        one.name, one.shared = kernel.__name__, binary.metadata.shared
        found.append(one)
    return found


def row(width: int, dtype: torch.dtype, rows: int = 1024) -> torch.Tensor:
    return torch.zeros(rows, width, dtype=dtype)


def launch_norm(width, x, stream, y, kind, bias, backward):
    w = torch.zeros(width)
    b = w if bias else None

    def call(module):
        if backward:
            narrow = x if stream != x else None
            module.norm_backward(row(width, y), row(width, stream), row(width, stream), w, b, kind, 1e-5, narrow)
        elif stream is None:
            module.norm(row(width, x), w, b, kind, 1e-5, y)
        else:
            module.add_norm(row(width, x), row(width, stream), w, b, kind, 1e-5, y)

    return call


def launch_alignment(width, outputs, h, product, backward):
    def call(module):
        w, b = torch.zeros(width), torch.zeros(outputs)
        head = _Head(w, w, torch.zeros(outputs, width), b, "layernorm", 1e-5, product, F32)
        state, target = row(width, h).view(4, 256, width)[:, 8:], torch.zeros(4, 248, outputs)
        if backward:
            module.through(state, target, torch.zeros(4, 248), head)
        else:
            module.squares(state, target, head)

    return call


# name: stem, what is launched, limit of registers: 64 warps an SM for the forward, what was met for the others
COMPILED = {
    "norm 768 bf16": ("norm", launch_norm(768, BF16, None, BF16, "layernorm", True, False), 32),
    "norm 768 fp32": ("norm", launch_norm(768, F32, None, F32, "rmsnorm", False, False), 32),
    "add_norm 768 bf16 beside fp32": ("norm", launch_norm(768, BF16, F32, BF16, "layernorm", True, False), 32),
    "norm 768 part of the tokens": (
        "norm",
        lambda m: m.norm(row(768, F32).view(4, 256, 768)[:, 8:], torch.zeros(768), None, "rmsnorm", 1e-6, BF16),
        32,
    ),
    "add_norm 64 bf16": ("norm", launch_norm(64, BF16, BF16, BF16, "rmsnorm", False, False), 40),
    "add_norm 8192 bf16 beside fp32": ("norm", launch_norm(8192, BF16, F32, BF16, "layernorm", True, False), 64),
    "norm backward 768": ("norm", launch_norm(768, BF16, F32, BF16, "layernorm", True, True), 80),
    "norm backward 8192": ("norm", launch_norm(8192, BF16, F32, BF16, "layernorm", True, True), 128),
    "gate swiglu": ("gate", lambda m: m.gate(row(4096, BF16), "swiglu"), 40),
    "gate gelu": ("gate", lambda m: m.gate(row(3072, BF16), "gelu"), 40),
    "gate gelu fp32": ("gate", lambda m: m.gate(row(3072, F32), "gelu"), 48),
    "gate swiglu backward": (
        "gate", lambda m: m.gate_backward(row(2048, BF16), row(4096, BF16), "swiglu"), 64),
    "gate gelu backward": (
        "gate", lambda m: m.gate_backward(row(3072, BF16), row(3072, BF16), "gelu"), 64),
}  # fmt: skip


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills_and_with_wide_accesses(name, architecture, tmp_path):
    stem, call, most = COMPILED[name]
    found = compiled(stem, call, architecture, tmp_path)
    assert [k.name for k in found] == (["backward", "add_partials"] if "norm backward" in name else [found[0].name])
    for kernel in found:
        assert kernel.stack == 0, kernel
    first = found[0]
    assert first.registers <= most, first
    assert first.shared <= 20_000, first
    for access in ("LDG", "STG"):
        assert first.uses(access) == first.uses(access + r"\.E\.128") > 0, first


# name: C, D, dtypes of h and of what is multiplied; limits of registers as met, those of forward, backward, products
ALIGNMENTS = {
    "768 fp32": ((768, 16, F32, None), (64, 48, 160)),
    "768 fp32, products of bf16": ((768, 16, F32, BF16), (64, 48, 160)),
    "768 bf16": ((768, 16, BF16, BF16), (64, 48, 112)),
    "8192, outputs in tiles": ((8192, 768, F32, None), (80, 64, 200)),
    "ragged": ((130, 5, F32, None), (128, 64, 48)),
}


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_alignment_compiles_without_spills(name, architecture, tmp_path):
    shape, limits = ALIGNMENTS[name]
    found = compiled("alignment", launch_alignment(*shape, backward=False), architecture, tmp_path)
    assert [k.name for k in found] == ["forward"]
    found += compiled("alignment", launch_alignment(*shape, backward=True), architecture, tmp_path)
    assert [k.name for k in found[1:]] == ["forward", "backward", "products"]
    for kernel, most in zip(found, (limits[0], *limits), strict=True):
        assert kernel.stack == 0, kernel
        assert kernel.registers <= most, kernel
        assert kernel.shared <= 32_000, kernel
    for kernel in found[2:]:  # what is as large as the state, or as its partial sums
        assert kernel.uses("STG") == kernel.uses(r"STG\.E\.128") or name == "ragged", kernel
    assert bool(found[0].uses("HMMA")) == (shape[3] is BF16)  # fp32 is not rounded to TF32


# --- on a GPU -------------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu(case):
    CASES[case]("cuda")


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "autocast", "fp64"])
@pytest.mark.parametrize(("kind", "gate"), [("layernorm", "gelu"), ("rmsnorm", "swiglu")])
def test_layer_on_a_gpu_is_that_on_a_cpu(kind, gate, precision):
    """The ops as a layer calls them: values and gradients of all weights. Root mean squares: docs/decisions/0007."""
    exact, same, got = (
        layer_results(kind, gate, *where) for where in (("cpu", "fp64"), ("cpu", precision), ("cuda", precision))
    )
    floor = 8 * 256 * torch.finfo(torch.float64).eps if precision == "fp64" else 256**0.5 * torch.finfo(F32).eps
    for want, plain, ours in zip(exact, same, got, strict=True):
        assert ours.dtype == plain.dtype
        error, allowed = ((t.double().cpu() - want).norm() / want.norm() for t in (ours, plain))
        assert error <= 2 * allowed + floor  # of sums over the MLP's 256 channels; TF32 is off by default


def layer_results(kind: str, gate: str, device: str, precision: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layer, h = Layer(96, 32, 256, kind, gate, True).double(), torch.randn(3, 10, 96, dtype=torch.float64)
    dtype = torch.float64 if precision == "fp64" else F32
    layer = layer.to(device, dtype)
    x = h.to(device, dtype).requires_grad_()
    with torch.autocast(device, BF16, enabled=precision == "autocast"):
        out = sum(layer(x, x / 2, None, causal=True))
    assert out.dtype == dtype
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


@on_gpu
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_graph_on_a_gpu(compiler):
    x, w = torch.randn(4, 6, 96, device="cuda", dtype=BF16), torch.randn(96, device="cuda")
    h, m = torch.randn(4, 6, 96, device="cuda"), torch.randn(4, 6, 96, device="cuda")

    def loss(x, h, w):
        y, h = ops.add_norm(x, h, w, kind="rmsnorm", eps=1e-6)
        z = ops.norm(ops.gate(h * m, "gelu")[:, 1:], w, w, kind="layernorm", eps=1e-5)
        return (ops.gate(y, "swiglu") ** 2).sum() + z.square().sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        leaves = [t.clone().requires_grad_() for t in (x, h, w)]
        value = f(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@on_gpu
def test_recorded_in_a_cuda_graph():
    x, w = torch.randn(8, 96, device="cuda"), torch.randn(96, device="cuda")

    def call():
        y, h = ops.add_norm(x, x, w, kind="layernorm", eps=1e-5)
        return ops.gate(y + h, "gelu")

    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    x.normal_()
    graph.replay()
    assert torch.equal(out, call())


# --- without Triton -------------------------------------------------------------------------------------------------


def test_message_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"biflow\.ops\.norm: CUDA tensors need Triton.*pip install triton"):
        _triton.kernels.__wrapped__("norm")
