"""What the tests of the method share beyond conftest.py: commands in this process, adapters."""

import shlex
from pathlib import Path

import torch
from conftest import script
from safetensors.torch import load_file

from model.lora import Adapter, active, new_adapter, use
from toss import cli
from toss.loss import token_log_probs
from toss.rows import read_rows
from toss.tokens import Tokens, collate, tokenise

TARGETS = ["q_proj", "v_proj", "down_proj"]


def call(line: str, fast: bool = True) -> int:
    """Run a command line such as "select.py --run R" in this process; its exit status."""
    name, *argv = shlex.split(line)
    try:
        return cli.run(lambda: script(name.removesuffix(".py"), *argv, fast=fast))
    except SystemExit as stop:
        return stop.code


def said(capsys, line: str) -> str:
    """Run a command that must succeed; what it printed, stdout only."""
    capsys.readouterr()
    status, (out, err) = call(line), capsys.readouterr()
    assert status == 0 and not err, err
    return out


def refused(capsys, line: str, fast: bool = True) -> str:
    """Run a command that must fail with a single line on stderr; that line."""
    capsys.readouterr()
    status, err = call(line, fast), capsys.readouterr().err
    assert status != 0 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def same_tensors(one: Path, two: Path) -> bool:
    """True if two safetensors files hold equal tensors; their headers may differ."""
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tokens_of(rows: list[dict], tokenizer, max_length: int = 512) -> Tokens:
    return tokenise(read_rows(rows), tokenizer, max_length, "rows")


def micro_batch(model, rows: Tokens, group: list[int]) -> torch.Tensor:
    """Forward and backward of these rows, as in training; their losses."""
    adapter = active(use(model, active(model) or random_adapter(model)))
    for tensor in adapter.tensors():
        tensor.requires_grad_()
    log_p, _ = token_log_probs(model, collate(rows, group, rows.response, model.device))
    log_p.sum().backward()
    return log_p.detach()


def random_adapter(model, seed: int = 0) -> Adapter:
    """An adapter whose B is not 0: a new one would hide the gradient of A."""
    adapter = new_adapter(model, 2, 4, TARGETS, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, B in adapter.B.items():
        adapter.B[name] = 0.1 * torch.randn(B.shape, generator=generator)
    return adapter
