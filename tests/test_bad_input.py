"""Whatever is wrong with the input, the answer is one line that names it, and nothing is changed.

One table: the command, how what it reads is damaged, and what the error says; what is refused as it
is stands in refused.txt. Each case starts from a finished run with references and scores, calls a
command as from the shell, and compares all files before and after.
"""

import gzip
import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, ROOT, damage, edit_json, edit_tensors, tree
from helpers import refused
from safetensors.torch import load_file

from model.io import made_from, save_tensors
from toss.files import fingerprint
from toss.tokens import Tokens

GOOD = '{"prompt": "Hi?", "response": "Yes."}\n'
ASKED = '{"prompt": "Hi?"}'
ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SCORE = "score.py --run {run}"
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


def file(content, name="bad.jsonl"):
    data = content if isinstance(content, bytes) else content.encode()
    return lambda tmp: (tmp / name).write_bytes(data)


def row(line, name="bad.jsonl"):
    """A file of a good row and a bad one."""
    return file(GOOD + (line if isinstance(line, str) else json.dumps(line)) + "\n", name)


def gone(name):
    """Remove a file or folder of the run."""
    path = lambda tmp: tmp / "run" / name
    return lambda tmp: shutil.rmtree(path(tmp)) if path(tmp).is_dir() else path(tmp).unlink()


cut = lambda name: lambda tmp: damage(tmp / "run", {name: -1})
said = lambda response, **more: row({"prompt": "a", "response": response, **more})
turns = lambda *messages, **more: row({"messages": [*messages], **more})
record = lambda file, *drop, **fields: lambda tmp: edit_json(tmp / "run" / file, *drop, **fields)
index = partial(record, "run.json")
degraded = partial(record, "degraded/record.json")
column, first = lambda t: t[:, None].clone(), lambda t: t[0].clone()
at = lambda place, value: lambda t: t.index_fill(0, torch.tensor([place % len(t)]), value)


def scores(name, change, fits=False, **header):
    """Change a tensor of scores.safetensors, or remove it; its record stays, or `fits`.

    header: fields of its record; ... removes one.
    """

    def edit(tmp):
        path = tmp / "run" / "scores.safetensors"
        record = {k: v for k, v in {**made_from(path), **header}.items() if v is not ...}
        edit_tensors(path, name, change)
        tensors = load_file(path)
        if fits:
            arrays = [tensors[name] for name in ("input_ids", "offsets", "response", "harmful")]
            record["tokens_sha256"] = fingerprint(Tokens(*arrays))
        save_tensors(tensors, path, record)

    return edit


unmarked = scores("harmful", torch.zeros_like)


def one_bit(tmp):
    """A number in the header of scores.safetensors, that of the skipped rows, is another one."""
    path, count = tmp / "run/scores.safetensors", b'skipped\\": '
    path.write_bytes(path.read_bytes().replace(count + b"0", count + b"1"))


def mask(change=lambda t: None, **header):
    """A mask over the run's tokens that keeps all, changed."""

    def write(tmp):
        source = tmp / "run" / "scores.safetensors"
        flags = load_file(source)["response"]
        tensors = {"keep": torch.ones_like(flags), "score": flags.float()}
        change(tensors)
        save_tensors(tensors, tmp / "mask.safetensors", {**made_from(source), **header})

    return write


def base(name, content):
    """A copy of the base in bad/, now the run's, with a file damaged: its bytes, or fields."""

    def copy(tmp):
        settings = json.loads((tmp / "run" / "run.json").read_text())["settings"]
        damaged = Path(shutil.copytree(settings["model"], tmp / "bad")) / name
        index(settings={**settings, "model": str(tmp / "bad")})(tmp)
        if isinstance(content, bytes):
            damaged.write_bytes(content)
        else:
            edit_json(damaged, **content)

    return copy


# What stands in run.json about a stage.
made = lambda **settings: {"recipe": {"inputs": {}, "settings": settings}}
STAGES = [{}, made(lr=-1), made(lr="x"), made(rank=True)]
STAGES += [made() | wrong for wrong in ({"seconds": "x"}, {"torch": 3}, {"threads": "1"})]
INDEX = [{"settings": []}, {"settings": {"max_length": True}}, {"identity": {"max_length": []}}]
INDEX += [{"stages": 3}, *({"stages": {"x": stage}} for stage in STAGES)]
INDEX += [{"hashes": 3}, {"hashes": {"/x": 3}}]
JINJA = "chat_template.jinja"
PACKED = gzip.compress(b"".join(GOOD.replace("Hi", f"{i * i}").encode() for i in range(99)))
TRAVEL = "0" * 64  # of a mask over other tokens
HEADER = {"template": "human", "max_length": 50, "tokenizer_sha256": ""}
HUGE = lambda tmp: file(gzip.compress(b"a" * (2**26 + 1), 1), "bad.jsonl.gz")(tmp)
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "Ċ": 1}, "unk_token": "<unk>"}  # no <unk>
SPANS = ([0, 9], [2, 1], [False, True])  # of a response of three characters
ECHO = b"{{ messages[-1].content if messages|length > 1 }}"  # a template of responses alone
SCORES, NO_TENSORS = "run/scores.safetensors", (b"", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 500)
NOT_READ = "cannot be read as safetensors"
ADOPT = "score.py --run {run} --utility-adapter {run}/degraded --degraded-adapter {run}/degraded"
ADAPTER = "degraded/adapter_model.safetensors"
ARRAYS = ("loss_utility", "input_ids", "response")
TABLE = [
    # Rows
    *((ROWS, row(x), "bad.jsonl:2: not JSON") for x in ("{", "[" * 100_000)),
    (ROWS, row("[1]"), "bad.jsonl:2: .*JSON object"),
    *((ROWS, x, "bad.jsonl:2: .*no turns in any") for x in (row({"text": "Hi"}), turns())),
    *((ROWS, x, "bad.jsonl:2: .*no response") for x in (row(ASKED), turns(ASK))),
    (ROWS, said(" "), "bad.jsonl:2: .*empty response"),
    (ROWS, said(3), "bad.jsonl:2: .*not a string but 3"),
    (ROWS, row('{"prompt": "a", "response": "\\ud83d"}'), "bad.jsonl:2: .*half a character"),
    *((ROWS, said("bcd", harmful=[span]), "bad.jsonl:2: .*spans") for span in SPANS),
    (ROWS, turns(ASK, ANSWER, ASK, ANSWER, harmful=[[0, 1]]), "bad.jsonl:2: .*spans"),
    (ROWS, row('{"prompt": "a", "response": "b", "n": ' + "9" * 5000 + "}"), ":2: not JSON"),
    (ROWS, turns({"role": "\x1b[31m\n" * 10**5, "content": "a"}), r"role '\\x1b\[31m.* \.\.\. "),
    (ROWS, lambda tmp: os.mkfifo(tmp / "bad.jsonl"), "bad.jsonl: "),
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
    (GZIP, HUGE, "bad.jsonl.gz:1: the line is longer than 64 MiB"),
    *((TRAIN, row("{", f"{x}.jsonl"), f"{x}.jsonl:2: not JSON") for x in ("harmful", "utility")),
    # Stages that are missing, changed or out of order
    (SELECT, gone("scores.safetensors"), "run score.py --run .*/run"),
    (SELECT, gone("degraded"), "run train.py --run .*/run"),
    (SCORE, gone("utility/adapter_model.safetensors"), "run train.py --run .*/run"),
    (ADOPT, gone("utility"), "degraded exists with other .*--degraded-adapter"),
    *((x + " --custom {tmp}/bad.jsonl", file(GOOD), "--custom") for x in (SCORE, SELECT)),
    (SELECT, file(GOOD, "custom.jsonl"), "--custom"),  # the same path, other rows
    (PRO, file(GOOD, "harmful.jsonl"), "--harmful"),
    (PRO, gone("degraded/record.json"), "no record"),
    (PRO, degraded(settings={"rank": "x"}), "a setting in its record is damaged"),
    *((PRO, degraded(**x), "no record") for x in ({"settings": 3}, {"files": None})),
    ("train.py --run {run}", gone("degraded/record.json"), "degraded .*--overwrite"),
    (OTHER, file("{", "run/degraded/record.json"), "degraded .*lr 0.01 there, 0.5 now"),
    (OTHER, file("{", "run/run.json"), "degraded .*lr 0.01 there, 0.5 now"),
    *((f"{SELECT} --method {x}", unmarked, "harm") for x in ("oracle", "sample-all")),
    (SELECT, base("config.json", {"rms_norm_eps": 1e-6}), "base_sha256"),
    (SCORE, base("tokenizer_config.json", {"a_token": "."}), "tokenizer_sha256"),
    # scores.safetensors
    *((SELECT, file(x, SCORES), f"scores.safetensors: {NOT_READ}") for x in NO_TENSORS),
    *((SELECT, scores(x, lambda t: None), f"{x} is missing") for x in ARRAYS),
    (SELECT, scores("loss_utility", lambda t: t[1:].clone()), "loss_utility has the shape"),
    (SELECT, scores("response", lambda t: t[:, None]), "response has the shape"),
    *((SELECT, scores(x, lambda t: t.double()), f"{x} has the dtype") for x in ARRAYS),
    (SELECT, scores("loss_degraded", at(-1, math.nan)), "loss_degraded is not finite.* on row 9"),
    (SELECT, scores("loss_utility", at(0, math.inf)), "loss_utility is not finite.* on row 0"),
    *((SELECT, scores("offsets", at(*one)), "offsets") for one in ((-1, 3), (0, 1), (3, 0))),
    *((SELECT, scores("offsets", x), "offsets has the shape") for x in (column, first)),
    (SELECT, scores("input_ids", at(0, 384), True), "has the id 384"),
    (SELECT, scores("input_ids", at(0, -1), True), "its flags or ids"),
    (SELECT, scores("response", lambda t: t | True, True), "its flags or ids"),
    (SELECT, scores("loss_utility", at(-1, -1.0)), "loss_utility is .*negative.* on row 9"),
    (SELECT, scores("loss_utility", at(0, 1.0)), "loss_utility is .* not of a response token"),
    (SELECT, scores("harmful", at(0, True)), "its flags or ids"),
    *((SELECT, scores("loss_utility", torch.clone, dtype=x), "its header") for x in ([], ...)),
    (SELECT, scores("loss_utility", torch.clone, skipped="x"), "its header"),
    (SELECT, one_bit, "scores.safetensors: the header is not as it was written"),
    *((SELECT, scores("input_ids", at(0, id)), "scores.*: its tokens") for id in (384, -1)),
    (SELECT, scores("response", at(0, True)), "scores.safetensors: its tokens"),
    # Selection files
    (MASK, file("keep", "mask.safetensors"), "mask.safetensors: cannot be read"),
    (MASK, mask(lambda t: t.pop("keep")), "it has no tensor `keep`"),
    (MASK, mask(lambda t: t.update(keep=t["keep"][1:].clone())), "keep has the shape"),
    (MASK, mask(lambda t: t.update(keep=t["keep"].float())), "keep has the dtype"),
    (MASK, mask(lambda t: t.update(keep=~t["keep"])), "tokens of prompts"),
    (MASK, mask(lambda t: t.update(keep=t["keep"].byte() * 2)), "other values than 0 and 1"),
    (MASK, mask(lambda t: t.update(score=t["score"] / 0)), "score is not float32, or not finite"),
    (MASK, mask(lambda t: t.update(weight=t["score"] / 2)), "holds weights"),
    (MASK, mask(tokens_sha256=""), "mask.safetensors"),
    (MASK, mask(tokens_sha256=TRAVEL, inputs={"--custom": ""}), "different: --custom"),
    *((MASK, mask(tokens_sha256=TRAVEL, **{k: v}), f"different: {k}") for k, v in HEADER.items()),
    (MASK + " --method toss --discard 0.1", mask(), "--mask .* --discard and --method"),
    # run.json
    (SELECT, file("{", "run/run.json"), "run.json: not JSON"),
    (SELECT, file("[]", "run/run.json"), "run.json: .*JSON object"),
    (SELECT, index("format"), "run.json .*another version"),
    (SELECT, index(settings={}), "has no base yet: .*--model"),
    *((SELECT, index(**fields), "run.json: .*name the inputs again") for fields in INDEX),
    # The base
    (PLAIN, base("model.safetensors", b"version https://git-lfs"), "model.safetensors: "),
    (PLAIN, base("config.json", {"vocab_size": 100}), "100"),
    (PLAIN, base(JINJA, b"{{ raise_exception('no') }}"), "custom.jsonl:1: .*refuses"),
    (PLAIN, base(JINJA, ECHO), "custom.jsonl:1: the prompt is empty"),
    (PLAIN, base(JINJA, b"Hi!"), "custom.jsonl:1: .*leaves a .* of 10 rows"),
    (PLAIN, base(JINJA, b"{{ 'a' * 10**10 }}"), "custom.jsonl:1: .* 1 GiB"),
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
LINES = (ROOT / "tests/refused.txt").read_text(encoding="utf-8").splitlines()
AS_IT_IS = (line.split(" -> ") for line in LINES if re.match(r"\w+\.(py |audit|gen|export)", line))
TABLE += [(line, lambda tmp: None, message) for line, message in AS_IT_IS]


@pytest.mark.parametrize(("line", "change", "message"), TABLE)
def test_bad_input(line, change, message, trained, base, files, tmp_path, capsys):
    change(tmp_path)
    before, known = tree(tmp_path), {**files, "goldens": GOLDENS}
    error = refused(capsys, line.format(run=trained, tmp=tmp_path, base=base, **known))
    assert re.search(message, error), error
    assert "\x1b" not in error and len(error) < 1100
    assert tree(tmp_path) == before
