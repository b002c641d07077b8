"""Files and folders that are written whole or not at all, whenever a process dies.

A result is on the disk before the rename that publishes it. A process that dies leaves the old
result or the new one, never a mixture.
"""

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from model.io import as_input_error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a failure to write into an InputError that names the path and the space there was."""
    there = next(p for p in Path(path).absolute().parents if p.is_dir())
    free = f"{shutil.disk_usage(there).free / 1e6:,.0f} MB were free"
    said = f"{path}: cannot be written, and nothing of it was kept; {free}"
    with as_input_error(said, OSError, SafetensorError):
        yield


def flush(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        with suppress(OSError) if path.is_dir() else nullcontext():  # some file systems cannot
            os.fsync(handle)
        os.close(handle)


@contextmanager
def partial(path: Path) -> Iterator[Path]:
    """A path to write to, in a folder beside `path` that is locked, and removed at the end."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, glob.escape(path.name))
        name = f".{path.name}.{os.getpid()}."
        beside = TemporaryDirectory(".partial", name, path.parent, ignore_cleanup_errors=True)
        with beside as folder, locked(Path(folder), must=False):
            yield Path(folder, path.name)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what dead processes, which hold no lock, left of what they were writing here."""
    for left in folder.glob(f".{name}.*.partial"):
        try:
            os.kill(int(left.name.split(".")[-3]), 0)  # one that has just begun has no lock yet
        except (ValueError, IndexError, OverflowError, OSError):
            with suppress(OSError), locked(left):
                shutil.rmtree(left)


@contextmanager
def locked(folder: Path, must: bool = True) -> Iterator[None]:
    """Lock a folder. must: raise OSError if that cannot be had, else go on without.

    By a file in it, since a folder's own lock holds on one host alone (NFS).
    """
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        with nullcontext() if must else suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`: put in its place on success, removed on failure."""
    path = Path(path)
    with partial(path) as new:
        yield new
        flush(new)
        os.replace(new, path)
        flush(path.parent)


@contextmanager
def atomic_dir(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """The same for a folder. replace: False keeps what an existing folder holds besides."""
    path = Path(path)
    with partial(path) as new:
        new.mkdir()
        yield new
        for other in path.iterdir() if path.is_dir() and not replace else ():
            if not (new / other.name).exists():
                (shutil.copytree if other.is_dir() else shutil.copy2)(other, new / other.name)
        flush(*new.rglob("*"), new)
        old = restore(path)
        try:
            if os.path.lexists(path):
                os.rename(path, old)
            os.rename(new, path)
            flush(path.parent)
        finally:
            restore(path)


def restore(path: Path) -> Path:
    """Finish what a dead process began. Returns where a folder stands while it is replaced."""
    old = path.with_name(f".{path.name}.old")
    with suppress(FileNotFoundError):  # another process does the same
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        elif os.path.lexists(old):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    return old
