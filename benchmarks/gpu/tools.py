"""What the parts share that imports nothing of the package: a build that failed is reported, too."""

import json
import os
import shutil
import sysconfig
from pathlib import Path

AGAIN = 75  # exit status of a measuring process that a row made hang, and that goes on after it when started again
UNTIL = "{until}"  # in a command: when it must have ended, in seconds of time.monotonic


def find(name: str) -> str | None:
    """A program on the PATH, beside this Python, of `make nvcc`, of $CUDA_HOME, of /usr/local/cuda: many machines have
    the CUDA toolkit in a folder that is not on the PATH."""
    toolkits = [
        *sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*")),
        *(Path(home) for home in [os.environ.get("CUDA_HOME")] if home),
        Path("/usr/local/cuda"),
    ]
    folders = [toolkit / folder for toolkit in toolkits for folder in ("bin", "compute-sanitizer")]
    path = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts"), *map(str, folders)]
    return shutil.which(name, path=os.pathsep.join(path))


def json_lines(text: str) -> list[dict]:
    """Rows among other lines; the last one of a process that was ended may be cut short."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
