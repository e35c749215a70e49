"""Builds parts of build/emulator again from changed sources, beside it: for tests that need a kernel with a defect.

Of the Python package a copy with other texts for some files.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator"


class DoesNotCompile(Exception):
    pass


def copy_package(changed: dict[str, str], folder: Path) -> None:
    """The package biflow in `folder`, with other texts for some of its files: links to the rest."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "biflow", folder / "biflow", ignore=ignored, copy_function=os.symlink)
    for name, text in changed.items():
        (folder / name).unlink()
        (folder / name).write_text(text)


class Building:
    """What `make emulator` did, as ninja and CMake tell it."""

    def __init__(self) -> None:
        entries = json.loads((BUILD / "compile_commands.json").read_text())
        self.compile = {str(Path(entry["output"]).relative_to(BUILD)): entry["command"] for entry in entries}
        self.sources = {}  # object: the files under csrc that it was made from
        output = None
        for line in self._ninja("-t", "deps").splitlines():
            if line and not line.startswith(" "):
                output = line.split(":")[0]
            elif line.strip():
                path = (BUILD / line.strip()).resolve()
                if path.is_relative_to(ROOT / "csrc"):
                    self.sources.setdefault(output, set()).add(str(path.relative_to(ROOT)))

    @staticmethod
    def _ninja(*arguments: str) -> str:
        program = re.search(r"^CMAKE_MAKE_PROGRAM:\w+=(.*)$", (BUILD / "CMakeCache.txt").read_text(), re.MULTILINE)
        command = [program[1], "-C", str(BUILD), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def link_command(self, target: str) -> list[str]:
        command = self._ninja("-t", "commands", target).splitlines()[-1]
        return [word for word in shlex.split(command) if word not in (":", "&&")]

    def rebuild(self, target: str, changed: dict[str, str], folder: Path) -> Path:
        """`target` (a file of build/emulator) with other texts for some files of csrc, made in `folder`.

        Compiles only what includes them.
        """
        csrc = folder / "csrc"
        if not csrc.exists():
            shutil.copytree(ROOT / "csrc", csrc)
        for name, text in changed.items():
            (folder / name).write_text(text)
        link = self.link_command(target)
        for i, word in enumerate(link):
            if not self.sources.get(word, set()) & changed.keys():
                continue
            made = folder / word.replace("/", "_")
            command = self.compile[word].replace(f"{ROOT}/csrc", str(csrc))
            words = shlex.split(command)
            words[words.index("-o") + 1] = str(made)
            if subprocess.run(words, cwd=BUILD, capture_output=True).returncode != 0:
                raise DoesNotCompile
            link[i] = str(made)
        result = folder / Path(target).name
        link[link.index("-o") + 1] = str(result)
        subprocess.run(link, cwd=BUILD, check=True, capture_output=True)
        return result
