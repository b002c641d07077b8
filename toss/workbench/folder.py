"""A run directory as later stages find it: places, recipes, and the results of earlier stages."""

import re
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.io import InputError, existing_file, made_from
from model.lora import Adapter
from model.peft import CONFIG, WEIGHTS, read_adapter
from toss.config import TrainConfig
from toss.methods import METHODS
from toss.parallel import rank
from toss.tokens import Tokens
from toss.workbench import code, results
from toss.workbench.base import Base
from toss.workbench.files import fingerprint, load_selection, read_scores
from toss.workbench.flags import TRAINING_FLAGS, as_typed, command
from toss.workbench.results import Hashes, differences, has_record, read_record
from toss.workbench.runfile import FORM, INPUTS, REFERENCES, RunFile, as_listed

MAKERS = {"degraded": "train.py", "utility": "train.py", "scores": "score.py"}  # else select.py


class Folder(Base):
    """A run directory under the settings `args` (see flags.parse)."""

    def __init__(self, args: Namespace):
        self.folder = Path(args.run)
        self.runfile: RunFile = args.runfile
        super().__init__(args, Hashes(self.runfile.section("hashes")))
        self.printed: set[str] = set()

    def print_once(self, text: str) -> None:
        """Print a text, but not again."""
        if text not in self.printed:
            self.printed.add(text)
            print(text)

    # Places and recipes

    def path(self, stage: str) -> Path:
        """The folder or file of a result: "degraded", "utility", "scores" or "methods/NAME"."""
        if re.search(r"(^|/)([./]|$)", stage.removeprefix("methods/")):
            raise InputError(f"{stage} is not the name of a result")
        return self.folder / ("scores.safetensors" if stage == "scores" else stage)

    def source(self, key: str) -> Path:
        """The file behind an input: a flag ("--custom"), or what an earlier result is read from."""
        if key.startswith("--"):
            return Path(getattr(self.args, key.removeprefix("--"), None) or "")
        path = self.path(key)
        if key == "scores":
            return path
        if "/" in key:
            path = path / "model"
        return path / WEIGHTS

    def input_hash(self, key: str) -> str:
        """The hash of an input: of earlier results and masks, their tensors alone."""
        file = self.source(key)
        is_flag = key.startswith("--")
        if is_flag and file == Path():
            raise InputError(f"{key} must be given: {self.folder} knows none")
        if is_flag and not file.exists():
            raise InputError(f"{file}: file not found; give its new path with {key}")
        value = self.hashes.of_input(file, tensors=not is_flag or key == "--mask")
        # Made elsewhere: its rank and scale are in the configuration alone.
        config = file.with_name(CONFIG)
        if file.name == WEIGHTS and config.exists() and not has_record(self.path(key)):
            value = results.text_hash([value, self.hashes.of_input(config)])
        return value

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the base, and how text becomes ids: part of every recipe.

        By hashes, so that a base may move.
        """
        tokenizer = self.tokenizer  # settles template and date
        return {
            "base_sha256": self.hashes.of_base(self.checkpoint),
            "tokenizer_sha256": tokenizer.fingerprint(),
            "template": self.args.template,
            "max_length": self.args.max_length,
            "date": self.args.date,
            "skip_empty": bool(self.args.skip_empty),
        }

    def recipe(self, stage: str, inputs: Sequence[str], settings: dict) -> dict[str, Any]:
        """Everything that decides a result. Raises InputError if an input has changed meanwhile."""
        hashes = {key: self.input_hash(key) for key in inputs}
        return {"stage": stage, "settings": settings, "inputs": hashes, **self.identity}

    def check_identity(self) -> None:
        """Raise InputError if the run was begun with another base or prompt form."""
        identity = self.identity
        recorded = self.begun_with(identity)
        differing = differences(recorded, identity) if recorded else []
        if differing:
            what = f"another base or prompt form ({'; '.join(differing)})"
            advice = "give the flags that decide it as then, or another --run"
            raise InputError(f"{self.folder} was begun with {what}: {advice}")

    def begun_with(self, identity: dict[str, Any]) -> dict[str, Any]:
        """The identity in the first record that is there; {} if there is none."""
        if self.args.begun_anew:
            return {}
        for stage in self.stages():
            with suppress(InputError):  # a damaged one is made again
                record = read_record(self.path(stage))
                if record:
                    return {key: record.get(key) for key in identity}
        return {}

    # Results of earlier stages

    def stages(self) -> list[str]:
        """The names of the results that are there, in the order of the scripts."""
        methods = [f"methods/{path.name}" for path in sorted(self.folder.glob("methods/[!.]*"))]
        return [stage for stage in (*REFERENCES, "scores", *methods) if self.exists(stage)]

    def exists(self, stage: str) -> bool:
        """True if a result is there: with its record, or an adapter that was put there by hand."""
        return has_record(self.path(stage)) or self.source(stage).exists()

    def check(self, stage: str, only: Sequence[str] | None = None) -> dict[str, Any]:
        """The record of an earlier result, which must be there, whole, and fit the run as it is.

        only: the inputs that must not have changed since (default: all). An adapter that was put
        there by hand has no record and passes: loading checks its shapes.
        """
        self.check_identity()
        path = self.path(stage)
        # Is it there?
        if not self.exists(stage):
            source = self.source(stage) if path.exists() else path
            others = sorted(folder.name for folder in self.folder.glob("methods/[!.]*"))
            existing = f" (there are {', '.join(others)})" if "/" in stage and others else ""
            raise InputError(f"{source} does not exist{existing}: {self.advice(stage, 'first')}")
        # Is it as it was written?
        record, problem = results.inspect(path, self.hashes)
        if problem:
            advice = self.advice(stage, "again")
            raise InputError(f"{path} is damaged or incomplete ({problem}): {advice}")
        # An adapter from elsewhere has no record, and passes. Scores must have one.
        if not record and stage != "scores":
            self.check_role(stage)
            self.print_once(f"note: {path} has no record of how it was made")
            return {}
        if not record:
            advice = self.advice(stage, "--overwrite")
            raise InputError(f"{path} has no record of how it was made: {advice}")
        if record.get("stage") != stage:
            raise InputError(f"{path} holds the result of another stage: {record.get('stage')}")
        # Was it made from what the run holds now?
        changed = [key for key in self.changed_inputs(record) if only is None or key in only]
        identity = self.identity
        changed += [key for key in identity if record.get(key) != identity[key]]
        if changed:
            what = f"{path} does not fit this run (changed: {', '.join(changed)})"
            advice = self.advice(stage, "--overwrite")
            raise InputError(f"{what}: {advice}, or choose another --run")
        # Code that was edited since is no error: the user decides whether it matters.
        digests = {part: code.digest(part) for part in record.get("code", {})}
        others = ", ".join(results.other_code(record, digests))
        if others:
            remark = f"{path} was made by other code (different: {others})"
            self.print_once(f"warning: {remark}: {self.advice(stage, '--overwrite')}")
        return record

    def check_model(self, stage: str, only: Sequence[str] | None = None) -> None:
        """As check, of a method, which must have a model, and not a mask alone."""
        self.check(stage, only)
        if not self.has_model(stage):
            advice = "run the command that made it again, without --mask-only and with --overwrite"
            raise InputError(f"{self.path(stage)} holds a mask, and no model: {advice}")

    def has_model(self, stage: str) -> bool:
        """True if the adapter of a reference or a method is there, and not a mask alone."""
        return self.source(stage).exists()

    def check_role(self, stage: str) -> None:
        """Refuse an adapter without a record that our own code trained in another role."""
        trained_as = made_from(self.source(stage)).get("stage", stage)
        if role_of(trained_as) != role_of(stage):
            raise InputError(f"{self.path(stage)} holds the result of another stage: {trained_as}")

    def stale(self, stage: str) -> list[str]:
        """The inputs of a result that have changed since it was made."""
        return self.changed_inputs(read_record(self.path(stage)))

    def warn_if_stale(self, stage: str) -> None:
        """Say if a result, which is used as it is, was made from other inputs than the run has."""
        changed = ", ".join(self.stale(stage))
        if changed:
            what = f"{self.path(stage)} was made from other inputs (changed since: {changed})"
            print(f"warning: {what}: {self.advice(stage, '--overwrite')}")

    def changed_inputs(self, record: dict[str, Any]) -> list[str]:
        """The inputs in a record that are not what they were. One that is gone has not changed."""
        changed = []
        for key, recorded in record.get("inputs", {}).items():
            if self.source(key).is_file() and self.input_hash(key) != recorded:
                changed.append(key)
        return changed

    def advice(self, stage: str, word: str) -> str:
        """What to run to make a result. word: "first", "again" or "--overwrite"."""
        program = MAKERS.get(stage, "select.py")
        flags = f", with the flags of {Path(stage).name}" if "/" in stage else ""
        return f"run {command(program, self.folder)} {word}{flags}"

    def adapter(self, name: str) -> Adapter | None:
        """A trained adapter: "degraded", "utility", or a method's, by its folder; "base": None."""
        if name == "base":
            return None
        stage = name if name in REFERENCES else f"methods/{name}"
        if name == stage:
            self.check(stage)
        else:
            self.check_model(stage, only=())
        model = self.model or self.base("score")
        return read_adapter(model, self.source(stage).parent)

    def reference_config(self) -> TrainConfig:
        """How theta^h was trained, so that TOSS-Pro can train it again."""
        record = self.check("degraded")
        if not record:
            print("theta^h has no record: it is trained again with this command's settings")
            return TrainConfig.of(self.args)
        dtype = self.dtypes["train"]
        first = record["settings"].get("dtype")
        if first != dtype:
            print(f"note: theta^h was trained in {first}, and is trained again in {dtype}")
        settings = {name: record["settings"][name] for name in TRAINING_FLAGS}
        settings = as_typed(self.path("degraded") / results.RECORD, settings)
        return TrainConfig.of({**settings, "batch_tokens": self.args.batch_tokens})

    def scored(self, needed: bool = True) -> tuple[Tokens, dict[str, Tensor]]:
        """The custom set's tokens, and their losses under each model, from scores.safetensors.

        Where there are no scores and none are needed, the custom file is tokenised: the same ids.
        """
        path = self.path("scores")
        if not needed and not path.exists():
            return self.tokens(self.args.custom), {}
        record = self.check("scores", only=None if needed else ("--custom",))
        tokens, losses = read_scores(path, self.args.custom)
        if needed and torch.equal(losses["utility"], losses["degraded"]):
            reason = "both references give each token the same loss, so every S is 0"
            advice = "train them on different rows, with train.py --overwrite"
            raise InputError(f"{path}: {reason}: {advice}")
        if self.args.custom not in self.datasets:  # at first; an overflow may change it later
            self.dtypes["score"] = record["dtype"]  # what is compared is scored alike
        self.datasets[self.args.custom] = tokens
        return tokens, losses

    def mask(self, path: str | Path, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The mask in a selection.safetensors, bool [N], and what it went by, float32 [N], if any.

        It must be over the same token ids. A mask is a list of places, so nothing else of the run
        that made it has to agree with this one.
        """
        path = existing_file(path)
        record = read_record(path)
        if "tokens_sha256" not in record:
            advice = "toss.workbench.files.write_selection writes one that does"
            raise InputError(f"{path} is no mask that says over which token ids it is: {advice}")
        if record["tokens_sha256"] != fingerprint(tokens):
            custom = self.input_hash("--custom")
            here = {**self.identity, "--custom": custom}
            del here["base_sha256"]
            there = {**record, **record.get("inputs", {})}
            differing = [key for key in here if key in there and there[key] != here[key]]
            reason = ", ".join(differing) or "the rows, or their length"
            raise InputError(f"{path} is a mask over other token ids (different: {reason})")
        return load_selection(path, tokens)

    # run.json

    def write_runfile(
        self,
        recipe: dict[str, Any] | None = None,
        cost: dict | None = None,
        begun_anew: bool = False,
    ) -> None:
        """Write run.json: what later commands inherit, and what is reported of a stage.

        begun_anew: of the old run only the references' stages stay.
        """
        content = {
            "demo": self.args.demo,
            "settings": self.inherited(recipe, {} if begun_anew else self.settings),
            "inputs": self.hashes.inputs,
            "hashes": self.hashes.known,
        }
        if recipe:
            entry = {"recipe": as_listed(recipe), **(cost or {})}
            content["stages"] = {recipe["stage"]: entry}
        self.runfile.update(content, begun_anew)

    @property
    def settings(self) -> dict[str, Any]:
        """What run.json says that the run was begun with."""
        return self.runfile.section("settings")

    def inherited(self, recipe: dict[str, Any] | None, known: dict[str, Any]) -> dict[str, Any]:
        """What later commands inherit: the prompt form; a stage's inputs, and new or moved ones."""
        settings = {name: getattr(self.args, name) for name in ("revision", *FORM)}
        for name in INPUTS:
            value = getattr(self.args, name)
            used = name == "model" or not recipe or f"--{name}" in recipe["inputs"]
            lost = not Path(known.get(name, "")).is_file()  # not known yet, or moved
            if value is not None and (used or lost):
                settings[name] = value
        return settings

    def begin(self) -> None:
        """Called before each save: stop if an input has changed; write run.json if there is none.

        So the same command can go on from an unfinished first stage.
        """
        self.hashes.check_inputs()
        if rank() == 0 and not self.runfile.file.exists():
            self.write_runfile()

    def follow(self, recipe: dict[str, Any]) -> None:
        """Let run.json follow a skipped stage that it does not know, or whose input was moved."""
        if rank() > 0:
            return
        entry = self.runfile.section("stages", recipe["stage"])
        cost = {name: value for name, value in entry.items() if name != "recipe"}
        moved = not self.inherited(recipe, self.settings).items() <= self.settings.items()
        if entry.get("recipe") != as_listed(recipe):
            self.write_runfile(recipe)  # a process died before it wrote the cost
        elif moved:
            self.write_runfile(recipe, cost)


def is_rival(settings: dict[str, Any]) -> bool:
    """True if these are settings of a rival, which is more than its mask; see toss.audit.rivals."""
    return settings.get("method", "mask") not in ("mask", *METHODS)


def role_of(stage: str) -> str:
    """What an adapter of a stage is; theta^h of a round of TOSS-Pro is a degraded model, too."""
    if stage == "degraded" or stage.startswith("round-"):
        return "degraded"
    return "utility" if stage == "utility" else "method"
