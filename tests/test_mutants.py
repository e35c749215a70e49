"""The tool that plants defects in the GPU kernels: what it changes, and that it tells a killed mutant from others."""

import difflib
import re
import sys

import pytest
from emulator import mutants
from emulator.building import BUILD, ROOT

MUTANTS = mutants.all_mutants()
BARRIER = "csrc/arch/grid_barrier.cuh"


def test_a_mutant_is_one_changed_line():
    assert len(MUTANTS) > 500
    assert len({(m.file, m.line, m.after) for m in MUTANTS}) > 0.99 * len(MUTANTS)
    for mutant in MUTANTS[::50]:
        text = (ROOT / mutant.file).read_text()
        changes = [line for line in difflib.ndiff(text.splitlines(), mutant.text().splitlines()) if line[0] in "+-"]
        assert changes == [f"- {mutant.before}", f"+ {mutant.after}"]


def test_only_code_changes():
    """Comments, strings, directives and the heads of templates stay."""
    for mutant in MUTANTS:
        python = mutant.file.endswith(".py")
        heads = ("#", "@", "import ", "from ", "def ") if python else ("//", "#", "template <", "static_assert")
        assert not mutant.before.lstrip().startswith(heads)
        comment = mutant.before.find("  # " if python else "//")
        assert comment < 0 or mutant.after.endswith(mutant.before[comment:])


def test_every_synchronisation_is_taken_away():
    dropped = {(m.file, m.line) for m in mutants.all_mutants(operators=mutants.SYNCHRONISATION)}
    lines = set()
    for file in {m.file for m in MUTANTS}:
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            if re.search(r"^[^/]*(__syncthreads\(\)|__syncwarp\(|_fence\(\)|cp_async_(wait|commit))", line):
                lines.add((file, number))
    assert lines <= dropped


def test_every_kernel_has_mutants():
    cuda = [p for p in (ROOT / "csrc/cuda").glob("*.cu*") if "{\n  " in p.read_text()]  # others instantiate templates
    files = {str(p.relative_to(ROOT)) for p in cuda} - set(mutants.UNTESTED)
    files |= {f"biflow/ops/_triton/{p.name}" for p in (ROOT / "biflow/ops/_triton").glob("[a-z]*.py")}
    assert files <= {m.file for m in MUTANTS}
    assert all(mutants.tests_of(stem) for stem in (f.split("/")[-1].split(".")[0] for f in files if f.endswith(".cu")))


def test_tests_are_found_by_name():
    assert mutants.tests_of("affine") == ["tests/kernels/test_affine.py"]
    assert mutants.tests_of("affine_of_another_kind") == ["tests/kernels/test_affine.py"]
    assert mutants.tests_of("nothing_like_it") == []


def test_what_stands_in_launch_bounds_alone_stays():
    assert "kBlocks" in mutants.for_the_compiler_alone()
    assert "kAffineThreads" not in mutants.for_the_compiler_alone()
    assert not any("kBlocks =" in m.before for m in MUTANTS)
    assert any("kAffineThreads =" in m.before for m in MUTANTS)


@pytest.mark.parametrize(
    ("operator", "before", "after"),
    [
        ("< to <=", "for (int i = 0; i < n; ++i)", "for (int i = 0; i <= n; ++i)"),
        ("divisor doubled", "lane / 16 + 1", "lane / 32 + 1"),
        ("constant plus 1", "x[i] = f(v, 2);", "x[i] = f(v, 3);"),
        ("wait for one group less", "arch::cp_async_wait<kAhead - 1>();", "arch::cp_async_wait<(kAhead - 1) + 1>();"),
        ("if to never", "if (row < T) x.store(p);", "if (false && row < T) x.store(p);"),
        ("? always", "const int t = flip ? T - 1 - i : i;", "const int t = flip || true ? T - 1 - i : i;"),
        ("max to min", "top = fmaxf(top, x);", "top = fminf(top, x);"),
        ("index plus 1", "sum += v[i];", "sum += v[i + 1];"),
        ("no negation", "return f(-x);", "return f(x);"),
        ("drop a fence", "if (t == 0) arch::release_fence();", "if (t == 0) ;"),
        ("if to never", "    if LAYERNORM:", "    if False and LAYERNORM:"),
        ("no mask", "x = tl.load(p, inside, 0.0)", "x = tl.load(p, inside | True, 0.0)"),
        ("sum to max", "s = tl.sum(x, 1)", "s = tl.max(x, 1)"),
        ("not None to None", "if bias is not None:", "if bias is None:"),
        ("% to //", "row % inner", "row // inner"),
    ],
)
def test_operator(operator, before, after):
    triton = operator in mutants.TRITON and (operator not in mutants.OPERATORS or before.endswith(":"))
    pattern, replacement = (mutants.TRITON if triton else mutants.OPERATORS)[operator]
    assert re.sub(pattern, replacement, before, count=1) == after


def test_drawing_takes_the_operators_in_turn():
    drawn = mutants.draw(MUTANTS, 30, seed=3)
    assert len(drawn) == 30
    assert len({m.operator for m in drawn}) > 20
    assert drawn == mutants.draw(MUTANTS, 30, seed=3) != mutants.draw(MUTANTS, 30, seed=4)
    assert drawn == mutants.draw(MUTANTS, 60, seed=3)[:30]


def test_a_mutant_that_leaves_the_list_moves_no_other():
    drawn = mutants.draw(MUTANTS, 60, seed=3)
    again = mutants.draw([m for m in MUTANTS if m != drawn[7]], 61, seed=3)
    assert set(drawn) - set(again) == {drawn[7]}


def test_equivalent_mutants_exist():
    """Each is one that the tool makes: a line that has changed takes its entry along."""
    known = mutants.equivalents()
    assert known.keys() <= {m.key() for m in MUTANTS}
    assert all(len(reason) > 10 for reason in known.values())


@pytest.mark.slow
def test_a_check_may_not_have_all_memory():
    check = mutants.Check("", (sys.executable, "-c", "b'1' * (8 << 30)"))
    assert "MemoryError" in check.run(BUILD, 60).stderr


@pytest.mark.slow
def test_a_mutant_of_a_triton_kernel():
    if not (BUILD / "compile_commands.json").exists():
        pytest.skip("no build/emulator: run `make emulator`")
    mutant = next(
        m for m in mutants.mutants_of("biflow/ops/_triton/gate.py") if m.operator == "exp, rsqrt, erf to their argument"
    )
    campaign = mutants.Campaign()
    (check,) = campaign.checks(mutant.file, "race", "race")
    campaign.limits[check] = 300
    result = campaign.run(mutant)
    assert result["result"] == "killed"
    assert "interpreted: AssertionError: y: error" in result["by"]


@pytest.mark.slow
def test_killed_survived_and_not_compiled(monkeypatch):
    if not (BUILD / "conformance_race").exists():
        pytest.skip("no conformance_race: run `make emulator`")
    fence = next(m for m in mutants.mutants_of(BARRIER) if m.operator == "drop a fence")
    same = next(m for m in mutants.mutants_of(BARRIER) if m.key() in mutants.equivalents())
    broken = mutants.Mutant(BARRIER, fence.line, "none", fence.before, "    release_fence(;")
    campaign = mutants.Campaign()
    checks = campaign.checks  # all ops over the barrier would take minutes
    monkeypatch.setattr(campaign, "checks", lambda *at: [c for c in checks(*at) if c.target.startswith("conformance")])
    campaign.measure({BARRIER}, 2)
    results = [campaign.run(mutant) for mutant in (fence, same, broken)]
    assert [r["result"] for r in results] == ["killed", "survived", "does not compile"]
    assert "race, read after write" in results[0]["by"]
