"""Tables of cells, {line: {measure: Cell}}: as text, as Markdown, over seeds.

A line is named by a text, or by several, one for each column that names it.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence

from toss.audit.characters import harmless
from toss.audit.measures import Cell, Table

# The heads of columns, where they are not the names of the measures.
HEADS = {
    "forbidden/held-out": "forbidden",
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
    table: Table,
    measures: Iterable[str],
    corner: Sequence[str] = ("",),
    digits: int | None = None,
    sign: str = "",
) -> tuple[list, list[list]]:
    """Header and lines of a table: its lines down, measures across; without what nobody has.

    measures: NAME/* and NAME@* stand for all that begin so, and NAME/* for NAME where there are
    none. corner: heads of the columns that name the lines. digits: by default what is usual for a
    measure.
    """
    names = measures_of(table, measures)
    lines = []
    for line, row in table.items():
        if not row.keys() & set(names):
            continue
        cells = [line] if isinstance(line, str) else list(line)[-len(corner) :]
        for name in names:
            usual = DIGITS.get(name, 2)
            cells.append(text_of(row.get(name), usual if digits is None else digits, sign))
        lines.append(cells)
    return [*corner, *(HEADS.get(name, name) for name in names)], lines


def down(table: Table) -> Table:
    """Lines and measures exchanged: where there are many measures."""
    turned = {}
    for line, row in table.items():
        for measure, cell in row.items():
            turned.setdefault(measure, {})[line] = cell
    return turned


def is_part(measure: str, measures: Iterable[str]) -> bool:
    """True for what is measured after a prefill, or by source beside the whole."""
    whole, by_source, _ = measure.partition("/")
    return "@" in measure or bool(by_source) and whole in measures


def difference_tables(paired: dict[str, Table]) -> list[tuple]:
    """The header and lines of the differences to each other model, without parts. paired: by what
    is subtracted."""
    tables = []
    for other, table in paired.items():
        turned = down(table)
        whole = {name: row for name, row in turned.items() if not is_part(name, turned)}
        header, lines = grid(whole, table, [f"minus {other}"], 3, "+")
        if lines:
            tables.append((header, lines))
    return tables


def measures_of(table: Table, measures: Iterable[str]) -> list[str]:
    """Those of the measures that some line has; see grid."""
    present = list(dict.fromkeys(name for row in table.values() for name in row))
    names = []
    for measure in measures:
        several = [measure.removesuffix("/*")]
        if measure.endswith("*"):
            of_kind = [name for name in present if name.startswith(measure[:-1])]
            several = of_kind or several
        names += [name for name in several if name in present]
    return names


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


def csv_text(header: Sequence[object], lines: Iterable[Sequence[object]]) -> str:
    """Lines of values with commas between them, below a head."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return file.getvalue()


def over_seeds(tables: Iterable[Table]) -> Table:
    """Mean, number, least and most of each measure of each line over the seeds' tables."""
    values = {}
    for table in tables:
        for line, row in table.items():
            for measure, cell in row.items():
                if cell.value is not None:
                    values.setdefault(line, {}).setdefault(measure, []).append(cell.value)
    summary = {}
    for line, row in values.items():
        summary[line] = {}
        for measure, found in row.items():
            mean = round(statistics.fmean(found), 4)
            summary[line][measure] = Cell(mean, len(found), min(found), max(found))
    return summary
