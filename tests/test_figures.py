"""The charts as XML: what is drawn, where, with which words, and what is refused."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from model.errors import InputError
from toss.audit.figures import dot_chart, enclosing_ticks, histogram, line_chart, write_svg

SVG = "{http://www.w3.org/2000/svg}"


def drawing(svg: str) -> ElementTree.Element:
    """The parsed chart, after checking what every chart must have."""
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and root.get("viewBox") and root.get("width") == "100%" and root.get("role") == "img"
    assert root.get("aria-label") == root.find(f"{SVG}title").text
    return root


def words(root: ElementTree.Element) -> list[str]:
    return [element.text for element in root.iter(f"{SVG}text")]


def points(root: ElementTree.Element, tag: str) -> list[list[tuple[float, ...]]]:
    shapes = [element.get("points") for element in root.iter(f"{SVG}{tag}")]
    return [[tuple(map(float, point.split(","))) for point in shape.split()] for shape in shapes]


def test_a_line_chart_has_a_legend_labels_and_its_points_where_the_ticks_say():
    root = drawing(line_chart({"a": [(0, 0), (10, 1)], "b": [(0, 1), (10, 0)]}, "Title", "place", "height"))
    assert {"Title", "place", "height", "a", "b", "0", "10", "1", "0.4"} <= set(words(root))
    first, second = points(root, "polyline")
    assert first[0][0] == second[0][0] < first[1][0] and first[1][1] == second[0][1] < first[0][1]  # up is a smaller y
    looks = [(line.get("stroke"), line.get("stroke-dasharray")) for line in root.iter(f"{SVG}polyline")]
    assert len({colour for colour, _ in looks}) == len({dash for _, dash in looks}) == 2


def test_a_band_spans_low_to_high_and_a_single_point_gets_a_whisker():
    root = drawing(line_chart({"a": [(0, 1, 0, 2), (1, 2, 1, 3)], "b": [(1, 1, 0.5, 1.5)]}, "t", "x", "y"))
    (up, far_up, far_down, down), (top, bottom) = points(root, "polygon")
    assert up[1] < down[1] and far_up[1] < far_down[1] and up[0] == down[0] < far_up[0] == far_down[0]
    assert top[0] == bottom[0] and top[1] < bottom[1]
    assert [polygon.get("stroke") is None for polygon in root.iter(f"{SVG}polygon")] == [True, False]


def test_names_from_the_data_are_escaped():
    root = drawing(line_chart({"<b>&\"'\x00": [(0, 0)]}, "</title><script>", "x", "y"))
    assert root.find(f"{SVG}title").text == "</title><script>" and "<b>&\"'\ufffd" in words(root)


def test_charts_without_data_say_so():
    for svg in (line_chart({}, "t", "x", "y"), line_chart({"a": []}, "t", "x", "y"), histogram({"a": []}, "t", "x")):
        assert "There is no data for this figure." in words(drawing(svg))


@pytest.mark.parametrize("value", [0.0, 7.0, -3e9, 1e-7])
def test_constant_values_get_an_axis(value):
    (line,) = points(drawing(line_chart({"a": [(value, value), (value, value)]}, "t", "x", "y")), "polyline")
    assert all(map(math.isfinite, line[0])) and line[0] == line[1]
    assert "NaN" not in histogram({"a": [value] * 3}, "t", "x", threshold=value)


def test_the_given_range_is_the_least_that_is_shown():
    inside = drawing(line_chart({"a": [(0, 0.4), (1, 0.5)]}, "t", "x", "y", (0, 1)))
    assert {"0", "1"} <= set(words(inside))
    assert "2" in words(drawing(line_chart({"a": [(0, 0.4), (1, 2)]}, "t", "x", "y", (0, 1))))


def test_a_histogram_shows_shares_of_each_group_and_the_threshold():
    root = drawing(histogram({"few": [0.0, 1.0], "many": torch.tensor([0.0, 0.0, 0.0, 1.0])}, "t", "x", threshold=0.25, bins=2))
    assert {"few (n = 2)", "many (n = 4)", "threshold 0.25", "share of the group"} <= set(words(root))
    few, many = points(root, "polyline")
    floor = few[0][1]
    assert floor - few[1][1] == pytest.approx(floor - few[3][1])  # half and half
    assert floor - many[1][1] == pytest.approx(3 * (floor - many[3][1]), abs=0.4)  # three quarters and one


def test_a_logarithmic_histogram_puts_empty_bins_on_its_floor():
    root = drawing(histogram({"a": [0.0] * 99 + [1.0]}, "t", "x", bins=3, log_y=True))
    assert {"1", "0.1", "0.01"} <= set(words(root))
    (line,) = points(root, "polyline")
    assert line[3][1] == line[0][1] > line[5][1] > line[1][1]


def test_what_cannot_be_drawn_is_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="'a' is not a finite number"):
            line_chart({"a": [(0, bad)]}, "t", "x", "y")
        with pytest.raises(InputError, match="'a' is not a finite number"):
            histogram({"a": [0.0, bad]}, "t", "x")
    with pytest.raises(InputError, match="threshold"):
        histogram({"a": [0.0]}, "t", "x", threshold=math.nan)
    with pytest.raises(InputError, match="must all be"):
        line_chart({"a": [(0, 1), (1, 1, 0, 2)]}, "t", "x", "y")


@pytest.mark.parametrize(("bounds", "expected"), [((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]), ((-2.5, 7), [-4, -2, 0, 2, 4, 6, 8]),
                                                  ((0, 13), [0, 5, 10, 15]), ((3, 3), [3, 3.2, 3.4, 3.6, 3.8, 4])])  # fmt: skip
def test_ticks_are_round_and_enclose_the_range(bounds, expected):
    assert enclosing_ticks(bounds) == pytest.approx(expected)


def test_a_chart_is_written_whole(tmp_path):
    write_svg(tmp_path / "sub/a.svg", line_chart({"é": [(0, 1)]}, "t", "x", "y"))
    assert "é" in (tmp_path / "sub/a.svg").read_text(encoding="utf-8") and len(list((tmp_path / "sub").iterdir())) == 1


def test_dots_stand_side_by_side_at_named_places():
    dots = {"sft": [(0.5, 0.4, 0.6), (1, 1, 1)], "toss": [(0, 0, 0), (0.2, 0.1, 0.3)]}
    svg = dot_chart(dots, ["alone", "<mixed>"], "t", "share")
    assert ">alone<" in svg and "&lt;mixed&gt;" in svg and ">toss<" in svg and svg.count('stroke-width="2"/>') == 4
    with pytest.raises(InputError, match="one finite"):
        dot_chart({"sft": [(0.5, 0.4, 0.6)]}, ["alone", "mixed"], "t", "share")
