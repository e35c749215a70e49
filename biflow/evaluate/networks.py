"""The networks in whose features sets of images are compared: Inception-v3 as torch-fidelity has it, DINOv2 of timm's.

Both take images (B,3,H,W) uint8 of any size and give features fp32 by name, an image's own whatever batch it is in. The
libraries (`pip install 'biflow[evaluation]'`) are imported when a network is built.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIZE = 224
OFFSET = 0.1  # of the scale by which DINOv2 resizes its table of positions
SPATIAL_CHANNELS = 7  # of sFID


class Inception:
    """The Inception-v3 of the FID, TensorFlow's of 2015-12-05: what ADM's evaluator (openai/guided-diffusion) reads.

    pool: (B,2048), pool_3. spatial: (B,2023), the first 7 channels of mixed_6/conv, which is torch-fidelity's
    Mixed_6d.branch1x1 (17x17, after ReLU), in the order of height, width, channel. logits: (B,1008), pool times the
    last layer's weight without its bias.

    Images are resized to 299x299 as TensorFlow 1 did (bilinear, not antialiased); convolutions are fp32, never TF32.

    Args:
        weights: a state dict as torch-fidelity's file weights-inception-2015-12-05-6726825d.pth; None: the one in
            torch.hub's cache, or a download.

    Raises:
        ImportError: torch-fidelity or torchvision, which it imports, is missing. FileNotFoundError: no such file, or no
        network. ValueError: other weights.
    """

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        from biflow.train import frozen

        def make(own: bool) -> nn.Module:
            source = None if own else _as_saved(frozen.read_weights(Path(weights).expanduser()))
            try:
                return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], source)
            except RuntimeError as error:  # load_state_dict lists every tensor
                if own:
                    raise
                reason = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"{weights}: expected torch-fidelity's weights of Inception-v3 "
                    f"(weights-inception-2015-12-05-6726825d.pth); {reason}"
                ) from None

        with frozen.building("Inception-v3", 0):
            frozen.library("torch_fidelity", "evaluation")
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            if weights is None:
                self.network = frozen.with_weights(make, "torch.hub", None, option="--inception PATH")
            else:
                self.network = make(False)
        self.device = torch.device(device)
        self.network.to(self.device)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            pool, logits = self.network(images.to(self.device))
        spatial, self._spatial = self._spatial, None
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool.cpu(), "spatial": spatial.cpu(), "logits": logits.cpu()}

    def _keep(self, layer: nn.Module, given: tuple, output: Tensor) -> None:
        self._spatial = output


class DINOv2:
    """DINOv2 ViT-L/14 as in Stein et al. 2023 (arXiv 2306.04675; their code is layer6ai-labs/dgm-eval).

    dinov2: (B,1024), the class token after the last norm. Images are resized to 224x224 by Pillow (bicubic,
    antialiased, rounded to 8 bits) and normalised by ImageNet's mean and standard deviation; the table of positions is
    resized to 16x16 as in facebookresearch/dinov2 (bicubic, not antialiased, by the scale 16.1 / 37).

    Args:
        weights: a state dict of timm's vit_large_patch14_dinov2.lvd142m, or Meta's dinov2_vitl14_pretrain.pth, whose
            names are the same; None: timm's cache, or a download.

    Raises:
        As `Inception`, of timm.
    """

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        from biflow.train import encoders, frozen

        with frozen.building("DINOv2", 0):
            network = encoders.dinov2(DINOV2, weights, extra="evaluation", option="--dinov2 PATH")
        side = DINOV2_SIZE // network.patch_embed.patch_size[0]
        network.pos_embed = nn.Parameter(resized_positions(network.pos_embed.detach(), side))
        network.patch_embed.grid_size = (side, side)  # timm resizes the table from this to the images' grid
        self.device = torch.device(device)
        self.network = frozen.Frozen(network, "imagenet").to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        pixels = torch.stack([_resized(image, DINOV2_SIZE) for image in images.cpu()]).to(self.device)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            tokens = self.network.module.forward_features(self.network.prepared(pixels / 127.5 - 1))
        return {"dinov2": tokens[:, 0].float().cpu()}


def resized_positions(table: Tensor, side: int) -> Tensor:
    """A class token's position and those of a square grid (1,1+M^2,C) for a grid of `side`, as DINOv2 does it."""
    own = round((table.shape[1] - 1) ** 0.5)
    if own == side:
        return table
    grid = table[:, 1:].float().unflatten(1, (own, own)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + OFFSET) / own, mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], 1)


def _resized(image: Tensor, side: int) -> Tensor:
    """(3,H,W) uint8 -> (3,side,side) uint8."""
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return torch.from_numpy(np.array(picture.resize((side, side), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def _as_saved(state: Mapping[str, Tensor]) -> io.BytesIO:
    """As torch-fidelity reads weights, with torch.load: what comes from a file of the user's is tensors only."""
    buffer = io.BytesIO()
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, buffer)
    buffer.seek(0)
    return buffer
