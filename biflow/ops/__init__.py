"""Functional ops: usable without biflow's models. One file per op; the formulas are in its docstrings."""

from biflow import _library  # noqa: F401
from biflow.ops.affine import affine_decode, affine_encode
from biflow.ops.alignment import alignment_error
from biflow.ops.attention import attention, attention_qkv
from biflow.ops.block_params import BlockWindows, block_params
from biflow.ops.decode_block import BlockConfig, BlockWeights, decode_block, has_fast_bf16, pack_block
from biflow.ops.gate import gate
from biflow.ops.jacobi_update import jacobi_update_
from biflow.ops.norm import add_norm, norm

__all__ = [
    "BlockConfig",
    "BlockWeights",
    "BlockWindows",
    "add_norm",
    "affine_decode",
    "affine_encode",
    "alignment_error",
    "attention",
    "attention_qkv",
    "block_params",
    "decode_block",
    "gate",
    "has_fast_bf16",
    "jacobi_update_",
    "norm",
    "pack_block",
]
