"""The CUDA build: no spills on any architecture, tensor cores and 16-byte accesses where they were meant."""

import biflow._C
import pytest
from cuda_binary import ARCHITECTURES, cuobjdump, kernels, table

pytestmark = [
    pytest.mark.skipif(not biflow._C.build_info()["cuda"], reason="built without CUDA: found no nvcc"),
    pytest.mark.skipif(cuobjdump() is None, reason="found no cuobjdump: pip install nvidia-cuda-cuobjdump"),
]

# kernel name -> instructions that at least one of its instantiations must have, per architecture
MUST_USE = {}


@pytest.fixture(scope="module")
def found():
    return kernels(cuobjdump())


def test_every_architecture_has_every_kernel(found):
    names = {a: sorted(k.name for k in found if k.architecture == a) for a in ARCHITECTURES}
    assert {k.architecture for k in found} == set(ARCHITECTURES)
    assert names["sm_80"] == names["sm_90a"] != []


def test_no_spills(found):
    assert [line for line in table([k for k in found if k.stack]) if "sm_" in line] == []
