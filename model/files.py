"""Reading JSON with errors that name the file, hashing files once, and writing them all or not at all."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from model.errors import InputError

# "path" or "path#tensors" -> [size, modification time in ns, sha256]. A run keeps this table in its run.json, so that
# a 16 GB checkpoint is hashed once.
HASHES: dict[str, list] = {}


def read_text(path: Path) -> str:
    """A UTF-8 text file; InputError naming it when it is not there or not text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file; InputError naming the file (and line) when it is not there or not one."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, InputError) else InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object was expected")
    return value


def json_object(line: str, where: str) -> dict:
    """A line that holds one JSON object; InputError beginning with `where` (file:line) when it does not."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        said = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{where}: not JSON ({said})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object was expected")
    return value


def cached_hash(key: str, path: Path, compute) -> str:
    """The hash stored under `key`, computed again when the file's size or time has changed."""
    try:
        stat = path.stat()
    except OSError:
        stat = None
    if stat is None or not path.is_file():
        raise InputError(f"{path}: there is no such file")
    known = HASHES.get(key)
    if not isinstance(known, list) or known[:-1] != [stat.st_size, stat.st_mtime_ns]:
        known = HASHES[key] = [stat.st_size, stat.st_mtime_ns, compute(path)]
    return known[2]


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    path = Path(path).absolute()

    def whole(path: Path) -> str:
        with open(path, "rb") as f:
            return digest(f, path.stat().st_size)

    return cached_hash(str(path), path, whole)


def digest(f, size: int) -> str:
    """sha256 of the next `size` bytes of an open file, read in pieces."""
    state = hashlib.sha256()
    while size > 0 and (piece := f.read(min(size, 1 << 20))):
        state.update(piece)
        size -= len(piece)
    return state.hexdigest()


def tensors_hash(folder: str | Path) -> str:
    """One hash of all tensors of a checkpoint (name, dtype, shape, bytes), whichever way they are spread over files.

    The tensors' own sha256 are added up modulo 2^256, so that neither their order nor the sharding matters.
    """
    from model.checkpoint import shards

    files = [file.absolute() for file in shards(Path(folder))]
    total = sum(int(cached_hash(f"{file}#tensors", file, sum_of_tensors), 16) for file in files)
    return f"{total % 2**256:064x}"


def sum_of_tensors(file: Path) -> str:
    """tensors_hash's sum for one safetensors file."""
    total = 0
    with open(file, "rb") as f:
        header = safetensors_header(f)
        start = f.tell()
        for name, info in header.items():
            if name != "__metadata__":
                begin, end = info["data_offsets"]
                f.seek(start + begin)
                line = f"{name} {info['dtype']} {info['shape']} {digest(f, end - begin)}"
                total += int(hashlib.sha256(line.encode()).hexdigest(), 16)
    return f"{total % 2**256:064x}"


def safetensors_header(f) -> dict:
    """The JSON header of an open safetensors file: tensor name -> dtype, shape, data_offsets; and `__metadata__`."""
    size = os.fstat(f.fileno()).st_size
    length = int.from_bytes(f.read(8), "little")
    try:
        if size < 8 or length > size - 8:
            raise ValueError("its header is cut off")
        return dict(json.loads(f.read(length)))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{f.name}: not a safetensors file, or truncated ({error})") from None


def save_tensors(tensors: dict[str, Tensor], file: Path, made_from: dict[str, str], **more: str) -> None:
    """Write a safetensors file whose header says what it was made from, and `more`.

    All of it is one JSON string, since the format keeps several strings in no fixed order and equal work is to give
    equal bytes.
    """
    save_file(tensors, file, metadata={"made_from": json.dumps(made_from, sort_keys=True), **more})


def made_from(file: str | Path) -> dict[str, str]:
    """What save_tensors wrote into the header; empty for a file that was made elsewhere."""
    with open(file, "rb") as f:
        metadata = safetensors_header(f).get("__metadata__") or {}
    try:
        note = json.loads(metadata.get("made_from", "{}"))
    except (ValueError, TypeError, AttributeError, RecursionError):
        note = None
    if not isinstance(note, dict) or not all(isinstance(value, str) for value in note.values()):
        raise InputError(f"{file}: its header's made_from is not a JSON object of strings")
    return note


@contextmanager
def written_beside(path: str | Path, whole: bool = False):
    """A folder to write into that becomes `path` when the block ends well, and vanishes when it does not.

    Where `path` is there already, files of the same names are replaced and others stay; with `whole`, all of it goes.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if whole and path.exists():
            shutil.rmtree(path)
        if path.exists():
            for file in beside.iterdir():
                os.replace(file, path / file.name)
        else:
            beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def file_beside(path: str | Path):
    """A file name to write to that becomes `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
