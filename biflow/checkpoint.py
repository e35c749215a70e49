"""Model and state files: safetensors with the configuration inside and a hash over everything; nothing is unpickled.

A file's safetensors metadata has one entry, `biflow`: a JSON object of `format`, `kind` (TarFlow, BiFlow, ...),
`version` (of biflow), `config`, `metadata`, and `sha256` over those and over every tensor's name, dtype, shape and
bytes. A flipped bit, in the header or in the data, is found when the file is read. One entry, because safetensors
writes several in random order: equal contents are equal files.
`metadata["policy"]` is the model's `policy`, if it has one.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import biflow
from biflow.config import from_mapping, to_mapping
from biflow.files import replacing
from biflow.models import BiFlow, BiFlowConfig, TarFlow, TarFlowConfig
from biflow.solvers import Policy

FORMAT = "biflow 1"
ENTRY = "biflow"
FIELDS = ("format", "kind", "version", "config", "metadata", "sha256")
KINDS = {"TarFlow": (TarFlow, TarFlowConfig), "BiFlow": (BiFlow, BiFlowConfig)}
POLICY = "policy"  # where a TarFlow's policy is in the metadata


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds: kind, biflow version, config and metadata as plain values, tensors (CPU, own memory)."""

    kind: str
    version: str
    config: dict[str, Any]
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def save(model: TarFlow | BiFlow, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the model and its configuration to one safetensors file, atomically: `path` is the old file or the new one.

    Args:
        model: a TarFlow or BiFlow, on any device. The policy of a TarFlow is kept too.
        path: the file; its folder must exist.
        metadata: further JSON values to keep in the file (`describe` reads them); "policy" is the model's own.

    Raises:
        TypeError: another kind of model, a policy that is none, or metadata that is not JSON. ValueError: metadata with
        "policy", a policy for another number of blocks. FileNotFoundError: no such folder.
    """
    kind = type(model).__name__
    if kind not in KINDS or type(model) is not KINDS[kind][0]:
        raise TypeError(f"model: expected one of {', '.join(KINDS)}, got {kind}")
    metadata = dict(metadata or {})
    if POLICY in metadata:
        raise ValueError(f"metadata: expected no {POLICY!r}, which is what model.policy is kept as")
    policy = getattr(model, "policy", None)
    if policy is not None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy: expected a solvers.Policy or None, got {type(policy).__name__}")
        metadata[POLICY] = policy.fitting(len(model.blocks)).to_mapping()
    write(path, kind, model.state_dict(), to_mapping(model.config), metadata)


def load(path: str | Path, device: str | torch.device = "cpu") -> TarFlow | BiFlow:
    """Read a model that `save` wrote, in eval mode, on `device`. The floating-point dtype is the file's.

    Raises:
        FileNotFoundError: no such file. ValueError: a truncated, corrupted, pickled or foreign file, an unknown kind, a
        configuration that this version does not take, tensors that do not fit the configuration, a policy that is
        malformed or for another number of blocks. NaN values are fine.
    """
    contents = read(path)
    if contents.kind not in KINDS:
        raise ValueError(f"{path}: expected a model of kind {' or '.join(KINDS)}, got kind {contents.kind!r}")
    cls, config_cls = KINDS[contents.kind]
    try:
        config = from_mapping(config_cls, contents.config, "config")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a valid {config_cls.__name__}; {error}") from None
    try:
        _check_tensors(cls, config, contents.tensors)
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten; the caller's RNG stays put
            model = cls(config)
        model.to(next(iter(contents.tensors.values())).dtype)
        model.load_state_dict(contents.tensors)
    except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected the tensors of the {contents.kind} that its config names; {error}"
        ) from None
    if isinstance(model, TarFlow) and POLICY in contents.metadata:
        try:
            model.policy = Policy.from_mapping(contents.metadata[POLICY], len(model.blocks))
        except ValueError as error:
            raise ValueError(f"{path}: expected a valid policy in the metadata; {error}") from None
    return model.to(device).eval()


def describe(path: str | Path) -> dict[str, Any]:
    """What a file holds, without building the model: kind, version, config, metadata, parameters (elements of all
    tensors), bytes (of the file). Errors as `read`."""
    contents = read(path)
    return {
        "kind": contents.kind,
        "version": contents.version,
        "config": contents.config,
        "metadata": contents.metadata,
        "parameters": sum(t.numel() for t in contents.tensors.values()),
        "bytes": Path(path).stat().st_size,
    }


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 (hex) over the model's kind, `config` (if any) and weights: equal for equal models on any device.

    without: fields of `config` that do not count, such as where a file lies.
    """
    config = {name: value for name, value in to_mapping(getattr(model, "config", {})).items() if name not in without}
    document = {"kind": type(model).__name__, "config": config}
    return _digest({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, document)


def write(
    path: str | Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    """Write tensors and two JSON documents to one safetensors file with an integrity hash, atomically."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected an existing folder, got {path.parent}")
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    document = {
        "format": FORMAT,
        "kind": kind,
        "version": biflow.__version__,
        "config": config,
        "metadata": metadata,
    }
    document["sha256"] = _digest(tensors, document)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={ENTRY: _text(document)})


def read(path: str | Path) -> Contents:
    """Read a file that `write` wrote and check its hash.

    Raises:
        FileNotFoundError: no such file. ValueError: not a file that biflow wrote, or not the bytes that it wrote.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: expected a .safetensors file, got a folder")
    start = path.open("rb").read(2)
    try:
        with safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
            if list(entries) == [ENTRY]:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise ValueError(
                f"{path}: expected a safetensors file, got a pickled one (PyTorch .pt); biflow never unpickles"
            ) from None
        raise ValueError(
            f"{path}: expected a complete safetensors file, got a truncated or foreign one ({error})"
        ) from None
    if list(entries) != [ENTRY]:
        came = ", ".join(sorted(entries)[:8]) or "none"
        raise ValueError(f"{path}: expected a file written by biflow (metadata entry {ENTRY!r}); got entries: {came}")
    try:
        document = json.loads(entries[ENTRY])
        if not isinstance(document, dict) or sorted(document) != sorted(FIELDS) or _text(document) != entries[ENTRY]:
            raise ValueError("something else")
        claimed = document.pop("sha256")
        found = _digest(tensors, document)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON as biflow writes it in its metadata; got {error}") from None
    if claimed != found:
        raise ValueError(f"{path}: the file is corrupted: expected SHA-256 {str(claimed)[:12]}..., got {found[:12]}...")
    if document["format"] != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT!r}, got {document['format']!r} (written by biflow {document['version']})"
        )
    config, metadata = document["config"], document["metadata"]
    if not isinstance(config, dict) or not isinstance(metadata, dict):
        raise ValueError(f"{path}: expected JSON objects as config and metadata, got other values")
    return Contents(str(document["kind"]), str(document["version"]), config, metadata, tensors)


def _text(document: Mapping[str, Any]) -> str:
    """The one way of writing a document: a flipped bit that leaves its meaning is found too."""
    return json.dumps(document, sort_keys=True)


def _digest(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> str:
    """SHA-256 over a document and contiguous CPU tensors, sorted by name, each text preceded by its length."""
    total = hashlib.sha256()

    def put(text: str) -> None:
        data = text.encode()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)

    put(_text(document))
    for name in sorted(tensors):
        tensor = tensors[name]
        put(name)
        put(f"{tensor.dtype} {tuple(tensor.shape)}")
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _check_tensors(cls: type[nn.Module], config: Any, tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless `tensors` are those of `cls(config)`. Allocates nothing, whatever sizes the config claims."""
    layers = getattr(config, "layers_per_block", None) or config.layers_per_group
    depth = sum(layers) if isinstance(layers, tuple) else layers * config.num_blocks
    if depth > len(tensors):  # a claim of 10^9 layers must not keep the next lines busy
        raise ValueError(f"the config names {depth} layers, the file has {len(tensors)} tensors")
    with torch.device("meta"):
        expected = cls(config).state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"tensor {name!r} is missing")
        if name not in expected:
            raise ValueError(f"tensor {name!r} is unexpected")
        if expected[name].shape != tensors[name].shape:
            raise ValueError(
                f"tensor {name!r}: expected shape {tuple(expected[name].shape)}, got {tuple(tensors[name].shape)}"
            )
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"expected one floating-point dtype, got {', '.join(sorted(map(str, dtypes)))}")
