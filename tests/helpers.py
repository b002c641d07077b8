"""What the tests of the method share beyond conftest.py: commands in this process, adapters."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, edit_json, edit_tensors, make_base, read_jsonl, script, tree

from model.io import remove, tensors_hash
from model.lora import Adapter, active, new_adapter, use
from toss.loss import token_log_probs
from toss.rows import read_rows
from toss.tokens import Tokens, collate, tokenise
from toss.workbench import flags
from toss.workbench.progress import Progress
from toss.workbench.records import print_once

TARGETS = ["q_proj", "v_proj", "down_proj"]
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
needs_shard = pytest.mark.skipif(VERSION < (2, 7), reason="--shard needs PyTorch 2.7")


# Commands


def call(line: str, fast: bool = True) -> int:
    """Run a line such as "select.py --run R" or "toss.audit.show R" in this process; its status."""
    name, *words = shlex.split(line)

    def main():
        return script(name.removesuffix(".py"), *words, fast=fast)

    print_once.cache_clear()  # a command is a process of its own
    try:
        status = flags.run(main)
    except SystemExit as stop:
        assert stop.code == 2, line  # the parser refused it
        return 2
    assert status != 2, line
    return status


def succeed(line: str, fast: bool = True) -> None:
    """Run a command that must succeed."""
    assert call(line, fast) == 0


def results_in(run: Path) -> dict:
    """All that is in a run, but for logs, locks and states."""
    content = tree(run)
    names = [name for name in content if not name.startswith((".state", "log"))]
    return {name: content[name] for name in names}


def said(capsys, line: str, fast: bool = True) -> str:
    """Run a command that must succeed; what it printed, stdout only."""
    capsys.readouterr()
    status = call(line, fast)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert not captured.err
    return captured.out


def refused(capsys, line: str, fast: bool = True) -> str:
    """Run a command that must fail with a single line on stderr; that line."""
    capsys.readouterr()
    status = call(line, fast)
    error = capsys.readouterr().err
    assert status == 1 + error.endswith("--help)\n"), line  # the parser's are 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert "\x1b" not in error
    assert len(error) < 1100
    return error


class Noted(Progress):
    """Notes the events of training and scoring, and saves each step if it is given a folder.

    act(event) is called before a step is saved, and may end the work.
    """

    def __init__(self, states: Path | None = None, act=None):
        super().__init__("work", states=states, minutes=0)
        self.events = []
        self.act = act

    def on_step(self, event):
        self.events.append(event)
        if self.act:
            self.act(event)


# Tokens, losses and adapters


def same_tensors(one: Path, two: Path) -> bool:
    """True if two safetensors files hold equal tensors; their headers may differ."""
    return tensors_hash(one) == tensors_hash(two)


def talk(*texts: str, system: str | None = None) -> list[dict]:
    """A conversation: the user and the assistant in turn, after a system message if given."""
    messages = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for i, text in enumerate(texts):
        role = "assistant" if i % 2 else "user"
        messages.append({"role": role, "content": text})
    return messages


def tokens_of(rows: list[dict], tokenizer, max_length: int = 512) -> Tokens:
    return tokenise(read_rows(rows), tokenizer, max_length, "rows")


def losses_by_hand(model, tokens: Tokens, row: int) -> torch.Tensor:
    """-log P of the response tokens of one row, from all its logits."""
    places = tokens.places([row])
    ids = tokens.input_ids[places].long()
    logits = model.lm_head(model(ids[None]))[0]
    losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return losses[tokens.response[places][1:]]


def micro_batch(model, rows: Tokens, group: list[int]) -> torch.Tensor:
    """Forward and backward of these rows, as in training; their losses."""
    adapter = active(use(model, active(model) or random_adapter(model)))
    for tensor in adapter.tensors():
        tensor.requires_grad_()
    log_p = token_log_probs(model, collate(rows, group, rows.response, model.device))
    log_p.sum().backward()
    return log_p.detach()


def random_adapter(model, seed: int = 0, targets=TARGETS, rank: int = 2, alpha=4) -> Adapter:
    """An adapter whose B is not 0: a new one would hide the gradient of A."""
    adapter = new_adapter(model, rank, alpha, targets, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, B in adapter.B.items():
        adapter.B[name] = 0.1 * torch.randn(B.shape, generator=generator)
    return adapter


def overflowing(folder: Path, layer: str) -> Path:
    """Write a base whose weights are finite in float16, but not the products with one of them."""
    file = make_base(folder) / "model.safetensors"

    def enlarge(weight):
        return (weight * 1e7).clamp(-6e4, 6e4)

    edit_tensors(file, f"model.layers.0.{layer}_proj.weight", enlarge)
    return folder


def cases(name: str) -> list[tuple[str, str]]:
    """The lines "change -> what the error says" of a text file beside the tests."""
    return [case for lines in paragraphs(name).values() for case in lines if case[0]]


def paragraphs(name: str) -> dict[str, list[tuple[str, str]]]:
    """Of each paragraph with such lines, by its first line, all; without an arrow: ("", line).

    A first line without an arrow is the paragraph's title and no case.
    """
    found = {}
    for paragraph in (ROOT / "tests" / name).read_text(encoding="utf-8").split("\n\n"):
        lines = paragraph.strip().splitlines()
        parts = [line.rpartition(" -> ") for line in lines]
        if not any(arrow for _, arrow, _ in parts):
            continue
        assert lines[0] not in found, "two paragraphs begin alike"
        if not parts[0][1]:
            parts = parts[1:]
        found[lines[0]] = [(command, words) for command, _, words in parts]
    return found


def each_line(name: str):
    """Decorator of a test of `case`, which is each line of a JSONL file beside the tests."""
    return pytest.mark.parametrize("case", read_jsonl(ROOT / "tests" / name), ids=str)


def session(cases: list[tuple[str, str]], folder: Path, capsys) -> None:
    """Run commands in a folder, and compare what each prints; see tests/sessions.txt."""
    places = {"tmp": folder, "goldens": ROOT / "tests/goldens"}
    for name in ("run", "theirs", "base"):
        places[name] = folder / name
    for name in ("harmful", "utility", "custom"):
        places[name] = folder / f"{name}.jsonl"
    for command, expected in cases:
        if not command:
            subprocess.run(shlex.split(expected.format(**places)), check=True)
            continue
        before = tree(folder)
        folders = ("new",)  # of a run that has nothing but a lock
        run = refused if expected.startswith("error:") else said
        output = run(capsys, command.format(**places), fast=False)
        assert re.search(expected, output, re.DOTALL), (command, output)
        changed = [name for name, _ in tree(folder).items() ^ before.items()]
        changed = [name for name in changed if ".state" not in name and name not in folders]
        if run == refused:
            assert not changed, command
        if "skipped" in expected:
            assert all(name.endswith("run.json") for name in changed), command


def spoil(folder: Path, case: dict) -> None:
    """Change a file of a folder as a line of tests/broken_*.jsonl says.

    "remove": true; "cut": the length that is left; "text": the new content; "fields": of its JSON;
    "tensor": one of its tensors, which becomes ones of a shape, or "nan", "-inf", or of a dtype.
    A field or a tensor that becomes "absent" is removed.
    """
    file = folder / case["file"]
    if "remove" in case:
        remove(file)
    elif "cut" in case:
        file.write_bytes(file.read_bytes()[: case["cut"]])
    elif "text" in case:
        file.write_text(case["text"], encoding="utf-8")
    elif "fields" in case:
        edit_json(file, **case["fields"])
    else:
        set_tensor(file, case["tensor"], case["becomes"])


def set_tensor(file: Path, name: str, becomes: str | list[int]) -> None:
    """Change a tensor of a safetensors file; see spoil."""

    def change(tensor):
        if becomes == "absent":
            return None
        if isinstance(becomes, list):
            return torch.ones(becomes)
        if becomes in ("nan", "-inf", "inf"):
            tensor.view(-1)[5] = float(becomes)
            return tensor
        return tensor.to(getattr(torch, becomes))

    edit_tensors(file, name, change)


def same_weights(one, two) -> bool:
    """True if two models have the same parameters."""
    ours = one.state_dict()
    theirs = two.state_dict()
    return ours.keys() == theirs.keys() and all(map(torch.equal, ours.values(), theirs.values()))
