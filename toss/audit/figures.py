"""Charts as standalone SVG text: lines, a table's measures, histograms; a row in colours.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; dashes and markers
differ too, for grey print, and a line is thinner than those below it. Sizes are in SVG units.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np

from model.io import InputError
from toss.audit.characters import harmless
from toss.audit.measures import Table
from toss.audit.tables import HEADS, measures_of

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=lambda x: harmless(x) if type(x) is str else x,  # markup is done already
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
BINS = 60  # of a histogram

# Of a row's picture: where lines begin, end, and end before a space; a line's height, a character's
# width.
START, END, LATE, LINE, WIDE = 20, 840, 740, 36, 10.2

Ticks = list[tuple[float, str]]  # places on an axis, with their names


def line_chart(
    lines: dict[str, list[tuple]],
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Ticks | None = None,
    y_ticks: Ticks | None = None,
) -> str:
    """One line per name, through its points in the given order, as SVG text.

    A point is (x, y) or, with a whisker, (x, y, low, high). Ticks are at round numbers unless
    given. Raises InputError for a value that is not finite.
    """
    template = TEMPLATES.get_template("figures.svg.jinja")
    points = [point for line in lines.values() for point in line]
    if not points:
        return template.render(title=title)
    x = span(title, [point[0] for point in points])
    if x_ticks:  # room for their names
        x = (x_ticks[0][0] - 0.5, x_ticks[-1][0] + 0.5)
    heights = [value for point in points for value in point[1:]]
    y = span(title, heights)
    whiskers = []  # (which line, its two ends)
    for k, line in enumerate(lines.values()):
        for place, _, *ends in line:
            if ends:
                whiskers.append((k, [(place, end) for end in ends]))
    return template.render(
        title=title,
        labels=(x_label, y_label),
        x=x,
        x_ticks=x_ticks or ticks(*x, most=8),
        y_ticks=y_ticks or ticks(*y, most=6),
        whiskers=whiskers,
        lines={name: [point[:2] for point in line] for name, line in lines.items()},
    )


def picture_of(table: Table, measures: Sequence[str], title: str) -> str:
    """Measures of each line (run, method) of a table, one beside the other; "" without any. A
    whisker spans low to high."""
    names = measures_of(table, measures)
    lines = {}
    heights = [0.0, 1.0]
    for line, row in table.items():
        points = []
        for place, name in enumerate(names):
            if name in row:
                cell = row[name]
                ends = [] if cell.low is None else [cell.low, cell.high]
                points.append((place, cell.value, *ends))
                heights += [cell.value, *ends]
        if points:
            lines[" ".join(line[::-1])] = points
    if not lines:
        return ""
    y_ticks = ticks(*span(title, heights), most=6)
    x_ticks = []
    y_label = ""
    for place, name in enumerate(names):
        kind, begun, k = name.partition("@")
        if begun:
            y_label = kind
        x_ticks.append((place, f"@{k}" if begun else HEADS.get(name, name)))
    return line_chart(lines, title, "", y_label, x_ticks, y_ticks)


def histogram(
    groups: dict[str, Sequence[float]], title: str, x_label: str, threshold: float | None = None
) -> str:
    """Histograms over one another, as SVG text: the share of each group per bin.

    Shares, so that groups of different size can be compared; n stands in the legend. The y axis is
    logarithmic, with empty bins on its floor. threshold: a value of x to mark. Raises InputError
    for a value that is not finite.
    """
    values = [np.asarray(group, dtype=float) for group in groups.values()]
    everything = np.concatenate(values)
    if threshold is not None:
        everything = np.append(everything, threshold)
    if len(everything) == 0:
        return line_chart({}, title, "", "")
    edges = np.linspace(*span(title, everything), BINS + 1)
    shares = []
    for group in values:
        counts, _ = np.histogram(group, edges)
        shares.append(counts / max(1, len(group)))
    least = min(share[share > 0].min() for share in shares if share.any())
    floor = math.floor(math.log10(least) - 1e-9)

    # Each outline is a flight of steps: both sides of each bin at the height of its share.
    sides = edges.repeat(2).tolist()
    lines = {}
    for (name, group), share in zip(groups.items(), shares):
        heights = np.log10(np.maximum(share, 10.0**floor))
        steps = [floor, *heights.repeat(2).tolist(), floor]
        lines[f"{name} (n = {len(group):,})"] = list(zip(sides, steps))
    if threshold is not None:
        lines[f"threshold {threshold:.3g}"] = [(threshold, floor), (threshold, 0)]
    y_ticks = [(y, f"{10.0**y:g}") for y in range(floor, 1)]
    return line_chart(lines, title, x_label, "share of the group", y_ticks=y_ticks)


def row_picture(mask, row: int) -> str:
    """A row of the custom set under a tokens.Mask, as coloured tokens. InputError for a row that
    does not exist."""
    placed = []  # (token, text, x, y)
    x = START
    y = 40
    previous = False
    for token in mask.row(row):
        text = harmless(token.text.replace("\n", " "))  # its width counts
        new_turn = token.response != previous
        end = LATE if text[:1].isspace() else END  # words stay whole where they are short
        if new_turn or x + WIDE * len(text) > end:
            x = START
            y += LINE + 6 * new_turn
            previous = token.response
            text = text.lstrip()
        placed.append((token, text, x, y))
        x += WIDE * len(text)
    return TEMPLATES.get_template("row_picture.svg.jinja").render(
        title=f"row {row}, {mask.label}",
        height=y + LINE + 28,
        limit=mask.full_colour,
        wide=WIDE,
        placed=placed,
    )


def span(title: str, values: Sequence[float]) -> tuple[float, float]:
    """The range of some values; if they are all equal, half a unit or more on either side."""
    if not np.isfinite(values).all():
        raise InputError(f"figure {title!r}: a value is not a finite number")
    low = float(np.min(values))
    high = float(np.max(values))
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    room = max(0.5, abs(low) / 2)
    return low - room, high + room


def ticks(low: float, high: float, most: int) -> Ticks:
    """Multiples of 1, 2 or 5 times a power of ten that cut a range into `most` parts or fewer.

    The first lies at the range's low end or below, the last at its high end or above.
    """
    least = (high - low) / most * (1 - 1e-9)
    power = 10.0 ** math.floor(math.log10(least))
    step = min(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    found = []
    for k in range(first, last + 1):
        place = float(f"{k * step:.12g}")
        found.append((place, f"{place:,.9g}"))
    return found
