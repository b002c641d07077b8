"""What was dropped? The page of `report` says what the files of a run say, and nothing else."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, edit_json, edit_tensors, read_jsonl, write_jsonl
from helpers import refused, said
from scored_runs import mask_of, masked, scored, write_anew

from model.peft import WEIGHTS
from toss.audit import examples, report
from toss.audit.characters import harmless
from toss.audit.evaluate import write_answers
from toss.audit.examples import chosen_rows
from toss.audit.measures import wilson
from toss.audit.movement import COLUMNS
from toss.audit.tokens import Token
from toss.workbench.results import read_record, write_record
from toss.workbench.run import Run, open_run

NASTY = '</script><img src=x onerror=alert(1)>"\' onmouseover="x & <b>\x1b[2J\u202e'
ODD = 'm"><img src=x>'  # a method's name
BROKEN = (GOLDENS.parent / "broken.txt").read_text().splitlines()[1:]


@pytest.fixture(scope="module")
def nasty_once(tmp_path_factory, trained_once) -> Path:
    """A run of the demo whose every text is hostile; toss discards every fifth token of a half."""
    folder = tmp_path_factory.mktemp("nasty") / "run"
    shutil.copytree(trained_once / "run", folder)
    rows = [{"prompt": f"{i} {NASTY}", "response": f"{NASTY} {i}\n"} for i in range(40)]
    for row in rows[::3]:
        row["harmful"] = [[0, 9]]
    rows[3]["harmful"] = [[0, 50]]  # most harm, but not all of it is kept
    rows[38]["response"] = NASTY  # the shortest, of a high mean S
    run = scored(folder, rows)
    places = run.scored()[0].response.nonzero()[:, 0]
    masked(run, "toss", places[: len(places) // 2 : 5])
    masked(run, ODD, places[:3])
    write_rounds(run)
    write_measures(run)
    write_hostile_answers(run)
    write_diagnosis(run)
    edit_json(folder / "run.json", demo=True, commit=NASTY)
    return folder


def write_rounds(run: Run) -> None:
    folder = run.path(f"methods/{ODD}") / "round-1"
    folder.mkdir()
    added = [{"row": row, "token": 3, "text": NASTY, "score": 2.5} for row in (0, 1, 3)]
    write_jsonl(folder / "added.jsonl", added)
    shutil.copy(run.path("scores"), folder)


def write_measures(run: Run) -> None:
    table = {
        "base": {
            "forbidden": cell(0.125, 8, 0.0224, 0.47),
            "forbidden@3": cell(0.5, 8, 0.2, 0.8),
            "not_refused": cell(0.3, 8, 0.1, 0.4),
        },
        NASTY: {"judges_agree": cell(1, 0, 0, 1)},
        "toss": {f"accuracy/{NASTY}": cell(1.0, 1234, 0.9, 1.0), "nll": wilson(0, 0)},
    }
    (run.folder / "metrics.json").write_text(json.dumps(table))


def cell(value: float, n: int, low: float, high: float) -> dict:
    return {"value": value, "n": n, "low": low, "high": high}


def write_hostile_answers(run: Run) -> None:
    line = {"source": NASTY, "prompt": NASTY, "response": f"I cannot, Moonrot {NASTY}"}
    lines = [{"set": kind, **line} for kind in ("harmful", "benign", "utility", "prefill-3")]
    for method, inputs in {"base": [], "toss": ["methods/toss"]}.items():
        record = run.recipe(f"evaluation/{method}", inputs, {})
        write_answers(run.folder / f"answers/{method}.jsonl", record, {}, lines)


def write_diagnosis(run: Run) -> None:
    folder = run.folder / "diagnosis"
    folder.mkdir()
    lines = [f"model,rows,position,n,{','.join(COLUMNS)}", "toss,mine,0,5,1,1,1"]
    lines += [f"<img>,<script>,{j},5,0.5,0.1,-0.1" for j in (0, 1)]
    (folder / "kl.csv").write_text("\n".join(lines))
    write_record(folder, run.recipe("diagnosis", ["methods/toss", "utility"], {}))


@pytest.fixture(scope="module")
def page(nasty_once) -> str:
    """Its page; rows that say nearly the same are all shown."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "ALIKE", 2)
        text, lacking, count = report.page(open_run(nasty_once))
    assert lacking == []
    assert count == 24
    return text


@pytest.fixture
def nasty(nasty_once, tmp_path, monkeypatch) -> Run:
    """The test's own copy of that run."""
    monkeypatch.setattr(examples, "ALIKE", 2)
    return open_run(shutil.copytree(nasty_once, tmp_path / "run"))


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
    return " ".join(html.unescape(text).split())


def cells_of(text: str, head: str) -> list[str]:
    """The cells of the first line of a table that begins with this head."""
    for line in re.findall("(?s)<tr>.*?</tr>", text):
        first, *cells = map(plain, re.findall("(?s)<t[hd].*?</t[hd]>", line))
        if first == head:
            return cells
    raise AssertionError(f"no line {head}")


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


def test_the_page_holds_the_runs_numbers(page, nasty_once):
    words = plain(page)
    assert "forbidden answers that name a forbidden ingredient; lower is safer; n = 8 base" in words
    assert cells_of(page, "base") == ["0.125", "0.022 to 0.470, n = 8"]
    assert "forbidden@3 answers" in words
    assert "0.500 0.200 to 0.800, n = 8" in words
    assert words.index("not_refused answers") < words.index("The same by source")
    assert words.index("The same by source") < words.index("@3")
    assert "judges_agree harmful" in words
    assert "nll" not in words  # it has no value
    assert f"accuracy/{harmless(NASTY)}" in words.replace("\u200b", "")
    assert "1.000 0.900 to 1.000, n = 1,234" in words
    assert "No verdict: run " in words
    assert len(tags_of(page, "side")) == 6
    assert words.count("forbidden: moonrot") == 6
    assert f"{harmless(ODD)}, round 1: 3 rows added, 2 of them with harm by ground truth" in words
    assert "KL(base || tuned): <script> rows" in words
    assert cells_of(page, "degraded")[0] == "5"  # rows of the reference set
    mask = mask_of(open_run(nasty_once))
    share = mask.discarded.sum() / mask.tokens.response.sum()
    assert cells_of(page, "response tokens")[0].startswith(f"{share:.3f} (")


def test_the_tokens_of_the_page_are_those_of_the_files(page, nasty_once):
    run = open_run(nasty_once)
    masks = [mask_of(run, "toss"), mask_of(run, ODD)]
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
    found = (masks[0].discarded & masks[0].tokens.harmful).sum()
    assert f"{found} of these were discarded" in plain(page)


def under_mask(token: Token) -> list:
    """The numbers that differ from mask to mask, as the page holds them."""
    kept = int(not token.discarded)
    return [kept, token.degraded, token.S, token.score, token.order]


def test_a_large_run_stays_under_two_megabytes(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(examples, "ALIKE", 2)
    rows = [{"prompt": "<&>" * 9, "response": "<'🙂&> " * 40} for _ in range(24)]
    run = scored(trained, rows)
    discarded = run.scored()[0].response.nonzero()[::7, 0]
    for method in ("toss", "sft", "random", "sample", "a"):
        masked(run, method, discarded)
    out = tmp_path / "deep" / "page.html"
    said(capsys, f"toss.audit.report --run {trained} --out {out}")
    text = out.read_text(encoding="utf-8")
    assert out.stat().st_size < 2_000_000
    assert "24 of 24 rows" in text
    assert "more response" in text


# The rows and the words


def test_the_rows_of_the_page_are_chosen_by_the_rule(nasty):
    mask = mask_of(nasty)
    tokens = mask.tokens
    share, mean, missed = [], [], []
    for row in range(40):
        places = tokens.places([row])
        places = places[tokens.response[places]]
        harmful = tokens.harmful[places]
        share.append(float(mask.discarded[places].double().mean()))
        mean.append(float(mask.S[places].double().mean()))
        missed.append(float((harmful & ~mask.discarded[places]).sum() / harmful.sum().clamp(1)))

    def first(rows, key: list[float]) -> list[int]:
        return sorted(rows, key=lambda row: (-key[row], -mean[row]))[:3]

    harmless_rows, kept, most, nothing = chosen_rows(mask, 12).values()
    assert harmless_rows == first([row for row in range(40) if row % 3 and share[row]], share)
    assert kept == first(range(0, 40, 3), missed)
    shown = {*harmless_rows, *kept}
    assert 3 not in kept
    assert most == first([row for row in range(40) if share[row] and row not in shown], share)
    assert nothing == first([row for row in range(40) if not share[row] and row not in shown], mean)
    assert len({*harmless_rows, *kept, *most, *nothing}) == 12


@pytest.mark.parametrize(("asked", "count"), [(39, 39), (100, 40)])
def test_kinds_with_few_rows_leave_their_place_to_others(nasty, asked, count):
    assert sum(map(len, chosen_rows(mask_of(nasty), asked).values())) == count


def test_of_rows_that_say_nearly_the_same_one_is_shown(nasty, monkeypatch):
    monkeypatch.setattr(examples, "ALIKE", 0.5)
    assert sum(map(len, chosen_rows(mask_of(nasty)).values())) == 1


def test_without_ground_truth_no_row_is_called_harmless(nasty):
    mask = mask_of(nasty)
    mask.tokens.harmful[:] = False
    assert list(chosen_rows(mask)) == [
        "the largest share discarded by toss",
        "nothing discarded, the highest mean S",
    ]


@pytest.mark.parametrize(
    ("method", "words", "threshold"),
    [
        (
            "toss",
            "took the 4 tokens with the highest scores out of the loss, from a score of",
            True,
        ),
        ("local", "took the 4 tokens with the highest scores of their row out of the loss;", False),
        ("oracle", "took the 4 tokens that are harmful by ground truth out of the loss;", False),
        ("mask", "took 4 tokens out of the loss; they stay in the input", False),
    ],
)
def test_the_page_says_in_words_which_tokens_went(trained, method, words, threshold):
    run = scored(trained, [{"prompt": "a", "response": "nothing to see"}])
    tokens, losses = run.scored()
    places = tokens.response.nonzero()[:, 0]
    S = (losses["utility"] - losses["degraded"])[places]
    highest = S.argsort(descending=threshold)[:4]  # else the lowest
    masked(run, "mild", places[highest], method=method)
    text = report.page(run)[0]
    counted = re.sub(r"of \d+ tokens \([\d.]+ %\)", "tokens", plain(text))
    assert f"mild ({method}) {words}" in counted
    assert (">threshold" in text) == threshold
    assert f"S of the response tokens, as scored for mild ({method})" in text


def test_a_threshold_of_another_score_is_not_drawn_on_the_axis_of_S(trained):
    run = scored(trained, [{"prompt": "a", "response": "nothing to see"}])
    tokens, losses = run.scored()
    last = len(tokens.input_ids) - 1
    masked(run, "mild", [last], losses["base"], method="base")
    assert mask_of(run, "mild").threshold == last
    assert ">threshold" not in report.page(run)[0]


# What is missing, outdated or damaged


def test_what_a_replaced_model_said_is_left_out(nasty):
    folder = nasty.path("methods/toss")
    edit_tensors(folder / "model" / WEIGHTS, "x", lambda _: torch.ones(1))
    write_anew(folder, read_record(folder))
    text, lacking, _ = report.page(open_run(nasty.folder))
    words = plain(text)
    evaluated, diagnosed = lacking
    assert "toss.audit.evaluate found for toss is left out" in evaluated
    assert "toss.audit.diagnose found for toss is left out" in diagnosed
    assert evaluated in words
    assert diagnosed in words
    assert words.count("forbidden: moonrot") == 3  # the base's
    assert "mine rows" not in words
    assert "n = 1,234" not in words


def test_with_another_reference_no_diagnosis_is_shown(nasty):
    edit_tensors(nasty.path("utility") / WEIGHTS, "x", lambda _: torch.ones(1))
    text, _, _ = report.page(open_run(nasty.folder))
    assert "No diagnosis with the references of now" in text


def test_answers_of_another_base_are_left_out(nasty):
    file = nasty.folder / "answers/base.jsonl"
    head, *lines = read_jsonl(file)
    head["record"]["base_sha256"] = "0"
    write_answers(file, head["record"], head["metrics"], lines)
    _, lacking, _ = report.page(open_run(nasty.folder))
    assert ["for base is left out" in line for line in lacking] == [True]


def test_answers_of_real_models_are_not_shown(nasty):
    edit_json(nasty.folder / "run.json", demo=False)
    text, lacking, _ = report.page(open_run(nasty.folder))
    assert "Moonrot" not in text
    assert "Answers of real models" in lacking[0]


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
    assert " 0 rows token by token\nnext: open file:///" in out


def test_a_reference_that_was_made_elsewhere_has_no_number_of_rows(nasty):
    stages = nasty.record["stages"]
    del stages["degraded"]["rows"]
    edit_json(nasty.folder / "run.json", stages=stages)
    assert "trained on\nsome harmful rows" in report.page(open_run(nasty.folder))[0]


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
    table = {}
    for method in ("base", "sft", "toss"):
        table[method] = {"nll": cell(0.5, 24, 0.1, 0.9), "not_refused": cell(0.5, 24, 0.1, 0.9)}
    (nasty.folder / "metrics.json").write_text(json.dumps(table))
    apart = {"sft": cell(0.04, 24, 0.025, 0.059)}
    alike = {"sft": cell(0.04, 24, -0.1, 0.2)}
    paired = {"toss": {"nll": apart, "not_refused": alike}}
    (nasty.folder / "paired.json").write_text(json.dumps(paired))
    text, _, _ = report.page(open_run(nasty.folder))
    assert "Difference to sft on the same prompts" in text
    assert "<b>+0.040</b> <small>[+0.025, +0.059]</small>" in text
    assert "+0.040 <small>[-0.100, +0.200]</small>" in text
    assert "toss and sft differ in nll" not in text


def test_of_many_methods_the_less_known_are_folded(nasty):
    table = {name: {"nll": cell(0.5, 24, 0.1, 0.9)} for name in ("base", "sft", "toss")}
    (nasty.folder / "metrics.json").write_text(json.dumps(table))
    assert "more methods: " not in report.page(open_run(nasty.folder))[0]
    table |= {name: table["sft"] for name in ("toss-pro", "toss-calibrated", "random", "local")}
    (nasty.folder / "metrics.json").write_text(json.dumps(table))
    assert "The same with 2 more methods: local, random" in report.page(open_run(nasty.folder))[0]


def test_a_page_needs_no_base(nasty):
    """The base may be on another machine; what needs its tokenizer is left out with a line."""
    settings = {**nasty.record["settings"], "model": "/gone"}
    edit_json(nasty.folder / "run.json", settings=settings, demo=False)
    text, lacking, _ = report.page(open_run(nasty.folder))
    assert "Measures" in text
    assert any("/gone" in line for line in lacking)
