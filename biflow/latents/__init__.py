"""Images to latents of an autoencoder and back: diffusers' AutoencoderKL, which is imported when one is loaded."""

from biflow.latents.autoencoder import check_same, decode, describe, downsampling, encode, load
from biflow.latents.encoding import EncodingConfig, encode_images

__all__ = ["EncodingConfig", "check_same", "decode", "describe", "downsampling", "encode", "encode_images", "load"]
