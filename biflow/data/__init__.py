"""Image data: digits, .npz arrays, folders, WebDataset shards, Hugging Face data sets, as batches in [-1, 1]."""

from biflow.data.encoded import EncodedImages
from biflow.data.images import DataConfig, ImageData, Images, Quantisation, in_range, spread
from biflow.data.sources import is_encoded, load
from biflow.data.stream import Batch, Stream

__all__ = [
    "Batch",
    "DataConfig",
    "EncodedImages",
    "ImageData",
    "Images",
    "Quantisation",
    "Stream",
    "in_range",
    "is_encoded",
    "load",
    "spread",
]
