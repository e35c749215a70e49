"""Functional ops: usable without biflow's models. One file per op; the formulas are in its docstrings."""

from biflow import _library  # noqa: F401
from biflow.ops.affine import affine_decode, affine_encode
from biflow.ops.attention import attention
from biflow.ops.decode_block import BlockConfig, BlockWeights, decode_block, pack_block

__all__ = [
    "BlockConfig",
    "BlockWeights",
    "affine_decode",
    "affine_encode",
    "attention",
    "decode_block",
    "pack_block",
]
