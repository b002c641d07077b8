"""What users bring fits: other trainers, adapters from elsewhere, moved folders, own settings."""

import pytest
import torch
from conftest import read_jsonl
from helpers import said, same_tensors, succeed
from safetensors.torch import load_file

from model.io import read_json
from toss.audit.compare import with_ratios
from toss.audit.measures import Cell
from toss.workbench.progress import Progress
from toss.workbench.run import open_run

# Other trainers


@pytest.mark.parametrize(("method", "left_out"), [("toss", 0), ("sample", 3)])
def test_an_export_holds_the_ids_and_the_kept_tokens_of_every_row(
    method, left_out, trained, tmp_path, capsys
):
    succeed(f"select.py --run {trained} --method {method} --discard 0.3 --mask-only")
    output = said(capsys, f"toss.export --run {trained} --method {method} --out {tmp_path}/m.jsonl")
    run = open_run(trained)
    tokens, _ = run.losses()
    keep = load_file(run.path(f"methods/{method}/selection"))["keep"]
    expected = []
    lines = []
    for start, end in zip(tokens.offsets, tokens.offsets[1:]):
        kept = keep[start:end]
        lines.append(len(expected) if kept.any() else None)
        if kept.any():
            ids = tokens.input_ids[start:end]
            labels = torch.where(kept, ids, -100).tolist()
            mask = [1] * len(ids)
            expected.append({"input_ids": ids.tolist(), "attention_mask": mask, "labels": labels})
    assert read_jsonl(tmp_path / "m.jsonl") == expected
    about = read_json(tmp_path / "m.about.json")
    assert about["line"] == lines
    assert sum(about["kept"]) == keep.sum()
    assert sum(about["response"]) == tokens.response.sum()
    assert lines.count(None) == left_out
    assert f"{left_out} without a kept token" in output


# Adapters from elsewhere


def test_references_from_elsewhere_score_alike(theirs, trained, base, files):
    succeed(f"score.py --run {theirs} --model {base} --custom {files['custom']}")
    assert same_tensors(theirs / "scores.safetensors", trained / "scores.safetensors")


# Settings


# What is printed meanwhile


def test_the_time_left_is_printed_ever_more_rarely(monkeypatch, capsys):
    """Counted from where resumed work goes on."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress("toss")
    progress.on_step({"resumed": 50, "steps": 150})
    for step in range(51, 151):
        now += 10
        progress.on_step({"step": step, "steps": 150})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "toss: step 50 of 150 was reached before; it goes on from there"
    assert lines[1] == "toss: step 51 of 150"  # it also pays for warming up
    assert lines[2] == "toss: step 53 of 150, 16.2 minutes left"
    assert 10 < len(lines) < 40


def test_the_prompts_of_a_batch_share_its_time(monkeypatch, capsys):
    """They are reported one behind the other; nothing is known until a second batch has ended."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress("benign")
    for prompt in range(1, 31):
        if prompt % 10 == 1:
            now += 60
        progress.on_step({"step": prompt, "steps": 60, "unit": "prompt"})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "benign: prompt 1 of 60",
        "benign: prompt 11 of 60",
        "benign: prompt 21 of 60, 3.9 minutes left",
    ]


def test_a_cost_is_a_multiple_of_that_of_plain_fine_tuning_in_the_same_run():
    tokens = {("one", "sft"): 10, ("two", "sft"): 20, ("two", "toss"): 30}
    table = {line: {"tokens": Cell(number, 1)} for line, number in tokens.items()}
    assert with_ratios(table)["two", "toss"]["tokens_to_sft"].value == 1.5
