"""A mask can be made without training, trained from later, and given to other trainers."""

import json
import shutil

import pytest
from conftest import edit_json, read_jsonl, tree
from helpers import refused, said, same_tensors, succeed

MASK = "selection.safetensors"
ADAPTER = "model/adapter_model.safetensors"


@pytest.fixture
def masked(trained):
    """A run with a mask and no model under methods/toss."""
    succeed(f"select.py --run {trained} --mask-only")
    return trained


def test_mask_only_writes_the_mask_that_training_would_use(trained, capsys):
    output = said(capsys, f"select.py --run {trained} --mask-only")
    assert "lr =" not in output and "per second" not in output  # it trains nothing
    method = trained / "methods/toss"
    assert tree(method).keys() == {"record.json", MASK}
    assert "skipped" in said(capsys, f"select.py --run {trained} --mask-only")
    succeed(f"select.py --run {trained} --name direct")
    assert same_tensors(method / MASK, trained / "methods/direct" / MASK)


def test_a_mask_alone_is_trained_from_by_its_file_or_made_again_with_a_model(masked, capsys):
    direct = masked / "methods/direct"
    succeed(f"select.py --run {masked} --name direct")
    mask = masked / "methods/toss" / MASK
    succeed(f"select.py --run {masked} --mask {mask} --name later")
    assert same_tensors(masked / "methods/later" / ADAPTER, direct / ADAPTER)
    assert "different: mask_only" in refused(capsys, f"select.py --run {masked}")
    succeed(f"select.py --run {masked} --overwrite")
    assert same_tensors(masked / "methods/toss" / ADAPTER, direct / ADAPTER)
    line = f"select.py --run {masked} --mask-only"  # it would remove the model
    assert "beside it the mask if it was trained here" in refused(capsys, line)


def test_a_mask_needs_no_model_that_can_be_loaded(base, masked, files, tmp_path, capsys):
    """Masks carry over to models with the same tokenizer, whether they are implemented or not."""
    other = shutil.copytree(base, tmp_path / "other")
    edit_json(other / "config.json", model_type="unknown")
    mask = masked / "methods/toss" / MASK
    run = f"--run {tmp_path}/there"
    line = f"select.py {run} --model {other} --custom {files['custom']} --mask {mask}"
    succeed(f"{line} --mask-only")
    assert "unknown" in refused(capsys, f"{line} --overwrite")
    assert same_tensors(tmp_path / "there/methods/mask" / MASK, mask)
    succeed(f"toss.export {run} --method mask --out {tmp_path}/out.jsonl")


def test_an_export_needs_the_mask_alone_and_has_weights_when_asked(masked, tmp_path):
    out = tmp_path / "train.jsonl"
    succeed(f"toss.export --run {masked} --method toss --out {out} --weights")
    for row in read_jsonl(out):
        assert row.keys() == {"input_ids", "attention_mask", "labels", "weights"}
        assert row["weights"] == [float(label != -100) for label in row["labels"]]


def test_show_takes_a_mask_without_a_model_and_evaluate_passes_over_it(masked, files, capsys):
    assert said(capsys, f"toss.audit.show --run {masked} --method toss --row 0")
    succeed(f"select.py --run {masked} --method sft")
    line = f"toss.audit.evaluate --run {masked} --harmful {files['harmful']} --max-new-tokens 2"
    assert f"{masked}/methods/toss holds a mask and no model: passed over" in said(capsys, line)
    assert json.loads((masked / "metrics.json").read_text()).keys() == {"base", "sft"}


def test_a_mask_alone_does_not_decide_how_a_method_is_trained(trained, capsys):
    """Omitted training settings are those of the references, as without the mask."""
    plain = f"select.py --run {trained}"
    succeed(f"{plain} --mask-only", fast=False)
    capsys.readouterr()
    succeed(f"{plain} --name trained", fast=False)
    assert "training settings as for degraded: lr = 0.01" in capsys.readouterr().out


def test_an_adapter_beside_a_mask_is_evaluated_and_not_replaced(masked, files, capsys):
    model = masked / "methods/toss/model"
    shutil.copytree(masked / "utility", model)
    before = tree(model)
    assert "give --overwrite" in refused(capsys, f"select.py --run {masked}")
    assert tree(model) == before
    line = f"toss.audit.evaluate --run {masked} --harmful {files['harmful']} --max-new-tokens 2"
    said(capsys, line)
    assert "note: toss was made elsewhere" in said(capsys, f"toss.audit.compare {masked}")


def test_a_model_that_was_replaced_by_a_mask_is_no_longer_shown(trained, files, capsys):
    succeed(f"select.py --run {trained}")
    line = f"toss.audit.evaluate --run {trained} --harmful {files['harmful']} --max-new-tokens 2"
    succeed(line)
    succeed(f"select.py --run {trained} --discard 0.5 --mask-only --overwrite")
    assert "toss left out: " in said(capsys, f"toss.audit.compare {trained}")
    assert "holds a mask, and no model" in refused(capsys, f"{line} --methods base,toss")


def test_the_dtype_of_training_does_not_decide_a_mask(trained, capsys):
    line = f"select.py --run {trained} --mask-only"
    succeed(line)
    assert "skipped" in said(capsys, f"{line} --dtype bfloat16")
