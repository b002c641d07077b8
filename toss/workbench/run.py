"""A run directory: how its results are made, and how later stages find them.

A result carries its own record, by which it is skipped, refused or made; see results.py. The rest,
run.json included, is a courtesy.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoint import save_checkpoint
from model.io import InputError, NotFinite, read_json, whole_file, whole_folder
from model.lora import Adapter, merge, use
from model.peft import WEIGHTS, read_adapter
from toss.config import TrainConfig
from toss.parallel import meet, rank
from toss.scoring import score
from toss.selection import competing_tokens
from toss.tokens import Tokens
from toss.training import train
from toss.workbench import code, files, results
from toss.workbench.files import Round
from toss.workbench.flags import Parser, add_run_flags, parse
from toss.workbench.folder import Folder
from toss.workbench.progress import Progress, describe_cost, total_cost
from toss.workbench.results import held, read_record
from toss.workbench.runfile import FORM, INPUTS, as_listed, used_inputs
from toss.workbench.states import SavedState


class Run(Folder):
    """A run directory whose results are made."""

    def __init__(self, args: Namespace):
        super().__init__(args)
        # Of the stage at work: where its states are, and its parts, by name.
        self.state_folder = self.folder
        self.parts: dict[str, Progress] = {}

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

        inputs: flags of files, the rows first, and earlier results. build() returns what is to be
        written: an Adapter; tokens and their losses; or tokens, a selection {"keep": bool [N],
        "score": float [N] or None}, an Adapter and the rounds of TOSS-Pro. code_parts: what
        computes it (default: the script's; see code.py).
        """
        self.check_identity()
        for key in inputs:
            if not key.startswith("--"):
                self.check(key)
        dtype = self.dtypes["score" if stage == "scores" else "train"]
        settings = {**settings, "dtype": dtype}
        recipe = self.recipe(stage, inputs, settings)
        digests = code.digests([*code_parts] or code.parts_of(stage, settings))
        path = self.path(stage)
        asked = (path, recipe, digests, self.args.overwrite, self.hashes)
        states = self.folder / ".state" / stage.replace("/", "-")
        self.state_folder = states / results.text_hash([recipe, digests])[:16]

        verdict = results.judge(*asked)
        for line in verdict.lines:
            print(line)
        if not verdict.make:
            self.follow(recipe)
            if (
                rank() == 0 and states.parent.exists()
            ):  # a process may have died before it cleaned up
                with suppress(InputError), self.holding(states):
                    results.clean_up(path, self.state_folder)
            return
        with self.holding(states):
            if not results.judge(*asked).make:
                raise InputError(f"{path} was made by another process meanwhile: run it again")
            result = self.build(build)
            self.recipe(stage, inputs, settings)  # raises if an input was changed meanwhile
            if rank() == 0:
                self.publish(stage, result, {**recipe, "code": digests})
                results.clean_up(path, states)
        meet()  # nobody looks for the result before it is there

    @contextmanager
    def holding(self, folder: Path) -> Iterator[None]:
        """Hold a folder in process 0."""
        if rank() > 0:
            yield
            return
        with held(folder, self.folder):
            yield

    def build(self, build: Callable[[], Any]) -> Any:
        """What build() returns. If scoring in float16 overflows, it is made in TF32 instead."""
        self.parts = {}
        try:
            return build()
        except NotFinite as error:
            if self.purpose != "score" or self.dtypes["score"] != "float16":
                raise
            print(f"warning: {error}; scoring again in tf32")
        self.dtypes["score"] = "tf32"
        return self.build(build)

    def train(
        self, name: str, tokens: Tokens, weights: Tensor, config: TrainConfig, **options: Any
    ) -> Adapter:
        """toss.training.train from the base, told, logged and saved under this name."""
        part = self.part(name, tokens, config)
        base = self.base("train")
        state = self.state(part)
        return train(base, tokens, weights, config, state=state, on_step=part.report, **options)

    def score(self, name: str, adapter: Adapter | str | None, tokens: Tokens) -> Tensor:
        """toss.scoring.score of the base with an adapter, told and saved under this name.

        adapter: a value, or the name of an earlier result.
        """
        part = self.part(name, tokens)
        if isinstance(adapter, str):
            adapter = self.adapter(adapter)
        model = use(self.base("score"), adapter)
        return score(model, tokens, self.args.batch_tokens, self.state(part), part.report)

    def part(self, name: str, tokens: Tokens, config: TrainConfig | None = None) -> Progress:
        """A part of the stage at work; prints what will be done."""
        log = self.folder / "log" / f"{name}.jsonl"
        self.parts[name] = Progress(name, self.device, tokens, config, log)
        return self.parts[name]

    def state(self, part: Progress) -> SavedState:
        """Where a part of the stage at work is saved."""
        name = (
            f"{part.name}-{self.loaded}"  # after an overflow, scoring begins anew in another dtype
        )
        part.state = SavedState(self.state_folder, name, self.args.save_every, self.begin)
        return part.state

    # Writing a result

    def publish(self, stage: str, result: Any, record: dict[str, Any]) -> None:
        """Write a result, put it into its place, and say so."""
        path = self.path(stage)
        lines = []
        if isinstance(result, Adapter):
            with whole_folder(path) as folder:
                files.write_reference(folder, result, self.model, record)
        elif stage == "scores":
            record["dtype"] = self.dtypes["score"]
            with whole_file(path) as file:
                files.write_scores(file, *result, record)
            lines = files.describe_scores(*result)
            if record["dtype"] != "float32":
                command = f"python -m toss.audit.noise --run {self.folder}"
                lines.append(f"scored in {record['dtype']}; for the rounding noise of S: {command}")
        else:
            with whole_folder(path) as folder:
                lines = self.write_method(folder, *result, record)
        cost = total_cost(self.parts)
        self.note(record, cost)
        print(f"{stage}: wrote {path}")
        print(f"    {describe_cost(cost)}")
        for line in lines:
            print(f"{stage}: {line}")

    def write_method(
        self,
        folder: Path,
        tokens: Tokens,
        selection: dict[str, Tensor | None],
        adapter: Adapter,
        rounds: list[Round],
        record: dict[str, Any],
    ) -> list[str]:
        """Write a method, with the rounds of TOSS-Pro; returns the closing lines."""
        lines = []
        for t, pro_round in enumerate(rounds, start=1):
            rows = [row for row, _ in pro_round.added]
            lines.append(f"TOSS-Pro round {t}: {len(rows)} rows added to D^h")
            of_round = self.recipe(f"round-{t}", ["--custom", "--harmful"], {"added_rows": rows})
            of_round |= {"code": record["code"], "dtype": self.dtypes["score"]}
            place = folder / f"round-{t}"
            files.write_added(place / "added.jsonl", pro_round, tokens, self.tokenizer)
            files.write_reference(place / "degraded", pro_round.degraded, self.model, of_round)
            files.write_scores(place / "scores.safetensors", tokens, pro_round.losses, of_round)

        keep_eos = record["settings"].get("keep_eos")
        ranked = len(competing_tokens(tokens, self.tokenizer.eos_id if keep_eos else None))
        if self.args.mask:
            ranked = read_record(Path(self.args.mask)).get("ranked", ranked)
        discarded = int((tokens.response & ~selection["keep"]).sum())
        record = {**record, "discarded": discarded, "ranked": ranked}
        record["tokens_sha256"] = files.fingerprint(tokens)
        files.write_method(folder, selection, adapter, self.model, record)
        lost = f"{files.lost_rows(tokens, selection['keep'])} rows lost all their tokens"
        return [*lines, f"{discarded} of {ranked} response tokens discarded, {lost}"]

    def merge(self, stage: str) -> None:
        """Write the merged checkpoint of a method, in process 0.

        In the dtype of the stored base, unless --dtype asks for another one.
        """
        if rank() > 0:
            return
        folder = self.path(stage) / "model"
        config = read_json(self.checkpoint / "config.json")
        dtype = self.args.dtype
        if dtype == "auto":
            dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        recipe = {"stage": "merged", "settings": {"dtype": dtype}, **self.identity}
        recipe["inputs"] = {"adapter": self.hashes.of(folder / WEIGHTS, tensors=True)}
        merged = folder / "merged"
        if not results.is_equal(merged, recipe, self.hashes):
            with whole_folder(merged) as new:
                model = self.base(dtype)
                merge(model, read_adapter(model, folder))
                self.model = None  # it is another model now
                save_checkpoint(model, new, self.checkpoint)
                results.write_record(new, recipe)
        print(f"merged checkpoint: {merged}")

    # run.json

    def note(self, recipe: dict[str, Any] | None = None, cost: dict | None = None) -> None:
        """Write run.json: what later commands inherit, and what is reported of a stage."""
        names = (*INPUTS, "revision", *FORM)
        settings = {name: getattr(self.args, name) for name in names}
        inputs = {**self.runfile.section("inputs"), **self.hashes.inputs}
        facts = {"demo": self.args.demo, "inputs": inputs, "hashes": self.hashes.known}
        self.runfile.update(settings, facts, recipe, cost or {}, self.args.begun_anew)

    def begin(self) -> None:
        """Before a state is saved: it is of the inputs that its folder names, and run.json exists.

        So an unfinished first stage can go on.
        """
        self.hashes.check_inputs()
        if rank() == 0 and not self.runfile.file.exists():
            self.note()

    def follow(self, recipe: dict[str, Any]) -> None:
        """Let run.json follow a skipped stage that it does not know, or whose input was moved."""
        if rank() > 0:
            return
        settings = self.runfile.section("settings")
        names = used_inputs(recipe)
        moved = [name for name in names if getattr(self.args, name) != settings.get(name)]
        known = dict(self.runfile.section("stages", recipe["stage"]))
        if known.pop("recipe", None) != as_listed(recipe):
            self.note(recipe)  # a process died before it wrote the cost
        elif moved:
            self.note(recipe, cost=known)


def open_run(folder: str | Path, **settings: Any) -> Run:
    """A run that exists, as its run.json has it. settings: device flags and the like."""
    if not (Path(folder) / "run.json").exists():
        raise InputError(f"{folder} has no run.json: it is not a run directory")
    parser = Parser("audit", "")
    add_run_flags(parser)
    args = parse(parser, ["--run", str(folder)])
    for name, value in settings.items():
        if value is not None:
            setattr(args, name, value)
    return Run(args)
