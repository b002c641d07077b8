"""Does it still refuse? The verdict of the page says what the intervals allow, and no more.

Each line of verdicts.jsonl has the measures of some methods, by the levels below, perhaps their
differences on the same prompts, and what the verdict says of them and what it never says.
"""

from helpers import each_line

from toss.audit.command import safety_caution
from toss.audit.verdict import meaning, verdict

LEVELS = {
    "low": (0.05, 0.0, 0.1),
    "middle": (0.5, 0.4, 0.6),
    "high": (0.95, 0.9, 1.0),
    "wide": (0.5, 0.0, 1.0),
    # Of differences
    "apart": (0.04, 0.025, 0.059),
    "alike": (0.04, -0.1, 0.2),
    "unsure": (0.167, -0.104, 0.448),
    "sure": (0.0, -0.02, 0.02),
}


def cells_of(levels: str | dict) -> dict:
    """The same with a cell for each level."""
    if isinstance(levels, dict):
        return {name: cells_of(level) for name, level in levels.items()}
    value, low, high = LEVELS[levels]
    return {"value": value, "n": 50, "low": low, "high": high}


@each_line("verdicts.jsonl")
def test_the_verdict_says_what_the_intervals_allow(case):
    case = dict(case)
    case.pop("case")
    says = case.pop("says")
    never = case.pop("never", [])
    paired = cells_of(case.pop("paired", {}))
    table = cells_of(case)
    sentences, limits = verdict(table, paired, False)
    text = "\n".join([*sentences, *limits, *safety_caution(table, paired)])
    assert [words for words in says if words not in text] == []
    assert [words for words in never if words in text] == []


@each_line("meanings.jsonl")
def test_each_method_is_explained(case):
    assert meaning(case["method"], {"settings": case["settings"]}) == case["words"]


def test_without_intervals_there_is_no_verdict():
    cells = {"not_refused": {"value": 0.5, "n": 1, "low": None, "high": None}}
    assert verdict(dict.fromkeys(("base", "sft", "toss"), cells), {}, False) is None
