"""A mask can be made without training, trained from later, and given to other trainers."""

import json
import shutil

import pytest
import torch
from conftest import edit_json, read_jsonl, tree
from helpers import call, refused, said, same_tensors
from safetensors.torch import load_file

from model.io import read_json

MASK = "selection.safetensors"


def test_mask_only_writes_the_mask_that_training_would_use(trained, capsys):
    output = said(capsys, f"select.py --run {trained} --mask-only --name mask")
    assert "response tokens discarded" in output
    assert sorted(path.name for path in (trained / "methods/mask").iterdir()) == [
        "record.json",
        MASK,
    ]
    assert call(f"select.py --run {trained}") == 0
    assert same_tensors(trained / "methods/mask" / MASK, trained / "methods/toss" / MASK)


def test_the_same_command_without_the_flag_trains_from_that_mask(trained, monkeypatch, capsys):
    assert call(f"select.py --run {trained} --name direct") == 0
    assert call(f"select.py --run {trained} --mask-only") == 0

    def no_selection(*_):
        raise AssertionError("the mask was made again")

    monkeypatch.setattr("toss.selection.select_tokens", no_selection)
    assert "the mask that is there is used" in said(capsys, f"select.py --run {trained}")
    adapter = "model/adapter_model.safetensors"
    assert same_tensors(trained / "methods/toss" / adapter, trained / "methods/direct" / adapter)
    record = read_json(trained / "methods/toss/record.json")
    assert "mask_only" not in record["settings"] and record["settings"]["lr"] == 1e-2
    assert "skipped" in said(capsys, f"select.py --run {trained}")


def test_mask_only_is_skipped_where_its_mask_is_there(trained, capsys):
    assert call(f"select.py --run {trained} --mask-only") == 0
    assert "skipped" in said(capsys, f"select.py --run {trained} --mask-only")


def test_mask_only_is_skipped_where_a_model_was_trained_with_that_mask(trained, capsys):
    assert call(f"select.py --run {trained}") == 0
    output = said(capsys, f"select.py --run {trained} --mask-only")
    assert "holds this mask, and a model that was trained with it: skipped" in output
    assert "discard 0.1 there, 0.2 now" in refused(
        capsys, f"select.py --run {trained} --mask-only --discard 0.2"
    )


def test_another_mask_is_not_trained_from(trained, capsys):
    assert call(f"select.py --run {trained} --mask-only --discard 0.2") == 0
    assert "discard 0.2 there, 0.1 now" in refused(capsys, f"select.py --run {trained}")


def test_the_rounds_of_toss_pro_are_made_once(trained, capsys):
    line = f"select.py --run {trained} --pro 1 --pro-samples 2"
    assert call(f"{line} --name direct") == 0
    assert call(f"{line} --mask-only") == 0
    output = said(capsys, line)
    assert "toss-pro-round-1" not in output
    for file in ("round-1/scores.safetensors", "round-1/degraded/adapter_model.safetensors", MASK):
        assert same_tensors(trained / "methods/toss-pro" / file, trained / "methods/direct" / file)
    assert read_jsonl(trained / "methods/toss-pro/round-1/added.jsonl")


def test_a_mask_needs_no_model_that_can_be_loaded(base, trained, files, tmp_path, capsys):
    """Masks carry over to models with the same tokenizer, whether they are implemented or not."""
    assert call(f"select.py --run {trained} --mask-only") == 0
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    edit_json(other / "config.json", model_type="unknown")
    mask = trained / "methods/toss" / MASK
    line = (
        f"select.py --run {tmp_path}/there --model {other} --custom {files['custom']} --mask {mask}"
    )
    assert call(f"{line} --mask-only") == 0
    assert "unknown" in refused(capsys, line)
    assert same_tensors(tmp_path / "there/methods/mask" / MASK, mask)
    assert call(f"toss.export --run {tmp_path}/there --method mask --out {tmp_path}/out.jsonl") == 0


def test_mask_only_and_merge_contradict_each_other(trained, capsys):
    assert "--merge" in refused(capsys, f"select.py --run {trained} --mask-only --merge")


def test_an_export_needs_the_mask_alone_and_has_weights_when_asked(trained, tmp_path, capsys):
    assert call(f"select.py --run {trained} --mask-only") == 0
    out = tmp_path / "train.jsonl"
    assert call(f"toss.export --run {trained} --method toss --out {out} --weights") == 0
    keep = load_file(trained / "methods/toss" / MASK)["keep"]
    rows = read_jsonl(out)
    assert rows[0].keys() == {"input_ids", "attention_mask", "labels", "weights"}
    weights = torch.tensor([weight for row in rows for weight in row["weights"]])
    labels = torch.tensor([label for row in rows for label in row["labels"]])
    assert torch.equal(weights, (labels != -100).float())
    assert int(weights.sum()) == int(keep.sum())


def test_without_the_flag_an_export_has_exactly_the_three_columns(trained, tmp_path):
    assert call(f"select.py --run {trained} --mask-only") == 0
    assert call(f"toss.export --run {trained} --method toss --out {tmp_path}/train.jsonl") == 0
    assert read_jsonl(tmp_path / "train.jsonl")[0].keys() == {
        "input_ids",
        "attention_mask",
        "labels",
    }


@pytest.mark.parametrize("line", ["toss.audit.show --run {run} --method toss --row 0"])
def test_what_needs_only_the_mask_takes_it(trained, line, capsys):
    assert call(f"select.py --run {trained} --mask-only") == 0
    assert said(capsys, line.format(run=trained))


def test_evaluate_passes_over_a_mask_without_a_model(trained, files, capsys):
    assert call(f"select.py --run {trained} --mask-only") == 0
    assert call(f"select.py --run {trained} --method sft") == 0
    line = f"toss.audit.evaluate --run {trained} --harmful {files['harmful']} --max-new-tokens 2"
    assert f"{trained}/methods/toss holds a mask and no model: passed over" in said(capsys, line)
    assert json.loads((trained / "metrics.json").read_text()).keys() == {"base", "sft"}


def test_a_mask_alone_does_not_decide_how_a_method_is_trained(trained, capsys):
    """Omitted training settings are those of the references, as without the mask."""
    plain = f"select.py --run {trained}"
    assert call(f"{plain} --mask-only", fast=False) == 0
    capsys.readouterr()
    assert call(plain, fast=False) == 0
    assert "training settings as for degraded: lr = 0.01" in capsys.readouterr().out


def test_an_adapter_beside_a_mask_is_evaluated_and_not_replaced(trained, files, capsys):
    assert call(f"select.py --run {trained} --mask-only") == 0
    model = trained / "methods/toss/model"
    shutil.copytree(trained / "utility", model)
    before = tree(model)
    assert "give --overwrite" in refused(capsys, f"select.py --run {trained}")
    assert tree(model) == before
    line = f"toss.audit.evaluate --run {trained} --harmful {files['harmful']} --max-new-tokens 2"
    assert "note: toss was made elsewhere" in said(capsys, line)


def test_a_model_that_was_replaced_by_a_mask_is_no_longer_shown(trained, files, capsys):
    assert call(f"select.py --run {trained}") == 0
    line = f"toss.audit.evaluate --run {trained} --harmful {files['harmful']} --max-new-tokens 2"
    assert call(line) == 0
    assert call(f"select.py --run {trained} --discard 0.5 --mask-only --overwrite") == 0
    assert "toss changed since" in refused(capsys, f"toss.audit.compare --run {trained}")
    assert "holds a mask, and no model" in refused(capsys, f"{line} --methods base,toss")


def test_what_two_steps_took_is_what_one_takes(trained):
    line = f"select.py --run {trained} --pro 1 --pro-samples 2"
    assert call(f"{line} --name whole") == 0
    assert call(f"{line} --name parts --mask-only") == 0
    assert call(f"{line} --name parts") == 0
    stages = read_json(trained / "run.json")["stages"]
    assert stages["methods/parts"]["tokens"] == stages["methods/whole"]["tokens"]


@pytest.mark.parametrize("change", ["damaged", "other code"])
def test_a_mask_that_is_damaged_or_of_other_code_is_made_again(
    change, trained, monkeypatch, capsys
):
    assert call(f"select.py --run {trained} --mask-only") == 0
    if change == "damaged":
        file = trained / "methods/toss" / MASK
        file.write_bytes(file.read_bytes()[:-1])
    else:
        monkeypatch.setattr("toss.workbench.code.digests", lambda parts: {"select.py": "another"})
    output = said(capsys, f"select.py --run {trained}")
    assert "methods/toss: the mask in " in output
    assert "is made again" in output
    assert (trained / "methods/toss/model").exists()


def test_the_dtype_of_training_does_not_decide_a_mask(trained, capsys):
    assert call(f"select.py --run {trained} --mask-only --dtype bfloat16") == 0
    assert "the mask that is there is used" in said(capsys, f"select.py --run {trained}")
