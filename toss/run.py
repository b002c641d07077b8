"""The run directory: the only place that hashes, skips, refuses, writes and records.

A result carries its own record: its settings, and the sha256 of everything it was made from and of
its own files. A stage whose record equals what is asked for is skipped, one with another record is
refused without --overwrite. run.json is an index: the settings of the run, and each stage's record
and cost. One process at a time works on a result; what it reads, nobody changes meanwhile.
"""

import json
import platform
import re
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.atomic import atomic_dir, atomic_file, restore, sweep
from model.checkpoint import base_hash, save_checkpoint
from model.hub import resolve_adapter
from model.io import InputError, file_hash, read_json
from model.lora import Adapter, merge
from model.peft import WEIGHTS, read_adapter
from model.process import lock, meet, stop
from toss import files
from toss.base import Base
from toss.cli import FORMAT, INPUTS, ROOT, Parser, add_run_flags, parse, read_run, trainable
from toss.config import TrainConfig
from toss.files import fingerprint, load_selection, lost_rows, read_scores, record_of
from toss.parallel import rank
from toss.progress import Planned, Progress, arithmetic, changed, cost_of
from toss.selection import competing_tokens
from toss.tokens import Tokens

RESULTS = ("degraded", "utility", "scores", "methods")  # what the scripts make
IDENTITY = ("base_sha256", "tokenizer_sha256", "template", "max_length", "date")
# Settings that are not a run's.
HIDDEN = ("run", "overwrite", "given", "demo", "anew", "wait", "save_every", "dry_run", "damaged")


class Run(Base):
    """One run directory under the settings `args` (see cli.parse)."""

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
        # Of the stage at work: its recipe, its parts, and TOSS-Pro's rounds.
        self.making: dict[str, Any] = {}
        self.parts: dict[str, Progress] = {}
        self.rounds: list[tuple] = []

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
        for stage in ("degraded", "utility", "scores", *methods):
            with suppress(InputError):  # a damaged one is made again
                known = stages.get(stage, {}).get("recipe", {})
                made = record_of(self.path(stage))
                if made and (not known or {**made, **known} != made):  # it lags, or is lost
                    stages[stage] = {"recipe": made}
                    record.setdefault("identity", {key: made.get(key) for key in IDENTITY})
        return record

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
                    file = self.hidden / f"{stage}.lock"
                    locks.enter_context(lock(file, stage not in makes, self.args.wait))
                    restore(self.folder / stage)
                for folder in (self.folder, self.folder / "methods"):
                    sweep(folder)
                if not alone:
                    meet()  # before any process looks at what is there
                with (
                    lock(self.hidden / "run.json.lock", wait=True) if rank() == 0 else nullcontext()
                ):
                    self.record = self.indexed()  # others may have changed it
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
            advice = "give --model, --template or --date as then, or another --run"
            raise InputError(f"{self.folder} was begun with {what}: {advice}")
        return identity

    def log(self, name: str) -> Progress:
        """The callback of a piece of work: bar, log, cost; of a stage, the state to go on from."""
        arithmetic = {"dtypes": self.dtypes, "no_onednn": self.args.no_onednn}
        recipe, saving = {**self.making, **arithmetic}, None
        if self.making:
            begin = lambda: self.file.exists() or self.finish(recipe["stage"])
            saving = self.hidden / recipe["stage"], recipe, self.args.save_every, begin
        dry = self.args.dry_run
        self.parts[name] = Progress(name, self.device, self.folder, saving, dry)
        return self.parts[name]

    # Results of earlier stages

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
        path = Path(path).absolute()
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        stat, known = path.stat(), self.hashes.get(str(path), [])
        now = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if known[:-1] != now:
            value = file_hash(path)
            if str(path) in self.datasets and known and known[-1] != value:
                raise InputError(f"{path} was changed after it was read: run the command again")
            self.hashes[str(path)] = known = [*now, value]
        return known[-1]

    def stale(self, stage: str) -> list[str]:
        """The inputs of a recorded stage that have changed since. One that is gone has not."""
        index = self.record.get("stages", {}).get(stage, {}).get("recipe", {})
        inputs = (record_of(self.path(stage)) or index).get("inputs", {})
        there = {key: file for key in inputs if (file := self.source(key)).is_file()}
        return [key for key, file in there.items() if self.hash(file) != inputs[key]]

    def check(self, stage: str, only: tuple[str, ...] | None = None) -> dict[str, Any]:
        """The record of an earlier result, which must be there and fit the run as it is now.

        only: the inputs that must not have changed since (default: all). An adapter that was made
        elsewhere has no record and passes: loading checks its shapes.
        """
        script = {"scores": "score.py"}.get(stage, "select.py" if "/" in stage else "train.py")
        make, path = f"{script} --run {self.folder}", self.path(stage)
        if not self.source(stage).exists():
            raise InputError(f"{self.source(stage)} does not exist: run {make} first")
        record = record_of(path)
        if not record and stage == "scores":
            raise InputError(f"{path} has no record of how it was made: run {make} --overwrite")
        if path.is_dir() and (wrong := files.damaged(path, record, self.hash)):
            raise InputError(f"{path} is damaged or incomplete ({wrong[0]}): run {make} again")
        differs = [key for key in self.stale(stage) if only is None or key in only]
        differs += [k for k, value in self.identity.items() if record.get(k, value) != value]
        if differs:
            what = f"{path} does not fit this run (changed: {', '.join(differs)})"
            raise InputError(f"{what}: run {make} --overwrite, or choose another --run")
        return record

    def adapter(self, name: str) -> Adapter:
        """A trained adapter: "degraded", "utility", or a method's, by the name of its folder."""
        stage = name if name in ("degraded", "utility") else f"methods/{name}"
        self.check(stage, None if name == stage else ())
        return read_adapter(self.model or self.base("score"), self.source(stage).parent)

    def reference_config(self) -> TrainConfig:
        """How theta^h was trained, so that TOSS-Pro can train it again."""
        if not (record := self.check("degraded")):
            raise InputError(
                f"{self.path('degraded')} has no record, so TOSS-Pro cannot retrain it"
            )
        if not trainable(record["settings"]):
            raise InputError(f"{self.path('degraded')}: a setting in its record is damaged")
        if "--degraded-adapter" in record["inputs"]:
            print("theta^h was made elsewhere: it is trained again with this command's settings")
            return TrainConfig.of(self.args)
        return TrainConfig.of({**record["settings"], "batch_tokens": self.args.batch_tokens})

    def scored(self, needed: bool = True) -> tuple[Tokens, dict[str, Tensor]]:
        """The custom set's tokens, and their losses under each model, from scores.safetensors.

        Where there are no scores and none are needed, the custom file is tokenised: the same ids.
        """
        if not needed and not self.path("scores").exists():
            return self.tokens(self.args.custom), {}
        record = self.check("scores", only=None if needed else ("--custom",))
        tokens, losses = read_scores(self.path("scores"), self.args.custom)
        if self.args.custom not in self.datasets:  # at first; lower_scoring may change it later
            self.dtypes["score"] = record["dtype"]  # what is compared is scored alike
        self.check_ids(tokens)
        self.datasets[self.args.custom] = tokens
        return tokens, losses

    def mask(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The mask that --mask names, and what it went by; it must be over the same token ids.

        A mask is a list of places, so nothing else of the two runs has to agree.
        """
        path = Path(self.args.mask)
        record = record_of(path)
        if record.get("tokens_sha256") != fingerprint(tokens):
            here = {**self.identity, "--custom": self.hash(self.args.custom)}
            there = {**record, **record.get("inputs", {}), "base_sha256": here["base_sha256"]}
            differs = ", ".join(key for key in here if there.get(key) != here[key])
            raise InputError(f"{path} is a mask over other token ids (different: {differs})")
        found = load_selection(path, tokens)
        if self.hash(path) != self.making["inputs"]["--mask"]:
            raise InputError(f"{path} was changed while the command ran")
        if "weight" in found:
            raise InputError(f"{path} holds weights, and a mask of 0 and 1 is asked for")
        return found["keep"], found.get("score")

    def adopt_references(self) -> None:
        """Take the adapters that were made elsewhere, if such are given, as the references."""
        for role in ("utility", "degraded"):
            if (adapter := getattr(self.args, f"{role}_adapter")) is not None:
                flag = f"--{role}-adapter"
                self.elsewhere[flag] = folder = resolve_adapter(adapter)
                if self.args.dry_run:
                    self.elsewhere[role] = folder  # it is not copied
                else:
                    self.once(role, lambda: read_adapter(self.base("score"), folder), [flag], {})

    # Making a result

    def recipe(self, inputs: tuple[str, ...], settings: dict[str, Any]) -> dict[str, Any]:
        """Everything that decides a result: settings, hashes of its inputs, base and tokenizer."""
        for key in inputs:
            if key[2:] in INPUTS and getattr(self.args, key[2:]) is None:
                raise InputError(f"{key} must be given: {self.folder} was begun without it")
            if key.startswith("--") and not (file := self.source(key)).is_file():
                raise InputError(f"{file}: no such file; {key} says where it is now")
        hashes = {key: self.hash(self.source(key)) for key in inputs}
        return {"settings": settings, "inputs": hashes, **self.identity}

    def once(self, stage: str, build: Callable, inputs: Sequence[str], settings: dict) -> None:
        """Make a result, unless it exists already. Raises InputError if a different one does.

        inputs: the file of rows first; see source. build() returns what is to be written: an
        Adapter; tokens and their losses; or tokens, a selection {"keep": bool [N], "score": float
        [N] or None} and an Adapter. When scoring overflows, it is called again with the base in
        another dtype. What it trains and scores goes on where an interrupted call stopped.
        """
        earlier = [key for key in inputs if not key.startswith("--")]
        with self.holding(stage, reads=earlier):
            for key in earlier:
                self.check(key)
            dtype = self.dtypes["score" if stage == "scores" else "train"]
            recipe = self.recipe(inputs, {**settings, "dtype": dtype})
            done = self.is_done(stage, recipe)
            try:
                result = None if done else self.make(stage, build, recipe)
            except Planned:
                print(f"{stage}: a dry run ends here, nothing was written")
                return
            if rank() == 0:
                if done:
                    self.catch_up(stage, recipe)
                else:
                    self.publish(stage, result, recipe, str(self.source(inputs[0])))
                shutil.rmtree(self.hidden / stage, ignore_errors=True)

    def make(self, stage: str, build: Callable, recipe: dict[str, Any]) -> Any:
        """What build() returns, scored in another dtype if it must be; see once."""
        self.making, self.parts, self.rounds = {"stage": stage, **recipe}, {}, []
        try:
            return build()
        except (InputError, RuntimeError) as error:
            if not self.lower_scoring(error):
                raise
        finally:
            self.making, stop.deferred = {}, False
        return self.make(stage, build, recipe)

    def catch_up(self, stage: str, recipe: dict[str, Any]) -> None:
        """Let run.json know a result that is there, and where its inputs are now."""
        known, settings = self.record["stages"][stage], self.record.get("settings", {})
        moved = any(getattr(self.args, name) not in (None, settings.get(name)) for name in INPUTS)
        if moved or known.keys() == {"recipe"}:
            self.finish(stage, **{**known, "recipe": recipe})

    def publish(self, stage: str, result: Any, recipe: dict[str, Any], rows: str) -> None:
        """Write a result, put it in its place, and say so. rows: the file that it is about."""
        with (atomic_file if stage == "scores" else atomic_dir)(self.path(stage)) as out:
            remarks = self.write(stage, result, out, {"stage": stage, **recipe})
        cost, took = {}, ""
        if self.parts:  # else it was made elsewhere
            data = self.datasets[rows]
            counts = {name: getattr(data, name) for name in ("rows", "skipped", "cut")}
            cost = {**counts, **cost_of(self.parts), **arithmetic()}
            took = f"\n    {describe_cost(cost)}"
        self.finish(stage, recipe, **cost)
        print(f"{stage}: wrote {self.path(stage)}{took}")
        for remark in remarks:
            print(f"{stage}: {remark}")

    def write(self, stage: str, result: Any, out: Path, record: dict[str, Any]) -> list[str]:
        """Write what `build` returned (see once), with its record; returns the closing lines."""
        if isinstance(result, Adapter):
            files.write_model(out, result, self.model, record)
            return []
        if stage == "scores":
            record["dtype"] = dtype = self.dtypes["score"]
            files.write_scores(out, *result, record)
            noise = f"python -m toss.audit.noise --run {self.folder}"
            note = f"computed in {dtype}; for the rounding noise of S: {noise}"
            return files.describe_scores(*result) + [note] * (dtype != "float32")
        tokens, selection, adapter = result
        keep, keep_eos = selection["keep"], record["settings"].get("keep_eos")
        ranked = len(competing_tokens(tokens, self.tokenizer.eos_id if keep_eos else None))
        if self.args.mask:
            ranked = record_of(Path(self.args.mask)).get("ranked", ranked)
        record |= {"discarded": int((~keep).sum()), "ranked": ranked}
        record["tokens_sha256"] = fingerprint(tokens)
        for t, added, theta_h, losses in self.rounds:
            folder, rows = out / f"round-{t}", {"added_rows": [row for row, _, _ in added]}
            made = {"stage": folder.name, **self.recipe(("--custom", "--harmful"), rows)}
            files.write_added(folder / "added.jsonl", tokens, added, self.tokenizer)
            files.write_model(folder / "degraded", theta_h, self.model, made)
            made["dtype"] = self.dtypes["score"]
            files.write_scores(folder / "scores.safetensors", tokens, losses, made)
        files.write_model(out, adapter, self.model, record, selection)
        gone = f"{record['discarded']} of {ranked} response tokens discarded"
        return [f"{gone}, {lost_rows(tokens, keep)} rows lost all their tokens"]

    def save_round(self, t: int, added: list, theta_h: Adapter, L: dict[str, Tensor]) -> None:
        """Keep round t of TOSS-Pro for writing: the rows added to D^h, theta^h_t, and the losses.

        added: (row, place of the token that brought it in, that token's score) each.
        """
        print(f"TOSS-Pro round {t}: {len(added)} rows added to the harmful reference set")
        self.rounds.append((t, added, theta_h, dict(L)))

    def merge(self, stage: str) -> None:
        """Write the merged checkpoint of a method, in process 0.

        In the dtype of the stored base, unless --dtype asks for another one.
        """
        if rank() > 0 or self.args.dry_run:
            return
        folder, config = self.path(stage) / "model", read_json(self.checkpoint / "config.json")
        stored = config.get("dtype") or config.get("torch_dtype") or "float32"
        dtype = stored if self.args.dtype == "auto" else self.args.dtype
        with self.holding(stage, alone=True):
            restore(folder / "merged")
            sweep(folder)
            made = {**self.identity, "adapter_sha256": self.hash(folder / WEIGHTS), "dtype": dtype}
            if not files.is_merged(folder / "merged", made, self.hash):
                model = self.base(dtype)
                merge(model, read_adapter(model, folder))
                self.model = None  # it is another model now
                save_checkpoint(model, folder / "merged", self.checkpoint, made)
        print(f"merged checkpoint: {folder / 'merged'}")

    def is_done(self, stage: str, recipe: dict[str, Any]) -> bool:
        """True if the result exists with an equal record. InputError if it has a different one."""
        path = self.path(stage)
        if not path.exists():
            return False
        known, wrong = self.record["stages"].get(stage, {}).get("recipe", {}), []
        try:
            known = record_of(path)
            wrong = files.damaged(path, known, self.hash)
        except InputError as error:  # then run.json says how it was made
            wrong = [str(error)]
        if differs := differences(known, recipe):
            if self.args.overwrite:
                return False
            what = f"different: {', '.join(differs)}" if known else "it has no record"
            advice = (
                f"give --overwrite to replace it, or another --{'name' if '/' in stage else 'run'}"
            )
            raise InputError(f"{path} exists with other settings or inputs ({what}): {advice}")
        if wrong:
            print(f"{stage}: {path} is damaged or incomplete ({wrong[0]}), so it is made again")
            return False
        made = changed(self.record["stages"].get(stage, {}))
        print(f"{stage}: {path} exists with equal settings and inputs, skipped{made}")
        return True

    def finish(self, stage: str, recipe: dict[str, Any] | None = None, **facts: Any) -> None:
        """Put a stage into run.json: its recipe, and what else is known of it.

        Without a recipe only what the run was begun with, for an unfinished stage to go on.
        """
        own, commit = f"{self.folder.absolute()}/", git_commit()
        used = {p: known[-1] for p, known in self.hashes.items() if not p.startswith(own)}
        settings = vars(self.args) if stage.split("/")[0] in RESULTS else {}  # not an audit's
        lacking = {name for name in INPUTS if getattr(self.args, name) is None}
        settings = {k: v for k, v in settings.items() if k not in lacking.union(HIDDEN)}
        identity = self.identity
        with lock(self.hidden / "run.json.lock", wait=True):
            self.record = record = self.indexed()
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


def open_run(folder: str | Path, adapter: Sequence = (), **settings: Any) -> Run:
    """A run that exists, as its run.json has it. settings: see cli.DEVICE.

    adapter: (name, folder or hub id) of adapters from elsewhere that are taken for methods.
    """
    if not (Path(folder) / "run.json").exists():
        raise InputError(f"{folder} has no run.json: it is not a run directory")
    flags = Parser("audit", "")
    add_run_flags(flags)
    args = parse(flags, ["--run", str(folder)])
    vars(args).update({name: value for name, value in settings.items() if value is not None})
    run = Run(args)
    for name, place in adapter:
        if run.path(f"methods/{name}").exists():
            raise InputError(
                f"--adapter {name}: {folder} has a method of this name: choose another"
            )
        run.elsewhere[f"methods/{name}"] = resolve_adapter(place)
    return run


def differences(known: dict, wanted: dict) -> list[str]:
    """What differs between a record and a recipe: "lr 1e-05 there, 0.001 now"."""
    there, now = (  # settings and inputs whole: one that only the record has differs too
        {k: r.get(k) for k in wanted} | r.get("settings", {}) | r.get("inputs", {})
        for r in (known, wanted)
    )
    pairs = {k: (there.get(k), now.get(k)) for k in now | there if k not in ("settings", "inputs")}
    return [f"{k} {str(a)[:16]} there, {str(b)[:16]} now" for k, (a, b) in pairs.items() if a != b]


def describe_cost(cost: dict[str, Any]) -> str:
    """What a stage took, in words."""
    speed = cost["tokens"] / max(cost["seconds"], 1e-9)
    loss = ", last loss {last_loss:.3f}" if "last_loss" in cost else ""
    words = "{tokens} tokens in {seconds:.1f} s ({speed:,.0f} per second), peak memory "
    return (words + "{peak_memory_gib:.2f} GiB" + loss).format(speed=speed, **cost)


def git_commit() -> str | None:
    """The commit of this code, with a plus sign if the tree has changes; None outside git."""
    call = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
