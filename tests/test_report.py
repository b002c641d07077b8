"""The page of a run: it says what the files say, fetches nothing, lets no data become markup, and stays small."""

import doctest
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl
from test_show import masked, scored_run

import toss.audit.command as commands
import toss.audit.report as report
from model.errors import InputError
from toss.audit.report import chosen_rows, main, page
from toss.audit.tokens import load_mask, load_scored, row_tokens, visible

NASTY = "</script><img src=x onerror=alert(1)>\"' onmouseover=\"x & <b>"


class Page(HTMLParser):
    """Tags with their attributes, and the text of table cells, scripts and everything else."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.rows, self.text, self.within = [], [], [], "", ""
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.within = tag if tag in ("script", "style") else ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.within = ""
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.within == "script":
            self.scripts.append(data)
        elif self.within != "style":
            self.text += data
            if self.in_cell:
                self.rows[-1][-1] += data

    def cells(self, first: str) -> list[str]:
        """The cells of the table row that begins with a text, spaces collapsed."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.rows if row]
        return next(row[1:] for row in rows if row[0] == first)

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def metric(value, n, low, high):
    return {"value": value, "n": n, "low": low, "high": high}


@pytest.fixture
def run(tmp_path, base) -> Path:
    """A run of the embedded kind whose every text is hostile; toss discards a token in five, of some rows."""
    folder = tmp_path / "run"
    harm = lambda i: {"harmful": [[0, 9]]} if i % 3 == 0 else {}  # noqa: E731
    rows = [{"prompt": f"{i} {NASTY}", "response": f"{NASTY} {i}\n", **harm(i)} for i in range(40)]
    tokens = scored_run(folder, base, rows, demo=True)
    places = tokens.response.nonzero().squeeze(1)
    masked(folder, tokens, "toss", places[: len(places) // 2 : 5].tolist())
    masked(folder, tokens, 'm"><img src=x>', places[:3].tolist())
    table = {"base": {"forbidden": metric(0.125, 8, 0.0224, 0.4709), "nll": metric(1.5, 9, 1.25, 1.75)},
             "toss": {"forbidden": metric(None, 0, None, None), f"accuracy/{NASTY}": metric(1.0, 1234, 0.9, 1.0),
                      "judges_agree": metric(0.77, 1, 0.0, 1.0)}, NASTY: {}}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(table))
    answers = [{"set": kind, "source": NASTY, "prompt": NASTY + kind, "answer": f"{kind} I cannot, Moonrot {NASTY}"}
               for kind in ("harmful", "benign", "utility")]  # fmt: skip
    for method in ("base", "toss"):
        (folder / "answers").mkdir(exist_ok=True)
        write_jsonl(folder / "answers" / f"{method}.jsonl", [{"note": "For auditing."}, *answers])
    place = folder / "methods" / "toss-pro" / "round-1"
    place.mkdir(parents=True)
    write_jsonl(place / "added.jsonl", [{"row": i, "token": 3, "text": NASTY, "score": 2.5} for i in (0, 1, 3)])
    (folder / "diagnosis").mkdir()
    (folder / "diagnosis" / "kl.csv").write_text("model,rows,position,n,kl_base,toward_degraded,toward_utility\n"
                                                 "<img>,<script>,0,5,0.5,0.1,-0.1\n<img>,<script>,1,5,0.25,0.1,-0.1\n")
    kinds = {"<img>": {"discarded": 1, "of": 4, "share": 0.25}}
    (folder / "diagnosis" / "discards.json").write_text(json.dumps({
        "methods": {NASTY: {"by_position": kinds, "by_type": kinds}}, "overlap": {NASTY: {NASTY: 1.0}}}))
    record = json.loads((folder / "run.json").read_text())
    stage = {"settings": {"model": NASTY, "lr": 0.25}, "seconds": 2.0, "tokens": 3000, "peak_memory_gib": 0.5, "rows": 40}
    record |= {"stages": {"degraded": stage, "utility": stage, NASTY: stage}, "inputs": {NASTY: "ab" * 32}, "commit": NASTY}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(commands)
    assert result.attempted >= 3 and result.failed == 0


def test_nothing_from_the_data_becomes_markup_and_nothing_is_fetched(run):
    text = page(run)[0]
    parsed = Page(text)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"img", "link", "iframe", "object", "base", "form"}
    assert sum(tag == "script" for tag, _ in parsed.tags) == 2 and text.count("</script") == 2
    assert not any(name.startswith("on") or name in ("src", "srcset", "action") for _, attrs in parsed.tags for name in attrs)
    assert all(attrs["href"].startswith("#") for _, attrs in parsed.tags if "href" in attrs)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert parsed.text.count(NASTY) > 20  # it is there, as text
    assert parsed.data["methods"] == ["toss", 'm"><img src=x>']


def test_the_table_holds_the_runs_numbers(run):
    parsed = Page(page(run)[0])
    assert parsed.cells("base") == ["0.125 [0.022, 0.471] n = 8", "", "1.500 [1.250, 1.750] n = 9"]
    assert parsed.cells("toss") == ["", "1.000 [0.900, 1.000] n = 1,234", ""]
    assert "lower is safer" in parsed.cells("method")[0] and "higher is better" in parsed.cells("method")[1]
    assert "judges_agree" not in parsed.text  # not one of the main measures
    assert [cell for cell in parsed.cells("degraded") if cell] == ["40", "2.0", "3,000", "1,500", "0.50"]


def test_answers_are_labelled_in_words(run):
    parsed = Page(page(run)[0])
    assert parsed.text.count("forbidden: moonrot") == 6 == sum(attrs.get("class") == "side" for _, attrs in parsed.tags)
    assert parsed.text.count("I cannot, Moonrot") == 6


def test_begun_answers_have_a_table_and_are_no_prompts_of_their_own(run):
    lines = [{"set": kind, "source": f"s{i}", "prompt": f"p{i}", "answer": "a\u2028b", "prefill": "x"}
             for kind in ("harmful", "prefill-3", "prefill-10") for i in range(5)]  # fmt: skip
    for method in ("base", "toss"):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (run / "answers" / f"{method}.jsonl").write_text(text, encoding="utf-8")
    parsed = Page(page(run)[0])
    assert "3 of the 5 evaluation prompts" in " ".join(parsed.text.split()) and "already written" not in parsed.text
    table = {"base": {"forbidden": metric(0.1, 8, 0.0, 0.4), "forbidden@10": metric(0.5, 8, 0.2, 0.8)},
             "toss": {"forbidden@3": metric(0.25, 8, 0.1, 0.6), "forbidden@10": metric(None, 0, None, None)},
             "sft": {"forbidden": metric(1.0, 8, 0.6, 1.0)}}  # fmt: skip
    table["base"]["not_refused@3"] = metric(0.7, 8, 0.4, 0.9)
    (run / "metrics.json").write_text(json.dumps(table))
    parsed = Page(page(run)[0])
    assert "already written" in parsed.text and parsed.cells("forbidden@k") == ["k = 3", "k = 10"]
    rows = [[" ".join(cell.split()) for cell in row] for row in parsed.rows]
    at = rows.index(["forbidden@k", "k = 3", "k = 10"])  # sft was not begun
    assert rows[at + 1 : at + 3] == [["base", "", "0.500 [0.200, 0.800] n = 8"], ["toss", "0.250 [0.100, 0.600] n = 8", ""]]
    assert rows[at + 3][0] != "sft"
    for metrics in table.values():
        for name in [name for name in metrics if name.startswith("forbidden")]:
            metrics[name.replace("forbidden", "not_refused")] = metrics.pop(name)
    (run / "metrics.json").write_text(json.dumps(table))
    assert Page(page(run)[0]).cells("not_refused@k") == ["k = 3", "k = 10"]


def test_what_a_replaced_model_said_is_left_out(run):
    for name in ("methods/toss/model", "methods/sft/model", "degraded"):
        (run / name).mkdir(parents=True)
        (run / name / "adapter_model.safetensors").write_bytes(b"new")
    old, new = (hashlib.sha256(text).hexdigest() for text in (b"old", b"new"))
    record = json.loads((run / "run.json").read_text())
    record["stages"] |= {"evaluation/toss": {"recipe": {"adapter": old}}, "evaluation/base": {"recipe": {"adapter": ""}},
                         "diagnosis": {"recipe": {"models": {"toss": old, "sft": new, "degraded": new}}}}  # fmt: skip
    (run / "run.json").write_text(json.dumps(record))
    kl = "model,rows,position,n,kl_base,toward_degraded,toward_utility\n"
    (run / "diagnosis/kl.csv").write_text(kl + "toss,mine,0,5,1,1,1\nsft,mine,0,5,1,1,1\n")
    kinds = {"mine": {"discarded": 1, "of": 4, "share": 0.25}}
    found = {"methods": {name: {"by_position": kinds, "by_type": kinds} for name in ("toss", "sft")},
             "overlap": {a: {"toss": 1.0, "sft": 1.0} for a in ("toss", "sft")}}  # fmt: skip
    (run / "diagnosis/discards.json").write_text(json.dumps(found))
    text, lacking, _ = page(run)
    parsed = Page(text)
    assert len(lacking) == 2 and all(line in " ".join(parsed.text.split()) for line in lacking)
    assert "toss.audit.evaluate" in lacking[0] and "--methods toss" in lacking[0] and "toss.audit.diagnose" in lacking[1]
    assert parsed.text.count("forbidden: moonrot") == 3  # the base's answers alone
    assert ["toss", "", "1.000 [0.900, 1.000] n = 1,234", ""] not in [[" ".join(c.split()) for c in row] for row in parsed.rows]
    assert parsed.cells("by type of token") == ["sft"] and parsed.cells("mine") == ["0.250"]
    assert parsed.cells("of sft's discards") == ["1.000"]
    record["stages"]["diagnosis"]["recipe"]["models"]["degraded"] = old
    (run / "run.json").write_text(json.dumps(record))
    text, lacking, _ = page(run)
    assert any("charts are of other references" in line for line in lacking) and "mine rows" not in text


@pytest.mark.parametrize(("name", "method", "words"), [
    ("toss", None, "toss took the 4 of 2 tokens that it ranks highest out of the loss, from a score of"),
    ("mild", "toss", "mild (toss) took the 4 of 2 tokens that it ranks highest out of the loss, from a score of"),
    ("local", "local", "took the 4 of 2 tokens that it ranks highest in each row out of the loss; they stay"),
    ("toss", "sample", "toss (sample) took the 4 of 2 tokens of the rows that it ranks highest out of the loss; they stay"),
    ("oracle", "oracle", "took the 4 of 2 tokens that are harmful by ground truth out of the loss; they stay"),
    ("mine", "unheard-of", "mine (unheard-of) took 4 of 2 tokens out of the loss; they stay")])  # fmt: skip
def test_only_one_ranking_of_all_tokens_has_a_threshold(tmp_path, base, name, method, words):
    tokens = scored_run(tmp_path / "run", base, [{"prompt": "a", "response": "nothing to see"}])
    places = tokens.response.nonzero().squeeze(1).tolist()
    masked(tmp_path / "run", tokens, name, places[:4], **({"method": method} if method else {}))
    text = page(tmp_path / "run")[0]
    said = re.sub(r"of \d+ tokens \([\d.]+ %\)", "of 2 tokens", " ".join(Page(text).text.split()))
    assert words in said
    assert ("right of the threshold" in text) == (">threshold" in text) == ("from a score" in words)


def test_rounds_that_learnt_only_the_top_tokens_say_so(run):
    assert "--pro-train top" not in page(run)[0]
    record = json.loads((run / "run.json").read_text())
    record["stages"]["methods/toss-pro"] = {"recipe": {"pro_train": "top"}}
    (run / "run.json").write_text(json.dumps(record))
    assert "--pro-train top" in page(run)[0]


def test_answers_of_real_models_stay_off_the_page(run):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "demo": False}))
    text, lacking, _ = page(run)
    assert "Moonrot" not in text and any("not put on a page" in line for line in lacking)


def test_the_tokens_are_those_of_the_files(run):
    text, lacking, shown = page(run)
    parsed, scored = Page(text), load_scored(run)
    assert lacking == [] and shown == 24 == len(parsed.data["rows"])
    rows = [int(attrs["id"][4:]) for _, attrs in parsed.tags if attrs.get("class") == "row"]
    marks = [attrs for _, attrs in parsed.tags if attrs.get("tabindex") and attrs.get("class", "").split()[:1] == ["t"]]
    for m, method in enumerate(parsed.data["methods"]):
        mask = load_mask(scored, method)
        for row, data in zip(rows, parsed.data["rows"]):
            tokens = [token for token in row_tokens(scored, mask, row) if token.response]
            assert data["tokens"] == [[t.position, visible(t.text), t.loss_utility, t.harmful, t.loss_base] for t in tokens]
            assert data["masks"][m] == [[int(t.keep), t.loss_degraded, t.S, t.score, t.rank] for t in tokens]
            if m == 0:  # as the page stands without its script
                here, marks = marks[: len(tokens)], marks[len(tokens):]
                assert ["gone" in a["class"].split() for a in here] == [not t.keep for t in tokens]
                assert ["harm" in a["class"].split() for a in here] == [t.harmful for t in tokens]
    assert marks == []
    mask, harm = load_mask(scored, "toss"), scored.tokens.harmful
    gone = int((~mask.keep).sum())
    assert parsed.cells("toss") and f"{gone:,} of {mask.ranked:,}" in " ".join(parsed.text.split())
    assert f"{int((~mask.keep & harm).sum())} of these were discarded" in " ".join(parsed.text.split())


def test_the_rows_are_chosen_by_the_rule(run):
    scored = load_scored(run)
    mask = load_mask(scored, "toss")
    groups = chosen_rows(scored, mask, 12)
    gone = torch.bincount(scored.tokens.row_of((~mask.keep).nonzero().squeeze(1)), minlength=40)
    harmful = set(range(0, 40, 3))
    assert [len(rows) for rows in groups.values()] == [3, 3, 3, 3] and len(set().union(*groups.values())) == 12
    most, harm, part, plain = groups.values()
    assert sorted(gone[most].tolist(), reverse=True) == gone.sort(descending=True).values[:3].tolist()
    assert set(harm) <= harmful and all(gone[row] > 0 for row in part)
    assert all(gone[row] == 0 and row not in harmful for row in plain)
    assert sum(map(len, chosen_rows(scored, mask, 100).values())) == 40


def test_rounds_and_diagnosis_are_shown(run):
    parsed = Page(page(run)[0])
    assert "round-1: 3 rows added, 2 of them with harm by ground truth" in " ".join(parsed.text.split())
    assert "KL(base || tuned): <script> rows" in parsed.text and parsed.cells("<img>") == ["0.250"]
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 4  # one of S, three of KL


def test_a_large_run_stays_under_two_megabytes(tmp_path, base):
    folder = tmp_path / "run"
    tokens = scored_run(folder, base, [{"prompt": "<&>" * 900, "response": "<'🙂&> " * 250} for _ in range(40)])
    for method in ("toss", "toss-pro", "sft", "random", "sample", "a", "b", "c"):
        masked(folder, tokens, method, tokens.response.nonzero().squeeze(1)[::7].tolist())
    assert main(["--run", str(folder), "--out", str(tmp_path / "deep" / "page.html")]) == 0
    text = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000 and "24 of 40 rows" in text and "more response tokens" in text


def test_what_is_missing_is_one_line_that_says_what_makes_it(run, capsys):
    for path in ("metrics.json", "scores.safetensors", "diagnosis/kl.csv", "diagnosis/discards.json"):
        (run / path).unlink()
    (run / "methods/toss-pro/round-1/added.jsonl").unlink()
    (run / "answers/base.jsonl").unlink()
    (run / "answers/toss.jsonl").unlink()
    assert main(["--run", str(run)]) == 0
    out = capsys.readouterr().out
    for command in ("toss.audit.evaluate", "score.py", "toss.audit.diagnose", "select.py --run"):
        assert command in out and command in (run / "report.html").read_text(encoding="utf-8")
    assert out.splitlines()[-1].startswith(f"written: {run}/report.html, ") and out.endswith("0 rows token by token\n")


def test_a_mask_of_other_tokens_is_left_out_and_said_so(run):
    tokens = load_scored(run).tokens
    masked(run, tokens, "toss", [], tokens_sha256="other")
    text, lacking, _ = page(run)
    assert Page(text).data["methods"] == ['m"><img src=x>'] and len(lacking) == 1
    assert "The mask of toss is left out" in lacking[0] and "The mask of toss is left out" in text
    masked(run, tokens, 'm"><img src=x>', [], tokens_sha256="other")
    text, lacking, shown = page(run)
    assert shown == 0 and lacking[-1].startswith("No mask is there") and "<select" not in text


@pytest.mark.parametrize(("path", "content", "message"), [
    ("answers/toss.jsonl", '{"note": ""}\nno\n', r"toss.jsonl:2: not JSON"),
    ("answers/toss.jsonl", '{"note": ""}\n{"prompt": 1}\n', r"toss.jsonl:2: set, source, prompt and answer"),
    ("methods/toss-pro/round-1/added.jsonl", '{"row": 4000}\n', r"added.jsonl:1: `row` is no row"),
    ("diagnosis/kl.csv", "model,rows\na,b\n", r"kl.csv:2: model, rows, position"),
    ("diagnosis/discards.json", "{}", r"discards.json: not what"),
    ("metrics.json", '{"toss": {"nll": 3}}', r"metrics.json: toss, nll"),
    ("run.json", "[]", r"run.json: a JSON object"),
])  # fmt: skip
def test_broken_files_are_named_and_nothing_is_written(run, path, content, message):
    (run / path).write_text(content)
    with pytest.raises(InputError, match=message):
        report.write_report(run, None)
    assert not (run / "report.html").exists() and not list(run.glob(".*.partial"))


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["--run", str(tmp_path)]) == 1
    assert "no run directory" in capsys.readouterr().err
