"""Errors, JSON, hashes, safetensors headers and atomic writes. Imports no torch."""

import fcntl
import glob
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

LINE = 2**26  # bytes of a line at most: a small .gz may hold gigabytes without a line break


class InputError(ValueError):
    """The user's input cannot be used. The message says what is wrong, where, and what to do."""


class NotFinite(InputError):
    """A weight or a loss is NaN or infinite, possibly only in the requested dtype."""


class DoesNotFit(InputError):
    """The device has too little memory even for the smallest batch."""


def printable(text: str, limit: int = 1000) -> str:
    """The text on one line of about `limit` characters, with nothing that a terminal obeys."""
    half = (limit - 5) // 2
    cut = lambda text: text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"
    line = " ".join(cut(text).splitlines())
    return cut("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def regular(path: str | Path) -> Path:
    """The path, if it is a file's; InputError for a pipe or a device, which may never end."""
    if not Path(path).is_file():
        why = "not a regular file" if Path(path).exists() else "no such file"
        raise InputError(f"{path}: {why}")
    return Path(path)


def read_text(path: str | Path) -> str:
    """A UTF-8 text file; InputError naming the file if it is missing or not text."""
    try:
        return regular(path).read_text(encoding="utf-8")
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
    path, number = regular(path), 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            pieces = iter(lambda: lines.readline(LINE + 1), b"")
            for number, line in enumerate(pieces, start=1):
                if len(line) > LINE:
                    raise InputError(f"{path}:{number}: the line is longer than 64 MiB")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield f"{path}:{number}", text
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
    state = hashlib.sha256()
    with open(regular(path), "rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


@contextmanager
def opened(file: str | Path, framework: str = "pt", device: object = "cpu"):
    """A safetensors file open for reading; InputError naming it when it cannot be read."""
    try:
        with safe_open(regular(file), framework, device=str(device)) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read as safetensors ({error})") from None


def load_tensors(file: str | Path) -> dict:
    """All tensors of a safetensors file, on the CPU.

    Raises InputError naming the file when it is unreadable, and naming the tensor when its bytes
    are not those that save_tensors wrote.
    """
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
    """Write a safetensors file whose header says what it was made from, and each tensor's sha256.

    tensors: on the CPU. made_from is one sorted JSON string: equal results have equal bytes.
    """
    from safetensors.torch import save_file  # imports torch

    hashes = {name: bytes_hash(tensor) for name, tensor in tensors.items()}
    header = {"made_from": json.dumps({**made_from, "sha256": hashes}, sort_keys=True)}
    with writing(file):
        save_file(tensors, file, header)


def made_from(file: str | Path) -> dict:
    """What save_tensors wrote into the header; {} if the file was made by another program."""
    with opened(file, "numpy") as tensors:
        header = tensors.metadata() or {}
    return json_object(header.get("made_from", "{}"), f"{file}: made_from in the header")


def write_record(folder: Path, made_from: dict) -> None:
    """Write record.json: what a folder was made from, and the sha256 of each file in it."""
    parts = sorted(file for file in folder.rglob("*") if file.is_file())
    hashes = {file.relative_to(folder).as_posix(): file_hash(file) for file in parts}
    text = json.dumps({**made_from, "files": hashes}, indent=2) + "\n"
    (folder / "record.json").write_text(text, encoding="utf-8")


# Writing. A result is complete and on the disk before the rename that publishes it. A process that
# dies leaves the old result or the new one, never a mixture.


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a failure to write into an InputError that names the path and the space that is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        there = next(p for p in Path(path).absolute().parents if p.is_dir())
        free = shutil.disk_usage(there).free / 1e6
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path}: cannot be written ({reason}; {free:,.0f} MB are free there); nothing of it "
            "was kept: make room, or choose another place, and run the command again"
        ) from None


def flush(path: Path, deep: bool = True) -> None:
    """Wait until a file, or a folder, with all that is in it if `deep`, is on the disk."""
    for part in [*(path.rglob("*") if deep else ()), path]:
        handle = os.open(part, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


@contextmanager
def partial(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write into, removed at the end.

    It is locked while its process lives, so that what a dead one left can be told and is removed.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, glob.escape(path.name))
        folder.mkdir()
        with locked(folder, must=False):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what dead processes left of files and folders that they wrote here."""
    for left in folder.glob(f".{name}.*-*.partial"):
        with suppress(OSError), locked(left):
            shutil.rmtree(left)


@contextmanager
def locked(folder: Path, flags: int = fcntl.LOCK_NB, must: bool = True) -> Iterator[None]:
    """Lock a folder. must: raise OSError if that cannot be had, else go on without."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with nullcontext() if must else suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`: put in its place on success, removed on failure."""
    path = Path(path)
    with partial(path) as folder:
        yield folder / path.name
        flush(folder / path.name)
        os.replace(folder / path.name, path)
        flush(path.parent, deep=False)


@contextmanager
def atomic_dir(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """A folder to write beside `path`: put in its place on success, removed on failure.

    replace: False keeps what an existing folder holds besides.
    """
    path = Path(path)
    with partial(path) as folder:
        new = folder / path.name
        new.mkdir()
        yield new
        for other in path.iterdir() if path.is_dir() and not replace else ():
            if not (new / other.name).exists():
                (shutil.copytree if other.is_dir() else shutil.copy2)(other, new / other.name)
        flush(new)
        restore(path)
        try:
            if os.path.lexists(path):
                path.rename(aside(path))
            new.rename(path)
            flush(path.parent, deep=False)
        finally:
            restore(path)


def aside(path: Path) -> Path:
    """Where a folder stands while another one takes its place."""
    return path.with_name(f".{path.name}.old")


def restore(path: Path) -> None:
    """Bring to an end what was begun by a process that died while it replaced a folder."""
    old = aside(path)
    if not os.path.lexists(path) and old.exists():
        old.rename(path)
    elif os.path.lexists(old):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
