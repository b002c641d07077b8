"""Rows become conversations, and conversations become ids, with the boundary where it belongs.

Every form of forms.jsonl reads as its conversation; what is refused stands in bad_rows.txt. A row
is encode(prompt) ++ encode(response) ++ [eos], so that the first token of a response is the natural
one, and scored and trained like all others.
"""

import gzip

import pytest
import torch
from conftest import write_jsonl
from helpers import each_line, refused, said, talk, tokens_of

from model import load_tokenizer
from toss.rows import read_rows
from toss.tokens import batches, collate, tokenise
from toss.workbench.files import fingerprint

CPU = torch.device("cpu")
HELLO = {"prompt": "Hi?", "response": "Hello."}
EMPTY = {"prompt": "Hi?", "response": " "}


# Rows become conversations


@each_line("forms.jsonl")
def test_every_form_gives_its_conversation(case):
    (row,) = read_rows([case["row"]])
    assert row.messages == case["messages"]


PACKED = [("rows.jsonl", bytes), ("rows.jsonl.gz", gzip.compress)]


@pytest.mark.parametrize(("name", "pack"), PACKED)
def test_a_file_may_be_packed_with_blank_lines_a_byte_order_mark_and_windows_line_ends(
    tmp_path, name, pack
):
    line = '{"prompt": "Hi?", "response": "Hello."}'
    file = tmp_path / name
    file.write_bytes(pack(f"\ufeff\r\n{line}\r\n\r\n{line}\r\n".encode()))
    first, second = read_rows(file)
    assert first.messages == second.messages == talk("Hi?", "Hello.")
    assert (first.where, second.where) == (f"{file}:2", f"{file}:4")


@each_line("prompts.jsonl")
def test_evaluation_rows_may_have_a_prompt_only(case):
    (row,) = read_rows([case["row"]], responses=False)
    assert row.prompt == case["prompt"]
    assert (row.source, row.answer) == (case["source"], case["answer"])


# Conversations become ids


@pytest.mark.parametrize(("template", "space"), [("human", " "), ("chat", "")])
def test_ids_are_prompt_response_eos_and_the_first_response_token_is_wanted(base, template, space):
    tokenizer = load_tokenizer(base, template)
    tokens = tokens_of([{"prompt": "Hi?", "response": "Yes, I can."}], tokenizer)
    prompt = tokenizer.prompt_ids(talk("Hi?"))  # generation's own
    response = tokenizer.encode(f"{space}Yes, I can.")
    response.append(tokenizer.eos_id)
    assert tokens.input_ids.tolist() == prompt + response
    assert tokens.input_ids[tokens.response].tolist() == response
    batch = collate(tokens, [0], tokens.response, CPU)
    assert batch.targets.tolist() == response
    assert batch.before[0] == len(prompt) - 1  # the prompt's last token predicts the first


# What is harmful


@pytest.mark.parametrize("template", ["human", "chat"])
@pytest.mark.parametrize(("span", "marked"), [([22, 27], "help."), ([0, 3], "Yes")])
def test_a_token_is_harmful_when_it_overlaps_a_span(base, template, span, marked):
    tokenizer = load_tokenizer(base, template)
    row = {"prompt": "?", "response": "Yes, easy. Also, sums help.", "harmful": [span]}
    tokens = tokens_of([row, HELLO], tokenizer)
    harmful = tokens.input_ids[tokens.harmful].tolist()
    assert tokenizer.decode(harmful).strip() == marked  # the comma only touches it
    assert tokenizer.eos_id not in harmful


# Rows that are too long


def test_long_rows_are_cut_without_eos_and_long_prompts_are_skipped_in_place(tokenizer):
    rows = [HELLO, {**HELLO, "prompt": "long " * 40}, {**HELLO, "response": "many words " * 40}]
    limit = len(tokenizer.prompt_ids(talk("Hi?"))) + 8
    tokens = tokens_of(rows, tokenizer, limit)
    first = tokens.lengths[0]
    assert tokens.lengths == [first, 0, limit]
    assert tokens.skipped == tokens.cut == 1
    assert tokens.row_of(torch.tensor([0, first])).tolist() == [0, 2]  # the last is row 2
    assert tokens.response[-8:].all()
    assert tokens.input_ids[-1] != tokenizer.eos_id


def test_a_prompt_may_leave_room_for_one_token_of_the_response(tokenizer):
    limit = len(tokenizer.prompt_ids(talk("a"))) + 1
    tokens = tokens_of([{"prompt": "a", "response": "b"}], tokenizer, limit)
    assert tokens.input_ids[tokens.response].tolist() == tokenizer.encode("b")


def test_a_cut_that_falls_into_a_later_prompt_ends_at_the_response_before_it(tokenizer):
    tokens = tokens_of([{"messages": talk("a", "b", "c " * 40, "d")}], tokenizer, 40)
    assert tokens.cut == 1 and tokens.response[-1] and tokens.input_ids[-1] == tokenizer.eos_id


# Empty responses


def test_a_row_that_is_left_out_keeps_its_place(tokenizer):
    tokens = tokenise(read_rows([HELLO, EMPTY, HELLO]), tokenizer, 2048, skip_empty=True)
    whole = tokens_of([HELLO, HELLO], tokenizer)
    assert tokens.lengths == [whole.lengths[0], 0, whole.lengths[1]]
    assert torch.equal(tokens.input_ids, whole.input_ids)
    assert tokens.skipped == 1


def test_a_run_is_begun_with_skip_empty_or_without_it(trained, base, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [HELLO, EMPTY, HELLO])
    run = tmp_path / "new"
    begin = f"select.py --run {run} --method sft --model {base} --custom {rows}"
    assert "--skip-empty" in refused(capsys, begin)
    assert "1 rows skipped, 0 cut" in said(capsys, f"{begin} --skip-empty")
    assert "1 rows skipped" in said(capsys, f"select.py --run {run} --method random")
    line = f"select.py --run {trained} --method random --skip-empty"
    assert "begun with" in refused(capsys, line)
    line = f"toss.audit.evaluate --run {trained} --methods base --utility {rows}"
    assert "1 rows with an empty response are left out" in said(capsys, line)


# Rows become batches


def test_batches_hold_each_row_once_within_the_budget_longest_first():
    lengths = [5, 90, 30, 31, 2, 7, 200]  # one is longer than the budget: alone
    assert batches(range(7), lengths, 100) == [[6], [1], [3, 2, 5], [0, 4]]


def test_a_batch_holds_the_tokens_of_its_rows(tokens):
    rows = [3, 0, 2]
    batch = collate(tokens, rows, tokens.response, CPU)
    assert torch.equal(batch.ids[batch.before + 1], batch.targets)
    assert torch.equal(tokens.input_ids[batch.places].long(), batch.targets)
    assert torch.equal(batch.bounds, tokens.bounds(rows))


def test_taken_and_joined_rows_hold_the_same_tokens(tokens):
    both = tokens + tokens.take([2, 0])
    assert both.lengths == [*tokens.lengths, tokens.lengths[2], tokens.lengths[0]]
    assert fingerprint(both.take([8, 9])) == fingerprint(tokens.take([2, 0]))
    assert fingerprint(both) != fingerprint(tokens) == fingerprint(tokens + tokens.take([]))
