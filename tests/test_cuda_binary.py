"""The CUDA build: no spills on any architecture, tensor cores and 16-byte accesses where they were meant."""

import biflow._C
import pytest
from cuda_binary import ARCHITECTURES, cuobjdump, kernels, table

pytestmark = [
    pytest.mark.skipif(not biflow._C.build_info()["cuda"], reason="built without CUDA: found no nvcc"),
    pytest.mark.skipif(cuobjdump() is None, reason="found no cuobjdump: pip install nvidia-cuda-cuobjdump"),
]

# what every instantiation of a kernel must use, on every architecture; bf16 and half are words of 16 bits there
MUST_USE = {
    "affine_forward<float, float, float, 4>": {"16-byte loads": r"LDG\..*128", "16-byte stores": r"STG\..*128"},
    "affine_backward<float, float, float, 4>": {"16-byte loads": r"LDG\..*128", "16-byte stores": r"STG\..*128"},
    "affine_forward<unsigned short, unsigned short, float, 8>": {
        "16-byte loads": r"LDG\..*128",
        "16-byte stores": r"STG\..*128",
    },
    "affine_backward<unsigned short, unsigned short, float, 8>": {
        "16-byte loads": r"LDG\..*128",
        "16-byte stores": r"STG\..*128",
    },
    "jacobi_step<4>": {"16-byte loads": r"LDG\..*128", "16-byte stores": r"STG\..*128"},
    "decode_block_persistent<__nv_bfloat16": {
        "tensor cores": r"HMMA\.16816\.F32\.BF16",
        "asynchronous 16-byte copies": r"LDGSTS\..*128",
        "16-byte loads": r"LDG\..*128",
    },
    "decode_block_phase<__nv_bfloat16": {
        "tensor cores": r"HMMA\.16816\.F32\.BF16",
        "asynchronous 16-byte copies": r"LDGSTS\..*128",
        "16-byte loads": r"LDG\..*128",
    },
    "decode_block_persistent<float": {"asynchronous 16-byte copies": r"LDGSTS\..*128", "16-byte loads": r"LDG\..*128"},
    "decode_block_phase<float": {"asynchronous 16-byte copies": r"LDGSTS\..*128", "16-byte loads": r"LDG\..*128"},
    "attention_kernel": {
        "tensor cores": r"HMMA\.16816\.F32",
        "ldmatrix": r"LDSM\.16\.MT88\.4",
        "asynchronous 16-byte copies": r"LDGSTS\..*128",
        "16-byte loads": r"LDG\..*128",
        "16-byte stores": r"STG\..*128",
    },
}


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
    missing = [f"{k.name} on {k.architecture}: no {what}"
               for k in those for what, pattern in MUST_USE[name].items() if not k.uses(pattern)]  # fmt: skip
    assert missing == []
