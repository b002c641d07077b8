"""Tables of cells, {line: {measure: Cell}}: as text, as Markdown, over seeds.

A line is named by a text, or by several, one for each column that names it.
"""

import fnmatch
import statistics
from collections.abc import Iterable, Sequence

from toss.audit.characters import harmless
from toss.audit.measures import Cell, Table

# The heads of columns, where they are not the names of the measures.
HEADS = {
    "refusals_kept": "refusals kept",
    "over_refusal": "over-refusal",
    "accuracy/benign-rows": "benign facts",
    "accuracy/harmful-rows": "harmful-row facts",
    "auc": "AUC",
    "seconds_to_sft": "x sft",
    "tokens_to_sft": "x sft",
    "peak_memory_gib": "peak GiB",
    "discard": "d",
}
COSTS = ["seconds", "seconds_to_sft", "tokens", "tokens_to_sft", "peak_memory_gib"]
DIGITS = {"nll": 3, "discard": 3, "seconds": 0, "tokens": 0}  # of others: 2


def text_of(cell: Cell | None, digits: int = 3, sign: str = "") -> str:
    """A value, with its range where it has one.

    sign: "+" for a difference; a star if its interval excludes 0.

    >>> text_of(Cell(0.1, 50, 0.05, 0.15), sign="+")
    '+0.100 [+0.050, +0.150]*'
    """
    if cell is None or cell.value is None:
        return "-"
    form = f"{sign},.{digits}f"
    value = format(cell.value, form)
    if cell.low is None or cell.low == cell.high:  # of one row, or of one seed
        return value
    star = "*" if sign and (cell.low > 0 or cell.high < 0) else ""
    return f"{value} [{cell.low:{form}}, {cell.high:{form}}]{star}"


def grid(
    table: Table, measures: Iterable[str], corner: Sequence[str] = ("",)
) -> tuple[list, list[list]]:
    """Header and lines of a table: its lines down, measures across; without what nobody has.

    measures: names, or patterns such as accuracy*. corner: heads of the columns that name the
    lines.
    """
    names = []
    for measure in measures:
        names += fnmatch.filter(measures_met(table), measure)
    lines = []
    for line, row in table.items():
        cells = []
        for name in names:
            digits = DIGITS.get(name, 2)
            cells.append(text_of(row.get(name), digits))
        if row.keys() & set(names):
            lines.append([*line[-len(corner) :], *cells])
    heads = [HEADS.get(name, name) for name in names]
    return [*corner, *heads], lines


def down(table: Table, corner: str = "", sign: str = "") -> tuple[list, list[list]]:
    """Header and lines with the measures down: where there are many measures. sign: see text_of."""
    lines = []
    for name in measures_met(table):
        cells = [text_of(row.get(name), sign=sign) for row in table.values()]
        lines.append([name, *cells])
    return [corner, *table], lines


def measures_met(table: Table) -> list[str]:
    """The names of the measures that some line has."""
    names = {}
    for row in table.values():
        names |= row
    return list(names)


def difference_tables(paired: dict[str, Table]) -> list[tuple]:
    """The header and lines of the differences to each other model. paired: by what is
    subtracted."""
    return [down(table, f"minus {other}", "+") for other, table in paired.items()]


def markdown(header: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns also line up in a terminal.

    >>> print(markdown(["", "toss"], [["not_refused", 0.25], ["nll", 1]]))
    |             | toss |
    |-------------|------|
    | not_refused | 0.25 |
    | nll         | 1    |
    """
    rows = [[on_one_line(item) for item in row] for row in (header, *lines)]
    widths = [max(len(item) for item in column) for column in zip(*rows)]
    text = []
    for row in rows:
        items = [item.ljust(width) for item, width in zip(row, widths)]
        text.append(f"| {' | '.join(items)} |")
    rule = "|".join("-" * (width + 2) for width in widths)
    text.insert(1, f"|{rule}|")
    return "\n".join(text)


def on_one_line(item: object) -> str:
    r"""A cell's text. It may come from a file, and must not control a terminal or end the line.

    >>> on_one_line("a\nb\x1b[2J")
    'a b<1b>[2J'
    """
    return harmless(str(item)).replace("\n", " ")


def over_seeds(tables: Iterable[Table]) -> Table:
    """Mean, number, least and most of each measure of each line over the seeds' tables."""
    values = {}
    for table in tables:
        for line, row in table.items():
            for measure, cell in row.items():
                values.setdefault((line, measure), []).append(cell.value)
    summary = {}
    for (line, measure), found in values.items():
        mean = round(statistics.fmean(found), 4)
        summary.setdefault(line, {})[measure] = Cell(mean, len(found), min(found), max(found))
    return summary
