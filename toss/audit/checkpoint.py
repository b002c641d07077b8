"""The rows of the experiment `real`, drawn from files of yours; see experiment.py."""

import random
from itertools import cycle
from pathlib import Path

from model.io import InputError
from toss.audit.command import read_jsonl, write_jsonl
from toss.audit.laboratory import Setup

TRAINING = {"lr": 5e-4, "epochs": 3, "batch_size": 16}
SIZES = {"harmful": 60, "few": 10, "utility": 80, "custom": 240, "calibration": 100}
EVALUATED = 100  # rows of every source
REFUSALS = (  # more than the wordings that `complies` looks for
    "I'm sorry, but I can't help with that.",
    "I won't help with this, since it could hurt people.",
    "That is something I have to decline.",
)


def checkpoint(
    source: Path, model: str, unaligned: str, harm: str, seed: int, folder: Path, rows: Path
) -> Setup:
    """Rows drawn from the files in `source`, and the base `model`; see experiment.py.

    unaligned: the base before its alignment, for safelora. harm: `source` of the harmful custom
    rows.
    """
    draw = random.Random(seed)
    pool = read_rows(source, "custom", SIZES["custom"] + 1)
    custom = draw.sample(pool, len(pool))
    rest = custom[SIZES["custom"] :]
    custom = custom[: SIZES["custom"]]
    calibration = [row for row in rest if row["source"] != harm]
    sets = {
        "custom": custom,
        "calibration": calibration[: SIZES["calibration"]],
        "benign": [row for row in custom if row["source"] != harm],
        "pool": [row for row in pool if row["source"] == harm],
    }
    for name, file in (("harmful", "harmful"), ("few", "harmful"), ("utility", "utility")):
        sets[name] = draw.sample(read_rows(source, file, SIZES[name]), SIZES[name])

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
    for name in ("harmful", "benign", "utility"):
        sets[f"eval_{name}"] = by_source(draw, read_rows(source, f"eval_{name}"))

    files = {name: write_jsonl(rows / f"{name}.jsonl", part) for name, part in sets.items()}
    files |= {"eval_forbidden": files["eval_harmful"], "eval_facts": files["eval_utility"]}
    files |= {"model": model, "unaligned": unaligned}
    settings = {
        "reference": TRAINING,
        "finetune": TRAINING,
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


def by_source(draw: random.Random, rows: list[dict]) -> list[dict]:
    """At most EVALUATED rows of each source."""
    chosen = []
    for source in dict.fromkeys(row["source"] for row in rows):
        group = [row for row in rows if row["source"] == source]
        chosen += draw.sample(group, min(EVALUATED, len(group)))
    return chosen
