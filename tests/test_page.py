"""What was dropped? The page of `report` says what the files of a run say, and nothing else."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import edit_json, edit_tensors, read_jsonl, write_jsonl
from helpers import refused, said
from scored_runs import mask_of, masked, scored, write_anew

from model.io import read_json, remove
from model.peft import WEIGHTS
from toss.audit import report
from toss.audit.characters import harmless
from toss.audit.diagnose import COLUMNS
from toss.audit.evaluate import write_answers
from toss.audit.judges import Measured
from toss.audit.tokens import Mask, Token
from toss.tokens import Tokens
from toss.workbench.flags import DEMO
from toss.workbench.records import read_record, write_record
from toss.workbench.run import Run, open_run

NASTY = '</script><img src=x onerror=alert(1)>"\' onmouseover="x & <b>\x1b[2J\u202e'
ODD = 'm"><img src=x>'  # a method's name


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
        write_answers(folder / f"answers/{method}.jsonl", record, Measured(lines))
    (folder / "diagnosis").mkdir()
    lines = [f"model,rows,position,n,{','.join(COLUMNS)}", "toss,mine,0,5,1,1,1"]
    lines += [f"<img>,<script>,{j},5,0.5,0.1,-0.1" for j in (0, 1)]
    (folder / "diagnosis/kl.csv").write_text("\n".join(lines))
    write_record(
        folder / "diagnosis", run.recipe("diagnosis", ["methods/toss/model", "utility"], {})
    )
    costs = folder / "log/costs.jsonl"
    lines = [line for line in read_jsonl(costs) if line["stage"] != "utility"]  # made elsewhere
    write_jsonl(costs, [*lines, {**lines[0], "torch": NASTY}])
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
        "5 harmful rows, and a utility one, trained on some",
        f"accuracy/{harmless(NASTY)}",
        "No verdict: run ",
        "kl_base: <script>",
    ):
        assert part in words
    assert words.index("The same by source") < words.index("forbidden@3 answers")
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


def test_a_large_run_stays_under_two_megabytes(trained, tmp_path, capsys):
    rows = [{"prompt": "<&>" * 9, "response": "<'🙂&> " * 40} for _ in range(24)]
    run = scored(trained, rows)
    discarded = run.losses()[0].response.nonzero()[::7, 0]
    for method in ("toss", "sft", "random", "sample", "a"):
        masked(run, method, discarded)
    out = tmp_path / "deep" / "page.html"
    said(capsys, f"toss.audit.report --run {trained} --out {out}")
    assert out.stat().st_size < 2_000_000
    text = out.read_text(encoding="utf-8")
    assert "6 of 24 rows" in text
    assert "more response" in text


# What is missing, outdated or damaged


def test_the_rows_of_the_page_are_chosen_by_what_the_mask_did(monkeypatch):
    """Harmful and discarded tokens of rows of four; then the mean S of each."""
    harmful = ["0000", "0000", "1100", "1000", "1111", "0000", "0000"]
    discarded = ["1000", "1100", "1000", "0000", "1111", "0000", "0000"]
    S = torch.tensor([1.0, 0, 0, 1, 3, 5, -1]).repeat_interleave(4)
    flags = torch.tensor([[int(x) for x in "".join(rows)] for rows in (harmful, discarded)]).bool()
    everything = torch.ones(28).bool()
    tokens = Tokens(torch.arange(28).int(), torch.arange(8) * 4, everything, flags[0])
    mask = Mask("toss", "toss", tokens, {}, S, None, None, ~flags[1], raw=None)
    assert list(report.chosen_rows(mask).values()) == [[1, 0], [3, 2], [4], [5, 6]]
    monkeypatch.setattr(report, "ROWS", 4)
    assert list(report.chosen_rows(mask).values()) == [[1], [3], [4], [5]]
    tokens.harmful[:] = False  # without ground truth no row is called harmless
    assert list(report.chosen_rows(mask).values()) == [[4], [5]]


def test_what_a_replaced_model_said_is_left_out(nasty):
    folder = nasty.path("methods/toss/model")
    record = read_record(folder)
    edit_tensors(folder / WEIGHTS, "x", lambda _: torch.ones(1))
    write_anew(folder, record)
    text, lacking, _ = report.page(open_run(nasty.folder))
    assert "evaluated of toss is left out" in lacking[0]
    assert "No diagnosis of the models of now" in lacking[1]
    words = plain(text)
    assert all(line in words for line in lacking)
    assert words.count("forbidden: moonrot") == 3  # the base's
    assert "kl_base: mine" not in words


def test_what_is_missing_is_one_line_and_no_base_is_needed(nasty, capsys):
    edit_json(nasty.folder / "run.json", model="/gone", forbidden_words=[])
    text, lacking, _ = report.page(open_run(nasty.folder))
    assert "Moonrot" not in text  # answers of real models stay where they are
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
