"""What the audit's commands share: the flags of a run, opening it, the call that makes a method, and reading lines."""

import argparse
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import InputError
from model.files import file_hash, json_object, made_from, read_json, read_text
from toss.base import ADAPTER, DTYPES
from toss.run import Run
from toss.selection import METHODS
from toss.settings import inherit


def run_flags(parser: argparse.ArgumentParser, dtype: bool = True) -> None:
    """Add --run and the flags for running its models; left out, they take the run's values or the defaults.

    dtype: False where the arithmetic is not the reader's to choose.
    """
    parser.add_argument("--run", required=True, help="folder of the run")
    for name, kind in (("device", str), ("dtype", str), ("threads", int), ("batch_tokens", int)):
        if dtype or name != "dtype":
            choices = ["auto", *DTYPES] if name == "dtype" else None
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, choices=choices, default=argparse.SUPPRESS,
                                help="as in score.py")


def open_run(given: dict) -> Run:
    """The run that the flags name, with its settings; InputError where there is none. given: run_flags' values."""
    run_folder(given["run"])
    return Run(inherit("audit", given))


def run_folder(folder: str | Path) -> Path:
    """The folder of a run, as a path; InputError where it holds no run.json."""
    if not (Path(folder) / "run.json").exists():
        raise InputError(f"{folder} holds no run.json: it is no run directory")
    return Path(folder)


@dataclass
class Known:
    """A run as it is now, to compare files with."""

    folder: Path
    record: dict  # run.json
    run: Run | None = None  # None where it cannot be opened, as when its base model is gone
    problem: str = ""  # why not
    now: dict[str, str | None] = field(default_factory=dict)  # what a file's header is compared with; None: not there

    def table(self, *names: str) -> dict:
        """A table inside run.json; empty where there is none."""
        found = self.record
        for name in names:
            found = found.get(name) if isinstance(found.get(name), dict) else {}
        return found


def known_run(folder: Path) -> Known:
    """The run in a folder. Where its base model is gone, the hashes of its other files are known all the same.

    Raises InputError when run.json is missing or malformed.
    """
    known = Known(folder, read_json(folder / "run.json"))
    for name in ("settings", "inputs", "stages"):
        if not isinstance(known.record.get(name, {}), dict):
            raise InputError(f"{folder / 'run.json'}: {name} is not a table")
    try:
        known.run = open_run({"run": str(folder)})
        known.now.update(known.run.identity)
    except (InputError, OSError) as error:
        known.problem = str(error)
    except (TypeError, ValueError, AttributeError) as error:  # values of other kinds than the scripts write
        raise InputError(f"{folder / 'run.json'} is malformed ({error})") from None
    custom = str(known.table("settings").get("custom"))
    known.now["custom_sha256"] = file_hash(custom) if Path(custom).is_file() else known.table("inputs").get(custom)
    files = {role: folder / role / ADAPTER[-1] for role in ("degraded", "utility")} | {"scores": folder / "scores.safetensors"}
    known.now |= {f"{name}_sha256": file_hash(file) if file.is_file() else None for name, file in files.items()}
    with suppress(InputError, OSError):  # a broken scores file is reported where it is described
        known.now["tokens_sha256"] = made_from(files["scores"]).get("tokens_sha256")
    return known


def select_command(folder: Path, name: str, method: str | None = None) -> str:
    """The call of select.py that makes methods/NAME. method: what that folder holds; None: not known, so by its name.

    >>> select_command(Path("runs/mine"), "toss"), select_command(Path("runs/mine"), "mild", "toss")
    ('select.py --run runs/mine --method toss', 'select.py --run runs/mine --method toss --name mild')
    >>> select_command(Path("runs/mine"), "base-reference"), select_command(Path("runs/mine"), "mild")
    ('select.py --run runs/mine --method base', 'select.py --run runs/mine --method ... --name mild')
    >>> select_command(Path("runs/mine"), "mask"), select_command(Path("runs/mine"), "theirs", "mask")
    ('select.py --run runs/mine --mask ...', 'select.py --run runs/mine --mask ... --name theirs')
    """
    method = method or {"base-reference": "base"}.get(name, name)
    usual = "base-reference" if method == "base" else method
    known = method in METHODS or method == "mask"
    flags = "--mask ..." if method == "mask" else f"--method {method if known else '...'}"
    return f"select.py --run {folder} {flags}" + ("" if name == usual and known else f" --name {name}")


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file, each with its file:line, empty lines left out; InputError where a line is none."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # splitlines would also cut at U+2028
        if line:
            yield f"{path}:{number}", json_object(line, f"{path}:{number}")


def evenly(items: list, n: int) -> list:
    """n of the items, or all when there are fewer, spread evenly from the first to the last.

    >>> evenly([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 3, 6]
    """
    if len(items) <= n:
        return list(items)
    return [items[i * (len(items) - 1) // max(n - 1, 1)] for i in range(n)]
