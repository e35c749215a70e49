"""What a flow's layers know: linear probes, logistic regressions of the class on features of the encode.

Of the mean over an image's tokens, and of single tokens, which is what an encoder's features are aligned with.

Source: FlowBack (arXiv 2511.22345, figure 4) by block and layer; what it leaves open is said in `probe_flow`.
"""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from biflow.config import check_fields
from biflow.data import EncodedImages, ImageData, Images, Latents, spread
from biflow.evaluate.features import check_features
from biflow.models import TarFlow

TOKEN_SEED = 0x70C


@dataclass(frozen=True)
class ProbeConfig:
    """What a probe is fitted and judged on.

    train_images, held_out_images: at most, evenly spaced.
    tokens: of every image, so many of its tokens at random are also probed one by one; 0: none.
    penalty: C of scikit-learn's LogisticRegression, one over the weight of |w|^2 / 2.
    iterations: of its solver, at most.
    batch_size: images of a pass.
    """

    train_images: int = 10_000
    held_out_images: int = 10_000
    tokens: int = 0
    penalty: float = 1.0
    iterations: int = 1000
    batch_size: int = 256

    def __post_init__(self):
        check_fields(self)
        for name in ("train_images", "held_out_images", "iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.tokens < 0:
            raise ValueError(f"tokens: expected at least 0, got {self.tokens}")
        if not 0 < self.penalty < float("inf"):
            raise ValueError(f"penalty: expected a finite number > 0, got {self.penalty}")


def probe_flow(
    flow: TarFlow,
    data: ImageData,
    features: Collection[tuple[int, int]] | None = None,
    config: ProbeConfig | None = None,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> list[dict]:
    """How well a linear classifier reads the class off each layer, by `linear_probe`.

    A layer's features are the mean over tokens of the residual stream after it (`TarFlow.encode(features=)`), of clean
    images, without a label: the mean class embedding, so that no layer is told the answer. The paper says "standard
    linear probing"; the pooling, the clean images and the unconditional pass are choices of ours.

    With config.tokens = k there is a second probe: a sample is one token's features and its image's label, k tokens of
    an image drawn without replacement, the same ones for every layer (at most T). An image's tokens are all on its side
    of the split, so no image is judged that a token was seen of; accuracy is a share of tokens.

    Args:
        flow: on any device. data: with labels in both splits.
        features: (block, layer) pairs, from 0; None: all.
        progress: called with the number of images of every pass.

    Returns:
        One entry a pair, in their order: block, layer, what `linear_probe` returns of the means, and with config.tokens
        the same of single tokens as token_accuracy, token_train_accuracy, token_images (tokens, N k) and
        token_converged.

    Raises:
        ImportError: scikit-learn is not installed. ValueError: no labels, nothing held out, data that do not fit; as
        `encode`.
    """
    config = config or ProbeConfig()
    if features is None:
        features = [(b, k) for b, block in enumerate(flow.blocks) for k in range(len(block.layers))]
    _library()
    train_y, val_y = data.train_y, data.val_y
    if train_y is None or val_y is None or not len(data.val_x):
        raise ValueError("data: expected labelled images, some of them held out, to probe with; got none")
    train, val = spread(len(data.train_x), config.train_images), spread(len(data.val_x), config.held_out_images)
    sides = []
    generator = torch.Generator().manual_seed(TOKEN_SEED)
    for images, labels, rows in ((data.train_x, train_y, train), (data.val_x, val_y, val)):
        tokens = _drawn_tokens(len(rows), flow.config.tokens, config.tokens, generator)
        found = layer_features(flow, images, rows, features, config.batch_size, tokens, progress)
        sides.append((*found, labels[rows]))
    (seen, seen_tokens, y), (unseen, unseen_tokens, val_y) = sides
    options = (config.penalty, config.iterations)
    results = []
    for pair in features:
        entry = {"block": pair[0], "layer": pair[1], **linear_probe(seen[pair], y, unseen[pair], val_y, *options)}
        if config.tokens:
            one, other = seen_tokens[pair], unseen_tokens[pair]
            ys = (labels.repeat_interleave(h.shape[1]) for labels, h in ((y, one), (val_y, other)))
            flat = linear_probe(one.flatten(0, 1), next(ys), other.flatten(0, 1), next(ys), *options)
            entry |= {f"token_{name}": value for name, value in flat.items()}
        results.append(entry)
    return results


@torch.no_grad()
def layer_features(
    flow: TarFlow,
    images: Images | EncodedImages | Latents,
    rows: Tensor,
    features: Collection[tuple[int, int]],
    batch_size: int,
    tokens: Tensor | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor]]:
    """Of the images `rows` (N,), fp32 on the CPU: (block, layer) -> the mean over tokens of its features (N,C), and
    (block, layer) -> those of the tokens (N,k) of each image (N,k,C); None: of none, k = 0."""
    tokens = torch.empty(len(rows), 0, dtype=torch.int64) if tokens is None else tokens
    device, pooled, single = flow.var.device, {pair: [] for pair in features}, {pair: [] for pair in features}
    for part, own in zip(rows.split(batch_size), tokens.split(batch_size), strict=True):
        found = flow.encode(images.batch(part).to(device, flow.var.dtype), features=features)[-1]
        for pair, h in found.items():
            pooled[pair].append(h.mean(1).float().cpu())
            chosen = own.to(device)[:, :, None].expand(-1, -1, h.shape[-1])
            single[pair].append(h.gather(1, chosen).float().cpu())
        progress(len(part))
    return tuple({pair: torch.cat(found) for pair, found in parts.items()} for parts in (pooled, single))


def _drawn_tokens(images: int, count: int, chosen: int, generator: torch.Generator) -> Tensor:
    """(images, min(chosen, count)) of `count` tokens, without replacement."""
    return torch.rand(images, count, generator=generator).argsort(1)[:, :chosen]


def linear_probe(
    train: Tensor, train_y: Tensor, val: Tensor, val_y: Tensor, penalty: float = 1.0, iterations: int = 1000
) -> dict:
    """A logistic regression on features standardised by the training mean and deviation; scikit-learn's, by L-BFGS.

    Args:
        train, val: features (N,F), (M,F). train_y, val_y: labels (N,), (M,) int64, at least two classes in train_y.
        penalty, iterations: as in `ProbeConfig`.

    Returns:
        accuracy: share of the M that it gets right. train_accuracy: of the N. images: N. converged: whether the solver
        was done before `iterations`.

    Raises:
        ImportError: scikit-learn is not installed. TypeError, ValueError: features that are no finite matrices of one
        width, another number of labels, a single class.
    """
    library = _library()
    check_features(train=train, val=val)
    for name, x, y in (("train", train, train_y), ("val", val, val_y)):
        if len(x) != len(y) or not len(x):
            raise ValueError(f"{name}: expected as many features as labels, at least 1; got {len(x)} and {len(y)}")
    if len(train_y.unique()) < 2:
        raise ValueError(f"train_y: expected at least two classes, got {train_y.unique().tolist()}")
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    seen, unseen = (((x.double() - mean) / std).numpy() for x in (train, val))
    model = library.LogisticRegression(C=penalty, max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged is in the result
        model.fit(seen, train_y.numpy())
    return {
        "accuracy": float(model.score(unseen, val_y.numpy())),
        "train_accuracy": float(model.score(seen, train_y.numpy())),
        "images": len(train),
        "converged": int(model.n_iter_.max()) < iterations,
    }


def _library():
    try:
        from sklearn import linear_model
    except ImportError as error:
        raise ImportError(f"expected scikit-learn for a linear probe ({error}): pip install 'biflow[train]'") from error
    return linear_model
