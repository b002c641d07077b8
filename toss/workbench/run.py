"""A run directory: how its results are made, and how later stages find them.

A result carries its own record, by which it is skipped, refused or made; see results.py. The rest,
run.json included, is a courtesy.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoint import save_checkpoint, stored_dtype
from model.io import InputError, whole_file, whole_folder
from model.lora import Adapter, merge, use
from model.peft import WEIGHTS, read_adapter
from toss.config import TrainConfig
from toss.parallel import ignore, meet, rank
from toss.scoring import score
from toss.selection import competing_tokens
from toss.tokens import Tokens
from toss.training import count_steps, train
from toss.workbench import code, files, results
from toss.workbench.files import Round, Selection
from toss.workbench.flags import command, parse, script_parser
from toss.workbench.folder import Folder
from toss.workbench.progress import Cost, Progress, describe_cost
from toss.workbench.results import held, read_record
from toss.workbench.runfile import REFERENCES
from toss.workbench.states import SavedState


class Run(Folder):
    """A run directory whose results are made."""

    def __init__(self, args: Namespace):
        super().__init__(args)
        # Of the stage at work.
        self.state_folder = self.folder
        self.cost: Cost | None = None
        self.remarks: list[str] = []  # printed when it is done

    # Making a result

    def make(
        self,
        stage: str,
        build: Callable[[], Any],
        inputs: Sequence[str],
        settings: dict[str, Any],
        code_parts: Sequence[str] = (),
    ) -> None:
        """Make a result, unless it exists already. Raises InputError if a different one does.

        inputs: flags of files, and earlier results. build() returns what is to be written: of a
        reference an Adapter; of the scores the tokens and their losses; of a method a Selection and
        an Adapter, or None. code_parts: the files that compute it, beside those of
        model/ and toss/ (default: the script).
        """
        for key in inputs:
            if key.startswith("methods/"):
                self.check_model(key)
            elif not key.startswith("--"):
                self.check(key)
        recipe, digests, verdict = self.look(stage, inputs, settings, code_parts)
        for note in self.args.notes:
            self.print_once(note)
        path = self.path(stage)
        states = self.folder / ".state" / stage.replace("/", "-")
        self.state_folder = states / results.text_hash([recipe, digests])[:16]
        for line in verdict.lines:
            print(line)
        if not verdict.make:
            self.follow(recipe)
            # A process may have died after it published the result, before it cleaned up.
            left_over = rank() == 0 and states.parent.exists()
            if left_over:
                with suppress(InputError), self.holding(states):
                    results.clean_up(path, self.state_folder)
            return

        with self.holding(states):
            _, _, verdict = self.look(stage, inputs, settings, code_parts)
            if not verdict.make:
                raise InputError(f"{path} was made by another process meanwhile: run it again")
            self.cost = Cost(self.device)
            self.remarks = []
            result = build()
            self.hashes.check_inputs()
            meet()  # all have looked, and have read their states: the first may write and remove
            if rank() == 0:
                self.publish(stage, result, {**recipe, "code": digests})
                results.clean_up(path, *states.iterdir())  # those of other recipes too
        meet()  # nobody looks for the result before it is there

    def look(
        self,
        stage: str,
        inputs: Sequence[str],
        settings: dict[str, Any],
        code_parts: Sequence[str] = (),
    ) -> tuple[dict[str, Any], dict[str, str], results.Verdict]:
        """The recipe and the code of what is asked for, and whether it has to be made.

        Raises InputError if another result is there; see make.
        """
        self.check_identity()
        dtype = self.dtypes["score" if stage == "scores" else "train"]
        if "pro" in settings or "mask_only" not in settings:  # no other mask depends on it
            settings = {**settings, "dtype": dtype}
        recipe = self.recipe(stage, inputs, settings)
        digests = code.digests(code_parts or [code.script_of(stage)])
        path = self.path(stage)
        verdict = results.judge(path, recipe, digests, self.args.overwrite, self.hashes)
        return recipe, digests, verdict

    def holding(self, folder: Path) -> AbstractContextManager:
        """Hold a folder in process 0."""
        if rank() > 0:
            return nullcontext()
        return held(folder, self.folder)

    def train(
        self,
        name: str,
        tokens: Tokens,
        weights: Tensor,
        config: TrainConfig,
        on_step: Callable[[dict[str, Any]], None] = ignore,
        **options: Any,
    ) -> Adapter:
        """toss.training.train from the base, told, logged and saved under this name.

        options: its others, such as objective or optimizer.
        """
        rows = len(tokens.filled)
        steps = count_steps(tokens, config)
        print(f"{name}: optimizer steps: {steps} (rows: {rows}, epochs: {config.epochs})")
        state = self.state(name, "train")
        progress = self.progress(name)

        def report(event: dict[str, Any]) -> None:
            progress.report(event)
            on_step(event)

        adapter = train(
            self.base("train"),
            tokens,
            weights,
            config,
            state=state,
            on_step=report,
            **options,
        )
        self.add_cost(state, tokens, config.epochs)
        if "objective" not in options and rank() == 0:  # another one need not lower the loss
            self.remarks += progress.log.describe(name, config.epochs)
        return adapter

    def score(self, name: str, adapter: Adapter | str | None, tokens: Tokens) -> Tensor:
        """toss.scoring.score of the base with an adapter, told and saved under this name.

        adapter: a value, or the name of an earlier result.
        """
        rows = len(tokens.filled)
        size = len(tokens.input_ids)
        print(f"{name}: rows: {rows}, tokens: {size}, the longest rows first")
        if isinstance(adapter, str):
            adapter = self.adapter(adapter)
        state = self.state(name, "score")
        model = use(self.base("score"), adapter)
        losses = score(model, tokens, self.args.batch_tokens, state, self.progress(name).report)
        self.add_cost(state, tokens)
        return losses

    def progress(self, name: str) -> Progress:
        return Progress(name, self.folder / "log" / f"{name}.jsonl")

    def state(self, name: str, purpose: str) -> SavedState:
        """Where a part of the stage at work is saved."""
        name = f"{name}-{self.dtypes[purpose]}"
        return SavedState(self.state_folder, name, self.args.save_every, self.begin)

    def add_cost(self, state: SavedState, tokens: Tokens, passes: int = 1) -> None:
        """Add a finished part to the cost of the stage at work; note facts about its rows."""
        self.cost.tokens += passes * len(tokens.input_ids)
        self.cost.earlier_seconds += state.earlier_seconds
        self.cost.facts = {name: getattr(tokens, name) for name in ("rows", "skipped", "cut")}

    # Writing a result

    def publish(self, stage: str, result: Any, record: dict[str, Any]) -> None:
        """Write a result, put it into its place, and say so."""
        path = self.path(stage)
        lines = []
        if stage in REFERENCES:
            with whole_folder(path) as folder:
                files.write_reference(folder, result, self.model, record)
        elif stage == "scores":
            lines = self.write_scores(path, *result, record)
        else:
            lines = self.write_method(path, *result, record)
        cost = self.cost.read()
        self.write_runfile(record, cost, self.args.begun_anew)
        self.args.begun_anew = False  # what else is made belongs to the new run
        print(f"{stage}: wrote {path}")
        print(f"    {describe_cost(cost)}")
        for line in lines + self.remarks:
            print(f"{stage}: {line}")

    def write_scores(
        self, path: Path, tokens: Tokens, losses: dict[str, Tensor], record: dict[str, Any]
    ) -> list[str]:
        """Write the scores; returns the closing lines."""
        dtype = self.dtypes["score"]
        with whole_file(path) as file:
            files.write_scores(file, tokens, losses, {**record, "dtype": dtype})
        lines = files.describe_scores(tokens, losses)
        if dtype != "float32":
            noise = command("-m toss.audit.noise", self.folder)
            lines.append(f"scored in {dtype}; for the rounding noise of S: {noise}")
        return lines

    def write_method(
        self, path: Path, selection: Selection, adapter: Adapter | None, record: dict[str, Any]
    ) -> list[str]:
        """Write a method, with the rounds of TOSS-Pro; returns the closing lines."""
        tokens = selection.tokens
        keep = selection.keep
        keep_eos = record["settings"].get("keep_eos")
        ranked = len(competing_tokens(tokens, self.tokenizer.eos_id if keep_eos else None))
        if self.args.mask:
            ranked = read_record(Path(self.args.mask)).get("ranked", ranked)
        discarded = int((tokens.response & ~keep).sum())
        facts = {"discarded": discarded, "ranked": ranked}
        facts["tokens_sha256"] = files.fingerprint(tokens)
        with whole_folder(path) as folder:
            for t, pro_round in enumerate(selection.rounds, start=1):
                self.write_round(folder / f"round-{t}", t, pro_round, tokens, record["code"])
            files.write_method(folder, selection, adapter, self.model, {**record, **facts})

        lines = []
        for t, pro_round in enumerate(selection.rounds, start=1):
            lines.append(f"TOSS-Pro round {t}: {len(pro_round.added)} rows added to D^h")
        lost = f"{files.lost_rows(tokens, keep)} rows lost all their tokens"
        return [*lines, f"{discarded} of {ranked} ranked response tokens discarded, {lost}"]

    def write_round(
        self, folder: Path, t: int, pro_round: Round, tokens: Tokens, digests: dict[str, str]
    ) -> None:
        """Write a round of TOSS-Pro, with records of its own."""
        rows = [row for row, _ in pro_round.added]
        record = self.recipe(f"round-{t}", ["--custom", "--harmful"], {"added_rows": rows})
        record |= {"code": digests, "dtype": self.dtypes["score"]}
        files.write_added(folder / "added.jsonl", pro_round, tokens, self.tokenizer)
        files.write_reference(folder / "degraded", pro_round.degraded, self.model, record)
        files.write_scores(folder / "scores.safetensors", tokens, pro_round.losses, record)

    def merge(self, stage: str) -> None:
        """Write a method's merged checkpoint, in the dtype of the stored base; in process 0."""
        if rank() > 0:
            return
        folder = self.path(stage) / "model"
        dtype = stored_dtype(self.checkpoint)
        with self.holding(self.folder / ".state" / stage.replace("/", "-")):
            weights = folder / WEIGHTS
            recipe = {"stage": "merged", "settings": {"dtype": dtype}, **self.identity}
            recipe["inputs"] = {"adapter": self.hashes.of(weights, tensors=True)}
            merged = folder / "merged"
            if results.judge(merged, recipe, {}, overwrite=True, hashes=self.hashes).make:
                with whole_folder(merged) as new:
                    model = self.base(dtype)
                    merge(model, read_adapter(model, folder))
                    self.model = None  # it is another model now
                    save_checkpoint(model, new, self.checkpoint)
                    results.write_record(new, recipe)
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
