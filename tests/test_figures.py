"""Charts and pictures are SVG whose shapes lie where the values are."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import fails

from toss.audit import figures
from toss.audit.figures import histogram, line_chart, picture_of, ticks
from toss.audit.measures import Cell

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
    lines = {"<b>&\"'\x00": [(0, 0), (10, 100)], "b": [(0, 100), (10, 0)]}
    words, (a, b) = words_and_lines(
        line_chart(lines, "</title><script>", "x", "y", None, ticks(0, 1000, 6))
    )
    assert words >= {"0", "10", "200", "1,000", "</title><script>", "<b>&\"'<00>", "b"}
    assert a[0][0] == b[0][0] < a[1][0]
    assert a[1][1] == b[0][1] < a[0][1]  # up is a smaller y


def test_a_histogram_shows_shares_of_each_group_and_the_threshold(monkeypatch):
    monkeypatch.setattr(figures, "BINS", 3)
    groups = {"few": [0.0, 1.0], "many": torch.tensor([0.0] * 99 + [1.0])}
    words, lines = words_and_lines(histogram(groups, "t", "x", threshold=0.25))
    few, many, mark = lines
    assert {"few (n = 2)", "many (n = 100)", "threshold 0.25", "1", "0.1", "0.01"} <= words
    assert few[1][1] == few[5][1] < few[3][1] == few[0][1]  # half, nothing, half; the floor
    assert many[1][1] < few[1][1] < many[5][1]
    assert mark[0][0] == mark[1][0]


def test_a_picture_of_a_table_has_its_measures_side_by_side():
    row = {"f@0": Cell(0.0, 9, 0.0, 0.1), "f@10": Cell(1.0, 9, 0.9, 1.0), "nll": Cell(0.5, 9)}
    table = {("run", "sft"): row, ("small", "toss"): {"nll": Cell(0.1, 9)}}
    words, [line] = words_and_lines(picture_of(table, ["f@*"], "t"))
    assert {"sft run", "f", "@0", "@10"} <= words
    assert line[0][0] < line[1][0] and line[0][1] > line[1][1]
    words, _ = words_and_lines(picture_of(table, ["nll"], "t"))
    assert {"sft run", "toss small", "nll"} <= words
    assert picture_of(table, ["none"], "t") == ""


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_said_so(value):
    message = "figure 't': a value is not a finite number"
    fails(message, line_chart, {"a": [(0, value)]}, "t", "x", "y")
    fails(message, histogram, {"a": [0.0]}, "t", "x", threshold=value)
    assert "There is no data" in line_chart({}, "t", "x", "y")
