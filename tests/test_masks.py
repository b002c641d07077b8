"""A mask can be made without training, trained from later, and given to other trainers."""

import json
import shutil

import pytest
from conftest import edit_json, read_jsonl, tree
from helpers import call, refused, said, same_tensors

from model.io import read_json

MASK = "selection.safetensors"


@pytest.fixture
def masked(trained):
    """A run with a mask and no model under methods/toss."""
    assert call(f"select.py --run {trained} --mask-only") == 0
    return trained


def test_mask_only_writes_the_mask_that_training_would_use_and_training_uses_it(
    masked, monkeypatch, capsys
):
    method = masked / "methods/toss"
    assert tree(method).keys() == {"record.json", MASK}
    assert call(f"select.py --run {masked} --name direct") == 0
    assert same_tensors(method / MASK, masked / "methods/direct" / MASK)

    def no_selection(*_):
        raise AssertionError("the mask was made again")

    monkeypatch.setattr("toss.selection.select_tokens", no_selection)
    assert "the mask that is there is used" in said(capsys, f"select.py --run {masked}")
    adapter = "model/adapter_model.safetensors"
    assert same_tensors(method / adapter, masked / "methods/direct" / adapter)
    record = read_json(method / "record.json")
    assert "mask_only" not in record["settings"] and record["settings"]["lr"] == 1e-2
    assert "skipped" in said(capsys, f"select.py --run {masked}")


def test_the_same_mask_is_skipped_and_another_one_is_not_trained_from(masked, capsys):
    assert "skipped" in said(capsys, f"select.py --run {masked} --mask-only")
    line = f"select.py --run {masked} --discard 0.2"
    assert "discard 0.1 there, 0.2 now" in refused(capsys, line)


def test_a_d_that_decides_nothing_is_not_part_of_what_a_mask_is(trained, capsys):
    line = f"select.py --run {trained} --method first-5 --mask-only"
    assert call(f"{line} --discard 0.1") == 0
    assert "skipped" in said(capsys, f"{line} --discard 0.2")


def test_mask_only_is_skipped_where_a_model_was_trained_with_that_mask(trained, capsys):
    assert call(f"select.py --run {trained}") == 0
    line = f"select.py --run {trained} --mask-only"
    output = said(capsys, line)
    assert "holds this mask, and a model that was trained with it: skipped" in output
    assert "discard 0.1 there, 0.2 now" in refused(capsys, f"{line} --discard 0.2")


def test_the_rounds_of_toss_pro_are_made_once_and_cost_as_much_in_two_steps(trained, capsys):
    line = f"select.py --run {trained} --pro 1 --pro-samples 2"
    assert call(f"{line} --name direct") == 0
    assert call(f"{line} --mask-only") == 0
    assert "toss-pro-round-1" not in said(capsys, line)
    for file in ("round-1/scores.safetensors", "round-1/degraded/adapter_model.safetensors", MASK):
        assert same_tensors(trained / "methods/toss-pro" / file, trained / "methods/direct" / file)
    assert read_jsonl(trained / "methods/toss-pro/round-1/added.jsonl")
    stages = read_json(trained / "run.json")["stages"]
    assert stages["methods/toss-pro"]["tokens"] == stages["methods/direct"]["tokens"]


def test_a_mask_needs_no_model_that_can_be_loaded(base, masked, files, tmp_path, capsys):
    """Masks carry over to models with the same tokenizer, whether they are implemented or not."""
    other = shutil.copytree(base, tmp_path / "other")
    edit_json(other / "config.json", model_type="unknown")
    mask = masked / "methods/toss" / MASK
    run = f"--run {tmp_path}/there"
    line = f"select.py {run} --model {other} --custom {files['custom']} --mask {mask}"
    assert call(f"{line} --mask-only") == 0
    assert "unknown" in refused(capsys, line)
    assert same_tensors(tmp_path / "there/methods/mask" / MASK, mask)
    assert call(f"toss.export {run} --method mask --out {tmp_path}/out.jsonl") == 0


def test_an_export_needs_the_mask_alone_and_has_weights_when_asked(masked, tmp_path):
    out = tmp_path / "train.jsonl"
    assert call(f"toss.export --run {masked} --method toss --out {out} --weights") == 0
    for row in read_jsonl(out):
        assert row.keys() == {"input_ids", "attention_mask", "labels", "weights"}
        assert row["weights"] == [float(label != -100) for label in row["labels"]]


def test_show_takes_a_mask_without_a_model_and_evaluate_passes_over_it(masked, files, capsys):
    assert said(capsys, f"toss.audit.show --run {masked} --method toss --row 0")
    assert call(f"select.py --run {masked} --method sft") == 0
    line = f"toss.audit.evaluate --run {masked} --harmful {files['harmful']} --max-new-tokens 2"
    assert f"{masked}/methods/toss holds a mask and no model: passed over" in said(capsys, line)
    assert json.loads((masked / "metrics.json").read_text()).keys() == {"base", "sft"}


def test_a_mask_alone_does_not_decide_how_a_method_is_trained(trained, capsys):
    """Omitted training settings are those of the references, as without the mask."""
    plain = f"select.py --run {trained}"
    assert call(f"{plain} --mask-only", fast=False) == 0
    capsys.readouterr()
    assert call(plain, fast=False) == 0
    assert "training settings as for degraded: lr = 0.01" in capsys.readouterr().out


def test_an_adapter_beside_a_mask_is_evaluated_and_not_replaced(masked, files, capsys):
    model = masked / "methods/toss/model"
    shutil.copytree(masked / "utility", model)
    before = tree(model)
    assert "give --overwrite" in refused(capsys, f"select.py --run {masked}")
    assert tree(model) == before
    line = f"toss.audit.evaluate --run {masked} --harmful {files['harmful']} --max-new-tokens 2"
    assert "note: toss was made elsewhere" in said(capsys, line)


def test_a_model_that_was_replaced_by_a_mask_is_no_longer_shown(trained, files, capsys):
    assert call(f"select.py --run {trained}") == 0
    line = f"toss.audit.evaluate --run {trained} --harmful {files['harmful']} --max-new-tokens 2"
    assert call(line) == 0
    assert call(f"select.py --run {trained} --discard 0.5 --mask-only --overwrite") == 0
    assert "toss changed since" in refused(capsys, f"toss.audit.compare --run {trained}")
    assert "holds a mask, and no model" in refused(capsys, f"{line} --methods base,toss")


@pytest.mark.parametrize("change", ["damaged", "other code"])
def test_a_mask_that_is_damaged_or_of_other_code_is_made_again(change, masked, monkeypatch, capsys):
    if change == "damaged":
        file = masked / "methods/toss" / MASK
        file.write_bytes(file.read_bytes()[:-1])
    else:
        monkeypatch.setattr("toss.workbench.code.digests", lambda parts: {"select.py": "another"})
    output = said(capsys, f"select.py --run {masked}")
    assert "methods/toss: the mask in " in output
    assert "is made again" in output
    assert (masked / "methods/toss/model").exists()


def test_the_dtype_of_training_does_not_decide_a_mask(trained, capsys):
    assert call(f"select.py --run {trained} --mask-only --dtype bfloat16") == 0
    assert "the mask that is there is used" in said(capsys, f"select.py --run {trained}")
