"""Parts of an evaluation, each in a file of its own as soon as it is known: a kill loses the one in work."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from biflow.files import replacing


def digest(key: Mapping[str, Any]) -> str:
    """12 hex digits of the SHA-256 of JSON values, by which what was made from them is found again."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def kept(folder: Path, name: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """What `compute` returns, JSON values, read from folder/NAME-HASH.json where that is there, else written to it.

    key: what the value depends on, JSON values; HASH is of it, so another key has another file.
    """
    path = folder / f"{name}-{digest(key)}.json"
    if path.is_file():
        return json.loads(path.read_text())
    text = json.dumps(compute(), allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")
    return json.loads(text)
