"""Every row form reads as the same conversation; every broken line is an error with file and line."""

import gzip
import json

import pytest
from conftest import write_jsonl

from model.errors import InputError
from toss.rows import overlap, read_rows

TWO = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
FORMS = {
    "messages": {"messages": TWO},
    "prompt": {"prompt": "Hi?", "response": "Hello.", "other": 1},
    "alpaca": {"instruction": "Hi?", "input": "", "output": "Hello."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
    "hh chosen": {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
    "hh transcript": {"transcript": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Thanks."},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversation(tmp_path, form):
    path = write_jsonl(tmp_path / "rows.jsonl", [FORMS[form]])
    assert [row.messages for row in read_rows(path)] == [TWO]


def test_the_first_form_that_fits_wins(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{**FORMS["alpaca"], "prompt": "Other?", "response": "Other."}])
    assert read_rows(path)[0].messages[0]["content"] == "Other?"


def test_alpaca_input_follows_the_instruction(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert read_rows(path)[0].messages[0]["content"] == "Add.\n\n1 2"


def test_several_turns_and_a_system_message_stay(tmp_path):
    turns = [("system", "Be brief."), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"conversations": [{"from": f, "value": v} for f, v in turns]}])
    assert [m["role"] for m in read_rows(path)[0].messages] == ["system", "user", "assistant", "user", "assistant"]


def test_empty_messages_beside_another_form_and_text_before_a_transcript(tmp_path):
    rows = [{"messages": None, **FORMS["prompt"]}, {"chosen": "Be brief.\n\nHuman: Hi?\n\nAssistant: Hello."}]
    one, other = read_rows(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert one.messages == TWO and other.messages == [{"role": "system", "content": "Be brief."}, *TWO]


def test_gzip_and_blank_lines(tmp_path):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as f:
        f.write("\n" + json.dumps(FORMS["prompt"]) + "\n\n")
    rows = read_rows(tmp_path / "rows.jsonl.gz")
    assert len(rows) == 1 and rows[0].where.endswith(":2")


def test_evaluation_rows_may_have_a_prompt_only(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hi?", "source": "s"}, {**FORMS["prompt"], "answer": "Hello"}])
    first, second = read_rows(path, responses=False)
    assert (first.source, first.answer, second.answer) == ("s", None, "Hello")
    assert first.prompt == second.prompt == TWO[:1]


BROKEN = {
    "not JSON": ("{", "not JSON"),
    "no response": ({"prompt": "Hi?"}, "no response"),
    "empty response": ({"prompt": "Hi?", "response": " "}, "empty response"),
    "unknown form": ({"text": "Hi"}, "none of the known forms"),
    "not an object": ("[1]", "JSON object"),
    "unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, "role 'robot'"),
    "response is no text": ({"prompt": "Hi?", "response": 3}, "not a string"),
    "no assistant": ({"messages": TWO[:1]}, "no response"),
    "no prompt": ({"messages": TWO[1:]}, "no prompt"),
    "empty messages": ({"messages": []}, "none of the known forms"),
    "malformed turn": ({"messages": [{"role": "user"}]}, "malformed"),
    "half a character": ('{"prompt": "Hi?", "response": "\\ud83d"}', "half a character"),
    "too deep": ("[" * 100_000, "not JSON"),
    "span outside": ({"prompt": "Hi?", "response": "Yes", "harmful": [[0, 9]]}, "spans"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_an_error_with_file_and_line(tmp_path, name):
    line, message = BROKEN[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [FORMS["prompt"], line])
    with pytest.raises(InputError, match=message) as error:
        read_rows(path)
    assert f"{path}:2" in str(error.value)


def test_an_empty_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        read_rows(write_jsonl(tmp_path / "empty.jsonl", []))
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "absent.jsonl")


def test_overlap_counts_equal_rows_or_equal_prompts(tmp_path):
    one = read_rows(write_jsonl(tmp_path / "a.jsonl", [FORMS["prompt"], {"prompt": "x", "response": "y"}]))
    other = read_rows(write_jsonl(tmp_path / "b.jsonl", [FORMS["messages"], {"prompt": "x", "response": "z"}]))
    assert overlap(one, other) == 1
    assert overlap(one, other, prompts_only=True) == 2
