"""Charts as standalone SVG text: lines and histograms.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; dashes and markers
differ too, for grey print, and a line is thinner than those below it.
"""

import math
from collections.abc import Sequence
from pathlib import Path

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
BINS = 60  # of a histogram


def line_chart(
    lines: dict[str, list[tuple[float, float]]], title: str, x_label: str, y_label: str
) -> str:
    """One line per name, through its points (x, y) in the given order, as SVG text.

    Raises InputError for a value that is not finite.
    """
    points = [point for line in lines.values() for point in line]
    x = span(title, [point[0] for point in points])
    y = span(title, [point[1] for point in points])
    return TEMPLATES.get_template("figures.svg.jinja").render(
        title=title,
        labels=(x_label, y_label),
        x=x,
        x_ticks=ticks(*x),
        y_ticks=ticks(*y),
        lines=lines,
    )


def histogram(
    groups: dict[str, Sequence[float]], title: str, x_label: str, threshold: float | None = None
) -> str:
    """Histograms over one another, as SVG text: the share of each group per bin.

    Shares, so that groups of different size can be compared; n stands in the legend. threshold: a
    value of x to mark. Raises InputError for a value that is not finite.
    """
    everything = np.concatenate(list(groups.values()))
    edges = np.linspace(*span(title, everything), BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    lines = {}
    highest = 0.0
    for name, group in groups.items():
        counts, _ = np.histogram(group, edges)
        shares = counts / max(1, len(group))
        lines[f"{name} (n = {len(group):,})"] = list(zip(middles.tolist(), shares.tolist()))
        highest = max(highest, shares.max())
    if threshold is not None:
        lines[f"threshold {threshold:.3g}"] = [(threshold, 0.0), (threshold, highest)]
    return line_chart(lines, title, x_label, "share of the group")


def span(title: str, values: Sequence[float]) -> tuple[float, float]:
    """The range of some values; if they are all equal, half a unit more on either side."""
    if not np.isfinite(values).all():
        raise InputError(f"figure {title!r}: a value is not a finite number")
    low = float(np.min(values))
    high = float(np.max(values))
    if low == high:
        return low - 0.5, high + 0.5
    return low, high


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round places on an axis with their names, 2 to 12 of them: multiples of a power of ten.

    The first lies at the range's low end or below, the last at its high end or above.
    """
    step = 10.0 ** math.floor(math.log10(high - low))
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [(k * step, f"{k * step:,.9g}") for k in range(first, last + 1)]
