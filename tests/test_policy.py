"""Policies: what is looked up, what a file keeps, what calibration chooses. Nothing here depends on real time."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from tiny import make_flow, make_reverse, noise

import biflow
from biflow import calibration, checkpoint, cli, ops
from biflow.models.layers import device_clock, device_name
from biflow.solvers import Condition, Entry, Measurement, Method, Policy, methods


def entry(batch=1, *, device="cpu", name="a machine", precision="fp32", guidance=0.0, window=None, blocks=2):
    """Told apart by `window` in the tests."""
    method = Measurement("sequential", None, 3, 1.5) if window is None else Measurement("windowed", window, 9, 0.5)
    return Entry(device, name, 2, precision, batch, guidance, (method,) * blocks)


# --- lookup

LOOKUPS = {
    "the batch size itself": ([entry(1), entry(16, window=2)], (16, 0.0), 2),
    "the nearest on a logarithmic scale": ([entry(1), entry(16, window=2)], (5, 0.0), 2),
    "the nearest below": ([entry(1, window=2), entry(16)], (3, 0.0), 2),
    "of two at the same distance the smaller": ([entry(4, window=2), entry(16)], (8, 0.0), 2),
    "also where logarithms round": ([entry(16), entry(4, window=2), entry(9)], (6, 0.0), 2),
    "beyond the largest": ([entry(1), entry(64, window=2)], (10**6, 0.0), 2),
    "an empty batch": ([entry(1, window=2), entry(64)], (0, 0.0), 2),
    "guided for guided, though farther": ([entry(16), entry(1, guidance=1.0, window=2)], (16, 3.0), 2),
    "unguided for unguided, though farther": ([entry(16, guidance=1.0), entry(1, window=2)], (16, 0.0), 2),
    "unguided for guided, if there is no other": ([entry(16, window=2)], (16, 3.0), 2),
    "guided for unguided, if there is no other": ([entry(16, guidance=1.0, window=2)], (16, 0.0), 2),
    "the nearest batch before the nearest guidance": (
        [entry(1, guidance=2.0), entry(16, guidance=1.0, window=2)], (16, 2.0), 2,
    ),
    "the nearest guidance": ([entry(1, guidance=1.0), entry(1, guidance=3.0, window=2)], (1, 2.5), 2),
    "another device": ([entry(1, device="cuda", window=2)], (1, 0.0), None),
    "another precision": ([entry(1, precision="bf16", window=2)], (1, 0.0), None),
    "nothing measured": ([], (1, 0.0), None),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "asked", "window"), LOOKUPS.values(), ids=LOOKUPS.keys())
def test_lookup(entries, asked, window):
    for order in (entries, entries[::-1]):
        found = Policy(tuple(order)).choose("cpu", "fp32", *asked)
        assert (found and found.blocks[0].window) == window


def test_methods_of_a_decode():
    policy = Policy((entry(16, window=2),))
    condition = Condition()
    assert methods(Method("jacobi"), policy, 2, "cpu", 16, condition, 1e-5) == (Method("jacobi"),) * 2
    assert [m.window for m in methods(None, policy, 2, "cpu", 16, condition, 1e-5)] == [2, 2]
    for other in (None, Policy(())):
        assert methods(None, other, 2, "cpu", 16, condition, 1e-5) == (Method("sequential"),) * 2
    assert methods(None, policy, 2, "cuda", 16, condition, 1e-5) == (Method("sequential"),) * 2


def test_what_was_measured_for_a_looser_tolerance_is_not_followed():
    """Sequential decoding meets any tolerance; how many passes an iteration needs for this one is not known."""
    kept, lost = [2, 2], [None, None]
    for measured, precision, asked in (
        (1e-5, "fp32", {1e-3: kept, 1e-5: kept, 0.99e-5: lost, 1e-7: lost}),
        (1e-7, "fp32", {1e-5: kept, 1e-7: kept, 1e-8: lost}),
        (1e-5, "bf16", {1e-1: kept, 1e-7: kept}),  # both count as 1e-2
        (1e-1, "bf16", {1e-1: kept, 1e-5: lost}),
    ):
        policy = Policy((replace(entry(16, precision=precision, window=2), tol=measured),))
        for tol, windows in asked.items():
            found = methods(None, policy, 2, "cpu", 16, Condition(precision=precision), tol)
            assert [m.window for m in found] == windows, (measured, precision, tol)
            assert {m.solver for m in found} == {"sequential" if windows == lost else "windowed"}


def test_newer_entries_replace_those_of_the_same_situation():
    old = Policy((entry(1), entry(16), entry(1, precision="bf16")))
    new = old.replacing((entry(16, window=4), entry(1, guidance=1.0)))
    assert len(new.entries) == 4
    assert new.choose("cpu", "fp32", 16, 0.0).blocks[0].window == 4
    assert new.choose("cpu", "bf16", 1, 0.0) == entry(1, precision="bf16")


@pytest.mark.parametrize("other", [{"name": "a server"}, {"threads": 64}])
def test_entries_of_other_machines_and_threads_are_kept(other):
    policy = Policy((entry(16, window=2),)).replacing((replace(entry(16, window=4), **other),))
    assert sorted(e.blocks[0].window for e in policy.entries) == [2, 4]
    here = {"name": "a machine", "threads": 2}
    assert policy.choose("cpu", "fp32", 16, 0.0, **here).blocks[0].window == 2
    assert policy.choose("cpu", "fp32", 16, 0.0, **{**here, **other}).blocks[0].window == 4
    assert Policy.from_mapping(policy.to_mapping(), 2) == policy


def test_devices_of_one_kind_keep_their_own_entries():
    """What one GPU measured is not lost when the file is calibrated on another."""
    first, second = (entry(16, device="cuda", name=name, window=w) for name, w in (("GPU A", 2), ("GPU B", 4)))
    policy = Policy((first,)).replacing((second,))
    for known in (first, second):
        assert policy.choose("cuda", "fp32", 16, 0.0, name=known.name) == known
    newer = policy.replacing((entry(16, device="cuda", name="GPU A", window=8),))
    assert {e.name: e.blocks[0].window for e in newer.entries} == {"GPU A": 8, "GPU B": 4}


# --- files


def good():
    return Policy((entry(1), entry(16, window=8), entry(16, guidance=1.5))).to_mapping()


def test_a_policy_is_json_and_back():
    values = json.loads(json.dumps(good()))
    assert Policy.from_mapping(values, 2).to_mapping() == good()
    assert Policy.from_mapping({"entries": []}, 7) == Policy(())


def test_a_file_without_tolerances_is_one_of_the_default():
    values = good()
    for written in values["entries"]:
        del written["tol"]
    assert {e.tol for e in Policy.from_mapping(values, 2).entries} == {1e-5}


def _changed(*path, value=None, drop=False):
    values = json.loads(json.dumps(good()))
    node = values
    for key in path[:-1]:
        node = node[key]
    if drop:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return values


BLOCK = ("entries", 1, "blocks", 0)
MALFORMED = {
    "no mapping": ([1], "expected a mapping of fields, got list"),
    "null": (None, "expected a mapping of fields, got NoneType"),
    "no entries": ({}, "policy: missing field 'entries'"),
    "entries of another kind": ({"entries": 3}, "policy.entries: expected"),
    "unknown field": (_changed("entries", 0, "speed", value=1), "entries[0]: unknown field 'speed'"),
    "missing field": (_changed("entries", 0, "batch", drop=True), "entries[0]: missing field 'batch'"),
    "batch": (_changed("entries", 0, "batch", value=0), "entries[0]: batch: expected at least 1, got 0"),
    "batch as text": (_changed("entries", 0, "batch", value="1"), "entries[0].batch: expected int, got str '1'"),
    "precision": (_changed("entries", 0, "precision", value="fp8"), "precision: expected one of fp32, bf16, got 'fp8'"),
    "device": (_changed("entries", 0, "device", value=""), "device: expected a device type"),
    "guidance": (_changed("entries", 0, "guidance", value=-1.0), "guidance: expected a finite number >= 0, got -1"),
    "tol": (_changed("entries", 0, "tol", value=0), "entries[0]: tol: expected a finite number > 0, got 0"),
    "solver": (
        _changed(*BLOCK, "solver", value="auto"),
        "blocks[0]: solver: expected one of sequential, jacobi, windowed, got 'auto'",
    ),
    "window": (_changed(*BLOCK, "window", value=0), "window: expected at least 1 token, got 0"),
    "window of jacobi": (_changed(*BLOCK, "solver", value="jacobi"), "window: expected None with solver='jacobi'"),
    "no window": (_changed(*BLOCK, "window", value=None), "window: expected an int, got NoneType None"),
    "passes": (_changed(*BLOCK, "passes", value=-1), "passes: expected 0 or more, got -1"),
    "ms": (_changed(*BLOCK, "ms", value=float("nan")), "ms: expected a finite number >= 0, got nan"),
    "no blocks": (_changed("entries", 0, "blocks", value=[]), "blocks: expected a method for each block, got none"),
    "uneven blocks": (
        _changed("entries", 1, "blocks", value=good()["entries"][1]["blocks"][:1]),
        "entries: expected 2 blocks in each, as in the first, got 1",
    ),
    "twice": (
        _changed("entries", 0, "batch", value=16),
        "expected one for each situation, got two for ('cpu', 'a machine', 2, 'fp32', 16, 0.0)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("values", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_policy_is_refused(values, reason, tmp_path, capsys):
    with pytest.raises(ValueError, match=re.escape(reason)):
        Policy.from_mapping(values, 2)
    flow, path = make_flow(num_blocks=2), tmp_path / "m.safetensors"
    checkpoint.write(path, "TarFlow", flow.state_dict(), checkpoint.to_mapping(flow.config), {"policy": values})
    with pytest.raises(ValueError, match="expected a valid policy in the metadata; .*" + re.escape(reason)) as error:
        biflow.load(path)
    assert str(path) in str(error.value)
    assert cli.main(["info", str(path)]) == 2
    assert reason in capsys.readouterr().err


def test_a_policy_of_another_depth_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected methods of 3 blocks, as the model has, got 2"):
        Policy.from_mapping(good(), 3)
    flow, path = make_flow(num_blocks=3), tmp_path / "m.safetensors"
    checkpoint.write(path, "TarFlow", flow.state_dict(), checkpoint.to_mapping(flow.config), {"policy": good()})
    with pytest.raises(ValueError, match="expected methods of 3 blocks"):
        biflow.load(path)
    flow.policy = Policy.from_mapping(good(), 2)
    with pytest.raises(ValueError, match="expected methods of 3 blocks"):
        biflow.save(flow, path)


def test_a_file_keeps_the_policy(tmp_path):
    flow, path = make_flow(num_blocks=2), tmp_path / "m.safetensors"
    biflow.save(flow, path, {"step": 3})
    assert biflow.load(path).policy is None
    assert checkpoint.describe(path)["metadata"] == {"step": 3}
    flow.policy = Policy.from_mapping(good(), 2)
    biflow.save(flow, path, {"step": 3})
    loaded = biflow.load(path)
    assert loaded.policy == flow.policy
    assert checkpoint.describe(path)["metadata"] == {"step": 3, "policy": good()}
    assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(make_flow(num_blocks=2))
    assert torch.equal(loaded.decode(noise(flow)), flow.decode(noise(flow)))


def test_save_refuses_other_policies(tmp_path):
    flow = make_flow(num_blocks=2)
    for model in (flow, make_reverse()):
        with pytest.raises(
            ValueError, match=re.escape("metadata: expected no 'policy', which is what model.policy is")
        ):
            biflow.save(model, tmp_path / "m", {"policy": good()})
    flow.policy = good()
    with pytest.raises(TypeError, match=r"policy: expected a solvers\.Policy or None, got dict"):
        biflow.save(flow, tmp_path / "m")
    assert not list(tmp_path.iterdir())


# --- calibration


class Machine:
    """A clock, and solvers that take the time that `costs` says: seconds of (solver, window), or a list, run by run.

    A candidate that is not named takes 100 s; `lost` ones fall back.
    """

    def __init__(self, monkeypatch, costs, lost=()):
        self.now, self.costs, self.lost, self.runs, self.seen = 0.0, costs, lost, [], []
        self.solve = calibration.solvers.solve
        monkeypatch.setattr(calibration.solvers, "solve", self._solve)

    def _solve(self, block, z, condition, method, tol):
        key = (method.solver, method.window)
        self.runs.append(key)
        self.seen.append((block, z, condition, tol))
        cost = self.costs.get(key, 100.0)
        self.now += cost[min(self.runs.count(key) - 1, len(cost) - 1)] if isinstance(cost, list) else cost
        if method.solver != "sequential":
            block.iterate(z, condition)  # as the real one does: packs what is not packed yet
        x, passes, _ = self.solve(block, z, condition, Method("sequential"), tol)
        return x, passes, (0,) if key in self.lost else ()

    def calibrate(self, flow, **options):
        options = {"batches": (2,), "precisions": ("fp32",), "repetitions": 3, **options}
        return biflow.calibrate(flow, clock=lambda: self.now, **options)


SEQUENTIAL, JACOBI, WINDOWED = ("sequential", None), ("jacobi", None), ("windowed", 16)
LONG = {"img_size": 10, "num_blocks": 1}  # 25 tokens: windows of 16 only

CHOICES = {
    "the fastest": ({SEQUENTIAL: 10.0, JACOBI: 5.0, WINDOWED: 8.0}, (), JACOBI, 5.0),
    "a window": ({SEQUENTIAL: 10.0, JACOBI: 9.0, WINDOWED: 8.0}, (), WINDOWED, 8.0),
    "sequential, if nearly as fast": ({SEQUENTIAL: 10.4, JACOBI: 10.0, WINDOWED: 12.0}, (), SEQUENTIAL, 10.4),
    "not sequential, if not": ({SEQUENTIAL: 10.6, JACOBI: 10.0, WINDOWED: 12.0}, (), JACOBI, 10.0),
    "nothing that fell back": ({SEQUENTIAL: 10.0, JACOBI: 1.0, WINDOWED: 8.0}, [JACOBI], WINDOWED, 8.0),
    "sequential, if all else fell back": ({SEQUENTIAL: 99.0, JACOBI: 1.0}, [JACOBI, WINDOWED], SEQUENTIAL, 99.0),
    "by the median": ({SEQUENTIAL: 10.0, JACOBI: [9.0, 5.0, 50.0, 6.0]}, (), JACOBI, 6.0),
    "not by the first run": ({SEQUENTIAL: [20.0, 5.0], JACOBI: [8.0, 8.0]}, (), SEQUENTIAL, 5.0),
    "sequential hopeless": ({SEQUENTIAL: 31.0, JACOBI: 10.0}, (), JACOBI, 10.0),
}


@pytest.mark.parametrize(("costs", "lost", "wanted", "seconds"), CHOICES.values(), ids=CHOICES.keys())
def test_calibration_chooses(costs, lost, wanted, seconds, monkeypatch):
    # the first sequential run packs the weights and is not timed
    costs = {k: [0.0, *v] if k == SEQUENTIAL and isinstance(v, list) else v for k, v in costs.items()}
    flow = make_flow(**LONG)
    policy = Machine(monkeypatch, costs, lost).calibrate(flow)
    (found,) = policy.entries[0].blocks
    assert (found.solver, found.window) == wanted
    assert found.ms == pytest.approx(1e3 * seconds)
    assert found.passes == 24
    assert flow.policy is policy


def test_candidates_take_turns_and_hopeless_ones_have_one():
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, {SEQUENTIAL: 10.0, JACOBI: 9.0, WINDOWED: 28.0})
        machine.calibrate(make_flow(**LONG))
    assert machine.runs == [SEQUENTIAL, SEQUENTIAL, JACOBI, WINDOWED] + [SEQUENTIAL, JACOBI] * 3


def test_packing_is_not_timed(monkeypatch):
    """Neither that of the weights nor that of the drafts, which the first iterative run would have to wait for."""
    machine = Machine(monkeypatch, {SEQUENTIAL: 10.0, JACOBI: 5.0, WINDOWED: 8.0})
    packed = []

    def pack_block(weights, config, precision, pack=ops.pack_block):
        packed.append(precision)
        machine.now += 1000.0
        return pack(weights, config, precision)

    monkeypatch.setattr(ops, "pack_block", pack_block)
    monkeypatch.setattr(ops, "has_fast_bf16", lambda device=None: True)
    (found,) = machine.calibrate(make_flow(**LONG)).entries[0].blocks
    assert (found.solver, found.ms) == ("jacobi", 5000.0)
    assert sorted(packed) == ["bf16", "fp32"]


def test_guidance_through_the_temperature_alone(monkeypatch):
    """A model without classes and context has no other."""
    flow = make_flow(**LONG)
    machine = Machine(monkeypatch, {JACOBI: 1.0})
    policy = machine.calibrate(flow, guidances=(0.0, 2.0), attn_temp=0.5, repetitions=1)
    assert [e.guidance for e in policy.entries] == [0.0, 2.0]
    assert {condition.guidance.attn_temp for _, _, condition, _ in machine.seen} == {0.5}


def test_the_first_call_does_not_count_where_it_is_slow(monkeypatch):
    """A candidate that records a graph at its first call is not hopeless."""
    monkeypatch.setattr(calibration, "FIRST_IS_SLOW", ("cpu",))
    machine = Machine(monkeypatch, {SEQUENTIAL: 10.0, JACOBI: [500.0, 5.0], WINDOWED: [500.0, 28.0]})
    (found,) = machine.calibrate(make_flow(**LONG)).entries[0].blocks
    assert (found.solver, found.ms) == ("jacobi", pytest.approx(5000.0))
    assert machine.runs == [SEQUENTIAL, JACOBI, WINDOWED, SEQUENTIAL, JACOBI, WINDOWED] + [SEQUENTIAL, JACOBI] * 3


def test_windows_are_shorter_than_the_block(monkeypatch):
    for size, windows in ((8, []), (10, [16]), (16, [16, 32]), (24, [16, 32, 64, 128])):
        machine = Machine(monkeypatch, {})
        machine.calibrate(make_flow(img_size=size, num_blocks=1), repetitions=1)
        assert sorted({w for _, w in machine.runs if w}) == windows
        monkeypatch.undo()


def test_blocks_are_measured_on_what_they_get(monkeypatch):
    """In decode order, each on the exact output of the one before; labels and guidance reach them."""
    flow = make_flow(num_classes=3, **{**LONG, "num_blocks": 2})
    machine = Machine(monkeypatch, {SEQUENTIAL: 1.0})
    policy = machine.calibrate(flow, batches=(4,), guidances=(1.5,), repetitions=1, seed=3, tol=1e-4)
    z = torch.randn(4, 25, 4, generator=torch.Generator().manual_seed(3))
    condition = machine.seen[0][2]
    assert condition.y.tolist() == [0, 1, 2, 0]
    assert condition.guidance.scale == 1.5
    first, second = flow.blocks[1], flow.blocks[0]
    for block, given, _, tol in machine.seen:
        assert tol == 1e-4
        x = z * flow.var.sqrt()
        assert torch.equal(given, x if block is first else first.decode_sequential(x, condition))
    assert {id(block) for block, *_ in machine.seen} == {id(first), id(second)}
    assert (policy.entries[0].batch, policy.entries[0].guidance, policy.entries[0].tol) == (4, 1.5, 1e-4)


def test_calibration_adds_to_what_is_known(monkeypatch):
    flow = make_flow(num_classes=3, **LONG)
    machine = Machine(monkeypatch, {JACOBI: 1.0})
    here = {"name": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    known = (entry(1, device="cuda", blocks=1), entry(2, blocks=1), entry(64, blocks=1))
    flow.policy = Policy((known[0], *(replace(e, **here) for e in known[1:])))
    machine.calibrate(flow, batches=(2, 4, 2), guidances=(0.0, 1.0), repetitions=1)
    assert [(e.device, e.batch, e.guidance) for e in flow.policy.entries] == [
        ("cpu", 2, 0.0), ("cpu", 2, 1.0), ("cpu", 4, 0.0), ("cpu", 4, 1.0), ("cpu", 64, 0.0), ("cuda", 1, 0.0),
    ]  # fmt: skip
    found = flow.policy.choose("cpu", "fp32", 2, 0.0)
    assert found.blocks[0].solver == "jacobi"
    assert (found.threads, found.precision) == (torch.get_num_threads(), "fp32")
    assert found.name == here["name"]


class Gpu:
    """A clock, and a GPU that has queued work: 5 s of it are done whenever somebody waits."""

    def __init__(self, monkeypatch):
        self.now, self.waited_for = 0.0, []
        monkeypatch.setattr(torch.cuda, "synchronize", self._synchronize)

    def _synchronize(self, device):
        self.now += 5.0
        self.waited_for.append(device)

    def clock(self):
        return self.now


def test_a_clock_of_a_gpu_waits_for_its_work(monkeypatch):
    gpu, device = Gpu(monkeypatch), torch.device("cuda", 1)
    read = device_clock(device, gpu.clock)
    assert (read(), read()) == (5.0, 10.0)
    assert gpu.waited_for == [device] * 2
    assert device_clock(torch.device("cpu"), gpu.clock) == gpu.clock  # and no call more


def test_calibration_times_what_the_device_has_done(monkeypatch):
    """Each run is read between two waits, whoever brings the clock."""
    gpu, given = Gpu(monkeypatch), []

    def on_a_gpu(device, clock):
        given.append(device)
        return device_clock(torch.device("cuda"), clock)

    monkeypatch.setattr(calibration, "device_clock", on_a_gpu)
    flow = make_flow(num_blocks=1)
    policy = biflow.calibrate(flow, batches=(1,), precisions=("fp32",), repetitions=2, clock=gpu.clock)
    assert given == [torch.device("cpu")]  # where the model is
    assert policy.entries[0].blocks[0].ms == 5000.0
    assert len(gpu.waited_for) == 2 * 2 * 3  # sequential and jacobi, three runs each, two looks at the clock


def test_a_calibrated_flow_decodes_as_exactly():
    """Real solvers, real time: whatever they choose."""
    flow = make_flow(num_classes=3, context_dim=5, **{**LONG, "num_blocks": 2})
    biflow.calibrate(flow, batches=(1, 3), guidances=(0.0, 1.0), repetitions=1)
    z, y, context = noise(flow), torch.tensor([0, 1, 2, -1]), torch.randn(4, 3, 5)
    for guidance in (0.0, 1.0):
        x, info = flow.decode(z, y, context, guidance=guidance, return_info=True)
        assert info.residual.max() <= 2e-5
        assert (x - flow.decode(z, y, context, guidance=guidance, solver="sequential")).abs().max() <= 1e-4
        chosen = flow.policy.choose("cpu", "fp32", 4, guidance)
        assert chosen.batch == 3
        assert info.solver == tuple(m.solver for m in chosen.blocks)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": ()}, ValueError, "batches: expected at least one, got none"),
        ({"batches": (0,)}, ValueError, "batches: expected at least 1, got 0"),
        ({"batches": (1.0,)}, TypeError, "batches: expected an int, got float 1.0"),
        ({"repetitions": 0}, ValueError, "repetitions: expected at least 1, got 0"),
        ({"precisions": ("fp8",)}, ValueError, "precision: expected one of fp32, bf16, got 'fp8'"),
        ({"precisions": ()}, ValueError, "precisions: expected at least one, got none"),
        ({"guidances": ()}, ValueError, "guidances: expected at least one, got none"),
        ({"batches": 16}, TypeError, "batches: expected a list of ints, got int 16"),
        ({"batches": "16"}, TypeError, "batches: expected a list of ints, got str '16'"),
        ({"precisions": "fp32"}, TypeError, "precisions: expected a list of names, got str 'fp32'"),
        ({"guidances": 1.0}, TypeError, "guidances: expected a list of numbers, got float 1.0"),
        ({"guidances": ("a",)}, TypeError, "guidance: expected a number, got str 'a'"),
        ({"seed": "x"}, TypeError, "seed: expected an int, got str 'x'"),
        ({"attn_temp": 0.0}, ValueError, "attn_temp: expected a finite number > 0, got 0"),
        ({"tol": 1e-300}, ValueError, "tol: expected a finite number > 0 as float32, got 1e-300"),
        ({"guidances": (-1.0,)}, ValueError, "guidance: expected a finite number >= 0, got -1"),
        ({"guidances": (1.0,)}, ValueError,
         "guidances: expected 0, or attn_temp other than 1, for a model without classes and context, where guidance "
         "acts through attn_temp alone; got 1"),
        ({"tol": 0.0}, ValueError, "tol: expected a finite number > 0, got 0"),
    ],
)  # fmt: skip
def test_calibration_refuses(options, error, message):
    flow = make_flow()
    with pytest.raises(error, match=re.escape(message)):
        biflow.calibrate(flow, **options)
    assert flow.policy is None


def test_calibration_refuses_other_models():
    with pytest.raises(TypeError, match="flow: expected a TarFlow, got BiFlow"):
        biflow.calibrate(make_reverse())
    with pytest.raises(TypeError, match=r"expected a model of torch\.float32 weights"):
        biflow.calibrate(make_flow(dtype=torch.float64))


# --- the command


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.safetensors"
    biflow.save(make_flow(num_classes=3, **LONG), path, {"step": 3})
    return path


def test_the_command_writes_into_the_file(model, capsys):
    before = biflow.load(model)
    line = ["calibrate", str(model), "--batches", "1,2", "--repetitions", "1"]
    assert cli.main([*line, "--guidance", "0", "--guidance", "1"]) == 0
    captured = capsys.readouterr()
    after = biflow.load(model)
    situations = [(p, batch, g) for p in ("bf16", "fp32") for batch in (1, 2) for g in (0, 1)]
    assert [(e.precision, e.batch, e.guidance) for e in after.policy.entries] == situations
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    assert checkpoint.describe(model)["metadata"]["step"] == 3
    rows = captured.out.splitlines()
    words = "device threads precision batch guidance tol block solver window passes ms on"
    assert rows[0].split() == words.split()
    assert [row.split()[:7] for row in rows[1:-1]] == [
        ["cpu", str(torch.get_num_threads()), p, str(n), str(g), "1e-05", "0"] for p, n, g in situations
    ]
    assert all(row.endswith(device_name(torch.device("cpu"))) for row in rows[1:-1])
    assert rows[-1] == f"{model}: calibrated"
    assert "calibrate: 100%" in captured.err
    assert cli.main(["info", str(model)]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["metadata"] == {"step": 3}
    assert [(e["batch"], len(e["blocks"])) for e in found["policy"]] == [(n, 1) for _, n, _ in situations]
    assert re.fullmatch(r"(sequential|jacobi|windowed 16), \d+ passes, [\d.e+-]+ ms", found["policy"][0]["blocks"][0])
    assert cli.main([*line, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert len(biflow.load(model).policy.entries) == 8, "calibrated again, with the guided ones kept"


def test_the_command_writes_elsewhere(model, tmp_path):
    before = model.read_bytes()
    out = tmp_path / "other.safetensors"
    line = ["calibrate", str(model), "--batches", "1", "--precision", "fp32", "--repetitions", "1", "--quiet"]
    assert cli.main([*line, "--out", str(out)]) == 0
    assert model.read_bytes() == before
    assert len(biflow.load(out).policy.entries) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batches 1,many", "--batches: expected numbers separated by commas, got '1,many'"),
        ("--batches 0", "batches: expected at least 1, got 0"),
        ("--precision fp32,fp8", "precision: expected one of fp32, bf16, got 'fp8'"),
        ("--guidance=-1", "guidance: expected a finite number >= 0, got -1"),
        ("--tol 0", "tol: expected a finite number > 0, got 0"),
        ("--device cuda:99", "device: expected"),
        ("--device abacus", "device: expected 'cpu'"),
        ("--out nowhere/m.safetensors", "--out: expected an existing folder, got nowhere"),
    ],
)
def test_the_command_refuses(options, message, model, capsys):
    before = model.read_bytes()
    assert cli.main(["calibrate", str(model), *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert model.read_bytes() == before


def test_the_command_measures_where_it_is_told(model, monkeypatch, capsys):
    line = ["calibrate", str(model), "--batches", "1", "--precision", "fp32", "--repetitions", "1", "--quiet"]
    assert cli.main([*line, "--device", "cpu"]) == 0
    assert {e.device for e in biflow.load(model).policy.entries} == {"cpu"}
    moved = []

    def load(path, device):
        moved.append(device)
        raise ValueError("far enough")

    monkeypatch.setattr("biflow.ops._checks.local_device", torch.device)
    monkeypatch.setattr(checkpoint, "load", load)
    assert cli.main([*line, "--device", "cuda:1"]) == 2
    assert moved == [torch.device("cuda", 1)]
    assert "far enough" in capsys.readouterr().err


def test_the_command_takes_flows_only(tmp_path, capsys):
    biflow.save(make_reverse(), tmp_path / "m.safetensors")
    assert cli.main(["calibrate", str(tmp_path / "m.safetensors")]) == 2
    assert "expected a TarFlow, got a BiFlow" in capsys.readouterr().err


def test_the_same_device_goes_before_the_same_threads_and_both_before_the_nearest_batch():
    def measured(name, threads, batch, window):
        return Entry("cpu", name, threads, "fp32", batch, 0.0, (Measurement("windowed", window, 1, 1.0),))

    policy = Policy((measured("here", 2, 64, 1), measured("there", 2, 1, 2)))
    assert policy.choose("cpu", "fp32", 1, 0.0, name="here").blocks[0].window == 1
    assert policy.choose("cpu", "fp32", 1, 0.0, name="there").blocks[0].window == 2
    assert policy.choose("cpu", "fp32", 1, 0.0, name="elsewhere").blocks[0].window == 2, "better than nothing"

    def window(entries, batch, threads):
        found = {
            Policy(tuple(order)).choose("cpu", "fp32", batch, 0.0, name="here", threads=threads).blocks[0].window
            for order in (entries, entries[::-1])
        }
        assert len(found) == 1, "whatever their order"
        return found.pop()

    one, eight = measured("here", 1, 4, 1), measured("here", 8, 64, 2)
    assert window([one, eight], 4, threads=8) == 2, "though of a farther batch"
    assert window([one, eight], 64, threads=1) == 1
    assert window([one, eight], 64, threads=4) == 2, "of other threads, the nearest batch"
    assert window([measured("there", 8, 4, 3), one], 4, threads=8) == 1, "the device goes first"
    same = [measured("here", n, 4, n) for n in (1, 2, 8, 32)]
    assert [window(same, 4, threads=n) for n in (1, 3, 4, 6, 100)] == [1, 2, 2, 8, 32], "of one batch, the nearest"
