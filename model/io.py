"""Errors and how a command reports them; JSON; safetensors; files that are written whole."""

import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

# Errors


class InputError(ValueError):
    """The user's input cannot be used. The message says what is wrong, where, and what to do."""


@contextmanager
def as_input_error(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an error of these kinds (any Exception by default) into InputError("message (error)").

    An InputError stays as it is.
    """
    expected = kinds or (Exception,)
    try:
        yield
    except InputError:
        raise
    except expected as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{message} ({reason})") from None


# Commands


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command and return its exit status. An expected error is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # it is closed, or not a file
            # A terminal may lack a name's characters; a pipe would keep lines back.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("error: stopped; the same command goes on from what it has saved", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # who read the output, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        return 128 + signal.SIGPIPE
    except Exception as error:
        message = printable(str(error))
        if out_of_memory(error):
            message = f"out of memory ({message})"
        elif not isinstance(error, InputError | OSError):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1


def printable(text: str, limit: int = 1000) -> str:
    """The start of a text on one line, with nothing that a terminal obeys."""
    line = " ".join(text[:limit].splitlines())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line[:limit]


def out_of_memory(error: Exception) -> bool:
    """True if memory ran out. cuBLAS, cuDNN and the CPU's allocator raise plain RuntimeErrors."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    texts = "out of memory|_ALLOC(ATION)?_FAILED|can't allocate memory"
    return isinstance(error, RuntimeError) and re.search(texts, str(error)) is not None


# Text and JSON


def existing_file(path: str | Path) -> Path:
    """The path, if it is a regular file's; InputError otherwise: a pipe or a device may not end."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: file not found")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    return path


def read_text(path: str | Path) -> str:
    """A UTF-8 text file; InputError naming the file if it is missing or not text."""
    with as_input_error(f"{path}: cannot be read as text", OSError, UnicodeDecodeError):
        return existing_file(path).read_text(encoding="utf-8")


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
    path = existing_file(path)
    damage = (UnicodeDecodeError, EOFError, zlib.error)
    open_lines = gzip.open if path.suffix == ".gz" else open
    with as_input_error(f"{path}: cannot be read", OSError), open_lines(path, "rb") as lines:
        for number in itertools.count(1):
            where = f"{path}:{number}"
            with as_input_error(f"{where}: damaged, or not UTF-8 text", *damage):
                line = lines.readline()
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
    with open(existing_file(path), "rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


# Safetensors


@contextmanager
def opened(file: str | Path, device: object = "cpu"):
    """A safetensors file open for reading; InputError naming it when it cannot be read."""
    message = f"{file}: cannot be read as safetensors"
    with as_input_error(message, SafetensorError, OSError):
        with safe_open(existing_file(file), "pt", device=str(device)) as tensors:
            yield tensors


def save_tensors(tensors: dict, file: str | Path, record: dict) -> None:
    """Write tensors of the CPU, with a record of what they were made from in the file's header.

    Beside the record stands one sha256 over both. Equal tensors and records give equal bytes.
    """
    text = json.dumps({**record, "sha256": digest(tensors, record)}, sort_keys=True)
    # Not by save_file: that leaves a temporary file if it is killed, and ignores the umask.
    # One key in the header: several have no fixed order.
    Path(file).write_bytes(save(tensors, {"made_from": text}))


def load_tensors(file: str | Path) -> dict:
    """All tensors of a safetensors file, on the CPU; InputError if it is not as it was saved."""
    with opened(file) as tensors:
        loaded = {name: tensors.get_tensor(name) for name in tensors.keys()}
    record = made_from(file)
    recorded = record.pop("sha256", None)
    if recorded is not None and recorded != digest(loaded, record):
        raise InputError(f"{file}: not as it was written; the file was changed")
    return loaded


def made_from(file: str | Path) -> dict:
    """The record in a safetensors file's header; {} if another program wrote the file.

    Only load_tensors checks it, by its "sha256".
    """
    with opened(file) as tensors:
        header = tensors.metadata() or {}
    return json_object(header.get("made_from", "{}"), f"{file}: made_from in the header")


def tensors_hash(file: str | Path) -> str:
    """sha256 of a file's tensors alone, whatever its record says of how they were made."""
    return digest(load_tensors(file), {})


def digest(tensors: dict, record: dict) -> str:
    """sha256 of a record and of tensors: their names, dtypes, shapes and values."""
    import torch

    state = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()


# Results that are written whole


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to, which replaces it at the end.

    After an error the old one stays. A process that dies leaves the old one or the new one. In the
    instant between the two renames of a folder it leaves neither: then what lies beside the place,
    as .NAME.old and .NAME.new, is not taken up again, and the next writer removes it.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.new")
    message = f"{path}: cannot be written, and nothing of it was kept"
    with as_input_error(message, OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(new)
        try:
            yield new
            for part in [*new.rglob("*"), new]:
                flush(part)
            put_in_place(new, path)
            flush(path.parent)
        finally:
            remove(new)


def put_in_place(new: Path, path: Path) -> None:
    """Rename a new file or folder. An old folder goes aside first; a file is replaced at once."""
    old = path.with_name(f".{path.name}.old")
    remove(old)
    if path.is_dir() or new.is_dir() and os.path.lexists(path):
        os.rename(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if os.path.lexists(old):
            os.rename(old, path)
        raise
    remove(old)


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_to_replace(*paths: Path) -> None:
    """Raise InputError if one of these files exists."""
    for path in paths:
        if path.exists():
            raise InputError(f"{path} exists and is not replaced: give another --out")


def umask() -> int:
    """The permissions that the user takes from new files. The system tells when it is set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
