"""Image data: digits, .npz arrays, folders, WebDataset shards, Hugging Face data sets and latents, by number."""

from biflow.data.encoded import EncodedImages
from biflow.data.images import DataConfig, ImageData, Images, Quantisation, in_range, spread
from biflow.data.latents import Latents
from biflow.data.sources import is_encoded, kind_of, load
from biflow.data.stream import Batch, Stream

__all__ = [
    "Batch",
    "DataConfig",
    "EncodedImages",
    "ImageData",
    "Images",
    "Latents",
    "Quantisation",
    "Stream",
    "in_range",
    "is_encoded",
    "kind_of",
    "load",
    "spread",
]
