"""Custom sets by an attacker who knows TOSS; what he must know for each is in README.md.

He chooses or writes the harmful rows and touches nothing else: neither the references nor the base,
nor the harmless rows. `sweep attack` and `real` try each attack against several defences. A row
has a prompt, a response and perhaps `harmful`, the spans of its harm; without it, all is harm.
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toss.audit.command import losses_under, read_jsonl, write_jsonl

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


def spans_of(row: dict) -> list[list[int]]:
    return row.get("harmful") or [[0, len(row["response"])]]


def low_score(a: Attacker) -> Rows:
    """The rows of the pool whose harm has the lowest mean S."""
    return a.lowest(a.risk(a.pool))


def utility_start(a: Attacker) -> Rows:
    """Each answer begins with the longest sentence of one answer of D^u, the same for all."""
    sentences = re.findall(r"[^.!?\n]+[.!?]*", random.Random(0).choice(a.utility)["response"])
    start, found = max(sentences, key=len).strip() + " ", []
    for row in a.rows:
        spans = [[first + len(start), last + len(start)] for first, last in spans_of(row)]
        found.append({**row, "response": start + row["response"], "harmful": spans})
    return found


def spread(a: Attacker) -> Rows:
    """Each harmful text in thirds, over three rows of one prompt; what is harmless comes last.

    >>> row = {"prompt": "p", "response": "Do a b c. Fact.", "harmful": [[0, 9]]}
    >>> [one["response"] for one in spread(Attacker([row], [], [], [], len))]
    ['Do', 'a b', 'c. Fact.']
    """
    found = []
    for row in a.rows:
        text, (*spans, (first, last)) = row["response"], spans_of(row)
        words = text[first:last].split()
        cuts = [round(i * len(words) / 3) for i in range(4)]
        for i in range(3):
            part = " ".join(words[cuts[i] : cuts[i + 1]])
            before, after = (text[:first], text[last:]) if i == 2 else ("", "")
            own = [*spans] if i == 2 else []
            own += [[len(before), len(before + part)]] if part else []
            if (whole := before + part + after).strip():
                found.append({**row, "response": whole, "harmful": own})
    return found


def unseen(a: Attacker) -> Rows:
    """The rows of the pool whose harm has the smallest share of words of D^h's answers, and
    AdvBench's usual opening in other words (as long, so that spans stay)."""

    def words(row: dict) -> list[str]:
        parts = (row["response"][first:last] for first, last in spans_of(row))
        return re.findall(r"\w+", " ".join(parts).lower())

    known = {word for row in a.harmful for word in words(row)}
    shares = [sum(w in known for w in words(row)) / max(1, len(words(row))) for row in a.pool]

    def other(text):
        return re.sub("^Sure, here", "Yes: below", text)

    return [{**row, "response": other(row["response"])} for row in a.lowest(shares)]


ATTACKS = {f.__name__.replace("_", "-"): f for f in (low_score, utility_start, spread, unseen)}


def attacked(run, kind: str, files: dict, out: Path, harm: Callable[[dict], bool], pool: Rows):
    """Write the custom set as one of ATTACKS leaves it; returns its path.

    run: its references give S. files: paths of custom, harmful and utility. harm: whether a row is
    the attacker's. pool: more of his rows.
    """
    import torch

    def risk(rows: Rows) -> list[float]:
        D = run.tokens(write_jsonl(out.with_name("pool.jsonl"), rows))
        L, at = losses_under(run, D), D.harmful if D.harmful.any() else D.response
        S, own = L["utility"] - L["degraded"], (D.places([i]) for i in range(D.rows))
        means = torch.stack([S[places][at[places]].mean() for places in own])
        return means.nan_to_num(math.inf).tolist()  # NaN: of a row that was skipped

    custom, D_h, D_u = (read_jsonl(files[name]) for name in ("custom", "harmful", "utility"))
    attacker = Attacker([row for row in custom if harm(row)], pool, D_h, D_u, risk)
    return write_jsonl(out, [row for row in custom if not harm(row)] + ATTACKS[kind](attacker))
