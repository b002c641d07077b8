"""Whatever is wrong with the input, the answer is one line that names it, and nothing is changed.

One table: the command, how what it reads is damaged, and what the error says; what is refused as it
is stands in refused.txt. Each case starts from a finished run with references and scores, calls a
command as from the shell, and compares all files and folders before and after.
"""

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, ROOT, edit_json, tree
from helpers import refused
from safetensors.torch import load_file, save_file

from model.io import made_from, save_tensors

GOOD = '{"prompt": "Hi?", "response": "Yes."}\n'
ASKED = '{"prompt": "Hi?"}'
ASK = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
SCORE = "score.py --run {run}"
ADOPT = "score.py --run {tmp}/new --model {base}"
GZIP = "score.py --run {run} --overwrite --custom {tmp}/bad.jsonl.gz"
ROWS = "score.py --run {run} --overwrite --custom {tmp}/bad.jsonl"
SELECT = "select.py --run {run} --name new"
PRO = SELECT + " --pro 1"
PREFILL = "toss.audit.evaluate --run {run} --harmful {tmp}/bad.jsonl --prefill 1"
SAFE = "toss.audit.baselines safeinstr --safety {tmp}/bad.jsonl --custom {custom} --out {tmp}/o"
DSIR = "toss.audit.baselines dsir --custom {tmp}/bad.jsonl --target {utility} --out {tmp}/o"
MASK = "select.py --run {run} --name new --mask {tmp}/mask.safetensors"
TRAIN = "train.py --run {tmp}/new --model {base} --harmful {harmful} --utility {utility}"
OTHER = "train.py --run {run} --model {base} --harmful {harmful} --utility {utility} --lr 0.5"
PLAIN = "select.py --run {tmp}/new --method sft --custom {custom} --model {tmp}/bad"
SCORES = "run/scores.safetensors"
ADAPTER = "degraded/adapter_model.safetensors"


# How an input is damaged: each of these returns a function of the folder {tmp}


def file(content: str | bytes, name: str = "bad.jsonl"):
    """A file with this content."""
    data = content if isinstance(content, bytes) else content.encode()

    def write(tmp):
        (tmp / name).write_bytes(data)

    return write


def row(line: str | dict | list, name: str = "bad.jsonl"):
    """A file of a good row and a bad one."""
    text = line if isinstance(line, str) else json.dumps(line)
    return file(GOOD + text + "\n", name)


def said(response, **more):
    """A row with this response."""
    return row({"prompt": "a", "response": response, **more})


def turns(*messages, **more):
    """A row with these messages."""
    return row({"messages": list(messages), **more})


def pipe(tmp):
    os.mkfifo(tmp / "bad.jsonl")


def huge(tmp):
    """A small file that unpacks to one line of more than 64 MiB."""
    (tmp / "bad.jsonl.gz").write_bytes(gzip.compress(b"a" * (2**26 + 1), 1))


def gone(name: str):
    """Remove a file or folder of the run."""

    def remove(tmp):
        path = tmp / "run" / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return remove


def cut(name: str):
    """Cut a byte off a file of the run."""

    def shorten(tmp):
        path = tmp / "run" / name
        path.write_bytes(path.read_bytes()[:-1])

    return shorten


def fields(name: str, *drop: str, **changed):
    """Change or drop fields of a JSON file of the run."""

    def edit(tmp):
        edit_json(tmp / "run" / name, *drop, **changed)

    return edit


def scores(name: str, tensor: torch.Tensor | None):
    """Put another tensor into scores.safetensors, or remove it; the record stays as it is."""

    def edit(tmp):
        path = tmp / SCORES
        tensors = load_file(path)
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
        save_file(tensors, path, {"made_from": json.dumps(made_from(path))})

    return edit


def one_digit(tmp):
    """A number in the header of scores.safetensors, that of the skipped rows, is another one."""
    path = tmp / SCORES
    count = b'skipped\\": '
    data = path.read_bytes()
    assert count + b"0" in data
    path.write_bytes(data.replace(count + b"0", count + b"1"))


def no_record(tmp):
    """scores.safetensors as another program would write it."""
    save_file(load_file(tmp / SCORES), tmp / SCORES)


def unmarked(tmp):
    """Scores of rows that mark no harm."""
    path = tmp / SCORES
    record = made_from(path)
    del record["sha256"]
    tensors = load_file(path)
    tensors["harmful"] = torch.zeros_like(tensors["harmful"])
    save_tensors(tensors, path, record)


def mask(drop: str = "", record: dict | None = None, **tensors):
    """A mask over the run's tokens, with other tensors (a function of the flags) or record."""

    def write(tmp):
        source = tmp / SCORES
        flags = load_file(source)["response"]
        content = {"keep": flags, "score": flags.float()}
        for name, change in tensors.items():
            content[name] = change(flags)
        content.pop(drop, None)
        header = {**made_from(source), **(record or {})}
        del header["sha256"]
        save_tensors(content, tmp / "mask.safetensors", header)

    return write


def base(name: str, content: dict | bytes):
    """A copy of the base in bad/, now the run's, with a file damaged: its bytes, or fields."""

    def copy(tmp):
        settings = json.loads((tmp / "run" / "run.json").read_text())["settings"]
        damaged = Path(shutil.copytree(settings["model"], tmp / "bad")) / name
        edit_json(tmp / "run" / "run.json", settings={**settings, "model": str(tmp / "bad")})
        if isinstance(content, bytes):
            damaged.write_bytes(content)
        else:
            edit_json(damaged, **content)

    return copy


def adapters(*names: str):
    """A folder new/ that holds only these references, as another program would write them."""

    def copy(tmp):
        for name in names:
            folder = shutil.copytree(tmp / "run" / name, tmp / "new" / name)
            (folder / "record.json").unlink()

    return copy


def stage(**settings):
    """run.json with the settings of a method."""
    recipe = {"stage": "methods/x", "inputs": {}, "settings": settings}
    return fields("run.json", stages={"methods/x": {"recipe": recipe}})


JINJA = "chat_template.jinja"
PACKED = gzip.compress(b"".join(GOOD.replace("Hi", f"{i * i}").encode() for i in range(99)))
TRAVEL = {"tokens_sha256": "0" * 64}  # of a mask over other tokens
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "Ċ": 1}, "unk_token": "<unk>"}  # no <unk>
SPANS = ([0, 9], [2, 1], [False, True])  # of a response of three characters
ECHO = b"{{ messages[-1].content if messages|length > 1 }}"  # a template of responses alone
NO_TENSORS = (b"", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 500)
NOT_READ = "cannot be read as safetensors"
WRITTEN = "not as it was written"
AGAIN = "run train.py --run .*/run again"
DAMAGED = "unexpected type; is the file damaged"
TABLE = [
    # Rows
    *((ROWS, row(x), "bad.jsonl:2: not JSON") for x in ("{", "[" * 100_000)),
    (ROWS, row("[1]"), "bad.jsonl:2: .*JSON object"),
    *((ROWS, x, "bad.jsonl:2: .*no turns in any") for x in (row({"text": "Hi"}), turns())),
    *((ROWS, x, "bad.jsonl:2: .*no response") for x in (row(ASKED), turns(ASK))),
    (ROWS, said(" "), "bad.jsonl:2: .*empty response"),
    (ROWS, said(3), "bad.jsonl:2: .*not a string but 3"),
    (
        ROWS,
        row('{"prompt": "a", "response": "\\ud83d"}'),
        "bad.jsonl:2: .*contains an unpaired surrogate",
    ),
    *((ROWS, said("bcd", harmful=[span]), "bad.jsonl:2: .*spans") for span in SPANS),
    (ROWS, turns(ASK, ANSWER, ASK, ANSWER, harmful=[[0, 1]]), "bad.jsonl:2: .*spans"),
    (ROWS, row('{"prompt": "a", "response": "b", "n": ' + "9" * 5000 + "}"), ":2: not JSON"),
    (ROWS, turns({"role": "\x1b[31m\n" * 10**5, "content": "a"}), r"role '\\x1b\[31m.* \.\.\. "),
    (ROWS, pipe, "bad.jsonl: not a regular file"),
    (ROWS, turns(ANSWER), "bad.jsonl:2: .*no prompt"),
    (ROWS, turns({"role": "user"}, ANSWER), "bad.jsonl:2: .*not a string but null"),
    (ROWS, turns({"role": "robot", "content": "a"}), "bad.jsonl:2: .*role 'robot'"),
    (ROWS, turns(ASK, ANSWER, {"role": "tool", "content": "1"}), "bad.jsonl:2: .*role 'tool'"),
    (ROWS, turns(ASK, {**ANSWER, "content": None}), "bad.jsonl:2: .*not a string but null"),
    (ROWS, turns({**ASK, "content": [{"type": "image_url"}]}, ANSWER), "bad.jsonl:2: "),
    (ROWS, file("\n"), "bad.jsonl: .*no rows"),
    (ROWS, file(f"[{GOOD.strip()}]"), "bad.jsonl:1: .*one JSON array.*jq -c"),
    (ROWS, file(b'{"prompt": "caf\xe9"}\n'), "bad.jsonl:1: .*UTF-8"),
    (ROWS, file(GOOD.replace("Hi?", "a " * 3000)), "bad.jsonl: .*longer than --max-length 2048"),
    (GZIP, file(PACKED[:-20], "bad.jsonl.gz"), r"bad.jsonl.gz:\d+: .*damaged"),
    (GZIP, file(PACKED[:10] + b"\xff" + PACKED[11:], "bad.jsonl.gz"), "damaged"),
    (GZIP, file(GOOD, "bad.jsonl.gz"), "bad.jsonl.gz: cannot be read"),
    (GZIP, huge, "bad.jsonl.gz:1: the line is longer than 64 MiB"),
    *((TRAIN, row("{", f"{x}.jsonl"), f"{x}.jsonl:2: not JSON") for x in ("harmful", "utility")),
    # Stages that are missing, changed or out of order
    (SELECT, gone("scores.safetensors"), "run score.py --run .*/run"),
    (SELECT, gone("degraded"), "run train.py --run .*/run"),
    (SCORE, gone("utility/adapter_model.safetensors"), "run train.py --run .*/run"),
    (ADOPT, adapters("utility", "degraded"), "--custom must be given"),
    (ADOPT + " --custom {custom}", adapters("degraded"), "utility.* does not exist.*run train.py"),
    (
        ADOPT + " --custom {tmp}/no.jsonl",
        adapters("utility", "degraded"),
        "no.jsonl: file not found",
    ),
    (SCORE, file("", f"run/{ADAPTER}"), f"adapter_model.safetensors was changed.*{AGAIN}"),
    (SCORE, gone("degraded/adapter_config.json"), f"adapter_config.json is missing.*{AGAIN}"),
    (SCORE, file("{}", "run/degraded/record.json"), f"{WRITTEN}.*{AGAIN}"),
    *((x + " --custom {tmp}/bad.jsonl", file(GOOD), "--custom") for x in (SCORE, SELECT)),
    (SELECT, file(GOOD, "custom.jsonl"), "--custom"),  # the same path, other rows
    (PRO, file(GOOD, "harmful.jsonl"), "--harmful"),
    (PRO, fields("degraded/record.json", settings={"rank": "x"}), f"{WRITTEN}.*{AGAIN}"),
    ("train.py --run {run}", gone("degraded/record.json"), "degraded .*--overwrite"),
    (OTHER, file("{", "run/run.json"), "degraded .*lr 0.01 there, 0.5 now"),
    *((f"{SELECT} --method {x}", unmarked, "harm") for x in ("oracle", "sample-all")),
    (SELECT, base("config.json", {"rms_norm_eps": 1e-6}), "base_sha256"),
    (SCORE, base("tokenizer_config.json", {"a_token": "."}), "tokenizer_sha256"),
    # scores.safetensors
    *((SELECT, file(x, SCORES), f"{NOT_READ}.*run score.py --run") for x in NO_TENSORS),
    (SELECT, cut("scores.safetensors"), f"scores.safetensors: {NOT_READ}"),
    (SELECT, scores("loss_utility", None), f"scores.safetensors: {WRITTEN}.*run score.py --run"),
    (SELECT, scores("loss_degraded", torch.zeros(530)), f"scores.safetensors: {WRITTEN}"),
    (SELECT, scores("offsets", torch.zeros(1)), f"scores.safetensors: {WRITTEN}"),
    (SELECT, one_digit, f"scores.safetensors: {WRITTEN}"),
    (SELECT, no_record, "scores.safetensors has no record .*run score.py --run .* --overwrite"),
    # Selection files
    (MASK, file("keep", "mask.safetensors"), "mask.safetensors: cannot be read"),
    (MASK, mask(drop="keep"), "it has no tensor `keep`"),
    (MASK, mask(keep=lambda flags: flags[1:].clone()), "keep has the shape"),
    (MASK, mask(keep=lambda flags: flags.float()), "keep has the dtype"),
    (MASK, mask(keep=lambda flags: flags.byte() * 2), "other values than 0 and 1"),
    (MASK, mask(score=lambda flags: flags / 0), "score is not float32, or not finite"),
    (MASK, mask(weight=lambda flags: flags / 2), "holds weights"),
    (MASK, mask(record={"tokens_sha256": ""}), "mask.safetensors"),
    (MASK, mask(record={**TRAVEL, "inputs": {"--custom": ""}}), "different: --custom"),
    (MASK, mask(record={**TRAVEL, "template": "human"}), "different: template"),
    (MASK, mask(record={**TRAVEL, "max_length": 50}), "different: max_length"),
    (MASK, mask(record={**TRAVEL, "tokenizer_sha256": ""}), "different: tokenizer_sha256"),
    (MASK + " --method toss --discard 0.1", mask(), "--mask .* --discard and --method"),
    # run.json
    (SELECT, file("{", "run/run.json"), "run.json: not JSON"),
    (SELECT, file("[]", "run/run.json"), "run.json: .*JSON object"),
    (SELECT, fields("run.json", "format"), "run.json .*another version"),
    (SELECT, fields("run.json", settings={}), "has no base yet: .*--model"),
    (SELECT, fields("run.json", settings=[]), f"run.json: settings: {DAMAGED}"),
    (SELECT, fields("run.json", stages=3), f"run.json: stages: {DAMAGED}"),
    (SELECT, fields("run.json", stages={"methods/x": 3}), f"run.json: methods/x: {DAMAGED}"),
    (SELECT, fields("run.json", hashes=3), f"run.json: hashes: {DAMAGED}"),
    (SELECT, stage(lr=-1), "run.json: .*--lr: '-1' is not a number above 0"),
    (SELECT, stage(lr="x"), "run.json: .*--lr: 'x' is not a number above 0"),
    (SELECT, stage(rank=True), "run.json: .*--rank: 'True' is not a whole number"),
    # The base
    (PLAIN, base("model.safetensors", b"version https://git-lfs"), "model.safetensors: "),
    (PLAIN, base("config.json", {"vocab_size": 100}), "100"),
    (PLAIN, base(JINJA, b"{{ raise_exception('no') }}"), "custom.jsonl:1: .*refuses"),
    (PLAIN, base(JINJA, ECHO), "custom.jsonl:1: the prompt is empty"),
    (PLAIN, base(JINJA, b"Hi!"), "custom.jsonl:1: .*leaves a .* of 10 rows"),
    (PLAIN, base("tokenizer.json", {"model": WORDS}), "custom.jsonl:1: .*tokenizer.json: .*UNK"),
    # Commands of the audit
    (PREFILL, file(ASKED), "bad.jsonl: --prefill needs harmful"),
    ("toss.audit.show {tmp}/bad.jsonl", file(b"\x80\x02}q\0."), f"bad.jsonl: {NOT_READ}"),
    ("toss.audit.show {run}/scores.safetensors", cut("scores.safetensors"), NOT_READ),
    ("toss.audit.show {run}/degraded", cut(ADAPTER), f"{ADAPTER}: {NOT_READ}"),
    ("toss.audit.diagnose --run {run}", gone("utility/adapter_model.safetensors"), "run train.py"),
    *((line, row(ASKED), "bad.jsonl:2: the row has no response") for line in (SAFE, DSIR)),
    ("toss.audit.noise --run {run}", gone("scores.safetensors"), "run score.py"),
]


def do_nothing(tmp):
    """The command is refused as it is."""


for line in (ROOT / "tests/refused.txt").read_text(encoding="utf-8").splitlines():
    if re.match(r"\w+\.(py |audit|gen|export)", line):
        command, message = line.split(" -> ")
        TABLE.append((command, do_nothing, message))


def everything(folder: Path) -> tuple[dict[str, bytes], set[Path]]:
    """All files and their content, and all paths, folders included."""
    return tree(folder), set(folder.rglob("*"))


@pytest.mark.parametrize(("line", "change", "message"), TABLE)
def test_bad_input(line, change, message, trained, base, files, tmp_path, capsys):
    change(tmp_path)
    before = everything(tmp_path)
    words = {**files, "goldens": GOLDENS, "run": trained, "tmp": tmp_path, "base": base}
    error = refused(capsys, line.format(**words))
    assert re.search(message, error), error
    assert "\x1b" not in error
    assert len(error) < 1100
    assert everything(tmp_path) == before
