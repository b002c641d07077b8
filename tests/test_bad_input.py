"""Whatever is wrong with the input, the answer is one line that names it, and nothing is changed.

The cases are lines of data files: commands that are refused as they are (refused.txt), rows
(bad_rows.txt), and files that were damaged (damaged.txt). Each starts from a finished run with
references and scores, and all files and folders are compared before and after.
"""

import gzip
import json
import os

import pytest
from conftest import write_jsonl
from helpers import cases, session, spoil
from safetensors.torch import load_file, save_file

from model.io import made_from, save_tensors

GOOD = '{"prompt": "Hi?", "response": "Yes."}'


@pytest.mark.parametrize(("line", "message"), cases("refused.txt"))
def test_a_command_that_is_refused(line, message, place, capsys):
    session([(line, f"error: .*({message})")], place, capsys)


@pytest.mark.parametrize(("case", "message"), cases("damaged.txt"))
def test_a_damaged_file_is_named(case, message, place, capsys):
    damage, line = case.split(" | ")
    spoil(place, json.loads(damage))
    session([(line, f"error: .*({message})")], place, capsys)


# Rows

SCORE = "score.py --run {run} --overwrite --custom {tmp}/"
LONG = [
    ("[" * 100_000, "not JSON"),
    ('{"prompt": "a", "response": "b", "n": ' + "9" * 5000 + "}", "not JSON"),
    ('{"messages": [{"role": "' + "\\u001b[31m\\n" * 10**5 + '"}]}', r"role '\\x1b\[31m"),
]


@pytest.mark.parametrize(("row", "message"), cases("bad_rows.txt") + LONG)
def test_a_bad_row_is_named_by_file_and_line(row, message, place, capsys):
    write_jsonl(place / "bad.jsonl", [GOOD, row])
    session([(f"{SCORE}bad.jsonl", f"error: .*bad.jsonl:2: .*{message}")], place, capsys)


PACKED = gzip.compress(b"".join(b'{"prompt": "%d", "response": "a"}\n' % i**2 for i in range(99)))
FILES = [
    ("bad.jsonl", b'{"prompt": "caf\xe9"}\n', "bad.jsonl:1: .*UTF-8"),
    ("bad.jsonl.gz", PACKED[:-20], r"bad.jsonl.gz:\d+: .*damaged"),
    ("bad.jsonl.gz", PACKED[:10] + b"\xff" + PACKED[11:], "damaged"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=range(len(FILES)))
def test_a_file_of_rows_that_cannot_be_read_is_named(name, content, message, place, capsys):
    (place / name).write_bytes(content)
    session([(SCORE + name, f"error: .*{message}")], place, capsys)


def test_a_pipe_is_not_waited_for(place, capsys):
    os.mkfifo(place / "pipe")
    session([(f"{SCORE}pipe", "error: .*pipe: not a regular file")], place, capsys)


# Tensors that do not fit


def test_scores_without_their_digest_are_refused(place, capsys):
    file = place / "run/scores.safetensors"
    record = made_from(file)
    del record["sha256"]
    save_file(load_file(file), file, {"made_from": json.dumps(record)})
    error = r"error: .*scores.safetensors: not as it was written.*run \S+ score.py --run"
    session([("select.py --run {run}", error)], place, capsys)


def test_a_mask_that_does_not_fit_is_refused(place, capsys):
    scores = place / "run/scores.safetensors"
    response = load_file(scores)["response"]
    record = made_from(scores)
    del record["sha256"]

    def refuse(message, tensors, **fields):
        save_tensors(tensors, place / "mask.safetensors", {**record, **fields})
        line = "select.py --run {run} --mask {tmp}/mask.safetensors"
        session([(line, f"error: .*{message}")], place, capsys)

    keep = {"keep": response}
    refuse("is no mask that says over which token ids it is", {"score": response.float()})
    refuse("keep has another dtype or shape", {"keep": response[1:].clone()})
    refuse("keep has another dtype or shape", {"keep": response.float()})
    refuse("score is not finite", {**keep, "score": response / 0})
    refuse("weights has another dtype or shape", {**keep, "weights": response.long()})
    refuse("is a mask over other token ids", keep, tokens_sha256="")
