"""What was dropped? `show` says of each token what the files of the run say.

What it prints of a row and of all discards is in row.txt and discards.txt.
"""

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import refused, said
from scored_runs import NO_NO, mask_of, mask_without, masked, rows_by_hand, scored, small_run

from toss.audit import tokens as audited
from toss.audit.runs import sources_of
from toss.audit.tables import markdown
from toss.audit.tokens import Mask, discard_tables, load_masks, token_texts
from toss.tokens import Tokens
from toss.workbench.files import Losses, write_losses
from toss.workbench.run import Run

TESTS = ROOT / "tests"


@pytest.fixture
def small(trained) -> Run:
    return small_run(trained)


@pytest.fixture
def tokens(tokenizer) -> Tokens:
    return rows_by_hand(tokenizer)


def responses(count: int) -> Tokens:
    """A row of response tokens."""
    response = torch.ones(count).bool()
    return Tokens(response.int(), torch.tensor([0, count]), response, harmful=~response)


def mask_over(tokens: Tokens, name: str, places: list[int], **known) -> Mask:
    """A mask that discards these places; without losses."""
    known = {"S": None, "score": None, "order": None, **known}
    return Mask(name, tokens, {}, keep=mask_without(tokens, places), raw=None, **known)


# One token


def test_characters_that_are_spread_over_tokens_come_out_whole(tokenizer):
    text = "Grüße 🙂, 日本\n  ok"
    texts = token_texts(tokenizer.raw, [*tokenizer.encode(text), tokenizer.eos_id])
    assert "".join(texts) == text + tokenizer.eos
    assert texts[texts.index("🙂") - 1] == ""  # the token before it holds only a part of it
    unfinished = tokenizer.encode("🙂")[:-1]
    assert token_texts(tokenizer.raw, unfinished)[-1] == "\ufffd"


def test_the_degraded_model_of_the_last_round_comes_with_the_mask(small):
    tokens, losses = small.losses()
    score = torch.arange(len(tokens.input_ids)).float()
    masked(small, "toss-pro", [], score, method="toss", pro=10)
    for t, shift in ((2, 0), (10, 1)):  # the last by its number, not by its name
        place = f"methods/toss-pro/round-{t}/scores"
        small.path(place).parent.mkdir()
        refined = {**losses, "degraded": losses["degraded"] + shift * tokens.response}
        record = small.recipe(place, ["--custom"], {"dtype": "float32"}) | {"code": {}}
        write_losses(small.path(place), Losses(tokens, refined), record)
    mask = mask_of(small, "toss-pro")
    last = mask.row(1)[-1]
    assert last.degraded == losses["degraded"][-1] + 1
    assert last.S == last.utility - last.degraded
    assert last.score == score[-1]
    assert last.order == 1


def test_the_masks_of_toss_come_first_and_that_of_sft_last(small):
    for name in ("random", "toss-pro", "u"):
        masked(small, name, [])
    masks, lacking = load_masks(small, *small.losses())
    assert [mask.name for mask in masks] == ["toss", "toss-pro", "random", "u", "sft"]
    assert lacking == []


# One row in the terminal


def test_a_row_in_the_terminal(small, capsys):
    """Its L^u, L^h and L^0 are those of scored_runs.py, by the token's place in the arrays."""
    out = said(capsys, f"toss.audit.show --run {small.folder} --row 0")
    assert out == (TESTS / "row.txt").read_text()


def test_what_is_not_in_the_run_is_refused(small, capsys):
    line = f"toss.audit.show --run {small.folder} --row"
    assert "does not exist: run" in refused(capsys, f"{line} 0 --method no")
    for row in (2, -1):
        assert f"there is no row {row}: the rows are 0 to 1" in refused(capsys, f"{line} {row}")


def test_an_eos_that_is_not_ranked_has_no_order_and_a_skipped_row_no_tokens(trained, capsys):
    run = scored(trained, [{"prompt": "long " * 2048, "response": "no"}, NO_NO])
    masked(run, "toss", [], keep_eos=True)
    orders = [token.order for token in mask_of(run).row(1) if token.response]
    assert orders[-1] == 0 and sorted(orders[:-1]) == [1, 2, 3]
    line = f"toss.audit.show --run {trained} --row"
    assert "| -     | kept " in said(capsys, f"{line} 1")
    assert "1 of them were skipped" in refused(capsys, f"{line} 0")


# All discards


def test_discards_counted_by_hand(tokens, monkeypatch):
    masks = [
        mask_over(tokens, "toss", [1, 6, 7, 8]),
        mask_over(tokens, "random", [8, 11]),
        mask_over(tokens, "sft", []),  # discards nothing
    ]
    sources = ["b", "", "a", ""]
    tables = discard_tables(masks, sources)
    text = "\n\n".join(markdown(*table) for table in tables)
    assert text + "\n" == (TESTS / "discards.txt").read_text()

    monkeypatch.setattr(audited, "SOURCES", 1)  # rare ones are left out
    (_, lines), _ = discard_tables(masks[:1], sources)
    assert ["source: (none)", "0.000 (0 of 2)"] in lines  # of rows 1 (skipped) and 3
    assert not any("source: b" in line for line in lines)


def test_the_discards_of_a_run_by_source(small, capsys):
    rows = [{**NO_NO, "source": "web"}, {"prompt": "b", "response": "ok", "source": "book"}]
    run = scored(small.folder, rows)
    masked(run, "toss", run.losses()[0].response.nonzero()[:3, 0])
    masked(run, "sft", [])
    line = f"toss.audit.show --run {run.folder}"
    assert "| source: web     | 0.750 (3 of 4) |" in said(capsys, line)
    masked(run, "toss", [])
    assert "No method of the run discards a token." in said(capsys, line)
    Path(run.args.custom).unlink()
    assert sources_of(run) == []
