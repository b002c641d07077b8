"""What the README points to exists."""

import re
from importlib import import_module

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


@pytest.mark.parametrize("path", re.findall(r"^\| (`[^|]+) \|", README.split("## The method")[1].split("## The audit")[0], re.M))
def test_every_file_of_the_reading_list_exists(path):
    for name in re.findall(r"`([^`]+)`", path):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("row", re.findall(r"^\| (`[^|]+) \|", README.split("## The audit")[1].split("## Decisions")[0], re.M)[1:])
def test_every_command_of_the_audit_exists_with_its_flags(row, capsys):
    words = row.split("`")[1].split()
    with pytest.raises(SystemExit) as ended:
        import_module(f"toss.audit.{words[0]}").main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(word in text for word in words[1:] if word.startswith("--") or word.islower())


def test_every_picture_and_file_that_the_results_point_to_exists():
    results = ROOT / "toss" / "audit" / "RESULTS.md"
    links = re.findall(r"\]\(([^)#]+)", results.read_text(encoding="utf-8"))
    assert len(links) >= 6 and all((results.parent / link).exists() for link in links if "://" not in link)


def test_every_link_inside_the_readme_leads_somewhere():
    heads = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        file, _, anchor = target.partition("#")
        assert "://" in target or (ROOT / file).exists() and (file or anchor in heads), target
