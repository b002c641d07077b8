"""The code is part of what made a result: a fork that changes it is told.

A copy of the project is edited. Most tests let the digests be taken of the copy; the first runs it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl, tree
from helpers import call, said

from toss.audit.command import cautions
from toss.workbench import code
from toss.workbench.results import read_record

LOSS = ("toss/loss.py", "return -(weights * log_p).sum()", "return -(weights * log_p).sum() * 2")


def edit(folder: Path, name: str, old: str, new: str) -> None:
    """Replace a text in a file of the copy, and forget the digests."""
    file = folder / name
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    code.digest.cache_clear()
    code.parsed.cache_clear()


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the scripts, model/ and toss/."""
    folder = tmp_path / "project"
    for name in ("model", "toss", "data"):
        skip = shutil.ignore_patterns("__pycache__", "*.svg", "base-small", "rows")
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("train.py", "score.py", "select.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def project(copy, monkeypatch):
    """The same; the digests are taken of it until the test ends."""
    monkeypatch.setattr(code, "ROOT", copy)
    code.digest.cache_clear()
    code.parsed.cache_clear()
    yield copy
    code.digest.cache_clear()
    code.parsed.cache_clear()


def test_a_fork_that_edits_the_loss_is_told(copy, trained):
    assert call(f"select.py --run {trained}") == 0
    edit(copy, *LOSS)
    command = [sys.executable, "select.py", "--run", str(trained)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "equal settings and inputs, skipped" in done.stdout
    warning = "methods/toss was made by other code (different: toss/loss.py): --overwrite makes"
    assert warning in done.stdout


def test_overwrite_makes_again_what_other_code_made_and_skips_the_rest(project, trained, capsys):
    assert call(f"select.py --run {trained}") == 0
    before = tree(trained)
    edit(project, *LOSS)
    out = said(capsys, f"select.py --run {trained}")
    assert "skipped" in out and "other code (different: toss/loss.py)" in out
    assert tree(trained) == before

    # The references and the scores were made by the old loss, too: they fit, with a warning.
    out = said(capsys, f"select.py --run {trained} --overwrite")
    assert "methods/toss: wrote" in out
    assert f"{trained}/scores.safetensors was made by other code" in out
    out = said(capsys, f"select.py --run {trained} --overwrite")
    assert "methods/toss: " in out and "inputs, skipped" in out

    # What is remade by --overwrite is skipped the next time, so that a killed one goes on.
    assert said(capsys, f"train.py --run {trained} --overwrite").count(": wrote") == 2
    assert said(capsys, f"train.py --run {trained} --overwrite").count("inputs, skipped") == 2
    # The references have the same tensors, so the scores still fit them.
    assert "scores: wrote" in said(capsys, f"score.py --run {trained} --overwrite")


def test_comments_docstrings_layout_and_a_new_method_change_nothing(project, trained, capsys):
    assert call(f"select.py --run {trained} --method local") == 0
    edit(project, "toss/loss.py", "    log_p = token", "    # A comment.\n\n    log_p = token")
    edit(project, "toss/training.py", '"""The paper\'s optimizer.', '"""Another docstring.')
    edit(
        project,
        "toss/selection.py",
        "def select_tokens(scores: Tensor, d: float) -> Tensor:",
        "def select_tokens(\n    scores: Tensor, d: float\n) -> Tensor:",
    )
    new = "def brandnew(c: Candidates) -> Choice:\n    return top(c.S(), c)\n\n\nMETHODS = {\n"
    edit(project, "toss/methods.py", "METHODS = {\n", new + '    "brandnew": brandnew,\n')
    edit(project, "toss/config.py", "base weighted oracle", "base weighted oracle brandnew")
    edit(project, "toss/methods.py", "return c.position() >= 5", "return c.position() >= 6")
    for line in ("train.py", "score.py", "select.py --method local"):
        out = said(capsys, f"{line} --run {trained}")
        assert "skipped" in out and "other code" not in out, line
    edit(project, "toss/methods.py", "select_tokens(S_of_row,", "select_tokens(2 * S_of_row,")
    out = said(capsys, f"select.py --method local --run {trained}")
    assert "other code (different: toss/methods.py:local)" in out


def test_a_state_of_other_code_is_not_resumed(project, trained, monkeypatch, capsys):
    from toss.training import Gradient

    compute = Gradient.compute

    def stopping(self, rows, step, budget):
        if step == 3:
            raise KeyboardInterrupt
        return compute(self, rows, step, budget)

    line = f"select.py --run {trained} --save-every 1e-9"
    monkeypatch.setattr(Gradient, "compute", stopping)
    assert call(line) == 130
    monkeypatch.setattr(Gradient, "compute", compute)
    assert list((trained / ".state").rglob("*.pt"))
    edit(project, *LOSS)
    assert "goes on" not in said(capsys, line)
    assert [entry["step"] for entry in read_jsonl(trained / "log/toss.jsonl")] == [1, 2, 3]
    assert not (trained / ".state").exists()


def test_methods_made_by_different_code_are_marked_where_they_stand_side_by_side(
    project, trained, files, capsys
):
    assert call(f"select.py --run {trained} --method sft") == 0
    edit(project, *LOSS)
    assert call(f"select.py --run {trained}") == 0
    caution = "toss was made by other code than sft (different: toss/loss.py)"
    sets = f"--benign {files['utility']} --utility {files['utility']} --max-new-tokens 2"
    assert caution in said(capsys, f"toss.audit.evaluate --run {trained} {sets}")
    assert caution in said(capsys, f"toss.audit.compare --run {trained}")
    assert call(f"toss.audit.report --run {trained}") == 0
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "toss was made by other code than sft" in page
    records = {name: read_record(trained / "methods" / name) for name in ("sft", "toss")}
    assert cautions({"sft": records["sft"]}, {"sft": {}}) == []


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
    assert code.digest("snippet.py") == "8f4e19aa484fba78"


def test_digests_are_taken_when_the_command_starts(project, trained, capsys, monkeypatch):
    """What is edited while a command runs is not the code that runs."""
    original = dict(code.digests(code.PARTS["scores"]))
    file = project / "toss/scoring.py"
    file.write_text(file.read_text().replace("CHECKED = 16", "CHECKED = 17"))  # no cache is cleared
    assert "scores: wrote" in said(capsys, f"score.py --run {trained} --base --overwrite")
    assert read_record(trained / "scores.safetensors")["code"] == original
