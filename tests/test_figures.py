"""Charts and pictures are SVG whose shapes lie where the values are."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import fails

from toss.audit import figures
from toss.audit.figures import histogram, line_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"


def words_and_lines(svg: str) -> tuple[set, list]:
    """The words of an SVG, and the points of its lines."""
    root = ElementTree.fromstring(svg)
    lines = []
    for element in root.iter(f"{SVG}polyline"):
        pairs = element.get("points").split()
        lines.append([tuple(map(float, pair.split(","))) for pair in pairs])
    return {element.text for element in root.iter(f"{SVG}text")}, lines


def test_a_line_chart_has_its_points_where_the_ticks_say_and_names_become_no_markup():
    lines = {"<b>&\"'\x00": [(0, 0), (10, 1000)], "b": [(0, 1000), (10, 0)]}
    words, (a, b) = words_and_lines(line_chart(lines, "</title><script>", "x", "y"))
    assert words >= {"0", "10", "1,000", "</title><script>", "<b>&\"'<00>", "b"}
    assert a[0][0] == b[0][0] < a[1][0]
    assert a[1][1] == b[0][1] < a[0][1]  # up is a smaller y


@pytest.mark.parametrize(
    ("low", "high", "names"),
    [
        (0, 47, ["0", "10", "20", "30", "40", "50"]),
        (-0.05, 0.21, ["-0.1", "0", "0.1", "0.2", "0.3"]),
        (1200, 3000, ["1,000", "2,000", "3,000"]),
    ],
)
def test_ticks_are_round_and_hold_the_range(low, high, names):
    places = ticks(low, high)
    assert [name for _, name in places] == names
    assert places[0][0] <= low < high <= places[-1][0]


def test_a_histogram_shows_shares_of_each_group_and_the_threshold(monkeypatch):
    monkeypatch.setattr(figures, "BINS", 3)
    groups = {"few": [0.0, 1.0], "many": torch.tensor([0.0] * 99 + [1.0])}
    words, lines = words_and_lines(histogram(groups, "t", "x", threshold=0.25))
    few, many, mark = lines
    assert {"few (n = 2)", "many (n = 100)", "threshold 0.25", "share of the group"} <= words
    half, nothing, other_half = [y for _, y in few]
    assert half == other_half < nothing  # up is a smaller y
    assert many[0][1] < half < many[2][1] < nothing == many[1][1]
    assert mark[0][0] == mark[1][0] and few[0][0] < mark[0][0] < few[1][0]
    assert (mark[0][1], mark[1][1]) == (nothing, many[0][1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    message = "figure 't': a value is not a finite number"
    fails(message, line_chart, {"a": [(0, value)]}, "t", "x", "y")
    fails(message, histogram, {"a": [0.0, value]}, "t", "x")
