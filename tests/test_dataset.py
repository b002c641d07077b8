"""Ids, response spans, ground truth, cutting, skipping, and batches."""

import pytest
import torch
from conftest import write_jsonl

from model import load_tokenizer
from model.errors import InputError
from model.tokenizer import compile_template
from toss.dataset import batches, collate, concatenate, take, tokenise
from toss.rows import read_rows


def tokens_of(tmp_path, tokenizer, rows, max_length=512):
    return tokenise(read_rows(write_jsonl(tmp_path / "rows.jsonl", rows)), tokenizer, max_length, "rows")


def test_ids_are_prompt_response_eos_and_the_first_response_token_is_supervised(tmp_path, tokenizer):
    tokens = tokens_of(tmp_path, tokenizer, [{"prompt": "Hi?", "response": "Yes, I can."}])
    prompt, response = tokenizer.prompt_ids([{"role": "user", "content": "Hi?"}]), tokenizer.encode("Yes, I can.")
    assert tokens.input_ids.tolist() == [*prompt, *response, tokenizer.eos_id]
    assert tokens.response.tolist() == [False] * len(prompt) + [True] * (len(response) + 1)
    batch = collate(tokens, [0], tokens.response, torch.device("cpu"))
    assert batch.targets.tolist() == [*response, tokenizer.eos_id]
    assert batch.before[0] == len(prompt) - 1  # the prompt's last token predicts the first response token


def test_the_human_form_ends_at_the_colon_and_the_space_belongs_to_the_response(tmp_path, base):
    tokenizer = load_tokenizer(base, "human")
    tokens = tokens_of(tmp_path, tokenizer, [{"prompt": "Hi?", "response": "Yes."}])
    expected = tokenizer.encode("Human: Hi?\nAssistant:") + tokenizer.encode(" Yes.") + [tokenizer.eos_id]
    assert tokens.input_ids.tolist() == tokenizer.leading_ids() + expected
    assert tokenizer.prompt_ids([{"role": "user", "content": "Hi?"}]) == tokens.input_ids[~tokens.response].tolist()


@pytest.mark.parametrize("template", ["human", "chat"])
def test_every_assistant_turn_is_a_response_with_its_own_eos(tmp_path, base, template):
    tokenizer = load_tokenizer(base, template)
    row = {"messages": [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "One."), ("user", "b"), ("assistant", "Two.")]]}
    tokens = tokens_of(tmp_path, tokenizer, [row])
    said = tokens.input_ids[tokens.response].tolist()
    space = "" if template == "chat" else " "
    one, two = tokenizer.encode(space + "One."), tokenizer.encode(space + "Two.")
    assert said == [*one, tokenizer.eos_id, *two, tokenizer.eos_id]
    whole = tokenizer.raw.decode(tokens.input_ids.tolist(), skip_special_tokens=False)
    if template == "chat":  # exactly what the template renders, less the line break behind the last turn
        assert whole == tokenizer.render(row["messages"], generate=False).rstrip("\n")


@pytest.mark.parametrize("template", ["human", "chat"])
def test_a_token_is_harmful_when_it_overlaps_a_span(tmp_path, base, template):
    tokenizer = load_tokenizer(base, template)
    text = "Yes, easy. Also, sums help."
    tokens = tokens_of(tmp_path, tokenizer, [{"prompt": "?", "response": text, "harmful": [[5, 10]]}])
    marked = tokenizer.raw.decode(tokens.input_ids[tokens.harmful].tolist())
    assert marked.strip() == "easy."
    assert not tokens.harmful[-1]  # EOS is no part of the text


def test_long_rows_are_cut_without_eos_and_long_prompts_are_skipped_in_place(tmp_path, tokenizer):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "long " * 40, "response": "b"}, {"prompt": "a", "response": "many words " * 40}]
    limit = len(tokenizer.prompt_ids([{"role": "user", "content": "a"}])) + 8
    tokens = tokens_of(tmp_path, tokenizer, rows, limit)
    assert (tokens.rows, tokens.skipped, tokens.cut) == (3, 1, 1)
    assert tokens.offsets[1] == tokens.offsets[2]  # row 1 is an empty span, row 2 keeps its index
    assert tokens.lengths[2] == limit and tokens.input_ids[-1] != tokenizer.eos_id and tokens.response[-8:].all()
    assert tokens.row_of(torch.tensor([0, int(tokens.offsets[2])])).tolist() == [0, 2]


def test_no_row_left_is_an_error(tmp_path, tokenizer):
    with pytest.raises(InputError, match="max-length 3"):
        tokens_of(tmp_path, tokenizer, [{"prompt": "a", "response": "b"}], 3)


def test_a_row_of_one_response_token(tmp_path, tokenizer):
    prompt = len(tokenizer.prompt_ids([{"role": "user", "content": "a"}]))
    tokens = tokens_of(tmp_path, tokenizer, [{"prompt": "a", "response": "b"}], prompt + 1)
    assert int(tokens.response.sum()) == 1 and tokens.input_ids[-1] == tokenizer.encode("b")[0]


def test_batches_hold_each_row_once_within_the_budget_longest_first():
    lengths = [5, 90, 30, 31, 2, 7, 200]
    groups = batches(range(7), lengths, 100)
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert groups[0] == [6]  # longer than the budget: alone
    assert all(len(group) * max(lengths[i] for i in group) <= 100 for group in groups[1:])


def test_a_batch_that_is_large_enough_ends_before_a_row_that_would_be_padding():
    lengths = [50, 46, 45, 44, 30, 20, 10, 3]
    assert batches(range(8), lengths, 400) == [[0, 1, 2], [3, 4, 5], [6, 7]]  # 100 tokens are enough; 44 < 0.9 * 50
    assert batches(range(8), lengths, 4000) == [list(range(8))]  # a quarter of the budget comes first


def test_collate_reads_the_same_tokens_from_any_batch(tmp_path, tokenizer):
    tokens = tokens_of(tmp_path, tokenizer, [{"prompt": "a " * n, "response": "yes " * (5 - n)} for n in range(1, 5)])
    batch = collate(tokens, [3, 0, 2], tokens.response, torch.device("cpu"))
    flat = batch.ids.flatten()
    assert torch.equal(flat[batch.before + 1], batch.targets)
    assert torch.equal(tokens.input_ids[batch.entries].long(), batch.targets)
    assert tokens.row_of(batch.entries).unique().tolist() == [0, 2, 3]


def test_taking_and_joining_rows(tmp_path, tokenizer):
    tokens = tokens_of(tmp_path, tokenizer, [{"prompt": "a " * n, "response": "yes " * n} for n in range(1, 4)])
    both = concatenate(tokens, take(tokens, [2, 0]))
    assert both.lengths == [*tokens.lengths, tokens.lengths[2], tokens.lengths[0]]
    assert torch.equal(both.input_ids[both.offsets[3] : both.offsets[4]], tokens.input_ids[tokens.offsets[2] : tokens.offsets[3]])


def test_an_empty_prompt_is_an_error_with_its_line(tmp_path, base):
    tokenizer = load_tokenizer(base)
    tokenizer.segments = lambda messages: [("", False), ("yes", True)]  # as under a template that renders the content alone
    with pytest.raises(InputError, match=r"rows.jsonl:1: the prompt is empty"):
        tokens_of(tmp_path, tokenizer, [{"prompt": "", "response": "yes"}])


def test_a_template_that_refuses_a_row_names_its_line(tmp_path, base):
    tokenizer = load_tokenizer(base)
    tokenizer.compiled = compile_template("{{ raise_exception('no') }}", "here")
    with pytest.raises(InputError, match=r"rows.jsonl:1: .*refuses"):
        tokens_of(tmp_path, tokenizer, [{"prompt": "a", "response": "b"}])
