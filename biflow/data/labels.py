"""From the names of classes to numbers; class maps, and lists of images to leave out."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def class_map(path: str) -> dict[str, int]:
    """Class name -> number: a text file with a name a line, the first is class 0; or a .json object, {name: number}.

    Raises:
        FileNotFoundError: no such file. ValueError: it is not that; numbers other than 0 ... K - 1, each once.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"data.classes: {path}: no such file")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".json":
            names = [line.strip() for line in text.splitlines() if line.strip()]
            if len(set(names)) < len(names):
                twice = next(name for i, name in enumerate(names) if name in names[:i])
                raise ValueError(f"expected every class once, got {twice!r} twice")
            found = {name: k for k, name in enumerate(names)}
        else:
            found = json.loads(text)
        numbers = list(found.values()) if isinstance(found, dict) else []
        if not numbers or any(type(k) is not int for k in numbers) or sorted(numbers) != list(range(len(numbers))):
            raise ValueError("expected names of classes and the numbers 0 ... K - 1, each once")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a name a line, or a JSON object of numbers; {error}") from None
    return found


def numbered(
    texts: Sequence[str], name: Callable[[int], str], source: str, classes: str | None, known: Sequence[str] = ()
) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as they were read -> (labels (N,) int64, class names).

    By `classes`, a class map's path; else by `known`, the names of all classes in their order; else whole numbers are
    the labels themselves, each of 0 ... K - 1 in use, and anything else is numbered in the order of the names.

    Args:
        texts: one an image; "" where there is none.
        name: of an image by its number, for errors.

    Raises:
        ValueError: an image without a label, or with one that the map does not have; an unused number.
    """
    if "" in texts:
        raise ValueError(f"{source}: {name(texts.index(''))}: expected a label as the others have, got none")
    if classes is not None:
        order = class_map(classes)
    elif known:
        order = {text: k for k, text in enumerate(known)}
    elif all(text.isdecimal() and len(text) < 10 for text in texts):
        labels = torch.tensor([int(text) for text in texts])
        unused, largest = unused_class(labels), int(labels.max())
        if unused is not None:
            raise ValueError(
                f"{source}: expected images of every class, got none of class {unused} below {largest} "
                "(data.classes=FILE names the classes)"
            )
        return labels, tuple(str(k) for k in range(largest + 1))
    else:
        order = {text: k for k, text in enumerate(sorted(set(texts)))}
    for i, text in enumerate(texts):
        if text not in order:
            where = f"one of the {len(order)} classes of {classes or source}"
            raise ValueError(f"{source}: {name(i)}: expected {where}, got {text!r}")
    return torch.tensor([order[text] for text in texts]), tuple(sorted(order, key=order.__getitem__))


def unused_class(labels: Tensor) -> int | None:
    """The smallest class below the largest label (all at least 0) that has none; None: every class is in use."""
    return next((k for k, found in enumerate(labels.unique().tolist()) if k != found), None)


def kept_rows(names: Sequence[str], excluded: set[str]) -> tuple[np.ndarray, set[str]]:
    """The rows (n,) int64 whose name, or whose shard or folder (what stands before a "/"), is not excluded.

    Also the names of `excluded` that belong to any.
    """
    if not excluded:
        return np.arange(len(names)), set()
    rows, used = [], set()
    for i, name in enumerate(names):
        why = excluded.intersection((name, *(name[:k] for k, sign in enumerate(name) if sign == "/")))
        used |= why
        if not why:
            rows.append(i)
    return np.array(rows, dtype=np.int64), used
