"""The rows of whole decodes in gpu-check, on tiny flows: what is timed, what is refused, what is left out."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ml_tarflow_checkout import CHECKOUT
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import decode, others, phases, subject  # noqa: E402
from benchmarks.gpu.measure import measure  # noqa: E402
from benchmarks.gpu.timing import Timer  # noqa: E402
from biflow.models.block import Block  # noqa: E402
from biflow.solvers import Condition, Entry, Measurement, Method, Policy  # noqa: E402

LIMITS = [
    {"limit": "copy", "gb_s": 1000.0},
    {"limit": "bf16 GEMM", "tflop_s": 100.0},
    {"limit": "fp32 GEMM", "tflop_s": 10.0},
]
MACHINE = [
    {"number": "grid barrier, release flag", "blocks": 132, "us": 1.0},
    {"number": "weights read by all", "mb": 0.01, "blocks": 132, "gb_s": 3000.0},
    {"number": "weights read by all", "mb": 0.01, "blocks": 528, "gb_s": 4000.0},
    {"number": "weights read by all", "mb": 1.0, "blocks": 132, "gb_s": 2000.0},
]


@pytest.fixture
def bench(monkeypatch):
    """Tiny flows of 16 tokens, of which the first 4 are the prefix; peers are not timed for seconds."""
    monkeypatch.setattr(subject, "SHORT", 4)
    monkeypatch.setattr(others, "SECONDS", 0.01)
    return decode.Bench(Timer(torch.device("cpu")), LIMITS, MACHINE, True, None)


# --- the plan


def labels(dry, ml_tarflow=None):
    timer = SimpleNamespace(device=torch.device("cuda"))  # nothing is made before a case runs
    return [case.labels for case in decode.cases(timer, [], [], dry, ml_tarflow, [])]


def test_the_plan_has_every_flow_batch_and_contestant_and_begins_with_what_decides():
    rows = labels(dry=False, ml_tarflow="path")
    keys = [tuple(row.items()) for row in rows]
    assert len(set(keys)) == len(keys)
    found = {(r["decode"], r["batch"], r["precision"], r["who"]) for r in rows if "decode" in r}
    for name in ("S", "B/2", "TARFlow-64", "AFHQ"):
        for batch in (1, 8, 16, 64, 256):
            for who in ("sequential", "auto"):
                assert {(name, batch, p, who) for p in ("fp32", "bf16")} <= found
            assert {(name, batch, "bf16", who) for who in ("jacobi", "eager", "graph")} <= found
    assert {who for *_, who in found} == {*decode.OURS, *others.CONTESTANTS}
    first = [(r["decode"], r["batch"], r["who"]) for r in rows[:15]]
    assert first == [
        (name, batch, who)
        for name, batch in (("B/2", 1), ("B/2", 64), ("B/2", 256), ("TARFlow-64", 1), ("TARFlow-64", 64))
        for who in ("sequential", "auto", "eager")
    ]
    assert {r["phases"] for r in rows if "phases" in r} == {"B/2", "TARFlow-64"}
    assert "ml-tarflow" not in {row.get("who") for row in labels(dry=False)}


def test_a_dry_run_has_everybody():
    rows = labels(dry=True, ml_tarflow="path")
    assert {row.get("who") for row in rows} == {*decode.OURS, *others.CONTESTANTS, None}
    assert {row.get("decode") for row in rows} == {"S", "B/2", "TARFlow-64", "AFHQ", None}
    assert {row["batch"] for row in rows} == {1, 2}


def test_slow_starters_need_time():
    timer = SimpleNamespace(device=torch.device("cuda"))
    needs = {c.labels.get("who"): c.needs for c in decode.cases(timer, [], [], False, "path", [])}
    assert needs["compiled"] > needs["ml-tarflow"] > needs["sequential"] == 0


# --- what bounds a step


def test_the_limit_is_the_longer_of_reading_and_computing(bench):
    block = bench.subject("B/2").block  # 16 tokens of 16 channels, width 64, one layer
    weights = 12 * 64**2 + 16 * 64 + 64 * 32
    cache = 2 * 64 * 8  # keys and values of half of the tokens
    for precision, size in (("fp32", 4), ("bf16", 2)):
        for batch in (1, 3):
            assert decode.step_bytes(block, batch, precision) == size * (weights + batch * cache)
    size = 2 * (weights + cache)
    seconds = 1e-6
    row = decode.limit_columns(bench, block, 1, "bf16", seconds)
    assert row["bound_by"] == "memory"
    assert row["limit_us"] == pytest.approx(size / 1e12 * 1e6)
    assert row["percent_of_limit"] == pytest.approx(100 * size / 1e12 / seconds)
    assert row["percent_of_read"] == pytest.approx(100 * size / 2e12 / seconds)  # 0.1 MB: the set of 1 MB
    flops = 2 * 1000 * (weights + 64 * 16)
    slow = {"limit": "fp32 GEMM", "tflop_s": 0.01}
    bench.limits = [*LIMITS[:2], slow]
    row = decode.limit_columns(bench, block, 1000, "fp32", seconds)
    assert row["bound_by"] == "GEMM"
    assert row["limit_us"] == pytest.approx(flops / 1e10 * 1e6)
    assert row["percent_of_read"] == pytest.approx(row["percent_of_limit"])
    bench.machine = []
    assert "percent_of_read" not in decode.limit_columns(bench, block, 1, "bf16", seconds)
    bench.limits = []
    assert decode.limit_columns(bench, block, 1, "bf16", seconds) == {}


def test_the_rate_is_that_of_the_next_larger_set():
    assert decode.read_rate(MACHINE, 5e3) == 4e12  # the best of both
    assert decode.read_rate(MACHINE, 0.5e6) == 2e12
    assert decode.read_rate(MACHINE, 5e9) == 2e12
    assert decode.read_rate(MACHINE[:1], 1.0) is None


# --- parity


def test_no_speed_of_a_wrong_result(bench, monkeypatch):
    """z itself is nearly right where the coupling is mild: the bound is a share of what the decode changes."""
    s = bench.subject("B/2")
    z = s.z(3)
    right = s.block.decode_sequential(z, Condition())
    assert (right - z).square().mean().sqrt() < 0.3 * z.square().mean().sqrt()
    for wrong in (z, right + 0.2 * (right - z), right * torch.nan):
        for verify in (lambda x: s.check_first(x[:, :4], "bf16"), lambda x: s.check_block(x, z, "bf16")):
            assert verify(right) < 1e-5
            with pytest.raises(subject.WrongResult, match="what the decode changes, got"):
                verify(wrong)
    slightly = right + 0.02 * (right - z)
    assert s.check_block(slightly, z, "bf16") == pytest.approx(0.02, rel=0.3)
    with pytest.raises(subject.WrongResult):
        s.check_block(slightly, z, "fp32")
    # a wrong token beyond the first ones, in the last sample
    wrong = right.clone()
    wrong[-1, 12] += 1
    s.check_first(wrong[:, :4], "fp32")
    with pytest.raises(subject.WrongResult):
        s.check_block(wrong, z, "fp32")

    monkeypatch.setattr(Block, "decode_sequential", lambda self, z, condition: z.clone())
    with pytest.raises(subject.WrongResult):
        decode.ours(bench, "B/2", 2, "bf16", "sequential")


def test_a_whole_decode_is_checked_beyond_its_first_block(bench, monkeypatch):
    """That the block that stands for the others is right does not make a flow right."""
    right = Block.decode_sequential

    def one_is_wrong(self, z, condition):
        return z.clone() if self.config.flip else right(self, z, condition)

    monkeypatch.setattr(Block, "decode_sequential", one_is_wrong)
    with pytest.raises(subject.WrongResult, match=r"expected encode\(x\) within"):
        decode.ours(bench, "B/2", 2, "fp32", "sequential")


def test_later_tokens_are_checked_where_one_block_is_timed(bench, monkeypatch):
    right = Block.decode_sequential

    def wrong_later(self, z, condition):
        x = right(self, z, condition)
        x[:, 12:] += 1
        return x

    monkeypatch.setattr(Block, "decode_sequential", wrong_later)
    monkeypatch.setattr(decode, "expected", lambda *arguments: decode.LIMIT)  # one block
    with pytest.raises(subject.WrongResult, match=r"expected G\(x\) within"):
        decode.ours(bench, "B/2", 2, "fp32", "sequential")
    with pytest.raises(subject.WrongResult, match=r"expected G\(x\) within"):
        phases.phases(bench.subject("B/2"), 2, "fp32")


def test_the_first_tokens_are_a_block_of_their_own(bench):
    s = bench.subject("AFHQ")
    assert s.first(16) is s.block
    assert s.first(4) is s.first(4)
    z = s.z(2)
    got = s.first(4).decode_sequential(s.z(2, 4), Condition())
    torch.testing.assert_close(got, s.block.decode_sequential(z, Condition())[:, :4], rtol=1e-5, atol=1e-5)


# --- rows of ours


@pytest.mark.parametrize(("precision", "who"), [("fp32", "sequential"), ("bf16", "jacobi"), ("fp32", "auto")])
def test_ours(bench, precision, who):
    row = decode.ours(bench, "B/2", 2, precision, who)
    assert (row["steps_timed"], row["steps"]) == (30, 30)
    assert row["ms_image"] == pytest.approx(row["us_step"] * 30 / 2 / 1e3)
    assert 0 < row["error"] < subject.BOUNDS[precision]
    assert row["percent_of_limit"] == pytest.approx(100 * row["limit_us"] / row["us_step"])
    assert bench.known["B/2", 2, precision, who] == row["us_step"]
    assert ("method" in row) == (who == "auto")


@pytest.mark.parametrize(("guess", "timed"), [(1.0, 30), (2.0, 15), (7.0, 3)])
def test_what_takes_too_long_is_timed_in_part(bench, monkeypatch, guess, timed):
    """Two decodes of two blocks, one block, its first tokens."""
    monkeypatch.setattr(decode, "LIMIT", 6.0)
    monkeypatch.setattr(decode, "expected", lambda *arguments: guess)
    row = decode.ours(bench, "B/2", 2, "fp32", "sequential")
    assert (row["steps_timed"], row["steps"]) == (timed, 30)
    assert row["ms_image"] == pytest.approx(row["us_step"] * 30 / 2 / 1e3)
    iterated = decode.ours(bench, "B/2", 2, "fp32", "jacobi")
    if timed == 3:  # an iteration on few tokens tells nothing
        assert iterated == {"left_out": "one block would take about 7 s"}
    else:
        assert iterated["steps_timed"] == timed


def test_expectations_grow_with_what_the_first_tokens_do_not_see(bench):
    def guess(name, batch, who, seconds=1e-3, window=None):
        return decode.expected(bench, bench.subject(name).block, batch, "bf16", Method(who, window), seconds, 4)

    block = bench.subject("B/2").block
    assert guess("B/2", 1, "sequential") == pytest.approx(15 * 1e-3 / 3, rel=0.01)
    assert guess("B/2", 10**9, "sequential") > 2 * guess("B/2", 10**8, "sequential") > 1
    assert guess("B/2", 1, "jacobi") == pytest.approx(2e-3, rel=0.1)
    assert guess("B/2", 10**9, "jacobi") > 1
    assert guess("B/2", 1, "windowed", window=4) == pytest.approx(4 * 2e-3, rel=0.1)
    bench.limits = []
    assert guess("B/2", 1, "jacobi") == pytest.approx(2e-3 + 2 * 1e-3 * block.tokens / 4)


def test_auto_follows_a_calibration_of_one_block(bench, monkeypatch):
    measured = []

    def calibrate(flow, *, batches, precisions, tol, repetitions):
        measured.append((batches, precisions, repetitions))
        assert list(flow.blocks) == [bench.subject("B/2").block]
        block = Measurement("windowed", 8, 4, 1.0)
        return Policy((Entry("cpu", "it", 1, precisions[0], batches[0], 0.0, (block,)),))

    monkeypatch.setattr(decode, "calibrate", calibrate)
    monkeypatch.setattr(decode, "CALIBRATION", 12.0)
    bench.known["B/2", 2, "fp32", "sequential"] = 1000.0
    row = decode.ours(bench, "B/2", 2, "fp32", "auto")
    assert (row["method"], row["calibrated_at"]) == ("windowed 8", 2)
    assert row["ms_image_mixed"] == pytest.approx((row["us_step"] + 1000.0) * 15 / 2 / 1e3)
    assert [m.window for m in bench.subject("B/2").flow.policy.entries[0].blocks] == [8, 8]
    # a block of 2 s: eighteen runs are too many, so the batch nearest to it must do
    bench.known["B/2", 64, "fp32", "sequential"] = 2e6 / 15
    row = decode.ours(bench, "B/2", 64, "fp32", "auto")
    assert row["calibrated_at"] == 2
    assert measured == [((2,), ("fp32",), 3)]
    bench.known["B/2", 64, "bf16", "sequential"] = 2e6 / 15
    assert decode.ours(bench, "B/2", 64, "bf16", "auto") == {"left_out": "no calibration within 12 s"}


# --- others


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("who", ["eager", "static", "graph", "compiled", "launches"])
def test_others_decode_the_first_tokens_and_as_many_as_fit(bench, who, precision, monkeypatch):
    monkeypatch.setattr(others, "SECONDS", 60.0)
    bench.known["S", 2, precision, "sequential"] = 2.0
    row = decode.other(bench, "S", 2, precision, who)
    assert (row["steps_timed"], row["steps"]) == (15, 30)
    assert row["x_sequential"] == pytest.approx(row["us_step"] / 2.0)
    assert "x_auto" not in row
    assert row["error"] <= subject.BOUNDS[precision]
    monkeypatch.setattr(others, "SECONDS", 0.0)
    assert decode.other(bench, "S", 2, precision, who)["steps_timed"] == 3


def test_ml_tarflow_is_a_contestant(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "SHORT", 16)  # the oracle behind it takes whole sequences
    (tmp_path / "transformer_flow.py").write_text(CHECKOUT)
    bench.ml_tarflow = str(tmp_path)
    row = decode.other(bench, "S", 2, "fp32", "ml-tarflow")
    assert (row["steps_timed"], row["error"] < 1e-4) == (15, True)
    wrong = CHECKOUT.replace("* torch.exp(a[:, t - 1])", "* torch.exp(1.1 * a[:, t - 1])")
    (tmp_path / "transformer_flow.py").write_text(wrong)
    with pytest.raises(subject.WrongResult):
        decode.other(bench, "S", 2, "fp32", "ml-tarflow")


# --- the split by phase


def test_kernel_names():
    assert phases.short_name("void biflow::(anonymous namespace)::qkv<float, Tile<2, 8>>(biflow::Params)") == "qkv"
    assert (
        phases.short_name("void biflow::cuda::decode_block_kernel<__nv_bfloat16, 1>(State, Place, bool)")
        == phases.KERNEL
    )
    assert phases.short_name("sm90_xmma_gemm_bf16") == "sm90_xmma_gemm_bf16"
    assert phases.short_name("triton_poi_fused_0") == "triton_poi_fused_0"
    assert phases.short_name("Memset (Device)") == "Memset"
    source = " ".join((ROOT / "csrc" / "cuda" / "decode_block.cuh").read_text().split())
    assert f"__global__ void __launch_bounds__(kDecodeThreads, 1) {phases.KERNEL}(" in source


def test_spans_are_of_the_device_and_in_order():
    def event(name, start, us, kind):
        span = SimpleNamespace(start=start, elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=kind, time_range=span, self_cpu_time_total=us / 2)

    events = [event("b", 2, 5.0, DeviceType.CUDA), event("aten::mm", 0, 9.0, DeviceType.CPU)]
    events += [event("void n::a<1>(P)", 1, 3.0, DeviceType.CUDA)]
    assert phases.spans(events, on_gpu=True) == [("a", 3.0), ("b", 5.0)]
    assert phases.spans(events, on_gpu=False) == [("mm", 4.5)]


def test_launches_of_one_kernel_are_told_apart_by_their_place():
    names = ["embed", "qkv", "attention", "qkv", "attention", "head"]
    step = [1.0, 10.0, 20.0, 10.0, 20.0, 4.0]
    found = [("Memset", 5.0), *((phases.KERNEL, us) for us in [*step, *step, 1.0])]
    rows = phases.split(found, 2, names)
    assert [(r["kernel"], r["us_step"], r["calls_step"]) for r in rows] == [
        ("attention", 40.0, 2.0), ("qkv", 20.0, 2.0), ("head", 4.0, 1.0), ("Memset", 2.5, 0.5), ("embed", 1.5, 1.5),
    ]  # fmt: skip
    assert sum(row["percent"] for row in rows) == pytest.approx(100)
    (memset, together) = sorted(phases.split(found[:-1], 2, names), key=lambda row: row["us_step"])
    assert (together["kernel"], together["us_step"], memset["kernel"]) == (phases.KERNEL, 65.0, "Memset")


def test_a_split_is_short():
    rows = phases.split([(f"k{i}", 1.0 + i) for i in range(20)], 1, [])
    assert (len(rows), rows[0]["kernel"], rows[-1]["kernel"]) == (phases.ROWS + 1, "k19", "others")
    assert sum(row["us_step"] for row in rows) == pytest.approx(sum(range(1, 21)))
    with pytest.raises(RuntimeError, match="expected kernels in the profile, got none"):
        phases.split([], 1, [])


def test_phases_of_a_decode(bench):
    rows = phases.phases(bench.subject("B/2"), 2, "bf16")
    (row,) = (row for row in rows if row["kernel"] == "decode_block_")  # on the CPU it is one op
    assert row["calls_step"] == pytest.approx(1 / 15)
    assert sum(row["percent"] for row in rows) == pytest.approx(100)


# --- in the measuring process


def test_rows_know_what_rows_before_told(bench, tmp_path, monkeypatch):
    """Also those of a process that a row made hang."""
    before = [{"decode": "S", "batch": 1, "precision": "bf16", "who": "sequential", "us_step": 2.0}]
    monkeypatch.setattr(decode, "PLAN", (((("S", 1),), (("eager", "bf16"), ("phases", "bf16"))),))
    cases = decode.cases(bench.timer, LIMITS, [], True, None, before)
    eager, *split = measure(cases, tmp_path / "rows.jsonl")
    assert eager["x_sequential"] == pytest.approx(eager["us_step"] / 2.0)
    assert {row["phases"] for row in split} == {"S"}
