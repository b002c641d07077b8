"""Draw the sets of an experiment on a checkpoint from files of yours.

    python -m toss.study.draw --data FOLDER --out ROWS --seed 1000 --harmful 60 --utility 80
        --custom 240 --calibration 100 --evaluation 100 100 100

FOLDER holds harmful, utility, custom, eval_harmful, eval_benign and eval_utility.jsonl: rows with a
prompt, a source and, the first three, a response. Harmful custom rows are those of the source
--harm. Writes into ROWS files of the same names and calibration.jsonl, harmless custom rows that
are in no set; benign.jsonl, the custom set without its harmful rows; pool.jsonl, all harmful rows
of the file, for an attacker. The evaluation's rows are the same for all seeds.
"""

import random
import sys
from argparse import Namespace
from pathlib import Path

from model.io import InputError, refuse_to_replace
from toss.audit.measures import final_number
from toss.audit.runs import read_jsonl, write_jsonl
from toss.workbench import flags

Rows = list[dict]
EVALUATION = ("eval_harmful", "eval_benign", "eval_utility")


def drawn_sets(args: Namespace) -> dict[str, Rows]:
    """The rows of each file. args: of the command."""
    draw = random.Random(args.seed)

    # custom.jsonl: its last harmless rows may be set aside for tuning. Of the others, shuffled, the
    # first are the custom set, and the harmless ones behind it calibrate d: one row more at least.
    in_file = read_rows(args.data, "custom", args.custom + 1)
    harmless = without(args.harm, in_file)
    first = len(harmless) - args.tuning
    if first < 0:
        raise InputError(f"{args.data}/custom.jsonl: {args.tuning} harmless rows are needed")
    tuning = harmless[first:]
    drawable = [row for row in in_file if row not in tuning]
    shuffled = draw.sample(drawable, len(drawable))
    custom = shuffled[: args.custom]
    rest = shuffled[args.custom :]
    sets = {
        "custom": custom,
        "calibration": without(args.harm, rest)[: args.calibration],
        "benign": without(args.harm, custom),
        "pool": [row for row in drawable if row["source"] == args.harm],
    }
    for name in ("pool", "benign", "calibration"):
        if not sets[name]:
            what = f"no rows are left for {name}: choose a smaller --custom, or another --harm"
            raise InputError(f"{args.data}/custom.jsonl: {what}")

    # The references; `few` are other rows for D^h.
    sizes = {"harmful": args.harmful, "few": args.few, "utility": args.utility}
    for name, size in sizes.items():
        if size:
            file = "harmful" if name == "few" else name
            sets[name] = draw.sample(read_rows(args.data, file, size), size)

    # The evaluation: some of each source.
    draw = random.Random(0)
    for name, size in zip(EVALUATION, args.evaluation):
        sets[name] = by_source(draw, read_rows(args.data, name), size)
    if tuning:
        sets["tuning"] = tuning
    if args.questions:
        questions = sets["eval_utility"] + tuning
        for row in questions:
            add_answer(row, args.data)
    return sets


def without(source: str, rows: Rows) -> Rows:
    """The rows of other sources."""
    return [row for row in rows if row["source"] != source]


def add_answer(row: dict, data: Path) -> None:
    """Add the number that a row's response ends with, which evaluate compares with the model's."""
    number = final_number(row.get("response", ""))
    if number is None:
        problem = f"{row['prompt'][:40]!r} has no response that ends with a number"
        raise InputError(f"{data}: {problem}: leave --questions out, or the row")
    row["answer"] = str(number)


def read_rows(data: Path, name: str, least: int = 0) -> Rows:
    """The rows of data/NAME.jsonl; InputError if they are fewer, or lack what is needed.

    least: number of rows, which then need a response.
    """
    file = data / f"{name}.jsonl"
    rows = read_jsonl(file)
    keys = {"prompt", "source"}
    if least:
        keys.add("response")
    are_whole = all(keys <= row.keys() for row in rows)
    if len(rows) < least or not are_whole:
        what = f"at least {least} rows are needed, each with {', '.join(sorted(keys))}"
        raise InputError(f"{file}: {what}")
    return rows


def by_source(draw: random.Random, rows: Rows, limit: int) -> Rows:
    """At most so many rows of each source."""
    groups = {}
    for row in rows:
        groups.setdefault(row["source"], []).append(row)
    chosen = []
    for group in groups.values():
        chosen += draw.sample(group, min(limit, len(group)))
    return chosen


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.study.draw", __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="your files")
    add("--out", type=Path, required=True, metavar="ROWS", help="folder; nothing is replaced")
    add("--seed", type=flags.natural, default=0, help="of the draw")
    for name in ("harmful", "utility", "custom", "calibration"):
        add(f"--{name}", type=flags.count, required=True, metavar="N", help="rows of this set")
    add("--few", type=flags.natural, default=0, metavar="N", help="rows of another, small D^h")
    text = "the last harmless rows of custom.jsonl, which are in no other set"
    add("--tuning", type=flags.natural, default=0, metavar="N", help=text)
    text = "rows of each source in each evaluation file"
    add("--evaluation", type=flags.count, nargs=3, default=[100] * 3, metavar="N", help=text)
    text = "the utility rows are questions, whose answers end with a number"
    add("--questions", action="store_true", help=text)
    text = "`source` of the harmful custom rows (default: advbench)"
    add("--harm", default="advbench", metavar="SOURCE", help=text)
    args = parser.parse_args(argv)
    sets = drawn_sets(args)
    files = {name: args.out / f"{name}.jsonl" for name in sets}
    refuse_to_replace(*files.values())
    for name, rows in sets.items():
        write_jsonl(files[name], rows)
    print(f"written: {args.out}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
