"""Whatever is wrong with the input, the answer is one line that names it, and nothing is changed.

One table: what is damaged, how, and what the error says. Each case starts from a finished run with
references and scores, calls a script as from the shell, and compares all files before and after.
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
from conftest import edit_json, edit_tensors, tree
from helpers import refused
from safetensors.torch import load_file

from model.io import made_from, save_tensors
from toss.files import fingerprint
from toss.tokens import Tokens

GOOD = '{"prompt": "Hi?", "response": "Yes."}\n'
ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SCORE = "score.py --run {run}"
GZIP = "score.py --run {run} --overwrite --custom {tmp}/bad.jsonl.gz"
ROWS = "score.py --run {run} --overwrite --custom {tmp}/bad.jsonl"
SELECT = "select.py --run {run} --name new"
NAME = "select.py --run {run} --name "
BENCH = {"--repeats 0": "--repeats", "--rows 0": "--rows", "--device abacus": "abacus"}
BENCH |= {f"{flag} nowhere": "nowhere" for flag in ("--part", "--model")}
NAMES = ("../up", "a/b", "base", "degraded", "x.lock")  # that methods/NAME must not have
OUT_OF_RANGE = {"--discard": "1 -0.1", "--method": "best toss-pro", "--lr": "nan 1e38"}
OUT_OF_RANGE |= {"--alpha": "inf", "--seed": "-1", "--epochs": "x", "--max-length": "0"}
OUT_OF_RANGE |= {"--schedule": "linear", "--pro": "-1"}
OUT_OF_RANGE = [(flag, x) for flag, values in OUT_OF_RANGE.items() for x in values.split()]
BAD = "('{0}' is not|invalid choice: '{0}')"
DEVICES = ("abacus", "mps", "meta")
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
JINJA = "chat_template.jinja"
PACKED = gzip.compress(b"".join(GOOD.replace("Hi", f"{i * i}").encode() for i in range(99)))
TRAVEL = "0" * 64  # of a mask over other tokens
HEADER = {"template": "human", "max_length": 50, "tokenizer_sha256": ""}
HUGE = lambda tmp: file(gzip.compress(b"a" * (2**26 + 1), 1), "bad.jsonl.gz")(tmp)
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "Ċ": 1}, "unk_token": "<unk>"}  # no <unk>
SPANS = ([0, 9], [2, 1], [False, True])  # of a response of three characters
ECHO = b"{{ messages[-1].content if messages|length > 1 }}"  # a template of responses alone
ARRAYS = ("loss_utility", "input_ids", "response")
TABLE = [
    # Rows
    (ROWS, row("{"), "bad.jsonl:2: not JSON"),
    (ROWS, row("[" * 100_000), "bad.jsonl:2: not JSON"),
    (ROWS, row("[1]"), "bad.jsonl:2: .*JSON object"),
    (ROWS, row({"text": "Hi"}), "bad.jsonl:2: .*none of the known forms"),
    (ROWS, row({"prompt": "Hi?"}), "bad.jsonl:2: .*no response"),
    (ROWS, said(" "), "bad.jsonl:2: .*empty response"),
    (ROWS, said(3), "bad.jsonl:2: .*not a string but 3"),
    (ROWS, row('{"prompt": "a", "response": "\\ud83d"}'), "bad.jsonl:2: .*half a character"),
    *((ROWS, said("bcd", harmful=[span]), "bad.jsonl:2: .*spans") for span in SPANS),
    (ROWS, turns(ASK, ANSWER, ASK, ANSWER, harmful=[[0, 1]]), "bad.jsonl:2: .*spans"),
    (ROWS, row('{"prompt": "a", "response": "b", "n": ' + "9" * 5000 + "}"), ":2: not JSON"),
    (ROWS, turns({"role": "\x1b[31m\n" * 10**5, "content": "a"}), r"role '\\x1b\[31m.* \.\.\. "),
    (ROWS, lambda tmp: os.mkfifo(tmp / "bad.jsonl"), "bad.jsonl: "),
    ("score.py --run {run} --overwrite --custom /dev/zero", None, "/dev/zero: "),
    (ROWS, turns(), "bad.jsonl:2: .*none of the known forms"),
    (ROWS, turns(ASK), "bad.jsonl:2: .*no response"),
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
    (ROWS, None, "bad.jsonl: no such file"),
    ("score.py --run {run} --overwrite --custom {tmp}", None, "test_bad_input"),  # a folder
    (GZIP, file(PACKED[:-20], "bad.jsonl.gz"), r"bad.jsonl.gz:\d+: .*damaged"),
    (GZIP, file(PACKED[:10] + b"\xff" + PACKED[11:], "bad.jsonl.gz"), "damaged"),
    (GZIP, file(GOOD, "bad.jsonl.gz"), "bad.jsonl.gz: cannot be read"),
    (GZIP, HUGE, "bad.jsonl.gz:1: the line is longer than 64 MiB"),
    *((TRAIN, row("{", f"{x}.jsonl"), f"{x}.jsonl:2: not JSON") for x in ("harmful", "utility")),
    # Stages that are missing, changed or out of order
    ("score.py --run {tmp}/new --model {base} --custom {custom}", None, "run train.py"),
    ("score.py --run {tmp}/new --custom {custom}", None, "run train.py"),
    ("train.py --run {tmp}/new --model {base} --harmful {harmful}", None, "but not: --utility"),
    ("train.py --run {tmp}/new --utility {utility}", None, "but not: --model and --harmful"),
    ("select.py --run {tmp}/new --method sft --model {base}", None, "--custom must be given"),
    (SELECT, gone("scores.safetensors"), "run score.py --run .*/run"),
    (SELECT, gone("degraded"), "run train.py --run .*/run"),
    (SCORE, gone("utility/adapter_model.safetensors"), "run train.py --run .*/run"),
    *((x + " --custom {tmp}/bad.jsonl", file(GOOD), "--custom") for x in (SCORE, SELECT)),
    (SELECT, file(GOOD, "custom.jsonl"), "--custom"),  # the same path, other rows
    (SELECT + " --pro 1", file(GOOD, "harmful.jsonl"), "--harmful"),
    (SELECT + " --pro 1", gone("degraded/record.json"), "no record"),
    (SELECT + " --pro 1", degraded(settings={"rank": "x"}), "a setting in its record is damaged"),
    *(
        (SELECT + " --pro 1", degraded(**x), "no record")
        for x in ({"settings": 3}, {"files": None})
    ),
    ("train.py --run {run}", gone("degraded/record.json"), "degraded .*--overwrite"),
    (OTHER, file("{", "run/degraded/record.json"), "degraded .*lr 0.01 there, 0.5 now"),
    (OTHER, file("{", "run/run.json"), "degraded .*lr 0.01 there, 0.5 now"),
    (SELECT + " --method base", None, "run score.py --base --overwrite"),
    *((f"{SELECT} --method {x}", unmarked, "harm") for x in ("oracle", "sample-all")),
    (SCORE + " --base", None, "base False there, True now.*--overwrite"),
    (SCORE + " --max-length 64", None, "begun with --max-length 2048"),
    (SELECT + " --template human", None, "begun with --template chat"),
    (SELECT, base("config.json", {"rms_norm_eps": 1e-6}), "base_sha256"),
    (SCORE, base("tokenizer_config.json", {"a_token": "."}), "tokenizer_sha256"),
    # scores.safetensors
    (SELECT, file(b"", "run/scores.safetensors"), "scores.safetensors: cannot be read"),
    (SELECT, file(b"\x10\0\0\0\0\0\0\0{}", "run/scores.safetensors"), "scores.safetensors: "),
    (SELECT, file(b"\xff" * 500, "run/scores.safetensors"), "scores.safetensors: "),
    *(
        (SELECT, scores(x, lambda t: None), f"{x} is missing")
        for x in ("input_ids", "loss_utility")
    ),
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
    (MASK, None, "mask.safetensors: no such file"),
    (MASK, file("keep", "mask.safetensors"), "mask.safetensors: cannot be read"),
    (MASK, mask(lambda t: t.pop("keep")), "keep"),
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
    (SELECT, index(settings={}), "--model"),
    *((SELECT, index(settings=x), "run.json: .*again") for x in ([], {"max_length": True})),
    (SELECT, index(stages=3), "run.json"),
    (SELECT, index(identity={"max_length": []}), "run.json: .*name the inputs again"),
    *(
        (SELECT, index(stages={"x": stage}), "run.json: .*name the inputs again")
        for stage in STAGES
    ),
    *((SELECT, index(hashes=hashes), "run.json: .*again") for hashes in (3, {"/x": 3})),
    # The base
    (PLAIN, None, "bad"),
    (PLAIN, base("model.safetensors", b"version https://git-lfs"), "model.safetensors: "),
    (PLAIN, base("config.json", {"vocab_size": 100}), "100"),
    (PLAIN, base(JINJA, b"{{ raise_exception('no') }}"), "custom.jsonl:1: .*refuses"),
    (PLAIN, base(JINJA, ECHO), "custom.jsonl:1: the prompt is empty"),
    (PLAIN, base(JINJA, b"Hi!"), "custom.jsonl:1: .*leaves a .* of 10 rows"),
    (PLAIN, base(JINJA, b"{{ 'a' * 10**10 }}"), "custom.jsonl:1: .* 1 GiB"),
    (PLAIN, base("tokenizer.json", {"model": WORDS}), "custom.jsonl:1: .*tokenizer.json: .*UNK"),
    # Flags out of range, unknown, or contradicting each other
    *((f"{SELECT} {flag}={x}", None, f"{flag}: {BAD.format(x)}") for flag, x in OUT_OF_RANGE),
    (SELECT + " --threads 1000000", None, "--threads: '1000000' is not .* 1024"),
    (SELECT + " --rank 1000000", None, "the LoRA rank 1000000 .*q_proj, .32, 32"),
    ("select.py --run ''", None, "--run: '' is not"),
    ("select.py --run /proc/x --method sft --model {base} --custom {custom}", None, "/proc/x"),
    (SELECT + " --targets q_proj,mystery", None, "mystery"),
    (SELECT + " --targets ,", None, "targets"),
    *((f"{SELECT} --device {x}", None, f"--device {x} is unknown") for x in DEVICES),
    (SELECT + " --device cuda:99", None, "--device cuda:99 cannot be used"),
    *((f"{SELECT} {x} 0.1", None, x) for x in ("--discrad", "--disc")),
    (SELECT + " --pro 1 --method sft", None, "--pro .*--method toss"),
    *(
        (f"{SELECT} {x}", None, "--pro-train .*--pro T")
        for x in ("--pro-samples 3", "--pro-train top")
    ),
    (SELECT + " --shard", None, "start it with torchrun|needs PyTorch 2.7"),
    (SELECT + " --shard --merge", None, "without --shard"),
    *((f"{NAME}{name}", None, f"'{name}' is not a method's name") for name in NAMES),
    # Commands of the audit
    *((f"toss.audit.bench --out {{tmp}}/new {flag}", None, words) for flag, words in BENCH.items()),
    ("toss.audit.noise --run {tmp}/new", None, "new has no run.json"),
    ("toss.audit.noise --run {run}", gone("scores.safetensors"), "run score.py"),
]


@pytest.mark.parametrize(("line", "damage", "message"), TABLE)
def test_bad_input(line, damage, message, trained, base, files, tmp_path, capsys):
    if damage:
        damage(tmp_path)
    before = tree(trained)
    error = refused(capsys, line.format(run=trained, tmp=tmp_path, base=base, **files))
    assert re.search(message, error), error
    assert "\x1b" not in error and len(error) < 1100
    assert tree(trained) == before and not tree(tmp_path / "new")
