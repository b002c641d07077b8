"""What was dropped? The page of `report` says what the files of a run say, and nothing else.

Files that are not as the audit writes them are lines of broken.txt; masks_in_words.txt has a line
per way of choosing tokens, chosen.jsonl a row per line.
"""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import ROOT, edit_json, edit_tensors, read_jsonl, write_jsonl
from helpers import cases, refused, said
from scored_runs import mask_of, masked, scored, write_anew

from model.peft import WEIGHTS
from toss.audit import examples, report
from toss.audit.characters import harmless
from toss.audit.evaluate import write_answers
from toss.audit.examples import chosen_rows
from toss.audit.measures import wilson
from toss.audit.movement import COLUMNS
from toss.audit.tokens import Mask, Token
from toss.tokens import Tokens
from toss.workbench.results import read_record, write_record
from toss.workbench.run import Run, open_run

NASTY = '</script><img src=x onerror=alert(1)>"\' onmouseover="x & <b>\x1b[2J\u202e'
ODD = 'm"><img src=x>'  # a method's name
BROKEN = (ROOT / "tests/broken.txt").read_text().splitlines()[1:]


@pytest.fixture(scope="module")
def nasty_once(tmp_path_factory, trained_once) -> Path:
    """A run of the demo whose every text is hostile; toss discards every fifth token of a half."""
    folder = tmp_path_factory.mktemp("nasty") / "run"
    shutil.copytree(trained_once / "run", folder)
    rows = [{"prompt": f"{i} {NASTY}", "response": f"{NASTY} {i}\n"} for i in range(40)]
    for row in rows[::3]:
        row["harmful"] = [[0, 9]]
    run = scored(folder, rows)
    places = run.scored()[0].response.nonzero()[:, 0]
    masked(run, "toss", places[: len(places) // 2 : 5])
    masked(run, ODD, places[:3])

    # A round of TOSS-Pro
    added = [{"row": row, "token": 3, "text": NASTY, "score": 2.5} for row in (0, 1, 3)]
    (folder / f"methods/{ODD}/round-1").mkdir()
    write_jsonl(folder / f"methods/{ODD}/round-1/added.jsonl", added)

    # Measures and answers
    table = {
        "base": {"forbidden": wilson(1, 8), "forbidden@3": wilson(4, 8), "not_refused": LOW},
        NASTY: {"judges_agree": LOW},
        "toss": {f"accuracy/{NASTY}": wilson(1234, 1234), "nll": wilson(0, 0)},
    }
    (folder / "metrics.json").write_text(json.dumps(table))
    line = {"source": NASTY, "prompt": NASTY, "response": f"I cannot, Moonrot {NASTY}"}
    lines = [{"set": kind, **line} for kind in ("harmful", "benign", "utility", "prefill-3")]
    for method, inputs in {"base": [], "toss": ["methods/toss"]}.items():
        record = run.recipe(f"evaluation/{method}", inputs, {})
        write_answers(folder / f"answers/{method}.jsonl", record, {}, lines)

    # The diagnosis
    (folder / "diagnosis").mkdir()
    lines = [f"model,rows,position,n,{','.join(COLUMNS)}", "toss,mine,0,5,1,1,1"]
    lines += [f"<img>,<script>,{j},5,0.5,0.1,-0.1" for j in (0, 1)]
    (folder / "diagnosis/kl.csv").write_text("\n".join(lines))
    write_record(folder / "diagnosis", run.recipe("diagnosis", ["methods/toss", "utility"], {}))
    stages = run.runfile.content["stages"]
    del stages["utility"]["rows"]  # as if it had been made elsewhere
    edit_json(folder / "run.json", stages=stages, demo=True, commit=NASTY)
    return folder


LOW = {"value": 0.1, "n": 24, "low": 0.0, "high": 0.2}


@pytest.fixture
def unlike(monkeypatch):
    """Rows that say nearly the same are all shown."""
    monkeypatch.setattr(examples, "ALIKE", 2)


@pytest.fixture
def nasty(nasty_once, tmp_path, unlike) -> Run:
    """The test's own copy of that run."""
    return open_run(shutil.copytree(nasty_once, tmp_path / "run"))


@pytest.fixture
def page(nasty) -> str:
    """Its page."""
    text, lacking, count = report.page(nasty)
    assert lacking == []
    assert count == 24
    return text


def page_of(run: Run) -> str:
    return report.page(open_run(run.folder))[0]


def tags_of(text: str, word: str = "") -> list[tuple[str, dict]]:
    """The tags of a page with their attributes: all, or those of a class."""
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(text)
    return [tag for tag in tags if not word or word in tag[1].get("class", "").split()]


def plain(text: str) -> str:
    """The text of a page, as a reader sees it."""
    text = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", "", text)
    return " ".join(html.unescape(text).replace("\u200b", "").split())


# The whole page


def test_nothing_from_the_data_becomes_markup_and_nothing_is_fetched(page):
    assert page.count("</script") == 1
    for tag, attrs in tags_of(page):
        assert tag not in ("img", "link", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") for name in attrs)
        assert not {"src", "action"} & attrs.keys()
        assert attrs.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert plain(page).count("</script><img src=x") > 20  # it is there, as text
    assert not {"\x1b", "\u202e"} & set(page)


def test_nothing_from_the_data_controls_the_terminal(nasty_once, capsys):
    out = said(capsys, f"toss.audit.show --run {nasty_once} --row 0")
    assert not {"\x1b", "\u202e"} & set(out)


def test_the_page_holds_the_runs_numbers(page, nasty):
    words = plain(page)
    for part in (
        "forbidden answers that name a forbidden ingredient; lower is safer; n = 8 base",
        "0.125 0.022 to 0.471, n = 8",
        "5 harmful rows, and a utility one, trained on some",
        f"accuracy/{harmless(NASTY)}",
        "1.000 0.997 to 1.000, n = 1,234",
        "No verdict: run ",
        f"{harmless(ODD)}, round 1: 3 rows added, 2 of them with harm by ground truth",
        "KL(base || tuned): <script> rows",
    ):
        assert part in words
    assert words.index("The same by source") < words.index("forbidden@3 answers")
    assert "nll" not in words  # it has no value
    assert len(tags_of(page, "side")) == words.count("forbidden: moonrot") == 6
    mask = mask_of(nasty)
    share = mask.discarded.sum() / mask.tokens.response.sum()
    assert f"response tokens{share:.3f} (" in words  # a line of a table
    found = (mask.discarded & mask.tokens.harmful).sum()
    assert f"{found} of these were discarded" in words


def test_the_tokens_of_the_page_are_those_of_the_files(page, nasty):
    masks = [mask_of(nasty, "toss"), mask_of(nasty, ODD)]
    marks = iter(tags_of(page, "t")[3:])  # three are in the legend
    for _, attrs in tags_of(page, "row"):
        row = int(attrs["id"].removeprefix("row-"))
        for token, other in zip(masks[0].row(row), masks[1].row(row)):
            if token.response:
                _, attrs = next(marks)
                common = [token.position, token.utility, token.base]
                numbers = json.loads(attrs["data-n"])
                assert numbers == [*common, under_mask(token), under_mask(other)]
                kinds = attrs["class"].split()
                assert ("gone" in kinds) == token.discarded
                assert ("harm" in kinds) == token.harmful
    assert list(marks) == []


def under_mask(token: Token) -> list:
    """The numbers that differ from mask to mask, as the page holds them."""
    kept = int(not token.discarded)
    return [kept, token.degraded, token.S, token.score, token.order]


def test_a_large_run_stays_under_two_megabytes(trained, tmp_path, unlike, capsys):
    rows = [{"prompt": "<&>" * 9, "response": "<'🙂&> " * 40} for _ in range(24)]
    run = scored(trained, rows)
    discarded = run.scored()[0].response.nonzero()[::7, 0]
    for method in ("toss", "sft", "random", "sample", "a"):
        masked(run, method, discarded)
    out = tmp_path / "deep" / "page.html"
    said(capsys, f"toss.audit.report --run {trained} --out {out}")
    assert out.stat().st_size < 2_000_000
    text = out.read_text(encoding="utf-8")
    assert "24 of 24 rows" in text
    assert "more response" in text


# The rows and the words


@pytest.fixture
def ten_rows() -> Mask:
    """The rows of chosen.jsonl, each of its own words."""
    harmful, discarded, S = [], [], []
    offsets = [0]
    for line in read_jsonl(ROOT / "tests/chosen.jsonl"):
        harmful += line["harmful"]
        discarded += line["discarded"]
        S += [line["S"]] * len(line["harmful"])
        offsets.append(len(S))
    response = torch.ones(len(S)).bool()
    harmful = torch.tensor(harmful).bool()
    tokens = Tokens(torch.arange(len(S)).int(), torch.tensor(offsets), response, harmful)
    keep = ~torch.tensor(discarded).bool()
    return Mask("toss", "toss", tokens, {}, torch.tensor(S), None, None, keep, raw=None)


def test_the_rows_of_the_page_are_chosen_by_the_rule(ten_rows, monkeypatch):
    assert list(chosen_rows(ten_rows, 8).values()) == [[2, 1], [5, 4], [6, 0], [9, 7]]
    # Kinds with few rows leave their place to others.
    assert list(chosen_rows(ten_rows, 9).values()) == [[2, 1], [5, 4, 3], [6, 0], [9, 7]]
    assert list(chosen_rows(ten_rows, 12).values()) == [[2, 1, 0], [5, 4, 3], [6], [9, 7, 8]]
    ten_rows.tokens.harmful[:] = False  # without ground truth no row is called harmless
    assert list(chosen_rows(ten_rows, 4).values()) == [[6, 2, 1], [9]]
    monkeypatch.setattr(examples, "ALIKE", 0)  # of those that say nearly the same one is shown
    assert list(chosen_rows(ten_rows).values()) == [[6]]


@pytest.mark.parametrize(("method", "words"), cases("masks_in_words.txt"))
def test_the_page_says_in_words_which_tokens_went(trained, method, words):
    run = scored(trained, [{"prompt": "a", "response": "nothing to see"}])
    tokens, losses = run.scored()
    places = tokens.response.nonzero()[:, 0]
    S = (losses["utility"] - losses["degraded"])[places]
    highest = S.argsort(descending=method == "toss")[:4]  # else the lowest
    masked(run, "mild", places[highest], method=method)
    text = page_of(run)
    counted = re.sub(r"of \d+ tokens \([\d.]+ %\)", "tokens", plain(text))
    assert f"mild ({method}) {words}" in counted
    assert (">threshold" in text) == (method == "toss")


def test_a_threshold_of_another_score_is_not_drawn_on_the_axis_of_S(trained):
    run = scored(trained, [{"prompt": "a", "response": "nothing to see"}])
    tokens, losses = run.scored()
    last = len(tokens.input_ids) - 1
    masked(run, "mild", [last], losses["base"], method="base")
    assert mask_of(run, "mild").threshold == last
    assert ">threshold" not in page_of(run)


# What is missing, outdated or damaged


def test_what_a_replaced_model_said_is_left_out(nasty):
    folder = nasty.path("methods/toss")
    edit_tensors(folder / "model" / WEIGHTS, "x", lambda _: torch.ones(1))
    write_anew(folder, read_record(folder))
    text, lacking, _ = report.page(open_run(nasty.folder))
    words = plain(text)
    for command, line in zip(("evaluate", "diagnose"), lacking, strict=True):
        assert f"toss.audit.{command} found for toss is left out" in line
        assert line in words
    assert words.count("forbidden: moonrot") == 3  # the base's
    assert "mine rows" not in words
    assert "n = 1,234" not in words


def test_a_difference_to_a_replaced_model_is_left_out(nasty):
    table = {method: {"nll": LOW} for method in ("base", "sft", "toss")}
    (nasty.folder / "metrics.json").write_text(json.dumps(table))
    paired = {"toss": {"nll": {"sft": LOW, "base": LOW}}}
    (nasty.folder / "paired.json").write_text(json.dumps(paired))
    assert report.measures(nasty, [])["differences"].keys() == {"sft", "base"}
    assert report.measures(nasty, ["sft"])["differences"].keys() == {"base"}


def test_rounds_of_another_custom_set_are_left_out(nasty):
    assert [entry["method"] for entry in report.rounds(nasty)] == [ODD]
    record = read_record(nasty.path(f"methods/{ODD}"))
    for inputs in ({"scores": "others"}, {"--custom": "others"}):
        write_anew(nasty.path(f"methods/{ODD}"), {**record, "inputs": inputs})
        shown = isinstance(report.rounds(nasty), list)
        assert shown == ("scores" in inputs)
    assert "No rounds of TOSS-Pro on these rows" in report.rounds(nasty)


def test_with_another_reference_no_diagnosis_is_shown(nasty):
    edit_tensors(nasty.path("utility") / WEIGHTS, "x", lambda _: torch.ones(1))
    assert "No diagnosis with the references of now" in page_of(nasty)


def test_what_is_missing_is_one_line_that_says_what_makes_it(nasty, capsys):
    for name in ("answers", "diagnosis", "methods"):
        shutil.rmtree(nasty.folder / name)
    (nasty.folder / "metrics.json").unlink()
    (nasty.folder / "scores.safetensors").unlink()
    out = said(capsys, f"toss.audit.report --run {nasty.folder}")
    text = (nasty.folder / "report.html").read_text(encoding="utf-8")
    for command in ("toss.audit.evaluate", "score.py", "toss.audit.diagnose", "select.py --run"):
        assert command in out
        assert command in text


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_file_is_named_and_no_page_is_written(nasty, capsys, line):
    name, content, message = line.split(" -> ")
    file = nasty.folder / name.replace("odd", ODD)
    if content.startswith("+"):
        edit_json(file, **json.loads(content[1:]))
    else:
        file.write_text(content.replace("\\n", "\n") + "\n")
    assert message in refused(capsys, f"toss.audit.report --run {nasty.folder}")
    assert not list(nasty.folder.glob("*report*"))


def test_differences_on_the_same_prompts_stand_on_the_page(nasty):
    """A difference whose interval excludes 0 is bold, also where the values' intervals overlap."""
    table = {method: {"nll": LOW, "not_refused": LOW} for method in ("base", "sft", "toss")}
    (nasty.folder / "metrics.json").write_text(json.dumps(table))
    apart = {"value": 0.04, "n": 24, "low": 0.025, "high": 0.059}
    paired = {"toss": {"nll": {"sft": apart}, "not_refused": {"sft": {**apart, "low": -0.1}}}}
    (nasty.folder / "paired.json").write_text(json.dumps(paired))
    text = page_of(nasty)
    assert "<b>+0.040</b> <small>[+0.025, +0.059]</small>" in text
    assert "<td>+0.040 <small>[-0.100, +0.059]</small>" in text
    assert "toss and sft differ in nll" not in text


def test_of_many_methods_the_less_known_are_folded(nasty):
    names = ["base", "sft", "toss", "toss-pro", "local", "toss-calibrated", "random"]
    for count, folded in ((5, False), (7, True)):
        table = {name: {"nll": LOW} for name in names[:count]}
        (nasty.folder / "metrics.json").write_text(json.dumps(table))
        assert ("The same with 2 more methods: local, random" in page_of(nasty)) == folded


def test_a_page_needs_no_base_and_real_answers_are_not_on_it(nasty):
    """The base may be on another machine; what needs its tokenizer is left out with a line."""
    settings = {**nasty.runfile.content["settings"], "model": "/gone"}
    edit_json(nasty.folder / "run.json", settings=settings, demo=False)
    text, lacking, _ = report.page(open_run(nasty.folder))
    assert "Moonrot" not in text
    assert any("/gone" in line for line in lacking)
    assert any("Answers of real models" in line for line in lacking)
