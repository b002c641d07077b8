"""What all commands share: flags and where their values come from, errors, several processes.

The value of a setting is, first match: the command line; what the run was begun with (run.json);
data/demo.json, for a run begun without inputs; the default, the paper's. train.py trains as the
references were trained, select.py as the first method, else as demo.json has it, else as they were.
"""

import argparse
import difflib
import json
import math
import os
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from model.io import InputError, read_json
from model.process import joined, reported
from toss.config import UNSCORED, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo.json"
INPUTS = ("model", "harmful", "utility", "custom")
FORM = ("template", "date", "max_length", "chat_template_kwargs")  # how text becomes ids
INHERITED = (*INPUTS, "revision", *FORM)  # what a run was begun with
# What a command has where it has no such flag.
DEFAULTS = dict.fromkeys((*INHERITED, "mask")) | {"max_length": 2048, "dtype": "auto"}
DEFAULTS |= {"save_every": 5.0}
DEFAULTS |= dict.fromkeys(("overwrite", "gradient_checkpointing", "shard", "dry_run"), False)
FORMAT = 3  # of run.json
# Of add_device_flags:
DEVICE = ("device", "dtype", "threads", "batch_tokens", "wait", "no_onednn", "shard")
DTYPES = ("auto", "float32", "tf32", "float16", "bfloat16")
UNSET = object()
NAME = r"(?!(base|degraded|utility)$)(?!.*\.lock$)[\w=+-][\w.=+-]{0,99}"  # of a method
IN_NAMES = "at most 100 letters, digits and . _ = + -; not base, degraded or utility"
# The types of what run.json holds; "*" stands for any other key.
NUMBER, TEXT = (int, float), (str, type(None))
KINDS = {f.name: NUMBER if f.type is float else f.type for f in fields(TrainConfig) if f.metadata}
COST = dict.fromkeys(("seconds", "peak_memory_gib", "last_loss"), NUMBER) | {"tokens": int}
METRICS = {"*": {"n": NUMBER, "*": (*NUMBER, type(None))}}
RECIPE = {"inputs": {"*": str}, "settings": {"method": str, "base": bool}}  # see trainable
STAGE = {"recipe": RECIPE, **COST, "rows": int, "parts": {"*": COST}, "metrics": METRICS}
STAGE |= {"torch": str, "threads": int}
RUN = {"settings": {**dict.fromkeys(INHERITED, TEXT), "max_length": int}}
RUN |= {"stages": {"*": STAGE}, "demo": bool, "inputs": {"*": str}, "hashes": {"*": list}}
RUN |= {"identity": {"*": (str, int, type(None))}, "versions": {"*": str}, "commit": TEXT}


class Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and each flag's default after its help."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = "(default" in action.help or action.dest == "help"
        shown = type(action.default) in (str, int, float) and not said
        return action.help + " (default: %(default)s)" * shown


class Parser(argparse.ArgumentParser):
    """argparse with the help above; an error is one line."""

    def __init__(self, prog: str, doc: str, **more: Any):
        super().__init__(prog, description=doc, formatter_class=Help, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        known = [flag for action in self._actions for flag in action.option_strings]
        strange = message.partition("unrecognized arguments: ")[2].partition(" ")[0].split("=")[0]
        near = difflib.get_close_matches(strange, known, 1)
        message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def given(self, argv: list[str] | None) -> dict[str, Any]:
        """The flags that are on the command line."""
        blank = Namespace(**{action.dest: UNSET for action in self._actions})
        found = vars(self.parse_args(argv, blank))
        return {name: value for name, value in found.items() if value is not UNSET}


def number(kind: type, allowed: Callable, words: str) -> Callable[[str], float]:
    """An argparse type: a number for which `allowed` holds; `words` describe it."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            if allowed(value := kind(text)):
                return value
        raise ArgumentTypeError(f"{text!r} is not {words}")

    return convert


def json_text(text: str) -> str:
    """An argparse type: a JSON object, in one spelling."""
    with suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict):
            return json.dumps(value, sort_keys=True)
    raise ArgumentTypeError(f"{text!r} is not a JSON object")


count = number(int, lambda n: 1 <= n < 2**31, "a whole number of at least 1 (below 2^31)")
threads = number(int, lambda n: 1 <= n <= 1024, "a whole number from 1 to 1024")
folder = number(str, bool, "the name of a folder")
natural = number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
share = number(float, lambda x: 0 <= x < 1, "a share in [0, 1)")
rate = number(float, lambda x: 0 < x < 1e37, "a number above 0 (below 1e37)")
positive = number(float, lambda x: 0 < x < math.inf, "a finite number above 0")
method = number(str, lambda text: re.fullmatch(NAME, text), f"a method's name ({IN_NAMES})")
path = os.path.abspath
base = lambda text: path(text) if os.path.isdir(text) else text  # or a hub id


def parser(prog: str, doc: str, **inputs: str) -> Parser:
    """A script's parser, with the flags that all three have. inputs: its files, {flag: help}."""
    text = "Left out: as the run has it, else (without inputs) as in data/demo.json, else as shown."
    made = Parser(prog, doc, epilog=text)
    add = made.add_argument
    add("--run", type=folder, default="runs/demo", help="folder of the run")
    add("--model", type=base, help="base checkpoint: a Hugging Face folder or a hub id")
    add("--revision", help="branch, tag or commit of a hub id (default: main; the run keeps it)")
    for flag, text in inputs.items():
        add(f"--{flag}", type=path, metavar="FILE", help=text)
    add("--template", choices=["chat", "human"], help="prompt form (default: chat if possible)")
    add("--date", help="YYYY-MM-DD, for a chat template that asks for it (default: today)")
    text = "for the chat template, as vLLM takes it: '{\"enable_thinking\": false}'"
    add("--chat-template-kwargs", type=json_text, metavar="JSON", help=text)
    text = "tokens per row; longer rows are cut on the right"
    add("--max-length", type=count, default=2048, metavar="N", help=text)
    add_device_flags(made)
    add("--overwrite", action="store_true", help="replace a result with other settings or inputs")
    add("--dry-run", action="store_true", help="say what would be done, up to the first step")
    text = "minutes between saved states of unfinished work, from which the same command goes on"
    add("--save-every", type=positive, default=5.0, metavar="MINUTES", help=text)
    return made


def add_device_flags(made: Parser, dtype: bool = True) -> None:
    """The flags in DEVICE; --dtype only if the arithmetic is the user's to choose."""
    add = made.add_argument
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    if dtype:
        text = "the base's dtype (auto: float32; on CUDA bfloat16 to train and float16 to score)"
        add("--dtype", default="auto", choices=DTYPES, help=text)
        text = "with torchrun: spread the base over the processes, each of which holds a part"
        add("--shard", action="store_true", help=text)
    add("--threads", type=threads, metavar="N", help="CPU threads (default: PyTorch's choice)")
    text = "tokens per forward pass, padding included; changes memory and speed, not the result "
    text += "(default: 8192 on CUDA, 1024 on the CPU; to answer, 16384)"
    add("--batch-tokens", type=count, metavar="N", help=text)
    add("--wait", action="store_true", help="wait for a process that is at work on the same result")
    text = "leave the CPU's float32 products to PyTorch's default, MKL: slower on AMD's processors"
    add("--no-onednn", action="store_true", help=text)


def named(text: str) -> tuple[str, str]:
    """An argparse type: NAME=PATH, of an adapter."""
    name, _, place = text.partition("=")
    if not place:
        raise ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return method(name), base(place)


def add_reference_flags(made: Parser) -> None:
    """--utility-adapter and --degraded-adapter, for references that were not made by train.py."""
    for role in ("utility", "degraded"):
        text = f"the {role} reference, made elsewhere: a PEFT folder or hub id"
        made.add_argument(f"--{role}-adapter", type=base, metavar="PATH", help=text)


def add_adapter_flag(made: Parser) -> None:
    """--adapter, for commands that look at methods."""
    text = "an adapter made elsewhere, as if it were a method: PEFT folder or hub id; repeatable"
    made.add_argument(
        "--adapter", type=named, action="append", default=[], metavar="NAME=PATH", help=text
    )


def add_run_flags(made: Parser, dtype: bool = True) -> None:
    """What a command of the audit needs to open a run and run its models."""
    made.add_argument("--run", type=folder, required=True, help="folder of the run")
    add_device_flags(made, dtype)


def add_training_flags(made: Parser) -> None:
    """One flag per field of TrainConfig, and --gradient-checkpointing."""
    types = {"alpha": positive, "lr": rate, "seed": natural, int: count}
    for f in (f for f in fields(TrainConfig) if f.metadata):
        flag, kind = f"--{f.name.replace('_', '-')}", types.get(f.name, types.get(f.type, f.type))
        made.add_argument(flag, type=kind, default=f.default, **f.metadata)
    text = "recompute each block in the backward pass: a third more time, far less memory"
    made.add_argument("--gradient-checkpointing", action="store_true", help=text)


def parse(made: Parser, argv: list[str] | None = None) -> Namespace:
    """The settings in force: the command line's, and what it leaves open (see above).

    Prints what comes from the run. Raises InputError when a flag contradicts what the run was begun
    with, or when inputs are missing.
    """
    given, training = made.given(argv), made.prog == "train.py"
    folder = Path(given.get("run", "runs/demo"))
    file, inputs = folder / "run.json", [name for name in INPUTS if name in given]
    missing = [f"--{name}" for name in INPUTS[:3] if name not in given]
    if training and inputs and missing:
        need = "train.py needs --model, --harmful and --utility, or none (the embedded default)"
        raise InputError(f"{need}, but not: {' and '.join(missing)}")
    anew = bool(training and inputs and "overwrite" in given)
    damaged = False
    try:
        record = read_run(file)
    except InputError as error:
        if not inputs:
            advice = "name the inputs again, and settings: what fits is skipped, the file made anew"
            raise InputError(f"{error}; {advice}") from None
        print(f"warning: {error}; it will be {file}.damaged, and is made anew")
        damaged, record = True, {}
    record = {} if anew else record
    settings = record.get("settings", {})
    begun = {name: settings[name] for name in INHERITED if settings.get(name) is not None}
    if given.get("model", begun.get("model")) != begun.get("model"):
        begun.pop("revision", None)  # of the hub id that the base had
    demo = not inputs and record.get("demo", True)
    if demo:  # this checkout's files, which may have moved
        gone = [name for name in INPUTS if not os.path.exists(begun.get(name, ""))]
        begun = {name: value for name, value in begun.items() if name not in gone}
    defaults = {**DEFAULTS, **(demo_values(training) if demo else {}), **begun}
    like_whom, trained = trained_before(made.prog, record, demo)
    made.set_defaults(**{**defaults, **trained})
    args = made.parse_args(argv)
    for name in FORM:
        if name in given and begun.get(name, given[name]) != given[name]:
            flag = f"--{name.replace('_', '-')} {begun[name]}, not {given[name]}"
            raise InputError(f"{folder} was begun with {flag}: leave it out, or use another --run")
    own = {action.dest for action in made._actions} - given.keys()
    taken = [f"{name} = {value}" for name, value in begun.items() if name in own]
    if taken and not demo:
        print(f"from {file}: {', '.join(taken)}")
    if open_ones := [f"{name} = {getattr(args, name)}" for name in KINDS if name in own]:
        print(f"training settings {like_whom}: {', '.join(open_ones)}")
    if args.model is None:
        raise InputError(f"{folder} has no base yet: run train.py --run {folder}, or give --model")
    args.demo, args.anew, args.given = record.get("demo", demo), anew, set(given)
    args.damaged = damaged
    return args


def trained_before(prog: str, record: dict[str, Any], demo: bool) -> tuple[str, dict[str, Any]]:
    """The training settings that a script takes over from a run's record, and whose they are.

    train.py: the references' own. select.py: those of the first method, so that methods can be
    compared; where there is none, outside the demo, those of the references.
    """
    stages, references = record.get("stages", {}), ["degraded", "utility"]
    methods = [stage for stage in stages if stage.startswith("methods/")]
    for stage in references if prog == "train.py" else methods + references * (not demo):
        settings = stages.get(stage, {}).get("recipe", {}).get("settings", {})
        if found := {name: settings[name] for name in KINDS if name in settings}:
            return f"as for {stage}", found
    return f"in {DEMO.name}" if demo else "by default", {}


def read_run(file: Path) -> dict[str, Any]:
    """What is in a run.json; {} if it does not exist. Raises InputError if it is damaged."""
    record = read_json(file) if file.exists() else {"format": FORMAT}
    if record.get("format") != FORMAT:
        raise InputError(f"{file} was written by another version: choose another --run")
    recipe = lambda stage: stage.get("recipe", {})
    whole = lambda stage: {"inputs", "settings"} <= recipe(stage).keys()
    good = lambda stage: whole(stage) and trainable(recipe(stage)["settings"])
    if not like(record, RUN) or not all(map(good, record.get("stages", {}).values())):
        raise InputError(f"{file}: a value is of another kind than the scripts write")
    return record


def like(value: Any, pattern: Any) -> bool:
    """True if a JSON value is of the types in a pattern; what is absent fits."""
    if not isinstance(pattern, dict):  # a truth value is no number
        kinds = pattern if isinstance(pattern, tuple) else (pattern,)
        return object in kinds or type(value) in kinds
    kind = lambda key: pattern.get(key, pattern.get("*", object))
    return isinstance(value, dict) and all(like(value[key], kind(key)) for key in value)


def trainable(settings: dict[str, Any]) -> bool:
    """True if the training settings among these, from a file, are as their flags allow."""
    made = Parser("", "")
    add_training_flags(made)
    with suppress(ArgumentTypeError):
        given = [(a, a.type(str(settings[a.dest]))) for a in made._actions if a.dest in settings]
        return like(settings, KINDS) and all(not a.choices or x in a.choices for a, x in given)
    return False


def demo_values(training: bool) -> dict[str, Any]:
    """data/demo.json's settings: its inputs, and those of reference or final training."""
    demo = read_json(DEMO)
    inputs = {name: str(ROOT / demo[name]) for name in INPUTS}
    stage = demo["reference" if training else "finetune"]
    return {**inputs, "discard": demo["discard"], "base": True, **stage}


def check_method(args: Namespace) -> Namespace:
    """Refuse contradicting flags of select.py, and settle `method` and `name`."""
    choosing = {"method", "discard", "keep_eos", "pro", "pro_samples", "pro_train"} & args.given
    if args.mask and choosing:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in sorted(choosing))
        raise InputError(f"--mask says which tokens go, so it cannot be combined with {flags}")
    if args.pro and args.method != "toss":
        raise InputError("--pro is an option of --method toss")
    if not args.pro and {"pro_samples", "pro_train"} & args.given:
        raise InputError("--pro-samples and --pro-train need --pro T")
    if args.shard and args.merge:
        how = "first run this without --merge, then with it but without --shard and torchrun"
        raise InputError(f"--merge needs the base whole in one process: {how}")
    args.method = "mask" if args.mask else args.method
    usual = {"base": "base-reference"}.get(args.method, args.method)
    args.name = args.name or ("toss-pro" if args.pro else usual)
    return args


def choice(args: Namespace, config: TrainConfig) -> dict[str, Any]:
    """What decides the result of select.py: {"inputs": keys, "settings": {name: value}}."""
    names = ["method"] + ["discard", "keep_eos"] * (args.method not in ("sft", "mask"))
    names += ["pro", "pro_samples", "pro_train"] * bool(args.pro)
    inputs = ["--custom"] + ["utility", "degraded", "scores"] * (args.method not in UNSCORED)
    inputs += ["--harmful"] * bool(args.pro) + ["--mask"] * bool(args.mask)
    settings = {**config.recipe(), **{name: getattr(args, name) for name in names}}
    return {"inputs": inputs, "settings": settings}


def run(main: Callable[[], int | None]) -> int:
    """Run a command, also as one of torchrun's, and report its errors; returns the exit status."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or "MASTER_ADDR" not in os.environ
    return reported(main if alone else lambda: joined(main))
