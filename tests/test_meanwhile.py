"""Whatever happens beside a command, nothing wrong is accepted and no result is lost.

An input may change while a command runs, and several commands may run at once.
"""

import errno
import fcntl
import os
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import pytest
from conftest import sources, tree
from helpers import call, refused, said, succeed
from safetensors.torch import load_file
from stages import child, on_step

from model.io import made_from, save_tensors
from toss.workbench.records import held
from toss.workbench.run import Run

# An input that changes


def replace(file: Path, change: bool = True) -> None:
    """Put another valid file into the place of a file, or the same content again."""
    new = file.with_name("new")
    if not change:
        shutil.copy(file, new)
    elif file.suffix == ".safetensors":
        tensors = load_file(file)
        record = made_from(file)
        record.pop("sha256", None)
        name = max(name for name in tensors if tensors[name].is_floating_point())
        save_tensors({**tensors, name: tensors[name] + 1}, new, record)
    else:
        new.write_bytes(file.read_bytes() + b"\n")
    os.replace(new, file)


INPUTS = [
    ("train again", "harmful.jsonl"),
    ("train again", "base/config.json"),
    ("score again", "run/utility/adapter_model.safetensors"),
    ("select", "run/scores.safetensors"),
    ("select again", "run/methods/toss-pro/selection.safetensors"),
]


@pytest.mark.parametrize(("name", "file"), INPUTS)
def test_an_input_that_changes_while_a_command_runs_ends_it(
    name, file, stages, monkeypatch, capsys
):
    line = stages.begin(name)
    file = stages.folder / file
    data = file.read_bytes()
    try:
        with monkeypatch.context() as patch:
            on_step(2, patch, partial(replace, file))
            error = refused(capsys, line)
    finally:
        file.write_bytes(data)
    assert "was changed" in error
    assert stages.is_as_before(name)
    on_step(2, monkeypatch, partial(replace, file, change=False))  # the same content is fine
    succeed(line)
    assert stages.is_finished(name)


@pytest.mark.parametrize(
    "reader", ["toss.workbench.base.read_rows", "toss.audit.evaluate.read_rows"]
)
def test_rows_that_change_while_they_are_read_end_the_command(
    reader, trained, base, files, monkeypatch, capsys
):
    rows = Path(shutil.copy(files["harmful"], trained.with_name("rows.jsonl")))
    line = f"train.py --run {trained} --overwrite {sources({**files, 'harmful': rows}, base)}"
    if reader == "toss.audit.evaluate.read_rows":
        line = f"toss.audit.evaluate --run {trained} --harmful {rows} --methods base"
    before = tree(trained)
    read_rows = resolve_name(reader)

    def read_and_change(path, *arguments, **options):
        found = read_rows(path, *arguments, **options)
        if str(path) == str(rows):
            replace(rows)
        return found

    monkeypatch.setattr(reader, read_and_change)
    assert f"{rows} was changed while the command ran" in refused(capsys, line)
    assert tree(trained) == before


# The same result by two commands


def test_one_process_at_a_time_makes_a_result(stages, monkeypatch):
    """A second one that wants the same result, or another one in its place, ends with a line."""
    line = stages.begin("score again")
    outcomes = []

    def start_others():
        for flags in ("", f"--custom {stages.words['utility']}"):
            outcomes.append(child(partial(call, f"{line} {flags}")))

    on_step(2, monkeypatch, start_others)
    succeed(line)
    assert stages.is_finished("score again")
    assert len(outcomes) == 2
    for status, errors in outcomes:
        assert status == 1
        assert errors.startswith("error: another process is making this (it holds ")


def test_a_result_that_another_process_has_just_made_is_not_replaced(stages, monkeypatch, capsys):
    """Who comes second looks when it holds the place: it skips what is equal, or refuses."""
    line = stages.begin("score")
    hold = Run.holding
    others = [f"{line} --dtype bfloat16"]

    def finish_another_and_hold(run, result):
        if others:
            succeed(others.pop())
        return hold(run, result)

    monkeypatch.setattr(Run, "holding", finish_another_and_hold)
    assert "different: dtype)" in refused(capsys, line)
    others.append(stages.begin("score"))
    assert "inputs, skipped" in said(capsys, line)
    assert stages.is_finished("score")


# Different results by two commands


def test_a_command_waits_while_another_one_writes_run_json(trained):
    model = trained / "methods/sft/model"
    command = threading.Thread(target=call, args=[f"select.py --run {trained} --method sft"])
    before = (trained / "run.json").read_text()
    with held(trained / ".state/run.lock"):
        command.start()
        while not (trained / "methods/sft/selection.safetensors").exists():
            assert command.is_alive()
            time.sleep(0.05)
        command.join(timeout=0.5)
        assert command.is_alive()
        assert (trained / "run.json").read_text() == before
    command.join()
    assert model.exists()


def test_where_there_are_no_locks_a_warning_says_so(stages, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    line = stages.begin("score")
    assert said(capsys, line).count("warning: no locks here") >= 1
    assert stages.is_finished("score")
