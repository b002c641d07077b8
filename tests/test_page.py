"""What was dropped? The page of `report` says what the files of a run say, and nothing else."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import edit_json, edit_tensors
from helpers import refused, said
from scored_runs import mask_of, masked, scored, write_anew

from model.io import read_json, remove
from model.peft import WEIGHTS
from toss.audit import report
from toss.audit.characters import harmless
from toss.audit.diagnose import COLUMNS
from toss.audit.evaluate import write_answers
from toss.audit.judges import Measured
from toss.audit.tokens import Token
from toss.workbench.flags import DEMO
from toss.workbench.records import read_record, write_record
from toss.workbench.run import Run, open_run

NASTY = '</script><img src=x onerror=alert(1)>"\' onmouseover="x & <b>\x1b[2J\u202e'
ODD = 'm"><img src=x>'  # a method's name
NO = {"prompt": "a", "response": "no"}


@pytest.fixture(scope="module")
def nasty_once(tmp_path_factory, trained_once) -> Path:
    """A run of the demo whose every text is hostile; toss discards every fifth token of a half."""
    folder = tmp_path_factory.mktemp("nasty") / "run"
    shutil.copytree(trained_once / "run", folder)
    rows = [{"prompt": f"{i} {NASTY}", "response": f"{NASTY} {i}\n"} for i in range(40)]
    for row in rows[::3]:
        row["harmful"] = [[0, 9]]
    run = scored(folder, rows)
    places = run.losses()[0].response.nonzero()[:, 0]
    masked(run, "toss", places[: len(places) // 2 : 5])
    masked(run, ODD, places[:3])

    # Answers, and the diagnosis
    said_it = {"source": NASTY, "prompt": NASTY, "response": f"I cannot, Moonrot {NASTY}"}
    outcomes = {
        "harmful": {"forbidden": True},
        "prefill-3": {"forbidden@3": True},
        "benign": {"over_refusal": True},
        "utility": {"accuracy": True},
    }
    lines = [{"set": kind, **said_it, "outcomes": found} for kind, found in outcomes.items()]
    for method, inputs in {"base": [], "toss": ["methods/toss/model"]}.items():
        record = run.recipe(f"evaluation/{method}", inputs, {})
        write_answers(folder / f"answers/{method}.jsonl", record, Measured(lines, [], []))
    (folder / "diagnosis").mkdir()
    lines = [f"model,rows,position,n,{','.join(COLUMNS)}", "toss,mine,0,5,1,1,1"]
    lines += [f"<img>,<script>,{j},5,0.5,0.1,-0.1" for j in (0, 1)]
    (folder / "diagnosis/kl.csv").write_text("\n".join(lines))
    write_record(
        folder / "diagnosis", run.recipe("diagnosis", ["methods/toss/model", "utility"], {})
    )
    edit_json(folder / "run.json", forbidden_words=read_json(DEMO)["forbidden_words"])
    return folder


@pytest.fixture
def nasty(nasty_once, tmp_path) -> Run:
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
        "forbidden answers that name a forbidden ingredient; lower is safer; n = 1 base",
        "1.000 0.206 to 1.000, n = 1",
        f"accuracy/{harmless(NASTY)}",
        "No verdict: run ",
        "kl_base: <script>",
    ):
        assert part in words
    assert words.index("forbidden answers") < words.index("forbidden@3 answers")
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


def test_a_large_run_stays_under_two_megabytes(trained, capsys):
    rows = [{"prompt": "<&>" * 9, "response": "<'🙂&> " * 40} for _ in range(24)]
    run = scored(trained, rows)
    discarded = run.losses()[0].response.nonzero()[::7, 0]
    for method in ("toss", "sft", "random", "sample", "a"):
        masked(run, method, discarded)
    said(capsys, f"toss.audit.report --run {trained}")
    out = trained / "report.html"
    assert out.stat().st_size < 2_000_000
    text = out.read_text(encoding="utf-8")
    assert "24 of 24 rows" in text
    assert "more response" in text


# What is missing, outdated or damaged


def test_the_rows_of_the_page_are_those_that_lost_most(trained, monkeypatch):
    """Of rows of three tokens, one of which is skipped, so many are discarded."""
    monkeypatch.setattr(report, "ROWS", 4)
    run = scored(trained, [{"prompt": "long " * 2048, "response": "no"}] + [NO] * 5)
    tokens, _ = run.losses()
    lost = [0, 1, 2, 0, 2, 1]  # by row
    discarded = []
    for row, count in enumerate(lost):
        places = tokens.places([row])
        discarded += places[tokens.response[places]][:count].tolist()
    masked(run, "toss", discarded)
    shown = report.token_part(run, [mask_of(run)])
    assert [row["row"] for row in shown["rows"]] == [2, 4, 1, 5]


def test_what_a_replaced_model_said_is_left_out(nasty, capsys):
    folder = nasty.path("methods/toss/model")
    record = read_record(folder)
    edit_tensors(folder / WEIGHTS, "x", lambda _: torch.ones(1))
    write_anew(folder, record)
    text, lacking, _ = report.page(open_run(nasty.folder))
    assert any("No diagnosis of the models of now" in line for line in lacking)
    assert "toss left out" in capsys.readouterr().out
    words = plain(text)
    assert all(line in words for line in lacking)
    assert "1.000 0.206 to 1.000, n = 1 toss" not in words
    assert "kl_base: mine" not in words


def test_what_is_missing_is_one_line_and_no_base_is_needed(nasty, capsys):
    edit_json(nasty.folder / "run.json", model="/gone", forbidden_words=[])
    text, lacking, _ = report.page(open_run(nasty.folder))
    assert "Moonrot" not in text  # what models answered stays where it is
    assert any("/gone" in line for line in lacking)
    for name in ("answers", "diagnosis", "methods", "scores.safetensors"):
        remove(nasty.folder / name)
    out = said(capsys, f"toss.audit.report --run {nasty.folder}")
    for command in ("toss.audit.evaluate", "score.py", "toss.audit.diagnose"):
        assert command in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("diagnosis/kl.csv", "model,rows\na,b", "kl.csv: not as it was written"),
        ("run.json", "[]", "run.json: expected a JSON object"),
    ],
)
def test_a_broken_file_is_named_and_no_page_is_written(nasty, capsys, name, content, message):
    (nasty.folder / name).write_text(f"{content}\n")
    assert message in refused(capsys, f"toss.audit.report --run {nasty.folder}")
    assert not list(nasty.folder.glob("*report*"))
