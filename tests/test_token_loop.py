"""What a call of decode_block must not do at each token: allocate, enter Python, wait for a thread that never comes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks import BASE, random_weights

from biflow.ops import BlockConfig, BlockWindows, block_params, decode_block, pack_block

TESTS = Path(__file__).parent
PRECISIONS = ("fp32", "bf16")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def run(program, **environment):
    """The JSON that a Python program prints last."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# glibc's own entry points: nothing to look up, so nothing that could allocate before it is there
COUNTER = """
#include <errno.h>
#include <stddef.h>
void *__libc_malloc(size_t); void *__libc_calloc(size_t, size_t); void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
static long calls, bytes;
static void count(size_t n) { __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
                              __atomic_add_fetch(&bytes, (long)n, __ATOMIC_RELAXED); }
long counted_calls(void) { return __atomic_load_n(&calls, __ATOMIC_RELAXED); }
long counted_bytes(void) { return __atomic_load_n(&bytes, __ATOMIC_RELAXED); }
void *malloc(size_t n) { count(n); return __libc_malloc(n); }
void *calloc(size_t k, size_t n) { count(k * n); return __libc_calloc(k, n); }
void *realloc(void *p, size_t n) { count(n); return __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { count(n); return __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { count(n); return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
  count(n); *p = __libc_memalign(a, n); return *p ? 0 : ENOMEM; }
"""

COUNTED = """
import ctypes, json, resource
import torch
from blocks import BASE, random_weights
from biflow.ops import BlockConfig, BlockWindows, decode_block, pack_block

shim = ctypes.CDLL({shim!r})
torch.set_num_threads({threads})

def cost(f):
    "(allocations, bytes, pages first touched) of one call, the smallest of each of several"
    costs = []
    for _ in range(8):
        calls, size = shim.counted_calls(), shim.counted_bytes()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        f()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        costs.append((shim.counted_calls() - calls, shim.counted_bytes() - size, faults))
    return [min(c) for c in zip(*costs[3:])]

result = dict(nothing=cost(lambda: None), one=cost(lambda: ctypes.create_string_buffer(100000)))
for precision in ("fp32", "bf16"):
    for tokens in (8, 64, 256):
        config = BlockConfig(**{{**BASE, "tokens": tokens}})
        packed = pack_block(random_weights(config), config, precision)
        z = torch.randn(3, tokens, 4)
        out, windows = torch.empty_like(z), BlockWindows(packed, config, 3)
        windows(z, 0, tokens)
        result[f"decode {{precision}} {{tokens}}"] = cost(lambda: decode_block(z, packed, config, out=out))
        result[f"window {{precision}} {{tokens}}"] = cost(lambda: windows(z, 4, 8))
        config = BlockConfig(**{{**BASE, "tokens": tokens, "num_classes": 3, "class_tokens": 2, "rope": True}})
        packed = pack_block(random_weights(config), config, precision)
        given = dict(
            y=torch.tensor([0, 1, -1]), context=torch.randn(3, 5, 32), null_context=torch.randn(5, 32), guidance=1.5,
            attn_temp=0.7,
        )
        windows = BlockWindows(packed, config, 3, **given)
        windows(z, 0, tokens)
        guided = lambda: decode_block(z, packed, config, out=out, **given)
        result[f"guided decode {{precision}} {{tokens}}"] = cost(guided)
        result[f"guided window {{precision}} {{tokens}}"] = cost(lambda: windows(z, 4, 8))
print(json.dumps(result))
"""


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler and glibc")
@pytest.mark.parametrize("threads", [1, 2])
def test_allocations_do_not_depend_on_the_number_of_tokens(threads, tmp_path):
    """One call has its scratch and a few small things, and touches no page beyond what it allocated.

    Guided: two passes a step, after a prefix of class and context tokens.
    """
    (tmp_path / "count.c").write_text(COUNTER)
    shim = str(tmp_path / "libcount.so")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", shim, str(tmp_path / "count.c")], check=True)
    cost = run(COUNTED.format(shim=shim, threads=threads), LD_PRELOAD=shim)
    assert cost["one"][0] > cost["nothing"][0], "the counter must count"
    assert cost["one"][1] - cost["nothing"][1] >= 100000
    for what in ("decode", "window", "guided decode", "guided window"):
        for precision in PRECISIONS:
            calls = [cost[f"{what} {precision} {tokens}"][0] for tokens in (8, 64, 256)]
            assert calls[0] == calls[1] == calls[2], f"{what} {precision}: {calls} allocations"
    page = os.sysconf("SC_PAGE_SIZE")
    for name, (_, size, faults) in cost.items():
        assert faults <= size / page + 16, f"{name}: {faults} pages touched, {size} bytes allocated"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_python_between_the_tokens(precision):
    """As many calls of functions, Python's and C's, for 200 tokens as for two."""

    def calls(f):
        events = []
        f()
        sys.setprofile(lambda frame, event, argument: events.append(event))
        try:
            f()
        finally:
            sys.setprofile(None)
        return len(events)

    counts = []
    for tokens in (2, 200):
        config = BlockConfig(**{**BASE, "tokens": tokens})
        packed = pack_block(random_weights(config), config, precision)
        z = torch.randn(2, tokens, 4)
        windows = BlockWindows(packed, config, 2)
        counts.append(
            [
                calls(lambda z=z, p=packed, c=config: decode_block(z, p, c)),
                calls(lambda z=z, p=packed, c=config: block_params(z, p, c)),
                calls(lambda z=z, w=windows, n=tokens: w(z, 0, n)),
            ]
        )
    assert counts[0] == counts[1]


CREWS = """
import hashlib, json, os
if {pinned}:
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import torch
from blocks import make_case
from biflow.ops import block_params, decode_block, pack_block

result = []
for threads in {threads}:
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for name in ("crew", "wide_panels", "guided_annealed"):
        for batch in (1, 3):
            config, weights, z, options = make_case(name, batch)
            for precision in ("fp32", "bf16"):
                packed = pack_block(weights, config, precision)
                for _ in range(3):
                    x = decode_block(z, packed, config, **options)
                    digest.update(x.numpy().tobytes())
                    digest.update(block_params(x, packed, config, **options).numpy().tobytes())
    result.append(digest.hexdigest())
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def one_thread_digest():
    return run(CREWS.format(pinned=False, threads=[1]))[0]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a way to pin a process to one core")
def test_members_of_a_crew_that_hardly_ever_run(one_thread_digest):
    """Several threads on one core: all but one are kept waiting. Those that run do their share; the bits stay."""
    assert run(CREWS.format(pinned=True, threads=[2, 4, 7])) == [one_thread_digest] * 3


@pytest.mark.parametrize("limit", [1, 2])
def test_members_of_a_crew_that_never_come(limit, one_thread_digest):
    """OpenMP gives fewer threads than torch counts with: one thread is several members, one after the other."""
    assert run(CREWS.format(pinned=False, threads=[4]), OMP_THREAD_LIMIT=str(limit)) == [one_thread_digest]
