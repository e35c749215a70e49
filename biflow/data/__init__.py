"""Image data: scikit-learn's digits, .npz arrays and image folders, as batches in [-1, 1]."""

from biflow.data.images import DataConfig, ImageData, ImageFiles, Images, Quantisation, in_range, spread
from biflow.data.sources import load

__all__ = ["DataConfig", "ImageData", "ImageFiles", "Images", "Quantisation", "in_range", "load", "spread"]
