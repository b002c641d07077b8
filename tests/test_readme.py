"""What the README points to exists."""

import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PINS = re.findall(r"\*((?:test_\w+: [^*]+))\*", README.split("## Decisions")[1].split("## What")[0])


@pytest.mark.parametrize("pins", PINS)
def test_every_decision_is_pinned_by_a_test_of_that_name(pins):
    for group in pins.split(";"):
        file, names = group.strip().split(":")
        code = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        for name in re.split(r",\s*", names.strip()):
            assert re.search(rf"def test_\w*{name}", code), f"{file}: {name}"


def test_there_are_twelve_decisions():
    assert len(PINS) == 12


@pytest.mark.parametrize("path", re.findall(r"^\| (`[^|]+) \|", README.split("## The method")[1].split("## Decisions")[0], re.M))
def test_every_file_of_the_reading_list_exists(path):
    for name in re.findall(r"`([^`]+)`", path):
        assert (ROOT / name).exists(), name
