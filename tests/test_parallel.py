"""Two processes under torchrun on the CPU do what one does, and one of them writes.

Scores are equal to the bit; adapters up to the rounding of one sum; an error is one clear line.
"""

import json
import re

import torch
from conftest import ROOT, run, script, tree
from safetensors.torch import load_file

# Several commands in one job, since importing torch takes each process longer than they do.
JOB = """
import sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import script
from toss import cli
def main():
    for name, *argv in {calls!r}:
        script(name, *argv)
        torch.distributed.barrier()  # the next command reads what this one wrote
sys.exit(cli.run(main))
"""


def stages(folder, base, files) -> list[list[str]]:
    """All three scripts; the references on steps of one row: process 1 only joins in the sums."""
    references = ("--harmful", files["harmful"], "--utility", files["utility"], "--batch-size", 1)
    flags = ("--pro", 1, "--pro-samples", 2, "--epochs", 2, "--batch-size", 3, "--merge")
    calls = [
        ("train", "--run", folder, "--model", base, *references),
        ("score", "--run", folder, "--custom", files["custom"], "--batch-tokens", 60, "--base"),
        ("select", "--run", folder, *flags),
    ]
    return [[str(word) for word in call] for call in calls]


def test_two_processes_do_what_one_does(tmp_path, base, files, trained):
    one, two, scores = tmp_path / "one", tmp_path / "two", trained / "scores.safetensors"
    for name, *argv in stages(one, base, files):
        script(name, *argv)
    again = ["score", "--run", str(trained), "--base", "--batch-tokens", "200", "--overwrite"]
    script(*again)
    expected = scores.read_bytes()
    scores.unlink()
    failing = ["score", "--run", str(tmp_path / "new"), "--model", str(base)]
    calls = [*stages(two, base, files), again, [*failing, "--custom", files["custom"]]]
    (tmp_path / "job.py").write_text(JOB.format(root=str(ROOT), calls=calls))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--")
    done = run(*torchrun, tmp_path / "job.py")

    assert done.stdout.count(": wrote ") == 5, done.stderr  # one process speaks
    assert scores.read_bytes() == expected  # under equal adapters, equal to the bit
    assert tree(one).keys() == tree(two).keys()
    for name in (name for name in tree(one) if name.endswith(".safetensors")):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-4, msg=f"{name} {key}")
    steps = lambda folder: [json.loads(line) for line in open(folder / "log/toss-pro.jsonl")]
    for a, b in zip(steps(one), steps(two), strict=True):
        assert a["step"] == b["step"] and abs(a["loss"] - b["loss"]) < 1e-4

    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and errors
    assert all(re.match(r"error: process [01] of 2: .*run train.py", line) for line in errors)
    assert not (tmp_path / "new").exists()
