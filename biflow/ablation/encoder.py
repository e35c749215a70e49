"""What rows of an ablation share of representation alignment: an encoder, trained once, and its features on disk."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from biflow import checkpoint
from biflow import data as datasets
from biflow.ablation.pieces import digest, kept
from biflow.config import to_mapping
from biflow.data import ImageData, spread
from biflow.models import TarFlow
from biflow.train import FlowTraining, Representation, encoders, representation_loss, runs
from biflow.train.likelihood import add_noise
from biflow.train.trainer import OWN

FLOOR_IMAGES = 4000  # whose targets' mean, position by position, is the constant prediction


@dataclass(frozen=True)
class Prepared:
    """A configuration of stage one whose encoder is ready.

    config: with the weights and the folder of features that rows share; as it was without alignment.
    representation: with the frozen encoder; None without alignment.
    encoder: for the result: sha256, and what `encoders.described` or `encoders.probed` says; None without alignment.
    seconds: for the result: "encoder", of training it, "features", of writing them, by the row that did it; None for
        what is not done here. None without alignment.
    """

    config: FlowTraining
    representation: Representation | None = None
    encoder: dict | None = None
    seconds: dict | None = None


def prepare(config: FlowTraining, out: Path, progress: bool) -> Prepared:
    """Train the encoder and write its features, or find what an earlier row left.

    A self-supervised encoder without weights is out/encoders/HASH/encoder.safetensors, HASH of its settings, seed (its
    own, else the run's) and images; with cache_features: true its features are in out/features. Errors as
    `Representation` and its `prepare`.
    """
    own = config.representation
    if own is None:
        return Prepared(config)
    data = datasets.load(config.data)
    folder = out / "encoders" / _key(config, data)
    folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float | None] = {"encoder": None, "features": None}
    if own.encoder.name == "self_supervised" and own.encoder.weights is None:
        path = folder / "encoder.safetensors"
        started = time.perf_counter()
        Representation(_with(config, cache_features=False), data).prepare(folder, progress=progress)
        seconds["encoder"] = _first(folder, "encoder_seconds", started)
        config = _with(config, encoder=replace(own.encoder, weights=str(path)))
    if own.cache_features is True:
        config = _with(config, cache_features=str(out / "features"))
    found = Representation(config, data)
    started = time.perf_counter()
    sha256 = found.prepare(progress=progress)
    if own.cache_features:
        seconds["features"] = _first(folder, "features_seconds", started)
    known = dict(found.encoder.known) or encoders.probed(found.encoder, data)
    return Prepared(config, found, {"sha256": sha256, **known}, seconds)


@torch.no_grad()
def held_out_alignment(
    flow: TarFlow, run: Path, prepared: Prepared, data: ImageData, rows: torch.Tensor, seed: int, batch_size: int
) -> dict | None:
    """Mean cosine between the run's projected features and the encoder's, of the held-out images `rows`, noisy as in
    training and with their labels; None without alignment.

    cosine: over the aligned layers, tokens and images, of the averaged flow and the last step's projectors. floor: what
    a prediction has that ignores the image, each position's mean target over training images.
    """
    own = prepared.representation
    if own is None:
        return None
    state = checkpoint.read(runs.checkpoints(run)[0] / "state.safetensors").tensors
    own.projectors.load_state_dict({k.removeprefix(OWN): v for k, v in state.items() if k.startswith(OWN)})
    device, generator = flow.var.device, torch.Generator().manual_seed(seed)
    own.projectors.to(device)
    few = spread(len(data.train_x), FLOOR_IMAGES)
    parts = (own.encoder(data.train_x.batch(part).to(device)).float() for part in few.split(batch_size))
    constant = sum(part.sum(0) for part in parts) / len(few)
    cosine = floor = 0.0
    for part in rows.split(batch_size):
        x, y = data.val_x.batch(part), data.val_y[part].to(device)
        noisy = add_noise(x, flow.config.noise_std, data.bin_width, generator).to(device)
        targets = own.encoder(x.to(device)).float()
        features = flow.encode(noisy, y, features=own.pairs)[-1]
        found = representation_loss(own.projectors([features[pair] for pair in own.pairs]), targets)
        cosine -= float(found) * len(part) / len(rows)
        floor += float(F.cosine_similarity(targets, constant.expand_as(targets), dim=-1).mean()) * len(part) / len(rows)
    return {"cosine": cosine, "floor": floor}


def _key(config: FlowTraining, data: ImageData) -> str:
    own = config.representation.encoder
    made_from = {
        "encoder": to_mapping(own),
        "seed": encoders.seed_of(own, config.run.seed) if own.name == "self_supervised" else None,
        "grid": config.model.img_size // config.model.patch_size,
        "flip": config.data.flip,
        "images": data.train_x.digest(),
    }
    return digest(made_from)


def _first(folder: Path, name: str, started: float) -> float:
    """Seconds since `started`, or what they were when this was done first; later rows only read what it left."""
    return kept(folder, name, {}, lambda: round(time.perf_counter() - started, 1))


def _with(config: FlowTraining, **fields) -> FlowTraining:
    return replace(config, representation=replace(config.representation, **fields))
