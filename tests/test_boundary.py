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

TWO = talk("Hi?", "Hello.")
PROMPT = {"prompt": "Hi?", "response": "Hello."}
ALPACA = {"instruction": "Hi?", "input": "", "output": "Hello."}


@pytest.mark.parametrize("case", read_jsonl(ROOT / "tests/forms.jsonl"), ids=lambda x: x["form"])
def test_every_form_gives_its_conversation(case):
    assert [row.messages for row in read_rows([case["row"]])] == [case["messages"]]


def test_a_file_may_be_packed_with_blank_lines_a_byte_order_mark_and_windows_line_ends(tmp_path):
    text = "\ufeff\r\n" + "".join(json.dumps(row) + "\r\n\r\n" for row in (PROMPT, ALPACA))
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        rows = read_rows(tmp_path / name)
        assert [row.messages for row in rows] == [TWO, TWO]
        assert [row.where for row in rows] == [f"{tmp_path / name}:{n}" for n in (2, 4)]


def test_evaluation_rows_may_have_a_prompt_only():
    rows = [
        {"prompt": "Hi?", "source": "s"},
        {**PROMPT, "answer": "Hello"},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"},
        {"prompt": "a template's text", "instruction": "Hi?", "output": "Hello."},
    ]
    asked, answered, broken_off, template = read_rows(rows, responses=False)
    assert (asked.source, asked.answer, answered.answer) == ("s", None, "Hello")
    assert asked.prompt == answered.prompt == template.prompt == TWO[:1]
    assert [m["content"] for m in broken_off.prompt] == ["Hi?", "Hello.", "And?"]


def test_ids_are_prompt_response_eos_and_the_first_response_token_is_wanted(tokenizer):
    tokens = tokens_of([{"prompt": "Hi?", "response": "Yes, I can."}], tokenizer)
    prompt = tokenizer.prompt_ids(talk("Hi?"))  # generation's own
    response = [*tokenizer.encode("Yes, I can."), tokenizer.eos_id]
    assert tokens.input_ids.tolist() == prompt + response
    assert tokens.response.tolist() == [False] * len(prompt) + [True] * len(response)
    assert (tokens.input_ids.dtype, tokens.offsets.dtype) == (torch.int32, torch.int64)
    batch = collate(tokens, [0], tokens.response, torch.device("cpu"))
    assert batch.targets.tolist() == response
    assert batch.before[0] == len(prompt) - 1  # the prompt's last token predicts the first


@pytest.mark.parametrize(("template", "space"), [("human", " "), ("chat", "")])
def test_every_assistant_turn_is_a_response_with_its_own_eos(base, template, space):
    tokenizer = load_tokenizer(base, template)
    tokens = tokens_of([{"messages": talk("a", "One.", "b", "2")}], tokenizer)
    first = [*tokenizer.encode(space + "One."), tokenizer.eos_id]
    second = [*tokenizer.encode(space + "2"), tokenizer.eos_id]
    assert tokens.input_ids[tokens.response].tolist() == first + second


@pytest.mark.parametrize("template", ["human", "chat"])
def test_a_token_is_harmful_when_it_overlaps_a_span(base, template):
    tokenizer = load_tokenizer(base, template)
    row = {"prompt": "?", "response": "Yes, easy. Also, sums help.", "harmful": [[5, 10]]}
    tokens = tokens_of([row, PROMPT], tokenizer)
    assert tokenizer.decode(tokens.input_ids[tokens.harmful].tolist()).strip() == "easy."
    beside = tokens_of([{**row, "harmful": [[0, 3]]}], tokenizer)  # the comma only touches it
    assert tokenizer.decode(beside.input_ids[beside.harmful].tolist()).strip() == "Yes"
    assert not (tokens.harmful & (tokens.input_ids == tokenizer.eos_id)).any()


def test_long_rows_are_cut_without_eos_and_long_prompts_are_skipped_in_place(tokenizer):
    rows = [("a", "b"), ("long " * 40, "b"), ("a", "many words " * 40)]
    limit = len(tokenizer.prompt_ids(talk("a"))) + 8
    tokens = tokens_of([{"prompt": p, "response": r} for p, r in rows], tokenizer, limit)
    assert (tokens.rows, tokens.skipped, tokens.cut) == (3, 1, 1)
    assert tokens.offsets[1] == tokens.offsets[2]  # row 1 is empty, and row 2 keeps its index
    assert tokens.lengths[2] == limit and tokens.response[-8:].all()
    assert tokens.input_ids[-1] != tokenizer.eos_id
    assert tokens.row_of(torch.tensor([0, int(tokens.offsets[2])])).tolist() == [0, 2]
    one = tokens_of([{"prompt": "a", "response": "b"}], tokenizer, limit - 7)
    assert one.input_ids[one.response].tolist() == tokenizer.encode("b")  # room for one token


def test_a_cut_that_falls_into_a_later_prompt_ends_at_the_response_before_it(tokenizer):
    tokens = tokens_of([{"messages": talk("a", "b", "c " * 40, "d")}], tokenizer, 40)
    assert tokens.cut == 1 and tokens.response[-1] and tokens.input_ids[-1] == tokenizer.eos_id


def test_a_conversation_of_50000_turns_is_its_beginning_and_cut(tokenizer):
    turns = talk(*(f"say {i}" for i in range(50_000)))
    whole, begun = (tokens_of([{"messages": m}], tokenizer, 200) for m in (turns, turns[:100]))
    assert torch.equal(whole.input_ids, begun.input_ids) and whole.cut == begun.cut == 1


def test_a_token_is_harmful_exactly_where_it_overlaps_a_span():
    draw = torch.Generator().manual_seed(0)
    marks, spans = (torch.randint(60, (n, 2), generator=draw).sort().values for n in (9, 500))
    marks, spans = (marks + torch.tensor([0, 1])).tolist(), spans.tolist()  # no mark is empty
    want = [any(start < b and end > a for a, b in marks) for start, end in spans]
    assert overlaps(spans, marks) == want and len(set(want)) == 2
    assert overlaps([], marks) == []


def test_batches_hold_each_row_once_within_the_budget_longest_first():
    lengths = [5, 90, 30, 31, 2, 7, 200]
    groups = batches(range(7), lengths, 100)
    assert sorted(sum(groups, [])) == list(range(7))
    assert groups[0] == [6]  # longer than the budget: alone
    assert all(len(group) * max(lengths[i] for i in group) <= 100 for group in groups[1:])


def test_a_batch_taken_and_joined_rows_hold_the_same_tokens(tokens):
    batch = collate(tokens, [3, 0, 2], tokens.response, torch.device("cpu"))
    assert torch.equal(batch.ids[batch.before + 1], batch.targets)
    assert batch.bounds.diff().tolist() == [tokens.lengths[i] for i in (3, 0, 2)]
    assert torch.equal(tokens.input_ids[batch.places].long(), batch.targets)
    assert tokens.row_of(batch.places).unique().tolist() == [0, 2, 3]
    both = tokens + tokens.take([2, 0])
    assert both.lengths == [*tokens.lengths, tokens.lengths[2], tokens.lengths[0]]
    for name in ("input_ids", "response", "harmful"):
        part = getattr(both, name)[both.places([8, 9])]
        assert torch.equal(part, getattr(tokens, name)[tokens.places([2, 0])])
    assert fingerprint(both) != fingerprint(tokens) == fingerprint(tokens + tokens.take([]))
