"""What was dropped: row, page, picture, charts and diagnosis say what the files of a run say."""

import csv
import html
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    GOLDENS,
    damage,
    edit_json,
    edit_tensors,
    fails,
    make_base,
    read_jsonl,
    script,
    write_jsonl,
)
from helpers import random_adapter, refused, said

from model import load_checkpoint
from model.io import save_tensors
from model.lora import use
from model.peft import WEIGHTS, save_adapter
from toss.audit import discards, report, show
from toss.audit.command import cautions
from toss.audit.discards import chosen_rows, response_positions, token_type
from toss.audit.evaluate import write_answers
from toss.audit.figures import histogram, line_chart, picture
from toss.audit.movement import COLUMNS, divergences, groups_of_run, kl_table, means
from toss.audit.tokens import INPUTS, Mask, harmless, load_mask, token_texts, visible
from toss.audit.verdict import verdict
from toss.tokens import Tokens
from toss.workbench.files import write_scores
from toss.workbench.results import RECORD, read_record, write_record
from toss.workbench.run import Run, open_run

SVG = "{http://www.w3.org/2000/svg}"
ODD = 'm"><img src=x>'
NASTY = '</script><img src=x onerror=alert(1)>"\' onmouseover="x & <b>\x1b[2J\u202e'
NO_NO = {"prompt": "a", "response": "no no", "harmful": [[3, 5]]}


def scored(folder: Path, rows: list[dict]) -> Run:
    """A trained run with another custom set. Of the n-th of all tokens L^u = n + 0.5, L^h = 1.5
    (n mod 7) and L^0 = n."""
    path = write_jsonl(folder.parent / "other.jsonl", rows)
    record = json.loads((folder / "run.json").read_text())
    edit_json(folder / "run.json", settings={**record["settings"], "custom": path})
    run = open_run(folder)
    tokens = run.tokens(path)
    n = torch.arange(len(tokens.input_ids)).float() * tokens.response
    losses = {"utility": (n + 0.5) * tokens.response, "degraded": n % 7 * 1.5, "base": n}
    record = {**run.recipe("scores", INPUTS, {"base": True}), "dtype": "float32"}
    write_scores(run.path("scores"), tokens, losses, record)
    return run


def masked(run: Run, name: str, gone, score: torch.Tensor | None = None, **settings) -> None:
    """The folder methods/NAME with a mask that discards the given places of the flat arrays."""
    place, keep = run.path(f"methods/{name}"), run.scored()[0].response.clone()
    keep[torch.as_tensor(gone, dtype=torch.int64)] = False
    inputs, settings = (*INPUTS, "scores"), {"method": name, **settings}
    record = run.recipe(f"methods/{name}", inputs, settings)
    shutil.copytree(run.path("utility"), place / "model", dirs_exist_ok=True)
    tensors = {"keep": keep} | ({} if score is None else {"score": score})
    save_tensors(tensors, place / "selection.safetensors", record)
    write_anew(place, record)


def write_anew(folder: Path, record: dict) -> None:
    """Write record.json for what is in the folder now."""
    (folder / RECORD).unlink(missing_ok=True)
    write_record(folder, record)


def mask_of(run: Run, name: str = "toss") -> Mask:
    return load_mask(run, name, *run.scored())


@pytest.fixture
def small(trained) -> Run:
    """Two rows; the first response is `no`, ` `, `no` and EOS: toss discards ` ` and the next."""
    run = scored(trained, [NO_NO, {"prompt": "b", "response": "ok"}])
    first = int(run.scored()[0].response.nonzero()[0])
    masked(run, "toss", range(first + 1, first + 3))
    masked(run, "sft", [])
    return run


def test_characters_that_are_spread_over_tokens_come_out_whole(tokenizer):
    text = "Grüße 🙂, 日本\n  ok"
    ids = tokenizer.encode(text) + [tokenizer.eos_id]
    texts = token_texts(tokenizer.raw, ids)
    assert len(texts) == len(ids) and "".join(texts) == text + tokenizer.eos
    assert texts[texts.index("🙂") - 1] == ""  # the token before it holds only a part of it
    assert token_texts(tokenizer.raw, tokenizer.encode("🙂")[:-1])[-1] == "\ufffd"  # unfinished


def test_the_numbers_of_a_row_are_those_of_the_files(small):
    mask = mask_of(small)
    row, S = mask.row(1), mask.S[mask.tokens.response]
    assert "".join(token.text for token in row).endswith("ok" + small.tokenizer.eos)
    for n, token in enumerate(row, start=int(mask.tokens.offsets[1])):
        assert token.position == n - mask.tokens.offsets[1] and token.keep and not token.harmful
        if token.response:
            assert (token.utility, token.degraded, token.base) == (n + 0.5, n % 7 * 1.5, n)
            assert token.S == token.score == n + 0.5 - n % 7 * 1.5
        assert token.order == (int((S > token.S).sum()) + 1) * token.response


def test_a_refined_degraded_model_and_its_ranking_come_with_its_mask(small):
    tokens, losses = small.scored()
    score = torch.arange(len(tokens.input_ids)).float()
    masked(small, "toss-pro", [], score, method="toss", pro=10)
    for t, shift in ((2, 0), (10, 1)):  # the last round counts, by its number
        folder = small.path(f"methods/toss-pro/round-{t}")
        folder.mkdir()
        again = {**losses, "degraded": losses["degraded"] + shift * tokens.response}
        made = {"inputs": {}, "settings": {}, "dtype": "float32"}
        write_scores(folder / "scores.safetensors", tokens, again, made)
    last = (mask := mask_of(small, "toss-pro")).row(1)[-1]
    assert last.degraded == losses["degraded"][-1] + 1 == last.utility - last.S
    assert last.score == score[-1] and last.order == 1 and mask.label == mask.method == "toss-pro"


def test_an_eos_that_is_not_ranked_has_no_order_and_a_skipped_row_no_tokens(trained, capsys):
    run = scored(trained, [{"prompt": "long " * 2048, "response": "no"}, NO_NO])
    masked(run, "toss", [], keep_eos=True)
    row = mask_of(run).row(1)
    assert row[-1].text == run.tokenizer.eos and row[-1].order == 0
    assert all(token.order for token in row[:-1] if token.response)
    line = f"toss.audit.show --run {trained} --row"
    assert "| -     | kept " in said(capsys, f"{line} 1")
    assert f"row 0 of {trained} was skipped" in said(capsys, f"{line} 0")


def test_a_threshold_is_told_only_where_it_holds_for_all_tokens():
    order = torch.tensor([0, 0, 0, 3, 1, 2])
    response = order > 0
    tokens = Tokens(order.int(), torch.tensor([0, 6]), response, harmful=~response)
    for gone, score, threshold in (
        ([4, 5], [0, 0, 0, 1, 3, 2], 2.0),
        ([4, 5], [9, 9, 9, 2, 3, 2], 2.0),  # a tie is split; scores of the prompt do not count
        ([4], [0, 0, 0, 1, 1, 2], None),  # a higher score was kept
        ([], [0, 0, 0, 1, 3, 2], None),
    ):
        keep = response.clone()
        keep[gone] = False
        mask = Mask("x", "y", tokens, {}, None, torch.tensor(score).float(), order, keep, None)
        assert mask.threshold == threshold and mask.label == "x (y)"


def test_a_row_in_the_terminal(small, capsys):
    line = f"toss.audit.show --run {small.folder} --row 0"
    assert "has no method 'no'; it has sft, toss\n" in refused(capsys, f"{line} --method no")
    for n in (2, -1):  # of a flag given twice the last counts
        assert f"there is no row {n}: the rows are 0 to 1" in refused(capsys, f"{line} --row {n}")
    out = said(capsys, line)
    assert "row 0 of 0 to 1, toss: 2 of 4 response tokens discarded, 1 harmful by" in out
    assert f"\n\nno[-·-]*[-no-]*{small.tokenizer.eos}\n" in out and "\x1b" not in out
    response = [token for token in mask_of(small).row(0) if token.response]
    lines = [line for line in out.splitlines() if re.match(r"\| \d", line)]
    marks = ("kept", "discarded", "discarded, harmful", "kept")
    for token, line, mark in zip(response, lines, marks, strict=True):
        losses = [f"{x:.3f}" for x in (token.utility, token.degraded, token.base)]
        parts = [f"{x:+.3f}" for x in (token.S, 0.5, token.base - token.degraded)]
        cells = [cell.strip() for cell in line[2:-2].split(" | ")]
        assert cells[:2] == [str(token.position), visible(token.text)]
        assert cells[2:] == [*losses, *parts, str(token.order), mark]


def test_what_a_file_is_and_whether_it_fits(small, tmp_path, base, capsys):
    shutil.copy(small.path("scores"), tmp_path / "moved")
    place, other = small.folder, make_base(tmp_path / "other", seed=1)
    copy, stages = Path(shutil.copytree(place, tmp_path / "copy")), small.record["stages"]
    (copy / "methods/toss").rename(copy / "methods/mine")
    edit_json(copy / "run.json", stages={"methods/mine": stages["degraded"]})
    model = load_checkpoint(other)
    save_adapter(use(model, random_adapter(model)), tmp_path / "alien")
    paths = {"run": place, "copy": copy, "base": base, "other": other, "tmp": tmp_path}
    for line in (GOLDENS.parent / "shown.txt").read_text().splitlines():
        argv, words = line.format(**paths, goldens=GOLDENS)[:-1].split(" -> ")  # less the stop
        status, out = show.main(argv.split()), capsys.readouterr().out
        assert words in out and status == 2 * (words[:2] in (", ", "re"))
        last = f"{argv.split()[0]}: " + (f"does not fit {place}: " if status else "fits\n")
        assert (last in out) == (str(place) in argv)


def test_what_was_made_from_other_files_does_not_fit(small, capsys):
    names = ("degraded", "scores.safetensors", "methods/toss", "")

    def look() -> list[int]:
        return [show.main([f"{small.folder}/{name}"]) for name in names]

    assert look() == [0, 0, 0, 0]
    write_jsonl(Path(small.args.custom), [{"prompt": "a", "response": "another"}])
    capsys.readouterr()
    assert look() == [0, 2, 2, 2]
    assert f"does not fit {small.folder}: --custom" in (out := capsys.readouterr().out)
    assert "scores                made from another --custom" in out
    fails("changed: --custom", mask_of, open_run(small.folder))
    Path(small.args.custom).unlink()  # a file that is gone cannot be compared
    assert look() == [0, 0, 0, 0]


def drawn(svg: str) -> tuple[set[str], list, list]:
    """The words of a chart, and the points of its lines and of its areas."""
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and root.get("viewBox") and root.get("role") == "img"
    words = {element.text for element in root.iter(f"{SVG}text")}
    lines = [points_of(element) for element in root.iter(f"{SVG}polyline")]
    areas = [points_of(element) for element in root.iter(f"{SVG}polygon")]
    return words, lines, areas


def points_of(element: ElementTree.Element) -> list[tuple[float, ...]]:
    pairs = element.get("points").split()
    return [tuple(map(float, pair.split(","))) for pair in pairs]


def test_a_line_chart_has_its_points_where_the_ticks_say():
    lines = {"a": [(0, 0), (10, 1)], "b": [(0, 1), (10, 0)]}
    words, (first, second), _ = drawn(svg := line_chart(lines, "Title", "place", "height"))
    assert {"Title", "place", "height", "a", "b", "0", "10", "1", "0.4"} <= words
    assert first[0][0] == second[0][0] < first[1][0]
    assert first[1][1] == second[0][1] < first[0][1]  # up is a smaller y
    assert len(set(re.findall("<polyline.* (stroke=.*?) .*(stroke-dasharray=.*?) ", svg))) == 2
    assert {"0", "1"} <= drawn(line_chart({"a": [(0, 0.4), (1, 0.5)]}, "", "", "", (0, 1)))[0]


def test_bands_whiskers_and_dots_span_low_to_high():
    lines = {"a": [(0, 1, 0, 2), (1, 2, 1, 3)], "b": [(1, 1, 0.5, 1.5)]}
    _, (whisker, *_), ((up, far_up, far_down, down),) = drawn(line_chart(lines, "t", "x", "y"))
    assert up[1] < down[1] and up[0] == down[0] < far_up[0] == far_down[0]
    assert whisker[0][0] == whisker[1][0] and whisker[0][1] > whisker[1][1]
    dots = {"sft": [(0, 0.5, 0.4, 0.6), (1, 1, 1, 1)], "toss": [(0, 0, 0, 0), (1, 0.2, 0.1, 0.3)]}
    words, whiskers, _ = drawn(line_chart(dots, "t", "", "share", names=["alone", "<mixed>"]))
    assert {"alone", "<mixed>", "sft", "toss"} <= words
    assert len({whisker[0][0] for whisker in whiskers}) == 4  # side by side


def test_a_histogram_shows_shares_of_each_group_and_the_threshold():
    groups = {"few": [0.0, 1.0], "many": torch.tensor([0.0] * 99 + [1.0])}
    words, (few, many, mark), _ = drawn(histogram(groups, "t", "x", threshold=0.25, bins=3))
    assert {"few (n = 2)", "many (n = 100)", "threshold 0.25", "1", "0.1", "0.01"} <= words
    assert few[1][1] == few[5][1] < few[3][1] == few[0][1]  # half, nothing (on the floor), half
    assert many[1][1] < few[1][1] < many[5][1] and mark[0][0] == mark[1][0]


def test_charts_of_nothing_of_one_value_and_of_odd_names():
    for svg in (line_chart({}, "t", "x", "y"), histogram({"a": []}, "t", "x")):
        assert "There is no data for this figure." in drawn(svg)[0]
    for value in (0.0, 7.0, -3e9, 1e-7):
        _, ((one, two),), _ = drawn(line_chart({"a": [(value, value)] * 2}, "t", "x", "y"))
        assert all(map(math.isfinite, one)) and one == two
        assert "nan" not in histogram({"a": [value] * 3}, "t", "x", threshold=value).lower()
    names = drawn(svg := line_chart({"<b>&\"'\x00": [(0, 0)]}, "</title><script>", "x", "y"))[0]
    assert "<title>&lt;/title&gt;&lt;script&gt;</title>" in svg and "<b>&\"'<00>" in names
    words = "figure 't': a value is not a finite number"
    for bad in (math.nan, math.inf):
        fails(words, line_chart, {"a": [(0, bad)]}, "t", "x", "y")
        fails(words, histogram, {"a": [0.0]}, "t", "x", threshold=bad)


@pytest.fixture
def tokens(tokenizer) -> Tokens:
    """Rows a|a7.E, none (skipped), a|aaE and a|aE: prompt|response, E for EOS."""
    a, seven, dot, eos = (*(tokenizer.encode(text)[0] for text in "a7."), tokenizer.eos_id)
    ids = [a, a, seven, dot, eos] + [a, a, a, eos] + [a, a, eos]
    response = torch.tensor([0, 1, 1, 1, 1] + [0, 1, 1, 1] + [0, 1, 1]).bool()
    harmful = torch.tensor([0, 1, 0, 0, 0] + [0, 1, 1, 0] + [0, 0, 0]).bool()
    return Tokens(torch.tensor(ids).int(), torch.tensor([0, 5, 5, 9, 12]), response, harmful)


def direct(model, tokens, one, other):
    """KL(one || other) at every response token, by row, from whole logits in float64."""
    result = torch.zeros(len(tokens.response), dtype=torch.float64)
    for at in (tokens.places([i]) for i in (0, 2, 3)):
        ids = tokens.input_ids[at][None].long()
        logits = (model.lm_head(use(model, adapter)(ids)[0]) for adapter in (one, other))
        p, q = (F.log_softmax(x.double(), dim=-1) for x in logits)
        result[at[1:]] = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)[:-1].detach()
    return result * tokens.response


@pytest.mark.parametrize(("budget", "chunk"), [(1, 100), (10, 2), (1000, 100)])
def test_kl_in_padded_batches_and_chunks_is_that_of_whole_logits(base, tokens, budget, chunk):
    model, wanted = load_checkpoint(base), tokens.response
    adapters = {n: random_adapter(model, k) for k, n in enumerate(("degraded", "utility", "sft"))}
    got = divergences(model, adapters, tokens, wanted, budget, logits=8 * 384 * chunk)

    def kl(one, other):
        return direct(model, tokens, one, other)

    for name, tuned in adapters.items():
        roles = adapters["degraded"], adapters["utility"]
        expected = [kl(None, tuned), *(kl(None, role) - kl(tuned, role) for role in roles)]
        assert torch.allclose(got[name], torch.stack(expected), atol=1e-5)
    assert (got["sft"][0][wanted] > 0).all() and (got["sft"][:, ~wanted] == 0).all()
    assert torch.equal(got["degraded"][1], got["degraded"][0])  # it went all the way to itself
    assert torch.equal(got["utility"][2], got["utility"][0])


def test_means_by_position_leave_out_what_few_rows_have(tokens):
    assert response_positions(tokens)[tokens.response].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    values = torch.zeros(3, 12, dtype=torch.float64)
    values[0, tokens.response] = torch.tensor([1.0, 2, 9, 9, 4, 2, 9, 1, 5]).double()
    lines = means(tokens, {"sft": values}, tokens.response, 10)
    assert [(x["position"], x["n"], x["kl_base"]) for x in lines] == [(0, 3, 2.0), (1, 3, 3.0)]
    table = kl_table([{"rows": "g", **line} for line in lines])
    assert "| g    | sft   | 2.000          | 3.000" in table and COLUMNS == (*report.CHARTS,)


def test_discards_counted_by_hand(tokens, tokenizer, monkeypatch):
    def table(**gone: list[int]) -> dict[str, list[str]]:
        masks = []
        for name, places in gone.items():
            keep = tokens.response.clone()
            keep[places] = False
            masks.append(Mask(name, name, tokens, {}, None, None, None, keep, None))
        tables = discards.discard_tables(masks, tokenizer, ["b", "", "a", ""])
        return {line[0]: line[1:] for header, lines in tables for line in [header, *lines]}

    found = table(toss=[1, 6, 7, 8], random=[8, 11], sft=[])
    counts = {"source: a": (3, 3), "source: b": (1, 4), "source: (none)": (0, 2)}
    counts |= {"position: 0": (2, 3), "position: 1": (1, 3), "position: 2-3": (1, 3)}
    counts |= {"type: word": (3, 4), "type: number": (0, 1), "type: punctuation": (0, 1)}
    counts |= {"type: end of sequence": (1, 3), "response tokens": (4, 9)}
    counts |= {f"rows that lost {fate}": (1, 3) for fate in ("none", "some", "all")}
    expected = {name: f"{a / n:.3f} ({a} of {n})" for name, (a, n) in counts.items()}
    shared = {"shared with": "toss", "of toss's discards": "1.000", "of random's discards": "0.500"}
    heads = {"discarded": "toss", **shared}
    assert {name: cells[0] for name, cells in found.items()} == expected | heads
    assert found["discarded"] == ["toss", "random"]  # sft discards nothing
    assert found["of toss's discards"][1] == "0.250" and found["type: word"][1] == "0.000 (0 of 4)"
    for text, kind in {"\n": "whitespace", "<|im_start|>": "other special", "é": "word"}.items():
        assert token_type(tokenizer.encode(text)[0], tokenizer) == kind  # é: half a character
    monkeypatch.setattr(discards, "SOURCES", 1)
    found = table(toss=[1, 6])
    assert found["source: (none)"] == ["0.000 (0 of 2)"]  # of rows 1 (skipped) and 3
    assert found["source: (others)"] == ["0.286 (2 of 7)"]
    assert "shared with" not in found and table(sft=[]) == {}


def test_the_discards_of_a_run_and_of_each_source(small, capsys):
    rows = [{**NO_NO, "source": "web"}, {"prompt": "b", "response": "ok", "source": "book"}]
    run = scored(small.folder, rows)
    masked(run, "toss", run.scored()[0].response.nonzero()[:3, 0])
    masked(run, "sft", [])
    line = f"toss.audit.show --run {run.folder}"
    assert "| source: web           | 0.750 (3 of 4) |" in said(capsys, line)
    assert table_rows(report.page(run)[0])["source: web"] == ["0.750 (3 of 4)"]
    masked(run, "toss", [])
    assert "No method of the run discards a token." in said(capsys, line)
    Path(run.args.custom).unlink()
    assert discards.sources_of(run) == []


def test_diagnosing_a_run(trained, capsys):
    script("select", "--run", trained)
    script("select", "--run", trained, "--method", "sft")
    line = f"toss.audit.diagnose --run {trained} --device cpu --positions 4"
    printed = said(capsys, f"{line} --max-rows 6")
    assert "benign: 6 of 8 rows of custom.jsonl" in printed and "mixed: 2 of 2 rows" in printed
    assert "harmful-reference: 5 of 5 rows of harmful.jsonl" in printed
    with open(trained / "diagnosis/kl.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    seen = {name: {line[name] for line in lines} for name in lines[0]}
    assert list(seen) == ["model", "rows", "position", "n", *COLUMNS]
    assert seen["model"] == {"sft", "toss", "degraded", "utility"}
    assert seen["rows"] == {"benign", "harmful-reference"}  # two mixed rows are too few
    own = [line for line in lines if line["model"] == "degraded"]
    assert all(line["kl_base"] == line["toward_degraded"] > "0" for line in own)
    assert open_run(trained).stale("diagnosis") == []
    script("select", "--run", trained, "--method", "sft", "--seed", "7", "--overwrite")
    assert open_run(trained).stale("diagnosis") == ["methods/sft"]
    rows = write_jsonl(trained.parent / "mine.jsonl", [{"prompt": "a", "response": "b"}] * 4)
    said(capsys, f"{line} --rows {rows} --methods sft")  # the old groups are gone
    assert "mine,0,4," in (trained / "diagnosis/kl.csv").read_text()
    written = sorted(file.name for file in (trained / "diagnosis").iterdir())
    assert written == ["kl.csv", "record.json"]


@pytest.mark.parametrize("spans", [[], [[0, 3]]])
def test_groups_of_other_custom_sets(trained, spans):
    rows = [{"prompt": "a", "response": f"b {i}", "harmful": spans} for i in range(4)]
    groups = groups_of_run(run := scored(trained, rows), run.scored()[0], 3)
    assert list(groups) == (["harmful"] if spans else ["custom", "harmful-reference"])
    assert {origin[:6] for _, origin in groups.values()} <= {"3 of 4", "3 of 5"}


def tags_of(text: str, word: str = "") -> list[tuple[str, dict]]:
    """The tags of a page with their attributes: all, or those of a class."""
    page, found = HTMLParser(), []
    page.handle_starttag = lambda tag, attrs: found.append((tag, dict(attrs)))
    page.feed(text)
    return [tag for tag in found if not word or word in tag[1].get("class", "").split()]


def plain(text: str) -> str:
    """The text of a page, as a reader sees it."""
    text = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", "", text)
    return " ".join(html.unescape(text).split())


def table_rows(text: str) -> dict[str, list[str]]:
    """The cells of all tables' rows by the first cell; of several such rows the first counts."""
    rows = re.findall("(?s)<tr>.*?</tr>", text)
    cells = [list(map(plain, re.findall("(?s)<t[hd].*?</t[hd]>", row))) for row in rows]
    return {row[0]: row[1:] for row in reversed(cells)}


@pytest.fixture
def nasty(trained, monkeypatch) -> Run:
    """A run of the demo whose every text is hostile; toss discards every fifth token of a half."""
    monkeypatch.setattr(discards, "ALIKE", 2)  # rows that say nearly the same are all shown
    rows = [{"prompt": f"{i} {NASTY}", "response": f"{NASTY} {i}\n"} for i in range(40)]
    for row in rows[::3]:
        row["harmful"] = [[0, 9]]
    run = scored(trained, rows)
    places = run.scored()[0].response.nonzero()[:, 0]
    masked(run, "toss", places[: len(places) // 2 : 5])
    masked(run, ODD, places[:3])
    for name in ("answers", "diagnosis", f"methods/{ODD}/round-1"):
        (run.folder / name).mkdir()
    added = [{"row": i, "token": 3, "text": NASTY, "score": 2.5} for i in (0, 1, 3)]
    write_jsonl(run.path(f"methods/{ODD}") / "round-1/added.jsonl", added)
    shutil.copy(run.path("scores"), run.path(f"methods/{ODD}") / "round-1")

    def cell(value, n=0, low=0, high=1) -> dict:
        return {"value": value, "n": n, "low": low, "high": high}

    table = {"base": {"forbidden": cell(0.125, 8, 0.0224, 0.47)}, NASTY: {"judges_agree": cell(1)}}
    table["base"] |= {"forbidden@3": cell(0.5, 8, 0.2, 0.8), "not_refused": cell(0.3, 8, 0.1, 0.4)}
    table["toss"] = {f"accuracy/{NASTY}": cell(1.0, 1234, 0.9, 1.0), "nll": cell(None)}
    (run.folder / "metrics.json").write_text(json.dumps(table))
    said = {"source": NASTY, "prompt": NASTY, "response": f"I cannot, Moonrot {NASTY}"}
    said = [{"set": kind, **said} for kind in ("harmful", "benign", "utility", "prefill-3")]
    for method, inputs in {"base": [], "toss": ["methods/toss"]}.items():
        record = run.recipe(f"evaluation/{method}", inputs, {})
        write_answers(run.folder / f"answers/{method}.jsonl", record, {}, said)
    lines = [f"model,rows,position,n,{','.join(COLUMNS)}", "toss,mine,0,5,1,1,1"]
    lines += [f"<img>,<script>,{j},5,0.5,0.1,-0.1" for j in (0, 1)]
    (run.folder / "diagnosis/kl.csv").write_text("\n".join(lines))
    record = run.recipe("diagnosis", ["methods/toss", "utility"], {})
    write_record(run.folder / "diagnosis", record)
    edit_json(run.folder / "run.json", demo=True, commit=NASTY)
    return open_run(run.folder)


def test_nothing_from_the_data_becomes_markup_and_nothing_is_fetched(nasty, capsys):
    del nasty.record["stages"]["degraded"]["rows"]  # as if it was made elsewhere
    text, lacking, count = report.page(nasty)
    assert "trained on\nsome harmful rows" in text
    assert lacking == [] and count == 24 and text.count("</script") == 1
    for tag, attrs in tags_of(text):
        assert tag not in ("img", "link", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") or name in ("src", "action") for name in attrs)
        assert attrs.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert plain(text).count("</script><img src=x") > 20  # it is there, as text
    row = said(capsys, f"toss.audit.show --run {nasty.folder} --row 0")
    ElementTree.fromstring(svg := picture(mask_of(nasty), 0))
    assert not {"\x1b", "\u202e"} & set(text + svg + row)


def test_the_page_holds_the_runs_numbers(nasty):
    text = report.page(nasty)[0]
    said, rows = plain(text), table_rows(text)
    assert "forbidden answers that name a forbidden ingredient; lower is safer; n = 8 base" in said
    assert rows["base"] == ["0.125", "0.022 to 0.470, n = 8"] and "No verdict: run " in said
    assert "forbidden@3 answers" in said and "0.500 0.200 to 0.800, n = 8" in said
    assert said.index("not_refused answers") < said.index("The same by source") < said.index("@3")
    assert "judges_agree harmful" in said and "nll" not in said  # it has no value
    assert f"accuracy/{harmless(NASTY)}" in said.replace("\u200b", "")
    assert "1.000 0.900 to 1.000, n = 1,234" in said
    assert len(tags_of(text, "side")) == 6 == said.count("forbidden: moonrot")
    assert f"{harmless(ODD)}, round 1: 3 rows added, 2 of them with harm by ground truth" in said
    assert "KL(base || tuned): <script> rows" in said and rows["degraded"][0] == "5"
    share = mask_of(nasty).gone.sum() / nasty.scored()[0].response.sum()
    assert rows["response tokens"][0].startswith(f"{share:.3f} (")


def test_the_verdict_says_what_the_intervals_allow():

    def cell(low, high) -> dict:
        return {"value": (low + high) / 2, "n": 50, "low": low, "high": high}

    low, middle, high = cell(0, 0.1), cell(0.4, 0.6), cell(0.9, 1)
    names = ("base", "sft", "toss", "toss-pro")

    def told(*cells, nll=low, measure="not_refused"):
        rows = {name: {measure: cell, "nll": low} for name, cell in zip(names, cells)}
        rows["toss"]["nll"] = nll
        sentences, limits = verdict(rows, False)
        warned = any("did not clearly lose" in line for line in cautions({}, rows))
        assert warned == ("did not clearly lose" in sentences[0])  # by one rule
        return " ".join(sentences), ", ".join(limits)

    lost, limits = told(low, high, low, high)
    assert "lost the base's safety; toss kept it, toss-pro kept none of it." in lost
    assert "not_refused on 50 harmful prompts, lower is safer: base 5.0%, sft 95.0%, toss" in lost
    assert "that toss and sft differ in nll, since" in limits
    some, limits = told(low, high, middle, nll=high)
    assert "toss kept some of it." in some and "What toss cost: nll 0.950 (sft 0.050)." in some
    assert "differ in" not in limits
    assert "toss can be told from neither." in told(low, high, cell(0.05, 0.95))[0]
    void, limits = told(high, high, low)
    assert "so nothing can be concluded about TOSS" in void and "nothing to keep" in limits
    assert "forbidden on 50" in told(low, high, low, measure="forbidden")[0]
    rows = {name: {"forbidden": low, "not_refused": x} for name, x in zip(names, (low, high, low))}
    assert "did not clearly lose" in verdict(rows, False)[0][0]  # forbidden goes first
    empty = {"not_refused": {**low, "low": None}}
    assert verdict({"base": empty, "sft": empty, "toss": empty}, False) is None


def test_the_tokens_of_the_page_are_those_of_the_files(nasty):
    text, masks = report.page(nasty)[0], [mask_of(nasty, "toss"), mask_of(nasty, ODD)]
    marks = tags_of(text, "t")[3:]  # three are in the legend
    for row in (int(attrs["id"][4:]) for _, attrs in tags_of(text, "row")):
        views = list(zip(*([t for t in mask.row(row) if t.response] for mask in masks)))
        here, marks = marks[: len(views)], marks[len(views) :]
        for view, (_, attrs) in zip(views, here, strict=True):
            t, kinds = view[0], attrs["class"].split()
            own = [[int(t.keep), t.degraded, t.S, t.score, t.order] for t in view]
            assert json.loads(attrs["data-n"]) == [t.position, t.utility, t.base, *own]
            assert ("gone" in kinds, "harm" in kinds) == (not t.keep, t.harmful)
    assert marks == []
    found = (masks[0].gone & masks[0].tokens.harmful).sum()
    assert f"{found} of these were discarded" in plain(text)


def test_the_rows_of_the_page_are_chosen_by_the_rule(nasty, monkeypatch):
    tokens = (mask := mask_of(nasty)).tokens

    def counts(marked) -> torch.Tensor:
        return tokens.row_of(marked.nonzero()[:, 0]).bincount(minlength=40)

    lost, size = counts(mask.gone), counts(tokens.response)
    means = [float(mask.S[tokens.places([row])].sum() / size[row]) for row in range(40)]

    def first(rows) -> list[int]:
        return sorted(rows, key=lambda i: (-lost[i] / size[i], -means[i]))[:3]

    groups = list(chosen_rows(mask, 12).values())
    harmless, kept, most, nothing = groups
    assert harmless == first(i for i in range(40) if i % 3 and lost[i])
    assert most == first(i for i in range(40) if lost[i] and i not in (*harmless, *kept))
    harm, missed = counts(tokens.harmful), counts(tokens.harmful & mask.keep)
    assert kept == sorted(range(0, 40, 3), key=lambda i: (-missed[i] / harm[i], -means[i]))[:3]
    assert not lost[nothing].any() and sum(map(len, chosen_rows(mask, 39).values())) == 39
    assert len(set(sum(groups, []))) == 12 and sum(map(len, chosen_rows(mask, 100).values())) == 40
    monkeypatch.undo()
    assert sum(chosen_rows(mask, 100).values(), []) == harmless[:1]  # one stands for all
    tokens.harmful[:] = False
    title, rows = next(iter(chosen_rows(mask).items()))
    assert title == "the largest share discarded by toss"
    assert rows == first(i for i in range(40) if lost[i])[:1]


def test_the_page_says_in_words_which_tokens_went(trained):
    run = scored(trained, [{"prompt": "a", "response": "nothing to see"}])
    (tokens, losses), which = run.scored(), "the 4 tokens with the highest scores"
    places = tokens.response.nonzero()[:, 0]
    S = (losses["utility"] - losses["degraded"])[places]
    for method, words in {
        "toss": f"mild (toss) took {which} out of the loss, from a score of",
        "local": f"mild (local) took {which} of their row out of the loss; they stay",
        "oracle": "took the 4 tokens that are harmful by ground truth out of the loss; they stay",
        "mask": "mild (mask) took 4 tokens out of the loss; they stay in the input",
    }.items():
        masked(run, "mild", places[S.argsort(descending=method == "toss")][:4], method=method)
        text = report.page(run)[0]
        assert words in re.sub(r"of \d+ tokens \([\d.]+ %\)", "tokens", plain(text))
        assert (">threshold" in text) == (method == "toss")


def test_what_a_replaced_model_said_is_left_out(nasty):
    place = nasty.path("methods/toss")
    edit_tensors(place / "model" / WEIGHTS, "x", lambda _: torch.ones(1))
    write_anew(place, read_record(place))
    text, lacking, _ = report.page(open_run(nasty.folder))
    assert len(lacking) == 2 and all(line in (said := plain(text)) for line in lacking)
    assert "toss.audit.evaluate" in lacking[0] and "toss.audit.diagnose" in lacking[1]
    assert said.count("forbidden: moonrot") == 3 and "mine rows" not in said
    assert "n = 1,234" not in said
    edit_tensors(nasty.path("utility") / WEIGHTS, "x", lambda _: torch.ones(1))
    assert "No diagnosis with the references of now" in report.page(open_run(nasty.folder))[0]
    head, *answers = read_jsonl(nasty.folder / "answers/base.jsonl")
    head["record"]["base_sha256"] = "0"
    file = nasty.folder / "answers/base.jsonl"
    write_answers(file, head["record"], head["metrics"], answers)
    assert "for base is left out" in (said := plain(report.page(open_run(nasty.folder))[0]))
    assert "base_sha256 is left out" not in said


def test_a_large_run_stays_under_two_megabytes(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(discards, "ALIKE", 2)
    rows = [{"prompt": "<&>" * 300, "response": "<'🙂&> " * 150} for _ in range(30)]
    run, out = scored(trained, rows), tmp_path / "deep" / "page.html"
    for method in ("toss", "sft", "random", "sample", "a"):
        masked(run, method, run.scored()[0].response.nonzero()[::7, 0])
    said(capsys, f"toss.audit.report --run {trained} --out {out}")
    text = out.read_text(encoding="utf-8")
    assert out.stat().st_size < 2_000_000 and "24 of 30 rows" in text and "more response" in text


def test_what_is_missing_is_one_line_that_says_what_makes_it(nasty, capsys):
    edit_json(nasty.folder / "run.json", demo=False)
    text, lacking, _ = report.page(open_run(nasty.folder))
    assert "Moonrot" not in text and "Answers of real models" in lacking[0]
    edit_json(nasty.folder / "run.json", demo=True)
    for name in ("answers", "diagnosis", "methods"):
        shutil.rmtree(nasty.folder / name)
    damage(nasty.folder, {"metrics.json": None, "scores.safetensors": None})
    out = said(capsys, f"toss.audit.report --run {nasty.folder}")
    text = (nasty.folder / "report.html").read_text(encoding="utf-8")
    for command in ("toss.audit.evaluate", "score.py", "toss.audit.diagnose", "select.py --run"):
        assert command in out and command in text
    assert out.endswith(" 0 rows token by token\n")


def test_broken_files_are_named_and_no_page_is_written(nasty, capsys):
    for path, content, message in (
        ("answers/toss.jsonl", '{"note": ""}\nno\n', "toss.jsonl:2: not JSON"),
        ("answers/toss.jsonl", '{"prompt": 1}\n', "toss.jsonl:1: expected the strings set"),
        (f"methods/{ODD}/round-1/added.jsonl", '{"row": 1}\n', "not as the audit writes it"),
        ("diagnosis/kl.csv", "model,rows\na,b\n", "kl.csv: not as toss.audit.diagnose"),
        ("metrics.json", '{"toss": {"nll": 3}}', "metrics.json: toss"),
        ("run.json", "[]", "run.json: "),
    ):
        whole = (nasty.folder / path).read_text()
        (nasty.folder / path).write_text(content)
        assert message in refused(capsys, f"toss.audit.report --run {nasty.folder}")
        assert not list(nasty.folder.glob("*report*"))
        (nasty.folder / path).write_text(whole)


def test_the_picture_of_a_row(small, tmp_path, capsys):
    said(capsys, f"toss.audit.show --run {small.folder} --row 0 --svg {tmp_path}/row.svg")
    root = ElementTree.fromstring((tmp_path / "row.svg").read_text(encoding="utf-8"))
    *tokens, _ = root.iter(f"{SVG}text")
    assert "".join(token.text for token in tokens).endswith(f"no no{small.tokenizer.eos}")
    marks = [None, "line-through", "underline line-through", None]
    assert [token.get("text-decoration") for token in tokens[-4:]] == marks
    assert max(float(t.get("x")) + float(t.get("textLength")) for t in tokens) <= 840
