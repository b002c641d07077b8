"""A result is whole or absent, and carries its record, whatever ends the command that makes it.

Each command runs in a child process that dies right before its n-th write, gets a signal after its
n-th step, or finds the disk full. The same command is then run again and must leave the bytes of an
undisturbed run, and nothing besides. `make test` takes a sample of the places; with TOSS_TORTURE=1
(`make torture`) all of them are tried.
"""

import errno
import os
import re
import resource
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tree
from helpers import call, refused, said, succeed
from stages import COMMANDS, child, on_each_step, on_step

from toss.workbench import progress
from toss.workbench.progress import Progress

ALL = bool(os.environ.get("TOSS_TORTURE"))
DIED = 99
OFTEN = " --save-every 1e-9"  # a state after every step
MERGED = "methods/toss-pro/model/merged"
PRO = "methods/toss-pro"
ROUND = f"{PRO}/round-1"
RESULTS = ["degraded", "utility", "scores.safetensors", f"{ROUND}/degraded"]
RESULTS += [f"{ROUND}/scores.safetensors", f"{PRO}/selection.safetensors", f"{PRO}/model", MERGED]


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


def test_ctrl_c_ends_a_command_with_one_line_and_the_command_goes_on(stages, capsys):
    line = stages.begin("score")
    status, errors = stopped(line, 3, signal.SIGINT)
    assert status == 130
    assert re.fullmatch("error: stopped; the same command goes on .*\n", errors)
    assert "scores-utility: token " in said(capsys, line)
    assert stages.is_finished("score")


def test_states_are_saved_by_time_and_at_the_end_of_each_part(stages, monkeypatch):
    """With steps of 50 seconds and --save-every 2: after every third step, and after the last."""
    steps = []
    saves = {}
    save = Progress.save

    def noted(work, values, part):
        saves.setdefault(work.name, []).append(len(steps))
        save(work, values, part)

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 50 * len(steps)))
    monkeypatch.setattr(Progress, "save", noted)
    on_each_step(monkeypatch, steps.append)
    succeed(stages.begin("train") + " --epochs 5")
    assert saves == {"degraded": [3, 6, 9, 10], "utility": [13, 16, 19, 20]}


# States that do not belong to the work


def test_a_state_of_another_recipe_is_not_used(stages, capsys):
    line = stages.begin("score")
    stopped(line, 7, signal.SIGKILL)
    assert list((stages.run / ".state").rglob("*.pt"))
    assert "goes on" not in said(capsys, f"{line} --dtype bfloat16")


def test_work_on_another_recipe_survives_a_command_that_only_skips(stages, capsys):
    again = stages.begin("score again")
    stopped(again, 7, signal.SIGKILL)
    assert "skipped" in said(capsys, f"score.py --run {stages.run}")
    assert "goes on" in said(capsys, again)


# Damaged results

DAMAGES = [
    ("train", "degraded/adapter_model.safetensors", "one bit"),
    ("train", "degraded/adapter_config.json", "lost"),
    ("train", "degraded/README.md", "cut"),
    ("train", "degraded/record.json", "zeros"),
    ("score", "scores.safetensors", "one bit"),
    ("score", "scores.safetensors", "cut"),
    ("select", f"{PRO}/selection.safetensors", "zeros"),
    ("select", f"{ROUND}/degraded/adapter_config.json", "cut"),
    ("select", f"{ROUND}/scores.safetensors", "one bit"),
]


@pytest.mark.parametrize(("name", "damaged", "kind"), DAMAGES)
def test_a_result_with_a_damaged_file_is_made_again_with_overwrite(
    name, damaged, kind, stages, capsys
):
    """As after a power cut: full length and the same time, but all zeros; and the like."""
    line = stages.begin(name)
    succeed(line)
    file = stages.run / damaged
    stat = file.stat()
    data = file.read_bytes()
    if kind == "one bit":
        data = data[:-1] + bytes([data[-1] ^ 1])
    elif kind == "zeros":
        data = bytes(len(data))
    else:
        data = data[: len(data) // 2]
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if kind == "lost":
        file.unlink()
    assert "(different: " in refused(capsys, line)
    succeed(f"{line} --overwrite")
    assert stages.is_finished(name)


def test_a_merged_checkpoint_that_was_damaged_is_made_again(stages):
    line = stages.begin("select")
    succeed(line)
    (stages.run / MERGED / "tokenizer.json").write_text("{}")
    succeed(line)
    assert stages.is_finished("select")


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
        assert published >= {"model", "merged", "toss-pro-0.pt", "run.json", "scores.safetensors"}
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
    replace = os.replace

    def fail_for_new(source, target, **options):
        if str(source).endswith(".degraded.new"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_for_new)
        assert "degraded: cannot be written" in refused(capsys, line)
    assert stages.is_as_before("train again")
    succeed(line)
    assert stages.is_finished("train again")
