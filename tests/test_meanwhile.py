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
from conftest import edit_json, sources, tree
from helpers import call, refused, said, succeed
from safetensors.torch import load_file
from stages import child, on_step

from model.io import InputError, made_from, read_json, save_tensors
from toss.workbench import results
from toss.workbench.results import held
from toss.workbench.run import Run
from toss.workbench.states import SavedState

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
    ("train again", "base/model.safetensors"),
    ("train again", "base/config.json"),
    ("score again", "custom.jsonl"),
    ("score again", "run/utility/adapter_model.safetensors"),
    ("select again", "harmful.jsonl"),
    ("select again", "run/scores.safetensors"),
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
    changed = file.parent if file.parent.name == "base" else file
    assert f"{changed} was changed while the command ran" in error
    assert stages.is_as_before(name)
    on_step(2, monkeypatch, partial(replace, file, change=False))  # the same content is fine
    succeed(line)
    assert stages.is_finished(name)


def test_an_input_that_changes_after_the_last_state_ends_the_command(stages, monkeypatch, capsys):
    line = stages.begin("score again")
    file = Path(stages.words["custom"])
    data = file.read_bytes()
    save = SavedState.save

    def save_and_change(state, values, part):
        save(state, values, part)
        if state.name.startswith("scores-base"):
            replace(file)

    monkeypatch.setattr(SavedState, "save", save_and_change)
    assert f"{file} was changed while the command ran" in refused(capsys, line)
    file.write_bytes(data)
    assert stages.is_as_before("score again")


def test_a_mask_that_changes_before_it_is_read_leaves_no_state(stages, monkeypatch, capsys):
    """A state of what the other mask gave would be in a folder that names this one."""
    stages.begin("select again")
    mask = Path(shutil.copy(stages.run / "methods/toss-pro/selection.safetensors", stages.folder))
    line = f"select.py --run {stages.run} --mask {mask} --name masked"
    read_mask = Run.mask

    def keep_all_and_read(run, path, tokens):
        record = made_from(mask)
        del record["sha256"]
        save_tensors({"keep": tokens.response.clone()}, mask, record)
        return read_mask(run, path, tokens)

    monkeypatch.setattr(Run, "mask", keep_all_and_read)
    assert f"{mask} was changed while the command ran" in refused(capsys, line)
    assert stages.is_as_before("select again")
    assert not list((stages.run / ".state").rglob("*.pt"))


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
        assert errors.startswith("error: scores is being made by another process (it holds ")


def test_who_only_reads_or_finds_a_result_does_not_wait_for_who_makes_it(trained, files, capsys):
    with held(trained / ".state/scores", trained):
        assert "skipped" in said(capsys, f"score.py --run {trained}")
        succeed(f"select.py --run {trained}")
    line = f"toss.audit.evaluate --run {trained} --utility {files['utility']} --methods base"
    with held(trained / ".state/evaluation-base", trained):
        error = refused(capsys, line)
        assert "evaluation-base is being made by another process" in error


def test_a_result_that_another_process_made_meanwhile_is_not_replaced(stages, monkeypatch, capsys):
    """It was made after this command looked, and before it held the place."""
    line = stages.begin("score")
    hold = Run.holding
    others = [f"{line} --base"]

    def finish_another_and_hold(run, folder):
        if others:
            succeed(others.pop())
        return hold(run, folder)

    monkeypatch.setattr(Run, "holding", finish_another_and_hold)
    assert "different: base)" in refused(capsys, line)
    others.append(line)
    shutil.rmtree(stages.run)
    line = stages.begin("score")
    assert "was made by another process meanwhile: run it again" in refused(capsys, line)
    assert stages.is_finished("score")


def test_a_place_that_was_removed_before_it_was_locked_does_not_count(tmp_path, monkeypatch):
    """Whoever held it removes it in the end; a third process may have made and locked it anew."""
    place = tmp_path / ".state/scores"
    lock = results.lock
    replaced = []

    def replace_and_lock(handle, folder, wait):
        if not replaced:
            replaced.append(folder)
            folder.rmdir()
            folder.mkdir()
        lock(handle, folder, wait)

    monkeypatch.setattr(results, "lock", replace_and_lock)
    with held(place, tmp_path):
        with pytest.raises(InputError, match="is being made by another process"):
            with held(place, tmp_path):
                pass


# Different results by two commands


def test_a_command_waits_while_another_one_writes_run_json_and_keeps_what_that_wrote(trained):
    file = trained / "run.json"
    method = "methods/sft"
    command = threading.Thread(target=call, args=[f"select.py --run {trained} --method sft"])
    with held(trained, trained):
        command.start()
        while not (trained / method / "record.json").exists():
            assert command.is_alive()
            time.sleep(0.05)
        command.join(timeout=0.5)
        assert command.is_alive()
        stages = {**read_json(file)["stages"], "methods/other": {}}
        inputs = {**read_json(file)["inputs"], "other.jsonl": "0"}
        edit_json(file, stages=stages, inputs=inputs)
    command.join()
    assert {method, "methods/other", "scores"} <= read_json(file)["stages"].keys()
    assert "other.jsonl" in read_json(file)["inputs"]


def test_where_there_are_no_locks_a_warning_says_so(stages, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    line = stages.begin("score")
    results.warn_once.cache_clear()
    assert said(capsys, line).count("warning: no locks here") == 1
    assert stages.is_finished("score")
