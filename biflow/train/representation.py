"""Alignment of a flow's features with a frozen encoder's, beside the likelihood (FlowBack, arXiv 2511.22345, 4.2).

What the paper leaves open is decided in docs/decisions/0021; which weights each strategy reaches: docs/flowback.md.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biflow import checkpoint, distributed
from biflow.data import ImageData, Latents
from biflow.models import TarFlow
from biflow.models.pseudo_reverse import detached_features, pseudo_reverse
from biflow.train import encoders
from biflow.train.configs import FlowTraining
from biflow.train.feature_cache import FeatureCache

PROJECTOR_SEED = 0xA119  # added to the run's: the flow starts as it would without alignment


def representation_loss(projected: Sequence[Tensor], targets: Tensor) -> Tensor:
    """-1/|A| sum_a mean_{b,t} cos(projected_abt, targets_bt), a scalar in [-1, 1] (arXiv 2511.22345, eq. 4 and 5).

    Args:
        projected: for each of the |A| aligned layers (B,T,F), of any float dtype; computed in fp32, or fp64 for fp64.
        targets: (B,T,F). A target or prediction of length 0 has cosine 0.
    """
    total = 0
    for found in projected:
        wide = torch.promote_types(found.dtype, torch.float32)
        total = total - F.cosine_similarity(found.to(wide), targets.to(wide), dim=-1).mean()
    return total / len(projected)


class Projectors(nn.Module):
    """What maps features (B,T,C) to the encoder's width (B,T,F): three linear layers with SiLU between them.

    One for all aligned layers, or one each.
    """

    def __init__(self, width: int, hidden: int, targets: int, count: int):
        super().__init__()
        self.each = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, targets)
            )
            for _ in range(count)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [self.each[index % len(self.each)](h) for index, h in enumerate(features)]


class Representation:
    """The alignment term of a run. `prepare` has to be called before `loss`.

    The projectors are trained with the flow and belong to the run's checkpoints, not to the flow; they have no averaged
    weights. The encoder is frozen and belongs to neither. sha256: of the encoder, once it is prepared.

    Args:
        config: of the run, with representation set. data: what the encoder is given, clean, and trained on if it is
            self-supervised.

    Raises:
        As `encoders.build`.
    """

    def __init__(self, config: FlowTraining, data: ImageData):
        own, model, seed = config.representation, config.model, config.run.seed
        self.config, self.own, self.data = config, own, data
        self.device = config.run.torch_device()
        if own.cache_features and isinstance(data.train_x, Latents) and data.train_x.posterior == "sample":
            raise ValueError(
                "representation.cache_features: expected false with data.posterior 'sample', since every step sees "
                f"another draw of a latent (data.posterior=mean can be cached), got {own.cache_features!r}"
            )
        self.pairs = own.pairs(model)
        grid = model.img_size // model.patch_size
        self.encoder, width = encoders.build(own.encoder, data, grid, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(PROJECTOR_SEED + seed)
            count = 1 if own.shared_projector else len(self.pairs)
            self.projectors = Projectors(model.width, own.projector_width, width, count)
        self.cache: FeatureCache | None = None
        self.sha256 = ""
        self.ready = False

    def prepare(self, out: Path | None = None, *, progress: bool = False) -> str:
        """Move the encoder to the device, train it if it is self-supervised, and write or open the cached features.

        All processes of a job call it together: the main one trains, all write features.

        out: the run's folder; None: nothing is kept, and features are cached in a folder of the configuration's only.

        Returns:
            SHA-256 of the encoder, wherever its file lies: a run is resumed with the same one only.
        """
        run, flip, processes = self.config.run, self.config.data.flip, distributed.join(self.config.run.device)
        self.encoder.to(self.device)
        with processes.main_first():
            encoders.prepare(self.encoder, self.data, out, seed=run.seed, flip=flip, progress=progress)
        self.sha256 = found = checkpoint.fingerprint(self.encoder, without=("weights",))
        if self.own.cache_features:
            given = self.own.cache_features
            if given is True and out is None:
                raise ValueError("cache_features: expected a folder without the folder of a run, got True")
            self.cache = FeatureCache(
                out / "features" if given is True else Path(given).expanduser(),
                self.data.train_x,
                {"encoder": found, "device": self.device.type},
                flip=flip,
                encode=lambda x: self.encoder(x.to(self.device)),
                batch=self.config.optim.batch_size // (processes.count * self.config.parallel.accumulate),
                processes=processes,
                progress=progress,
            )
        self.ready = True
        return found

    def encode(
        self, flow: TarFlow, x: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[tuple[int, int], Tensor]]:
        """(z, logdet, features) of images x (B,C,S,S), with the graph of the strategy; features (B,T,C) by pair.

        "forward" is one pass. The others also run layers of the aligned blocks again, on detached inputs: the two
        gradients go different ways from there.
        """
        if self.own.strategy == "forward":
            return flow.encode(x, y, features=self.pairs)
        z, logdet, states = flow.encode(x, y, return_states=True)
        if self.own.strategy == "detach":
            return z, logdet, detached_features(flow, states, y, features=self.pairs)
        until, context = min(block for block, _ in self.pairs), self.own.context or "live"
        found = pseudo_reverse(flow, states, y, context=context, features=self.pairs, until=until)
        return z, logdet, found.features

    def loss(self, features: dict[tuple[int, int], Tensor], x: Tensor, rows: Tensor | None = None) -> Tensor:
        """`representation_loss` of the features and of the clean images x (B,C,S,S) that they belong to.

        rows: which training images these are, see `FeatureCache`; None: others, whose targets are not cached.
        """
        if not self.ready:
            raise RuntimeError("representation: expected prepare() to be called before loss()")
        targets = self.encoder(x) if self.cache is None or rows is None else self.cache(rows).to(x.device)
        projected = self.projectors([features[pair] for pair in self.pairs])
        with torch.autocast(x.device.type, enabled=False):
            return representation_loss(projected, targets)
