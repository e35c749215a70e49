"""The emulator itself: it does what CUDA does, it sees every kind of defect, and it has no false alarms."""

import re
import subprocess

import pytest
from emulator.building import BUILD, ROOT, Building

ORDERS = ("forward", "reverse", "random")
DEFECTS = {path.name: path.read_text().splitlines() for path in (ROOT / "tests" / "emulator").glob("defects*.cu*")}

# defect: what the message says first; what it says of the memory, if it is about memory.
# Where a write and a read race, the order of the threads decides which of them comes second and is reported.
RACE = "race, (read after write|write after read|write after write)|uninitialised read"
MESSAGES = {
    "missing_syncthreads": (RACE, "of shared memory s"),
    "missing_syncthreads_after_reading": (RACE, "of shared memory s"),
    "missing_syncwarp": (RACE, "of shared memory s"),
    "two_writers": ("race, write after write", "of shared memory s"),
    "many_readers": ("race, (write after read|read after write)", "byte 0 of shared memory s"),
    "reader_writes": ("race, (write after read|read after write)", "byte 0 of shared memory s"),
    "uninitialised_shared": ("uninitialised read", "byte 256 of shared memory s"),
    "shared_out_of_bounds": ("out of bounds read", "0 bytes past the end of shared memory"),
    "array_index": ("index 17 outside of an array", ""),
    "local_index": ("index 4 outside of an array", ""),
    "divergent_barrier": ("divergent barrier: __syncthreads", ""),
    "barrier_after_return": ("barrier after return", ""),
    "deadlock": ("deadlock: 31 threads wait in __shfl_sync", ""),
    "divergent_collective": ("divergent collective: __shfl_xor_sync", ""),
    "lane_outside_mask": ("shuffle at .* lane 4 reads lane 16, which the mask 0000ffff does not name", ""),
    "lane_returned": (r".* names lanes that have returned \(00000100\)", ""),
    "copy_not_waited": ("read before cp_async_wait", "of shared memory s"),
    "copy_without_barrier": (RACE, "of shared memory s"),
    "copy_into_memory_in_use": (
        "race, (write after read|read after write)|read before cp_async_wait",
        "shared memory s",
    ),
    "copy_source_overwritten": ("race, (write after read|read after write)", "of buffer 1"),
    "copy_source_too_late": ("race, (write after read|read after write)", "of buffer 1"),
    "read_out_of_bounds": ("out of bounds read", "0 bytes past the end of buffer 1"),
    "write_out_of_bounds": ("out of bounds write", "4 bytes before buffer 2"),
    "memory_of_the_host": ("out of bounds write", "memory that the launch was not given"),
    "misaligned": ("misaligned access", ""),
    "misaligned_store": ("misaligned access: 16 bytes", ""),
    "null_pointer": ("access through a null pointer", ""),
    "undefined_shift": ("shift by more than the bits there are", ""),
    "signed_overflow": ("overflow of a signed product", ""),
    "division_by_zero": ("division by zero", ""),
    "uninitialised_global": ("uninitialised read", "of buffer 2"),
    "unwritten_output": ("output not written: 4 bytes", "byte 280 of buffer 2"),
    "ldg_of_written": ("__ldg of memory that this launch writes", "of buffer 2"),
    "missing_grid_sync": (RACE, "of buffer 2"),
    "missing_grid_sync_after_reading": ("race, (read after write|write after read)", "of buffer 1"),
    "missing_second_grid_sync": ("race, (write after read|read after write)", "of buffer 2"),
    "other_block_reads": ("race, (write after read|read after write)", "of buffer 1"),
    "grid_sync_not_cooperative": ("grid barrier at .* not cooperative", ""),
    "missing_release": ("race, read after write", "of buffer 2"),
    "missing_acquire": ("race, read after write", "of buffer 2"),
    "missing_barrier_after_acquire": (RACE, "of buffer 2"),
    "missing_barrier_before_release": ("race, read after write", "of buffer 2"),
    "livelock": ("livelock: spinning", ""),
    "release_by_each_thread": ("race, read after write", "byte 28 of buffer 2"),
    "store_after_release": ("race, read after write", "of buffer 2"),
    "load_after_release": (RACE, "of buffer 2"),
    "missing_syncwarp_after_acquire": (RACE, "of buffer 2"),
    "atomic_and_plain": ("race, (read after write|write after read)", "of buffer 3"),
}
# Seen without hooks at every access too: these stop the kernel, or would stop the process.
SEEN_BY_PLAIN = (
    "array_index", "local_index", "divergent_barrier", "barrier_after_return", "deadlock", "divergent_collective",
    "lane_outside_mask", "lane_returned", "misaligned", "misaligned_store", "null_pointer", "undefined_shift",
    "signed_overflow", "division_by_zero", "grid_sync_not_cooperative", "livelock",
)  # fmt: skip


def run(program: str, *arguments: str) -> str:
    path = BUILD / program
    if not path.exists():
        pytest.skip(f"no {path.name}: run `make emulator`")
    result = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=120)
    return f"{result.stdout}{result.stderr}\nexit {result.returncode}"


@pytest.mark.parametrize("order", ["forward 1 lazy", "reverse 1 eager", "random 1 random", "random 2 lazy"])
@pytest.mark.parametrize("variant", ["plain", "race"])
def test_conformance(variant, order):
    """Every wrapper and every built-in function against plain arithmetic; the same program runs on a GPU."""
    output = run(f"conformance_{variant}", *order.split())
    assert "FAILED" not in output
    assert output.endswith("\n0 checks failed\n\nexit 0")


def test_every_name_is_in_the_conformance_program():
    """The emulator provides nothing that conformance does not use."""
    cuda = (ROOT / "tests" / "emulator" / "cuda.h").read_text()
    cuda = re.sub(r"namespace emulator \{.*?\}  // namespace emulator", "", cuda, flags=re.DOTALL)
    arch = (ROOT / "csrc" / "arch" / "emulated.cuh").read_text().split("namespace biflow::arch {")[1]
    used = "".join(path.read_text() for path in (ROOT / "tests" / "emulator").glob("conformance*.cu"))
    names = set(re.findall(r"EMULATOR_ATOMIC\((\w+), ", cuda))
    names |= set(re.findall(r"^(?:template <.*>\n)?(?:EMULATOR_UNCHECKED )?(?:inline )?\w+\*? (\w+)\(", cuda, re.M))
    names |= set(re.findall(r"^(?:EMULATOR_UNCHECKED )?(?:inline )?\w+ (\w+)\(", arch, re.M))
    assert {"atomicXor", "__shfl_up_sync", "__syncthreads_or", "rsqrtf", "grid_sync", "cp_async_wait"} <= names
    assert {name for name in names - {"name"} if not re.search(rf"\b{name}\b", used)} == set()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MESSAGES)
def test_defect_is_reported(name, order):
    """In every order: what is wrong, in which line, with which memory, by which thread of which kernel."""
    said = run("defects_race", name, "defect", order)
    kind, memory = MESSAGES[name]
    assert re.match(kind, said)
    assert memory in said
    assert f"::{name}<false>" in said
    places = [
        f"{file}:{number + ('the next line' in line)}"
        for file, lines in DEFECTS.items()
        for number, line in enumerate(lines, 1)
        if re.search(rf"//.*\b{name}\b", line)
    ]
    assert any(place in said for place in places) or name == "unwritten_output"  # nobody did that
    if name not in ("unwritten_output", "deadlock"):  # these are not about one thread
        assert re.search(r"thread \(\d+,0,0\) of block \([0-2],0,0\); kernel", said)


@pytest.mark.parametrize("name", SEEN_BY_PLAIN)
def test_defect_is_reported_without_the_checker(name):
    assert re.match(MESSAGES[name][0], run("defects_plain", name, "defect"))


@pytest.mark.parametrize("name", ["uninitialised_shared", "uninitialised_global"])
def test_memory_that_nobody_wrote_makes_a_nan(name):
    assert run("defects_plain", name, "defect") == "a NaN\n\nexit 0"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MESSAGES)
def test_no_false_alarm(name, order):
    for variant in ("race", "plain"):
        assert run(f"defects_{variant}", name, "correct", order) == "no error\n\nexit 0"


def test_every_defect_has_a_message():
    assert set(re.findall(r"^    CASE\((\w+),", "\n".join(DEFECTS["defects.cu"]), re.M)) == set(MESSAGES)


# --- the grid barrier: each of its parts is needed, and missed ------------------------------------------------------

BARRIER = ROOT / "csrc" / "arch" / "grid_barrier.cuh"
NEEDED = (
    r"__syncthreads\(\);",
    r"release_fence\(\);",
    r"acquire_fence\(\);",
    r"while \(behind\(.*spin\(\+\+turn\);",
    r"add_relaxed\(.*;",
    r"store_relaxed\(.*;",
)


def barrier_parts() -> list[tuple[int, str]]:
    """Every synchronisation of the barrier: its line and text."""
    lines = enumerate(BARRIER.read_text().splitlines(), 1)
    return [(i, found[0]) for i, line in lines for part in NEEDED if (found := re.search(part, line))]


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line, _ in barrier_parts()])
def test_every_part_of_the_grid_barrier_is_missed(line, tmp_path):
    if not (BUILD / "conformance_race").exists():
        pytest.skip("no conformance_race: run `make emulator`")
    text = BARRIER.read_text().splitlines()
    part = dict(barrier_parts())[line]
    text[line - 1] = text[line - 1].replace(part, ";")
    changed = {str(BARRIER.relative_to(ROOT)): "\n".join(text)}
    program = Building().rebuild("conformance_race", changed, tmp_path)
    said = [run(program, order, "1", "lazy") for order in ORDERS]
    assert any("exit 0" not in text for text in said), part
    assert any(re.search(r"race, |uninitialised read|livelock", text) for text in said), said


def test_the_grid_barrier_has_all_parts():
    assert [part.split("(")[0] for _, part in barrier_parts()] == [
        "__syncthreads", "release_fence", "add_relaxed", "while ", "acquire_fence", "__syncthreads",
    ]  # fmt: skip
