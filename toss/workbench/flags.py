"""The command line: flags, where the values of omitted ones come from, errors, several processes.

The value of a setting is, first match: the command line; what the run was begun with (run.json);
data/demo.json, for a run begun without inputs; the default, the paper's. train.py trains as the
references were trained, select.py as the first method, else as demo.json has it, else as they were.
"""

import argparse
import json
import os
import re
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from model.io import InputError, read_json, run_command
from toss.config import TrainConfig
from toss.workbench import code
from toss.workbench.launch import joined, leave
from toss.workbench.runfile import FORM, INHERITED, INPUTS, ROOT, RunFile, read_run

DEMO = ROOT / "data" / "demo.json"
TRAINING_FLAGS = tuple(f.name for f in fields(TrainConfig) if f.metadata)
# What a script has where it has no such flag.
DEFAULTS = {**dict.fromkeys((*INPUTS, "mask")), "gradient_checkpointing": False}
DTYPES = ("auto", "float32", "tf32", "float16", "bfloat16")
METHOD_NAME = r"(?!(base|degraded|utility)$)[\w=+-][\w.=+-]{0,99}"
METHOD_WORDS = "at most 100 letters, digits and . _ = + -; not base, degraded or utility"


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

    source: the file that the values come from, if they were not typed; an error is an InputError.
    """

    def __init__(self, prog: str, doc: str, source: Path | None = None, **options: Any):
        super().__init__(prog, description=doc, formatter_class=Help, allow_abbrev=False, **options)
        self.source = source

    def error(self, message: str) -> NoReturn:
        if self.source:
            raise InputError(f"{self.source}: {message}")
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def typed(self, argv: list[str] | None) -> dict[str, Any]:
        """The flags that are on the command line, and their values.

        argparse fills in no default where the namespace has a value already.
        """
        unset = object()
        blank = Namespace(**{action.dest: unset for action in self._actions})
        values = vars(self.parse_args(argv, blank))
        return {name: value for name, value in values.items() if value is not unset}

    def parse_known_args(self, args: list[str] | None = None, namespace: Any = None) -> Any:
        """argparse's. An empty value, as from a variable that is not set, is an error."""
        words = sys.argv[1:] if args is None else args
        for flag, word in zip(["", *words], words):
            if word == "":
                self.error(f"{f'argument {flag}' if flag else 'an argument'}: the value is empty")
            if re.fullmatch("--[a-z-]+=", word):
                self.error(f"argument {word[:-1]}: the value is empty")
        return super().parse_known_args(args, namespace)


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


def base(text: str) -> str:
    """An argparse type: a folder as an absolute path, or a hub id as it is."""
    return os.path.abspath(text) if os.path.isdir(text) else text


def is_method(text: str) -> bool:
    return re.fullmatch(METHOD_NAME, text) is not None and len(text.encode()) <= 100


count = number(int, lambda n: 1 <= n < 2**31, "a whole number of at least 1 (below 2^31)")
threads = number(int, lambda n: 1 <= n <= 1024, "a whole number from 1 to 1024")
natural = number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
share = number(float, lambda x: 0 <= x < 1, "a share in [0, 1)")
positive = number(float, lambda x: 0 < x < 1e37, "a number above 0 (below 1e37)")
method = number(str, is_method, f"a method's name ({METHOD_WORDS})")
path = os.path.abspath


# Groups of flags


def script_parser(prog: str, doc: str, **inputs: str) -> Parser:
    """A script's parser, with the flags that all three have. inputs: its files, {flag: help}."""
    epilog = (
        "Omitted flags come from run.json, then data/demo.json (if no input is given), then the "
        "defaults."
    )
    parser = Parser(prog, doc, epilog=epilog)
    add = parser.add_argument_group("run").add_argument
    add("--run", default="runs/demo", help="folder of the run")
    add_inherited_flags(parser, **inputs)
    add_device_flags(parser)
    add(
        "--overwrite",
        action="store_true",
        help="make again what has other settings, inputs or code",
    )
    text = "minutes between saved states of unfinished work, from which the same command goes on"
    add("--save-every", type=positive, default=2.0, metavar="MINUTES", help=text)
    return parser


def add_inherited_flags(parser: Parser, **inputs: str) -> None:
    """The flags that a run is begun with. inputs: its files of rows, {flag: help}."""
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
    add("--skip-empty", action="store_true", default=None, help=text)
    text = "tokens per row; longer rows are cut on the right"
    add("--max-length", type=count, default=2048, metavar="N", help=text)


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
    parser.add_argument("--run", required=True, help="folder of the run")
    add_device_flags(parser, dtype)


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


def parse(parser: Parser, argv: list[str] | None = None, references: bool = False) -> Namespace:
    """The settings in force: the command line's, and for omitted flags see above.

    references: the command begins runs, and trains as the references were trained. Beside the flags
    the result has `typed`, those on the command line; `notes`, which say what comes from where;
    `runfile`; `demo`; and `begun_anew`. Raises InputError when a flag contradicts what the run was
    begun with, or when inputs are missing.
    """
    # What was typed. All of train.py's inputs or none: some of them would mix two sets of data.
    typed = parser.typed(argv)
    code.read_all()  # before the modules themselves are imported
    file = Path(typed.get("run", "runs/demo")) / "run.json"
    inputs = [name for name in INPUTS if name in typed]
    missing = [f"--{name}" for name in ("model", "harmful", "utility") if name not in typed]
    if references and inputs and missing:
        need = "train.py needs --model, --harmful and --utility, or none for the embedded default"
        raise InputError(f"{need}; missing: {' and '.join(missing)}")

    # With all its inputs and --overwrite, train.py begins the run anew: nothing is inherited.
    begun_anew = references and bool(inputs) and "overwrite" in typed
    content = read_run(file, must_be_whole=not inputs)
    known = RunFile(file, {} if begun_anew else content)
    demo = not inputs and known.content.get("demo", True)
    inherited = from_run(known, typed, demo)
    source, settings = trained_before(known, references, demo)

    # Values of flags that were not typed; a later source overrides an earlier one.
    values = dict(DEFAULTS)
    if demo:
        values |= demo_values(references)
    values |= inherited | settings
    parser.set_defaults(**values)
    args = parser.parse_args(argv)

    # A run has one prompt form.
    for name in FORM:
        if name in typed and inherited.get(name, typed[name]) != typed[name]:
            flag = f"--{name.replace('_', '-')} {inherited[name]}, not {typed[name]}"
            advice = "leave it out, or use another --run"
            if references:
                advice += ", or begin this one anew with all inputs and --overwrite"
            raise InputError(f"{file.parent} was begun with {flag}: {advice}")

    # Say where the values of omitted flags come from.
    omitted = {action.dest for action in parser._actions} - typed.keys()
    args.notes = []
    if inherited and not demo:
        args.notes += described(f"from {file}", inherited, omitted)
    shown = set(TRAINING_FLAGS)
    if "mask_only" in typed and "pro" not in typed:
        shown = {"seed"}  # it trains nothing, and `random` draws by the seed
    args.notes += described(f"training settings {source}", vars(args), omitted & shown)

    if args.model is None:
        rows = {"harmful": "HARMFUL.jsonl", "utility": "UTILITY.jsonl"}
        train = command("train.py", file.parent, model="MODEL", **rows)
        raise InputError(f"{file.parent} has no base yet: give --model, or run {train}")
    args.runfile = RunFile(file, content)
    args.demo = known.content.get("demo", demo)
    args.begun_anew = begun_anew
    args.typed = set(typed)
    return args


def described(title: str, values: dict[str, Any], names: set[str]) -> list[str]:
    """A line with the values of these names; none if there are none."""
    shown = [f"{name} = {value}" for name, value in values.items() if name in names]
    return [f"{title}: {', '.join(shown)}"] if shown else []


def from_run(runfile: RunFile, typed: dict, demo: bool) -> dict[str, Any]:
    """What a run was begun with, checked as if it had been typed."""
    settings = runfile.section("settings")
    settings = {name: settings[name] for name in INHERITED if settings.get(name) is not None}
    inherited = as_typed(runfile.file, settings)
    if typed.get("model", inherited.get("model")) != inherited.get("model"):
        inherited.pop("revision", None)  # it is of the hub id that the base had
    if demo:  # this checkout's files, which may have moved
        for name in INPUTS:
            if not os.path.exists(inherited.get(name, "")):
                inherited.pop(name, None)
    return inherited


def trained_before(runfile: RunFile, references: bool, demo: bool) -> tuple[str, dict[str, Any]]:
    """Where omitted training settings come from, in words, and those that a run has.

    train.py takes the references' own. select.py takes those of the first method, so that methods
    can be compared; where there is none, outside the demo, those of the references.
    """
    candidates = []
    if not references:
        candidates += [s for s in runfile.section("stages") if s.startswith("methods/")]
    if references or not demo:
        candidates += ["degraded", "utility"]
    for stage in candidates:
        recorded = runfile.section("stages", stage, "recipe", "settings")
        settings = {name: recorded[name] for name in TRAINING_FLAGS if name in recorded}
        if settings and "mask_only" not in recorded:
            return f"as for {stage}", as_typed(runfile.file, settings)
    return f"in {DEMO.name}" if demo else "by default", {}


def as_typed(source: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Values from a file, converted and checked as if they had been typed."""
    parser = Parser("", "", source=source)
    add_inherited_flags(parser, harmful="", utility="", custom="")
    add_training_flags(parser)
    words = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "skip_empty":  # it takes no value
            words += [flag] if value else []
        else:
            words.append(f"{flag}={value}")
    return parser.typed(words)


def demo_values(references: bool) -> dict[str, Any]:
    """data/demo.json's settings: its inputs, and those of reference or final training."""
    demo = read_json(DEMO)
    inputs = {name: str(ROOT / demo[name]) for name in INPUTS}
    stage = demo["reference" if references else "finetune"]
    return {**inputs, "discard": demo["discard"], "base": True, **stage}


def command(program: str, run: str | Path | None = None, **values: Any) -> str:
    """A command that can be pasted: this interpreter, a script or "-m MODULE", and its flags."""
    first, *words = program.split()
    if first.endswith(".py"):
        first = shortened(ROOT / first)
    words = [shortened(sys.executable), first, *words]
    if run is not None:
        words += ["--run", str(run)]
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def shortened(path: str | Path) -> str:
    """A path as it can be typed here: relative, if it lies in the current folder."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


# Running a command

GOES_ON = "; the same command goes on from the last saved state (--save-every), if there is one"


def run(main: Callable[[], int | None], when_stopped: str = "") -> int:
    """Run a command, also as one of torchrun's, and report its errors; returns the exit status.

    when_stopped: what to say more after a signal.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "MASTER_ADDR" not in os.environ:
        return run_command(main, when_stopped)
    leave(run_command(lambda: joined(main), when_stopped))
