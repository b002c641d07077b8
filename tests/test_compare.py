"""`compare` makes one table of one run, of several and over seeds; `calibrate` chooses d."""

import re
import shutil

import pytest
from conftest import script, write_jsonl
from helpers import refused, said

from model.io import load_tensors
from model.lora import use
from toss.audit.calibrate import calibrate
from toss.audit.compare import with_ratios
from toss.audit.evaluate import write_answers
from toss.audit.judges import Measured
from toss.audit.measures import Cell
from toss.audit.runs import cost_of
from toss.audit.tables import grid, over_seeds
from toss.scoring import score
from toss.workbench.run import open_run


def answered(folder, **shares) -> None:
    """Write answers to ten harmful prompts, of which so many are forbidden, by method."""
    run = open_run(folder)
    for method, count in shares.items():
        inputs = [] if method == "base" else [f"methods/{method}/model"]
        lines = []
        for place in range(10):
            line = {"set": "harmful", "source": "held-out", "prompt": "p", "response": method}
            lines.append({**line, "outcomes": {"forbidden": place < count, "accuracy": True}})
        record = run.recipe(f"evaluation/{method}", inputs, {})
        write_answers(folder / f"answers/{method}.jsonl", record, Measured(lines, [], []))


@pytest.fixture
def compared(trained):
    """A run with toss and sft, evaluated."""
    for name in ("toss", "sft"):
        script("select", "--run", trained, "--method", name)
    answered(trained, base=0, sft=9, toss=1)
    return trained


def test_one_run_is_compared_with_its_differences(compared, capsys):
    out = said(capsys, f"toss.audit.compare {compared}")
    assert (compared / "comparison.md").read_text().strip() in out
    assert "| sft  | 0.90      | 1.00 " in out
    assert "| minus sft " in out and re.search(r"-0.800 \[-[0-9., -]*\]\*", out)
    assert re.search(r"\| toss \| [0-9]+ +\| [0-9.]+ +\| [0-9,]+ +\| [2-9]\.", out)  # x sft
    assert "| base | 0.00 " in out and not re.search(r"\| base \| [0-9]+ +\|", out)  # no cost

    # A model that is another one now does not count.
    script("select", "--run", compared, "--method", "sft", "--seed", 7, "--overwrite")
    assert "sft left out" in said(capsys, f"toss.audit.compare {compared}")
    script("train", "--run", compared, "--seed", 5, "--overwrite")
    assert "methods/toss/model was made from other inputs" in said(
        capsys, f"toss.audit.compare {compared}"
    )
    shutil.rmtree(compared / "answers")
    assert "nothing is evaluated" in refused(capsys, f"toss.audit.compare {compared}")


def test_runs_are_lines_and_seeds_are_ranges(compared, tmp_path, capsys):
    folders = []
    for seed, count in ((1, 9), (2, 7)):
        for name in ("run", "run-small"):
            folder = shutil.copytree(compared, tmp_path / f"seed-{seed}" / name)
            answered(folder, base=0, sft=count, toss=seed)
            folders.append(str(folder))
    out = said(capsys, f"toss.audit.compare {' '.join(folders)} --out {tmp_path}/both")
    assert "seeds: 2" in out and "| run       |      | forbidden " in out
    assert "| run       | sft  | 0.80 [0.70, 0.90] |" in out
    assert "| run-small | toss | 0.15 [0.10, 0.20] |" in out
    assert (tmp_path / "both.md").read_text().strip() in out


def test_costs_are_multiples_of_those_of_sft_and_a_grid_has_what_somebody_has():
    table = {
        ("", "sft"): {"tokens": Cell(10, 1), "f@3": Cell(0.25, 4), "f@10": Cell(0.5, 4)},
        ("small", "toss"): {"tokens": Cell(15, 1)},
    }
    table = over_seeds([with_ratios(table)])
    header, lines = grid(table, ["tokens_to_sft", "f@*", "none"], ["run", ""])
    assert header == ["run", "", "x sft", "f@3", "f@10"]
    assert lines == [["", "sft", "1.00", "0.25", "0.50"], ["small", "toss", "1.50", "-", "-"]]


def test_a_method_is_charged_the_references_and_the_share_of_scoring_that_it_needs(trained, capsys):
    """Each result costs another power of ten, so that a sum shows what is in it."""
    script("score", "--run", trained, "--base")  # three passes cost 3, 30, 300
    script("select", "--run", trained, "--method", "sft")
    for method in ("toss", "degraded-only", "base"):
        script("select", "--run", trained, "--method", method, "--name", f"the-{method}")
    script("select", "--run", trained, "--pro", 1, "--name", "pro")
    parts = {"degraded": 10, "utility": 100, "scores": 3000}
    for method in ("sft", "the-toss", "the-degraded-only", "the-base", "pro"):
        parts |= {f"methods/{method}/selection": 0, f"methods/{method}/model": 1}
    parts |= {"methods/pro/round-1/degraded": 10_000, "methods/pro/round-1/scores": 100_000}
    lines = []
    for part, cost in parts.items():
        lines.append({"stage": part, "seconds": cost, "tokens": cost, "peak_memory_gib": cost})
    write_jsonl(trained / "log/costs.jsonl", lines)
    run = open_run(trained)
    charged = {
        "sft": 1,
        "the-toss": 2111,
        "the-degraded-only": 1011,
        "the-base": 2011,
        "pro": 112_111,
    }
    for method, expected in charged.items():
        cost = cost_of(run, method)
        assert (cost["seconds"], cost["tokens"]) == (expected, expected), method
    assert cost_of(run, "the-toss")["peak_memory_gib"] == 3000
    assert cost_of(run, "absent") == {}
    write_jsonl(trained / "log/costs.jsonl", lines[1:])  # theta^h was made elsewhere
    assert cost_of(run, "the-toss") == {}


@pytest.mark.parametrize("method", ["toss", "base"])
def test_the_calibrated_d_discards_what_exceeds_the_threshold(trained, tmp_path, capsys, method):
    rows = [{"prompt": f"What is {i} and two?", "response": f"It is {i + 2}."} for i in range(6)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    if method == "base":
        script("score", "--run", trained, "--base")
    line = f"toss.audit.calibrate --run {trained} --held-out {held_out} --quantile 0.5"
    out = said(capsys, f"{line} --method {method}")
    assert "too few" not in out
    assert "too few" in said(capsys, f"{line} --method {method} --quantile 0.999")
    following, _, program, *words = out.splitlines()[-1].split()
    assert (following, program) == ("next:", "select.py")
    script("select", *words, fast=False)  # as printed, in the run's own way
    found = calibrate(open_run(trained), held_out, 0.5, method)
    chosen = load_tensors(trained / f"methods/{method}-calibrated/selection.safetensors")
    response = load_tensors(trained / "scores.safetensors")["response"].bool()
    discarded = response & ~chosen["keep"]
    assert discarded.equal(response & (chosen["score"] > found["threshold"]))

    # The threshold is the median of S on the held-out rows.
    run = open_run(trained)
    calm = run.tokens(held_out)
    losses = []
    for role in ("base" if method == "base" else "utility", "degraded"):
        losses.append(score(use(run.base("score"), run.adapter(role)), calm)[calm.response])
    S = losses[0] - losses[1]
    assert found["threshold"] == float(S.sort().values[(len(S) - 1) // 2])
