"""run.json: it fills in omitted flags, remembers hashes of files, and reports costs.

What a result is, its own record says. If run.json is lost or damaged, give inputs and settings
again.
"""

import json
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model.io import InputError, read_json, whole_file
from toss.workbench.results import held

ROOT = Path(__file__).resolve().parents[2]
FORMAT = 5
REFERENCES = ("degraded", "utility")
INPUTS = ("model", "harmful", "utility", "custom")
# How text becomes ids.
FORM = ("template", "date", "max_length", "chat_template_kwargs", "skip_empty")
INHERITED = (*INPUTS, "revision", *FORM)  # what a run was begun with


class RunFile:
    """The run.json of a run. content: as it was read last."""

    def __init__(self, file: Path, content: dict[str, Any]):
        self.file = file
        self.content = content

    def section(self, *names: str) -> dict[str, Any]:
        """An object in it, such as section("stages", "degraded", "recipe"); {} if there is none."""
        value = self.content
        for name in names:
            value = value.get(name, {})
            if not isinstance(value, dict):
                advice = "is the file damaged? If so, remove it and give the inputs again"
                raise InputError(f"{self.file}: {name}: unexpected type; {advice}")
        return value

    def update(self, changes: dict[str, Any], begun_anew: bool = False) -> None:
        """Write it, with what other processes have added meanwhile.

        changes: values at the top, and entries of its objects. begun_anew: of what is there only
        the references' stages stay.
        """
        folder = self.file.parent
        with held(folder, folder, wait=True):
            self.content = read_run(self.file, must_be_whole=False)
            if begun_anew:
                stages = self.section("stages")
                references = {name: stages[name] for name in REFERENCES if name in stages}
                self.content = {"stages": references}
            versions = {"python": platform.python_version(), "torch": version("torch")}
            self.content |= {"format": FORMAT, "commit": git_commit(), "versions": versions}
            for name, value in changes.items():
                if isinstance(value, dict):
                    value = {**self.section(name), **value}
                self.content[name] = value
            with whole_file(self.file) as file:
                file.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")


def read_run(file: Path, must_be_whole: bool = True) -> dict[str, Any]:
    """What is in a run.json; {} if it does not exist, or may be damaged. Raises InputError."""
    if not file.exists():
        return {}
    try:
        content = read_json(file)
    except InputError as error:
        if must_be_whole:
            raise InputError(f"{error}; give the inputs and settings again") from None
        print(f"warning: {error}; it is replaced")
        return {}
    if content.get("format") != FORMAT:
        raise InputError(f"{file} was written by another version: choose another --run")
    for name in ("settings", "inputs", "hashes", "stages"):
        RunFile(file, content).section(name)  # raises if it is of another type
    return content


def as_listed(recipe: dict[str, Any]) -> dict[str, Any]:
    """The part of a recipe that stands in run.json."""
    return {name: recipe[name] for name in ("stage", "settings", "inputs")}


@cache
def git_commit() -> str | None:
    """The commit of this code, with a plus sign if the tree has changes; None outside git."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    return None
