"""What was dropped? Of any trainer's file, `show --file` says which tokens are in the loss."""

import pytest
from conftest import write_jsonl
from helpers import cases, refused, said, succeed

from model.io import read_json


@pytest.fixture
def ids(tokenizer) -> list[int]:
    """A row whose last four tokens are the turn of an assistant."""
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "Hi there"}])
    return prompt + tokenizer.encode("cannot") + [tokenizer.eos_id]


@pytest.fixture
def show(base, tmp_path, capsys):
    """What the command prints of a file with these rows."""

    def shown(rows: list[dict], *more: str) -> str:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        return said(capsys, f"toss.audit.show --file {path} --model {base} {' '.join(more)}")

    return shown


def test_the_tokens_in_the_loss_are_marked_whatever_says_so(ids, show):
    zeros = [0] * (len(ids) - 4)
    rows = [{"input_ids": ids, "labels": [-100] * len(zeros) + ids[-4:]}]
    rows.append({"input_ids": ids, "weights": [0.0] * len(zeros) + [0.5] * 4})
    for name in ("assistant_masks", "loss_mask"):
        rows.append({"input_ids": ids, name: zeros + [1] * 4})
    output = show(rows, "--row 0")
    assert f"4 rows, {4 * len(ids)} tokens, 16 in the loss" in output
    assert f"row 0: 4 of {len(ids)} tokens in the loss" in output
    assert output.endswith("{+cannot<|im_end|>+}\n")


def test_what_is_odd_about_a_file_is_counted(ids, show):
    nothing = [0] * len(ids)
    rows = []
    for in_loss in (nothing, [*nothing[:-2], 1, 0], [1, *nothing[:-1]], [*nothing[:-1], 1]):
        rows.append({"input_ids": ids, "loss_mask": in_loss})
    rows.append({"input_ids": ids[:3], "loss_mask": [0, 0, 1]})
    output = show(rows)
    assert "1 rows without a token in the loss" in output
    assert "3 rows whose end of turn" in output
    assert f"4 rows at the longest length, {len(ids)} tokens" in output
    assert "1 rows whose first token is in the loss" in output


def test_an_export_is_such_a_file(trained, base, tmp_path, capsys):
    succeed(f"select.py --run {trained}")
    succeed(f"toss.export --run {trained} --method toss --out {tmp_path}/train.jsonl")
    output = said(capsys, f"toss.audit.show --file {tmp_path}/train.jsonl --model {base}")
    kept = read_json(tmp_path / "train.about.json")["kept"]
    assert f"{sum(kept)} in the loss" in output
    assert "0 rows without a token in the loss" in output


@pytest.mark.parametrize(("row", "message"), cases("tokenised_refused.txt"))
def test_a_row_that_cannot_be_read_is_named(row, message, base, tmp_path, capsys):
    line = f"toss.audit.show --file {write_jsonl(tmp_path / 'rows.jsonl', [row])}"
    assert f"rows.jsonl:1: {message}" in refused(capsys, f"{line} --model {base}")
    assert "--file and --model go together" in refused(capsys, line)
