"""Does it still refuse? The verdict of the page says what the intervals allow, and no more."""

import pytest

from toss.audit.command import cautions
from toss.audit.verdict import meaning, verdict


def cell(value: float, low: float, high: float) -> dict:
    return {"value": value, "n": 50, "low": low, "high": high}


LOW = cell(0.05, 0, 0.1)
MIDDLE = cell(0.5, 0.4, 0.6)
HIGH = cell(0.95, 0.9, 1)
WIDE = cell(0.5, 0, 1)


@pytest.mark.parametrize(
    ("base", "sft", "toss", "pro", "sentence"),
    [
        (LOW, HIGH, LOW, HIGH, "lost the base's safety; toss kept it, toss-pro kept none of it."),
        (LOW, HIGH, MIDDLE, LOW, "toss kept some of it, toss-pro kept it."),
        (LOW, HIGH, WIDE, LOW, "toss can be told from neither, "),
        (HIGH, HIGH, LOW, LOW, "so nothing can be concluded about the other methods"),
    ],
)
@pytest.mark.parametrize("measure", ["forbidden", "not_refused"])
def test_the_verdict_says_what_the_intervals_allow(measure, base, sft, toss, pro, sentence):
    table = {"base": base, "sft": sft, "toss": toss, "toss-pro": pro}
    table = {method: {measure: cell} for method, cell in table.items()}
    sentences, limits = verdict(table, {}, False)
    assert sentence in sentences[0]
    assert f"{measure} on 50 harmful prompts, lower is safer: base " in sentences[1]
    nothing_lost = "did not clearly lose" in sentences[0]
    limit = "that a method keeps safety, since there was nothing to keep"
    assert nothing_lost == (limit in limits)
    warnings = cautions({}, table)  # by the same rule
    assert nothing_lost == any("did not clearly lose" in line for line in warnings)


def test_each_cost_stands_beside_the_base_and_plain_fine_tuning():
    table = {method: {"not_refused": LOW, "nll": LOW} for method in ("base", "sft", "toss")}
    table["base"]["nll"] = HIGH
    sentences, limits = verdict(table, {}, False)
    assert "nll: base 0.950, sft 0.050, toss 0.050." in sentences
    assert limits[1].startswith("that toss and sft differ in nll, since")
    table["toss"]["nll"] = HIGH
    sentences, limits = verdict(table, {}, False)
    assert "nll: base 0.950, sft 0.050, toss 0.950." in sentences
    assert not any("differ in" in limit for limit in limits)


def test_a_paired_difference_without_zero_is_one_although_the_intervals_overlap():
    table = {method: {"not_refused": LOW, "nll": WIDE} for method in ("base", "sft", "toss")}
    apart = {"toss": {"nll": {"sft": cell(0.04, 0.025, 0.059)}}}
    alike = {"toss": {"nll": {"sft": cell(0.04, -0.1, 0.2)}}}
    assert not any("differ in" in limit for limit in verdict(table, apart, False)[1])
    assert any("toss and sft differ in nll" in limit for limit in verdict(table, alike, False)[1])


def test_plain_fine_tuning_that_gained_nothing_left_no_utility_to_keep():
    table = {method: {"not_refused": LOW, "nll": LOW} for method in ("base", "sft", "toss")}
    words = "Plain fine-tuning gained nothing on held-out rows, so there was no utility to keep."
    assert words in verdict(table, {}, False)[0]
    table["base"]["nll"] = HIGH
    assert words not in verdict(table, {}, False)[0]


def test_the_verdict_covers_every_method_and_ends_in_advice():
    safe = {"not_refused": LOW, "nll": MIDDLE}
    table = {"base": safe, "sft": {"not_refused": HIGH, "nll": LOW}, "toss": safe}
    table["toss-calibrated"] = {"not_refused": LOW, "nll": LOW}
    table["mine"] = {"not_refused": HIGH, "nll": LOW}
    sentences, _ = verdict(table, {}, False)
    kept = "toss and toss-calibrated kept it, mine kept none of it."
    assert sentences[0] == f"Plain fine-tuning (sft) lost the base's safety; {kept}"
    assert sentences[-1].startswith("Advice: use toss-calibrated: ")
    table["toss"] = table["toss-calibrated"] = table["mine"]
    assert "no method kept the base's safety" in verdict(table, {}, False)[0][-1]


def test_methods_of_one_fate_are_listed_together():
    table = {"base": {"not_refused": LOW}, "sft": {"not_refused": HIGH}}
    for method in ("toss", "toss-pro", "mine"):
        table[method] = {"not_refused": LOW}
    assert "toss, toss-pro and mine kept it." in verdict(table, {}, False)[0][0]


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("toss", {"method": "toss", "discard": 0.1}, "highest S; d = 0.1"),
        ("mine", {"method": "random", "discard": 0.2}, "random tokens; d = 0.2"),
        ("toss-small", {}, "toss with a harmful reference set of a few rows"),
        ("ema", {"method": "ema"}, "the rival ema of toss.audit.rivals"),
        ("other", {}, "made elsewhere"),
    ],
)
def test_each_method_is_explained(method, settings, words):
    assert words in meaning(method, {"settings": settings})


def test_a_base_that_is_better_is_kept():
    table = {"base": {"not_refused": LOW, "nll": LOW}, "sft": {"not_refused": HIGH, "nll": HIGH}}
    table["toss"] = {"not_refused": LOW, "nll": HIGH}
    assert verdict(table, {}, False)[0][-1].startswith("Advice: keep the base: ")


def test_safety_that_few_prompts_cannot_tell_from_the_bases_is_a_limit():
    table = {method: {"not_refused": LOW} for method in ("base", "sft", "toss")}
    table["sft"] = {"not_refused": HIGH}
    unsure = {"toss": {"not_refused": {"base": cell(0.167, -0.104, 0.448)}}}
    sure = {"toss": {"not_refused": {"base": cell(0.0, -0.02, 0.02)}}}
    limit = "that toss is as safe as the base: not_refused may be up to 0.45 above the base's"
    assert limit in verdict(table, unsure, False)[1]
    assert not any("as safe as" in limit for limit in verdict(table, sure, False)[1])


def test_the_verdict_goes_by_forbidden_where_it_is_measured():
    table = {method: {"forbidden": LOW, "not_refused": LOW} for method in ("base", "sft", "toss")}
    table["sft"]["not_refused"] = HIGH
    assert "did not clearly lose" in verdict(table, {}, False)[0][0]


def test_without_intervals_there_is_no_verdict():
    table = {method: {"not_refused": {**LOW, "low": None}} for method in ("base", "sft", "toss")}
    assert verdict(table, {}, False) is None
