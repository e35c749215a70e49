"""Loads libbiflow.so, the torch ops of the engine, once per process."""

from pathlib import Path

import torch

_PATH = Path(__file__).with_name("libbiflow.so")

if not _PATH.exists():
    raise ImportError(f"biflow: {_PATH.name} is not built; after torch >= 2.11, run `pip install -e .` in the checkout")
torch.ops.load_library(str(_PATH))
