"""The results of a run: the only place that skips, refuses, writes and records.

A result carries its own record: its settings, and the sha256 of everything it was made from and of
its own files. A stage whose record equals what is asked for is skipped, one with another record is
refused without --overwrite.
"""

import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from model.atomic import atomic_dir, atomic_file, restore, sweep
from model.checkpoint import save_checkpoint
from model.hub import resolve_adapter
from model.io import InputError, read_json
from model.lora import Adapter, merge
from model.peft import WEIGHTS, read_adapter
from model.process import meet, stop, warn_once
from toss import files
from toss.cli import INPUTS, Parser, add_run_flags, parse, trainable
from toss.config import METHODS, TrainConfig
from toss.files import fingerprint, load_selection, lost_rows, read_scores, record_of
from toss.folder import Folder, differences, inputs_of
from toss.parallel import rank
from toss.progress import Planned, Progress, arithmetic, changed, cost_of, led_to
from toss.selection import competing_tokens
from toss.tokens import Tokens


class Run(Folder):
    """One run directory under the settings `args` (see cli.parse)."""

    def __init__(self, args: Namespace):
        super().__init__(args)
        # Of the stage at work: its recipe, its parts, and TOSS-Pro's rounds.
        self.making: dict[str, Any] = {}
        self.parts: dict[str, Progress] = {}
        self.rounds: list[tuple] = []

    def log(self, name: str) -> Progress:
        """The callback of a piece of work: bar, log, cost; of a stage, the state to go on from."""
        how = {"dtypes": self.dtypes, "no_onednn": self.args.no_onednn}
        recipe, saving = {**self.making, **how}, None
        if self.making:
            begin = lambda: self.file.exists() or self.finish(recipe["stage"])
            saving = self.hidden / recipe["stage"], recipe, self.args.save_every, begin
        dry = self.args.dry_run
        self.parts[name] = Progress(name, self.device, self.folder, saving, dry)
        return self.parts[name]

    # Results of earlier stages

    def check(self, stage: str, only: tuple[str, ...] | None = None) -> dict[str, Any]:
        """The record of an earlier result, which must be there and fit the run as it is now.

        only: the inputs that must not have changed since (default: all). An adapter that was put
        there by hand has no record and passes: loading checks its shapes.
        """
        path = self.path(stage)
        if not self.source(stage).exists():
            raise InputError(f"{self.source(stage)} does not exist: {self.advice(stage, 'first')}")
        if stage in self.elsewhere:  # of a method, or a reference that a dry run does not copy
            return {}
        record = record_of(path)
        if not record and stage == "scores":
            what = f"{path} has no record of how it was made"
            raise InputError(f"{what}: {self.advice(stage, '--overwrite')}")
        if path.is_dir() and (wrong := files.damaged(path, record, self.hash)):
            what = f"{path} is damaged or incomplete ({wrong[0]})"
            raise InputError(f"{what}: {self.advice(stage, 'again')}")
        identity = self.identity  # raises if the base was moved, or is another one
        differs = set(self.stale(stage)) - identity.keys()  # of these the record itself tells
        differs = sorted(x for x in differs if only is None or x in only)
        differs += [x for x in identity if record.get(x, identity[x]) != identity[x]]
        if differs:
            what = f"{path} does not fit this run (changed: {', '.join(differs)})"
            advice = self.advice(stage, "--overwrite")
            raise InputError(f"{what}: {advice}, or choose another --run")
        return record

    def advice(self, stage: str, word: str) -> str:
        """What to run to make a result. word: "first", "again" or "--overwrite"."""
        recipe = self.record["stages"].get(stage, {}).get("recipe", {})
        both = "with both --utility-adapter and --degraded-adapter"
        other = "score.py --overwrite" if word == "--overwrite" else "score.py"
        script, more = "train.py", f", or {other} {both}"
        if stage == "scores":
            script, more = "score.py", ""
        elif "/" in stage:
            own = recipe.get("settings", {}).get("method", "mask") in ("mask", *METHODS)
            script = "select.py" if own else "python -m toss.audit.rivals"
            more = f", with the flags of {Path(stage).name}"
        return f"run {script} --run {self.folder} {word}{more}"

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
        there, now = record["settings"].get("dtype"), self.dtypes["train"]
        if there != now:
            warn_once(f"note: theta^h was trained in {there}, and is trained again in {now}")
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
        given = {role: getattr(self.args, f"{role}_adapter") for role in ("utility", "degraded")}
        folders = {role: resolve_adapter(name) for role, name in given.items() if name is not None}
        self.elsewhere |= {f"--{role}-adapter": folder for role, folder in folders.items()}

        def check(role: str) -> None:
            if role in folders:  # a different one that is there is refused
                dtype = {"dtype": self.dtypes["train"]}
                self.is_done(role, self.recipe((f"--{role}-adapter",), dtype))
            else:
                self.check(role)

        def read(role: str) -> Adapter:
            if self.args.dry_run:
                self.elsewhere[role] = folders[role]  # it is not copied
                raise Planned
            self.recipe(("--custom",), {})  # all that scoring needs, before anything is written
            self.tokens(self.args.custom)
            for each in given:
                check(each)
            return {name: read_adapter(self.base("score"), folders[name]) for name in folders}[role]

        if folders:
            with self.holding(reads=[*given]):
                pass  # one that is in use is told before the other is written
        for role in folders:
            self.once(role, lambda: read(role), [f"--{role}-adapter"], {})

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
        with self.holding(reads=[stage, *earlier]):  # what is there is read, as others may
            recipe = self.lacking(stage, inputs, settings)
            meet()  # no process lets go of it before all have looked
        if recipe is None:
            return
        with self.holding(stage, reads=earlier):
            if (recipe := self.lacking(stage, inputs, settings)) is None:  # another made it
                return
            try:
                result = self.make(stage, build, recipe)
            except Planned:
                print(f"{stage}: a dry run ends here, nothing was written")
                return
            if rank() == 0:
                self.publish(stage, result, recipe, str(self.source(inputs[0])))
                shutil.rmtree(self.hidden / stage, ignore_errors=True)

    def lacking(self, stage: str, inputs: Sequence[str], settings: dict) -> dict[str, Any] | None:
        """The recipe of a result that must be made; None, and a line, if it is there."""
        for key in inputs:
            if not key.startswith("--"):
                self.check(key)
        dtype = self.dtypes["score" if stage == "scores" else "train"]
        recipe = self.recipe(inputs, {**settings, "dtype": dtype})
        if not self.is_done(stage, recipe):
            return recipe
        made = changed(self.record["stages"].get(stage, {}))
        there = f"{self.path(stage)} exists with equal settings and inputs, skipped{made}"
        print(f"{stage}: {there}")
        if rank() == 0 and not self.args.dry_run:
            self.catch_up(stage, recipe)
            if led_to(self.hidden / stage, recipe):
                shutil.rmtree(self.hidden / stage, ignore_errors=True)
        return None

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
        own = inputs_of(recipe)
        moved = any(getattr(self.args, name) not in (None, settings.get(name)) for name in own)
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
            warn_once(f"{stage}: {path} is damaged or incomplete ({wrong[0]}), so it is made again")
            return False
        return True


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
        if run.path(stage := f"methods/{name}").exists() or stage in run.elsewhere:
            what = f"{folder} has a method of this name, or it is given twice"
            raise InputError(f"--adapter {name}: {what}: choose another")
        run.elsewhere[stage] = resolve_adapter(place)
    return run


def describe_cost(cost: dict[str, Any]) -> str:
    """What a stage took, in words."""
    speed = cost["tokens"] / max(cost["seconds"], 1e-9)
    loss = ", last loss {last_loss:.3f}" if "last_loss" in cost else ""
    words = "{tokens} tokens in {seconds:.1f} s ({speed:,.0f} per second), peak memory "
    return (words + "{peak_memory_gib:.2f} GiB" + loss).format(speed=speed, **cost)
