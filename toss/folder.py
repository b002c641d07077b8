"""The run directory: where its results are, who works on them, and what is known of them.

run.json is an index: the settings of the run, and each stage's record and cost. It follows the
records that lie with the results. One process at a time works on a result; what it reads, nobody
changes meanwhile. Files are known by their hashes, never by their place.
"""

import json
import platform
import re
import subprocess
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from model.atomic import atomic_file, restore, sweep
from model.checkpoint import base_hash
from model.io import InputError, file_hash, regular
from model.peft import WEIGHTS
from model.process import lock, meet
from toss.base import Base
from toss.cli import FORMAT, INPUTS, ROOT, read_run
from toss.files import record_of
from toss.parallel import rank

RESULTS = ("degraded", "utility", "scores", "methods")  # what the scripts make
IDENTITY = ("base_sha256", "tokenizer_sha256", "template", "max_length", "date")
# Settings that are not a run's.
HIDDEN = ("run", "overwrite", "given", "demo", "anew", "wait", "save_every", "dry_run", "damaged")


class Folder(Base):
    """A run directory, without what makes results (see run.py)."""

    def __init__(self, args: Namespace):
        super().__init__(args)
        self.folder = Path(args.run)
        self.file = self.folder / "run.json"
        self.hidden = self.folder / ".state"  # locks, and the states of unfinished stages
        self.record = self.indexed()
        for old in [*self.folder.glob(".*.old"), *self.folder.glob("methods/.*.old")]:
            stage = str(old.relative_to(self.folder)).replace(".", "", 1).removesuffix(".old")
            with suppress(InputError), self.holding(reads=[stage], alone=True):
                pass  # puts it back
        known, kinds = self.record.get("hashes", {}), [int] * 5 + [str]
        self.hashes = {name: row for name, row in known.items() if list(map(type, row)) == kinds}
        self.elsewhere: dict[str, Path] = {}  # adapters that stand for results: their folders

    def indexed(self) -> dict[str, Any]:
        """What is in run.json, and the results that it does not know, by their own records."""
        try:
            record = read_run(self.file)
        except InputError:
            if not self.args.damaged:  # see cli.parse
                raise
            record = {"format": FORMAT}
        stages = record.setdefault("stages", {})
        methods = (f"methods/{path.name}" for path in self.folder.glob("methods/[!.]*"))
        for stage in ("degraded", "utility", "scores", *sorted(methods)):  # see trained_before
            with suppress(InputError):  # a damaged one is made again
                known = stages.get(stage, {}).get("recipe", {})
                made = record_of(self.path(stage))
                if made and (not known or {**made, **known} != made):  # it lags, or is lost
                    stages[stage] = {"recipe": made}
                    record.setdefault("identity", {key: made.get(key) for key in IDENTITY})
        return record

    @contextmanager
    def indexing(self) -> Iterator[None]:
        """Read run.json again and, in process 0, keep others from changing it meanwhile."""
        with lock(self.hidden / "run.json.lock", wait=True) if rank() == 0 else nullcontext():
            self.record = self.indexed()
            yield

    @contextmanager
    def holding(
        self, *makes: str, reads: Sequence[str] = (), alone: bool = False
    ) -> Iterator[None]:
        """Hold the locks of results that are made, or only read, in process 0.

        In the order of their names, so that two processes never wait for each other. alone: the
        other processes of torchrun do not come here. Raises InputError naming the process that
        holds a lock, unless --wait is given.
        """
        there = self.folder.exists()
        try:
            with ExitStack() as locks:
                for stage in sorted({*makes, *reads}) if rank() == 0 else ():
                    self.path(stage)  # raises for what is no name
                    file = self.hidden / f"{stage}.lock"
                    locks.enter_context(lock(file, stage not in makes, self.args.wait))
                    restore(self.folder / stage)
                for folder in (self.folder, self.folder / "methods"):
                    sweep(folder)
                if not alone:
                    meet()  # before any process looks at what is there
                with self.indexing():
                    pass  # others may have changed it
                yield
        finally:
            folders = (".state/methods", ".state/evaluation", ".state", "methods")
            for folder in [*(self.folder / name for name in folders), *[self.folder][there:]]:
                with suppress(OSError):  # something is in it
                    folder.rmdir()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the base, and how text becomes ids: part of every record.

        By hashes, so that a base may move. Raises InputError if the run was begun with another one.
        """
        self.hash(self.checkpoint / "tokenizer.json")  # for run.json's list of inputs
        identity = {
            "base_sha256": base_hash(self.checkpoint, self.hash),
            "tokenizer_sha256": self.tokenizer.fingerprint(),
            "template": self.args.template,
            "max_length": self.args.max_length,
            "date": self.args.date,
        }
        begun = {} if self.args.anew else self.record.get("identity", {})
        if differs := differences({**identity, **begun}, identity):
            what = f"another base or prompt form ({'; '.join(differs)})"
            advice = "give the flags that decide it as then, or another --run"
            raise InputError(f"{self.folder} was begun with {what}: {advice}")
        return identity

    def path(self, stage: str) -> Path:
        """The folder or file of a result: "degraded", "utility", "scores" or "methods/NAME"."""
        if re.search(r"(^|/)([./]|$)", stage.removeprefix("methods/")):
            raise InputError(f"{stage} is not the name of a result")
        return self.folder / ("scores.safetensors" if stage == "scores" else stage)

    def source(self, key: str) -> Path:
        """The file behind an input: a flag ("--custom"), or what stands for an earlier result."""
        if key in self.elsewhere:
            return self.elsewhere[key] / WEIGHTS
        if key.startswith("--"):
            return Path(getattr(self.args, key[2:], None) or key)
        path = self.path(key)
        return path if key == "scores" else path / ("model" if "/" in key else "") / WEIGHTS

    def hash(self, path: str | Path) -> str:
        """sha256 of a file; kept in run.json for as long as nothing has touched the file.

        Raises InputError if rows that were read have changed since.
        """
        path = regular(Path(path).absolute())
        stat, known = path.stat(), self.hashes.get(str(path), [])
        now = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if known[:-1] != now:
            value = file_hash(path)
            if str(path) in self.datasets and known and known[-1] != value:
                raise InputError(f"{path} was changed after it was read: run the command again")
            self.hashes[str(path)] = known = [*now, value]
        return known[-1]

    def stale(self, stage: str) -> list[str]:
        """The inputs of a recorded stage, and the parts of IDENTITY, that have changed since.

        An input that is gone has not.
        """
        index = self.record.get("stages", {}).get(stage, {}).get("recipe", {})
        made, now = record_of(self.path(stage)) or index, self.record.get("identity", {})
        inputs = made.get("inputs", {})
        there = {key: file for key in inputs if (file := self.source(key)).is_file()}
        changed = [key for key, file in there.items() if self.hash(file) != inputs[key]]
        return changed + [key for key in now if made.get(key, now[key]) != now[key]]

    def finish(self, stage: str, recipe: dict[str, Any] | None = None, **facts: Any) -> None:
        """Put a stage into run.json: its recipe, and what else is known of it.

        Without a recipe only what the run was begun with, for an unfinished stage to go on.
        """
        own, commit = f"{self.folder.absolute()}/", git_commit()
        used = {p: known[-1] for p, known in self.hashes.items() if not p.startswith(own)}
        settings = vars(self.args) if stage.split("/")[0] in RESULTS else {}  # not an audit's
        lacking = {name for name in INPUTS if getattr(self.args, name) is None}
        begun = {} if self.args.anew else self.record.get("settings", {})
        lacking |= begun.keys() & {*INPUTS} - {*inputs_of(recipe or {})}  # others may not fit
        settings = {k: v for k, v in settings.items() if k not in lacking.union(HIDDEN)}
        identity = self.identity
        with self.indexing():
            record = self.record
            record |= {"format": FORMAT, "demo": self.args.demo, "identity": identity}
            record["settings"] = {**record.get("settings", {}), **settings}
            record["inputs"] = {**record.get("inputs", {}), **used}
            record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
            record["commit"], record["hashes"] = commit, self.hashes
            record["stages"] |= {stage: {**facts, "recipe": recipe}} if recipe else {}
            if self.args.damaged:
                with suppress(FileNotFoundError):  # another process was faster
                    self.file.rename(f"{self.file}.damaged")
                self.args.damaged = False
            with atomic_file(self.file) as file:
                file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def inputs_of(recipe: dict) -> list[str]:
    """The inputs that a result was made from, by their names in a run's settings."""
    return [name for name in INPUTS if name == "model" or f"--{name}" in recipe.get("inputs", {})]


def differences(known: dict, wanted: dict) -> list[str]:
    """What differs between a record and a recipe: "lr 1e-05 there, 0.001 now"."""
    there, now = (  # settings and inputs whole: one that only the record has differs too
        {k: r.get(k) for k in wanted} | r.get("settings", {}) | r.get("inputs", {})
        for r in (known, wanted)
    )
    pairs = {k: (there.get(k), now.get(k)) for k in now | there if k not in ("settings", "inputs")}
    return [f"{k} {str(a)[:16]} there, {str(b)[:16]} now" for k, (a, b) in pairs.items() if a != b]


def git_commit() -> str | None:
    """The commit of this code, with a plus sign if the tree has changes; None outside git."""
    call = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
