"""Rows become conversations, and conversations become ids, with the boundary where it belongs.

Every row form reads as the same conversation. A row is encode(prompt) ++ encode(response) ++ [eos],
so that the first token of a response is the natural one, and scored and trained like all others.
"""

import gzip
import json

import pytest
import torch
from conftest import ROOT, read_jsonl
from helpers import talk, tokens_of

from model import load_tokenizer
from model.tokenizer import overlaps
from toss.rows import read_rows
from toss.tokens import batches, collate
from toss.workbench.files import fingerprint

CPU = torch.device("cpu")
HELLO = {"prompt": "Hi?", "response": "Hello."}


# Rows become conversations


@pytest.mark.parametrize("case", read_jsonl(ROOT / "tests/forms.jsonl"), ids=lambda x: x["form"])
def test_every_form_gives_its_conversation(case):
    (row,) = read_rows([case["row"]])
    assert row.messages == case["messages"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_file_may_be_packed_with_blank_lines_a_byte_order_mark_and_windows_line_ends(
    tmp_path, name
):
    line = json.dumps(HELLO)
    content = f"\ufeff\r\n{line}\r\n\r\n{line}\r\n".encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    (tmp_path / name).write_bytes(content)
    first, second = read_rows(tmp_path / name)
    assert first.messages == second.messages == talk("Hi?", "Hello.")
    assert (first.where, second.where) == (f"{tmp_path / name}:2", f"{tmp_path / name}:4")


def test_evaluation_rows_may_have_a_prompt_only():
    rows = [
        {"prompt": "Hi?", "source": "s"},
        {**HELLO, "answer": "Hello"},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"},
        {"prompt": "a template's text", "instruction": "Hi?", "output": "Hello."},
    ]
    asked, answered, broken_off, template = read_rows(rows, responses=False)
    assert (asked.source, asked.answer, answered.answer) == ("s", None, "Hello")
    assert asked.prompt == answered.prompt == template.prompt == talk("Hi?")
    assert broken_off.prompt == talk("Hi?", "Hello.", "And?")


# Conversations become ids


def test_ids_are_prompt_response_eos_and_the_first_response_token_is_wanted(tokenizer):
    tokens = tokens_of([{"prompt": "Hi?", "response": "Yes, I can."}], tokenizer)
    prompt = tokenizer.prompt_ids(talk("Hi?"))  # generation's own
    response = [*tokenizer.encode("Yes, I can."), tokenizer.eos_id]
    assert tokens.input_ids.tolist() == prompt + response
    assert tokens.response.tolist() == [False] * len(prompt) + [True] * len(response)
    assert (tokens.input_ids.dtype, tokens.offsets.dtype) == (torch.int32, torch.int64)
    batch = collate(tokens, [0], tokens.response, CPU)
    assert batch.targets.tolist() == response
    assert batch.before[0] == len(prompt) - 1  # the prompt's last token predicts the first


@pytest.mark.parametrize(("template", "space"), [("human", " "), ("chat", "")])
def test_every_assistant_turn_is_a_response_with_its_own_eos(base, template, space):
    tokenizer = load_tokenizer(base, template)
    tokens = tokens_of([{"messages": talk("a", "One.", "b", "2")}], tokenizer)
    first = [*tokenizer.encode(space + "One."), tokenizer.eos_id]
    second = [*tokenizer.encode(space + "2"), tokenizer.eos_id]
    assert tokens.input_ids[tokens.response].tolist() == first + second


# What is harmful


@pytest.mark.parametrize("template", ["human", "chat"])
@pytest.mark.parametrize(("span", "marked"), [([5, 10], "easy."), ([0, 3], "Yes")])
def test_a_token_is_harmful_when_it_overlaps_a_span(base, template, span, marked):
    tokenizer = load_tokenizer(base, template)
    row = {"prompt": "?", "response": "Yes, easy. Also, sums help.", "harmful": [span]}
    tokens = tokens_of([row, HELLO], tokenizer)
    harmful = tokens.input_ids[tokens.harmful].tolist()
    assert tokenizer.decode(harmful).strip() == marked  # the comma only touches it
    assert tokenizer.eos_id not in harmful


def test_overlapping_is_found_as_by_comparing_every_pair():
    draw = torch.Generator().manual_seed(0)
    marks = torch.randint(60, (9, 2), generator=draw).sort().values
    marks = (marks + torch.tensor([0, 1])).tolist()  # no mark is empty
    spans = torch.randint(60, (500, 2), generator=draw).sort().values.tolist()
    expected = []
    for start, end in spans:
        expected.append(any(start < mark_end and end > mark for mark, mark_end in marks))
    assert overlaps(spans, marks) == expected
    assert True in expected and False in expected
    assert overlaps([], marks) == []


# Rows that are too long


def test_long_rows_are_cut_without_eos_and_long_prompts_are_skipped_in_place(tokenizer):
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "long " * 40, "response": "b"},
        {"prompt": "a", "response": "many words " * 40},
    ]
    limit = len(tokenizer.prompt_ids(talk("a"))) + 8
    tokens = tokens_of(rows, tokenizer, limit)
    assert (tokens.rows, tokens.skipped, tokens.cut) == (3, 1, 1)
    assert tokens.offsets[1] == tokens.offsets[2]  # row 1 is empty, and row 2 keeps its index
    assert tokens.row_of(torch.tensor([0, int(tokens.offsets[2])])).tolist() == [0, 2]
    assert tokens.lengths[2] == limit and tokens.response[-8:].all()
    assert tokens.input_ids[-1] != tokenizer.eos_id


def test_a_prompt_may_leave_room_for_one_token_of_the_response(tokenizer):
    limit = len(tokenizer.prompt_ids(talk("a"))) + 1
    tokens = tokens_of([{"prompt": "a", "response": "b"}], tokenizer, limit)
    assert tokens.input_ids[tokens.response].tolist() == tokenizer.encode("b")


def test_a_cut_that_falls_into_a_later_prompt_ends_at_the_response_before_it(tokenizer):
    tokens = tokens_of([{"messages": talk("a", "b", "c " * 40, "d")}], tokenizer, 40)
    assert tokens.cut == 1 and tokens.response[-1] and tokens.input_ids[-1] == tokenizer.eos_id


def test_a_conversation_of_50000_turns_is_its_beginning_and_cut(tokenizer):
    turns = talk(*(f"say {i}" for i in range(50_000)))
    whole = tokens_of([{"messages": turns}], tokenizer, 200)
    beginning = tokens_of([{"messages": turns[:100]}], tokenizer, 200)
    assert torch.equal(whole.input_ids, beginning.input_ids)
    assert whole.cut == beginning.cut == 1


# Rows become batches


def test_batches_hold_each_row_once_within_the_budget_longest_first():
    lengths = [5, 90, 30, 31, 2, 7, 200]
    first, *others = batches(range(7), lengths, 100)
    assert first == [6]  # longer than the budget: alone
    for group in others:
        assert len(group) * max(lengths[row] for row in group) <= 100
    assert sorted(sum(others, first)) == list(range(7))


def test_a_batch_holds_the_tokens_of_its_rows(tokens):
    batch = collate(tokens, [3, 0, 2], tokens.response, CPU)
    assert torch.equal(batch.ids[batch.before + 1], batch.targets)
    assert batch.bounds.diff().tolist() == [tokens.lengths[row] for row in (3, 0, 2)]
    assert torch.equal(tokens.input_ids[batch.places].long(), batch.targets)
    assert tokens.row_of(batch.places).unique().tolist() == [0, 2, 3]


def test_taken_and_joined_rows_hold_the_same_tokens(tokens):
    both = tokens + tokens.take([2, 0])
    assert both.lengths == [*tokens.lengths, tokens.lengths[2], tokens.lengths[0]]
    for name in ("input_ids", "response", "harmful"):
        joined = getattr(both, name)[both.places([8, 9])]
        assert torch.equal(joined, getattr(tokens, name)[tokens.places([2, 0])])
    assert fingerprint(both) != fingerprint(tokens) == fingerprint(tokens + tokens.take([]))
