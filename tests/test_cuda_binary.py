"""The CUDA build: no spills on any architecture, tensor cores and 16-byte accesses where they were meant."""

import biflow._C
import pytest
from cuda_binary import ARCHITECTURES, cuobjdump, kernels, table

pytestmark = [
    pytest.mark.skipif(not biflow._C.build_info()["cuda"], reason="built without CUDA: found no nvcc"),
    pytest.mark.skipif(cuobjdump() is None, reason="found no cuobjdump: pip install nvidia-cuda-cuobjdump"),
]

LOADS, STORES = r"LDG\..*128", r"STG\..*128"
COPIES = r"LDGSTS\..*128"


def affine(words: str, forward: tuple[int, int], backward: tuple[int, int]) -> dict:
    """A trip's 16-byte loads and stores of both kernels."""
    return {
        f"affine_{name}<{words}>": {"16-byte loads": (LOADS, loads), "16-byte stores": (STORES, stores)}
        for name, (loads, stores) in (("forward", forward), ("backward", backward))
    }


def attention(d: int, tiles: int) -> dict:
    """One tile of 64 keys and one of 16; rows are 2 d bytes, queries and outputs of a lane a quarter of that."""
    own = tiles * d // 16
    return {
        f"attention_kernel<{word}, {d}, {tiles}>": {
            "tensor cores": (rf"HMMA\.16816\.F32{suffix}", tiles * (d + d // 4)),
            "ldmatrix": (r"LDSM\.16\.MT88\.4", d // 4 + d // 16),
            "asynchronous 16-byte copies": (COPIES, 2),
            "16-byte loads": (LOADS, own),
            "16-byte stores": (STORES, own),
        }
        for word, suffix in (("__nv_bfloat16", r"\.BF16"), ("__half", ""))
    }


def decode_block(word: str, **more: tuple[str, int]) -> dict:
    uses = {"asynchronous 16-byte copies": (COPIES, 1), "16-byte loads": (LOADS, 1), **more}
    return {f"decode_block_kernel<{word}": uses}


# What instantiations must use at least, on every architecture; bf16 and half are words of 16 bits in affine. It reads
# x, and the gradient, and two pieces of params; it writes z, or the gradients of x and params.
MUST_USE = (
    affine("float, float, float, 4", (3, 1), (4, 3))
    | affine("double, double, double, 2", (3, 1), (4, 3))
    | affine("unsigned short, unsigned short, float, 8", (3, 1), (4, 3))
    | affine("float, unsigned short, float, 8", (4, 2), (6, 4))  # fp32 data are two accesses beside bf16 params
    | affine("unsigned short, float, float, 8", (5, 1), (6, 5))
    | {"jacobi_step<4>": {"16-byte loads": (LOADS, 1), "16-byte stores": (STORES, 1)}}
    | decode_block("__nv_bfloat16", **{"tensor cores": (r"HMMA\.16816\.F32\.BF16", 1)})
    | decode_block("float")
    | attention(32, 1) | attention(32, 2) | attention(64, 1) | attention(64, 2) | attention(128, 1)
)  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return kernels(cuobjdump())


def test_every_architecture_has_every_kernel(found):
    names = {a: sorted(k.name for k in found if k.architecture == a) for a in ARCHITECTURES}
    assert {k.architecture for k in found} == set(ARCHITECTURES)
    assert names["sm_80"] == names["sm_90a"] != []


def test_no_spills(found):
    assert [line for line in table([k for k in found if k.stack]) if "sm_" in line] == []


@pytest.mark.parametrize("name", MUST_USE)
def test_instructions(found, name):
    those = [k for k in found if k.name.startswith(name)]
    assert those
    wanted = [(k, what, *bound) for k in those for what, bound in MUST_USE[name].items()]
    missing = [f"{k.name} on {k.architecture}: {k.uses(pattern)} {what}, not {least}"
               for k, what, pattern, least in wanted if k.uses(pattern) < least]  # fmt: skip
    assert missing == []
