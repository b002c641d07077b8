"""Errors, JSON, hashes, safetensors headers. Imports no torch."""

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open


class InputError(ValueError):
    """The user's input cannot be used. The message says what is wrong, where, and what to do."""


class NotFinite(InputError):
    """A weight or a loss is NaN or infinite, possibly only in the requested dtype."""


class DoesNotFit(InputError):
    """The device has too little memory even for the smallest batch."""


@contextmanager
def as_input_error(said: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an error of these kinds (any Exception by default) into InputError("said (error)").

    An InputError stays as it is. The panic of a library in Rust, which is no Exception, counts too.
    """
    try:
        yield
    except BaseException as error:
        known = isinstance(error, kinds or Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, InputError) or not known:
            raise
        raise InputError(f"{said} ({' '.join(str(error).split())})") from None


def regular(path: str | Path) -> Path:
    """The path, if it is a file's; InputError for a pipe or a device, which may never end."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file (a folder, a pipe or a device is none)")
    return Path(path)


def read_text(path: str | Path) -> str:
    """A UTF-8 text file; InputError naming the file if it is missing or not text."""
    with as_input_error(f"{path}: cannot be read as text", OSError, UnicodeDecodeError):
        return regular(path).read_text(encoding="utf-8")


def json_object(text: str, where: str) -> dict:
    """Parse one JSON object; InputError starting with `where` (file, or file:line) otherwise."""
    with as_input_error(f"{where}: not JSON", ValueError, RecursionError):
        value = json.loads(text)
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object")
    return value


def read_json(path: str | Path) -> dict:
    """A file that holds one JSON object; InputError naming the file if it does not."""
    return json_object(read_text(path), str(path))


def lines_of(path: str | Path) -> Iterator[tuple[str, str]]:
    """(file:line, text) of each line that is not blank. Reads .gz; skips a byte order mark."""
    path, damage = regular(path), (UnicodeDecodeError, EOFError, zlib.error)
    readable = as_input_error(f"{path}: cannot be read", OSError)
    with readable, (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for number in itertools.count(1):
            where = f"{path}:{number}"
            with as_input_error(f"{where}: damaged, or not UTF-8 text", *damage):
                line = lines.readline(2**26 + 1)  # a small .gz may hold gigabytes without an end
                if len(line) > 2**26:
                    raise InputError(f"{where}: the line is longer than 64 MiB")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not line:
                return
            if text.strip():
                yield where, text


def json_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file, each with its file:line."""
    for number, (where, line) in enumerate(lines_of(path)):
        if number == 0 and line.lstrip().startswith("["):
            fix = f"`jq -c '.[]' {path} > rows.jsonl` makes a file with one object per line"
            raise InputError(f"{where}: the file is one JSON array; {fix}")
        yield where, json_object(line, where)


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex; InputError if it is not a file."""
    state = hashlib.sha256()
    with open(regular(path), "rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


@contextmanager
def opened(file: str | Path, device: object = "cpu"):
    """A safetensors file open for reading; InputError naming it when it cannot be read."""
    readable = as_input_error(f"{file}: cannot be read as safetensors", SafetensorError, OSError)
    with readable, safe_open(regular(file), "pt", device=str(device)) as tensors:
        yield tensors


def load_tensors(file: str | Path) -> dict:
    """All tensors of a safetensors file, on the CPU; InputError if one is not as it was saved."""
    with opened(file) as tensors:
        found = {name: tensors.get_tensor(name) for name in tensors.keys()}
    hashes = made_from(file).get("sha256")
    for name, known in hashes.items() if isinstance(hashes, dict) else ():
        if name not in found or bytes_hash(found[name]) != known:
            raise InputError(f"{file}: {name} is not as it was written; the file was changed")
    return found


def bytes_hash(tensor) -> str:
    """sha256 of a tensor's values, in hex."""
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()


def save_tensors(tensors: dict, file: str | Path, made_from: dict) -> None:
    """Write tensors of the CPU, with what they were made from and each one's sha256 as header."""
    from safetensors.torch import save_file  # imports torch

    made_from = {**made_from, "sha256": {name: bytes_hash(x) for name, x in tensors.items()}}
    made_from["header_sha256"] = text_hash(made_from)
    header = {"made_from": json.dumps(made_from, sort_keys=True)}
    save_file(tensors, file, header)  # one sorted string: equal results have equal bytes


def text_hash(record: dict) -> str:
    """sha256 of a JSON object, in hex."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def made_from(file: str | Path) -> dict:
    """What save_tensors wrote into the header; {} if the file was made by another program.

    Raises InputError if the header is not as it was written.
    """
    with opened(file) as tensors:
        header = tensors.metadata() or {}
    record = json_object(header.get("made_from", "{}"), f"{file}: made_from in the header")
    if (known := record.pop("header_sha256", None)) and text_hash(record) != known:
        raise InputError(f"{file}: the header is not as it was written; the file was changed")
    return record


def write_record(folder: Path, made_from: dict) -> None:
    """Write record.json: what a folder was made from, and the sha256 of each file in it."""
    parts = sorted(file for file in folder.rglob("*") if file.is_file())
    hashes = {file.relative_to(folder).as_posix(): file_hash(file) for file in parts}
    text = json.dumps({**made_from, "files": hashes}, indent=2) + "\n"
    (folder / "record.json").write_text(text, encoding="utf-8")
