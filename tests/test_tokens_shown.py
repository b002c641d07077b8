"""What was dropped? `show` says of each token what the files of the run say."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, edit_json, fails, make_base, write_jsonl
from helpers import random_adapter, refused, said
from scored_runs import NO_NO, mask_of, mask_without, masked, rows_by_hand, scored, small_run

from model import load_checkpoint
from model.lora import use
from model.peft import save_adapter
from toss.audit import discards, show
from toss.audit.command import markdown
from toss.audit.discards import discard_tables, sources_of, token_type
from toss.audit.tokens import Mask, load_masks, response_positions, token_texts
from toss.tokens import Tokens
from toss.workbench.files import write_scores
from toss.workbench.run import Run, open_run

LOOKS = (GOLDENS.parent / "shown.txt").read_text().splitlines()[1:]


@pytest.fixture
def small(trained) -> Run:
    return small_run(trained)


@pytest.fixture
def tokens(tokenizer) -> Tokens:
    return rows_by_hand(tokenizer)


def mask_over(tokens: Tokens, name: str, places: list[int], **known) -> Mask:
    """A mask that discards these places; without losses."""
    known = {"S": None, "score": None, "order": None, **known}
    return Mask(name, name, tokens, {}, keep=mask_without(tokens, places), raw=None, **known)


# One token


def test_characters_that_are_spread_over_tokens_come_out_whole(tokenizer):
    text = "Grüße 🙂, 日本\n  ok"
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    texts = token_texts(tokenizer.raw, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text + tokenizer.eos
    assert texts[texts.index("🙂") - 1] == ""  # the token before it holds only a part of it
    unfinished = tokenizer.encode("🙂")[:-1]
    assert token_texts(tokenizer.raw, unfinished)[-1] == "\ufffd"


def test_positions_count_the_response_tokens_of_a_row(tokens):
    j = response_positions(tokens)[tokens.response]
    assert j.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]


def test_the_numbers_of_a_row_are_those_of_the_files(small):
    mask = mask_of(small)
    row = mask.row(1)
    start = int(mask.tokens.offsets[1])
    S = mask.S[mask.tokens.response]
    assert "".join(token.text for token in row).endswith("ok" + small.tokenizer.eos)
    for position, token in enumerate(row):
        n = start + position
        assert token.position == position
        assert not token.discarded
        assert not token.harmful
        if token.response:
            assert (token.utility, token.degraded, token.base) == (n + 0.5, n % 7 * 1.5, n)
            assert token.S == token.score == n + 0.5 - n % 7 * 1.5
            assert token.order == int((S > token.S).sum()) + 1
        else:
            assert token.order == 0


def test_the_degraded_model_of_the_last_round_comes_with_the_mask(small):
    tokens, losses = small.scored()
    score = torch.arange(len(tokens.input_ids)).float()
    masked(small, "toss-pro", [], score, method="toss", pro=10)
    for t, shift in ((2, 0), (10, 1)):  # the last by its number, not by its name
        folder = small.path(f"methods/toss-pro/round-{t}")
        folder.mkdir()
        refined = {**losses, "degraded": losses["degraded"] + shift * tokens.response}
        record = {"inputs": {}, "settings": {}, "dtype": "float32"}
        write_scores(folder / "scores.safetensors", tokens, refined, record)
    mask = mask_of(small, "toss-pro")
    last = mask.row(1)[-1]
    assert last.degraded == losses["degraded"][-1] + 1
    assert last.S == last.utility - last.degraded
    assert last.score == score[-1]
    assert last.order == 1
    assert mask.label == mask.method == "toss-pro"


@pytest.mark.parametrize(
    ("discarded", "score", "threshold"),
    [
        ([4, 5], [0, 0, 0, 1, 3, 2], 2.0),
        ([4, 5], [9, 9, 9, 2, 3, 2], 2.0),  # a tie is split; scores of the prompt do not count
        ([4], [0, 0, 0, 1, 1, 2], None),  # a higher score was kept
        ([], [0, 0, 0, 1, 3, 2], None),
    ],
)
def test_a_threshold_is_told_only_where_it_holds_for_all_tokens(discarded, score, threshold):
    order = torch.tensor([0, 0, 0, 3, 1, 2])
    response = order > 0
    tokens = Tokens(order.int(), torch.tensor([0, 6]), response, harmful=~response)
    mask = mask_over(tokens, "x", discarded, score=torch.tensor(score).float(), order=order)
    assert mask.threshold == threshold


def test_the_masks_of_toss_come_first_and_that_of_sft_last(small):
    for name in ("random", "toss-pro", "u"):
        masked(small, name, [])
    masks, lacking = load_masks(small, *small.scored())
    assert [mask.name for mask in masks] == ["toss", "toss-pro", "random", "u", "sft"]
    assert lacking == []


def test_two_percent_of_the_tokens_have_the_full_colour():
    response = torch.ones(1000).bool()
    tokens = Tokens(response.int(), torch.tensor([0, 1000]), response, harmful=~response)
    mask = mask_over(tokens, "x", [], S=torch.arange(-1000.0, 0))
    assert int((mask.S.abs() >= mask.full_colour).sum()) == 20


# One row in the terminal


def test_a_row_in_the_terminal(small, capsys):
    """Its L^u, L^h and L^0 are those of scored_runs.py, by the token's place in the arrays."""
    out = said(capsys, f"toss.audit.show --run {small.folder} --row 0")
    assert out == (GOLDENS.parent / "row.txt").read_text()


def test_a_score_other_than_S_has_a_column_of_its_own(small, capsys):
    _, losses = small.scored()
    masked(small, "own", [], losses["base"])
    out = said(capsys, f"toss.audit.show --run {small.folder} --row 0 --method own")
    head = next(line for line in out.splitlines() if line.startswith("| position"))
    assert " ranked by | order " in head
    assert "| +26.000   | 7 " in out  # the lowest of 7


def test_a_zero_has_no_minus():
    assert show.signed(-0.0004) == " +0.000"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--row 0 --method no", "does not exist (there are sft, toss): run"),
        ("--row 2", "there is no row 2: the rows are 0 to 1"),
        ("--row -1", "there is no row -1: the rows are 0 to 1"),
    ],
)
def test_what_is_not_in_the_run_is_refused(small, capsys, flags, message):
    assert message in refused(capsys, f"toss.audit.show --run {small.folder} {flags}")


def test_an_eos_that_is_not_ranked_has_no_order_and_a_skipped_row_no_tokens(trained, capsys):
    run = scored(trained, [{"prompt": "long " * 2048, "response": "no"}, NO_NO])
    masked(run, "toss", [], keep_eos=True)
    *others, last = [token for token in mask_of(run).row(1) if token.response]
    assert last.text == run.tokenizer.eos
    assert last.order == 0
    assert all(token.order > 0 for token in others)
    line = f"toss.audit.show --run {trained} --row"
    assert "| -     | kept " in said(capsys, f"{line} 1")
    assert f"row 0 of {trained} was skipped" in said(capsys, f"{line} 0")


# All discards


def test_discards_counted_by_hand(tokens, tokenizer):
    masks = [
        mask_over(tokens, "toss", [1, 6, 7, 8]),
        mask_over(tokens, "random", [8, 11]),
        mask_over(tokens, "sft", []),  # discards nothing
    ]
    tables = discard_tables(masks, tokenizer, ["b", "", "a", ""])
    text = "\n\n".join(markdown(*table) for table in tables)
    assert text + "\n" == (GOLDENS.parent / "discards.txt").read_text()


def test_rare_sources_are_counted_together(tokens, tokenizer, monkeypatch):
    monkeypatch.setattr(discards, "SOURCES", 1)
    mask = mask_over(tokens, "toss", [1, 6])
    [(_, lines)] = discard_tables([mask], tokenizer, ["b", "", "a", ""])
    assert ["source: (none)", "0.000 (0 of 2)"] in lines  # of rows 1 (skipped) and 3
    assert ["source: (others)", "0.286 (2 of 7)"] in lines


@pytest.mark.parametrize(
    ("text", "kind"), [("\n", "whitespace"), ("<|im_start|>", "other special"), ("é", "word")]
)
def test_types_of_tokens(tokenizer, text, kind):
    assert token_type(tokenizer.encode(text)[0], tokenizer) == kind  # of é, the first half


def test_the_discards_of_a_run_by_source(small, capsys):
    rows = [{**NO_NO, "source": "web"}, {"prompt": "b", "response": "ok", "source": "book"}]
    run = scored(small.folder, rows)
    masked(run, "toss", run.scored()[0].response.nonzero()[:3, 0])
    masked(run, "sft", [])
    line = f"toss.audit.show --run {run.folder}"
    assert "| source: web           | 0.750 (3 of 4) |" in said(capsys, line)
    masked(run, "toss", [])
    assert "No method of the run discards a token." in said(capsys, line)
    Path(run.args.custom).unlink()
    assert sources_of(run) == []


# What a file is


def test_what_a_file_is_and_whether_it_fits(small, tmp_path, base, capsys):
    run = small.folder
    shutil.copy(small.path("scores"), tmp_path / "moved")
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "methods/toss").rename(copy / "methods/mine")
    edit_json(copy / "run.json", stages={"methods/mine": small.record["stages"]["degraded"]})
    other = make_base(tmp_path / "other", seed=1)
    model = load_checkpoint(other)
    save_adapter(use(model, random_adapter(model)), tmp_path / "alien")
    places = {"run": run, "copy": copy, "base": base, "other": other, "tmp": tmp_path}
    for look in LOOKS:
        argv, fate, words = look.format(**places, goldens=GOLDENS).split(" -> ")
        status = show.main(argv.split())
        out = capsys.readouterr().out
        last = out.splitlines()[-1]
        assert words in out, look
        if fate == "does not fit":
            assert status == 2, look
            assert f": does not fit {run}: " in last, look
        else:
            assert status == 0, look
            assert last.endswith(": fits") == (fate == "fits"), look


def test_what_was_made_from_other_files_does_not_fit(small, capsys):
    def statuses() -> list[int]:
        names = ("degraded", "scores.safetensors", "methods/toss", "")
        return [show.main([f"{small.folder}/{name}"]) for name in names]

    custom = Path(small.args.custom)
    assert statuses() == [0, 0, 0, 0]
    write_jsonl(custom, [{"prompt": "a", "response": "another"}])
    capsys.readouterr()
    assert statuses() == [0, 2, 2, 2]
    out = capsys.readouterr().out
    assert f"does not fit {small.folder}: --custom" in out
    assert "scores                made from another --custom" in out
    fails("changed: --custom", mask_of, open_run(small.folder))
    custom.unlink()  # a file that is gone cannot be compared
    assert statuses() == [0, 0, 0, 0]
