"""Charts as standalone SVG text: of a table, lines, histograms; and a row as coloured tokens.

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
ASIDE = 0.7  # of the room between two named places, in which their dots stand side by side


# Of a row's picture: where lines begin, end, and end before a space; a line's height, a character's
# width.
START, END, LATE, LINE, WIDE = 20, 840, 740, 36, 10.2


def picture_of(table: Table, measures: Sequence[str], title: str) -> str:
    """Measures of each line of a table: over k where they are NAME@k, else side by side; "" without
    any. Bands and whiskers span low to high."""
    names = measures_of(table, measures)
    over_k = bool(names) and all("@" in name for name in names)
    lines = {}
    for line, row in table.items():
        points = []
        for place, name in enumerate(names):
            if name in row:
                x = int(name.rpartition("@")[2]) if over_k else place
                cell = row[name]
                ends = [] if cell.low is None else [cell.low, cell.high]
                points.append((x, cell.value, *ends))
        label = line if isinstance(line, str) else " ".join(part for part in line[::-1] if part)
        if points:
            lines[label] = points
    if not lines:
        return ""
    if over_k:
        y_label = names[0].partition("@")[0]
        return line_chart(
            lines, title, "tokens of a harmful answer already written", y_label, (0, 1)
        )
    heads = [HEADS.get(name, name) for name in names]
    return line_chart(lines, title, "", "", (0, 1), heads)


def line_chart(
    lines: dict[str, list[tuple]],
    title: str,
    x_label: str,
    y_label: str,
    y_range: Sequence[float] = (),
    names: Sequence[str] = (),
) -> str:
    """One line per name, through its points in the given order, as SVG text.

    A point is (x, y) or (x, y, low, high). With the latter a light band spans low to high, or a
    whisker where the line has one point. y_range: the least that the y axis shows. names: of the
    places x = 0, 1, ...; then the points there are drawn side by side, with whiskers and no lines.
    Raises InputError for a value that is not finite.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        return drawing(title=title)
    # The ranges of both axes, from all points.
    heights = [value for point in points for value in point[1:]]
    low, high = span(title, [*heights, *y_range])
    x = span(title, [point[0] for point in points])
    x_ticks = ticks(*x, most=8)
    if names:
        x = (-0.5, len(names) - 0.5)
        x_ticks = list(enumerate(names))

    # Each line, with its band or its whiskers; beside named places the lines are shifted, so that
    # they do not hide each other.
    shapes = []
    for k, line in enumerate(lines.values()):
        if names:
            shift = (k - (len(lines) - 1) / 2) * ASIDE / len(lines)
            line = [(place + shift, *values) for place, *values in line]
        ranges = [point for point in line if len(point) == 4]
        lower = [(place, least) for place, _, least, _ in ranges]
        upper = [(place, most) for place, _, _, most in ranges]
        if names or len(ranges) == 1:
            shapes += [("whisker", k, ends) for ends in zip(lower, upper)]
        elif ranges:
            shapes.append(("area", k, upper + lower[::-1]))
        shapes.append(("dots" if names else "line", k, [point[:2] for point in line]))
    return drawing(
        title=title,
        labels=(x_label, y_label),
        x=x,
        x_ticks=x_ticks,
        y_ticks=ticks(low, high, most=6),
        shapes=shapes,
        legend=list(lines),
    )


def histogram(
    groups: dict[str, Sequence[float]],
    title: str,
    x_label: str,
    threshold: float | None = None,
    bins: int = 60,
) -> str:
    """Outlined histograms over one another, as SVG text: the share of each group per bin.

    Shares, so that groups of different size can be compared; n stands in the legend. The y axis is
    logarithmic, with empty bins on its floor. threshold: a value of x to mark. Raises InputError
    for a value that is not finite.
    """
    values = [np.asarray(group, dtype=float) for group in groups.values()]
    everything = np.concatenate(values)
    if len(everything) == 0:
        return drawing(title=title)
    if threshold is not None:
        everything = np.append(everything, threshold)
    x = span(title, everything)
    counts = np.array([np.histogram(group, bins, x)[0] for group in values])
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    floor = math.floor(math.log10(shares[shares > 0].min()) - 1e-9)

    # Each outline is a flight of steps: both sides of each bin at the height of its share.
    sides = np.linspace(*x, bins + 1).repeat(2).tolist()
    heights = np.log10(np.maximum(shares, 10.0**floor)).repeat(2, axis=1).tolist()
    shapes = []
    for k, height in enumerate(heights):
        outline = list(zip(sides, [floor, *height, floor]))
        shapes += [("area", k, outline), ("outline", k, outline)]
    legend = [f"{name} (n = {len(group):,})" for name, group in groups.items()]
    if threshold is not None:
        shapes.append(("outline", len(groups), [(threshold, floor), (threshold, 0)]))
        legend.append(f"threshold {threshold:.3g}")
    return drawing(
        title=title,
        labels=(x_label, "share of the group"),
        x=x,
        x_ticks=ticks(*x, most=8),
        y_ticks=[(y, f"{10.0**y:g}") for y in range(floor, 1)],
        shapes=shapes,
        legend=legend,
    )


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


def drawing(**values) -> str:
    """A chart as SVG text. values: see figures.svg.jinja; with a title alone it says so."""
    return TEMPLATES.get_template("figures.svg.jinja").render(values)


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


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Multiples of 1, 2 or 5 times a power of ten that cut a range into `most` parts or fewer, each
    with its name.

    The first lies at the range's low end or below, the last at its high end or above.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = [power * factor for factor in (1, 2, 5, 10, 20)]
    step = next(step for step in steps if (high - low) / step <= most * (1 + 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [(float(f"{k * step:.12g}"), f"{k * step:,.9g}") for k in range(first, last + 1)]
