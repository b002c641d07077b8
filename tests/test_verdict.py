"""Does it still refuse? The verdict says what the intervals allow, and no more.

Each line of verdicts.jsonl has the measures of some methods, by the levels below, perhaps their
differences on the same prompts, and what the verdict says of them and what it never says.
"""

import pytest
from helpers import each_line

from toss.audit.evaluate import Evaluated
from toss.audit.measures import Cell
from toss.audit.runs import meaning
from toss.audit.verdict import AGAINST, cautions, verdict

LEVELS = {
    "low": Cell(0.05, 50, 0.0, 0.1),
    "middle": Cell(0.5, 50, 0.4, 0.6),
    "high": Cell(0.95, 50, 0.9, 1.0),
    "wide": Cell(0.5, 50, 0.0, 1.0),
    # Of differences
    "apart": Cell(0.04, 50, 0.025, 0.059),
    "alike": Cell(0.04, 50, -0.1, 0.2),
    "unsure": Cell(0.167, 50, -0.104, 0.448),
    "sure": Cell(0.0, 50, -0.02, 0.02),
}


def found_of(table: dict, paired: dict) -> Evaluated:
    """What was evaluated; a difference that is not given excludes 0 where intervals are apart."""
    differences = {}
    for other in AGAINST:
        differences[other] = {}
        for method, row in table.items():
            cells = differences[other][method] = {}
            for name, cell in row.items():
                if name in table[other]:
                    minus = table[other][name]
                    ends = (cell.low - minus.high, cell.high - minus.low)
                    cells[name] = Cell(cell.value - minus.value, 50, *ends)
                if name in paired.get(other, {}).get(method, {}):
                    cells[name] = LEVELS[paired[other][method][name]]
    return Evaluated(table, differences, {}, [])


@each_line("verdicts.jsonl")
def test_the_verdict_says_what_the_intervals_allow(case):
    known = ("case", "says", "never", "paired")
    table = {}
    for method in case.keys() - known:
        table[method] = {name: LEVELS[level] for name, level in case[method].items()}
    found = found_of(table, case.get("paired", {}))
    text = "\n".join(verdict(found))
    assert [words for words in case["says"] if words not in text] == []
    assert [words for words in case.get("never", []) if words in text] == []


@pytest.mark.parametrize(
    ("method", "words"),
    [("random", "without the loss of random tokens"), ("ema", "the method ema")],
)
def test_each_method_is_explained(method, words):
    assert meaning({"settings": {"method": method}}) == words


def test_methods_that_were_made_otherwise_are_marked():
    records = {
        "sft": {"settings": {"lr": 0.1}, "code": {"toss/loss.py": "1"}},
        "toss": {"settings": {"lr": 0.2}, "code": {"toss/loss.py": "2"}},
    }
    found = Evaluated(dict.fromkeys(["base", "sft", "toss", "x"], {}), {}, {}, [])
    assert cautions(records, found) == [
        "warning: toss was made otherwise than sft (lr 0.2, not 0.1; other code: toss/loss.py): "
        "this is no comparison of the two",
        "note: x was made elsewhere; how it was trained is not known here",
    ]
