"""What users bring fits: other trainers, adapters from elsewhere, moved folders, own settings."""

import pytest
import torch
from conftest import fails, read_jsonl
from helpers import call, refused, results_in, said, same_tensors, succeed, talk
from safetensors.torch import load_file

from model import load_tokenizer
from model.io import InputError, read_json
from toss.audit.compare import with_ratios
from toss.audit.measures import Cell
from toss.workbench.run import open_run

# Other trainers


@pytest.mark.parametrize("method", ["toss --discard 0.4", "sft", "sample --discard 0.2"])
def test_an_export_holds_the_ids_and_the_kept_tokens_of_every_row(
    method, trained, tmp_path, capsys
):
    succeed(f"select.py --run {trained} --name m --method {method} --mask-only")
    output = said(capsys, f"toss.export --run {trained} --method m --out {tmp_path}/m.jsonl")
    run = open_run(trained)
    tokens, _ = run.losses()
    keep = load_file(run.path("methods/m/selection"))["keep"]
    about = read_json(tmp_path / "m.about.json")
    assert about["tokenizer_sha256"] == run.identity()["tokenizer_sha256"]

    expected = []
    for i in range(tokens.rows):
        places = tokens.places([i])
        ids = tokens.input_ids[places]
        assert about["response"][i] == tokens.response[places].sum()
        assert about["kept"][i] == keep[places].sum()
        assert about["line"][i] == (len(expected) if keep[places].any() else None)
        if keep[places].any():
            labels = torch.where(keep[places], ids, -100).tolist()
            mask = [1] * len(ids)
            expected.append({"input_ids": ids.tolist(), "attention_mask": mask, "labels": labels})
    assert read_jsonl(tmp_path / "m.jsonl") == expected
    left_out = tokens.rows - len(expected)
    assert (left_out > 0) == method.startswith("sample")
    assert f"{left_out} without a kept token" in output


# Adapters from elsewhere


def test_references_from_elsewhere_score_alike(theirs, trained, base, files):
    succeed(f"score.py --run {theirs} --model {base} --custom {files['custom']}")
    assert same_tensors(theirs / "scores.safetensors", trained / "scores.safetensors")


# Settings


def test_template_kwargs_are_used_recorded_inherited_and_checked(place, files, capsys):
    turns = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    (place / "base/chat_template.jinja").write_text("{{ enable_thinking }}" + turns)

    def chat(**variables):
        return load_tokenizer(place / "base", template_kwargs=variables).chat

    assert chat(enable_thinking="yes").render(talk("a"), True).startswith("yesa")
    fails("has no enable_thinkng", chat, enable_thinkng=True)
    fails("has no messages to set", chat, messages=[])  # the conversation is not an option

    line = f"select.py --run {place}/new --method sft"
    value = '{"enable_thinking": true}'
    given = f"--model {place}/base --custom {files['custom']} --chat-template-kwargs '{value}'"
    said(capsys, f"{line} {given}")
    assert read_json(place / "new/run.json")["chat_template_kwargs"] == value
    assert "skipped" in said(capsys, line)
    error = refused(capsys, f"{line} --chat-template-kwargs '{{}}'")
    assert "was begun with another base or prompt form (tokenizer_sha256)" in error


# What is printed meanwhile


@pytest.mark.parametrize(
    ("line", "plan"),
    [
        ("train.py --rank 3", "degraded: 2 steps of 5 rows"),
        ("score.py --dtype bfloat16", "scores-utility: 530 tokens of 10 rows, the longest"),
        ("select.py --pro 1", "toss-pro-round-1: 2 steps of 6 rows"),
    ],
)
def test_the_plan_is_printed_before_weights_are_loaded(line, plan, trained, monkeypatch, capsys):
    """And before anything is written."""

    def no_weights(*_, **__):
        raise InputError("no weights today")

    monkeypatch.setattr("toss.workbench.base.load_checkpoint", no_weights)
    before = results_in(trained)
    assert call(f"{line} --run {trained} --overwrite") == 1
    captured = capsys.readouterr()
    assert plan in captured.out
    assert captured.err == "error: no weights today\n"
    assert results_in(trained) == before


def test_a_cost_is_a_multiple_of_that_of_plain_fine_tuning_in_the_same_run():
    tokens = {("one", "sft"): 10, ("two", "sft"): 20, ("two", "toss"): 30}
    table = {line: {"tokens": Cell(number, 1)} for line, number in tokens.items()}
    assert with_ratios(table)["two", "toss"]["tokens_to_sft"].value == 1.5
