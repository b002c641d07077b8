"""Rows that other libraries write are read as they mean them; what cannot be read is explained."""

import pytest
from conftest import write_jsonl
from helpers import refused, said

from model import load_tokenizer
from model.io import InputError
from toss.rows import read_rows
from toss.tokens import tokenise
from toss.workbench.results import read_record
from toss.workbench.run import open_run

CONVERSATION = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
]
GOOD = {"prompt": "What is 2 + 3?", "response": "It is 5."}
EMPTY = {"prompt": "What is 4 + 4?", "response": " "}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 2 + 3?", "completion": "It is 5."},
        {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]},
        {"prompt": CONVERSATION[:1], "completion": "It is 5."},
    ],
    ids=["texts", "message lists", "mixed"],
)
def test_trls_prompt_and_completion_are_a_conversation(row):
    assert read_rows([row])[0].messages == CONVERSATION


def test_a_response_comes_before_a_completion():
    row = {"prompt": "What is 2 + 3?", "response": "It is 5.", "completion": "It is 6."}
    assert read_rows([row])[0].messages == CONVERSATION


def test_a_content_may_be_a_list_of_text_parts():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 3?"}]
    messages = [{"role": "user", "content": parts}, CONVERSATION[1]]
    assert read_rows([{"messages": messages}])[0].messages == CONVERSATION


def test_a_content_with_an_image_is_refused():
    parts = [{"type": "image", "url": "x"}]
    messages = [{"role": "user", "content": parts}, CONVERSATION[1]]
    with pytest.raises(InputError, match="row 0 .*'user' has a part that is not a text"):
        read_rows([{"messages": messages}])


@pytest.mark.parametrize("value", [True, "harmful", [1, 2], [[0, True]], [[0, 99]], [[3, 3]]])
def test_a_harmful_key_that_is_no_list_of_spans_is_named(value):
    with pytest.raises(InputError, match="`harmful` must be a list of .start, end. character"):
        read_rows([{**GOOD, "harmful": value}])


def test_an_unknown_form_names_its_keys_and_the_forms_that_are_read():
    with pytest.raises(InputError, match=r"prompt and completion \(TRL\).*but \['question', 'a'\]"):
        read_rows([{"question": "What is 2 + 3?", "a": "5"}])


def test_empty_responses_are_counted_and_the_first_three_named(base):
    rows = read_rows([GOOD, EMPTY, EMPTY, GOOD, EMPTY, EMPTY])
    message = r"4 of 6 rows have \(row 1 .*, row 2 .*, row 4 [^,]*\): --skip-empty"
    with pytest.raises(InputError, match=message):
        tokenise(rows, load_tokenizer(base), 2048)


def test_a_row_that_is_left_out_keeps_its_place(base):
    tokenizer = load_tokenizer(base)
    tokens = tokenise(read_rows([GOOD, EMPTY, GOOD]), tokenizer, 2048, skip_empty=True)
    whole = tokenise(read_rows([GOOD, GOOD]), tokenizer, 2048)
    assert tokens.lengths == [whole.lengths[0], 0, whole.lengths[1]]
    assert tokens.input_ids.tolist() == whole.input_ids.tolist()
    assert tokens.skipped == 1


def test_a_run_that_was_begun_with_skip_empty_has_it_throughout(tmp_path, base, files, capsys):
    custom = write_jsonl(tmp_path / "custom.jsonl", [GOOD, EMPTY, GOOD])
    begin = f"select.py --run {tmp_path}/run --method sft --model {base} --custom {custom}"
    assert "--skip-empty" in refused(capsys, begin)
    output = said(capsys, f"{begin} --skip-empty")
    assert "1 rows skipped, 0 cut; of the skipped rows, 1 have an empty response" in output
    assert read_record(tmp_path / "run/methods/sft")["skip_empty"] is True
    assert open_run(tmp_path / "run").args.skip_empty is True
    again = f"select.py --run {tmp_path}/run --method random"
    assert "skip_empty = True" in said(capsys, again)


def test_a_run_that_was_begun_without_skip_empty_refuses_it(tmp_path, base, files, capsys):
    run = f"--run {tmp_path}/strict"
    said(capsys, f"select.py {run} --method sft --model {base} --custom {files['custom']}")
    assert "begun with" in refused(capsys, f"select.py {run} --method random --skip-empty")


def test_an_evaluation_refuses_empty_responses_before_it_asks_anything(trained, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "asked.jsonl", [GOOD, EMPTY])
    line = f"toss.audit.evaluate --run {trained} --methods base --utility {rows}"
    assert "asked.jsonl:2: 1 rows have an empty response" in refused(capsys, line)
    assert not (trained / "answers").exists()


def test_an_evaluation_of_a_run_that_skips_them_leaves_them_out(base, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [GOOD, EMPTY])
    run = f"--run {tmp_path}/run"
    begin = f"select.py {run} --method sft --model {base} --custom {rows} --skip-empty"
    said(capsys, begin)
    line = f"toss.audit.evaluate {run} --methods base --utility {rows} --harmful {rows}"
    output = said(capsys, f"{line} --max-new-tokens 2")
    assert "1 rows with an empty response are left out" in output
