"""Ways to use the scripts beside the plain three: without references, merged, with a mask."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_base, read_jsonl, write_jsonl
from helpers import call, refused, said, same_tensors
from safetensors.torch import load_file

from model import load_adapter, load_checkpoint
from model.io import made_from, save_tensors, tensors_hash
from toss.workbench.results import read_record

ADAPTER = "adapter_model.safetensors"
SELECTION = "selection.safetensors"


def test_plain_fine_tuning_needs_no_references_or_scores(tmp_path, base, files, trained, capsys):
    plain = tmp_path / "plain"
    custom = f"--model {base} --custom {files['custom']}"
    assert call(f"select.py --run {plain} --method sft {custom}") == 0
    keep = load_file(plain / "methods/sft" / SELECTION)["keep"]
    assert torch.equal(keep, load_file(trained / "scores.safetensors")["response"])
    assert call(f"select.py --run {trained} --method sft") == 0  # with them it gives the same
    adapter = f"methods/sft/model/{ADAPTER}"
    assert same_tensors(plain / adapter, trained / adapter)
    assert "begun without these rows" in refused(capsys, f"train.py --run {plain}")


def test_the_base_takes_the_utility_models_place_and_reference_sets_may_be_gone(trained, files):
    Path(files["harmful"]).unlink()
    Path(files["utility"]).unlink()
    assert call(f"score.py --run {trained} --base --overwrite") == 0
    assert call(f"select.py --run {trained} --method base") == 0
    scores = load_file(trained / "scores.safetensors")
    mask = trained / "methods/base-reference" / SELECTION  # `base` is the untuned model
    assert torch.equal(load_file(mask)["score"], scores["loss_base"] - scores["loss_degraded"])


def test_a_merged_checkpoint_is_base_and_adapter_and_has_the_dtype(trained, base, capsys):
    line = f"select.py --run {trained} --merge"
    assert call(line) == 0
    folder = trained / "methods/toss/model"
    ids = torch.arange(40).view(2, 20)
    model = load_checkpoint(base)
    merged = load_checkpoint(folder / "merged")
    assert not torch.allclose(merged(ids), model(ids), atol=1e-3)
    load_adapter(model, folder)
    assert torch.allclose(merged(ids), model(ids), atol=1e-4)
    assert said(capsys, f"toss.audit.show {folder}/merged").endswith(": fits\n")
    for dtype in ("float32", "bfloat16"):
        assert call(f"{line} --overwrite --dtype {dtype}") == 0
        weights = load_file(folder / "merged/model.safetensors")
        assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_merged_checkpoint_has_the_dtype_of_the_stored_base(field, files, tmp_path):
    base = make_base(tmp_path / "base", **{field: "bfloat16"})
    custom = f"--model {base} --custom {files['custom']}"
    assert call(f"select.py --run {tmp_path}/run --method sft --merge {custom}") == 0
    weights = load_file(tmp_path / "run/methods/sft/model/merged/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_mask_travels_to_another_model(trained, tmp_path, files, capsys):
    assert call(f"select.py --run {trained} --keep-eos --discard 0.2") == 0
    mask = trained / "methods/toss" / SELECTION
    other = make_base(tmp_path / "other", seed=1)
    line = (
        f"select.py --run {tmp_path}/new --model {other} --custom {files['custom']} --mask {mask}"
    )
    assert call(line) == 0
    method = tmp_path / "new/methods/mask"
    assert same_tensors(mask, method / SELECTION)
    record = read_record(method)
    assert record["settings"]["method"] == "mask"
    assert record["inputs"]["--mask"] == tensors_hash(mask)
    assert record["base_sha256"] != read_record(mask)["base_sha256"]
    load_adapter(load_checkpoint(other), method / "model")

    # Of the file, the mask alone is an input: not the record in its header.
    shutil.copy(method / SELECTION, mask)
    assert "skipped" in said(capsys, line)
    assert call(f"select.py --run {trained} --discard 0.3 --overwrite") == 0
    assert "--mask" in refused(capsys, line)


def test_a_mask_gives_what_the_method_gave_wherever_the_token_ids_are_equal(
    trained, tmp_path, base, files
):
    assert call(f"select.py --run {trained}") == 0
    mask = trained / "methods/toss" / SELECTION
    assert call(f"select.py --run {trained} --mask {mask} --name again") == 0
    adapter = trained / "methods/toss/model" / ADAPTER
    assert same_tensors(trained / "methods/again/model" / ADAPTER, adapter)
    rows = [{"note": "", **row} for row in read_jsonl(files["custom"])]
    same_ids = write_jsonl(tmp_path / "same.jsonl", rows)
    line = f"select.py --run {tmp_path}/new --model {base} --custom {same_ids} --max-length 999"
    assert call(f"{line} --mask {mask}") == 0
    assert same_tensors(tmp_path / "new/methods/mask/model" / ADAPTER, adapter)


def test_a_mask_that_is_true_on_prompts_is_read_as_the_loss_mask(trained, tmp_path, capsys):
    assert call(f"select.py --run {trained}") == 0
    file = trained / "methods/toss" / SELECTION
    record = made_from(file)
    del record["sha256"]
    keep = load_file(file)["keep"]
    response = load_file(trained / "scores.safetensors")["response"]
    mask = tmp_path / "mask.safetensors"
    save_tensors({"keep": keep | ~response}, mask, record)
    output = said(capsys, f"select.py --run {trained} --mask {mask}")
    assert f"keep is true on {int((~response).sum())} tokens of prompts" in output
    assert torch.equal(load_file(trained / "methods/mask" / SELECTION)["keep"], keep)


def test_rows_in_two_sets_are_warned_of(trained, tmp_path, files, capsys):
    copy = shutil.copyfile(files["harmful"], tmp_path / "copy.jsonl")
    output = said(capsys, f"score.py --run {trained} --custom {copy} --overwrite")
    assert f"warning: 5 of 5 rows of {copy} are in {files['harmful']} too" in output
