"""The tool that plants defects in CUDA kernels: what it changes, and that it tells a killed mutant from others."""

import difflib
import re

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
        assert not mutant.before.lstrip().startswith(("//", "#", "template <", "static_assert"))
        comment = mutant.before.find("//")
        assert comment < 0 or mutant.after.endswith(mutant.before[comment:])


def test_every_synchronisation_is_taken_away():
    dropped = {(m.file, m.line) for m in mutants.all_mutants(operators=mutants.SYNCHRONISATION)}
    lines = set()
    for file in {m.file for m in MUTANTS}:
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            if re.search(r"^[^/]*(__syncthreads\(\)|__syncwarp\(|_fence\(\)|cp_async_(wait|commit))", line):
                lines.add((file, number))
    assert lines <= dropped


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
    ],
)
def test_operator(operator, before, after):
    pattern, replacement = mutants.OPERATORS[operator]
    assert re.sub(pattern, replacement, before, count=1) == after


def test_drawing_takes_the_operators_in_turn():
    drawn = mutants.draw(MUTANTS, 30, seed=3)
    assert len(drawn) == 30
    assert len({m.operator for m in drawn}) > 20
    assert drawn == mutants.draw(MUTANTS, 30, seed=3) != mutants.draw(MUTANTS, 30, seed=4)


def test_equivalent_mutants_exist():
    """Each is one that the tool makes: a line that has changed takes its entry along."""
    known = mutants.equivalents()
    assert known.keys() <= {m.key() for m in MUTANTS}
    assert all(len(reason) > 10 for reason in known.values())


@pytest.mark.slow
def test_killed_survived_and_not_compiled(tmp_path):
    if not (BUILD / "conformance_race").exists():
        pytest.skip("no conformance_race: run `make emulator`")
    fence = next(m for m in mutants.mutants_of(BARRIER) if m.operator == "drop a fence")
    same = next(m for m in mutants.mutants_of(BARRIER) if m.key() in mutants.equivalents())
    broken = mutants.Mutant(BARRIER, fence.line, "none", fence.before, "    release_fence(;")
    campaign = mutants.Campaign()
    campaign.measure({BARRIER})
    results = [campaign.run(mutant) for mutant in (fence, same, broken)]
    assert [r["result"] for r in results] == ["killed", "survived", "does not compile"]
    assert "race, read after write" in results[0]["by"]
