"""Standalone SVG text: lines with bands, dots with whiskers, histograms, and a row of tokens.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; dashes and markers
differ too, for grey print, and a line is thinner than those below it. Sizes are in SVG units.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np

from model.io import InputError
from toss.audit.tokens import Mask, Token, harmless

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
START, END, LINE, WIDE = 20, 840, 36, 10.2  # of a row: ends and height of a line, a character
Span = tuple[float, float]


def line_chart(
    lines: dict[str, list[tuple]],
    title: str,
    x_label: str,
    y_label: str,
    y_range: Span | None = None,
    names: Sequence[str] = (),
) -> str:
    """One line per name, through its points in the given order, as SVG text.

    A point is (x, y) or (x, y, low, high). With the latter a light band spans low to high, or a
    whisker where the line has one point. y_range: the least that the y axis shows. names: of the
    places x = 0, 1, ...; then the points there are drawn side by side, with whiskers and no lines.
    Raises InputError for a value that is not finite.
    """
    drawn = [point for points in lines.values() for point in points]
    if not drawn:
        return drawing(title)
    x = (-0.5, len(names) - 0.5) if names else widened(title, [point[0] for point in drawn])
    y = widened(title, [value for point in drawn for value in point[1:]] + list(y_range or ()))
    bands, strokes = [], []  # no band may cover a line
    for k, points in enumerate(lines.values()):
        aside = (k - (len(lines) - 1) / 2) * 0.7 / len(lines) if names else 0
        points = [(point[0] + aside, *point[1:]) for point in points]
        ends = [(point[0], *point[2:]) for point in points if len(point) == 4]
        if names or len(ends) == 1:
            bands += [("whisker", k, [(x, low), (x, high)]) for x, low, high in ends]
        elif ends:
            low, high = ([(end[0], end[side]) for end in ends] for side in (1, 2))
            bands.append(("area", k, high + low[::-1]))
        path = [point[:2] for point in points]
        strokes += [] if names else [("line", k, path)]
        every = math.ceil(len(path) / 8) or 1  # at other places than those of equal lines
        strokes.append(("markers", k, path[k % every :: every]))
    y_ticks = [(y, f"{y:,.9g}") for y in ticks(*y, most=6, around=True)]
    return drawing(title, (x_label, y_label), x, y_ticks, bands + strokes, list(lines), names)


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
    values = {name: np.asarray(group, dtype=float) for name, group in groups.items()}
    if not sum(map(len, values.values())):
        return drawing(title)
    mark = [] if threshold is None else [threshold]
    x = low, high = widened(title, np.concatenate([*values.values(), mark]))
    counts = np.array([np.histogram(group, bins, x)[0] for group in values.values()])
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    floor = math.floor(math.log10(shares[shares > 0].min()) - 1e-9)
    sides = np.linspace(low, high, bins + 1).repeat(2).tolist()
    heights = np.log10(np.maximum(shares, 10.0**floor)).repeat(2, axis=1).tolist()
    edges = [list(zip(sides, [floor, *height, floor])) for height in heights]
    shapes = [(kind, k, edge) for kind in ("area", "line") for k, edge in enumerate(edges)]
    shapes += [("line", len(edges), [(x, floor), (x, 0)]) for x in mark]
    legend = [f"{name} (n = {len(group):,})" for name, group in values.items()]
    legend += [f"threshold {x:.3g}" for x in mark]
    y_ticks = [(y, f"{10.0**y:g}") for y in range(floor, 1)]
    return drawing(title, (x_label, "share of the group"), x, y_ticks, shapes, legend)


def drawing(
    title: str,
    labels: tuple[str, str] = ("", ""),
    x: Span = (0, 1),
    y_ticks: Sequence[tuple[float, str]] = ((0, ""), (1, "")),
    shapes: Sequence[tuple] = (),
    legend: Sequence[str] = (),
    names: Sequence[str] = (),
) -> str:
    """Shapes in a frame; without shapes, a line that says so.

    labels: of the axes. x: its range. y_ticks: places with names; the first and the last bound the
    plotting area. shapes: (kind, k, points), k the place of its name in the legend, kind "line",
    "whisker", "area" or "markers". names: of the places x = 0, 1, ...; without any, x has numbers.
    """
    heading, (low, high) = textwrap.wrap(title, 44) or [""], x
    bottom, top, above = y_ticks[0][0], y_ticks[-1][0], 24 + 22 * len(heading)
    x_ticks = list(enumerate(names)) or [(x, f"{x:,.9g}") for x in ticks(low, high, most=8)]

    def across(x):
        return round(LEFT + (x - low) / (high - low) * (RIGHT - LEFT), 1)

    def down(y):
        return round(above + (top - y) / (top - bottom) * PLOT, 1)

    entries, x, y = [], LEFT, above + PLOT + 68
    for name in legend:
        wide = 62 + CHARACTER * len(name)
        if x > LEFT and x + wide > WIDTH:
            x, y = LEFT, y + 22
        entries.append((x, y, name))
        x += wide
    return TEMPLATES.get_template("figures.svg.jinja").render(
        **{"title": title, "heading": heading, "x_label": labels[0], "y_label": labels[1]},
        **{"width": WIDTH, "left": LEFT, "right": RIGHT, "top": above, "plot": PLOT},
        height=y + 14 if shapes else 130,
        x_ticks=[(across(x), name) for x, name in x_ticks],
        y_ticks=[(down(y), name, bottom < 0 == y < top) for y, name in y_ticks],
        shapes=[(s, k, [(across(x), down(y)) for x, y in points]) for s, k, points in shapes],
        legend=entries,
        marked=any(kind == "markers" for kind, _, _ in shapes),
    )


def picture(mask: Mask, row: int) -> str:
    """A row under a mask as coloured tokens on a white ground, as SVG text."""
    words: list[list[Token]] = []
    for token in mask.row(row):
        turn = not words or token.response != words[-1][0].response
        if turn or token.text[:1].isspace():
            words.append([])
        words[-1].append(token)
    tokens, x, y, response = [], START, 40, False
    for word in words:
        texts = [harmless(token.text.replace("\n", " ")) for token in word]  # their widths count
        turn = word[0].response != response
        if turn or x + WIDE * len("".join(texts)) > END:
            x, y, response = START, y + LINE + 6 * turn, word[0].response
            texts[0] = texts[0].lstrip()
        for token, text in zip(word, texts):
            wide, skipped = WIDE * len(text), WIDE * (len(text) - len(text.lstrip()))
            tokens += [(token, text, x, y, wide, skipped)] if text else []
            x += wide
    values = {"title": f"row {row}, {mask.label}", "height": y + LINE + 28}
    template = TEMPLATES.get_template("picture.svg.jinja")
    return template.render(tokens=tokens, limit=mask.full, **values)


def widened(title: str, values: Sequence[float]) -> Span:
    """The range of some values; if they are all equal, half a unit or more on either side."""
    if not np.isfinite(values).all():
        raise InputError(f"figure {title!r}: a value is not a finite number")
    low, high = float(min(values)), float(max(values))
    room = 0 if high - low > 1e-9 * max(abs(low), abs(high)) else max(0.5, abs(low) / 2)
    return low - room, high + room


def ticks(low: float, high: float, most: int, around: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cut a range into `most` parts or fewer.

    around: the first lies at the range's low end or below, the last at its high end or above.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (power * m for m in (1, 2, 5, 10, 20))
    step = next(size for size in steps if (high - low) / size <= most * (1 + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if around:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]
