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


VARIATIONS = {
    "ShareGPT's other names": {"conversations": [{"from": "user", "value": "Hi?"}, {"from": "chatgpt", "value": "Hello."}]},
    "bing": {"conversations": [{"from": "human", "value": "Hi?", "weight": 0}, {"from": "bing", "value": "Hello."}]},
    "role and content": {"conversations": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]},
    "from and value": {"messages": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i?"}]},
                           {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}]},
    "no input": {"instruction": "Hi?", "output": "Hello."},
    "null input": {"instruction": "Hi?", "input": None, "output": "Hello."},
    "a question at the end": {"transcript": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman:"},
    "an answer not begun": {"transcript": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: More?\n\nAssistant:"},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_that_files_have(tmp_path, name):
    path = write_jsonl(tmp_path / "rows.jsonl", [VARIATIONS[name]])
    assert [row.messages for row in read_rows(path)] == [TWO]


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    text = "\ufeff" + "".join(json.dumps(FORMS[name], ensure_ascii=False) + "\r\n" for name in ("prompt", "alpaca"))
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert [row.messages for row in read_rows(tmp_path / name)] == [TWO, TWO]


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
    broken_off = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"}
    whole = {"prompt": "the whole text of a template", "instruction": "Hi?", "input": "", "output": "Hello."}
    first, second = read_rows(write_jsonl(tmp_path / "more.jsonl", [broken_off, whole]), responses=False)
    assert [m["content"] for m in first.prompt] == ["Hi?", "Hello.", "And?"] and second.prompt == TWO[:1]


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
    "a tool's turn": ({"messages": [*TWO, {"role": "tool", "content": "42"}]}, "role 'tool' .*leave such rows out"),
    "null content": ({"messages": [TWO[0], {"role": "assistant", "content": None}]}, "not a string but null"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TWO[1]]}, "not a string but .*image_url"),
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


def test_a_file_that_is_no_jsonl_says_what_to_do(tmp_path):
    path = tmp_path / "rows.json"
    for layout in (json.dumps([FORMS["prompt"]]), json.dumps([FORMS["prompt"]], indent=2)):
        path.write_text(layout)
        with pytest.raises(InputError, match=r"rows.json:1: .*one JSON array.*jq -c"):
            read_rows(path)
    path.write_bytes((json.dumps(FORMS["prompt"]) + "\n").encode() + '{"prompt": "caf\xe9"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"rows.json:2: .*UTF-8"):
        read_rows(path)


def test_a_packed_file_that_is_cut_off_or_damaged_names_the_line(tmp_path):
    whole = gzip.compress("".join(json.dumps({"prompt": f"Hi {i * i}?", "response": "Yes."}) + "\n" for i in range(9)).encode())
    path = tmp_path / "rows.jsonl.gz"
    for broken in (whole[:-20], whole[:10] + b"\xff" + whole[11:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"rows.jsonl.gz:\d+: the packed file is cut off or damaged"):
            read_rows(path)
    path.write_bytes(json.dumps(FORMS["prompt"]).encode())
    with pytest.raises(InputError, match="rows.jsonl.gz: cannot be read"):
        read_rows(path)


def test_overlap_counts_equal_rows_or_equal_prompts(tmp_path):
    one = read_rows(write_jsonl(tmp_path / "a.jsonl", [FORMS["prompt"], {"prompt": "x", "response": "y"}]))
    other = read_rows(write_jsonl(tmp_path / "b.jsonl", [FORMS["messages"], {"prompt": "x", "response": "z"}]))
    assert overlap(one, other) == 1
    assert overlap(one, other, prompts_only=True) == 2
