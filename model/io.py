"""Errors, JSON, hashes, safetensors headers and atomic writes. Imports no torch."""

import gzip
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open


class InputError(ValueError):
    """The user's input cannot be used. The message says what is wrong, where, and what to do."""


class NotFinite(InputError):
    """A weight or a loss is NaN or infinite, possibly only in the requested dtype."""


class DoesNotFit(InputError):
    """The device has too little memory even for the smallest batch."""


def reported(work: Callable[[], int | None]) -> int:
    """Run a command and report an expected error in one line on stderr; return the exit status."""
    try:
        return work() or 0
    except KeyboardInterrupt:
        print("error: interrupted; the unfinished result was not written", file=sys.stderr)
        return 130
    except Exception as error:
        said = " ".join(str(error).splitlines())
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            said = f"out of memory on the device ({said})"
        elif isinstance(error, RuntimeError) and "can't allocate memory" in said:
            said = f"out of memory ({said})"
        elif not isinstance(error, (InputError, OSError)):
            raise
        print(f"error: {said}", file=sys.stderr)
        return 1


def read_text(path: str | Path) -> str:
    """A UTF-8 text file; InputError naming the file if it is missing or not text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None


def json_object(text: str, where: str) -> dict:
    """Parse one JSON object; InputError starting with `where` (file, or file:line) otherwise."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object")
    return value


def read_json(path: str | Path) -> dict:
    """A file that holds one JSON object; InputError naming the file if it does not."""
    return json_object(read_text(path), str(path))


def lines_of(path: str | Path) -> Iterator[tuple[str, str]]:
    """(file:line, text) of each line that is not blank. Reads .gz; skips a byte order mark."""
    path, number = Path(path), 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield f"{path}:{number}", text
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 text ({error})") from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: the gzip file is damaged here ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def json_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file, each with its file:line."""
    for where, line in lines_of(path):
        yield where, json_object(line, where)


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex; InputError if it is not a file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


@contextmanager
def opened(file: str | Path, framework: str = "pt", device: object = "cpu"):
    """A safetensors file open for reading; InputError naming it when it cannot be read."""
    try:
        with safe_open(file, framework, device=str(device)) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read as safetensors ({error})") from None


def load_tensors(file: str | Path) -> dict:
    """All tensors of a safetensors file, on the CPU; InputError naming it when it is unreadable."""
    with opened(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}


def save_tensors(tensors: dict, file: str | Path, made_from: dict) -> None:
    """Write a safetensors file whose header says what it was made from.

    made_from is one sorted JSON string, so that equal results have equal bytes.
    """
    from safetensors.torch import save_file  # imports torch

    try:
        save_file(tensors, file, {"made_from": json.dumps(made_from, sort_keys=True)})
    except SafetensorError as error:  # a full disk, for example
        raise InputError(f"{file}: cannot be written ({error})") from None


def made_from(file: str | Path) -> dict:
    """What save_tensors wrote into the header; {} if the file was made by another program."""
    with opened(file, "numpy") as tensors:
        header = tensors.metadata() or {}
    return json_object(header.get("made_from", "{}"), f"{file}: made_from in the header")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`: renamed to it on success, removed on failure."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """A folder to write beside `path`: renamed to it on success, removed on failure.

    replace: remove an existing folder first; False: overwrite only files of the same name.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists() and replace:
            shutil.rmtree(path)
        if path.exists():
            for file in partial.iterdir():
                os.replace(file, path / file.name)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
