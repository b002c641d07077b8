"""Ways to use the scripts beside the plain three: without references, merged, with a mask."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_base
from helpers import refused, said, same_tensors, succeed
from safetensors.torch import load_file, save_file

from model import load_adapter, load_checkpoint
from model.io import made_from, save_tensors, tensors_hash
from toss.scoring import score
from toss.workbench.records import read_record
from toss.workbench.run import open_run

ADAPTER = "adapter_model.safetensors"
SELECTION = "selection.safetensors"


@pytest.fixture
def mask(trained) -> Path:
    """The mask that a method of the run was trained with."""
    succeed(f"select.py --run {trained}")
    return trained / "methods/toss" / SELECTION


def test_plain_fine_tuning_gives_the_same_without_references_and_scores(tmp_path, base, trained):
    plain = tmp_path / "plain"
    custom = f"--model {base} --custom {tmp_path}/custom.jsonl"
    succeed(f"select.py --run {plain} --method sft {custom}")
    succeed(f"select.py --run {trained} --method sft")
    keep = load_file(plain / "methods/sft" / SELECTION)["keep"]
    assert torch.equal(keep, load_file(trained / "scores.safetensors")["response"])
    adapter = f"methods/sft/model/{ADAPTER}"
    assert same_tensors(plain / adapter, trained / adapter)


def test_the_base_takes_the_utility_models_place_and_reference_sets_may_be_gone(
    trained, model, files, capsys
):
    Path(files["harmful"]).unlink()
    Path(files["utility"]).unlink()
    succeed(f"select.py --run {trained}")
    losses = load_file(trained / "scores.safetensors")
    succeed(f"score.py --run {trained} --base")  # adds them, and no selection is stale
    scores = load_file(trained / "scores.safetensors")
    assert scores.keys() - losses.keys() == {"loss_base"}
    assert all(torch.equal(losses[name], scores[name]) for name in losses)
    for line in ("score.py --base", "select.py"):
        assert "inputs, skipped" in said(capsys, f"{line} --run {trained}")
    succeed(f"select.py --run {trained} --method base")
    scores = load_file(trained / "scores.safetensors")
    assert torch.equal(scores["loss_base"], score(model, open_run(trained).losses()[0]))
    S = load_file(trained / "methods/base-reference" / SELECTION)["score"]
    assert torch.equal(S, scores["loss_base"] - scores["loss_degraded"])


def test_a_merged_checkpoint_is_base_and_adapter(trained, base, capsys):
    line = f"select.py --run {trained} --merge"
    succeed(line)
    folder = trained / "methods/toss/model"
    ids = torch.arange(40).view(2, 20)
    model = load_checkpoint(base)
    merged = load_checkpoint(folder / "merged")
    assert not torch.allclose(merged(ids), model(ids), atol=1e-3)
    load_adapter(model, folder)
    assert torch.allclose(merged(ids), model(ids), atol=1e-4)


def dtypes_of(file: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(file).values()}


def test_a_merged_checkpoint_has_the_dtype_of_the_stored_base(files, tmp_path):
    """Which its config.json need not name: here it says float32."""
    base = make_base(tmp_path / "base", torch_dtype="float32")
    weights = base / "model.safetensors"
    halved = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(halved, weights, {"format": "pt"})
    custom = f"--model {base} --custom {files['custom']}"
    succeed(f"select.py --run {tmp_path}/run --method sft --merge {custom}")
    merged = tmp_path / "run/methods/sft/model/merged"
    assert dtypes_of(merged / "model.safetensors") == {torch.bfloat16}


def test_a_mask_travels_to_another_model(mask, trained, tmp_path, capsys):
    other = make_base(tmp_path / "other", seed=1)
    new = f"select.py --run {tmp_path}/new --model {other} --custom {tmp_path}/custom.jsonl"
    line = f"{new} --mask {mask}"
    succeed(line)
    method = tmp_path / "new/methods/mask"
    assert same_tensors(mask, method / SELECTION)
    record = read_record(method / SELECTION)
    assert record["settings"] == {"method": "mask"}
    assert record["inputs"]["--mask"] == tensors_hash(mask)
    assert record["base_sha256"] != read_record(mask)["base_sha256"]

    # Of the file, the mask alone is an input: not the record in its header.
    shutil.copy(method / SELECTION, mask)
    assert "skipped" in said(capsys, line)
    succeed(f"select.py --run {trained} --discard 0.3 --overwrite")
    assert "--mask" in refused(capsys, line)


def test_a_mask_that_is_true_on_prompts_is_read_as_the_loss_mask(mask, trained, tmp_path, capsys):
    record = made_from(mask)
    del record["sha256"]
    keep = load_file(mask)["keep"]
    prompts = ~load_file(trained / "scores.safetensors")["response"]
    changed = tmp_path / "mask.safetensors"
    save_tensors({"keep": keep | prompts}, changed, record)
    output = said(capsys, f"select.py --run {trained} --mask {changed}")
    assert f"keep is true on {int(prompts.sum())} tokens of prompts" in output
    assert torch.equal(load_file(trained / "methods/mask" / SELECTION)["keep"], keep)
