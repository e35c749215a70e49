"""How good a set of images is beside a reference: FID, sFID, Inception Score, precision and recall, FD on DINOv2.

A set is reduced to `SetStatistics` first; those of parts of a set, measured anywhere, merge into those of the whole.
Processes that measure a set together each read and measure their share of it.
"""

import functools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from biflow.data import DataConfig, Stream, load, spread
from biflow.data.adm import NpzImages, to_bytes
from biflow.distributed import Processes
from biflow.evaluate.frechet import gaussian_distance
from biflow.evaluate.inception_score import inception_score
from biflow.evaluate.moments import Moments, StreamingMoments
from biflow.evaluate.precision_recall import precision_recall
from biflow.evaluate.shares import ALONE, like_others
from biflow.files import replacing

NEIGHBOURS = 3
REFERENCE_IMAGES = 10_000  # whose features are kept for precision and recall: as many as ADM's references have images
# features: their mean and covariance in a .npz; the names of the first two are ADM's
FILE_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dinov2": ("mu_dinov2", "sigma_dinov2")}
COUNT, KEPT = "count", "pool"

Network = Callable[[Tensor], dict[str, Tensor]]  # images (B,3,H,W) uint8 -> features (B,F) by name


@dataclass(frozen=True)
class ImageSet:
    """Images of any source. count: N. batches: n, rows -> the images `rows` (None: all) as (n,3,H,W) uint8, in the same
    order for every n.

    corrupt: the names of those that were found corrupt so far, each replaced by another.
    """

    source: str
    count: int
    batches: Callable[..., Iterator[Tensor]]
    corrupt: Callable[[], Iterable[str]] = tuple

    @classmethod
    def of(cls, config: DataConfig) -> "ImageSet":
        """A .npz in the order of the file, whatever labels it has; the training images of another source, centre crops
        in an order of their own (seed 0), which decides the parts of the Inception Score. Gray is repeated to RGB.

        Raises: as `NpzImages` and `biflow.data.load`.
        """
        if config.source.endswith(".npz"):
            images = NpzImages(config.source)
            return cls(config.source, images.count, images.batches)
        data = load(replace(config, val_fraction=0.0, crop="center"))
        images = data.train_x
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))

        def batches(size: int, rows: range | None = None) -> Iterator[Tensor]:
            own = order if rows is None else order[rows.start : rows.stop]
            parts = own.split(size) if len(own) else ()
            stream = Stream(images, parts.__getitem__, len(parts))
            try:
                for step in range(len(parts)):
                    yield to_bytes(images.quantisation.values(stream.read(step).pixels))
            finally:
                stream.close()

        return cls(config.source, len(images), batches, lambda: data.corrupt.reasons if data.corrupt else ())


@dataclass(frozen=True)
class SetStatistics:
    """What a set of images is reduced to.

    moments: of the features by their names. pool (n,2048), logits (n,1008): fp32 features of Inception, image by image;
    None: not known.
    """

    moments: dict[str, Moments]
    pool: Tensor | None = None
    logits: Tensor | None = None

    def merge(self, other: "SetStatistics") -> "SetStatistics":
        """Of both sets together, this one's images first. ValueError: they have other features, or unknown counts."""
        for name in ("pool", "logits"):
            if (getattr(self, name) is None) != (getattr(other, name) is None):
                raise ValueError(f"{name}: expected in both sets or in none, got it in one")
        if self.moments.keys() != other.moments.keys():
            raise ValueError(f"expected features {', '.join(self.moments)} in both, got {', '.join(other.moments)}")
        return SetStatistics(
            {name: own.merge(other.moments[name]) for name, own in self.moments.items()},
            None if self.pool is None else torch.cat([self.pool, other.pool]),
            None if self.logits is None else torch.cat([self.logits, other.logits]),
        )

    @classmethod
    def gathered(cls, own: "SetStatistics | None", processes: Processes) -> "SetStatistics | None":
        """Those of all processes' shares merged by rank, on the main one; None on the others.

        own: of this process's share; None: of no images. At least one process has some.
        """
        if processes.count == 1:
            return own
        about = (
            None
            if own is None
            else (own.pool is None, own.logits is None, {name: m.count for name, m in own.moments.items()})
        )
        parts = [part for part in processes.gather([about]) if part is not None]
        no_pool, no_logits, names = parts[0]

        def rows(part: Tensor | None) -> Tensor | None:
            return processes.gather_rows(like_others(processes, part))

        both = {name: None if own is None else own.moments[name] for name in names}
        both = {name: None if m is None else torch.cat([m.mean[None], m.covariance])[None] for name, m in both.items()}
        both = {name: rows(part) for name, part in both.items()}
        pool = None if no_pool else rows(own and own.pool)
        logits = None if no_logits else rows(own and own.logits)
        if not processes.main:
            return None
        found = [
            SetStatistics({name: Moments(both[name][i, 0], both[name][i, 1:], counts[name]) for name in names})
            for i, (*_, counts) in enumerate(parts)
        ]
        return replace(functools.reduce(SetStatistics.merge, found), pool=pool, logits=logits)

    def save(self, path: str | Path) -> None:
        """As a .npz that serves as a reference: mean and covariance under the names that ADM's references have, and at
        most 10,000 rows of pool, evenly spaced. ValueError: moments of other features."""
        arrays = {}
        for name, moments in self.moments.items():
            mean, covariance = FILE_KEYS[name]
            arrays |= {mean: moments.mean.numpy(), covariance: moments.covariance.numpy()}
            arrays[f"{COUNT}_{name}"] = np.int64(moments.count)
        if self.pool is not None:
            arrays[KEPT] = self.pool[spread(len(self.pool), REFERENCE_IMAGES)].numpy()
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)


def read_statistics(path: str | Path) -> SetStatistics:
    """The statistics in a .npz: those of `SetStatistics.save`, or mu, sigma, mu_s, sigma_s as ADM's references have.

    A file without any gives no moments. ValueError: not a .npz, or arrays that do not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            moments = {}
            for name, (mean, covariance) in FILE_KEYS.items():
                if mean in file and covariance in file:
                    own = [torch.from_numpy(file[key].astype(np.float64)) for key in (mean, covariance)]
                    count = int(file[f"{COUNT}_{name}"]) if f"{COUNT}_{name}" in file else None
                    moments[name] = Moments(*own, count)
            pool = torch.from_numpy(file[KEPT]) if KEPT in file else None
            return SetStatistics(moments, pool)
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected a .npz with statistics of images; {error}") from None


def measure(
    images: Iterable[Tensor], networks: Sequence[Network], *, keep: Tensor | None = None, progress: tqdm | None = None
) -> SetStatistics:
    """The statistics of images that come in batches (n,3,H,W) uint8.

    Args:
        networks: `Inception`, `DINOv2`, or others that give features by name.
        keep: (n,) int64, ascending: images whose pool is kept; None: all.
        progress: updated by the number of images.

    Raises:
        ValueError: no images, NaN or infinite features.
    """
    streams: dict[str, StreamingMoments] = {}
    kept: dict[str, list[Tensor]] = {"pool": [], "logits": []}
    start = 0
    for batch in images:
        for network in networks:
            for name, features in network(batch).items():
                if name in FILE_KEYS:
                    streams.setdefault(name, StreamingMoments()).add(features)
                if name in kept:
                    some = name == "pool" and keep is not None
                    rows = keep[(keep >= start) & (keep < start + len(batch))] - start if some else slice(None)
                    kept[name].append(features[rows])
        start += len(batch)
        if progress is not None:
            progress.update(len(batch))
    if not start:
        raise ValueError("images: expected at least one, got none")
    found = {name: torch.cat(parts) if parts else None for name, parts in kept.items()}
    return SetStatistics({name: stream.result() for name, stream in streams.items()}, **found)


def measure_set(
    images: ImageSet,
    networks: Sequence[Network],
    *,
    batch_size: int,
    limit: int | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> SetStatistics | None:
    """`measure` of an image set, by all processes together; None but on the main one, which shows the progress of its
    share.

    limit: of the images whose pool is kept, evenly spaced.
    """
    if not images.count:
        raise ValueError(f"{images.source}: expected images, got a file of statistics")
    share, own = processes.split(images.count), None
    keep = None if limit is None else spread(images.count, limit) - share.start
    if len(share):
        off = not (progress and processes.main)
        with tqdm(total=len(share), desc=images.source, unit="image", disable=off) as bar:
            own = measure(images.batches(batch_size, share), networks, keep=keep, progress=bar)
    return SetStatistics.gathered(own, processes)


def measure_reference(
    images: ImageSet,
    networks: Sequence[Network],
    *,
    batch_size: int,
    progress: bool = False,
    processes: Processes = ALONE,
) -> SetStatistics | None:
    """What samples are compared with: the statistics in a .npz, and what the images beside them, or of another source,
    add; None but on the main process.

    Of ADM's references mu and sigma are of the whole data set, and the 10,000 images serve precision and recall.
    ValueError: neither.
    """
    npz = images.source.endswith(".npz")
    stored = read_statistics(Path(images.source).expanduser()) if npz else SetStatistics({})
    if not images.count:
        if not stored.moments:
            raise ValueError(f"{images.source}: expected images or statistics (mu and sigma), got neither")
        return stored if processes.main else None
    options = {"batch_size": batch_size, "limit": REFERENCE_IMAGES, "progress": progress, "processes": processes}
    found = measure_set(images, networks, **options)
    return None if found is None else replace(found, moments={**found.moments, **stored.moments})


def score(
    samples: SetStatistics, reference: SetStatistics | None, device: str | torch.device = "cpu"
) -> dict[str, float | None]:
    """The numbers of a set of samples; None where the sets have no features for it.

    fid: `gaussian_distance` of pool (Heusel et al. 2017, arXiv 1706.08500). sfid: of spatial (Nash et al. 2021, arXiv
        2103.03841). fd_dinov2: of dinov2 (Stein et al. 2023, arXiv 2306.04675). All three are biased upwards by few
        images, and of no more images than features the covariance is singular: compare equal numbers of samples.
    inception_score, inception_score_std: `inception_score` of logits.
    precision, recall: `precision_recall` of pool, k = 3, computed on `device`.
    """
    found: dict[str, float | None] = {}
    for key, name in (("fid", "pool"), ("sfid", "spatial"), ("fd_dinov2", "dinov2")):
        both = reference is not None and name in samples.moments and name in reference.moments
        found[key] = gaussian_distance(samples.moments[name], reference.moments[name]) if both else None
    mean, std = (None, None) if samples.logits is None else inception_score(samples.logits)
    found |= {"inception_score": mean, "inception_score_std": std, "precision": None, "recall": None}
    pools = [one.pool for one in (reference, samples) if one is not None and one.pool is not None]
    if len(pools) == 2 and min(map(len, pools)) > NEIGHBOURS:
        found["precision"], found["recall"] = precision_recall(*(pool.to(device) for pool in pools), k=NEIGHBOURS)
    return found
