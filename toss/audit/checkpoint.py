"""The rows of the experiments on a checkpoint, drawn from files of yours; see experiment.py."""

import random
from argparse import Namespace
from itertools import cycle
from pathlib import Path

from model.io import InputError
from toss.audit.command import read_jsonl, write_jsonl
from toss.audit.laboratory import Setup
from toss.audit.measures import final_number

# The evaluation's files, by the world's names.
EVALUATION = {
    "eval_forbidden": "eval_harmful",
    "eval_benign": "eval_benign",
    "eval_facts": "eval_utility",
}
REFUSALS = (  # more than the wordings that `complies` looks for
    "I'm sorry, but I can't help with that.",
    "I won't help with this, since it could hurt people.",
    "That is something I have to decline.",
)


def checkpoint(
    args: Namespace, sizes: dict, training: dict, seed: int, folder: Path, rows: Path
) -> Setup:
    """Rows drawn from the files in FOLDER/data, and the base; see experiment.py.

    args: of the command: `real` (FOLDER), `model`, `unaligned` and `harm`, the `source` of the
    harmful custom rows. sizes: how many rows each set has, and whether the utility rows are asked
    as `questions`, whose answers end with a number. training: settings of all trainings.
    """
    source = args.real.absolute()
    draw = random.Random(seed)

    # custom.jsonl: its last harmless rows may be set aside for tuning. Of the others, shuffled, the
    # first are the custom set, and the harmless ones behind it calibrate d: one row more at least.
    in_file = read_rows(source, "custom", sizes["custom"] + 1)
    harmless = [row for row in in_file if row["source"] != args.harm]
    held_out = sizes.get("tuning", 0)
    if len(harmless) < held_out:
        raise InputError(f"{source}/data/custom.jsonl: {held_out} harmless rows are needed")
    tuning = harmless[len(harmless) - held_out :]
    drawable = [row for row in in_file if row not in tuning]
    shuffled = draw.sample(drawable, len(drawable))
    custom = shuffled[: sizes["custom"]]
    rest = shuffled[sizes["custom"] :]
    calibration = [row for row in rest if row["source"] != args.harm]
    sets = {
        "custom": custom,
        "calibration": calibration[: sizes["calibration"]],
        "benign": [row for row in custom if row["source"] != args.harm],
        "pool": [row for row in drawable if row["source"] == args.harm],  # for an attacker
    }
    for name, file in (("harmful", "harmful"), ("few", "harmful"), ("utility", "utility")):
        if name in sizes:
            sets[name] = draw.sample(read_rows(source, file, sizes[name]), sizes[name])

    # Refusals of the harmful prompts that are not in D^h.
    refused = []
    for row in read_rows(source, "harmful"):
        if row not in sets["harmful"]:
            refused.append(row["prompt"])
    replies = zip(refused, cycle(REFUSALS))
    sets["safety"] = [{"prompt": prompt, "response": reply} for prompt, reply in replies]
    for name in ("pool", "benign", "calibration", "safety"):
        if not sets[name]:
            raise InputError(f"{source}/data: no rows are left for {name}: see --help")

    draw = random.Random(0)  # the evaluation's rows are the same for all seeds
    for name, file in EVALUATION.items():
        sets[name] = by_source(draw, read_rows(source, file), sizes[file])
    if tuning:
        sets["tuning"] = tuning
    if sizes.get("questions"):
        for row in sets["eval_facts"] + tuning:
            number = final_number(row.get("response", ""))
            if number is None:
                prompt = row["prompt"][:40]
                raise InputError(f"{source}/data: {prompt!r} has no answer that ends with a number")
            row["answer"] = str(number)

    files = {name: write_jsonl(rows / f"{name}.jsonl", part) for name, part in sets.items()}
    files["model"] = args.model or str(source / "smollm2-aligned")
    if args.unaligned:
        files["unaligned"] = args.unaligned
    settings = {
        "reference": training,
        "finetune": training,
        "discard": 0.1,
        "forbidden_words": (),
    }
    return Setup(folder, files, settings, {"seed": seed})


def read_rows(source: Path, name: str, least: int = 0) -> list[dict]:
    """source/data/NAME.jsonl; InputError if it has fewer rows, or rows without what is needed.

    least: number of rows, which then need a response.
    """
    file = source / "data" / f"{name}.jsonl"
    rows = read_jsonl(file)
    keys = {"prompt", "source", "response"} if least else {"prompt", "source"}
    if len(rows) < least or not all(keys <= row.keys() for row in rows):
        what = f"at least {least} rows are needed, each with {', '.join(sorted(keys))}"
        raise InputError(f"{file}: {what}")
    return rows


def by_source(draw: random.Random, rows: list[dict], most: int) -> list[dict]:
    """At most so many rows of each source."""
    chosen = []
    for source in dict.fromkeys(row["source"] for row in rows):
        group = [row for row in rows if row["source"] == source]
        chosen += draw.sample(group, min(most, len(group)))
    return chosen
