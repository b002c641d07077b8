"""The commands of a run, begun and disturbed: what one finds, what it leaves, what it took."""

import os
import shutil
import signal
import sys
from pathlib import Path

from conftest import tree, write_files
from helpers import succeed

from toss.workbench.progress import Progress

REFERENCES = "--model {base} --harmful {harmful} --utility {utility}"
PRO = "select.py --run {run} --pro 1 --pro-samples 2 --merge --batch-tokens 128"
COMMANDS = {
    "train": "train.py --run {run} " + REFERENCES,
    "train again": "train.py --run {run} " + REFERENCES + " --overwrite --seed 1",
    "score": "score.py --run {run} --custom {custom} --batch-tokens 128",
    "score again": "score.py --run {run} --overwrite --dtype bfloat16 --batch-tokens 128",
    "select": PRO,
    "select again": PRO + " --overwrite --seed 1",
}
BEGINS_AFTER = {
    "train again": "train",
    "score": "train",
    "score again": "score",
    "select": "score",
    "select again": "select",
}


class Stages:
    """A folder with a base, data and one run.

    words: what stands in commands as {base}, {custom}, {run} ... A folder by the name of each
    command holds the run that it leaves if nothing disturbs it.
    """

    def __init__(self, folder: Path, base: Path):
        self.folder = folder
        self.run = folder / "run"
        self.words = write_files(folder)
        self.words["base"] = str(shutil.copytree(base, folder / "base"))
        self.words["run"] = str(self.run)
        for name in COMMANDS:
            succeed(self.begin(name))
            shutil.copytree(self.run, folder / name)

    def begin(self, name: str) -> str:
        """Put the run as it is before a command into its place; returns the command."""
        shutil.rmtree(self.run, ignore_errors=True)
        if name in BEGINS_AFTER:
            shutil.copytree(self.folder / BEGINS_AFTER[name], self.run)
        return COMMANDS[name].format(**self.words)

    def is_as_before(self, name: str) -> bool:
        """True if the run is as it was before a command, but for logs and states of its work."""
        before = tree(self.folder / BEGINS_AFTER[name])
        return without_work(tree(self.run)) == without_work(before)

    def is_finished(self, name: str) -> bool:
        """True if the run holds the bytes that an undisturbed command leaves."""
        return outcome(self.run) == outcome(self.folder / name)


def outcome(run: Path) -> dict:
    """What a command leaves, but for costs and locks: no state is among it."""
    content = tree(run)
    assert not [name for name in content if name.endswith(".pt")]
    names = [name for name in content if not name.startswith((".state", "log/costs"))]
    return {name: content[name] for name in names}


def without_work(content: dict) -> dict:
    """What is there without logs and states, which unfinished work may leave."""
    names = [name for name in content if not name.startswith(("log", ".state"))]
    return {name: content[name] for name in names}


def on_each_step(monkeypatch, act) -> None:
    """Call act(part) after each step of training or scoring, before its state is saved."""
    report = Progress.on_step

    def report_and_act(progress, event):
        report(progress, event)
        if "step" in event:
            act(progress.name)

    monkeypatch.setattr(Progress, "on_step", report_and_act)


def on_step(n: int, monkeypatch, act) -> None:
    """Call act() after the n-th step, whatever part it is of."""
    steps = []

    def count(part):
        steps.append(part)
        if len(steps) == n:
            act()

    on_each_step(monkeypatch, count)


def child(work) -> tuple[int, str]:
    """Run work() in a forked process; its exit status, and what it wrote to stderr."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout = open(os.devnull, "w")
            sys.stderr = open(write_end, "w")
            status = work()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write_end)
    with open(read_end) as file:
        errors = file.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), errors
