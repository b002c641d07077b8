"""Every script ends with the command that comes next, and that command runs."""

import shlex
import sys

from conftest import write_jsonl
from helpers import call, said


def next_command(output: str) -> str:
    """The suggested command, as helpers.call takes it: without the interpreter."""
    line = output.splitlines()[-1]
    assert line.startswith("next: ")
    words = shlex.split(line.removeprefix("next: "))
    assert words[0] == sys.executable or words[0].endswith("bin/python")
    if words[1] == "-m":
        return shlex.join(words[2:])
    return shlex.join(words[1:])


def test_the_suggestions_lead_from_training_to_evaluation(
    base, files, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    inputs = f"--model {base} --harmful {files['harmful']} --utility {files['utility']}"
    training = "--lr 1e-2 --epochs 1 --batch-size 4 --rank 2"
    line = next_command(said(capsys, f"train.py --run 'my run' {inputs} {training}"))
    assert line == "score.py --run 'my run' --custom CUSTOM.jsonl"

    line = next_command(said(capsys, line.replace("CUSTOM.jsonl", files["custom"])))
    assert line == "select.py --run 'my run' --method toss"
    line = next_command(said(capsys, line))
    assert line == "select.py --run 'my run' --method sft"
    line = next_command(said(capsys, line))
    assert line.startswith("toss.audit.evaluate --run 'my run' --harmful EVAL_HARMFUL.jsonl")

    for name in ("harmful", "benign", "utility"):
        rows = [{"prompt": "Do harm 9?", "response": "No, 9."}]
        write_jsonl(tmp_path / f"EVAL_{name.upper()}.jsonl", rows)
    assert call(f"{line} --max-new-tokens 2") == 0


def test_behind_a_mask_alone_comes_its_export(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = next_command(said(capsys, f"select.py --run {trained} --mask-only"))
    assert line == f"toss.export --run {trained} --method toss --out toss.jsonl"
    assert call(line) == 0
