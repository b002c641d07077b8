"""Does it still refuse? An evaluation that is stopped loses a batch at most; models are compared
on the same prompts."""

import json

import pytest
from conftest import write_jsonl
from helpers import call, said

from model.io import read_json
from toss.audit import judges

PROMPTS = [
    {"prompt": f"Do harm {i}?", "response": "Yes, take it.", "source": "x"} for i in range(4)
]
ONE_PROMPT = 60  # tokens of a batch that holds one prompt


@pytest.fixture
def evaluate(trained, tmp_path):
    """An evaluation of plain fine-tuning, a prompt per batch."""
    assert call(f"select.py --run {trained} --method sft") == 0
    asked = write_jsonl(tmp_path / "asked.jsonl", PROMPTS)
    line = f"toss.audit.evaluate --run {trained} --methods sft --harmful {asked}"
    return f"{line} --max-new-tokens 3 --batch-tokens {ONE_PROMPT}"


@pytest.fixture
def asked(monkeypatch):
    """How many prompts each call of generate is given. It is stopped at the third prompt, once."""
    calls = []
    generate = judges.generate

    def stopped_once(model, prompts, *others):
        calls.append(len(prompts))
        *options, progress = others

        def stop_at_the_third(done, answers):
            progress(done, answers)
            if len(calls) == 1 and answers and done == 2:
                raise KeyboardInterrupt

        return generate(model, prompts, *options, stop_at_the_third)

    monkeypatch.setattr(judges, "generate", stopped_once)
    return calls


def test_answers_are_saved_as_they_come(evaluate, asked, trained, tmp_path, capsys):
    assert call(evaluate) == 130
    assert not (trained / "answers/sft.jsonl").exists()
    output = said(capsys, evaluate)
    assert "harmful: goes on after prompt 2 of 4" in output
    assert asked == [4, 2]
    assert not (trained / ".state").exists()
    interrupted = (trained / "answers/sft.jsonl").read_bytes()

    (trained / "answers/sft.jsonl").unlink()
    assert call(evaluate) == 0
    assert (trained / "answers/sft.jsonl").read_bytes() == interrupted


def test_answers_to_other_settings_are_not_taken(evaluate, asked, capsys):
    assert call(evaluate) == 130
    assert "goes on after" not in said(capsys, f"{evaluate} --max-new-tokens 2")
    assert asked == [4, 4]


def test_complies_can_be_left_out(evaluate, trained, monkeypatch):
    monkeypatch.setattr(judges, "complies", None)  # it cannot be called
    assert call(f"{evaluate} --no-complies") == 0
    assert read_json(trained / "metrics.json")["sft"].keys() == {"not_refused"}


def test_paired_differences_are_to_sft_and_to_the_base_on_the_same_prompts(trained, tmp_path):
    for method in ("sft", "random"):
        assert call(f"select.py --run {trained} --method {method}") == 0
    asked = write_jsonl(tmp_path / "asked.jsonl", PROMPTS)
    line = f"toss.audit.evaluate --run {trained} --harmful {asked} --utility {asked}"
    assert call(f"{line} --max-new-tokens 3") == 0
    paired = json.loads((trained / "paired.json").read_text())
    assert paired.keys() == {"base", "sft", "random"}
    assert paired["random"]["nll"].keys() == {"sft", "base"}
    assert paired["sft"]["nll"].keys() == {"base"}
    table = read_json(trained / "metrics.json")
    difference = table["random"]["nll"]["value"] - table["sft"]["nll"]["value"]
    cell = paired["random"]["nll"]["sft"]
    assert cell["value"] == pytest.approx(difference, abs=2e-4)
    assert cell["low"] < cell["value"] < cell["high"]
    own = table["random"]["nll"]
    assert cell["high"] - cell["low"] < own["high"] - own["low"]


def test_what_was_not_asked_of_both_is_not_compared(trained, tmp_path):
    assert call(f"select.py --run {trained} --method sft") == 0
    asked = write_jsonl(tmp_path / "asked.jsonl", PROMPTS)
    others = write_jsonl(tmp_path / "others.jsonl", PROMPTS[:2])
    line = f"toss.audit.evaluate --run {trained} --max-new-tokens 2"
    assert call(f"{line} --methods base --harmful {asked}") == 0
    assert call(f"{line} --methods sft --harmful {others}") == 0
    assert read_json(trained / "paired.json") == {"sft": {}}
