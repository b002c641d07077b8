"""A run directory: how its results are made, and how later stages find them.

A result carries its own record, by which it is skipped, refused or made; see records.py. The rest
is a courtesy: run.json says what omitted flags are, log/costs.jsonl what each result has cost.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import base_hash, save_checkpoint, stored_dtype
from model.io import InputError, file_hash, remove, whole
from model.lora import Adapter, merge, use
from model.peft import WEIGHTS, read_adapter
from toss.config import TrainConfig
from toss.loss import token_loss
from toss.parallel import agreed, meet, rank
from toss.scoring import score
from toss.tokens import Tokens
from toss.training import count_steps, train
from toss.workbench import files, records
from toss.workbench.base import Base
from toss.workbench.files import Losses, Mask
from toss.workbench.flags import command, parse, script_parser, write_run
from toss.workbench.progress import Cost, Progress, add_line
from toss.workbench.records import Record, code_digests, print_once, read_record

REFERENCES = ("degraded", "utility")
MAKERS = {"degraded": "train.py", "utility": "train.py", "scores": "score.py"}  # else select.py


class Run(Base):
    """A run directory under the settings `args` (see flags.parse)."""

    def __init__(self, args: Namespace):
        super().__init__(args)
        self.folder = Path(args.run)
        self.script = ""  # what makes the results, where it is none of the three scripts
        # Of the result that is being made.
        self.states = self.folder
        self.cost = Cost(torch.device("cpu"))

    # Places and recipes

    def path(self, result: str) -> Path:
        """Where a result lies: the folder of an adapter, or the file of losses or a mask."""
        is_file = result.endswith(("scores", "selection"))
        return self.folder / (f"{result}.safetensors" if is_file else result)

    def source(self, key: str) -> Path:
        """The file behind an input: a flag ("--custom"), or what an earlier result is read from."""
        if key.startswith("--"):
            return Path(getattr(self.args, key.removeprefix("--"), None) or "")
        path = self.path("scores" if key == "loss_base" else key)
        return path if path.suffix == ".safetensors" else path / WEIGHTS

    def is_result(self, key: str) -> bool:
        """True if an input is an earlier result, and no file or part of one."""
        return not key.startswith("--") and key != "loss_base"

    def input_hash(self, key: str) -> str:
        """The hash of an input; InputError if it is not what it was when it was read."""
        value = self.hash_of(key)
        if self.sha256.get(key, value) != value:
            raise InputError(f"{self.source(key)} was changed while the command ran: run it again")
        return value

    def hash_of(self, key: str) -> str:
        """The hash of an input: of a file of rows its bytes, of results and masks what they hold.

        "loss_base" is what --base adds to the scores, which are the same without it.
        """
        file = self.source(key)
        if file == Path():
            raise InputError(f"{key} must be given: {self.folder} knows none")
        if key.startswith("--") and not file.exists():
            raise InputError(f"{file}: file not found; give its new path with {key}")
        if key in ("--custom", "--harmful", "--utility"):
            return file_hash(file)
        return files.content_hash(file, of_base=key == "loss_base")

    def recipe(self, result: str, inputs: Sequence[str], settings: dict[str, Any]) -> Record:
        """Everything that decides a result."""
        hashes = {key: self.input_hash(key) for key in inputs}
        return {"stage": result, "settings": settings, "inputs": hashes, **self.identity()}

    # Making a result

    def make(
        self,
        result: str,
        build: Callable[[], Adapter | Losses | Mask],
        inputs: Sequence[str],
        settings: dict[str, Any],
        facts: dict[str, Any] | None = None,
        again: bool = False,
    ) -> Record:
        """Make a result, unless it is there already; returns its record.

        inputs: flags of files, and earlier results. build() computes it. facts: what else the
        record holds. again: also if it is there. Raises InputError if one of another recipe is.
        """
        for key in inputs:
            if self.is_result(key):
                self.check(key)
        if not result.endswith("selection"):
            dtype = self.dtypes["score" if result.endswith("scores") else "train"]
            settings = {**settings, "dtype": dtype}
        with self.holding(result) as states:
            recipe = self.recipe(result, inputs, settings)
            record = {
                **recipe,
                "code": code_digests(self.script or MAKERS.get(result, "select.py")),
                **(facts or {}),
            }
            there = agreed(self.look(result, record, recipe, again) if rank() == 0 else None)
            self.states = states / records.text_hash([recipe, record["code"]])[:16]
            if there is None:
                self.cost = Cost(self.device)
                if again:
                    self.cost.add_line_of(result, self.folder)
                built = build()
                if self.recipe(result, inputs, settings) != recipe:
                    raise InputError(f"{result}: an input was changed meanwhile: run it again")
                meet()  # all have read their states: the first may write and remove
                if rank() == 0:
                    self.publish(result, built, record)
            if rank() == 0:
                models = self.folder.glob("methods/*/model")
                first = not any(model != self.path(result) for model in models)
                write_run(self.args, inputs, record, first, anew=self.args.anew and not there)
                if there:
                    remove(self.states)  # of a process that died after it had published
                else:
                    remove(states)  # also those of other recipes, in whose place this is
        self.args.anew &= there is not None
        meet()  # nobody looks for the result before it is there
        return there or record

    def look(self, result: str, wanted: Record, recipe: Record, again: bool) -> Record | None:
        """The record of what is there; None if it has to be made.

        Raises InputError if there is another result, which must not be replaced.
        """
        self.check_identity(result)
        path = self.path(result)
        if not path.exists():
            return None
        try:
            record = read_record(path)
            different = records.differences(record, recipe)
        except InputError as error:
            record = {}
            different = [f"damaged: {error}"]
        edited = records.changed(record.get("code", {}), wanted["code"])
        if self.args.overwrite and (different or edited):
            return None
        self.refuse(path, different)
        if again and edited:
            what = f"{path} was made by other code (different: {', '.join(edited)})"
            raise InputError(f"{what}: nothing can be added; --overwrite makes it again")
        records.warn_of_code(path, edited)
        if again:
            return None
        print(f"{result}: {path} exists with equal settings and inputs, skipped")
        return record

    def refuse(self, path: Path, different: list[str]) -> None:
        """Raise InputError if what is there has something that is different."""
        if different:
            what = f"{path} exists with other settings or inputs"
            advice = "give --overwrite to replace it, or another --run or --name"
            raise InputError(f"{what} (different: {', '.join(different)}): {advice}")

    def expect(self, result: str, settings: dict[str, Any]) -> None:
        """Refuse at once what make would refuse in the end: other settings of what is there."""
        record = records.read_whole(self.path(result))
        if record and not self.args.overwrite:
            self.refuse(self.path(result), records.changed(record["settings"], settings))

    @contextmanager
    def holding(self, result: str) -> Iterator[Path]:
        """Let one command at a time look for a result and make it; gives the folder of states."""
        states = self.folder / ".state" / result.replace("/", "-")
        lock = states.with_name(f"{states.name}.lock")
        with records.held(lock) if rank() == 0 else nullcontext():
            yield states

    def check_identity(self, making: str = "") -> None:
        """Raise InputError if the run was begun with another base or prompt form.

        Its first record tells. train.py --overwrite may begin it anew.
        """
        if self.args.overwrite and making in REFERENCES:
            return
        identity = self.identity()
        methods = sorted(self.folder.glob("methods/*/selection.safetensors"))
        for path in [self.path(result) for result in (*REFERENCES, "scores")] + methods:
            record = records.read_whole(path)
            if record:
                there = {name: record.get(name) for name in identity}
                different = records.changed(there, identity)
                if different:
                    what = f"another base or prompt form ({', '.join(different)})"
                    advice = "give the flags that decide it as then, or another --run"
                    raise InputError(f"{self.folder} was begun with {what}: {advice}")
                return

    def publish(self, result: str, built: Adapter | Losses | Mask, record: Record) -> None:
        """Write a result, put it into its place, and say what it cost."""
        path = self.path(result)
        with whole(path) as new:
            if isinstance(built, Adapter):
                files.write_model(new, built, self.model, record)
            elif isinstance(built, Losses):
                files.write_losses(new, built, record)
            else:
                files.write_mask(new, built, record)
        cost = self.cost.read()
        add_line(self.folder / "log" / "costs.jsonl", {"stage": result, **cost})
        work = f"{cost['tokens']} tokens in {cost['seconds']:.1f} s"
        print(f"{result}: wrote {path}")
        print(f"    {work}, peak memory {cost['peak_memory_gib']:.2f} GiB")
        if not isinstance(built, Adapter):
            print(f"    {built.describe()}")

    # Training and scoring

    def train(
        self, name: str, tokens: Tokens, weights: Tensor, config: TrainConfig, **options: Any
    ) -> Adapter:
        """toss.training.train from the base, told, logged and saved under this name.

        options: its others, such as objective or optimizer.
        """
        settings = [f"{key} = {value}" for key, value in config.recipe().items()]
        print(f"{name}: {count_steps(tokens, config)} steps of {len(tokens.filled)} rows")
        print(f"    {', '.join(settings)}")
        progress = self.progress(name)
        model = self.base("train")
        adapter = train(model, tokens, weights, config, watch=progress, **options)
        self.add_cost(progress, tokens, config.epochs)
        if rank() == 0 and options.get("objective", token_loss) is token_loss:
            progress.describe(config.epochs)  # another objective need not lower the loss
        return adapter

    def score(self, name: str, adapter: Adapter | str | None, tokens: Tokens) -> Tensor:
        """toss.scoring.score of the base with an adapter, told and saved under this name.

        adapter: a value, or the name of an earlier result.
        """
        size = len(tokens.input_ids)
        print(f"{name}: {size} tokens of {len(tokens.filled)} rows, the longest rows first")
        if isinstance(adapter, str):
            adapter = self.adapter(adapter)
        progress = self.progress(name)
        model = use(self.base("score"), adapter)
        losses = score(model, tokens, self.args.batch_tokens, progress)
        self.add_cost(progress, tokens)
        return losses

    def progress(self, name: str) -> Progress:
        log = self.folder / "log" / f"{name}.jsonl"
        return Progress(name, log, self.states, self.args.save_every)

    def add_cost(self, progress: Progress, tokens: Tokens, passes: int = 1) -> None:
        """Add a finished part to the cost of the result that is being made."""
        self.cost.tokens += passes * len(tokens.input_ids)
        self.cost.rows = tokens.rows
        self.cost.earlier_seconds += progress.earlier_seconds

    # Results of earlier stages

    def check(self, result: str, only: Sequence[str] | None = None) -> Record:
        """The record of an earlier result, which must be there, whole, and fit the run as it is.

        only: the inputs that must not have changed since (default: all); there is a warning about
        the others. An adapter that was put there by hand has no record and passes: loading checks
        its shapes.
        """
        path = self.path(result)
        make = f"the select.py command that makes {Path(result).parts[-2:][0]}"
        if result in MAKERS:
            make = command(MAKERS[result], self.folder)
        if not path.exists():
            raise InputError(f"{path} does not exist: run {make} first")
        self.check_identity()
        try:
            record = read_record(path)
        except InputError as error:
            raise InputError(f"{error}: run {make} --overwrite") from None
        if not record and path.is_dir():
            print_once(f"note: {path} has no record of how it was made")
            return {}
        if record.get("stage") != result:
            what = f"{path} holds the result of another stage: {record.get('stage')}"
            raise InputError(f"{what}: run {make} --overwrite")
        identity = self.identity()
        misfits = [name for name in identity if record.get(name) != identity[name]]
        others = []
        for key in dict.fromkeys(self.changed_inputs(record, far=True)):
            if only is None or key in only:
                misfits.append(key)
            else:
                others.append(key)
        what = f"{path} was made from other inputs (changed since: "
        if misfits:
            raise InputError(f"{what}{', '.join(misfits)}): run {make} --overwrite")
        if others:
            print_once(f"warning: {what}{', '.join(others)}): run {make} --overwrite")
        records.warn_of_code(path, records.changed(record["code"], code_digests(*record["code"])))
        return record

    def changed_inputs(self, record: Record, far: bool = False) -> list[str]:
        """What a result was made from that is not what it was. What is gone has not changed.

        far: also what its inputs were made from, and so on.
        """
        names = []
        for key, recorded in record.get("inputs", {}).items():
            if not self.source(key).is_file():
                continue
            if self.input_hash(key) != recorded:
                names.append(key)
            elif far and self.is_result(key):
                names += self.changed_inputs(read_record(self.path(key)), far)
        return names

    def adapter(self, name: str) -> Adapter | None:
        """A trained adapter: of a reference, "methods/NAME/model" and the like; "base": None."""
        if name == "base":
            return None
        self.check(name, only=None if name in REFERENCES else ())
        return read_adapter(self.model or self.base("score"), self.path(name))

    def reference_config(self) -> TrainConfig:
        """How theta^h was trained, but for the dtype, so that TOSS-Pro can train it again."""
        settings = self.check("degraded").get("settings", self.args.settings.get("reference"))
        if settings is None:
            print("it is not known how theta^h was trained: it is trained as this command has it")
            settings = {}
        dtype = settings.get("dtype", self.dtypes["train"])
        if dtype != self.dtypes["train"]:
            again = self.dtypes["train"]
            print(f"note: theta^h was trained in {dtype}, and is trained again in {again}")
        return TrainConfig.of({**vars(self.args), **settings})

    def losses(self, result: str = "scores") -> tuple[Tokens, dict[str, Tensor]]:
        """The custom set's tokens as they were scored, and their losses under each model.

        What is scored again will be in the same dtype.
        """
        record = self.check(result)
        self.sha256[result] = self.input_hash(result)
        found = files.read_losses(self.path(result), self.args.custom)
        if not found.S().any():
            reason = "both references give each token the same loss, so every S is 0"
            advice = "train them on different rows, with train.py --overwrite"
            raise InputError(f"{self.path(result)}: {reason}: {advice}")
        self.dtypes["score"] = record["settings"]["dtype"]
        self.datasets[self.args.custom] = found.tokens
        return found.tokens, found.losses

    def mask(self, key: str, tokens: Tokens) -> Mask:
        """A mask over these tokens: of this run, or ("--mask") from elsewhere."""
        return files.read_mask(self.source(key), tokens)

    def merge(self, result: str) -> None:
        """Write an adapter's merged checkpoint, in the dtype of the stored base; in process 0.

        It is made if it is not there, not whole, or of another adapter.
        """
        if rank() > 0:
            return
        folder = self.path(result)
        merged = folder / "merged"
        recipe = {"adapter": self.input_hash(result), "base_sha256": base_hash(self.checkpoint)}
        with self.holding(result):
            if records.differences(records.read_whole(merged), recipe):
                with whole(merged) as new:
                    model = self.base(stored_dtype(self.checkpoint))
                    merge(model, read_adapter(model, folder))
                    self.model = None  # it is another model now
                    save_checkpoint(model, new, self.checkpoint)
                    records.write_record(new, recipe)
        print(f"merged checkpoint: {merged}")


def open_run(folder: str | Path, **settings: Any) -> Run:
    """A run that exists, as its run.json has it. settings: device flags and the like."""
    if not (Path(folder) / "run.json").exists():
        raise InputError(f"{folder} has no run.json: it is not a run directory")
    args = parse(script_parser("audit", ""), [f"--run={folder}"])
    for name, value in settings.items():
        if value is not None:
            setattr(args, name, value)
    return Run(args)
