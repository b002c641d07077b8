"""A result is whole or absent, and carries its record. Knows nothing of what is computed.

A result is a folder with a record.json, or one safetensors file with the record in its header. The
record holds the recipe, which is everything that decides the result ("stage", "settings", "inputs"
and more); "code", a digest of each file that computed it; and facts about it. A folder's record
also holds "files", the sha256 of each of its files. Nothing in it is a time or a cost, so equal
calls give equal bytes.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from model.io import (
    InputError,
    existing_file,
    file_hash,
    made_from,
    read_json,
    remove,
    tensors_hash,
)

RECORD = "record.json"
TENSORS = "tensors of "  # before a path: only the tensors of a file count
BASE = "base in "  # before a path: it is the folder of a base
Record = dict[str, Any]


# Records


def write_record(folder: Path, record: Record) -> None:
    """Write record.json with the sha256 of each file in the folder, and one of the record."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            files[file.relative_to(folder).as_posix()] = file_hash(file)
    record = {**record, "files": files}
    text = json.dumps({**record, "sha256": text_hash(record)}, indent=2)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def has_record(folder: Path) -> bool:
    return (folder / RECORD).exists()


def read_record(path: Path) -> Record:
    """The record of a result; {} if it has none. Raises InputError if it is damaged."""
    if path.is_file():
        record = made_from(path)
        digest = record.pop("sha256", None)  # of record and tensors: load_tensors checks it
        if "stage" in record and digest is None:
            raise InputError(f"{path}: not as it was written; the file was changed")
        return record
    file = path / RECORD
    if not file.exists():
        return {}
    record = read_json(file)
    if record.pop("sha256", None) != text_hash(record):
        raise InputError(f"{file}: not as it was written; the file was changed")
    return record


def text_hash(value: object) -> str:
    """sha256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(record: Record, recipe: Record) -> list[str]:
    """The names of what a record has otherwise than a recipe, its settings and inputs one by one.

    Both values can be read: in record.json or the file's header, and on the command line.
    """
    if not record:
        return ["it has no record"]
    recorded = flat({key: record.get(key) for key in recipe})
    wanted = flat(recipe)
    return [name for name in {**recorded, **wanted} if recorded.get(name) != wanted.get(name)]


def flat(recipe: Record) -> Record:
    """A recipe with its settings and inputs one by one, and "reference lr" and the like."""
    entries = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            prefix = "" if key in ("settings", "inputs") else f"{key} "
            entries |= {f"{prefix}{name}": part for name, part in flat(value).items()}
        else:
            entries[key] = value
    return entries


def other_code(record: Record, code: dict[str, str]) -> list[str]:
    """The files of which a result was made with another version than `code`, or without."""
    recorded = record.get("code", {})
    return [name for name in {**recorded, **code} if recorded.get(name) != code.get(name)]


def damage(path: Path, record: Record, hashes: "Hashes") -> str:
    """What is wrong with a result, in words; "" if it is whole."""
    try:
        if path.is_file():
            hashes.of(path, tensors=True)
        for name, recorded in record.get("files", {}).items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if hashes.of(file) != recorded:
                return f"{name} was changed"
    except InputError as error:
        return str(error)
    return ""


def inspect(path: Path, hashes: "Hashes") -> tuple[Record, str]:
    """The record of a result, {} if it has none or it cannot be read, and what is wrong with it.

    A record that was changed still tells whether another result is there.
    """
    try:
        record = read_record(path)
    except InputError as error:
        record = {}
        with suppress(InputError):
            record = read_json(path / RECORD) if path.is_dir() else made_from(path)
        return record, str(error)
    return record, damage(path, record, hashes)


class Hashes:
    """The sha256 of files, remembered for as long as nothing has touched them.

    known: what an earlier process found, {file: what identifies its state, and the sha256}.
    """

    def __init__(self, known: dict[str, list]):
        self.known = known
        self.inputs: dict[str, str] = {}  # what was first found of each input, by its key

    def key(self, path: Path, tensors: bool) -> str:
        """What a hash stands under."""
        return f"{TENSORS}{path.absolute()}" if tensors else str(path.absolute())

    def of(self, path: Path, tensors: bool = False) -> str:
        """The hash of a file's bytes, or of its tensors alone: then how they were made is left out.

        Raises InputError for a file that is not there, or whose own digest does not fit.
        """
        path = existing_file(path.absolute())
        key = self.key(path, tensors)
        stat = path.stat()
        state = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        known = self.known.get(key)
        if not isinstance(known, list) or known[:-1] != state or type(known[-1]) is not str:
            value = tensors_hash(path) if tensors else file_hash(path)
            self.known[key] = [*state, value]
        return self.known[key][-1]

    def of_input(self, path: Path, tensors: bool = False) -> str:
        """The hash of an input; InputError if it is not what it was when first asked for."""
        value = self.of(path, tensors)
        self.compare(path, self.key(path, tensors), value)
        return value

    def of_base(self, folder: Path) -> str:
        """base_hash of a folder, which is an input, too."""
        from model.checkpoint import base_hash  # imports torch

        value = base_hash(folder)
        self.compare(folder, f"{BASE}{folder.absolute()}", value)
        return value

    def compare(self, path: Path, key: str, value: str) -> None:
        """Raise InputError if an input is not what it was when first asked for."""
        if self.inputs.setdefault(key, value) != value:
            raise InputError(f"{path} was changed while the command ran: run it again")

    def check_inputs(self) -> None:
        """Raise InputError if an input is not what it was when first asked for."""
        for key in list(self.inputs):
            if key.startswith(BASE):
                self.of_base(Path(key.removeprefix(BASE)))
            else:
                self.of_input(Path(key.removeprefix(TENSORS)), key.startswith(TENSORS))


# Making a result


@dataclass
class Verdict:
    """Whether a result has to be made, and what to print about it."""

    make: bool
    lines: list[str] = field(default_factory=list)


def judge(
    path: Path, recipe: Record, code: dict[str, str], overwrite: bool, hashes: Hashes
) -> Verdict:
    """Compare what is in the place of a result with what is asked for.

    Raises InputError if a result of another recipe is there, unless it may be overwritten.
    """
    stage = recipe["stage"]
    if not path.exists():
        return Verdict(True)
    record, problem = inspect(path, hashes)
    remake = f"{stage}: {path} is damaged or incomplete ({problem}), so it is made again"
    if problem and not record:
        return Verdict(True, [remake])

    # Another recipe: what is there is the user's, and goes only if they say so.
    differing = differences(record, recipe)
    if differing and not overwrite:
        other = "--name" if "/" in stage else "--run"
        raise InputError(
            f"{path} exists with other settings or inputs (different: {', '.join(differing)}): "
            f"give --overwrite to replace it, or another {other}"
        )
    if differing:
        return Verdict(True)
    if problem:
        return Verdict(True, [remake])

    # The same recipe: it is made again for other code if that is asked for, else skipped.
    changed = ", ".join(other_code(record, code))
    remark = f"{path} was made by other code (different: {changed})"
    if changed and overwrite:
        return Verdict(True, [f"{stage}: {remark}, so it is made again"])
    lines = [f"{stage}: {path} exists with equal settings and inputs, skipped"]
    if changed:
        lines.append(f"warning: {remark}: --overwrite makes it again")
    return Verdict(False, lines)


@contextmanager
def held(folder: Path, root: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder, `root` or below it, while a result is made: one process at a time.

    The system lets it go when the process dies, so there is nothing to clean up. Folders that are
    empty in the end are removed, so that a refused command leaves nothing. So the folder that was
    opened may be gone when it is locked; then it is made again. If another process holds it: waits
    with `wait`, else raises InputError.
    """
    lasting = root if root.exists() else root.parent
    handle = None
    while handle is None:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process has just removed it
            handle = os.open(folder, os.O_RDONLY)
            lock(handle, folder, wait)
            if not same(handle, folder):
                os.close(handle)
                handle = None
    try:
        yield
    finally:
        # A folder that is not the one that is held may be held by another process by now.
        removable = [folder, *folder.parents] if same(handle, folder) else []
        for empty in removable:
            if empty == lasting:
                break
            with suppress(OSError):  # something is in it
                empty.rmdir()
        os.close(handle)


def lock(handle: int, folder: Path, wait: bool) -> None:
    """Lock an open folder; InputError if another process has. A file system may have no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        message = f"{folder.name} is being made by another process (it holds {folder})"
        raise InputError(message) from None
    except OSError as error:
        warn_once(f"warning: no locks here ({error}): do not start two commands at once")


@cache
def warn_once(text: str) -> None:
    """Print a text, but not again."""
    print(text)


def same(handle: int, folder: Path) -> bool:
    """True if a folder is still the one that was opened."""
    with suppress(FileNotFoundError):
        return os.fstat(handle).st_ino == folder.stat().st_ino
    return False


def clean_up(path: Path, *states: Path) -> None:
    """Remove states of a finished result, and what a process that died left beside it."""
    for state in states:
        remove(state)
    remove(path.with_name(f".{path.name}.old"))
    remove(path.with_name(f".{path.name}.new"))
