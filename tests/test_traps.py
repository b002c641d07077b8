"""A mistake that would end in a wrong result is said while it can still be mended."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_base, script, write_jsonl
from helpers import call, refused, said

from model.io import load_tensors, made_from, save_tensors

TRAIN = "--lr 1e-2 --epochs 2 --batch-size 4 --rank 2"


@pytest.fixture
def begin(base, files, tmp_path):
    """train.py with all its inputs, in a new run."""
    inputs = f"--model {base} --harmful {files['harmful']} --utility {files['utility']}"
    return f"train.py --run {tmp_path}/new {inputs}"


def test_one_file_for_both_references_is_refused(base, files, tmp_path, capsys):
    twice = f"--harmful {files['harmful']} --utility {files['harmful']}"
    error = refused(capsys, f"train.py --run {tmp_path}/new --model {base} {twice} {TRAIN}")
    assert "--harmful and --utility hold the same rows" in error
    assert not (tmp_path / "new").exists()


def test_equal_scores_are_refused_by_select_with_the_reason(trained, capsys):
    """As of references that were made elsewhere, of one file."""
    scores = trained / "scores.safetensors"
    record = made_from(scores)
    del record["sha256"]
    tensors = load_tensors(scores)
    tensors["loss_utility"] = tensors["loss_degraded"].clone()
    save_tensors(tensors, scores, record)
    error = refused(capsys, f"select.py --run {trained}")
    assert "both references give each token the same loss, so every S is 0" in error


def test_calibrate_refuses_the_runs_own_rows(trained, files, capsys):
    line = f"toss.audit.calibrate --run {trained} --held-out {files['utility']}"
    assert "these are the run's own rows (--utility)" in refused(capsys, line)


def test_a_suggested_command_has_the_file_that_changed(trained, files, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "response": "b"}])
    error = refused(capsys, f"select.py --run {trained} --custom {other}")
    assert f"score.py --run {trained} --custom {other} --overwrite" in error


def test_what_a_reference_learnt_is_said_when_it_is_trained(begin, capsys):
    output = said(capsys, f"{begin} {TRAIN}")
    assert "degraded: loss on 5 of its rows: " in output
    assert "utility: loss on 5 of its rows: " in output
    assert "hardly learnt" not in output


def test_a_reference_that_hardly_learnt_is_a_warning_with_the_flags_that_mend_it(begin, capsys):
    output = said(capsys, f"{begin} --lr 1e-9")
    message = (
        "degraded: warning: it hardly learnt its rows, so S will mean little: give a higher --lr"
    )
    assert message in output


def test_train_shows_the_first_row_of_each_file_under_its_role(begin, capsys):
    output = said(capsys, f"{begin} {TRAIN}")
    harmful, utility = (line for line in output.splitlines() if ", first row: " in line)
    assert harmful.startswith("harmful, first row: ") and "Yes, 0 is easy." in harmful
    assert utility.startswith("utility, first row: ") and "It is 1." in utility


def test_a_base_without_a_chat_template_is_said_to_take_the_human_form(
    base, files, tmp_path, capsys
):
    model = shutil.copytree(base, tmp_path / "plain")
    for name in ("chat_template.jinja", "chat_template.json"):
        (model / name).unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    line = f"select.py --run {tmp_path}/new --method sft --custom {files['custom']}"
    assert "has no chat template, so the human form is used" in said(
        capsys, f"{line} --model {model}"
    )
    chosen = f"{line} --overwrite --template human"
    assert "has no chat template" not in said(capsys, chosen)


def test_select_on_a_new_run_does_not_speak_of_the_demo_first(tmp_path, capsys):
    assert call(f"select.py --run {tmp_path}/new") == 1
    output, error = capsys.readouterr()
    assert f"train.py --run {tmp_path}/new" in error
    assert "demo.json" not in output


def test_rows_that_are_longer_than_the_base_can_see_are_counted(tmp_path, capsys):
    base = make_base(tmp_path / "short", max_position_embeddings=40)
    rows = [{"prompt": "a " * 50, "response": "b"}, {"prompt": "a", "response": "b"}]
    custom = write_jsonl(tmp_path / "custom.jsonl", rows)
    line = f"select.py --run {tmp_path}/new --method sft --model {base} --custom {custom}"
    message = f"warning: 1 rows of {custom} are longer than the 40 tokens of the base"
    assert message in said(capsys, line)


@pytest.mark.parametrize(
    ("place", "file"),
    [
        ("scores.safetensors", "scores.safetensors"),
        ("methods/toss", "methods/toss/selection.safetensors"),
        ("degraded", "degraded/adapter_model.safetensors"),
    ],
)
def test_show_notices_what_was_altered_before_it_says_that_it_fits(place, file, trained, capsys):
    assert call(f"select.py --run {trained}") == 0
    assert "fits" in said(capsys, f"toss.audit.show {trained / place}")
    content = (trained / file).read_bytes()
    (trained / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "was changed" in refused(capsys, f"toss.audit.show {trained / place}")
    assert script("toss.audit.show", trained) == 2


def test_show_does_not_describe_a_checkpoint_that_was_cut_off(base, tmp_path, capsys):
    copy = Path(shutil.copytree(base, tmp_path / "cut"))
    assert "a checkpoint" in said(capsys, f"toss.audit.show {copy}")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused(capsys, f"toss.audit.show {copy}")
