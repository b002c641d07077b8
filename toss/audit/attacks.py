"""Custom sets by an attacker who knows TOSS; what he must know for each is in RESULTS.md.

He chooses or writes the harmful rows and touches nothing else: neither the references nor the base,
nor the harmless rows. `sweep attack` and `real` try each attack against several defences.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.atomic import atomic_file
from model.io import json_lines

Rows = list[dict]


@dataclass
class Attacker:
    """The harmful rows that he may replace, and what he needs for one attack or another."""

    rows: Rows
    pool: Rows  # harmful rows to choose from
    harmful: Rows  # D^h
    utility: Rows  # D^u
    risk: Callable[[Rows], list[float]]  # mean S of each row's harmful tokens

    def lowest(self, by: list[float]) -> Rows:
        """As many rows of the pool as he has, those with the lowest numbers."""
        order = sorted(range(len(by)), key=by.__getitem__)
        return [self.pool[i] for i in sorted(order[: len(self.rows)])]


def low_score(a: Attacker) -> Rows:
    """The rows of the pool whose harm has the lowest mean S."""
    return a.lowest(a.risk(a.pool))


def utility_start(a: Attacker) -> Rows:
    """Each answer begins with the first sentence of some answer of D^u."""
    drawn, found = random.Random(0), []
    for row in a.rows:
        start = (
            re.match(r".+?[.!?\n]+", drawn.choice(a.utility)["response"] + "\n")[0].strip() + " "
        )
        spans = [[first + len(start), last + len(start)] for first, last in row.get("harmful", [])]
        marks = {"harmful": spans} if spans else {}
        found.append({**row, "response": start + row["response"], **marks})
    return found


def spread(a: Attacker) -> Rows:
    """Each harmful text in thirds, over three rows of one prompt; what is harmless comes last.

    >>> row = {"prompt": "p", "response": "Do a b c. Fact.", "harmful": [[0, 9]]}
    >>> [one["response"] for one in spread(Attacker([row], [], [], [], len))]
    ['Do', 'a b', 'c. Fact.']
    """
    found = []
    for row in a.rows:
        text = row["response"]
        *spans, (first, last) = row.get("harmful", [[0, len(text)]])
        words = text[first:last].split()
        cuts = [round(i * len(words) / 3) for i in range(4)]
        for i in range(3):
            part = " ".join(words[cuts[i] : cuts[i + 1]])
            before, after = (text[:first], text[last:]) if i == 2 else ("", "")
            own = [*spans * (i == 2), [len(before), len(before + part)]]
            marks = {"harmful": own} if "harmful" in row else {}
            found.append({**row, "response": before + part + after, **marks})
    return found


def unseen(a: Attacker) -> Rows:
    """The rows of the pool whose harm has the smallest share of words of D^h's answers, and
    AdvBench's usual opening in other words (as long, so that spans stay)."""

    def words(row: dict) -> list[str]:
        text = row["response"].lower()
        parts = (text[first:last] for first, last in row.get("harmful", [[0, len(text)]]))
        return re.findall(r"\w+", " ".join(parts))

    known = {word for row in a.harmful for word in words(row)}
    rows = a.lowest([sum(w in known for w in words(row)) / len(words(row)) for row in a.pool])
    other = lambda text: re.sub("^Sure, here", "Yes: below", text)
    return [{**row, "response": other(row["response"])} for row in rows]


ATTACKS = {
    "low-score": low_score,
    "utility-start": utility_start,
    "spread": spread,
    "unseen": unseen,
}


def attacked(run, kind: str, files: dict, out: Path, harm: Callable[[dict], bool], pool: Rows):
    """Write the custom set as one of ATTACKS leaves it; returns its path.

    run: its references give S. files: paths of custom, harmful and utility. harm: whether a row is
    the attacker's. pool: more of his rows.
    """
    from toss.audit.command import losses_under

    def write(path: Path, rows: Rows) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return str(path)

    def risk(rows: Rows) -> list[float]:
        D = run.tokens(write(out.with_name("pool.jsonl"), rows))
        L, at = losses_under(run, D), D.harmful if D.harmful.any() else D.response
        S = L["utility"] - L["degraded"]
        return [float(S[D.places([i])][at[D.places([i])]].mean()) for i in range(D.rows)]

    read = lambda name: [row for _, row in json_lines(Path(files[name]))]
    custom, others = read("custom"), (pool, read("harmful"), read("utility"), risk)
    attacker = Attacker([row for row in custom if harm(row)], *others)
    return write(out, [row for row in custom if not harm(row)] + ATTACKS[kind](attacker))
