"""Charts as standalone SVG text: lines with bands, and histograms. They need no page, no style sheet, no library.

Colours are Okabe and Ito's, which colour-blind people can tell apart; dashes and markers differ too, for grey print.
Sizes are in SVG units, on a drawing WIDTH wide that scales with its page.
"""

import html
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError
from model.files import file_beside

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#808080")
DASHES = ("none", "8 4", "2 3", "10 3 2 3", "5 2", "12 4", "1 2 6 2", "4 4")  # nine lines and more share a pair
MARKERS = {  # around (0, 0), about 8 across
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "square": "M-3.5 -3.5h7v7h-7z", "triangle": "M0 -4.5L4.5 3.5h-9z",
    "diamond": "M0 -5L5 0L0 5L-5 0z", "down": "M0 4.5L4.5 -3.5h-9z", "bar": "M-1.5 -5h3v10h-3z", "flat": "M-5 -1.5h10v3h-10z",
}  # fmt: skip
WIDTH, PLOT, LEFT, RIGHT = 640, 270, 76, 16  # PLOT: height of the plotting area
FONT, CHARACTER = 14, 8  # text height and, for the layout, the width of a character


@dataclass
class Axes:
    """The plotting area: values from x = (low, high) and, upward, the first to the last y tick, onto the drawing."""

    x: tuple[float, float]
    y_ticks: list[float]
    top: float  # units below the drawing's upper edge
    log_y: bool = False  # y is log10 of what the ticks say

    @property
    def y(self) -> tuple[float, float]:
        return self.y_ticks[0], self.y_ticks[-1]

    def at(self, x: float, y: float) -> str:
        """A point of the drawing, as "x,y"."""
        right = LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)
        down = self.top + (self.y[1] - y) / (self.y[1] - self.y[0]) * PLOT
        return f"{right:.1f},{down:.1f}"


def line_chart(lines: dict[str, list[tuple]], title: str, x_label: str, y_label: str,
               y_range: tuple[float, float] | None = None) -> str:
    """One line a name, through its points in the given order, as SVG text.

    A point is (x, y), or (x, y, low, high): then a light band spans low to high, or a whisker where the line has one
    point. y_range: what the y axis shows at least; it grows where a point lies outside. Raises InputError for a value
    that is not finite or a line whose points are of two kinds.
    """
    for name, points in lines.items():
        if {len(point) for point in points} not in (set(), {2}, {4}):
            raise InputError(f"figure {title!r}: the points of {name!r} must all be (x, y) or all be (x, y, low, high)")
        if not all(math.isfinite(value) for point in points for value in point):
            raise InputError(f"figure {title!r}: a point of {name!r} is not a finite number")
    drawn = [point for points in lines.values() for point in points]
    if not drawn:
        return empty(title)
    x = spread([point[0] for point in drawn])
    y = spread([value for point in drawn for value in point[1:]] + list(y_range or ()))
    axes = Axes(x, enclosing_ticks(y), 24 + 22 * len(wrapped(title)))
    bands, strokes = [], []  # no band covers a line
    for k, points in enumerate(lines.values()):
        colour = COLOURS[k % len(COLOURS)]
        if points and len(points[0]) == 4:
            edge = [axes.at(px, high) for px, _, _, high in points] + [axes.at(px, low) for px, _, low, _ in reversed(points)]
            kind = (f'fill="{colour}" fill-opacity="0.15"' if len(points) > 1 else f'stroke="{colour}" stroke-width="2"')
            bands.append(f'<polygon points="{" ".join(edge)}" {kind}/>')
        strokes.append(f'<polyline points="{" ".join(axes.at(*point[:2]) for point in points)}" {stroke(k)}/>')
        every = max(1, math.ceil(len(points) / 16))
        strokes += [marker(k, axes.at(*point[:2])) for point in points[::every]]
    return document(title, x_label, y_label, axes, bands + strokes, list(lines), marker)


def dot_chart(groups: dict[str, list[tuple[float, float, float]]], names: list[str], title: str, y_label: str,
              y_range: tuple[float, float] | None = None) -> str:
    """One dot and whisker (y, low, high) a group at each of the named places, side by side, as SVG text.

    Raises InputError for a value that is not finite, or a group that has not as many dots as there are names.
    """
    for group, dots in groups.items():
        if len(dots) != len(names) or not all(math.isfinite(value) for dot in dots for value in dot):
            raise InputError(f"figure {title!r}: {group!r} needs one finite (y, low, high) for each of {len(names)} places")
    y = spread([value for dots in groups.values() for dot in dots for value in dot] + list(y_range or ()))
    axes = Axes((-0.5, len(names) - 0.5), enclosing_ticks(y), 24 + 22 * len(wrapped(title)))
    shapes = []
    for k, dots in enumerate(groups.values()):
        for place, (value, low, high) in enumerate(dots):
            x = place + (k - (len(groups) - 1) / 2) * 0.7 / len(groups)
            ends, colour = f"{axes.at(x, low)} {axes.at(x, high)}", COLOURS[k % len(COLOURS)]
            shapes += [f'<polyline points="{ends}" stroke="{colour}" stroke-width="2"/>', marker(k, axes.at(x, value))]
    return document(title, "", y_label, axes, shapes, list(groups), marker, list(enumerate(names)))


def histogram(groups: dict[str, Sequence[float] | Tensor], title: str, x_label: str, threshold: float | None = None,
              bins: int = 60, log_y: bool = False) -> str:
    """Outlined histograms over one another, as SVG text: the share of each group's values that each bin holds.

    Shares, so that groups of unlike size compare; n stands in the legend. threshold: a marked place on the x axis.
    log_y: shares on a logarithmic axis; an empty bin then lies on its floor. Raises InputError for a value that is not
    finite.
    """
    values = {name: torch.as_tensor(group, dtype=torch.float64).cpu().flatten() for name, group in groups.items()}
    for name, group in values.items():
        if not group.isfinite().all():
            raise InputError(f"figure {title!r}: a value of {name!r} is not a finite number")
    marks = [] if threshold is None else [threshold]
    if not all(map(math.isfinite, marks)):
        raise InputError(f"figure {title!r}: the threshold is not a finite number")
    ends = [float(end) for group in values.values() if len(group) for end in (group.min(), group.max())]
    if not ends:
        return empty(title)
    low, high = spread(ends + marks)
    places = {name: ((group - low) / (high - low) * bins).long().clamp(0, bins - 1) for name, group in values.items()}
    shares = {name: (torch.bincount(place, minlength=bins) / max(1, len(place))).tolist() for name, place in places.items()}
    if log_y:
        floor = math.floor(math.log10(min(share for group in shares.values() for share in group if share)) - 1e-9)
        shares = {name: [math.log10(share) if share else floor for share in group] for name, group in shares.items()}
    else:
        floor = 0
    top = 0 if log_y else max(share for group in shares.values() for share in group)
    axes = Axes((low, high), enclosing_ticks((floor, top), log_y), 24 + 22 * len(wrapped(title)), log_y)
    fills, strokes = [], []
    for k, group in enumerate(shares.values()):
        edge = [axes.at(low, floor)]
        for b, share in enumerate(group):
            left, right = (low + (high - low) * side / bins for side in (b, b + 1))
            edge += [axes.at(left, share), axes.at(right, share)]
        edge = " ".join([*edge, axes.at(high, floor)])
        fills.append(f'<polygon points="{edge}" fill="{COLOURS[k % len(COLOURS)]}" fill-opacity="0.12"/>')
        strokes.append(f'<polyline points="{edge}" {stroke(k)}/>')
    for mark in marks:
        x, end = axes.at(mark, axes.y[1]).split(","), axes.at(mark, axes.y[0]).split(",")
        side = "end" if mark > (low + high) / 2 else "start"
        strokes += [f'<path d="M{x[0]} {x[1]}V{end[1]}" stroke="#000000" stroke-width="1.5" stroke-dasharray="3 3"/>',
                    text(float(x[0]) + (6 if side == "start" else -6), axes.top + 14, f"threshold {mark:.3g}", side)]
    legend = [f"{name} (n = {len(group):,})" for name, group in values.items()]
    return document(title, x_label, "share of the group", axes, fills + strokes, legend, lambda k, point: "")


def write_svg(path: str | Path, svg: str) -> None:
    """Write a chart, beside and renamed."""
    with file_beside(path) as file:
        file.write_text(svg, encoding="utf-8")


def document(title: str, x_label: str, y_label: str, axes: Axes, shapes: list[str], legend: list[str], sign,
             x_ticks: list[tuple[float, str]] | None = None) -> str:
    """The whole drawing. sign(k, "x,y"): the k-th legend entry's marker. x_ticks: names of places in place of numbers."""
    (low, high), (bottom, top) = axes.x, axes.y
    parts = heading(title)
    for tick in axes.y_ticks:
        x, y = axes.at(low, tick).split(",")
        parts.append(f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="{"#808080" if tick == 0 and bottom < 0 else "#E0E0E0"}"/>')
        parts.append(text(LEFT - 8, float(y) + 5, f"{10.0**tick:g}" if axes.log_y else number(tick, top - bottom), "end"))
    floor = axes.top + PLOT
    for tick, name in x_ticks or [(tick, number(tick, high - low)) for tick in ticks(low, high, step(low, high, 8))]:
        x = axes.at(tick, bottom).split(",")[0]
        parts.append(f'<path d="M{x} {floor}v5" stroke="#404040"/>')
        parts.append(text(float(x), floor + 20, name, "middle"))
    parts += shapes
    parts.append(f'<path d="M{LEFT} {axes.top}V{floor}H{WIDTH - RIGHT}" stroke="#404040"/>')
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, floor + 42, x_label, "middle"))
    middle = axes.top + PLOT / 2
    parts.append(text(16, middle, y_label, "middle", f'transform="rotate(-90 16 {middle:.1f})"'))
    x, y = LEFT, floor + 68
    for k, name in enumerate(legend):
        wide = 46 + CHARACTER * len(name) + 16
        if x > LEFT and x + wide > WIDTH:
            x, y = LEFT, y + 22
        parts.append(f'<path d="M{x:.1f} {y - 5}h36" {stroke(k)}/>{sign(k, f"{x + 18:.1f},{y - 5}")}')
        parts.append(text(x + 44, y, name, "start"))
        x += wide
    return framed(title, y + 14, parts)


def empty(title: str) -> str:
    """The drawing that stands where there is nothing to draw."""
    return framed(title, 130, [*heading(title), text(WIDTH / 2, 100, "There is no data for this figure.", "middle")])


def framed(title: str, height: float, parts: list[str]) -> str:
    """Parts on a white ground, with what a screen reader needs; strokes of paths and lines are not filled."""
    name = escaped(title)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="100%" role="img" '
            f'aria-label="{name}" font-family="system-ui, sans-serif" font-size="{FONT}" fill="none">\n'
            f'<title>{name}</title>\n<rect width="{WIDTH}" height="{height:g}" fill="#FFFFFF"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    """A line of dark text; anchor: start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#202020" {more}>{escaped(words)}</text>'


def stroke(k: int) -> str:
    """How the k-th line is drawn."""
    return (f'stroke="{COLOURS[k % len(COLOURS)]}" stroke-width="2" stroke-dasharray="{DASHES[k % len(DASHES)]}" '
            'stroke-linejoin="round"')


def marker(k: int, point: str) -> str:
    """The k-th line's marker at "x,y"."""
    shape = list(MARKERS.values())[k % len(MARKERS)]
    return f'<path d="{shape}" transform="translate({point})" fill="{COLOURS[k % len(COLOURS)]}"/>'


def wrapped(title: str) -> list[str]:
    """A title in lines that fit the drawing."""
    return textwrap.wrap(title, 54) or [""]


def heading(title: str) -> list[str]:
    """The title's lines, bold, from the drawing's top on."""
    look = f'font-size="{FONT + 2}" font-weight="bold"'
    return [text(LEFT, 26 + 22 * k, line, "start", look) for k, line in enumerate(wrapped(title))]


def escaped(words: str) -> str:
    """Text for XML: markup escaped, and characters that XML does not allow replaced."""
    return html.escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", words))


def spread(values: list[float]) -> tuple[float, float]:
    """The range of some values; half a unit, or more where the value is large, on either side when they are all equal."""
    low, high = min(values), max(values)
    room = 0 if high - low > 1e-9 * max(abs(low), abs(high)) else max(0.5, abs(low) / 2)
    return low - room, high + room


def step(low: float, high: float, most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides a range into `most` parts or fewer."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    return next(power * m for m in (1, 2, 5, 10, 20) if (high - low) / (power * m) <= most * (1 + 1e-9))


def ticks(low: float, high: float, size: float) -> list[float]:
    """The multiples of `size` in a range."""
    return [k * size for k in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def enclosing_ticks(bounds: tuple[float, float], powers: bool = False) -> list[float]:
    """Round numbers of which the first and the last lie at the ends of a range or outside; `powers`: whole numbers only."""
    low, high = bounds if bounds[0] < bounds[1] else (bounds[0], bounds[0] + 1)
    size = max(1.0, step(low, high, 6)) if powers else step(low, high, 6)
    return ticks(size * math.floor(low / size + 1e-9), size * math.ceil(high / size - 1e-9), size)


def number(value: float, width: float) -> str:
    """A tick's label: as many decimals as tell the ticks of a range of that width apart."""
    if width >= 1e6 or width < 1e-5:
        return f"{value:.4g}"
    return f"{value:,.{max(0, math.ceil(-math.log10(width / 10)))}f}".rstrip("0").rstrip(".") if width < 10 else f"{value:,.0f}"
