"""Two processes under torchrun on the CPU do what one does, and one of them writes."""

import re

import pytest
import torch
from conftest import ROOT, make_base, read_jsonl, run, script, sources, tree
from safetensors.torch import load_file

from toss.workbench.run import Run

NEW = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)

# Several commands in one job, since importing torch takes each process longer than they do.
JOB = """
import sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import script
from toss.workbench import flags
def main():
    for line in {lines!r}:
        script(*line.split())
        torch.distributed.barrier()  # the next command reads what this one wrote
{more}
sys.exit(flags.run(main))
"""


def job(folder, lines: list[str], more: str = ""):
    """Run commands in two processes, then some more code."""
    file = folder / "job.py"
    file.write_text(JOB.format(root=str(ROOT), lines=lines, more=more))
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--", file)


def same_runs(one, two) -> None:
    """Assert that two runs hold the same files, and adapters that differ by rounding."""
    assert tree(one).keys() == tree(two).keys()
    for name in (name for name in tree(one) if name.endswith(".safetensors")):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-4, msg=f"{name} {key}")
    steps = (read_jsonl(folder / "log/toss-pro.jsonl") for folder in (one, two))
    for a, b in zip(*steps, strict=True):
        assert a["step"] == b["step"] and abs(a["loss"] - b["loss"]) < 1e-4


def stages(folder, base, files) -> list[str]:
    """All three scripts; the references on steps of one row: process 1 only joins in the sums."""
    return [
        f"train --run {folder} {sources(files, base)} --batch-size 1",
        f"score --run {folder} --custom {files['custom']} --batch-tokens 60 --base",
        f"select --run {folder} --pro 1 --pro-samples 2 --epochs 2 --batch-size 3 --merge",
    ]


def test_two_processes_do_what_one_does(tmp_path, base, files, trained):
    one, two, scores = tmp_path / "one", tmp_path / "two", trained / "scores.safetensors"
    again = f"score --run {trained} --base --batch-tokens 200 --overwrite"
    for line in (*stages(one, base, files), again):
        script(*line.split())
    expected = scores.read_bytes()
    scores.unlink()
    failing = f"score --run {tmp_path}/new --model {base} --custom {files['custom']}"
    done = job(tmp_path, [*stages(two, base, files), again, failing])

    assert done.stdout.count(": wrote ") == 5, done.stderr  # one process speaks
    assert scores.read_bytes() == expected  # under equal adapters, equal to the bit
    same_runs(one, two)

    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and errors
    assert all(re.match(r"error: process [01] of 2: .*run train.py", line) for line in errors)
    assert not (tmp_path / "new").exists()


HELD = """
    from pathlib import Path
    from model import load_checkpoint
    from toss.workbench.files import read_scores
    from toss.scoring import score
    model = load_checkpoint({base!r}, shard=True)
    sizes = [getattr(p, "to_local", lambda: p)().shape.numel() for p in model.parameters()]
    open(f"{out}-{{torch.distributed.get_rank()}}", "w").write(str(sum(sizes)))
    tokens, losses = read_scores(Path({scores!r}), "rows")

    class AllSaved:
        def load(self, part):  # as if both processes had saved all of it
            return {{"losses": losses["utility"]}}

    again = score(model, tokens, state=AllSaved())
    assert again.equal(losses["utility"])
"""


@pytest.mark.skipif(not NEW, reason="fully_shard works on the CPU from PyTorch 2.7 on")
def test_a_base_spread_over_two_processes_does_what_a_whole_one_does(tmp_path, files):
    # An odd number of channels: parts of unequal size. The head is tied.
    shape = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
    shape |= {"num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 251}
    base, one, two = make_base(tmp_path / "base", **shape), tmp_path / "one", tmp_path / "two"
    sets = f"--benign {files['custom']} --utility {files['utility']} --max-new-tokens 5"

    def commands(run) -> list[str]:
        scripts = [line.replace("--merge", "") for line in stages(run, base, files)]
        scripts[2] += "--gradient-checkpointing"
        evaluate = f"toss.audit.evaluate --run {run} {sets}"
        return [*scripts, evaluate, f"toss.audit.diagnose --run {run}"]

    for line in commands(one):
        script(*line.split())
    held = HELD.format(base=str(base), out=tmp_path / "held", scores=f"{one}/scores.safetensors")
    done = job(tmp_path, [f"{line} --shard" for line in commands(two)], held)

    assert done.returncode == 0, done.stderr
    whole, spread = (load_file(folder / "scores.safetensors") for folder in (one, two))
    for name in whole:
        torch.testing.assert_close(spread[name], whole[name], rtol=0, atol=1e-5)
    same_runs(one, two)
    assert (one / "answers/base.jsonl").read_text() == (two / "answers/base.jsonl").read_text()
    numbers = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    parts = [int((tmp_path / f"held-{rank}").read_text()) for rank in range(2)]
    assert sum(parts) == numbers + 384 * 96 + 96  # embedding and last norm are in both
    assert max(parts) < 0.55 * numbers


LATE = """
    import time
    from toss.workbench.states import SavedState
    load = SavedState.load
    def late(self, part):
        time.sleep(2 * torch.distributed.get_rank())
        return load(self, part)
    SavedState.load = late
    script(*{line!r}.split())
"""


def test_nothing_is_removed_before_a_late_process_has_read_its_state(
    tmp_path, base, files, monkeypatch
):
    """A command died between the last step and the rename, so the same command has no step left."""

    def die(*given):
        raise KeyboardInterrupt

    line = f"train --run {tmp_path}/run {sources(files, base)}"
    monkeypatch.setattr(Run, "publish", die)
    with pytest.raises(KeyboardInterrupt):
        script(*line.split())
    done = job(tmp_path, [], LATE.format(line=line))
    assert done.returncode == 0, done.stderr
    assert "degraded: goes on after step 2 of 2" in done.stdout
    assert done.stdout.count(": wrote ") == 2
