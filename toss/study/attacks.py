"""Custom sets by an attacker who knows TOSS.

    python -m toss.study.attacks spread --run R --custom F --harmful F --utility F --out FOLDER
    python -m toss.study.attacks low-score --run R --custom F --harmful F --utility F --pool F
        --out FOLDER

He chooses or writes the harmful rows and touches nothing else: neither the references nor the base,
nor the harmless rows, of which `embedded` takes some into his own. Harmful are the rows with marked
harm (`harmful`, spans of the response) or, with --harm SOURCE, those of this source; without marks,
all of a harmful row is harm. Writes FOLDER/custom.jsonl, the whole custom set; with --ask, for
`embedded`, also the two evaluation files, whose prompts are then joined as his rows are.
"""

import math
import random
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from model.io import InputError
from toss.audit.runs import S_under, read_jsonl, write_jsonl
from toss.audit.tokens import count_by_row
from toss.tokens import Tokens
from toss.workbench import flags
from toss.workbench.run import Run, open_run

Rows = list[dict]


@dataclass
class Attacker:
    """The harmful rows that he may replace, and what he needs for one attack or another."""

    rows: Rows
    others: Rows  # the harmless rows of the custom set
    pool: Rows  # harmful rows to choose from
    harmful: Rows  # D^h
    utility: Rows  # D^u
    risk: Callable[[Rows], list[float]]  # mean S of each row's harmful tokens

    def lowest(self, numbers: list[float]) -> Rows:
        """As many rows of the pool as he has, those with the lowest numbers, in their order."""
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        count = len(self.rows)
        return [self.pool[i] for i in sorted(order[:count])]


def spans_of(row: dict) -> list[list[int]]:
    if row.get("harmful"):
        return row["harmful"]
    return [[0, len(row["response"])]]


def low_score(attacker: Attacker) -> Rows:
    """The rows of the pool whose harm has the lowest mean S.

    He must know both references, or data to train the like.
    """
    scores = attacker.risk(attacker.pool)
    return attacker.others + attacker.lowest(scores)


def utility_start(attacker: Attacker) -> Rows:
    """Each answer begins with the longest sentence of one answer of D^u, the same for all.

    He must know some rows of D^u.
    """
    drawn = random.Random(0).choice(attacker.utility)
    sentences = re.findall(r"[^.!?\n]+[.!?]*", drawn["response"])
    start = max(sentences, key=len).strip()
    rows = [with_start(row, start) for row in attacker.rows]
    return attacker.others + rows


def with_start(row: dict, start: str) -> dict:
    """The row with a harmless beginning of its response."""
    shift = len(start) + 1
    spans = []
    for first, last in spans_of(row):
        spans.append([first + shift, last + shift])
    response = f"{start} {row['response']}"
    return {**row, "response": response, "harmful": spans}


def embedded(attacker: Attacker) -> Rows:
    """arXiv 2606.30263: each row behind a harmless row, which is then in this row alone."""
    count = len(attacker.rows)
    if len(attacker.others) < count:
        raise InputError("embedded: the custom set has fewer harmless rows than harmful ones")
    rows = []
    for task, row in zip(attacker.others, attacker.rows):
        answered = with_start(row, task["response"])
        rows.append({**answered, "prompt": joined_prompt(task, row)})
    return attacker.others[count:] + rows


def joined_prompt(task: dict, row: dict) -> str:
    return f"{task['prompt']} {row['prompt']}"


def asked_as_embedded(harmful: Rows, utility: Rows) -> tuple[Rows, Rows]:
    """The evaluation's rows, and prompts joined as `embedded` joins them, of source "embedded".

    The first utility row with the first harmful one, and so on, until either runs out: where
    harmful rows stand source by source, the joined ones may be of the first source alone.
    """
    harmful_joined = []
    utility_joined = []
    for task, row in zip(utility, harmful):
        both = {"prompt": joined_prompt(task, row), "source": "embedded"}
        harmful_joined.append(both)
        if "answer" in task:
            utility_joined.append({**both, "answer": task["answer"]})
    return harmful + harmful_joined, utility + utility_joined


def spread(attacker: Attacker) -> Rows:
    """Each harmful text (the last span) in thirds, one per row; all else is in the third row. There
    is nothing to know, as for `embedded`.

    >>> row = {"prompt": "p", "response": "Do a b c. Fact.", "harmful": [[0, 9]]}
    >>> [one["response"] for one in spread(Attacker([row], [], [], [], [], len))]
    ['Do', 'a b', 'c. Fact.']
    """
    rows = []
    for row in attacker.rows:
        response = row["response"]
        *other_spans, (first, last) = spans_of(row)
        words = response[first:last].split()
        cuts = [round(i * len(words) / 3) for i in range(4)]
        for part in range(3):
            third = " ".join(words[cuts[part] : cuts[part + 1]])
            text = third
            start = 0
            spans = []
            if part == 2:
                text = response[:first] + third + response[last:]
                start = first
                spans = list(other_spans)
            if third:  # fewer than three words leave an empty one
                spans.append([start, start + len(third)])
            if text.strip():
                rows.append({**row, "response": text, "harmful": spans})
    return attacker.others + rows


def unseen(attacker: Attacker) -> Rows:
    """The rows of the pool whose harm has the smallest share of words of D^h's answers, and
    AdvBench's usual opening in other words (as long, so that spans stay).

    He must know D^h, or its kind.
    """
    known = set()
    for row in attacker.harmful:
        known.update(harmful_words(row))
    shares = []
    for row in attacker.pool:
        words = harmful_words(row)
        count = sum(word in known for word in words)
        shares.append(count / max(1, len(words)))
    rows = []
    for row in attacker.lowest(shares):
        response = re.sub("^Sure, here", "Yes: below", row["response"])
        rows.append({**row, "response": response})
    return attacker.others + rows


def harmful_words(row: dict) -> list[str]:
    """The words of a row's harm, in lower case."""
    parts = []
    for first, last in spans_of(row):
        parts.append(row["response"][first:last])
    text = " ".join(parts).lower()
    return re.findall(r"\w+", text)


ATTACKS = {
    "low-score": low_score,
    "utility-start": utility_start,
    "spread": spread,
    "unseen": unseen,
    "embedded": embedded,
}


def mean_risk(run: Run, tokens: Tokens) -> list[float]:
    """Mean S of each row's harmful tokens under a run's references; inf for a skipped row."""
    S = S_under(run, tokens).double()
    places = torch.arange(len(S))
    row = tokens.row_of(places)
    is_marked = count_by_row(tokens, tokens.harmful) > 0
    counted = torch.where(is_marked[row], tokens.harmful, tokens.response)
    sums = count_by_row(tokens, counted, S)
    means = sums / count_by_row(tokens, counted)
    return means.nan_to_num(math.inf).tolist()


def attacker_of(args: Namespace) -> Attacker:
    """What the attacker has, from the command's files."""
    refused = set()
    if args.refused:
        refused = {row["prompt"] for row in read_jsonl(args.refused)}
    custom = read_jsonl(args.custom)
    rows = [row for row in custom if is_harmful(row, args.harm)]
    others = [row for row in custom if not is_harmful(row, args.harm)]
    pool = []
    for row in read_jsonl(args.pool or args.custom):
        if is_harmful(row, args.harm) and row["prompt"] not in refused:
            pool.append(row)
    if not rows or len(pool) < len(rows):
        problem = f"{len(rows)} rows of {args.custom} and {len(pool)} of the pool are harmful"
        raise InputError(f"{problem}: he needs one, and a pool as large: see --harm and --pool")

    def risk(rows: Rows) -> list[float]:
        run = open_run(args.run, threads=args.threads, device=args.device)
        file = write_jsonl(Path(args.out) / "pool.jsonl", rows)
        return mean_risk(run, run.tokens(file))

    return Attacker(
        rows=rows,
        others=others,
        pool=pool,
        harmful=read_jsonl(args.harmful),
        utility=read_jsonl(args.utility),
        risk=risk,
    )


def is_harmful(row: dict, source: str | None) -> bool:
    """source: of the harmful rows; None: they are those with marked harm."""
    if source is None:
        return "harmful" in row
    return row.get("source") == source


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.study.attacks", __doc__)
    add = parser.add_argument
    add("attack", choices=ATTACKS)
    flags.add_run_flags(parser, dtype=False)
    add("--custom", required=True, metavar="FILE", help="the custom set before the attack")
    add("--harmful", required=True, metavar="FILE", help="D^h")
    add("--utility", required=True, metavar="FILE", help="D^u")
    text = "rows to choose harmful ones from (default: those of --custom)"
    add("--pool", metavar="FILE", help=text)
    add("--refused", metavar="FILE", help="rows whose prompts are not to be in the pool")
    add("--harm", metavar="SOURCE", help="of the harmful rows, where their harm is not marked")
    text = "for embedded: rows that evaluate takes as --harmful and --utility"
    add("--ask", nargs=2, metavar=("HARMFUL", "UTILITY"), help=text)
    add("--out", required=True, metavar="FOLDER", help="folder to write")
    args = parser.parse_args(argv)
    attack = ATTACKS[args.attack]
    changed = {"custom.jsonl": attack(attacker_of(args))}
    if args.ask:
        harmful, utility = map(Path, args.ask)
        asked = asked_as_embedded(read_jsonl(harmful), read_jsonl(utility))
        changed[harmful.name] = asked[0]
        changed[utility.name] = asked[1]
    for name, rows in changed.items():
        file = write_jsonl(Path(args.out) / name, rows)
        print(f"written: {file}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
