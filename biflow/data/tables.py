"""Hugging Face `datasets`: folders of `save_to_disk`, parquet files, data sets of the hub. The library reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biflow.data.records import Rows, digest_of

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hf:"
SPLIT = "train"
LABELS = ("label", "labels")


class Table:
    """The image column of a table; its rows are {"bytes", "path"}."""

    def __init__(self, dataset: "Dataset", column: str):
        self.dataset, self.column, self.names = dataset, column, Rows(len(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, rows: Sequence[int]) -> list[bytes]:
        found = self.dataset[[int(row) for row in rows]][self.column] if len(rows) else []
        return [_bytes(cell) for cell in found]

    def digest(self, rows: Sequence[int]) -> str:
        files = [Path(file["filename"]) for file in self.dataset.cache_files]
        return digest_of(files, self.dataset._fingerprint, self.column, np.asarray(rows))


def _bytes(cell: dict[str, Any] | None) -> bytes:
    if cell is None:
        return b""
    if cell["bytes"] is not None:
        return cell["bytes"]
    return Path(cell["path"]).read_bytes() if cell["path"] else b""


def is_saved(path: Path) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def has_parquet(path: Path) -> bool:
    """Whether a folder, or its sub-folder `data`, holds parquet files."""
    return any(next(folder.glob("*.parquet"), None) is not None for folder in (path, path / "data"))


def open_table(
    source: str, split: str | None, image_key: str | None, label_key: str | None
) -> tuple[Table, list[str] | None, tuple[str, ...]]:
    """(images, label of each as text or None, names of all classes or ()).

    Args:
        source: a folder or .parquet file, or "hf:" and what `datasets.load_dataset` takes: a name on the hub, a folder.
        split: of the data set; None: "train", or the only one.
        image_key, label_key: columns; None: the only one of images; that of class labels or called "label", if any.

    Raises:
        ImportError: `datasets` is not installed. FileNotFoundError: there is no such data set, or none within reach.
        ValueError: not a data set, or without such a split or column.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{source}: needs Hugging Face datasets: pip install 'biflow[data]'") from None
    dataset = _load(source, split)
    if isinstance(dataset, datasets.DatasetDict):
        wanted = split or (SPLIT if SPLIT in dataset or len(dataset) != 1 else next(iter(dataset)))
        if wanted not in dataset:
            raise ValueError(f"{source}: data.split: expected one of {', '.join(dataset)}, got {wanted!r}")
        dataset = dataset[wanted]
    elif split is not None and is_saved(Path(source).expanduser()):
        raise ValueError(f"{source}: data.split: expected None for a folder of one split, got {split!r}")
    images = [name for name, feature in dataset.features.items() if _is_image(feature, datasets)]
    if image_key is None and len(images) != 1:
        raise ValueError(f"{source}: data.image_key: expected one of the columns of images, {images}, got None")
    if image_key is not None and image_key not in images:
        raise ValueError(f"{source}: data.image_key: expected one of {images}, got {image_key!r}")
    column = image_key or images[0]
    if label_key is None:
        classes = [n for n, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)]
        label_key = classes[0] if len(classes) == 1 else next((n for n in LABELS if n in dataset.features), None)
    elif label_key not in dataset.features:
        raise ValueError(f"{source}: data.label_key: expected one of {list(dataset.features)}, got {label_key!r}")
    if len(dataset) == 0:
        raise ValueError(f"{source}: expected at least one row, got none")
    labels, names = None, ()
    if label_key is not None:
        feature = dataset.features[label_key]
        values = dataset.select_columns([label_key]).with_format(None)[:][label_key]
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(feature.names)
            labels = ["" if v is None or v < 0 else names[v] for v in values]
        else:
            labels = ["" if v is None else str(v) for v in values]
    table = dataset.select_columns([column]).with_format(None).cast_column(column, datasets.Image(decode=False))
    return Table(table, column), labels, names


def _load(source: str, split: str | None) -> Any:
    import datasets

    path = Path(source.removeprefix(HUB)).expanduser()
    if path.suffix == ".parquet" and not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if is_saved(path):
            return datasets.load_from_disk(str(path))
        if path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files={split or SPLIT: str(path)})
        return datasets.load_dataset(str(path) if path.exists() else source.removeprefix(HUB), split=split)
    except Exception as error:  # the library, its hub client and its file systems each raise their own
        text = " ".join(str(error).split()) or type(error).__name__
        if path.exists():
            raise ValueError(f"{source}: expected a data set that Hugging Face datasets can read; {text}") from None
        raise FileNotFoundError(
            f"{source}: expected a folder, or a data set of the hub that is in the cache or within reach; {text}"
        ) from None


def _is_image(feature: Any, datasets: Any) -> bool:
    if isinstance(feature, datasets.Image):
        return True
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}
