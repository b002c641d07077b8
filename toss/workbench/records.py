"""A result is whole or absent, and carries a record of what made it.

A result is a folder with a record.json, or one safetensors file with the record in its header. The
record holds the recipe, which is everything that decides the result ("stage", "settings", "inputs"
and more); "code", a digest of each file that may have computed it; and facts about it. A folder's
record also holds "files", the sha256 of each of its files. Nothing in it is a time or a cost, so
equal calls give equal bytes.
"""

import ast
import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from model.io import InputError, file_hash, load_tensors, made_from, read_json

ROOT = Path(__file__).resolve().parents[2]
RECORD = "record.json"
Record = dict[str, Any]
print_once = cache(print)


def text_hash(value: object) -> str:
    """sha256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, record: Record) -> None:
    """Write record.json with the sha256 of each file in the folder, and one of the record."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            files[file.relative_to(folder).as_posix()] = file_hash(file)
    record = {**record, "files": files}
    text = json.dumps({**record, "sha256": text_hash(record)}, indent=2)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(path: Path) -> Record:
    """The record of a result; {} if it has none. Raises InputError if the result was changed."""
    if path.is_file():
        load_tensors(path)  # raises if the file is not what its sha256 says
        record = made_from(path)
        digest = record.pop("sha256", None)
        if "stage" in record and digest is None:
            raise InputError(f"{path}: not as it was written; the file was changed")
        return record
    if not (path / RECORD).exists():
        return {}
    record = read_json(path / RECORD)
    if record.pop("sha256", None) != text_hash(record):
        raise InputError(f"{path / RECORD}: not as it was written; the file was changed")
    for name, digest in record["files"].items():
        if file_hash(path / name) != digest:
            raise InputError(f"{path / name}: not as it was written; the file was changed")
    return record


def read_whole(path: Path) -> Record:
    """The record of a result; {} if it is not there, was changed, or has none."""
    with suppress(InputError):
        return read_record(path)
    return {}


def changed(old: Record, new: Record) -> list[str]:
    """The names of what is not the same in both."""
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def differences(record: Record, recipe: Record) -> list[str]:
    """The names of what a record has otherwise than a recipe: settings, inputs, and others."""
    if not record:
        return ["it has no record"]
    names = []
    for key, wanted in recipe.items():
        if key in ("settings", "inputs"):
            names += changed(record.get(key, {}), wanted)
        elif record.get(key) != wanted:
            names.append(key)
    return names


# Which code made a result


def code_digests(*scripts: str) -> dict[str, str]:
    """A digest of each file right in model/ and toss/, and of these: {path in the project: digest}.

    Comments, docstrings and layout do not count, and every version of Python gives the same.
    """
    files = [*ROOT.glob("model/*.py"), *ROOT.glob("toss/*.py")]
    files += [ROOT / script for script in scripts]
    there = sorted(file for file in files if file.exists())
    return {file.relative_to(ROOT).as_posix(): code_digest(file) for file in there}


@cache
def code_digest(file: Path) -> str:
    """As the file was when first asked for; see flags.parse."""
    return text_hash(outline(ast.parse(file.read_text(encoding="utf-8"))))[:16]


def outline(node: Any) -> Any:
    """A syntax tree as lists, without texts that are statements: docstrings."""
    if isinstance(node, list):
        return [outline(item) for item in node if not is_docstring(item)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [type(node).__name__]
    for name, part in ast.iter_fields(node):
        if isinstance(node, ast.JoinedStr):  # Python 3.12 may add empty texts to an f-string
            part = [item for item in part if getattr(item, "value", None) != ""]
        if part is not None and part != []:  # newer versions have more fields, which are empty
            fields.append([name, outline(part)])
    return fields


def is_docstring(node: Any) -> bool:
    text = node.value if isinstance(node, ast.Expr) else None
    return isinstance(text, ast.Constant) and isinstance(text.value, str)


def warn_of_code(path: Path, edited: list[str]) -> None:
    """Say that a result was made by other code than there is now: the user decides."""
    if edited:
        what = f"{path} was made by other code (different: {', '.join(edited)})"
        print_once(f"warning: {what}: --overwrite makes it again")


# One command at a time


@contextmanager
def held(lock: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file. It stays lying there; the system lets go of it when the process ends.

    If another process holds it: waits with `wait`, else raises InputError.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is making this (it holds {lock})") from None
        except OSError as error:
            print(f"warning: no locks here ({error}): do not start two commands at once")
        yield
