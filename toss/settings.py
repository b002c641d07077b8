"""Every setting, once: the fields of one dataclass are the flags of the scripts.

A value comes from, first match: the command line; what the run was begun with (run.json); data/demo.json, for a run
that was begun without inputs; the defaults here, which are the paper's.
"""

import argparse
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args

from model.checkpoint import resolve
from model.errors import InputError
from model.files import read_json
from toss.selection import METHODS

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo.json"
INPUTS = ("model", "harmful", "utility", "custom")
FORM = ("model", "revision", "template", "date", "max_length")  # what turns text into ids and losses
IDENTITY = (*FORM, "harmful", "utility", "custom")  # must agree in all stages of a run
TRAINING = ("lr", "epochs", "batch_size", "rank", "alpha", "targets", "schedule", "seed")
CHOOSING = ("method", "discard", "keep_eos", "pro", "pro_samples", "pro_train", "weight_utility", "weight_degraded")
SCRIPTS = ("train", "score", "select")


def option(default, help: str, scripts=SCRIPTS, **flag):
    """A setting, its help line, and the scripts that have it as a flag."""
    return field(default=default, metadata={"help": help, "scripts": scripts, "flag": flag})


@dataclass
class Settings:
    run: str = option("runs/demo", "folder of this run")
    model: str | None = option(None, "base checkpoint: a Hugging Face folder or a hub id")
    revision: str | None = option(None, "a hub id's branch, tag or commit (default: main when the run is begun; the run keeps "
                                  "the commit)")
    harmful: str | None = option(None, "harmful reference set D^h, JSONL", ("train",))
    utility: str | None = option(None, "utility reference set D^u, JSONL", ("train",))
    custom: str | None = option(None, "custom set D^cus, JSONL", ("score", "select"))
    template: str | None = option(None, "prompt form (default: the checkpoint's chat template if it has one, else human)",
                                  choices=["chat", "human"])
    date: str | None = option(None, "YYYY-MM-DD, told to a chat template that asks for the day, else without effect (default: "
                              "today when the run is begun; the run keeps it)")
    max_length: int = option(2048, "tokens a row: a longer response is cut on the right")
    method: str = option("toss", f"way of fine-tuning: {', '.join(METHODS)}; see toss/selection.py", ("select",))
    mask: str | None = option(None, "in place of a method: a selection.safetensors, made in another run from the same custom set",
                              ("select",))
    name: str | None = option(None, "folder under RUN/methods (default: the method), to keep several settings apart",
                              ("select",))
    discard: float = option(0.1, "d, the share of the response tokens to discard", ("select",))
    keep_eos: bool = option(False, "never discard the end-of-sequence token, and leave it out of the count", ("select",))
    pro: int = option(0, "TOSS-Pro: T, the rounds of refining the degraded model (0: plain TOSS)", ("select",))
    pro_samples: int | None = option(None, "TOSS-Pro: k, rows added a round (default: 6 %% of the custom rows)", ("select",))
    pro_train: str = option("rows", "TOSS-Pro: an added row's tokens that the degraded model learns: the whole row's (the "
                            "paper), or only those among the top d (see toss/refinement.py)", ("select",),
                            choices=["rows", "top"])
    weight_utility: float = option(1.0, "alpha of --method weighted, which ranks by alpha L^u - beta L^h", ("select",))
    weight_degraded: float = option(1.0, "beta of --method weighted", ("select",))
    merge: bool = option(False, "also write the merged checkpoint", ("select",))
    base: bool = option(False, "also score under the base model (loss_base)", ("score",))
    lr: float = option(1e-5, "learning rate of AdamW", ("train", "select"))
    epochs: int = option(2, "passes over the data", ("train", "select"))
    batch_size: int = option(64, "rows an optimizer step", ("train", "select"))
    rank: int = option(16, "LoRA rank", ("train", "select"))
    alpha: float = option(16, "LoRA alpha: the update is scaled by alpha / rank", ("train", "select"))
    targets: str = option("q_proj,v_proj", "layers that carry LoRA, comma-separated", ("train", "select"))
    schedule: str = option("constant", "learning rate over the steps", ("train", "select"), choices=["constant", "cosine"])
    seed: int = option(0, "draws the order of the rows, LoRA's start, and the random method", ("train", "select"))
    batch_tokens: int | None = option(None, "tokens a forward pass, padding included; changes memory and speed, not the "
                                      "result (default: 8192 on CUDA, 2048 on the CPU)")
    gradient_checkpointing: bool = option(False, "compute each block again in the backward pass: a third more time, and a "
                                          "fraction of the memory", ("train", "select"))
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:N")
    dtype: str = option("auto", "the base's arithmetic (auto: float32 on the CPU; on CUDA bfloat16 to train, float16 to score)",
                        choices=["auto", "float32", "tf32", "float16", "bfloat16"])
    threads: int | None = option(None, "CPU threads (default: PyTorch's choice)")
    overwrite: bool = option(False, "replace a stage that holds another result")
    demo: bool = option(False, "the run was begun without inputs, so data/demo.json applies", ())
    script: str = option("", "which script these settings are for", ())

    @property
    def target_list(self) -> list[str]:
        return [name.strip() for name in self.targets.split(",") if name.strip()]

    def check(self) -> "Settings":
        """Refuse values that no stage could work with; returns self."""
        if not 0 <= self.discard < 1:
            raise InputError(f"--discard must lie in [0, 1), not {self.discard}")
        for name in ("max_length", "epochs", "batch_size", "rank", "batch_tokens", "threads", "pro_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not (0 < self.lr < math.inf and 0 < self.alpha < math.inf):
            raise InputError("--lr and --alpha must be above 0, and finite")
        if not (math.isfinite(self.weight_utility) and math.isfinite(self.weight_degraded)):
            raise InputError("--weight-utility and --weight-degraded must be finite")
        if self.pro < 0 or not 0 <= self.seed < 2**63:
            raise InputError("--pro and --seed must be 0 or more, and --seed below 2^63")
        if (self.pro_samples or self.pro_train != "rows") and not self.pro and self.method != "toss-pro":
            raise InputError("--pro-samples and --pro-train go with --pro T")
        if (self.weight_utility, self.weight_degraded) != (1.0, 1.0) and self.method != "weighted":
            raise InputError("--weight-utility and --weight-degraded go with --method weighted")
        return self


def parse(script: str, doc: str, argv: list[str] | None = None) -> Settings:
    """The settings of one script: its command line, then what it inherits (see inherit)."""
    parser = argparse.ArgumentParser(prog=f"{script}.py", description=doc, argument_default=argparse.SUPPRESS,
                                     epilog="Without inputs (--model, --harmful, --utility, --custom) data/demo.json's values "
                                     "take the place of these defaults, which are the paper's.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Settings):
        if script in f.metadata["scripts"]:
            flag, text = dict(f.metadata["flag"]), f.metadata["help"]
            kind = f.type if isinstance(f.type, type) else get_args(f.type)[0]  # `int | None` holds ints
            if kind is bool:
                flag["action"] = "store_true"
            else:
                flag["type"] = kind
                if "choices" not in flag:
                    flag["metavar"] = {str: "TEXT", int: "N", float: "X"}[kind]
                text += "" if f.default is None else f" (default: {f.default})"
            parser.add_argument(f"--{f.name.replace('_', '-')}", help=text, **flag)
    return inherit(script, vars(parser.parse_args(argv)))


def inherit(script: str, given: dict) -> Settings:
    """Fill in what the command line (`given`) leaves open, and print what came from the run.

    Raises InputError when a flag contradicts what the run was begun with, or when inputs are missing.
    """
    run = Path(given.get("run", "runs/demo"))
    record = read_json(run / "run.json") if (run / "run.json").exists() else {}
    begun = {name: value for name, value in record.get("settings", {}).items() if name in IDENTITY and value is not None}
    inputs = [name for name in INPUTS if name in given]
    if script == "train" and inputs and given.get("overwrite"):
        record, begun = {}, {}  # begun anew
    if script == "train" and inputs and len(inputs) < 3:
        missing = [f"--{name}" for name in ("model", "harmful", "utility") if name not in given]
        raise InputError(f"train.py needs --model, --harmful and --utility together, or none of them for the embedded "
                         f"default; {' and '.join(missing)} is not given")
    demo = not inputs and record.get("demo", True)
    values = demo_values(script) if demo else {}
    if given.get("mask") and (choosing := [f"--{name.replace('_', '-')}" for name in CHOOSING if name in given]):
        raise InputError(f"--mask says which tokens go, so {' and '.join(choosing)} cannot be given with it")
    for name in (*INPUTS, "mask"):
        if given.get(name) is not None and (name != "model" or Path(given[name]).is_dir()):
            given[name] = os.path.abspath(given[name])
    if given.get("revision") and begun.get("revision", given["revision"]) != given["revision"]:  # a branch or tag, perhaps
        given["revision"] = resolve(given.get("model", begun["model"]), given["revision"], weights=False).name
    for name in FORM:
        if name in given and name in begun and given[name] != begun[name]:
            raise InputError(f"{run} was begun with --{name.replace('_', '-')} {begun[name]}, not {given[name]}: "
                             "leave the flag out, or choose another --run")
    taken = {name: value for name, value in begun.items() if name not in given and name in flags_of(script)}
    if taken:
        print(f"from {run}/run.json: " + ", ".join(f"{name} = {value}" for name, value in taken.items()))
    settings = Settings(**{**values, **begun, **given, "demo": record.get("demo", demo), "script": script})
    if settings.model is None:
        raise InputError(f"{run}/run.json is not there: run train.py --run {run} first, or give --model")
    return settings.check()


def flags_of(script: str) -> list[str]:
    """The settings that a script has as flags."""
    return [f.name for f in fields(Settings) if script in f.metadata["scripts"]]


def demo_values(script: str) -> dict:
    """data/demo.json's values for one script: inputs, and the training settings of its stage."""
    demo = read_json(DEMO)
    values = {name: str(ROOT / demo[name]) for name in INPUTS}
    stage = demo["reference" if script == "train" else "finetune"]
    if unknown := set(stage) - {f.name for f in fields(Settings)}:
        raise InputError(f"{DEMO}: unknown settings {sorted(unknown)}")
    return {**values, "discard": demo["discard"], "base": True, **stage}
