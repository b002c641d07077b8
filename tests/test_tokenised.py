"""What was dropped? Of any trainer's file, `show --file` says which tokens are in the loss."""

import json

import pytest
from conftest import write_jsonl
from helpers import call, refused, said

from model import load_tokenizer


@pytest.fixture
def row(base):
    """A row with one turn of an assistant: its ids, and which of them that turn has."""
    tokenizer = load_tokenizer(base)
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "Hi there"}])
    answer = [*tokenizer.encode("Yes I can"), tokenizer.eos_id]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def show(capsys, base, path, more: str = "") -> str:
    return said(capsys, f"toss.audit.show --file {path} --model {base} {more}")


@pytest.mark.parametrize("name", ["labels", "assistant_masks", "loss_mask", "weights"])
def test_the_tokens_in_the_loss_are_marked_whatever_says_so(name, row, base, tmp_path, capsys):
    ids, in_loss = row
    values = [float(flag) if name == "weights" else int(flag) for flag in in_loss]
    if name == "labels":
        values = [token if flag else -100 for token, flag in zip(ids, in_loss)]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids, name: values}])
    output = show(capsys, base, path, "--row 0")
    assert f"{sum(in_loss)} of {len(ids)} tokens in the loss" in output
    text = output.partition("in the loss\n\n")[2]
    marked = text[text.index("{+") : text.index("+}")]
    assert "Yes" in marked and "can" in marked
    assert "there" not in marked


def test_what_is_odd_about_a_file_is_counted(row, base, tmp_path, capsys):
    ids, in_loss = row
    nothing = [0] * len(ids)
    unended = [int(flag) for flag in in_loss[:-1]] + [0]
    everything = [1] * len(ids)
    rows = [{"input_ids": ids, "loss_mask": mask} for mask in (nothing, unended, everything)]
    rows.append({"input_ids": ids[:3], "loss_mask": [0, 0, 1]})
    output = show(capsys, base, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "4 rows, " in output
    assert "1 rows without a token in the loss" in output
    assert "2 rows whose end of turn" in output
    assert f"3 rows at the longest length, {len(ids)} tokens" in output
    assert "1 rows whose first token is in the loss" in output


def test_an_export_is_such_a_file(trained, base, tmp_path, capsys):
    assert call(f"select.py --run {trained}") == 0
    assert call(f"toss.export --run {trained} --method toss --out {tmp_path}/train.jsonl") == 0
    output = show(capsys, base, tmp_path / "train.jsonl")
    about = json.loads((tmp_path / "train.about.json").read_text())
    assert f"{sum(about['kept'])} in the loss" in output
    assert "0 rows without a token in the loss" in output


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"input_ids": []}, "`input_ids` must be a list of token ids"),
        ({"input_ids": [1, -100], "labels": [1, -100]}, "`input_ids` must be a list of token ids"),
        ({"input_ids": [1, 2]}, "none of labels, assistant_masks, loss_mask, weights"),
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` must be a list as long as"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(entry, message, base, tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [entry])
    error = refused(capsys, f"toss.audit.show --file {path} --model {base}")
    assert f"{path}:1: {message}" in error


def test_the_file_needs_a_tokenizer(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": [1], "labels": [1]}])
    assert "--file and --model go together" in refused(capsys, f"toss.audit.show --file {path}")
