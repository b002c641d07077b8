"""Charts and pictures are SVG whose shapes lie where the values are."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import fails
from helpers import said
from scored_runs import small_run

from toss.audit.figures import histogram, line_chart

SVG = "{http://www.w3.org/2000/svg}"


class Drawing:
    """What is in an SVG: its words, and the points of its lines and areas."""

    def __init__(self, svg: str):
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img"
        self.words = {element.text for element in root.iter(f"{SVG}text")}
        self.lines = [points_of(element) for element in root.iter(f"{SVG}polyline")]
        self.areas = [points_of(element) for element in root.iter(f"{SVG}polygon")]


def points_of(element: ElementTree.Element) -> list[tuple[float, ...]]:
    pairs = element.get("points").split()
    return [tuple(map(float, pair.split(","))) for pair in pairs]


def test_a_line_chart_has_its_points_where_the_ticks_say_and_names_become_no_markup():
    lines = {"<b>&\"'\x00\uffff": [(0, 0), (10, 100)], "b": [(0, 100), (10, 0)]}
    svg = line_chart(lines, "</title><script>", "place", "height", (0, 1000))
    chart = Drawing(svg)
    ticks = {"0", "10", "200", "1,000"}
    names = {"</title><script>", "place", "height", "<b>&\"'<00><ffff>", "b"}
    assert chart.words >= ticks | names
    a, b = chart.lines
    assert a[0][0] == b[0][0] < a[1][0]
    assert a[1][1] == b[0][1] < a[0][1]  # up is a smaller y
    strokes = re.findall("<polyline.* (stroke=.*?) .*(stroke-dasharray=.*?) ", svg)
    assert len(set(strokes)) == 2


def test_a_band_spans_low_to_high_and_a_single_point_has_a_whisker():
    lines = {"a": [(0, 1, 0, 2), (1, 2, 1, 3)], "b": [(1, 1, 0.5, 1.5)]}
    chart = Drawing(line_chart(lines, "t", "x", "y"))
    [(up, far_up, far_down, down)] = chart.areas
    assert up[0] == down[0] < far_up[0] == far_down[0]
    assert up[1] < down[1]
    assert far_up[1] < far_down[1]
    assert chart.lines[1][0][1] == pytest.approx((up[1] + down[1]) / 2, abs=0.1)  # the middle
    low, high = chart.lines[0]
    assert low[0] == high[0]
    assert low[1] > high[1]


def test_dots_at_named_places_stand_side_by_side():
    dots = {"sft": [(0, 0.5, 0.4, 0.6), (1, 1, 1, 1)], "toss": [(0, 0, 0, 0), (1, 0.2, 0.1, 0.3)]}
    chart = Drawing(line_chart(dots, "t", "", "share", names=["alone", "mixed"]))
    assert {"alone", "mixed", "sft", "toss"} <= chart.words
    places = [whisker[0][0] for whisker in chart.lines]  # there are no lines
    assert places[0] < places[2] < places[1] < places[3]


def test_a_histogram_shows_shares_of_each_group_and_the_threshold():
    groups = {"few": [0.0, 1.0], "many": torch.tensor([0.0] * 99 + [1.0])}
    chart = Drawing(histogram(groups, "t", "x", threshold=0.25, bins=3))
    assert {"few (n = 2)", "many (n = 100)", "threshold 0.25", "1", "0.1", "0.01"} <= chart.words
    few, many, mark = chart.lines
    half = few[1][1]
    floor = few[0][1]
    assert half == few[5][1] < few[3][1] == floor  # half, nothing, half
    assert many[1][1] < half < many[5][1]
    assert mark[0][0] == mark[1][0]


def test_a_chart_of_nothing_says_so():
    for svg in (line_chart({}, "t", "x", "y"), histogram({"a": []}, "t", "x")):
        assert "There is no data for this figure." in Drawing(svg).words


@pytest.mark.parametrize("value", [0.0, -3e9, 1e-7])
def test_charts_of_one_value(value):
    [(one, two)] = Drawing(line_chart({"a": [(value, value)] * 2}, "t", "x", "y")).lines
    assert all(map(math.isfinite, one))
    assert one == two
    assert "nan" not in histogram({"a": [value] * 3}, "t", "x", threshold=value).lower()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    message = "figure 't': a value is not a finite number"
    fails(message, line_chart, {"a": [(0, value)]}, "t", "x", "y")
    fails(message, histogram, {"a": [0.0]}, "t", "x", threshold=value)


def test_the_picture_of_a_row(trained, tmp_path, capsys):
    run = small_run(trained)
    said(capsys, f"toss.audit.show --run {run.folder} --row 0 --svg {tmp_path}/row.svg")
    root = ElementTree.fromstring((tmp_path / "row.svg").read_text(encoding="utf-8"))
    *tokens, _ = root.iter(f"{SVG}text")
    assert "".join(token.text for token in tokens).endswith(f"no no{run.tokenizer.eos}")
    marks = [None, "line-through", "underline line-through", None]
    assert [token.get("text-decoration") for token in tokens[-4:]] == marks
    heights = [float(token.get("y")) for token in tokens]
    assert heights[-5] < heights[-4] == heights[-1]  # the response has lines of its own
    ends = [float(token.get("x")) + float(token.get("textLength")) for token in tokens]
    assert max(ends) <= 840
