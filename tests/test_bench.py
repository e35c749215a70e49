"""The decode benchmark on tiny flows: rows, files, peers, limits, and that no wrong result gets a time."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ml_tarflow_checkout import CHECKOUT
from tiny import make_flow, make_reverse, noise
from tiny_training import write_images

import biflow
from biflow import cli, solvers
from biflow.cli import tools
from biflow.models.layers import patchify

NAMES = ("bench_decode", "bench_decode_block", "bench_encode", "bench_pseudo_reverse", "bench_sampling",
         "calibrated", "flows", "limits", "timing", "peers.compiled", "peers.ml_tarflow")  # fmt: skip


@pytest.fixture(scope="module")
def b():
    """The modules of benchmarks/, by their names with dots as underscores."""
    tools._import("bench_decode")
    return SimpleNamespace(
        **{name.replace(".", "_"): importlib.import_module(f"{tools.PACKAGE}.{name}") for name in NAMES}
    )


@pytest.fixture
def quick_limits(b, monkeypatch):
    """Limits at once: most tests are not about them."""

    def measure(sizes, quick):
        rows = [{"limit": "read", "mb": s / 1e6, "threads": 1, "gb_s": 50.0, "how": "sum"} for s in sorted(set(sizes))]
        gemms = {"fp32 GEMM": 100.0, "bf16 GEMM": 200.0}
        rows += [{"limit": k, "threads": 1, "gflop_s": v, "how": "1x1x1"} for k, v in gemms.items()]
        return b.limits.Limits(rows)

    monkeypatch.setattr(b.limits, "measure", measure)


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "ml-tarflow"
    folder.mkdir()
    (folder / "transformer_flow.py").write_text(CHECKOUT)
    return folder


@pytest.fixture
def model(tmp_path):
    """A flow that every peer can decode, in a file."""
    biflow.save(make_flow(width=64, head_dim=64, num_blocks=2, num_classes=3), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_command_writes_rows_limits_table_markdown_and_plot(model, checkout, tmp_path, capsys):
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "png", "md")}
    words = ["--quick", "--model", str(model), "--batches", "1,3", "--threads", "1", "--peer-ml-tarflow", str(checkout)]
    words += ["--json", str(files["json"]), "--plot", str(files["png"]), "--markdown", str(files["md"])]
    assert cli.main(["bench", "--op", "decode", *words]) == 0
    printed = capsys.readouterr().out
    found = json.loads(files["json"].read_text())
    assert set(found) == {"machine", "limits", "wrong", "rows"}
    assert found["wrong"] == []
    assert {"cpu", "cores", "threads", "torch", "commit", "date"} <= set(found["machine"])
    assert {row["limit"] for row in found["limits"]} == {"read", "fp32 GEMM", "bf16 GEMM"}
    assert all(min(row["first"], row["last"]) > 0 for row in found["limits"])
    ways = [s for s in solvers.SOLVERS if s != "windowed"]
    want = [("biflow", s, p) for p in solvers.PRECISIONS for s in ways]
    want += [("eager", "sequential", "fp32"), ("ml-tarflow", "sequential", "fp32")]
    rows = found["rows"]
    keys = ("contestant", "solver", "precision")
    assert [tuple(r[k] for k in ("batch", *keys)) for r in rows] == [(n, *w) for n in (1, 3) for w in want]
    for row in rows:
        assert (row["op"], row["config"], row["steps"], row["error_against"]) == ("decode", "tiny", 2 * 3, "fp64")
        assert row["blocks_timed"] == row["blocks"] == 2
        assert row["ms_image"] * row["batch"] == pytest.approx(row["ms"])
        assert row["us_step"] * row["steps"] == pytest.approx(1e3 * row["ms"])
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit_us_step"] / row["us_step"])
        assert min(row["ms"], row["limit_us_step"], row["x_eager"], row["x_ml_tarflow"]) > 0
        assert row["x_eager"] == 1 or row["contestant"] != "eager"
        assert row["max_error"] >= row["rms_error"] >= 0
        assert ("error_over_allowed" in row) == (row["precision"] == "fp32")
        assert row["contestant"] != "eager" or 0 < row["error_over_allowed"] < 0.5
        assert ("residual" in row) == ("block_passes" in row) == (row["contestant"] == "biflow")
    text = files["md"].read_text()
    table = [line for line in text.splitlines() if line.startswith("| tiny ")]
    assert len(table) == len(rows)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert found["machine"]["cpu"] in text
    assert sum("fp64" in line for line in printed.splitlines()) == len(rows)
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_make_bench_leaves_rows_plot_and_table_in_build(model, tmp_path, monkeypatch):
    makefile = Path(__file__).parents[1].joinpath("Makefile").read_text()
    (line,) = re.findall(r"^\t\$\(BIN\)/biflow (bench.*)$", makefile, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    small = ["--quick", "--model", str(model), "--batches", "1", "--precisions", "fp32", "--solvers", "sequential"]
    assert cli.main([*line.split(), *small]) == 0
    assert sorted(p.name for p in (tmp_path / "build").iterdir()) == ["decode.json", "decode.md", "decode.png"]


def test_configs_of_the_paper_have_the_limits_of_their_shapes(b):
    """Weight bytes as the shapes give them, and the longer of reading and computing."""
    flow = b.flows.random_flow("S")
    block = flow.blocks[0]
    weights = 2 * 12 * 128**2 + 4 * 128 + 128 * 8
    assert b.bench_decode.weight_bytes(block, "fp32") == 4 * weights
    assert b.bench_decode.weight_bytes(block, "bf16") == 2 * weights
    attention = 2 * 2 * 2 * 128 * 8  # two products, two FLOPs each, two layers, half of 16 tokens
    assert b.bench_decode.step_flops(block, 3) == 3 * (2 * weights + attention)
    assert b.bench_decode.steps_work(flow, 3, "bf16") == [(15, 2 * weights, 3 * (2 * weights + attention))] * 4
    rows = [{"limit": "read", "mb": 2.0, "gb_s": 20.0}, {"limit": "read", "mb": 2.0, "gb_s": 40.0}]
    rows += [{"limit": "read", "mb": 1.0, "gb_s": 80.0}]
    rows += [{"limit": "fp32 GEMM", "gflop_s": 100.0}, {"limit": "bf16 GEMM", "gflop_s": 50.0}]
    measured = b.limits.Limits(rows)
    assert measured.step_seconds(2_000_000, 1e6, "fp32") == pytest.approx(50e-6)
    assert measured.step_seconds(2_000_000, 1e7, "fp32") == pytest.approx(100e-6)
    assert measured.step_seconds(1_000_000, 1e7, "bf16") == pytest.approx(100e-6)  # widened where that is faster


def test_every_precision_has_a_limit(b):
    assert set(solvers.PRECISIONS) <= set(b.limits.PRECISIONS)


def test_limits_are_measured_and_the_better_one_counts(b):
    first = b.limits.measure([1 << 16, 1 << 16, 1 << 20], quick=True)
    assert [(row["limit"], row.get("mb")) for row in first.rows] == [
        ("read", 2**16 / 1e6), ("read", 2**20 / 1e6), ("fp32 GEMM", None), ("bf16 GEMM", None),
    ]  # fmt: skip
    assert all(row["how"] in b.limits.READS and row["gb_s"] > 0.1 for row in first.rows[:2])
    assert all(row["gflop_s"] > 0.1 for row in first.rows[2:])
    assert torch.get_num_threads() == 1
    last = b.limits.Limits([dict(row) for row in first.rows])
    last.rows[0]["gb_s"] *= 2
    last.rows[3]["gflop_s"] /= 2
    best = b.limits.best(first, last).rows
    assert (best[0]["gb_s"], best[0]["first"]) == (last.rows[0]["gb_s"], first.rows[0]["gb_s"])
    assert (best[3]["gflop_s"], best[3]["last"]) == (first.rows[3]["gflop_s"], last.rows[3]["gflop_s"])


def test_read_bandwidth_leaves_the_number_of_threads(b):
    rate, how = b.limits.read_bandwidth(1 << 18, threads=2, seconds=0.002, turns=1)
    assert rate > 0
    assert how in b.limits.READS
    assert torch.get_num_threads() == 1


def test_ratio_pairs_the_turns(b):
    assert b.timing.ratio([1.0, 2.0, 4.0], [3.0, 6.0, 12.0]) == 3.0  # a machine that slows down
    assert b.timing.ratio([1.0, 1.0, 2.0], [5.0, 2.0, 2.0]) == 2.0


def test_turns_rotate(b):
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    times = b.timing.turns(functions, rounds=3, sample_s=0)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert order[6::2] == list("abcbcacab")  # after two calls of each; each turn warms up with one


# --- parity ---------------------------------------------------------------------------------------------------------


def test_contestants_in_part(b, quick_limits, model, checkout, monkeypatch):
    """Peers that take too long are timed on one block; their parity is that of the state after one block."""
    monkeypatch.setattr(b.bench_decode, "TRUNCATE_S", 0.0)
    monkeypatch.setattr(b.bench_decode, "FP64_S", 0.0)
    options = {"model": model, "batches": [2], "ml_tarflow_path": str(checkout), "solver_names": ["sequential"]}
    rows = b.bench_decode.run(True, **options)["rows"]
    timed = {row["contestant"]: row["blocks_timed"] for row in rows}
    assert timed == {"biflow": 2, "eager": 1, "ml-tarflow": 1}
    assert {row["error_against"] for row in rows} == {"eager"}
    rows = b.bench_decode.run(True, full=True, **options)["rows"]
    assert {row["blocks_timed"] for row in rows} == {2}


def test_wrong_results_have_no_time(model, checkout, tmp_path, capsys):
    text = CHECKOUT.replace("* torch.exp(a[:, t - 1])", "* torch.exp(1.01 * a[:, t - 1])")
    assert text != CHECKOUT
    (checkout / "transformer_flow.py").write_text(text)
    words = ["--quick", "--model", str(model), "--batches", "1", "--peer-ml-tarflow", str(checkout)]
    assert cli.main(["bench", "--op", "decode", *words, "--json", str(tmp_path / "rows.json")]) == 1
    pattern = r"tiny, batch 1, ml-tarflow: expected a largest error of at most \S+ against fp64, got \S+: not timed"
    assert re.search("RuntimeError: wrong results: " + pattern, capsys.readouterr().err)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert "eager" in {row["contestant"] for row in found["rows"]}
    assert "ml-tarflow" not in {row["contestant"] for row in found["rows"]}
    assert re.fullmatch(pattern, *found["wrong"])


def test_bounds_of_errors(b):
    x = torch.linspace(-4, 4, 24, dtype=torch.float64).view(2, 3, 4)
    exact = b.bench_decode.Reference([x], "fp64", 0.0)

    def check(error, reference=exact, precision="fp32", **options):
        wrong = x.clone()
        wrong[1, 2, 3] += error
        return b.bench_decode.check("it", wrong, reference, 1, precision, **options)

    assert check(3e-5)["max_error"] == pytest.approx(3e-5)
    for error, options in ((5e-5, {}), (5e-3, {"iterative": True}), (2.0, {"precision": "bf16"}), (torch.nan, {})):
        with pytest.raises(b.bench_decode.WrongResult, match="not timed"):
            check(error, **options)
    check(3e-3, iterative=True)
    assert "error_over_allowed" not in check(0.5, precision="bf16")
    rounding, eps = b.bench_decode.Reference([x], "fp64", 1e-6), torch.finfo(torch.float32).eps
    assert check(3e-6, rounding)["error_over_allowed"] == pytest.approx(3e-6 / (2e-6 + 4 * eps), rel=1e-6)
    assert "error_over_allowed" not in check(3e-6, b.bench_decode.Reference([x], "eager"))
    check(5e-5, b.bench_decode.Reference([x], "fp64", 1e-5))  # a flow that amplifies eager's rounding, too


# --- peers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 3])
def test_compiled_peer_equals_decode(b, classes):
    flow = make_flow(width=32, head_dim=16, num_blocks=3, layers_per_block=2, num_classes=classes)
    y = torch.tensor([0, -1, 2, 1]) if classes else None
    z = noise(flow)
    want = flow.decode(z, y)
    peer = b.peers_compiled.compiled(flow, y, len(z), backend="eager")
    for _ in range(2):  # the second finds what the first left in the caches
        got = peer.decode(flow, z, 3)
        torch.testing.assert_close(got, patchify(want, 2), rtol=1e-5, atol=2e-5)
    assert "eager" in peer.notes["compile"]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_static_peer_decodes_the_first_tokens_of_a_block(b, dtype, bound):
    """In block order: of a flipped block the last ones. What an earlier call left in the caches is masked."""
    flow = make_flow(width=32, head_dim=16, num_blocks=2, layers_per_block=2)
    z = noise(flow)
    peer = b.peers_compiled.static_cache(flow, None, len(z), backend=None, dtype=dtype)
    assert peer.name == "static"
    for i, block in enumerate(flow.blocks):
        want = block.decode_sequential(z, solvers.Condition())
        for part in (slice(None), slice(1, None) if i else slice(3)):
            got = peer.decode_block(i, z[:, part].contiguous())
            assert got.dtype == torch.float32
            assert (got - want[:, part]).abs().max() <= bound
    assert (want - z).abs().max() > 0.1


def test_a_graph_needs_a_gpu(b):
    with pytest.raises(ValueError, match="graph: expected a flow on a GPU, got one on cpu"):
        b.peers_compiled.static_cache(make_flow(), None, 1, graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("graph", [False, True])
def test_static_peer_on_a_gpu(b, graph):
    flow = make_flow(width=32, head_dim=16, num_blocks=2, layers_per_block=2)
    z = noise(flow)
    want = [block.decode_sequential(z, solvers.Condition()) for block in flow.blocks]
    peer = b.peers_compiled.static_cache(flow.cuda(), None, len(z), backend=None, graph=graph)
    for _ in range(2):
        for i, x in enumerate(want):
            torch.testing.assert_close(peer.decode_block(i, z.cuda()).cpu(), x, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_compile_is_an_option(model, capsys):
    words = [
        "--quick",
        "--model",
        str(model),
        "--batches",
        "2",
        "--solvers",
        "auto",
        "--compile",
        "--precisions",
        "fp32",
    ]
    assert cli.main(["bench", "--op", "decode", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines if line.split()[:1] == ["tiny"]] == ["biflow", "eager", "compiled"]


@pytest.mark.parametrize(
    "change", [{"rope": True}, {"norm": "rmsnorm"}, {"start_token": True}, {"clip": ("hard", 1.0)}]
)
def test_peers_refuse_what_they_cannot_decode(b, checkout, change):
    flow = make_flow(width=64, head_dim=64, **change)
    compiled, ml_tarflow = b.peers_compiled.compiled, b.peers_ml_tarflow.ml_tarflow
    for make in (lambda: compiled(flow, None, 1), lambda: ml_tarflow(flow, None, checkout)):
        with pytest.raises(ValueError, match=f"{next(iter(change))}: .* only, got"):
            make()
    with pytest.raises(ValueError, match="head_dim: ml-tarflow has 64 only, got 8"):
        ml_tarflow(make_flow(), None, checkout)


CHECKOUTS = {
    "no such folder": (None, "expected a checkout of github.com/apple/ml-tarflow, got .* has no transformer_flow"),
    "no model": ("x = 1", "expected a class Model in .*, got none"),
    "not importable": ("import no_such_module_here", r"cannot be imported \(ModuleNotFoundError"),
    "another model": ("class Model:\n    def __init__(self, width): pass", "has another Model than expected"),
    "other weights": (
        "import torch\nclass Model(torch.nn.Linear):\n    def __init__(self, **k): super().__init__(1, 1)",
        "has another Model than expected .*loading state_dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("code", "message"), CHECKOUTS.values(), ids=CHECKOUTS.keys())
def test_wrong_checkouts_are_named(b, model, tmp_path, code, message):
    path = tmp_path / "peer"
    if code is not None:
        path.mkdir()
        (path / "transformer_flow.py").write_text(code)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s)peer ml-tarflow: .*{message}"):
        b.peers_ml_tarflow.ml_tarflow(biflow.load(model), None, path)


BAD = {
    "wrong checkout": ("--op decode --quick --peer-ml-tarflow {tmp}/none", "expected a checkout of github.com/apple"),
    "config": ("--op decode --configs S,XL", "configs: expected some of S, M, L, B/2, got 'XL'"),
    "batch": ("--op decode --batches 1,two", "--batches: expected integers with commas between them, got '1,two'"),
    "no batch": ("--op decode --batches 0", "batches: expected numbers of at least 1, got 0"),
    "precision": ("--op decode --precisions fp8", "precisions: expected some of fp32"),
    "solver": ("--op decode --solvers newton", "solvers: expected some of sequential"),
    "window": ("--op decode --solvers sequential:wide", "or name:window, got 'sequential:wide'"),
    "no model": ("--op decode --model {tmp}/none.safetensors", "no such file"),
    "model and configs": ("--op decode --model {model} --configs S", "model: expected without configs"),
    "option of another": ("--op affine --compile", "--op affine: expected without options of decode"),
    "no folder": ("--op decode --plot {tmp}/none/p.png", "--plot: expected an existing folder"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_options_are_one_line(line, message, model, tmp_path, capsys):
    assert cli.main(["bench", *[word.format(tmp=tmp_path, model=model) for word in line.split()]]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_encode_against_torch(b, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(b.flows.CONFIGS, "S", b.flows.CONFIGS["S"] | {"num_blocks": 2, "layers_per_block": 1})
    rows = b.bench_encode.run(quick=True, configs=["S"], batches=[2, 3])
    assert [(r["batch"], r["by"], r["precision"]) for r in rows] == [
        (n, *way) for n in (2, 3) for way in (("torch", "fp32"), ("packed", "fp32"), ("packed", "bf16"))
    ]
    for row in rows:
        assert (row["op"], row["config"]) == ("encode", "S")
        assert min(row["ms"], row["x_torch"], row["bits_per_dim_error"]) > 0
        assert 0 < row["z_rms_error"] <= b.bench_encode.BOUNDS[row["precision"]]
        assert row["x_torch"] == 1 or row["by"] == "packed"
    with pytest.raises(ValueError, match="configs: expected some of S, M, L, B/2, got 'XL'"):
        b.bench_encode.run(configs=["XL"])


def test_a_wrong_encode_has_no_time(b, monkeypatch):
    monkeypatch.setitem(b.flows.CONFIGS, "S", b.flows.CONFIGS["S"] | {"num_blocks": 2, "layers_per_block": 1})
    encode = biflow.TarFlow.encode

    def wrong(self, x, **options):
        z, logdet = encode(self, x, **options)
        return (z * 1.001 if options.get("precision") == "fp32" else z), logdet

    monkeypatch.setattr(biflow.TarFlow, "encode", wrong)
    with pytest.raises(RuntimeError, match=r"S, batch 2, fp32: encode is 0\.00\d+ from fp64"):
        b.bench_encode.run(quick=True, configs=["S"], batches=[2])


def test_decode_block_on_one_block(b, monkeypatch):
    monkeypatch.setitem(b.flows.CONFIGS, "S", b.flows.CONFIGS["S"] | {"num_blocks": 2, "layers_per_block": 1})
    (row,) = b.bench_decode_block.run(quick=True, configs=["S"], batches=[2])
    assert (row["steps"], row["batch"]) == (15, 2)
    assert row["x_eager"] > 0


# --- calibration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(b, monkeypatch):
    """Configs S and M of two small blocks, no training to speak of, times of a moment."""
    for name, shape in (("S", {"img_size": 8, "patch_size": 2}), ("M", {"img_size": 10, "patch_size": 2})):
        shape |= {"in_channels": 1, "width": 64, "num_blocks": 2, "layers_per_block": 1}
        monkeypatch.setitem(b.flows.CONFIGS, name, shape)
    monkeypatch.setattr(b.calibrated, "STEPS", 30)
    monkeypatch.setattr(b.calibrated, "turns", lambda calls, rounds: b.timing.turns(calls, rounds, sample_s=0))


def test_calibrated_flows_against_single_solvers(b, small, tmp_path, capsys):
    data, files = write_images(tmp_path / "images.npz"), {name: tmp_path / f"rows.{name}" for name in ("json", "md")}
    words = ["--quick", "--configs", "S,M", "--batches", "1,3", "--data", str(data)]
    assert b.calibrated.main([*words, "--json", str(files["json"]), "--markdown", str(files["md"])]) == 0
    found = json.loads(files["json"].read_text())
    rows, cases = found["rows"], ("config", "weights", "batch", "precision")
    assert found["wrong"] == []
    assert {tuple(row[key] for key in cases) for row in rows} == {
        (name, weights, batch, precision)
        for name in "SM" for weights in ("random", "trained") for batch in (1, 3) for precision in solvers.PRECISIONS
    }  # fmt: skip
    assert len(rows) == 16
    for row in rows:
        singles = {key[:-3]: row[key] for key in row if key.endswith("_ms") and key not in ("auto_ms", "best_ms")}
        windows = [] if row["config"] == "S" else ["windowed:16"]  # less than T only
        assert list(singles) == ["sequential", "jacobi", *windows]
        assert singles[row["best"]] == row["best_ms"] == min(singles.values())
        assert min(row["auto_ms"], row["auto_over_best"]) > 0
        assert row["met"] == (row["auto_over_best"] <= 1.15 or row["auto_ms"] - row["best_ms"] <= 0.2)
        assert len(row["blocks"].split()) == 2
    table = [line for line in files["md"].read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    met = sum(row["met"] for row in rows)
    assert f"or 0.2 ms: {met} of 16" in capsys.readouterr().out


def test_a_wrong_auto_has_no_time(b, small, monkeypatch, capsys):
    def check(who, *arguments, right=b.calibrated.check, **options):
        if who == "auto bf16":
            raise b.calibrated.WrongResult("auto bf16: expected something else: not timed")
        return right(who, *arguments, **options)

    monkeypatch.setattr(b.calibrated, "check", check)
    assert b.calibrated.main(["--quick", "--configs", "S", "--batches", "2"]) == 1
    captured = capsys.readouterr()
    assert "16 tokens, batch 2, auto bf16: expected something else: not timed" in captured.err
    assert [line.split()[:4] for line in captured.out.splitlines()[1:-1]] == [["S", "random", "2", "fp32"]]


def test_calibrated_refuses(b, tmp_path):
    with pytest.raises(ValueError, match="configs: expected some of S, M, L, B/2, got 'XL'"):
        b.calibrated.run(configs=["XL"])
    with pytest.raises(ValueError, match="data: expected images of 3 channels for L, got 1"):
        b.calibrated.run(configs=["L"], data=write_images(tmp_path / "images.npz"))


def test_pseudo_reverse_against_token_by_token(b, monkeypatch):
    bench = b.bench_pseudo_reverse
    monkeypatch.setitem(b.flows.CONFIGS, "S", b.flows.CONFIGS["S"] | {"num_blocks": 2, "layers_per_block": 1})
    peaks = []

    def peak(side, batch, way):  # of this process: a new one takes seconds to import torch
        peaks.append(bench._grown(side, batch, way, 1))
        return peaks[-1]

    monkeypatch.setattr(bench, "_peak", peak)
    rows = bench.run(quick=True, sides=[4], batches=[2])
    assert [row["way"] for row in rows] == list(bench.WAYS)
    assert {(row["op"], row["tokens"], row["batch"]) for row in rows} == {("pseudo_reverse", 4, 2)}
    assert all(row["ms"] > 0 for row in rows)
    assert rows[0]["x_sequential"] == rows[3]["x_sequential"] == 1
    assert 0 < rows[2]["gradient_error"] <= bench.BOUND
    assert min(peaks) >= 0
    reverse = bench.Task.reverse
    for way in ("cached", "live"):
        monkeypatch.setattr(bench.Task, "reverse", lambda t, w, bad=way: reverse(t, w) * (1.01 if w == bad else 1))
        with pytest.raises(RuntimeError, match=f"{way}: x_0 is .* from that of the encode"):
            bench.run(quick=True, sides=[4], batches=[2])
    monkeypatch.setattr(bench.Task, "reverse", lambda t, w: reverse(t, "cached" if w == "live" else w))
    with pytest.raises(RuntimeError, match=r"live: the gradient is .* from that of the sequential reverse"):
        bench.run(quick=True, sides=[4], batches=[2])


def test_sampling_of_two_models(b, tmp_path, monkeypatch):
    flow = make_flow(num_classes=3, noise_std=0.1)
    inverse = make_reverse(num_classes=3, max_guidance=2.0, guidance_tokens=1)
    files = {"flow": [str(tmp_path / "flow.safetensors")], "inverse": [str(tmp_path / "inverse.safetensors")]}
    biflow.save(flow, files["flow"][0])
    biflow.save(inverse, files["inverse"][0])
    rows = b.bench_sampling.run(quick=True, **files, batches=[1, 2])
    assert [(row["batch"], row["way"]) for row in rows[::7]] == [(1, "learned fp32"), (2, "learned fp32")]
    assert len(rows) == 14
    assert all(row["ms_image"] > 0 for row in rows)
    assert rows[0]["x_learned"] == 1.0
    monkeypatch.setattr(b.bench_sampling, "eager_decode", lambda flow, z, y, **_: torch.ones(len(z), 1, 4, 4))
    with pytest.raises(RuntimeError, match="nothing timed"):
        b.bench_sampling.run(quick=True, **files, batches=[1])
    with pytest.raises(SystemExit, match="expected --flow and --inverse"):
        b.bench_sampling.run(quick=True)
