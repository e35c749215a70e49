"""The executable specification: the ops of biflow.ops, same names and signatures, in plain torch.

Every function works for any floating dtype, on any device; all but the ones that write into buffers, whose names end
in `_`, with autograd of any order.
"""

from biflow.reference.affine import affine_decode, affine_encode
from biflow.reference.alignment import alignment_error
from biflow.reference.attention import attention, attention_qkv
from biflow.reference.block_params import block_params
from biflow.reference.decode_block import decode_block
from biflow.reference.gate import gate
from biflow.reference.jacobi_update import jacobi_update_
from biflow.reference.norm import add_norm, norm

__all__ = [
    "add_norm",
    "affine_decode",
    "affine_encode",
    "alignment_error",
    "attention",
    "attention_qkv",
    "block_params",
    "decode_block",
    "gate",
    "jacobi_update_",
    "norm",
]
