"""Charts as standalone SVG text: lines with bands, dots with whiskers, and histograms.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; dashes and markers
differ too, for grey print, and a line is thinner than those below it. Sizes are in SVG units.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from model.io import InputError
from toss.audit.characters import harmless

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=lambda x: harmless(x) if type(x) is str else x,  # markup is done already
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
WIDTH, PLOT, LEFT, RIGHT = 520, 250, 70, 506  # PLOT: height of the plotting area
CHARACTER = 8  # width of a character, for the layout of the legend
ASIDE = 0.7  # of the room between two named places, in which their dots stand side by side
MARKERS = 8  # on a line, at most


class Shape(NamedTuple):
    """A shape of a chart: "line", "whisker", "area" or "markers"."""

    kind: str
    k: int  # the place of its name in the legend
    points: list[tuple[float, float]]


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
        return drawing(title)
    heights = [value for point in points for value in point[1:]]
    low, high = span(title, [*heights, *(y_range or ())])
    y_ticks = [(y, f"{y:,.9g}") for y in ticks(low, high, most=6)]
    x = span(title, [point[0] for point in points])
    if names:
        x = (-0.5, len(names) - 0.5)

    spreads = []
    strokes = []  # drawn last: no band may cover a line
    for k, line in enumerate(lines.values()):
        if names:
            shift = (k - (len(lines) - 1) / 2) * ASIDE / len(lines)
            line = [(point[0] + shift, *point[1:]) for point in line]
        spreads += spread_of(k, line, whiskers=bool(names))
        middle = [point[:2] for point in line]
        if not names:
            strokes.append(Shape("line", k, middle))
        every = math.ceil(len(middle) / MARKERS) or 1
        strokes.append(Shape("markers", k, middle[k % every :: every]))  # seen on equal lines, too
    return drawing(title, (x_label, y_label), x, y_ticks, spreads + strokes, list(lines), names)


def spread_of(k: int, line: list[tuple], whiskers: bool) -> list[Shape]:
    """The band, or the whiskers, of the points of a line that have low and high."""
    lower = [(point[0], point[2]) for point in line if len(point) == 4]
    upper = [(point[0], point[3]) for point in line if len(point) == 4]
    if whiskers or len(lower) == 1:
        return [Shape("whisker", k, list(ends)) for ends in zip(lower, upper)]
    if not lower:
        return []
    return [Shape("area", k, upper + lower[::-1])]


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
        return drawing(title)
    if threshold is not None:
        everything = np.append(everything, threshold)
    x = span(title, everything)
    counts = np.array([np.histogram(group, bins, x)[0] for group in values])
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    floor = math.floor(math.log10(shares[shares > 0].min()) - 1e-9)
    y_ticks = [(y, f"{10.0**y:g}") for y in range(floor, 1)]

    # Each outline is a flight of steps: both sides of each bin at the height of its share.
    sides = np.linspace(*x, bins + 1).repeat(2).tolist()
    heights = np.log10(np.maximum(shares, 10.0**floor)).repeat(2, axis=1).tolist()
    outlines = [list(zip(sides, [floor, *height, floor])) for height in heights]
    shapes = [Shape("area", k, outline) for k, outline in enumerate(outlines)]
    shapes += [Shape("line", k, outline) for k, outline in enumerate(outlines)]
    legend = [f"{name} (n = {len(group):,})" for name, group in groups.items()]
    if threshold is not None:
        shapes.append(Shape("line", len(outlines), [(threshold, floor), (threshold, 0)]))
        legend.append(f"threshold {threshold:.3g}")
    return drawing(title, (x_label, "share of the group"), x, y_ticks, shapes, legend)


def drawing(
    title: str,
    labels: tuple[str, str] = ("", ""),
    x: tuple[float, float] = (0, 1),
    y_ticks: Sequence[tuple[float, str]] = ((0, ""), (1, "")),
    shapes: Sequence[Shape] = (),
    legend: Sequence[str] = (),
    names: Sequence[str] = (),
) -> str:
    """Shapes in a frame; without shapes, a line that says so.

    labels: of the axes. x: its range. y_ticks: places with names; the first and the last bound the
    plotting area. names: of the places x = 0, 1, ...; without any, x has numbers.
    """
    heading = textwrap.wrap(title, 44) or [""]
    above = 24 + 22 * len(heading)
    left, right = x
    bottom = y_ticks[0][0]
    top = y_ticks[-1][0]
    x_ticks = list(enumerate(names))
    if not names:
        room = 1e-9 * (right - left)
        inside = [x for x in ticks(left, right, most=8) if left - room <= x <= right + room]
        x_ticks = [(x, f"{x:,.9g}") for x in inside]

    def across(place: float) -> float:
        return round(LEFT + (place - left) / (right - left) * (RIGHT - LEFT), 1)

    def down(height: float) -> float:
        return round(above + (top - height) / (top - bottom) * PLOT, 1)

    entries, end = legend_places(legend, above + PLOT + 68)
    return TEMPLATES.get_template("figures.svg.jinja").render(
        title=title,
        heading=heading,
        x_label=labels[0],
        y_label=labels[1],
        width=WIDTH,
        height=end + 14 if shapes else 130,
        left=LEFT,
        right=RIGHT,
        top=above,
        plot=PLOT,
        across=across,
        down=down,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        zero=bottom < 0 < top,
        shapes=shapes,
        legend=entries,
        marked=any(shape.kind == "markers" for shape in shapes),
    )


def legend_places(legend: Sequence[str], y: int) -> tuple[list[tuple[int, int, str]], int]:
    """Where each name of the legend stands, from y down, and the y of the last line."""
    entries = []
    x = LEFT
    for name in legend:
        wide = 62 + CHARACTER * len(name)
        if x > LEFT and x + wide > WIDTH:
            x = LEFT
            y += 22
        entries.append((x, y, name))
        x += wide
    return entries, y


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


def ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cut a range into `most` parts or fewer.

    The first lies at the range's low end or below, the last at its high end or above.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = [power * factor for factor in (1, 2, 5, 10, 20)]
    step = next(step for step in steps if (high - low) / step <= most * (1 + 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]
