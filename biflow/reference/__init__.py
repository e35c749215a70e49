"""The executable specification: the ops of biflow.ops, same names and signatures, in plain torch.

Every function works for any floating dtype, on any device, with autograd of any order.
"""

from biflow.reference.affine import affine_decode, affine_encode
from biflow.reference.attention import attention
from biflow.reference.decode_block import block_params, decode_block

__all__ = ["affine_decode", "affine_encode", "attention", "block_params", "decode_block"]
