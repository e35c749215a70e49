"""What gpu-check times ours against: plain torch, right, and not timed where it is wrong."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from dispatched import Dispatched
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import build, first_failures, kernels, models, others, summary  # noqa: E402
from benchmarks.gpu.parity import WrongResult, error  # noqa: E402
from benchmarks.gpu.subject import Subject  # noqa: E402
from benchmarks.gpu.timing import Call, Timer  # noqa: E402
from benchmarks.peers.plain import PlainDensity, PlainReverse  # noqa: E402
from biflow import BiFlow, BiFlowConfig, TarFlow, TarFlowConfig  # noqa: E402
from biflow.models.layers import unpatchify  # noqa: E402

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LIMITS = [{"limit": "copy", "gb_s": 1000.0}, {"limit": "bf16 GEMM", "tflop_s": 100.0}]
REVERSE = dict(img_size=8, in_channels=2, num_blocks=2, layers_per_group=1, width=64, head_dim=32, num_classes=5)


class Called(TorchFunctionMode):
    """Calls of biflow's torch ops, those too that are made of others before the dispatcher's Python sees them."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if "biflow" in str(getattr(function, "_qualified_op_name", "")) or "biflow" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def ops_of(f, monkeypatch):
    """Names of the biflow ops that f() runs: of ours, which on a CPU may be torch's own functions, too."""
    import biflow.models.block
    import biflow.models.layers
    from biflow import ops

    found = []

    class Watched:
        def __getattr__(self, name):
            found.append(name)
            return getattr(ops, name)

    with monkeypatch.context() as patch, Dispatched() as dispatched, Called() as called:
        for module in (biflow.models.layers, biflow.models.block):
            patch.setattr(module, "ops", Watched())
        f()
    return {*found, *dispatched.names, *called.names}


def device_of(name):
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


def contestants(passes):
    inputs = passes.inputs(2)
    calls = passes.others(inputs) | passes.compiled(inputs)
    return {name: call() for name, call in calls.items()} | {"ours": Call(partial(passes.ours, *inputs))}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["reverse", "density"])
def test_contestants_of_whole_passes_run_none_of_our_ops(kind, device, monkeypatch):
    """torch.compile gets what the test sees here: it takes no part of a graph apart for a mode that watches."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    timer = Timer(device_of(device))
    made = models.Reverse(timer, [], True) if kind == "reverse" else models.Density(timer, [], True, "B/2", None)
    calls = contestants(made)
    assert set(calls) == {"eager", "autocast", "compile", "ours"}
    for name, call in calls.items():
        assert bool(ops_of(call.f, monkeypatch)) == (name == "ours"), name


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_other_decodes_run_none_of_our_ops(device, monkeypatch):
    subject = Subject("B/2", device_of(device), dry=True)
    for who in ("eager", "static", "graph"):
        with torch.inference_mode():
            call = others.CONTESTANTS[who](subject, 2, "bf16")(4)
            assert ops_of(call, monkeypatch) == set(), who
    assert ops_of(lambda: subject.block(subject.z(1)), monkeypatch)


# --- they compute what ours do


@pytest.mark.parametrize("options", [{}, dict(norm="layernorm", gate="gelu", qk_norm=False)])
def test_the_plain_reverse(options):
    model = BiFlow(BiFlowConfig(max_guidance=2.0, **REVERSE, **options)).double().eval()
    models.randomize(model)
    z, y, w = torch.randn(3, 16, 8).double(), torch.tensor([1, 4, 0]), torch.tensor([0.0, 1.5, 2.0]).double()
    want = unpatchify(model(z, y, w), 2)
    torch.testing.assert_close(PlainReverse(model, torch.float64)(z, y, w), want)


@pytest.mark.parametrize("blocks", [2, 3])  # the last one in order, or reversed
def test_the_plain_density(blocks):
    flow = TarFlow(TarFlowConfig(img_size=8, in_channels=1, width=64, num_blocks=blocks, head_dim=32)).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=g).double())
    x = torch.randn(3, 1, 8, 8, generator=g).double()
    for got, want in zip(PlainDensity(flow, torch.float64)(x), flow(x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("change", [{"norm": "rmsnorm"}, {"num_classes": 3}])
def test_what_the_plain_density_has_not(change):
    flow = TarFlow(TarFlowConfig(img_size=8, in_channels=1, width=64, num_blocks=2, **change))
    with pytest.raises(ValueError, match=next(iter(change))):
        PlainDensity(flow)
    model = BiFlow(BiFlowConfig(**REVERSE))
    with pytest.raises(ValueError, match="expected max_guidance"):
        PlainReverse(model)


# --- no speed of a wrong result


def test_a_relative_error_has_a_bound_for_each_result():
    want = torch.ones(4, dtype=torch.float64)
    assert error(torch.ones(4), want) == 0
    assert error((torch.ones(4).bfloat16() * 1.01, torch.ones(4)), (want, want)) == pytest.approx(0.01, rel=0.3)
    assert error(torch.ones(4), (want, 2 * want)) == 0  # it computes the first alone
    with pytest.raises(WrongResult, match=r"result 0 within 0\.0001 of the reference, got 0\.01"):
        error(torch.ones(4) * 1.01, want)
    with pytest.raises(WrongResult, match=r"result 1 within 0\.001"):
        error((torch.ones(4), torch.ones(4) * 1.01), (want, want), 1e-3)
    with pytest.raises(WrongResult, match="got nan"):
        error(torch.full((4,), float("nan")), want)
    with pytest.raises(WrongResult, match="of shape"):
        error(torch.ones(2, 2), want)
    with pytest.raises(WrongResult, match="got 2"):
        error((want, want), want)


def test_what_is_wrong_is_not_timed():
    timer, calls = Timer(CPU), {"ours": 0, "wrong": 0, "writes": 0}

    def call(name, value):
        calls[name] += 1
        return value

    one, two = torch.ones(2), 2 * torch.ones(2)
    times = timer(
        {
            "ours": Call(partial(call, "ours", one)),
            "wrong": Call(partial(call, "wrong", two)),
            "writes": Call(partial(call, "writes", None), result=lambda: two),
        },
        cold=True,
        check=partial(error, want=one),
    )
    assert calls["ours"] > 1
    assert (calls["wrong"], calls["writes"]) == (1, 0)
    row = times.row(lambda seconds: {"us": seconds})
    assert set(row) == {"us", "error", "failed"}
    assert row["failed"].count("WrongResult: expected result 0 within") == 2


@pytest.mark.parametrize("wrong", ["ours", "eager"])
@pytest.mark.parametrize("kind", ["reverse", "density"])
def test_a_wrong_pass_is_not_timed(kind, wrong, monkeypatch):
    made = models.Reverse if kind == "reverse" else partial(models.Density, name="B/2", ml_tarflow=None)
    passes = made(Timer(CPU), LIMITS, True)
    if wrong == "ours":
        ours = passes.ours
        monkeypatch.setattr(passes, "ours", lambda *inputs: off(ours(*inputs)))
    else:
        plain = passes.plain
        monkeypatch.setattr(
            passes, "plain", lambda dtype: plain(dtype) if dtype != torch.bfloat16 else lambda *i: off(plain(dtype)(*i))
        )
    row = passes.row(2, frozen=True)
    assert row["failed"].startswith(f"{wrong}: WrongResult")
    assert ("ms_image" in row, "x_eager" in row) == (wrong == "eager", False)
    assert ("x_autocast" in row) == (wrong == "eager")


def off(result):
    """An image that is 10% off; a log-determinant of 0, which z does not tell."""
    return 1.1 * result if isinstance(result, torch.Tensor) else (result[0], torch.zeros_like(result[1]))


WRONG = {  # an op of ours, and its rows
    "affine_encode": {"affine_encode", "affine_encode backward"},
    "attention_qkv": {"attention_qkv", "attention_qkv forward + backward"},
    "add_norm": {"add_norm", "add_norm backward"},
    "gate": {"gate swiglu", "gate swiglu backward", "gate gelu", "gate gelu backward"},
    "jacobi_update_": {"jacobi_update_"},
    "alignment_error": {"alignment_error forward + backward"},
}


@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_kernel_is_not_timed(op, monkeypatch):
    original = getattr(kernels.ops, op)

    def wrong(x, *others, **options):
        out = original(x, *others, **options)
        if op == "jacobi_update_":
            x[0, 0] += 1.0
            return None
        return (1.1 * out[0], *out[1:]) if isinstance(out, tuple) else 1.1 * out

    monkeypatch.setattr(kernels.ops, op, wrong)
    for name in ("AFFINE", "JACOBI", "ATTENTION", "NORM"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name)[:1])
    monkeypatch.setattr(kernels, "TRAINED", [case[0] for case in kernels.ATTENTION])
    found = set()
    for case in kernels.cases(Timer(CPU), LIMITS, dry=True):
        if case.labels["op"] in WRONG[op]:
            row = case.run()
            assert "us" not in row
            assert row["failed"].startswith("ours: WrongResult"), case.labels
            assert "eager" not in row["failed"]
            found.add(case.labels["op"])
    assert found == WRONG[op]


# --- the build, the tests, what is printed


def test_one_architecture_is_built(monkeypatch):
    listed = "compute_80\ncompute_90\ncompute_120\n"
    monkeypatch.setattr(build.subprocess, "check_output", lambda *_, **__: listed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, wanted in (((8, 0), "80-real"), ((9, 0), "90a-real"), ((12, 0), "120-real")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert build.architecture("nvcc") == [f"-DBIFLOW_CUDA_ARCHITECTURES={wanted}"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (13, 0))
    assert build.architecture("nvcc") == []  # an nvcc that does not know it
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(SystemExit, match=r"8\.0 or newer, got 7\.5"):
        build.architecture("nvcc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build.architecture("nvcc") == []


def test_tests_that_matter_run_first_and_say_at_once_what_failed(tmp_path):
    (tmp_path / "kernels").mkdir()
    for name in ("test_a.py", "kernels/test_b.py", "kernels/test_sequential.py"):
        (tmp_path / name).write_text("def test_it():\n    assert 1 == 2, 'two'\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.first_failures"]
    done = subprocess.run(
        [*command, "-c", "/dev/null", f"--rootdir={tmp_path}", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith("FAILED ") and ": Assertion" in line]
    assert said == [
        f"FAILED {name}::test_it: AssertionError: two" for name in
        ("kernels/test_sequential.py", "kernels/test_b.py", "test_a.py")
    ]  # fmt: skip
    (first, *others) = summary.failed("tests", {"output": done.stdout})
    assert first == "failed: kernels/test_sequential.py::test_it: AssertionError: two"
    assert len(others) == 2
    assert all((ROOT / "tests" / "kernels" / name).exists() for name in first_failures.FIRST)


def test_the_table_is_short():
    """What decides, in few lines, whatever failed."""
    rows = [
        {"decode": name, "batch": batch, "precision": precision, "who": who, "us_step": 1.5, "ms_image": 2.0,
         "percent_of_limit": 3.0, "percent_of_read": 4.0, "error": 1e-4, "steps": 9,
         **({"method": "jacobi"} if who == "auto" else {"x_sequential": 5.0})}
        for name, batch in (*summary.DECIDING, ("S", 1)) for precision in ("bf16", "fp32")
        for who in ("sequential", "auto", "eager", "graph")
    ]  # fmt: skip
    table = summary.decodes(rows)
    assert len(table) == 2 * len(summary.DECIDING)
    assert table[0] == {
        "decode": "B/2", "batch": 1, "precision": "bf16", "us_step": 1.5, "ms_image": 2.0, "percent_of_limit": 3.0,
        "percent_of_read": 4.0, "error": 1e-4, "ms_auto": 2.0, "auto": "jacobi", "x_eager": 5.0, "x_graph": 5.0,
    }  # fmt: skip
    bad = [{"decode": "S", "batch": i, "precision": "bf16", "who": "eager", "failed": "x" * 500} for i in range(300)]
    part = {"status": "failed", "rows": rows + bad, "output": "y" * 5000, "seconds": 1.0}
    about = {"device": "d", "torch": "t", "commit": "c", "date": "now"}
    lines = summary.summary(about, {"decode": part, "racecheck": {"status": "skipped", "output": "no tool"}})
    assert len(lines) < 30
    assert sum(map(len, lines)) < 6000
    assert "and 290 more that failed: in the JSON" in lines
    assert lines[-1].split() == ["racecheck", "skipped", "0", "s", "no", "tool"]
