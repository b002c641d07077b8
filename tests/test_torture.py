"""A result is whole or absent, and carries its record, whatever ends the command that makes it.

Each command runs in a child process that dies right before its n-th write, gets a signal after its
n-th step, or finds the disk full. The same command is then run again and must leave the bytes of an
undisturbed run, and nothing besides. `make test` takes a sample of the places; with TOSS_TORTURE=1
(`make torture`) all of them are tried.
"""

import datetime
import errno
import os
import re
import resource
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import sources, tree
from helpers import call, refused, said, succeed
from stages import COMMANDS, child, on_each_step, on_step

from model import tokenizer
from toss.workbench import states
from toss.workbench.states import SavedState

ALL = bool(os.environ.get("TOSS_TORTURE"))
DIED = 99
OFTEN = " --save-every 1e-9"  # a state after every step
MERGED = "methods/toss-pro/model/merged"
RESULTS = ["degraded", "utility", "scores.safetensors", "methods/toss-pro", MERGED]


# Killed before a write


def die_before_write(n: int, line: str) -> int:
    """Run a command and end this process, as SIGKILL would, right before its n-th write.

    With n = 0 it ends by itself, and the number of writes goes to stderr.
    """
    changing = ("os.rename", "os.mkdir", "os.rmdir", "os.remove")
    writes = 0

    def count(event, arguments):
        nonlocal writes
        opened = event == "open" and arguments[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
        if opened or event in changing:
            writes += 1
            if writes == n:
                os._exit(DIED)

    sys.addaudithook(count)  # Python tells it of every call to the system
    status = call(line)
    if n == 0:
        print(writes, file=sys.stderr)
    return status


def part_of_result(content: dict, result: str) -> dict:
    """What belongs to a result: not what is written beside it, nor the merged checkpoint in it."""
    part = {}
    for name, data in content.items():
        inside = name == result or name.startswith(f"{result}/")
        merged = name.startswith(MERGED) and result != MERGED
        if inside and not merged and "/." not in name:
            part[name] = data
    return part


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_before_any_write_results_are_whole_and_the_command_finishes(name, stages):
    line = stages.begin(name)
    before = tree(stages.run)
    after = tree(stages.folder / name)
    status, errors = child(partial(die_before_write, 0, line + OFTEN))
    assert status == 0, errors
    writes = int(errors)
    assert writes > 20
    places = range(1, writes + 1)
    if not ALL:
        places = [writes // 3, 3 * writes // 4, writes - 5]
    for n in places:
        stages.begin(name)
        status, errors = child(partial(die_before_write, n, line + OFTEN))
        assert status == DIED, errors
        now = tree(stages.run)
        for result in RESULTS:
            whole = [{}, part_of_result(before, result), part_of_result(after, result)]
            assert part_of_result(now, result) in whole, (n, result)
        assert call(line) == 0, n
        assert stages.is_finished(name), n


# Stopped after a step


def stopped(line: str, n: int, number: signal.Signals) -> tuple[int, str]:
    """Run a command in a child that gets a signal after its n-th step, before that is saved."""

    def work():
        on_step(n, pytest.MonkeyPatch(), partial(signal.raise_signal, number))
        return call(line + OFTEN)

    return child(work)


def steps_of(line: str, monkeypatch) -> int:
    """Run a command that must succeed; how many steps of training and scoring it took."""
    steps = []
    with monkeypatch.context() as patch:
        on_each_step(patch, steps.append)
        succeed(line)
    return len(steps)


@pytest.mark.parametrize("name", ["train", "score", "select"])
def test_killed_after_any_step_only_that_step_is_made_again(name, stages, monkeypatch):
    """Finished parts, such as the rounds of TOSS-Pro, are not."""
    steps = steps_of(stages.begin(name), monkeypatch)
    assert steps >= 4
    for n in range(1, steps + 1, 1 if ALL else 4):
        line = stages.begin(name)
        status, errors = stopped(line, n, signal.SIGKILL)
        assert status == -signal.SIGKILL, errors
        assert steps_of(line, monkeypatch) == steps - (n - 1)
        assert stages.is_finished(name), n


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_command_with_one_line_and_the_command_goes_on(number, stages, capsys):
    line = stages.begin("score")
    status, errors = stopped(line, 3, number)
    assert status == 128 + number
    message = f"error: stopped by {number.name}; the same command goes on .*\n"
    assert re.fullmatch(message, errors)
    assert "scores-utility: goes on after token " in said(capsys, line)
    assert stages.is_finished("score")


def test_states_are_saved_by_time_and_at_the_end_of_each_part(stages, monkeypatch):
    """With steps of 50 seconds and --save-every 2: after every third step, and after the last."""
    steps = []
    saves = {}
    save = SavedState.save

    def noted(state, values, part):
        saves.setdefault(state.name, []).append(len(steps))
        save(state, values, part)

    monkeypatch.setattr(states, "time", SimpleNamespace(monotonic=lambda: 50 * len(steps)))
    monkeypatch.setattr(SavedState, "save", noted)
    on_each_step(monkeypatch, steps.append)
    succeed(stages.begin("train") + " --epochs 5")
    assert saves == {"degraded-float32": [3, 6, 9, 10], "utility-float32": [13, 16, 19, 20]}


def test_seconds_of_interrupted_work_add_up(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(states, "time", SimpleNamespace(monotonic=lambda: now))
    for earlier in (0, 30, 60):
        state = SavedState(tmp_path, "work", minutes=2)
        state.load(0)
        assert state.earlier_seconds == earlier
        now += 30
        state.save({}, 0)


def test_finished_work_forgets_its_own_states_alone(tmp_path):
    for name in ("work", "work-b"):
        SavedState(tmp_path, name, minutes=2).save({}, 0)
    SavedState(tmp_path, "work", minutes=2).remove()
    assert [file.name for file in tmp_path.iterdir()] == ["work-b-0.pt"]


class Tomorrow(datetime.date):
    @classmethod
    def today(cls):
        return datetime.date.today() + datetime.timedelta(days=1)


def test_an_unfinished_first_stage_keeps_its_day(place, files, monkeypatch, capsys):
    """A chat template may print the date. A command that goes on the next day has the old one."""
    turns = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    (place / "base/chat_template.jinja").write_text("{{ strftime_now('%d') }}" + turns)
    line = f"train.py --run {place}/new {sources(files, place / 'base')}"
    stopped(line, 2, signal.SIGKILL)
    monkeypatch.setattr(tokenizer, "datetime", SimpleNamespace(date=Tomorrow))
    assert "goes on after step 1" in said(capsys, line)


# States that do not belong to the work


def damage(file: Path, kind: str) -> None:
    """As after a power cut: full length and the same time, but all zeros; and the like."""
    stat = file.stat()
    data = bytearray(file.read_bytes())
    if kind == "lost":
        file.unlink()
        return
    if kind == "zeros":
        data = bytes(len(data))
    elif kind == "cut":
        data = data[: len(data) // 2]
    elif kind == "one bit":
        data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_damaged_state_or_one_of_another_part_is_not_used(stages, capsys):
    line = stages.begin("score")
    stopped(line, 7, signal.SIGKILL)
    degraded, utility = sorted((stages.run / ".state").rglob("*.pt"))
    shutil.copy(degraded, utility)
    damage(degraded, "one bit")
    output = said(capsys, line)
    assert output.count("is damaged and not used") == 2
    assert "goes on" not in output
    assert stages.is_finished("score")


def test_a_state_of_another_recipe_is_not_used(stages, capsys):
    line = stages.begin("score")
    stopped(line, 7, signal.SIGKILL)
    assert list((stages.run / ".state").rglob("*.pt"))
    assert "goes on" not in said(capsys, f"{line} --base")


def test_work_on_another_recipe_survives_a_command_that_only_skips(stages, capsys):
    again = stages.begin("score again")
    stopped(again, 7, signal.SIGKILL)
    assert "skipped" in said(capsys, f"score.py --run {stages.run}")
    assert "goes on" in said(capsys, again)


# Damaged results

KINDS = ["one bit", "zeros", "cut", "lost"]


@pytest.mark.parametrize(
    ("name", "result"), [("train", "degraded"), ("score", "."), ("select", "methods")]
)
def test_a_result_with_a_damaged_file_is_made_again(name, result, stages, capsys):
    line = stages.begin(name)
    succeed(line)
    pattern = "scores.safetensors" if name == "score" else "**/*.*"
    for i, file in enumerate(sorted((stages.run / result).glob(pattern))):
        for kind in KINDS if ALL else [KINDS[i % 4]]:
            if kind == "lost" and file.name in ("record.json", "scores.safetensors"):
                continue  # a folder without a record is another program's, and refused
            damage(file, kind)
            output = said(capsys, line)
            assert "merged" in file.parts or "so it is made again" in output, (file, kind)
            assert stages.is_finished(name), (file, kind)


def test_a_file_that_was_changed_in_place_is_hashed_again(stages, capsys):
    """run.json remembers hashes by the stat of a file; here size and date are as they were."""
    succeed(stages.begin("score"))
    damage(stages.run / "degraded/adapter_model.safetensors", "one bit")
    error = refused(capsys, f"select.py --run {stages.run}")
    assert "damaged or incomplete (adapter_model.safetensors was changed)" in error


# The disk


def test_a_result_is_on_the_disk_before_it_is_published(stages, monkeypatch):
    """Every file was flushed before the rename that puts it into its place, so was its folder."""
    flushed = set()
    published = set()
    fsync = os.fsync

    def noted(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def check(event, arguments):
        if event == "os.rename" and str(arguments[0]).endswith(".new"):
            source = Path(arguments[0])
            for part in [source, *source.rglob("*")]:
                assert part.stat().st_ino in flushed, part
            published.add(Path(arguments[1]).name)

    def work():
        sys.addaudithook(check)
        monkeypatch.setattr(os, "fsync", noted)
        succeed(line)
        assert stages.run.stat().st_ino in flushed  # the renames are on the disk, too
        assert published >= {"toss-pro", "merged", "toss-pro-float32-0.pt", "run.json"}
        return 0

    line = stages.begin("select")
    assert child(work) == (0, "")


def fill_disk(size: int, line: str) -> int:
    """Run a command while files may not grow beyond a size, as on a full disk or over a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return call(line)


@pytest.mark.parametrize("name", ["train again", "score again", "select again"])
def test_a_full_disk_is_one_line_and_the_next_try_works(name, stages):
    for size in (100, 2000, 9000) if ALL else (2000,):
        line = stages.begin(name)
        status, errors = child(partial(fill_disk, size, line))
        assert status == 1
        assert re.fullmatch(f"error: {stages.run}.* cannot be written.*\n", errors)
        assert stages.is_as_before(name)
        succeed(line)
        assert stages.is_finished(name)


def test_a_rename_that_fails_leaves_the_old_result(stages, monkeypatch, capsys):
    line = stages.begin("train again")
    rename = os.rename

    def fail_for_new(source, target, **options):
        if str(source).endswith(".degraded.new"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_for_new)
        assert "degraded: cannot be written" in refused(capsys, line)
    assert stages.is_as_before("train again")
    succeed(line)
    assert stages.is_finished("train again")
