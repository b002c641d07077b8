"""Nothing is lost and nothing is wrong: killed, full, stopped, or started twice.

Each command runs in a child process that dies at the n-th call of the functions through which
everything is written, gets a signal after the n-th step, or finds the disk full. The same command
is then run again and must leave the bytes of an undisturbed run, and nothing besides. `make test`
takes a sample of the places; with TOSS_TORTURE=1 (`make torture`) all of them are tried.
"""

import datetime
import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
from conftest import ROOT, tree, write_files
from helpers import call, refused, said

from model import process, tokenizer
from model.atomic import locked
from model.io import read_json
from toss.files import record_of
from toss.progress import Progress
from toss.run import open_run

ALL = bool(os.environ.get("TOSS_TORTURE"))
WRITES = "replace rename mkdir rmdir unlink fsync open"  # functions of os
DIED = 99
REFERENCES = "--model {base} --harmful {harmful} --utility {utility}"
OTHER = " --overwrite --seed 1"
COMMANDS = {  # each from what the ones before it have made
    "train": "train.py --run {run} " + REFERENCES,
    "train again": "train.py --run {run} " + REFERENCES + OTHER,
    "score": "score.py --run {run} --custom {custom}",
    "score again": "score.py --run {run} --base --overwrite",
    "select": "select.py --run {run} --pro 1 --pro-samples 2 --merge",
    "select again": "select.py --run {run} --pro 1 --pro-samples 2 --merge" + OTHER,
}
START = {"train": (), "train again": ("train",), "score": ("train",)}
START |= {"score again": ("train", "score"), "select": ("train", "score")}
START |= {"select again": ("train", "score", "select")}


def child(work) -> tuple[int, str]:
    """Run work() in a forked process; its exit status, and what it printed."""
    sys.stdout.flush()
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        status = 1
        for number in process.SIGNALS:  # a suite in the background may ignore some
            signal.signal(number, signal.SIG_DFL)
        try:
            os.close(read)
            sys.stdout = sys.stderr = open(write, "w")
            status = work()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def dies_at(n: int, line: str) -> int:
    """Run a command and end this process, as by SIGKILL, right before its n-th write."""
    count = 0

    def counted(function):
        def wrapper(*args, **more):
            nonlocal count
            count += function.__name__ != "open" or bool(args[1] & os.O_CREAT)
            if count == n:
                os._exit(DIED)
            return function(*args, **more)

        return wrapper

    for name in WRITES.split():
        setattr(os, name, counted(getattr(os, name)))
    return call(line)


def results(run: Path) -> dict[str, bytes]:
    """All files of a run but run.json, which holds times; its recipes must be the records'."""
    files, index = tree(run), read_json(run / "run.json")
    for stage, known in index["stages"].items():
        made = record_of(run / ("scores.safetensors" if stage == "scores" else stage))
        assert made.items() >= known["recipe"].items(), stage
    return {name: data for name, data in files.items() if name != "run.json"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, base) -> tuple[Path, dict[str, str], dict[str, dict[str, bytes]]]:
    """A folder with the data and, for each command, a run before it and what it leaves."""
    folder, after = tmp_path_factory.mktemp("torture"), {}
    words = {**write_files(folder), "base": str(base), "run": str(folder / "run")}
    for name, earlier in START.items():
        shutil.rmtree(folder / "run", ignore_errors=True)
        for step in earlier:
            assert call(COMMANDS[step].format(**words)) == 0
        if earlier:
            shutil.copytree(folder / "run", folder / name)
        assert call(COMMANDS[name].format(**words)) == 0
        after[name] = results(folder / "run")
    return folder, words, after


def begin(prepared, name: str) -> tuple[Path, str]:
    """Put the run before a command in its place; returns it, and the command's line."""
    folder, words, _ = prepared
    shutil.rmtree(folder / "run", ignore_errors=True)
    if START[name]:
        shutil.copytree(folder / name, folder / "run")
    return folder / "run", COMMANDS[name].format(**words)


def whole_results(run: Path, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Each result, as the next command finds it, is the old one, the new one, or not there."""
    if run.exists():
        open_run(run) if (run / "run.json").exists() else None
    now = tree(run)
    for part in ("degraded/", "utility/", "scores.safetensors", "methods/toss-pro/"):
        of = lambda files: {k: v for k, v in files.items() if k.startswith(part) and "/." not in k}
        merged = lambda files: {k: v for k, v in of(files).items() if "merged/" not in k}
        assert merged(now) in ({}, merged(before), merged(after)), part


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_write_the_same_command_finishes_the_work(name, prepared):
    folder, _, after = prepared
    before = tree(folder / name) if START[name] else {}
    n, step = 1, 1 if ALL else 17
    while True:
        run, line = begin(prepared, name)
        status, out = child(lambda: dies_at(n, line))
        assert status in (0, DIED), out
        if status == 0:
            break
        whole_results(run, before, after[name])
        assert call(line) == 0, n
        assert results(run) == after[name], n
        n += step
    assert n > 20  # a command writes many times


def test_a_result_that_lost_a_part_or_was_damaged_without_a_trace_is_made_again(prepared, capsys):
    """As after a power cut: full length, all zeros, the same time. Every second part is gone."""
    parts = {"train": ["degraded", "utility"], "score": ["scores.safetensors"]}
    for name in ("train", "score", "select"):
        run, line = begin(prepared, name)
        assert call(line) == 0
        own = [run / part for part in parts.get(name, ["methods/toss-pro"])]
        files = [f for part in own for f in (part.rglob("*") if part.is_dir() else [part])]
        files = [f for f in files if f.is_file() and f.name != "README.md"][:: 1 if ALL else 3]
        for n, file in enumerate(files):
            stat, data = file.stat(), file.read_bytes()
            if n % 2 and file.name != "record.json":  # what has no record is not ours
                file.unlink()
            else:
                file.write_bytes(bytes(len(data)))
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            again = "merged checkpoint" if "merged" in str(file) else "so it is made again"
            assert again in said(capsys, line) and file.read_bytes() == data, file
    (run / "scores.safetensors").write_bytes(b"cut off")
    assert "cannot be read" in refused(capsys, line)
    (run / "utility/adapter_model.safetensors").write_bytes(b"")
    assert "utility is damaged" in refused(capsys, COMMANDS["score"].format(**prepared[1]))


def step_of(n: int, act):
    """Let act() be called after the n-th step of any loop, before its state is saved."""
    known, count = Progress.__call__, 0

    def wrapper(self, event):
        nonlocal count
        count += 1
        if count == n:
            act()
        known(self, event)

    Progress.__call__ = wrapper


def stopped(line: str, n: int, number: signal.Signals) -> tuple[int, str]:
    """Send a child that runs a command a signal after the n-th step; its status and output."""
    line += " --save-every 1e-9" * (number == signal.SIGKILL)
    return child(lambda: step_of(n, lambda: os.kill(os.getpid(), number)) or call(line))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("name", ["train", "score", "select"])
def test_stopped_after_any_step_the_same_command_goes_on(name, number, prepared, capsys):
    after = prepared[2]
    for n in range(1, 99, 1 if ALL else 4):
        run, line = begin(prepared, name)
        status, out = stopped(line, n, number)
        if status == 0:
            break
        if number == signal.SIGKILL:
            assert status == -number
        else:
            last = out.splitlines()[-1]
            assert status == 128 + number and f"error: stopped by {number.name}" in last, out
            assert "is saved after step" in last
        assert "goes on after step" in said(capsys, line) or number == signal.SIGKILL, n
        assert results(run) == after[name], n
    assert n >= 3


@pytest.mark.parametrize("seed", ["--seed 7", ""])
def test_a_state_of_another_recipe_or_changed_is_not_used_and_goes(seed, prepared, capsys):
    run, line = begin(prepared, "select")
    stopped(line, 4, signal.SIGKILL)
    states = list((run / ".state").rglob("*.safetensors"))
    for state in states if not seed else []:  # its header says another step
        state.write_bytes(re.sub(rb'(at\\": \[)\d', rb"\g<1>9", state.read_bytes()))
    assert states and "goes on" not in said(capsys, f"{line} {seed}")
    assert not (run / ".state").exists()


def test_work_on_another_result_survives_a_command_that_has_nothing_to_do(prepared, capsys):
    run, other = begin(prepared, "select again")
    stopped(other, 4, signal.SIGTERM)
    before, line = tree(run), COMMANDS["select"].format(**prepared[1])
    for more in ("--dry-run", f"--dry-run --custom {run}/methods/../../custom.jsonl", ""):
        assert "inputs, skipped" in said(capsys, f"{line} {more}") and tree(run) == before
    assert "goes on after step" in said(capsys, other)


def test_an_unfinished_first_stage_keeps_its_day(prepared, base, tmp_path, monkeypatch, capsys):
    dated = Path(shutil.copytree(base, tmp_path / "dated"))
    turns = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    (dated / "chat_template.jinja").write_text("{{ strftime_now('%d') }}" + turns)
    line = COMMANDS["train"].format(**prepared[1] | {"base": dated, "run": tmp_path / "run"})
    day = type("Day", (datetime.date,), {"today": lambda: datetime.date(2030, 1, 1)})
    monkeypatch.setattr(tokenizer, "datetime", SimpleNamespace(date=day))
    stopped(line, 1, signal.SIGTERM)
    day.today = lambda: datetime.date(2030, 1, 2)
    assert "goes on after step 1" in said(capsys, line)
    assert read_json(tmp_path / "run/run.json")["identity"]["date"] == "2030-01-01"


def test_one_process_at_a_time_works_on_a_result(prepared, capsys):
    run, line = begin(prepared, "score")
    at = run / ".state"
    with process.lock(at / "scores.lock"):
        before = tree(run)
        error = refused(capsys, line)
        assert re.search(r"scores is in use by process \d+ on \S+ since .*--wait", error), error
        assert tree(run) == before
    with process.lock(at / "utility.lock"):  # what it reads
        assert "utility is in use" in refused(capsys, line)
    with process.lock(at / "utility.lock", shared=True):
        assert call(line) == 0 and call(f"select.py --run {run}") == 0
        words = f"train.py --run {run} {REFERENCES}".format(**prepared[1])
        assert said(capsys, words).count("inputs, skipped") == 2  # they are only read
        assert "utility is in use" in refused(capsys, f"{words} --overwrite --seed 3")
    evaluate = f"toss.audit.evaluate --max-new-tokens 1 --utility {prepared[1]['utility']}"
    for held, line in (
        ("methods/toss", evaluate),
        ("evaluation/base", evaluate),
        ("methods/toss", "toss.audit.diagnose"),
        ("scores", "toss.audit.report"),
    ):
        with process.lock(at / f"{held}.lock"):
            error = refused(capsys, f"{line} --run {run}")
            assert f"error: {held.rpartition('/')[2]} is in use" in error


def test_where_there_are_no_locks_a_warning_says_so(prepared, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    run, line = begin(prepared, "score")
    process.warn_once.cache_clear()
    assert said(capsys, line).count("warning: no locks here") == 1
    assert results(run) == prepared[2]["score"]


def test_two_at_once_lose_nothing(prepared):
    """Real processes: the same command twice, and two ways of fine-tuning side by side."""

    def at_once(*lines):
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        both = [subprocess.Popen([sys.executable, *line.split()], **how) for line in lines]
        said = [process.communicate(timeout=300)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        return said

    run, line = begin(prepared, "score")
    said = at_once(*[line + " --wait"] * 2)
    assert sorted("inputs, skipped" in text for text in said) == [False, True], said
    assert results(run) == prepared[2]["score"]
    at_once(*(f"select.py --run {run} --method {name} --lr 1e-3" for name in ("toss", "sft")))
    assert {"methods/toss", "methods/sft"} <= read_json(run / "run.json")["stages"].keys()


def test_a_result_is_on_the_disk_before_it_is_published(prepared, monkeypatch):
    """Every file was flushed before the rename that puts it into its place, so was its folder."""
    flushed, published = set(), []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: flushed.add(os.fstat(f).st_ino) or fsync(f))

    def watched(move):
        def wrapper(source, target, **more):
            source = Path(source)
            if ".old" not in str(target) and ".partial" in str(source):
                parts = [source, *(source.rglob("*") if source.is_dir() else ())]
                assert {part.stat().st_ino for part in parts} <= flushed, source
                published.append(Path(target).name)
            move(source, target, **more)

        return wrapper

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    for name in ("train", "score", "select"):
        assert call(begin(prepared, name)[1]) == 0
    results = {"degraded", "utility", "scores.safetensors", "toss-pro", "merged", "run.json"}
    assert results <= set(published)


READERS = {
    "toss.base.read_rows": "train.py --run {run} --model {base} --harmful {tmp} --utility {tmp}",
    "toss.rows.read_rows": "toss.audit.evaluate --run {run} --harmful {tmp} --methods base",
    "toss.run.load_selection": "select.py --run {run} --mask {mask}",
}


@pytest.mark.parametrize("reader", READERS)
def test_what_changes_while_it_is_read_is_an_error(reader, prepared, tmp_path, monkeypatch, capsys):
    run = begin(prepared, "train" if reader == "toss.base.read_rows" else "select again")[0]
    rows = shutil.copy(prepared[1]["utility"], tmp_path / "rows.jsonl")
    mask = run / "methods/toss-pro/selection.safetensors"
    line = READERS[reader].format(**prepared[1] | {"tmp": rows, "mask": mask})
    read, before = resolve_name(reader), tree(run)

    def changing(path, *how, **more):
        found = read(path, *how, **more)
        Path(path).write_bytes(Path(path).read_bytes() + b"\n")
        return found

    monkeypatch.setattr(reader, changing)
    assert re.search("(rows.jsonl|selection.safetensors) was changed", refused(capsys, line))
    assert all(x.startswith(("log/", ".state")) for x in tree(run).keys() - before.keys())


def test_what_dead_processes_left_is_swept_and_a_living_ones_is_not(prepared):
    run, line = begin(prepared, "score")
    for name in (".scores.safetensors.1-dead.partial", ".run.json.2-live.partial"):
        (run / name).mkdir()
        (run / name / "scores.safetensors").write_bytes(b"half")
    with locked(run / ".run.json.2-live.partial"):
        assert call(line) == 0
    assert [file.name for file in run.glob(".*")] == [".run.json.2-live.partial"]


def test_a_full_disk_is_one_line_and_the_next_try_works(prepared):
    """Files may not grow beyond a size, as on a full disk or over a quota."""
    for name in ("train", "score", "select"):
        for size in (100, 2000, 9000) if ALL else (2000,):
            run, line = begin(prepared, name)
            limit, before = (resource.RLIMIT_FSIZE, (size, size)), tree(run)
            status, out = child(lambda: resource.setrlimit(*limit) or call(line))
            last = out.splitlines()[-1]
            assert status == 1 and last.startswith("error: ") and str(run) in last, out
            assert "cannot be written" in last and "Traceback" not in out, out
            left = tree(run).keys() - before.keys()
            assert all(name.startswith(("log/", ".state")) for name in left)
            assert call(line) == 0 and results(run) == prepared[2][name]
