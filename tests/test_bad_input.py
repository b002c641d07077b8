"""Whatever is wrong with the input, the answer is one line that names it, and nothing is changed.

The cases are lines of data files: commands that are refused as they are (refused.txt), rows
(bad_rows.txt), and files that were damaged (damaged.txt). Each starts from a finished run with
references and scores, and all files and folders are compared before and after.
"""

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, make_run, tree, write_files
from helpers import cases, refused, spoil
from safetensors.torch import load_file, save_file

from model.io import made_from, save_tensors

GOOD = '{"prompt": "Hi?", "response": "Yes."}'


@pytest.fixture(scope="module")
def original(tmp_path_factory, base) -> Path:
    """A folder with base/, run/ and the data files, which no refused command changes."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(base, folder / "base")
    make_run(folder / "run", folder / "base", write_files(folder))
    return folder


@pytest.fixture
def place(original, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    file = folder / "run/run.json"
    file.write_text(file.read_text().replace(str(original), str(folder)))
    return folder


def error_of(line: str, folder: Path, capsys) -> str:
    """The error of a command that must be refused, in a folder that must stay as it is."""
    words = {"tmp": folder, "run": folder / "run", "base": folder / "base", "goldens": GOLDENS}
    for name in ("harmful", "utility", "custom"):
        words[name] = folder / f"{name}.jsonl"
    files = tree(folder)
    paths = set(folder.rglob("*"))
    error = refused(capsys, line.format(**words))
    assert "\x1b" not in error
    assert len(error) < 1100
    assert tree(folder) == files
    assert set(folder.rglob("*")) == paths
    return error


@pytest.mark.parametrize(("line", "message"), cases("refused.txt"))
def test_a_command_that_is_refused(line, message, original, capsys):
    assert re.search(message, error_of(line, original, capsys))


@pytest.mark.parametrize(("case", "message"), cases("damaged.txt"))
def test_a_damaged_file_is_named(case, message, place, capsys):
    damage, line = case.split(" | ")
    spoil(place, json.loads(damage))
    assert re.search(message, error_of(line, place, capsys))


# Rows

SCORE = "score.py --run {run} --overwrite --custom {tmp}/bad.jsonl"
ROWS = cases("bad_rows.txt") + [
    ("[" * 100_000, "not JSON"),
    ('{"prompt": "a", "response": "b", "n": ' + "9" * 5000 + "}", "not JSON"),
    ('{"messages": [{"role": "' + "\\u001b[31m\\n" * 10**5 + '"}]}', r"role '\\x1b\[31m.* \.\.\. "),
]


@pytest.mark.parametrize(("row", "message"), ROWS, ids=range(len(ROWS)))
def test_a_bad_row_is_named_by_file_and_line(row, message, original, capsys):
    file = original / "bad.jsonl"
    file.write_text(f"{GOOD}\n{row}\n")
    try:
        assert re.search(f"bad.jsonl:2: .*{message}", error_of(SCORE, original, capsys))
    finally:
        file.unlink()


PACKED = gzip.compress(
    b"".join(f'{{"prompt": "{i * i}", "response": "a"}}\n'.encode() for i in range(99))
)
FILES = [
    ("bad.jsonl", b"\n", "bad.jsonl: .*no rows"),
    ("bad.jsonl", f"[{GOOD}]".encode(), "bad.jsonl:1: .*one JSON array.*jq -c"),
    ("bad.jsonl", b'{"prompt": "caf\xe9"}\n', "bad.jsonl:1: .*UTF-8"),
    ("bad.jsonl", GOOD.replace("Hi?", "a " * 3000).encode(), "longer than --max-length 2048"),
    ("bad.jsonl.gz", PACKED[:-20], r"bad.jsonl.gz:\d+: .*damaged"),
    ("bad.jsonl.gz", PACKED[:10] + b"\xff" + PACKED[11:], "damaged"),
    ("bad.jsonl.gz", GOOD.encode(), "bad.jsonl.gz: cannot be read"),
    ("bad.jsonl.gz", gzip.compress(b"a" * (2**26 + 1), 1), ":1: the line is longer than 64 MiB"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=range(len(FILES)))
def test_a_file_of_rows_that_cannot_be_read_is_named(name, content, message, place, capsys):
    (place / name).write_bytes(content)
    line = SCORE.replace("bad.jsonl", name)
    assert re.search(message, error_of(line, place, capsys))


def test_a_pipe_is_not_waited_for(place, capsys):
    os.mkfifo(place / "bad.jsonl")
    assert "bad.jsonl: not a regular file" in error_of(SCORE, place, capsys)


# Tensors that do not fit

SELECT = "select.py --run {run} --name new"


@pytest.mark.parametrize("change", ["no tensor", "shape", "sign", "record", "no digest"])
def test_scores_that_were_changed_are_refused(change, place, capsys):
    file = place / "run/scores.safetensors"
    tensors = load_file(file)
    record = made_from(file)
    if change == "no tensor":
        del tensors["loss_utility"]
    elif change == "shape":
        tensors["loss_degraded"] = tensors["loss_degraded"].view(2, -1)
    elif change == "sign":
        tensors["loss_degraded"] = -tensors["loss_degraded"]
    elif change == "record":
        record["skipped"] = 1
    elif change == "no digest":
        del record["sha256"]
    save_file(tensors, file, {"made_from": json.dumps(record)})
    error = error_of(SELECT, place, capsys)
    assert re.search("scores.safetensors: not as it was written.*run \\S+ score.py --run", error)


def test_scores_of_another_program_are_refused(place, capsys):
    file = place / "run/scores.safetensors"
    save_file(load_file(file), file)
    error = error_of(SELECT, place, capsys)
    assert re.search(
        "scores.safetensors has no record .*run \\S+ score.py --run .* --overwrite", error
    )


@pytest.mark.parametrize("method", ["oracle", "sample-all"])
def test_methods_by_ground_truth_need_marked_rows(method, place, capsys):
    file = place / "run/scores.safetensors"
    record = made_from(file)
    del record["sha256"]
    tensors = load_file(file)
    tensors["harmful"] = torch.zeros_like(tensors["harmful"])
    save_tensors(tensors, file, record)
    assert "harm" in error_of(f"{SELECT} --method {method}", place, capsys)


def test_a_mask_that_does_not_fit_is_refused(original, tmp_path, capsys):
    scores = original / "run/scores.safetensors"
    response = load_file(scores)["response"]
    record = made_from(scores)
    del record["sha256"]
    mask = tmp_path / "mask.safetensors"
    line = f"{SELECT} --mask {mask}"

    def error(**tensors):
        save_tensors(tensors, mask, record)
        return error_of(line, original, capsys)

    assert "it has no tensor `keep`" in error(score=response.float())
    assert "keep has the shape" in error(keep=response[1:].clone())
    assert "keep has the dtype" in error(keep=response.float())
    assert "other values than 0 and 1" in error(keep=response.byte() * 2)
    assert "score is not float32, or not finite" in error(keep=response, score=response / 0)
    assert "holds weights" in error(keep=response, weight=response / 2)
    # Over other tokens: the error says what made the difference.
    record["tokens_sha256"] = "0" * 64
    assert "the rows, or their length" in error(keep=response)
    others = {
        "template": "human",
        "max_length": 50,
        "tokenizer_sha256": "",
        "inputs": {"--custom": ""},
    }
    for key, value in others.items():
        before = record[key]
        record[key] = value
        differing = "--custom" if key == "inputs" else key
        assert f"(different: {differing})" in error(keep=response)
        record[key] = before
    mask.write_text("keep")
    assert "mask.safetensors: cannot be read" in error_of(line, original, capsys)
    contradiction = f"{line} --method toss --discard 0.1"
    assert re.search("--mask .* --discard and --method", error_of(contradiction, original, capsys))
