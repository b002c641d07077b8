"""A result is whole or absent, and carries its record, whatever happens while it is made.

Each command runs in a child process that dies right before its n-th write, gets a signal after its
n-th step, or finds the disk full. The same command is then run again and must leave the bytes of an
undisturbed run, and nothing besides. `make test` takes a sample of the places; with TOSS_TORTURE=1
(`make torture`) all of them are tried.
"""

import builtins
import datetime
import errno
import fcntl
import io
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
from conftest import FAST, edit_json, write_files
from conftest import run as run_python
from helpers import call, refused, said
from safetensors.torch import load_file

from model import tokenizer
from model.io import made_from, read_json, save_tensors
from toss.workbench import code, results, states
from toss.workbench.progress import Bar
from toss.workbench.results import held, read_record
from toss.workbench.run import Run
from toss.workbench.states import SavedState

ALL = bool(os.environ.get("TOSS_TORTURE"))
DIED = 99
REFERENCES = "--model {base} --harmful {harmful} --utility {utility}"
PRO = "select.py --run {run} --pro 1 --pro-samples 2 --merge --batch-tokens 128"
COMMANDS = {  # each from what the ones before it have made
    "train": "train.py --run {run} " + REFERENCES,
    "train again": "train.py --run {run} " + REFERENCES + " --overwrite --seed 1",
    "score": "score.py --run {run} --custom {custom} --batch-tokens 128",
    "score again": "score.py --run {run} --base --overwrite --batch-tokens 128",
    "select": PRO,
    "select again": PRO + " --overwrite --seed 1",
}
EARLIER = {
    "train": [],
    "train again": ["train"],
    "score": ["train"],
    "score again": ["train", "score"],
    "select": ["train", "score"],
    "select again": ["train", "score", "select"],
}
MERGED = "methods/toss-pro/model/merged/"
RESULTS = ["degraded/", "utility/", "scores.safetensors", "methods/toss-pro/", MERGED]
OFTEN = " --save-every 1e-9"  # a state after every step
Snapshot = dict[str, bytes | None]


def snapshot(folder: Path) -> Snapshot:
    """All that is below a folder: the content of files, None for folders."""
    content = {}
    for path in sorted(folder.rglob("*")):
        content[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return content


def outcome(run: Path) -> Snapshot:
    """What a command leaves, but for run.json, which holds times; its recipes are the records'."""
    for stage, entry in read_json(run / "run.json")["stages"].items():
        record = read_record(run / ("scores.safetensors" if stage == "scores" else stage))
        assert record.items() >= entry["recipe"].items(), stage
    content = snapshot(run)
    del content["run.json"]
    return content


def without_work(content: Snapshot) -> Snapshot:
    """A snapshot without the logs and states of unfinished work, which a failure may leave."""
    kept = {}
    for name, data in content.items():
        if name.split("/")[0] not in ("log", ".state"):
            kept[name] = data
    return kept


@dataclass
class Bench:
    """Where the commands run."""

    folder: Path
    words: dict[str, str]  # that stand in commands: {run}, {base}, {custom} ...
    after: dict[str, Snapshot]  # by command: what it leaves if nothing disturbs it

    def begin(self, name: str) -> tuple[Path, str]:
        """Put the run as it is before a command into its place; returns it, and the command."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        if EARLIER[name]:
            shutil.copytree(self.folder / name, run)
        return run, self.line(name)

    def before(self, name: str) -> Snapshot:
        return snapshot(self.folder / name)

    def line(self, name: str) -> str:
        return COMMANDS[name].format(**self.words)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, base) -> Bench:
    folder = tmp_path_factory.mktemp("torture")
    words = write_files(folder)
    words["base"] = str(shutil.copytree(base, folder / "base"))
    words["run"] = str(folder / "run")
    bench = Bench(folder, words, {})
    for name, earlier in EARLIER.items():
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        for step in earlier:
            assert call(bench.line(step)) == 0
        if earlier:
            shutil.copytree(run, folder / name)
        assert call(bench.line(name)) == 0
        bench.after[name] = outcome(run)
    return bench


def child(work) -> tuple[int, str, str]:
    """Run work() in a forked process; its exit status, and what it wrote to stdout and stderr."""
    sys.stdout.flush()
    read_out, write_out = os.pipe()
    read_err, write_err = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):  # in the background, some are ignored
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout = open(write_out, "w")
            sys.stderr = open(write_err, "w")
            status = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(write_out)
    os.close(write_err)
    with open(read_out) as out, open(read_err) as err:
        output = out.read()
        errors = err.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output, errors


# Killed before a write


def is_write(name: str, arguments: tuple, options: dict) -> bool:
    """True if a call of this function changes something on the disk."""
    if name == "os.open":
        return bool(arguments[1] & (os.O_CREAT | os.O_TRUNC))
    if name == "io.open":
        mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r")
        return not set(mode).isdisjoint("wax+")
    return True


def die_before_write(n: int, line: str) -> int:
    """Run a command and end this process, as SIGKILL would, right before its n-th write."""
    writes = 0

    def counted(name, function):
        def wrapper(*arguments, **options):
            nonlocal writes
            if is_write(name, arguments, options):
                writes += 1
                if writes == n:
                    os._exit(DIED)
            return function(*arguments, **options)

        return wrapper

    for name in ("replace", "rename", "mkdir", "rmdir", "unlink", "fsync", "open"):
        setattr(os, name, counted(f"os.{name}", getattr(os, name)))
    io.open = counted("io.open", io.open)
    builtins.open = io.open
    return call(line)


def of_result(content: Snapshot, prefix: str) -> Snapshot:
    """What belongs to a result: not what is being written beside it, nor a merged checkpoint."""
    own = {}
    for name, data in content.items():
        merged = name.startswith(MERGED.rstrip("/"))
        if name.startswith(prefix) and "/." not in name and merged == (prefix == MERGED):
            own[name] = data
    return own


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_before_any_write_results_are_whole_and_the_command_finishes(name, bench):
    before = bench.before(name)
    after = bench.after[name]
    n = 1
    while True:
        run, line = bench.begin(name)
        status, _, err = child(partial(die_before_write, n, line + OFTEN))
        if status == 0:
            break
        assert status == DIED, err
        now = snapshot(run)
        for prefix in RESULTS:
            whole = ({}, of_result(before, prefix), of_result(after, prefix))
            assert of_result(now, prefix) in whole, (n, prefix)
        assert call(line) == 0, n
        assert outcome(run) == after, n
        n += 1 if ALL else 23
    assert n > 20  # a command writes many times


# Stopped after a step


def stopped(line: str, n: int, number: signal.Signals) -> tuple[int, str, str]:
    """Run a command in a child that gets a signal after its n-th step, before that is saved."""
    saves = 0
    save = SavedState.save

    def stop_or_save(state, values, part):
        nonlocal saves
        saves += 1
        if saves == n:
            os.kill(os.getpid(), number)
        save(state, values, part)

    def work():
        SavedState.save = stop_or_save
        return call(line + OFTEN)

    return child(work)


def steps_of(line: str, monkeypatch) -> list[tuple[str, int, int]]:
    """Run a command; the part, the step and the number of steps of every step."""
    steps = []
    show = Bar.show

    def wrapper(bar, event):
        if "step" in event:
            steps.append((bar.name, event["step"], event["steps"]))
        show(bar, event)

    with monkeypatch.context() as patch:
        patch.setattr(Bar, "show", wrapper)
        assert call(line) == 0
    return steps


@pytest.mark.parametrize("name", ["train", "score", "select"])
def test_killed_after_any_step_the_command_goes_on_from_what_was_saved(
    name, bench, monkeypatch, capsys
):
    steps = steps_of(bench.begin(name)[1], monkeypatch)
    assert len(steps) >= 4
    for n in range(1, len(steps) + 1, 1 if ALL else 3):
        run, line = bench.begin(name)
        status, _, err = stopped(line, n, signal.SIGKILL)
        assert status == -signal.SIGKILL, err
        output = said(capsys, line)
        last = {part: (step, of) for part, step, of in steps[: n - 1]}  # of parts with a state
        for part, (step, of) in last.items():
            if part == "degraded" and "utility" in last | {steps[n - 1][0]: ()}:
                assert "degraded exists with equal settings and inputs, skipped" in output
            else:
                assert re.search(rf"^{part}: goes on after \w+ {step} of {of}$", output, re.M), n
        assert output.count("goes on after") <= len(last)
        assert outcome(run) == bench.after[name], n


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("name", ["train", "score", "select"])
def test_a_signal_ends_a_command_with_one_line_and_the_command_goes_on(name, number, bench, capsys):
    for n in range(1, 99) if ALL else [3]:
        run, line = bench.begin(name)
        status, _, err = stopped(line, n, number)
        if status == 0:
            break
        assert status == 128 + number
        assert err.startswith(f"error: stopped by {number.name}; "), err
        assert err.count("\n") == 1, err
        output = said(capsys, line)
        assert n == 1 or "goes on after" in output or "skipped" in output
        assert outcome(run) == bench.after[name], n
    assert n >= 3


def test_states_are_saved_by_time_and_at_the_end_of_each_part(bench, monkeypatch):
    """With steps of 50 seconds and --save-every 2: after every third step, and after the last."""
    now = 0.0
    steps = Counter()
    saves = {}
    show = Bar.show
    save = SavedState.save

    def slow(bar, event):
        nonlocal now
        now += 50
        steps[bar.name] += 1
        show(bar, event)

    def noted(state, values, part):
        name = state.name.removesuffix("-float32")
        saves.setdefault(name, []).append(steps[name])
        save(state, values, part)

    monkeypatch.setattr(states, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Bar, "show", slow)
    monkeypatch.setattr(SavedState, "save", noted)
    assert call(bench.begin("train")[1] + " --epochs 5") == 0
    assert saves == {"degraded": [3, 6, 9, 10], "utility": [3, 6, 9, 10]}
    saves.clear()
    assert call(bench.begin("score")[1]) == 0
    assert saves == {"scores-utility": [3, 5], "scores-degraded": [3, 5]}
    saves.clear()
    assert call(bench.begin("select")[1] + " --save-every 0.5") == 0
    assert saves == {
        "toss-pro-round-1": [1, 2],
        "toss-pro-round-1-scores": [1, 2, 3, 4, 5],
        "toss-pro": [1, 2, 3],
    }


def test_an_unfinished_first_stage_keeps_its_day(bench, tmp_path, monkeypatch, capsys):
    dated = Path(shutil.copytree(bench.words["base"], tmp_path / "dated"))
    turns = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    (dated / "chat_template.jinja").write_text("{{ strftime_now('%d') }}" + turns)
    words = {**bench.words, "base": dated, "run": tmp_path / "run"}
    line = COMMANDS["train"].format(**words)

    class Day(datetime.date):
        day_now = 1

        @classmethod
        def today(cls):
            return datetime.date(2030, 1, cls.day_now)

    monkeypatch.setattr(tokenizer, "datetime", SimpleNamespace(date=Day))
    stopped(line, 2, signal.SIGKILL)
    Day.day_now = 2
    assert "goes on after step 1" in said(capsys, line)
    assert read_json(tmp_path / "run/run.json")["settings"]["date"] == "2030-01-01"
    assert read_record(tmp_path / "run/degraded")["date"] == "2030-01-01"


# States that are another's


@pytest.mark.parametrize("other", ["recipe", "code", "changed", "cut", "empty"])
def test_a_state_of_another_recipe_or_code_or_a_damaged_one_is_not_used(
    other, bench, monkeypatch, capsys
):
    run, line = bench.begin("score")
    stopped(line, 7, signal.SIGKILL)
    files = list((run / ".state").rglob("*.pt"))
    assert len(files) == 2
    if other == "recipe":
        line += " --base"
    if other == "code":
        monkeypatch.setattr(code, "digest", lambda part: "another")
    for file in files:
        data = bytearray(file.read_bytes())
        if other == "changed":
            data[-100] ^= 1
        if other == "cut":
            del data[-100:]
        if other == "empty":
            data.clear()
        file.write_bytes(data)
    output = said(capsys, line)
    assert "goes on after" not in output
    assert output.count("is damaged and not used") == (0 if other in ("recipe", "code") else 2)
    if other not in ("recipe", "code"):
        assert outcome(run) == bench.after["score"]


def test_work_on_another_recipe_survives_a_command_that_only_skips(bench, capsys):
    run, other = bench.begin("select again")
    stopped(other, 5, signal.SIGKILL)
    before = snapshot(run)
    assert "equal settings and inputs, skipped" in said(capsys, bench.line("select"))
    assert snapshot(run) == before
    assert "goes on after" in said(capsys, other)
    assert outcome(run) == bench.after["select again"]


# What happens while a command runs


def acting(n: int, act):
    """In place of Bar.show: calls act() after the n-th step of any part, before it is saved."""
    show = Bar.show
    steps = 0

    def wrapper(bar, event):
        nonlocal steps
        steps += "step" in event
        if "step" in event and steps == n:
            act()
        show(bar, event)

    return wrapper


def change(file: Path) -> None:
    """Put another valid file into the place of a file."""
    new = file.with_name("changed")
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        record = made_from(file)
        record.pop("sha256", None)
        name = max(name for name in tensors if tensors[name].is_floating_point())
        tensors[name] = tensors[name] + 1
        save_tensors(tensors, new, record)
    else:
        new.write_bytes(file.read_bytes() + b"\n")
    os.replace(new, file)


def touch(file: Path) -> None:
    """Write the same content again, with another time."""
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    os.utime(file, (0, 0))


CHANGING = [
    ("train again", "harmful.jsonl"),
    ("train again", "base/model.safetensors"),
    ("train again", "base/config.json"),
    ("score again", "custom.jsonl"),
    ("score again", "run/utility/adapter_model.safetensors"),
    ("select again", "harmful.jsonl"),
    ("select again", "run/scores.safetensors"),
]


@pytest.mark.parametrize(("name", "file"), CHANGING)
def test_an_input_that_changes_while_a_command_runs_ends_it(name, file, bench, monkeypatch, capsys):
    run, line = bench.begin(name)
    before = snapshot(run)
    file = bench.folder / file
    data = file.read_bytes()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Bar, "show", acting(2, lambda: change(file)))
            error = refused(capsys, line)
    finally:
        file.write_bytes(data)
    assert f"{file} was changed while the command ran" in error
    assert without_work(snapshot(run)) == without_work(before)
    assert call(line) == 0
    assert outcome(run) == bench.after[name]


@pytest.mark.parametrize(("name", "file"), CHANGING)
def test_an_input_that_is_written_again_with_equal_content_is_fine(name, file, bench, monkeypatch):
    run, line = bench.begin(name)
    monkeypatch.setattr(Bar, "show", acting(2, lambda: touch(bench.folder / file)))
    assert call(line) == 0
    assert outcome(run) == bench.after[name]


def test_an_input_that_changes_after_the_last_state_ends_the_command(bench, monkeypatch, capsys):
    run, line = bench.begin("score again")
    before = snapshot(run)
    file = Path(bench.words["custom"])
    data = file.read_bytes()
    save = SavedState.save

    def save_and_change(state, values, part):
        save(state, values, part)
        if state.name.startswith("scores-base"):
            change(file)

    with monkeypatch.context() as patch:
        patch.setattr(SavedState, "save", save_and_change)
        assert f"{file} was changed while the command ran" in refused(capsys, line)
    file.write_bytes(data)
    assert without_work(snapshot(run)) == without_work(before)


def test_a_mask_that_changes_before_it_is_read_ends_the_command_and_leaves_no_state(
    bench, monkeypatch, capsys
):
    run, _ = bench.begin("select again")
    mask = Path(shutil.copy(run / "methods/toss-pro/selection.safetensors", bench.folder))
    line = f"select.py --run {run} --mask {mask} --name masked"
    assert call(line) == 0
    undisturbed = outcome(run)
    shutil.rmtree(run / "methods/masked")
    before = snapshot(run)
    data = mask.read_bytes()
    read_mask = Run.mask

    def keep_all_and_read(self, tokens):
        tensors = load_file(mask)
        tensors["keep"] = tokens.response.clone()
        record = made_from(mask)
        record.pop("sha256")
        save_tensors(tensors, mask, record)
        return read_mask(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "mask", keep_all_and_read)
        assert f"{mask} was changed while the command ran" in refused(capsys, line)
    assert without_work(snapshot(run)) == without_work(before)
    mask.write_bytes(data)
    assert call(line) == 0
    assert outcome(run) == undisturbed  # not from a state of the other mask


@pytest.mark.parametrize("reader", ["toss.workbench.base.read_rows", "toss.rows.read_rows"])
def test_rows_that_change_while_they_are_read_end_the_command(reader, bench, monkeypatch, capsys):
    run, _ = bench.begin("train again")
    rows = bench.folder / "rows.jsonl"
    shutil.copy(bench.words["harmful"], rows)
    line = f"train.py --run {run}/new --model {{base}} --harmful {rows} --utility {{utility}}"
    if reader == "toss.rows.read_rows":
        line = f"toss.audit.evaluate --run {run} --harmful {rows} --methods base"
    before = snapshot(run)
    read = resolve_name(reader)

    def read_and_change(path, *arguments, **options):
        found = read(path, *arguments, **options)
        if str(path) == str(rows):
            change(rows)
        return found

    monkeypatch.setattr(reader, read_and_change)
    error = refused(capsys, line.format(**bench.words))
    assert f"{rows} was changed while the command ran" in error
    assert snapshot(run) == before


# Two at once


def test_one_process_at_a_time_makes_a_result(bench, capsys):
    run, line = bench.begin("score again")
    rows = bench.words["utility"]
    evaluate = f"toss.audit.evaluate --run {run} --max-new-tokens 1 --utility {rows} --methods base"
    with held(run / ".state/scores", run):
        before = snapshot(run)
        for command in (line, f"score.py --run {run} --overwrite --custom {rows}"):
            error = refused(capsys, command)
            assert (
                f"scores is being made by another process (it holds {run}/.state/scores)" in error
            )
        assert snapshot(run) == before
        assert "skipped" in said(capsys, f"score.py --run {run}")  # nothing to make
        assert call(f"select.py --run {run}") == 0  # it only reads
    with held(run / ".state/evaluation-base", run):
        assert "evaluation-base is being made by another process" in refused(capsys, evaluate)
    assert call(line) == 0
    assert not (run / ".state").exists()


def test_a_second_process_that_makes_the_same_result_is_refused(bench, monkeypatch):
    run, line = bench.begin("score")
    seconds = []

    def start_second():
        seconds.append(run_python(*line.split()))

    monkeypatch.setattr(Bar, "show", acting(2, start_second))
    assert call(line) == 0
    (second,) = seconds
    assert second.returncode == 1
    assert second.stderr.startswith("error: scores is being made by another process")
    assert second.stderr.count("\n") == 1
    assert outcome(run) == bench.after["score"]


def test_two_methods_side_by_side_both_stand_in_run_json(bench, monkeypatch):
    run, _ = bench.begin("select")
    others = []

    def start_other():
        others.append(run_python("select.py", "--run", run, "--method", "sft", *FAST))

    monkeypatch.setattr(Bar, "show", acting(2, start_other))
    assert call(f"select.py --run {run}") == 0
    assert others[0].returncode == 0, others[0].stderr
    assert {"methods/toss", "methods/sft"} <= read_json(run / "run.json")["stages"].keys()
    assert {"methods/toss/record.json", "methods/sft/record.json"} <= outcome(run).keys()


def test_a_command_waits_while_another_one_writes_run_json(bench):
    run, _ = bench.begin("select")
    command = threading.Thread(target=call, args=[f"select.py --run {run} --method sft"])
    with held(run, run):
        command.start()
        while not (run / "methods/sft/record.json").exists():
            assert command.is_alive()
            time.sleep(0.05)
        command.join(timeout=0.5)
        assert command.is_alive()
        stages = read_json(run / "run.json")["stages"]
        edit_json(run / "run.json", stages={**stages, "methods/other": {}})
    command.join()
    stages = read_json(run / "run.json")["stages"]
    assert {"methods/sft", "methods/other"} <= stages.keys()


def test_where_there_are_no_locks_a_warning_says_so(bench, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    run, line = bench.begin("score")
    results.warn_once.cache_clear()
    assert said(capsys, line).count("warning: no locks here") == 1
    assert outcome(run) == bench.after["score"]


# Damage


def result_files(run: Path, name: str) -> list[Path]:
    """The files of the results that a command makes."""
    if name == "score":
        return [run / "scores.safetensors"]
    folders = [run / "degraded", run / "utility"] if name == "train" else [run / "methods/toss-pro"]
    return [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]


def damage(file: Path, kind: str) -> None:
    """As after a power cut: full length and the same time, but all zeros; or cut off, or lost."""
    stat = file.stat()
    data = file.read_bytes()
    if kind == "lost":
        file.unlink()
    else:
        file.write_bytes(bytes(len(data)) if kind == "zeros" else data[: len(data) // 2])
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("kind", ["zeros", "cut", "lost"])
@pytest.mark.parametrize("name", ["train", "score", "select"])
def test_a_damaged_result_is_made_again(name, kind, bench, capsys):
    run, line = bench.begin(name)
    assert call(line) == 0
    for file in result_files(run, name)[:: 1 if ALL else 5]:
        if kind == "lost" and file.name == "record.json":
            continue  # a folder without a record is another program's, and refused
        damage(file, kind)
        output = said(capsys, line)
        if "merged" not in file.parts and (name, kind) != ("score", "lost"):
            assert "so it is made again" in output, file
        assert outcome(run) == bench.after[name], file


# The disk


def test_a_result_is_on_the_disk_before_it_is_published(bench, monkeypatch):
    """Every file was flushed before the rename that puts it into its place, so was its folder."""
    flushed = set()
    published = set()
    fsync = os.fsync

    def noted(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checked(move):
        def wrapper(source, target, **options):
            source = Path(source)
            if source.name.endswith(".new"):
                for part in [source, *source.rglob("*")]:
                    assert part.stat().st_ino in flushed, part
                published.add(Path(target).name)
            move(source, target, **options)

        return wrapper

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", checked(os.rename))
    monkeypatch.setattr(os, "replace", checked(os.replace))
    for name in ("train", "score", "select"):
        run, line = bench.begin(name)
        flushed.clear()
        assert call(line) == 0
        assert run.stat().st_ino in flushed  # the renames are on the disk, too
    folders = {"degraded", "utility", "toss-pro", "merged"}
    assert folders | {"scores.safetensors", "run.json", "toss-pro-float32-0.pt"} <= published


def fill_disk(size: int, line: str) -> int:
    """Run a command while files may not grow beyond a size, as on a full disk or over a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return call(line)


@pytest.mark.parametrize("name", ["train again", "score again", "select again"])
def test_a_full_disk_is_one_line_and_the_next_try_works(name, bench):
    for size in (100, 2000, 9000) if ALL else (2000,):
        run, line = bench.begin(name)

        status, _, err = child(partial(fill_disk, size, line))
        assert status == 1
        assert err.startswith(f"error: {run}") and err.count("\n") == 1, err
        assert "cannot be written" in err
        assert without_work(snapshot(run)) == without_work(bench.before(name))
        assert call(line) == 0
        assert outcome(run) == bench.after[name]


@pytest.mark.parametrize("name", ["train again", "score again", "select again"])
def test_a_read_only_folder_is_one_line_and_the_next_try_works(name, bench, monkeypatch, capsys):
    run, line = bench.begin(name)

    def fail(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        for function in ("mkdir", "rename", "replace", "rmdir", "unlink"):
            patch.setattr(os, function, fail)
        assert "Read-only file system" in refused(capsys, line)
    assert snapshot(run) == bench.before(name)
    assert call(line) == 0
    assert outcome(run) == bench.after[name]


def test_a_rename_that_fails_leaves_the_old_result(bench, monkeypatch, capsys):
    run, line = bench.begin("train again")
    rename = os.rename

    def fail_for_new(source, target, **options):
        if str(source).endswith(".degraded.new"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_for_new)
        assert "degraded: cannot be written" in refused(capsys, line)
    assert without_work(snapshot(run)) == without_work(bench.before("train again"))
    assert call(line) == 0
    assert outcome(run) == bench.after["train again"]


def test_a_refused_command_leaves_no_folder_behind(bench, tmp_path, capsys):
    run, _ = bench.begin("select")
    before = snapshot(run)
    assert "LoRA rank" in refused(capsys, f"select.py --run {run} --name new --rank 1000000")
    assert snapshot(run) == before
    words = {**bench.words, "run": tmp_path / "new"}
    line = "select.py --run {run} --method sft --model {base} --custom {custom} --rank 1000000"
    assert "LoRA rank" in refused(capsys, line.format(**words))
    (tmp_path / "file").write_text("")
    line = COMMANDS["train"].format(**{**bench.words, "run": tmp_path / "file"})
    assert "file" in refused(capsys, line)
    assert snapshot(tmp_path) == {"file": b""}
