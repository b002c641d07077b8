"""The command line: flags, and where the values of omitted ones come from.

The value of a setting is, first match: the command line; one file, the run's run.json, or where
there is none and no input is typed, data/demo.json; the default, the paper's. run.json has the form
of demo.json: inputs and prompt form, and how the references and the methods are trained
("reference", "finetune"). Before a first method is trained, methods train as the references.
"""

import argparse
import json
import os
import re
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from model.io import InputError, read_json, whole
from toss.config import TrainConfig
from toss.methods import METHODS
from toss.workbench.launch import run  # noqa: F401 (a command is run by flags.run)
from toss.workbench.records import ROOT, Record, code_digests, held

DEMO = ROOT / "data" / "demo.json"
INPUTS = ("model", "harmful", "utility", "custom")
# What a run keeps: its inputs, and how text becomes ids.
FORM = ("revision", "template", "date", "max_length", "chat_template_kwargs", "skip_empty")
KEPT = (*INPUTS, *FORM)
DEMO_ONLY = ("discard", "base", "threads")  # what only data/demo.json sets
TRAINING_FLAGS = tuple(f.name for f in fields(TrainConfig) if f.metadata)
# What a script has where it has no such flag.
DEFAULTS = {**dict.fromkeys((*INPUTS, "mask")), "gradient_checkpointing": False}
DTYPES = ("auto", "float32", "tf32", "float16", "bfloat16")
METHOD_NAME = r"(?!(base|degraded|utility|costs|.*-round-\d+)$)[\w=+-][\w.=+-]{0,99}"
METHOD_WORDS = (
    "at most 100 letters, digits and . _ = + -; not base, degraded, utility, costs or ...-round-1"
)


# The parser


class Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and each flag's default after its help."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if "(default" in action.help or type(action.default) not in (str, int, float):
            return action.help
        if action.dest == "help":
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with the help above; an error is one line.

    source: the file that the values come from that are parsed, if they were not typed.
    """

    def __init__(self, prog: str, doc: str, **options: Any):
        super().__init__(prog, description=doc, formatter_class=Help, allow_abbrev=False, **options)
        self.source: Path | None = None

    def error(self, message: str) -> NoReturn:
        if self.source:
            raise InputError(f"{self.source}: {message}")
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def typed(self, argv: list[str]) -> dict[str, Any]:
        """The flags that are on the command line, and their values.

        argparse fills in no default where the namespace has a value already.
        """
        unset = object()
        blank = Namespace(**{action.dest: unset for action in self._actions})
        values = vars(self.parse_args(argv, blank))
        return {name: value for name, value in values.items() if value is not unset}


# Types of flags


def number(kind: type, allowed: Callable, words: str) -> Callable[[str], Any]:
    """An argparse type: a value for which `allowed` holds; `words` describe it."""

    def convert(text: str) -> Any:
        with suppress(ValueError):
            value = kind(text)
            if allowed(value):
                return value
        raise ArgumentTypeError(f"{text!r} is not {words}")

    return convert


def json_text(text: str) -> str:
    """An argparse type: a JSON object, in one spelling."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return json.dumps(value, sort_keys=True)
    raise ArgumentTypeError(f"{text!r} is not a JSON object")


def path(text: str) -> str:
    """An argparse type: a path, which becomes absolute."""
    return os.path.abspath(filled(text))


def base(text: str) -> str:
    """An argparse type: a folder as an absolute path, or a hub id as it is."""
    return os.path.abspath(text) if os.path.isdir(text) else filled(text)


def is_method(text: str) -> bool:
    return re.fullmatch(METHOD_NAME, text) is not None and len(text.encode()) <= 100


count = number(int, lambda n: 1 <= n < 2**31, "a whole number of at least 1 (below 2^31)")
threads = number(int, lambda n: 1 <= n <= 1024, "a whole number from 1 to 1024")
natural = number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
share = number(float, lambda x: 0 <= x < 1, "a share in [0, 1)")
positive = number(float, lambda x: 0 < x < 1e37, "a number above 0 (below 1e37)")
method = number(str, is_method, f"a method's name ({METHOD_WORDS})")
filled = number(str, len, "a value: it is empty")


# Groups of flags


def script_parser(prog: str, doc: str, **inputs: str) -> Parser:
    """A script's parser, with the flags that all three have. inputs: its files, {flag: help}."""
    epilog = "Omitted flags come from run.json (if there is none and no input is given, from "
    parser = Parser(prog, doc, epilog=f"{epilog}data/demo.json), then they have the defaults.")
    add = parser.add_argument_group("run").add_argument
    add("--run", type=filled, default="runs/demo", help="folder of the run")
    text = "make again what has other settings, inputs or code"
    add("--overwrite", action="store_true", help=text)
    text = "minutes between saved states of unfinished work, from which the same command goes on"
    add("--save-every", type=positive, default=2.0, metavar="MINUTES", help=text)
    add = parser.add_argument_group("base, rows and prompt form (the run keeps them)").add_argument
    add("--model", type=base, help="base checkpoint: a Hugging Face folder or a hub id")
    add("--revision", help="branch, tag or commit of a hub id (default: main; the run keeps it)")
    for flag, text in inputs.items():
        add(f"--{flag}", type=path, metavar="FILE", help=text)
    add("--template", choices=["chat", "human"], help="prompt form (default: chat if possible)")
    add("--date", help="YYYY-MM-DD, for a chat template that asks for it (default: today)")
    text = "variables of the chat template, such as '{\"enable_thinking\": false}'"
    add("--chat-template-kwargs", type=json_text, metavar="JSON", help=text)
    text = "leave out rows with an empty response; they are an error otherwise"
    add("--skip-empty", action="store_true", help=text)
    text = "tokens per row; longer rows are cut on the right"
    add("--max-length", type=count, default=2048, metavar="N", help=text)
    add_device_flags(parser)
    return parser


def add_device_flags(parser: Parser, dtype: bool = True) -> None:
    """Where the work is done; --dtype only if the arithmetic is the user's to choose."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    if dtype:
        text = "the base's dtype (auto: float32; on CUDA bfloat16 to train and float16 to score)"
        add("--dtype", default="auto", choices=DTYPES, help=text)
        text = "with torchrun: spread the base over the processes, each of which holds a part"
        add("--shard", action="store_true", help=text)
    add("--threads", type=threads, metavar="N", help="CPU threads (default: PyTorch's choice)")
    text = "tokens per forward pass, padding included; changes memory and speed, not the result "
    text += "(default: 8192 on CUDA, 1024 on the CPU, 16384 for generation)"
    add("--batch-tokens", type=count, metavar="N", help=text)


def add_run_flags(parser: Parser, dtype: bool = True) -> None:
    """What a command of the audit needs to open a run and run its models."""
    parser.add_argument("--run", type=filled, required=True, help="folder of the run")
    add_device_flags(parser, dtype)


def add_selection_flags(parser: Parser) -> None:
    """Which tokens are discarded, and what is written."""
    add = parser.add_argument_group("selection").add_argument
    methods = [name for name in METHODS if name != "mask"]  # --mask has that
    add("--method", choices=methods, default="toss", help="which tokens to discard")
    text = "use the mask in this selection.safetensors, also of another run"
    add("--mask", type=path, metavar="FILE", help=text)
    text = "folder in RUN/methods (default: the method, or toss-pro)"
    add("--name", type=method, help=text)
    text = "d, share of tokens to discard"
    add("--discard", type=share, default=0.1, metavar="D", help=text)
    add("--keep-eos", action="store_true", help="leave end-of-sequence tokens out of the ranking")
    add("--pro", type=natural, default=0, metavar="T", help="TOSS-Pro: rounds of refinement")
    text = "TOSS-Pro: rows added per round (default: 6 %% of the custom rows)"
    add("--pro-samples", type=count, metavar="K", help=text)
    add("--mask-only", action="store_true", help="write the mask, and do not train")
    text = "also write the merged checkpoint, in the dtype of the base's files"
    add("--merge", action="store_true", help=text)


def add_training_flags(parser: Parser) -> None:
    """One flag per field of TrainConfig, and --gradient-checkpointing."""
    add = parser.add_argument_group("training (defaults: the paper's; see below)").add_argument
    types = {"alpha": positive, "lr": positive, "seed": natural}
    for f in fields(TrainConfig):
        if f.metadata:
            kind = types.get(f.name, count if f.type is int else f.type)
            flag = f"--{f.name.replace('_', '-')}"
            add(flag, type=kind, default=f.default, **f.metadata)
    text = "recompute each block in the backward pass: a third more time, far less memory"
    add("--gradient-checkpointing", action="store_true", help=text)


# Values


def parse(parser: Parser, argv: list[str] | None = None, section: str = "finetune") -> Namespace:
    """The settings in force; see above. Raises InputError when inputs are missing.

    section: which training settings of run.json count; "reference" is train.py, which begins runs.
    Beside the flags the result has `typed`, the names of those on the command line; `settings`,
    what run.json or demo.json holds; `section`; and `anew`, if train.py replaces the run.
    """
    code_digests("train.py", "score.py", "select.py")  # as they are now, before anyone edits them
    argv = sys.argv[1:] if argv is None else argv
    typed = parser.typed(argv)
    file = Path(typed.get("run", "runs/demo")) / "run.json"
    inputs = typed.keys() & INPUTS
    begins = section == "reference" and bool(inputs)
    if begins and not {"model", "harmful", "utility"} <= inputs:
        needed = "--model, --harmful and --utility, or none of them for the embedded default"
        raise InputError(f"train.py needs {needed}")

    # The file that omitted values come from.
    source = file
    if not file.exists() and not inputs:
        source = DEMO
    settings = read_run(source) if source.exists() else {}
    anew = begins and "overwrite" in typed  # the run is begun anew, and inherits nothing
    values = {}
    if not anew:
        values = {name: settings[name] for name in (*KEPT, *DEMO_ONLY) if name in settings}
        values |= settings.get(section, settings.get("reference", {}))
    if typed.get("model", values.get("model")) != values.get("model"):
        values.pop("revision", None)  # it is of the hub id that the base had

    # The file's values go before what was typed, which overrides them.
    parser.set_defaults(**DEFAULTS)
    words = as_typed(parser, values)
    parser.source = source
    args = parser.parse_args([*words, *argv])  # what was typed was checked above
    if args.model is None:
        raise InputError(f"{file.parent} has no base yet: run train.py first, or give --model")
    args.typed = set(typed)
    args.settings = settings
    args.section = section
    args.anew = anew
    return args


def read_run(file: Path) -> dict[str, Any]:
    """What is in a run.json, or in data/demo.json. Raises InputError."""
    content = read_json(file)
    if "stages" in content:
        raise InputError(f"{file} was written by an earlier version: choose another --run")
    kinds = {"reference": dict, "finetune": dict, **dict.fromkeys(INPUTS, str)}
    for name, kind in kinds.items():
        if not isinstance(content.get(name, kind()), kind):
            raise InputError(f"{file}: {name} is no {kind.__name__}; is the file damaged?")
    return content


def write_run(
    args: Namespace, inputs: Sequence[str], record: Record, first: bool, anew: bool
) -> None:
    """Write run.json after a result was made or found, for what later commands omit.

    It keeps the prompt form, the result's inputs, and how the references and the first method were
    trained: others should share that, and while no other has a model (`first`) it may change. anew:
    of an old run nothing stays.
    """
    file = Path(args.run) / "run.json"
    result = record["stage"]
    with held(file.parent / ".state" / "run.lock", wait=True):
        content = args.settings
        if anew:
            content = {}
        elif file.exists():  # another command may have written it meanwhile
            content = read_json(file)
        for name in KEPT:
            value = getattr(args, name)
            known = str(ROOT / str(content.get(name)))  # of this checkout, or absolute
            used = anew or name not in INPUTS or name == "model" or f"--{name}" in inputs
            if used and value is not None and known != value:
                content[name] = value
        if result in ("degraded", "utility") or result.endswith("/model") and first:
            content[args.section] = {name: record["settings"][name] for name in TRAINING_FLAGS}
        content = {name: content[name] for name in KEPT if name in content} | content  # in order
        with whole(file) as new:
            new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def as_typed(parser: Parser, values: dict[str, Any]) -> list[str]:
    """The words of a command line that give these values. Inputs without a flag become defaults."""
    words = []
    flags = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        if name in INPUTS and (ROOT / str(value)).exists():  # of this checkout, which may be moved
            value = str(ROOT / value)
        if name in INPUTS and name not in flags:
            parser.set_defaults(**{name: value})
        elif name in flags and value not in (None, False):
            flag = flags[name].option_strings[-1]
            words.append(flag if flags[name].nargs == 0 else f"{flag}={value}")
    return words


def command(program: str, folder: str | Path | None = None, **values: Any) -> str:
    """A command that can be pasted: this interpreter, a script or "-m MODULE", and its flags."""
    first, *words = program.split()
    if first.endswith(".py"):
        first = shortened(ROOT / first)
    words = [shortened(sys.executable), first, *words]
    if folder is not None:
        words += ["--run", str(folder)]
    for flag, value in values.items():
        words += [f"--{flag.replace('_', '-')}", str(value)]
    return shlex.join(words)


def shortened(path: str | Path) -> str:
    """A path as it can be typed here: relative, if it lies in the current folder."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)
