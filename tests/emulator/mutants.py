"""Plants defects in the GPU kernels, one token at a time, and expects the kernel tests to turn red.

    PYTHONPATH=tests python -m emulator.mutants --count 60  # or `make mutants`; needs `make emulator`

A mutant is one line of a kernel or its launcher changed by one operator. Of CUDA C++ it is compiled into a copy of the
emulated library and meets the kernel tests of its op, tests/kernels/test_<op>.py: first with the race checker, and if
they pass, in forward and random order. Of Triton it meets the cases of the interpreter. The mutants are drawn by
`--seed`, the operators in turn. What survives is printed: a missing test, or a mutant that computes the same, which
equivalent_mutants.json then lists with the reason.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from .building import BUILD, ROOT, Building, DoesNotCompile, copy_package

EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")
FILES = (
    "csrc/cuda/*.cu", "csrc/cuda/*.cuh", "csrc/arch/grid_barrier.cuh", "csrc/arch/vector.cuh",
    "biflow/ops/_triton/[!_]*.py",
)  # fmt: skip
UNTESTED = ("csrc/cuda/status.cu",)  # the runtime's error texts


def doubled(found: re.Match) -> str:
    return f"{found[1]}{2 * int(found[2])}"


def incremented(found: re.Match) -> str:
    return str(int(found[0]) + 1)


# operator: what it looks for in code, what it puts there. The first ones take a synchronisation away.
SYNCHRONISATION = {
    "drop __syncthreads": (r"__syncthreads\(\);", ";"),
    "drop __syncwarp": (r"__syncwarp\([^()]*\);", ";"),
    "drop a fence": (r"(arch::)?(release|acquire)_fence\(\);|__threadfence\(\);", ";"),
    "drop cp_async_wait": (r"arch::cp_async_wait<[^>]*>\(\);", ";"),
    "wait for one group less": (r"(cp_async_wait<)([^>]*)(>)", r"\g<1>(\g<2>) + 1\g<3>"),
    "drop cp_async_commit": (r"arch::cp_async_commit\(\);", ";"),
    "drop a barrier of the grid": (r"arch::grid_(sync|barrier)(<[^>]*>)?\([^()]*\);", ";"),
    "do not wait": (r"while \(.*spin\([^()]*\);", ";"),
}
OPERATORS = SYNCHRONISATION | {
    "< to <=": (r" < ", " <= "),
    "<= to <": (r" <= ", " < "),
    "> to >=": (r" > ", " >= "),
    ">= to >": (r" >= ", " > "),
    "== to !=": (r" == ", " != "),
    "!= to ==": (r" != ", " == "),
    "&& to ||": (r" && ", " || "),
    "|| to &&": (r" \|\| ", " && "),
    "+ to -": (r" \+ ", " - "),
    "- to +": (r" - ", " + "),
    "* to +": (r" \* (?!const)", " + "),
    "no negation": (r"(?<=[(?:=,] )-(?=\w)|(?<=\()-(?=\w)|(?<=return )-(?=\w)", ""),
    "divisor doubled": (r"( / )(\d+)\b", doubled),
    "modulus doubled": (r"( % )(\d+)\b", doubled),
    "shift the other way": (r" >> | << ", lambda found: " << " if ">" in found[0] else " >> "),
    "^ to |": (r" \^ ", " | "),
    "& to |": (r" & ", " | "),
    "+= to =": (r" [+*]= ", " = "),
    "-= to +=": (r" -= ", " += "),
    "constant plus 1": (r"(?<![\w.<\[])\d+(?![\w.>\]])", incremented),
    "max to min": (r"\bf?maxf?\(", lambda found: found[0].replace("max", "min")),
    "min to max": (r"\bf?minf?\(", lambda found: found[0].replace("min", "max")),
    "if to always": (r"\bif \((?!constexpr)(?=[^;{]*\))", "if (true || "),
    "if to never": (r"\bif \((?!constexpr)(?=[^;{]*\))", "if (false && "),
    "? always": (r" \? ", " || true ? "),
    "? never": (r" \? ", " && false ? "),
    "true to false": (r"\btrue\b", "false"),
    "false to true": (r"\bfalse\b", "true"),
    "index plus 1": (r"\[(?!n\]|d\]|k[A-Z])([a-z]\w*)\](?= [-+*/=<>]|[;,)])", r"[\1 + 1]"),  # n, d, k..: sizes
    "continue to break": (r"\bcontinue;", "break;"),
    "tanh, exp, log to their argument": (r"\b(?:expf?|logf?|tanhf?|exp2_fast|rsqrt_fast)\((?=\w)", "("),
}
SHARED = (
    "< to <=", "<= to <", "> to >=", ">= to >", "== to !=", "!= to ==", "+ to -", "- to +", "* to +", "no negation",
    "& to |", "+= to =", "-= to +=", "constant plus 1", "max to min", "min to max",
)  # fmt: skip
TRITON = {name: OPERATORS[name] for name in SHARED} | {
    "and to or": (r" and ", " or "),
    "or to and": (r" or ", " and "),
    "// to %": (r" // ", " % "),
    "% to //": (r" % ", " // "),
    "/ to *": (r" / ", " * "),
    "if to always": (r"\bif (?!True|False)", "if True or "),
    "if to never": (r"\bif (?!True|False)", "if False and "),
    "None to not None": (r" is None\b", " is not None"),
    "not None to None": (r" is not None\b", " is None"),
    "sum to max": (r"\btl\.sum\(", "tl.max("),
    "exp, rsqrt, erf to their argument": (r"\btl\.(?:exp|rsqrt|erf)\(", "("),
    "no mask": (r", inside(?=[,)])", ", inside | True"),
    "no fp32": (r"\.to\(tl\.float32\)", ""),
}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    operator: str
    before: str
    after: str

    def key(self) -> tuple[str, str, str]:
        return self.file, self.before, self.after

    def text(self) -> str:
        lines = (ROOT / self.file).read_text().splitlines(keepends=True)
        lines[self.line - 1] = self.after + "\n"
        return "".join(lines)


def blank(found: re.Match) -> str:
    return re.sub(r"[^\n]", "\0", found[0])


LAUNCH_BOUNDS = r"__launch_bounds__\([^)]*\)"


@functools.cache
def for_the_compiler_alone() -> list[str]:
    """Constants that stand in launch bounds and nowhere else: they change registers, not values."""
    texts = [re.sub(r"//[^\n]*", "", p.read_text()) for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    bounds = {
        name for t in texts for found in re.findall(LAUNCH_BOUNDS, t) for name in re.findall(r"\bk[A-Z]\w*", found)
    }
    rest = "".join(re.sub(LAUNCH_BOUNDS, "", t) for t in texts)
    return sorted(name for name in bounds if len(re.findall(rf"\b{name}\b", rest)) == 1)  # where they are defined


def code_of_triton(text: str) -> list[str]:
    """As `code_of`, of Python: nor are decorators, imports, heads of functions and sizes of tiles."""
    text = re.sub(r"\"\"\".*?\"\"\"|\"[^\"\n]*\"|#[^\n]*", blank, text, flags=re.DOTALL)
    text = re.sub(r"^(@|import |from |[A-Z_]+ = )[^\n]*", blank, text, flags=re.M)
    return re.sub(r"^def \w+\(.*?\)( -> [^\n]*)?:[ \0]*$", blank, text, flags=re.M | re.DOTALL).splitlines()


def code_of(text: str) -> list[str]:
    """The lines with everything blanked that is no code to change: comments, strings, directives, declarations."""
    for name in for_the_compiler_alone():
        text = re.sub(rf"^[^\n]*\b{name} =[^;]*;", blank, text, flags=re.M)
    text = re.sub(r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"|__launch_bounds__\([^)]*\)", blank, text, flags=re.DOTALL)
    text = re.sub(r"^ *(#|template <|static_assert|using |namespace |}  // namespace)[^\n]*", blank, text, flags=re.M)
    return text.splitlines()


def mutants_of(file: str, operators=None) -> list[Mutant]:
    text, triton = (ROOT / file).read_text(), file.endswith(".py")
    code_lines, operators = (
        (code_of_triton if triton else code_of)(text),
        operators or (TRITON if triton else OPERATORS),
    )
    mutants = []
    for number, (line, code) in enumerate(zip(text.splitlines(), code_lines, strict=True), 1):
        for name, (pattern, replacement) in operators.items():
            for found in re.finditer(pattern, code):
                changed = found.expand(replacement) if isinstance(replacement, str) else replacement(found)
                mutants.append(Mutant(file, number, name, line, line[: found.start()] + changed + line[found.end() :]))
    return mutants


def all_mutants(only: list[str] | None = None, operators=None) -> list[Mutant]:
    files = sorted({str(p.relative_to(ROOT)) for pattern in FILES for p in ROOT.glob(pattern)} - set(UNTESTED))
    return [m for f in files if only is None or any(Path(f).match(o) for o in only) for m in mutants_of(f, operators)]


def draw(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """`count` of them, the operators in turn, so that the frequent ones do not crowd out the others.

    Each has a place by what it changes alone: another line's change, or one that leaves the list, moves no others.
    """

    def place(mutant: Mutant) -> bytes:
        words = (str(seed), mutant.file, mutant.operator, mutant.before.strip(), mutant.after.strip())
        return hashlib.sha256("\n".join(words).encode()).digest()

    by_operator = defaultdict(list)
    for mutant in sorted(mutants, key=place, reverse=True):
        by_operator[mutant.operator].append(mutant)
    drawn = []
    while len(drawn) < count and by_operator:
        for name in sorted(by_operator, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest()):
            drawn.append(by_operator[name].pop())
            if not by_operator[name]:
                del by_operator[name]
    return drawn[:count]


def equivalents() -> dict[tuple[str, str, str], str]:
    entries = json.loads(EQUIVALENT.read_text())
    return {(e["file"], e["before"], e["after"]): e["reason"] for e in entries}


# --- running the tests ------------------------------------------------------------------------------------------------

STAGES = (("race", "race"), ("plain", "forward,random"))  # build, backends
GIGABYTES = 6  # of addresses that a check may have: a defect may ask for all there are
PYTHON_TREE = "biflow"  # the target that is no file of the emulator's build: a copy of the package
PYTEST = ("-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-m", "not slow and not gpu")


@dataclass(frozen=True)
class Check:
    """A command that fails on a defect: of a folder with `target`, a file of the emulator's build or the package."""

    target: str
    words: tuple[str, ...]  # "{}" stands for the folder

    def run(self, folder: Path, seconds: int) -> subprocess.CompletedProcess[str]:
        """With at most `seconds` of the CPU's time, which does not depend on what else runs there."""
        return self._run(folder, f'ulimit -t {seconds}; exec "$@"')

    def measure(self, folder: Path) -> float:
        """The seconds of the CPU's time that it takes; it must pass."""
        done = self._run(folder, '"$@" && times >&2')
        if done.returncode != 0:
            raise SystemExit(f"without a defect, {' '.join(self.words)} fails:\n{done.stdout[-3000:]}")
        minutes, rest = done.stderr.splitlines()[-1].split()[0].split("m")  # of the children: 1m2.345s 0m0.678s
        return 60 * int(minutes) + float(rest.removesuffix("s"))

    def _run(self, folder: Path, script: str) -> subprocess.CompletedProcess[str]:
        words = [word.replace("{}", str(folder)) for word in self.words]
        command = ["env", "LC_ALL=C", "bash", "-c", f"ulimit -v {GIGABYTES << 20}; {script}", "check", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def tests_of(op: str) -> list[str]:
    """The kernel tests of csrc/cuda/<op>.cu: of its name, else of the name without its last words."""
    while op:
        found = [p for p in (ROOT / "tests/kernels").glob(f"test_{op}*.py") if re.match(rf"test_{op}(_|\.)", p.name)]
        if found:
            return [str(p.relative_to(ROOT)) for p in found]
        op = op.rpartition("_")[0]
    return []


class Campaign:
    def __init__(self) -> None:
        self.building = Building()
        self.limits: dict[Check, int] = {}

    def checks(self, file: str, variant: str, backends: str) -> list[Check]:
        """What tests a kernel file."""
        if file.endswith(".py"):
            cases = ("tests/kernels/triton_cases.py", "--stop")
            words = ("env", "TRITON_INTERPRET=1", "PYTHONPATH={}", sys.executable, "-P", *cases)
            return [Check(PYTHON_TREE, words)] if variant == "race" else []  # interpreted once
        users = [o for o, sources in self.building.sources.items() if file in sources]
        ops = sorted({Path(o).name.split(".")[0] for o in users if o.startswith(f"CMakeFiles/kernels_{variant}.dir")})
        tests = sorted({test for op in ops for test in tests_of(op)})
        checks = []
        program = f"conformance_{variant}"
        if file.startswith("csrc/arch/") and any(o.startswith(f"CMakeFiles/{program}.dir") for o in users):
            checks += [
                Check(program, ("{}/" + program, order, "1", "lazy")) for order in ("forward", "reverse", "random")
            ]
        if tests:
            options = ("--emulator", "{}", "--backends", backends)
            checks.append(Check(f"libbiflow_emulated_{variant}.so", (sys.executable, *PYTEST, *options, *tests)))
        return checks

    def measure(self, files: set[str], jobs: int) -> None:
        """What is not changed must pass, and tells how long a defective one may take."""
        checks = {check for file in files for stage in STAGES for check in self.checks(file, *stage)}
        ordered = sorted(checks, key=lambda check: -len(check.words))  # those of most tests first

        def limit(check: Check) -> int:
            return 10 + 3 * round(check.measure(ROOT if check.target == PYTHON_TREE else BUILD))

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            self.limits = dict(zip(ordered, pool.map(limit, ordered), strict=True))

    def run(self, mutant: Mutant) -> dict:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            try:
                result, by = self.verdict(mutant, Path(folder))
            except DoesNotCompile:
                result, by = "does not compile", ""
        return asdict(mutant) | {"result": result, "by": by, "seconds": round(time.monotonic() - start, 1)}

    def verdict(self, mutant: Mutant, folder: Path) -> tuple[str, str]:
        built = set()
        for variant, backends in STAGES:
            for check in self.checks(mutant.file, variant, backends):
                where = variant
                if check.target == PYTHON_TREE:
                    where = "interpreted"
                    copy_package({mutant.file: mutant.text()}, folder)
                elif check.target not in built:
                    self.building.rebuild(check.target, {mutant.file: mutant.text()}, folder)
                    built.add(check.target)
                done = check.run(folder, self.limits[check])
                if done.returncode == 5:
                    raise SystemExit(f"no tests: {' '.join(check.words)}")
                if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
                    return "killed", f"{where}: does not end"
                if done.returncode != 0:
                    return "killed", f"{where}: {first_error(done.stdout + done.stderr)}"
        return "survived", ""


def first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if re.search(r"Error|FAILED|: error [0-9.e+-]+, allowed", line)]
    return re.sub(r"^/\S*/", "", lines[0])[:300] if lines else "crashed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", metavar="FILE", help="such as attention.cuh; may be given again")
    parser.add_argument("--sync", action="store_true", help="all synchronisations taken away, instead of drawing")
    parser.add_argument("--survivors", type=int, default=0, help="as many may survive (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=BUILD / "mutants.json")
    arguments = parser.parse_args()

    known = equivalents()
    mutants = all_mutants(arguments.only, SYNCHRONISATION if arguments.sync else None)
    same = [m for m in mutants if m.key() in known]
    mutants = [m for m in mutants if m.key() not in known]
    if not arguments.sync:
        mutants = draw(mutants, arguments.count, arguments.seed)
    if not mutants:
        raise SystemExit("no mutants")
    campaign = Campaign()
    untested = {m.file for m in mutants if not campaign.checks(m.file, *STAGES[0])}
    if untested:
        raise SystemExit(f"no tests in tests/kernels for {', '.join(sorted(untested))}")
    campaign.measure({m.file for m in mutants}, arguments.jobs)

    results = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(campaign.run, m) for m in mutants]):
            results.append(r := done.result())
            place = f"{Path(r['file']).name}:{r['line']}"
            print(f"{r['result']:<17}{r['seconds']:5.0f} s  {place}  {r['operator']}  {r['by']}", flush=True)
            if r["result"] == "survived":
                print(f"    - {r['before'].strip()}\n    + {r['after'].strip()}", flush=True)
            counts = Counter(r["result"] for r in results)
            report = {"seed": arguments.seed, "counts": counts, "mutants": results}
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    minutes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime / 60
    judged = counts["killed"] + counts["survived"]
    print(
        f"{counts['killed']} of {judged} killed; {counts['does not compile']} do not compile, "
        f"{len(same)} are known to compute the same; {minutes:.0f} minutes of CPU time"
    )
    sys.exit(counts["survived"] > arguments.survivors)


if __name__ == "__main__":
    main()
