"""The code is part of what made a result: a fork that changes it is told.

A copy of the project is edited. The digests are taken of the copy; the first test also runs it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import call, results_in, said, succeed
from stages import on_step

from model import load_tokenizer
from toss.workbench import records
from toss.workbench.records import code_digest, code_digests, read_record

LOSS = ("toss/loss.py", "return -(weights * log_p).sum()", "return -(weights * log_p).sum() * 2")


def forget_digests() -> None:
    code_digest.cache_clear()


def edit(folder: Path, name: str, old: str, new: str) -> None:
    """Replace a text in a file of the copy."""
    file = folder / name
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    forget_digests()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the scripts, model/, toss/ and data/, of which the digests are taken."""
    folder = tmp_path / "project"
    skip = shutil.ignore_patterns("__pycache__", "*.svg", "base-small", "rows")
    for name in ("model", "toss", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("train.py", "score.py", "select.py"):
        shutil.copy(ROOT / name, folder / name)
    monkeypatch.setattr(records, "ROOT", folder)
    forget_digests()
    yield folder
    forget_digests()


def test_a_fork_that_edits_the_loss_is_told(project, trained):
    edit(project, *LOSS)
    command = [sys.executable, "score.py", "--run", str(trained)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    assert "scores.safetensors was made by other code (different: toss/loss.py)" in done.stdout
    assert done.returncode == 0
    assert not done.stderr


def test_a_file_of_ones_own_is_part_of_the_code(project):
    own = project / "toss/methods_of_mine.py"
    own.write_text("GAMMA = 2\n")
    before = code_digests("select.py")
    edit(project, "toss/methods_of_mine.py", "2", "3")
    after = code_digests("select.py")
    assert [part for part in after if after[part] != before[part]] == ["toss/methods_of_mine.py"]


def test_what_other_code_made_is_skipped_with_a_warning_or_made_again(project, trained, capsys):
    succeed(f"select.py --run {trained}")
    before = results_in(trained)
    edit(project, *LOSS)
    for line in ("train.py", "score.py", "select.py"):
        output = said(capsys, f"{line} --run {trained}")
        assert "inputs, skipped" in output
        assert "other code (different: toss/loss.py)" in output
    assert results_in(trained) == before

    # The references and the scores were made by the old loss, too: they fit, with a warning.
    output = said(capsys, f"select.py --run {trained} --overwrite")
    assert "methods/toss/model: wrote" in output
    assert f"{trained}/scores.safetensors was made by other code" in output

    # What was made again is skipped the next time, so that a killed command goes on.
    assert "inputs, skipped" in said(capsys, f"select.py --run {trained} --overwrite")
    assert said(capsys, f"train.py --run {trained} --overwrite").count(": wrote") == 2
    assert said(capsys, f"train.py --run {trained} --overwrite").count("inputs, skipped") == 2
    # The references have the same tensors, so the scores still fit them.
    assert "scores: wrote" in said(capsys, f"score.py --run {trained} --overwrite")


def test_comments_docstrings_and_layout_change_nothing(project, trained, capsys):
    succeed(f"select.py --run {trained} --method local")
    edit(project, "toss/loss.py", "    log_p = token", "    # A comment.\n\n    log_p = token")
    edit(project, "toss/training.py", '"""The paper\'s optimizer.', '"""Another docstring.')
    edit(
        project,
        "toss/selection.py",
        "def select_tokens(scores: Tensor, d: float) -> Tensor:",
        "def select_tokens(\n    scores: Tensor, d: float\n) -> Tensor:",
    )
    for line in ("train.py", "score.py", "select.py --method local"):
        output = said(capsys, f"{line} --run {trained}")
        assert "skipped" in output
        assert "other code" not in output, line


EDITS = [
    (*LOSS, "train.py score.py select.py"),
    ("toss/methods.py", "select_tokens(S_of_row,", "select_tokens(2 * S_of_row,", "select.py"),
    ("model/transformer.py", "eps=eps)", "eps=2 * eps)", "train.py score.py select.py"),
    ("train.py", 'make("degraded"', 'make("degraded", *()', "train.py"),
    ("score.py", "if args.base else", "if not args.base else", "score.py"),
    ("select.py", "keep[ranked] = select", "keep[~ranked] = select", "select.py"),
]


@pytest.mark.parametrize(("name", "old", "new", "scripts"), EDITS)
def test_a_change_of_what_computed_a_result_counts(
    name, old, new, scripts, project, trained, capsys
):
    succeed(f"select.py --run {trained} --method local")
    edit(project, name, old, new)
    for script in scripts.split():
        flags = "--method local" if script == "select.py" else ""
        output = said(capsys, f"{script} --run {trained} {flags}")
        assert f"other code (different: {name})" in output, script


def test_a_state_of_other_code_is_not_resumed(project, trained, monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    line = f"select.py --run {trained} --save-every 1e-9"
    with monkeypatch.context() as patch:
        on_step(3, patch, stop)
        assert call(line) == 130
    assert list((trained / ".state").rglob("*.pt"))
    edit(project, *LOSS)
    assert "goes on" not in said(capsys, line)


def test_what_is_edited_while_a_command_runs_is_not_the_code_that_runs(
    project, trained, monkeypatch
):
    original = read_record(trained / "scores.safetensors")["code"]
    file = project / "toss/scoring.py"
    text = file.read_text(encoding="utf-8")

    def edit_and_load(*arguments, **options):
        file.write_text(text.replace("CHECK_EVERY = 16", "CHECK_EVERY = 17"), encoding="utf-8")
        return load_tokenizer(*arguments, **options)

    # Right after the command line was read, before anything of the run is looked at.
    monkeypatch.setattr("toss.workbench.base.load_tokenizer", edit_and_load)
    succeed(f"score.py --run {trained} --dtype bfloat16 --overwrite")
    assert "CHECK_EVERY = 17" in file.read_text(encoding="utf-8")
    assert read_record(trained / "scores.safetensors")["code"] == original


SNIPPET = '''
import os
def decorated(function, *, depth: int = 0x10):
    """Of no matter."""
    return lambda x: f"{x!r:>{depth}} {x=}" f"{depth:,}" 'tail' "é"
class Plain:
    number = 1_000.50
    async def wait(self): return [y async for y in self if (z := y) is not None]
'''


def test_every_version_of_python_gives_the_same_digest(project):
    (project / "snippet.py").write_text(SNIPPET, encoding="utf-8")
    assert code_digest(project / "snippet.py") == "ce146ee64d42280d"
