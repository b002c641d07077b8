"""Two processes under torchrun on the CPU do what one does, and one of them writes."""

import re
import textwrap

import pytest
import torch
from conftest import ROOT, make_base, read_jsonl, run, script, sources, tree
from helpers import needs_shard
from safetensors.torch import load_file

from toss.workbench.run import Run

# All commands of a test are one job: importing torch takes each process longer than they do.
JOB = """
import sys
import time
from pathlib import Path
import torch
sys.path[:0] = [ROOT, ROOT + "/tests"]
from conftest import script
from toss.workbench import flags

def main():
    for line in LINES:
        script(*line.split())
        torch.distributed.barrier()  # the next command reads what this one wrote
    check()

def check():
    rank = torch.distributed.get_rank()
CHECK
sys.exit(flags.run(main))
"""


def job(folder, lines, check="pass"):
    """Run commands, and then the code `check`, in two processes."""
    text = JOB.replace("CHECK", textwrap.indent(textwrap.dedent(check), "    "))
    text = text.replace("LINES", repr(lines)).replace("ROOT", repr(str(ROOT)))
    file = folder / "job.py"
    file.write_text(text)
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--", file)


def stages(folder, base, files):
    """All three scripts; the references on steps of one row: process 1 only joins in the sums."""
    return [
        f"train --run {folder} {sources(files, base)} --batch-size 1",
        f"score --run {folder} --custom {files['custom']} --batch-tokens 60 --base",
        f"select --run {folder} --pro 1 --pro-samples 2 --epochs 2 --batch-size 3",
    ]


def assert_same_runs(one, two):
    """Two runs hold the same files, and adapters and losses that differ by rounding."""
    names = tree(one).keys()
    assert tree(two).keys() == names
    for name in names:
        if name.endswith(".safetensors"):
            expected = load_file(one / name)
            torch.testing.assert_close(load_file(two / name), expected, rtol=0, atol=5e-6)
    expected = [step["loss"] for step in read_jsonl(one / "log/toss-pro.jsonl")]
    losses = [step["loss"] for step in read_jsonl(two / "log/toss-pro.jsonl")]
    assert losses == pytest.approx(expected, abs=1e-4)


def test_two_processes_do_what_one_does(tmp_path, base, files, trained):
    again = f"score --run {trained} --base --batch-tokens 200 --overwrite"
    one = stages(tmp_path / "one", base, files)
    for line in (*one[:2], f"{one[2]} --merge", again):
        script(*line.split())
    scores = trained / "scores.safetensors"
    expected = scores.read_bytes()
    scores.unlink()

    two = stages(tmp_path / "two", base, files)
    failing = f"score --run {tmp_path}/new --model {base} --custom {files['custom']}"
    done = job(tmp_path, [*two[:2], f"{two[2]} --merge", again, failing])

    assert done.stdout.count(": wrote ") == 8, done.stderr  # one process speaks
    assert scores.read_bytes() == expected  # under equal adapters, equal to the bit
    assert_same_runs(tmp_path / "one", tmp_path / "two")

    assert done.returncode != 0
    errors = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert errors
    for error in errors:
        assert re.match(r"error: process [01] of 2: .*run \S+ train.py", error)
    assert not (tmp_path / "new").exists()


# A whole model's parameters are tensors, a spread one's are parts of them.
PART_SIZES = """
from model import load_checkpoint
model = load_checkpoint({base!r}, shard=True)
parts = [getattr(p, "to_local", lambda: p)() for p in model.parameters()]
Path(f"{folder}/part-{{rank}}").write_text(str(sum(part.numel() for part in parts)))
"""
RESUME = """
from toss.scoring import score
from toss.parallel import Watch
from toss.workbench.files import read_losses
saved = read_losses(Path("{run}/scores.safetensors"), "rows")
expected = saved.losses["utility"]

class BothSavedAll(Watch):
    def load(self, part):
        return {{"losses": expected}}

assert score(model, saved.tokens, watch=BothSavedAll()).equal(expected)
"""


@needs_shard
def test_a_base_spread_over_two_processes_does_what_a_whole_one_does(tmp_path, files):
    # An odd number of channels: parts of unequal size. The head is tied.
    shape = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
    shape |= {"num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 251}
    base = make_base(tmp_path / "base", **shape)
    sets = f"--benign {files['custom']} --utility {files['utility']} --max-new-tokens 5"

    def commands(run):
        train, score, select = stages(run, base, files)
        evaluate = f"toss.audit.evaluate --run {run} {sets}"
        diagnose = f"toss.audit.diagnose --run {run}"
        return [train, score, f"{select} --gradient-checkpointing", evaluate, diagnose]

    one = tmp_path / "one"
    two = tmp_path / "two"
    for line in commands(one):
        script(*line.split())
    check = PART_SIZES.format(base=str(base), folder=tmp_path) + RESUME.format(run=one)
    done = job(tmp_path, [f"{line} --shard" for line in commands(two)], check)

    assert done.returncode == 0, done.stderr
    whole = load_file(one / "scores.safetensors")
    spread = load_file(two / "scores.safetensors")
    torch.testing.assert_close(spread, whole, rtol=0, atol=0)
    assert_same_runs(one, two)
    assert (one / "answers/base.jsonl").read_text() == (two / "answers/base.jsonl").read_text()

    numbers = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    parts = [int((tmp_path / f"part-{rank}").read_text()) for rank in range(2)]
    assert sum(parts) == numbers + 384 * 96 + 96  # embedding and last norm are in both
    assert max(parts) < 0.55 * numbers


LATE = """
from toss.workbench.progress import Progress
load = Progress.load

def load_late(self, part):
    time.sleep(0.7 * rank)
    return load(self, part)

Progress.load = load_late
script(*{line!r}.split())
"""


def test_nothing_is_removed_before_a_late_process_has_read_its_state(
    tmp_path, base, files, monkeypatch
):
    """A command died between the last step and the rename, so the same command has no step left."""

    def die(*arguments):
        raise KeyboardInterrupt

    line = f"train --run {tmp_path}/run {sources(files, base)}"
    monkeypatch.setattr(Run, "publish", die)
    with pytest.raises(KeyboardInterrupt):
        script(*line.split())

    done = job(tmp_path, [], LATE.format(line=line))

    assert done.returncode == 0, done.stderr
    assert "degraded: step 2 of 2 was reached before" in done.stdout
    assert done.stdout.count(": wrote ") == 2
