"""A mask can be made without training, trained from later, and given to other trainers."""

import json
import shutil

import pytest
import torch
from conftest import edit_json, read_jsonl, tree
from helpers import refused, said, same_tensors, succeed
from safetensors.torch import load_file

from toss.workbench.files import write_selection
from toss.workbench.run import open_run

MASK = "selection.safetensors"
ADAPTER = "model/adapter_model.safetensors"


@pytest.fixture
def masked(trained):
    """A run with a mask and no model under methods/toss."""
    succeed(f"select.py --run {trained} --mask-only")
    return trained


def test_mask_only_writes_the_mask_that_training_would_use(masked, capsys):
    method = masked / "methods/toss"
    assert tree(method).keys() == {MASK}
    assert "skipped" in said(capsys, f"select.py --run {masked} --mask-only --dtype bfloat16")
    output = said(capsys, f"select.py --run {masked}")  # the model is made with it
    assert "selection.safetensors exists with equal settings and inputs, skipped" in output
    direct = masked / "methods/direct"
    succeed(f"select.py --run {masked} --name direct")
    assert same_tensors(method / MASK, direct / MASK)
    succeed(f"select.py --run {masked} --mask {method / MASK} --name later")
    for name in ("methods/toss", "methods/later"):
        assert same_tensors(masked / name / ADAPTER, direct / ADAPTER)


def test_another_rate_trains_again_and_selects_nothing_anew(masked, capsys):
    succeed(f"select.py --run {masked}")
    output = said(capsys, f"select.py --run {masked} --lr 0.02 --seed 3 --overwrite")
    assert "methods/toss/selection: " in output and "skipped" in output
    assert output.count(": wrote") == 1
    assert "methods/toss/model: wrote" in output


def test_a_mask_may_hold_weights(masked, tmp_path, capsys):
    """From a program of one's own: they are trained with, kept, and exported."""
    tokens = open_run(masked).tokens(f"{tmp_path}/custom.jsonl")
    weights = tokens.response.float() * torch.linspace(0, 1, len(tokens.response))
    file = tmp_path / "mask.safetensors"
    write_selection(file, tokens, weights > 0, weights=weights)
    succeed(f"select.py --run {masked} --mask {file}")
    assert torch.equal(load_file(masked / "methods/mask" / MASK)["weights"], weights)
    halved = tmp_path / "halved.safetensors"
    write_selection(halved, tokens, weights > 0, weights=weights / 2)
    succeed(f"select.py --run {masked} --mask {halved} --name halved")
    losses = []
    for name in ("mask", "halved"):
        losses.append(read_jsonl(masked / f"log/{name}.jsonl")[0]["loss"])
    assert losses[1] == pytest.approx(losses[0] / 2)
    succeed(f"toss.export --run {masked} --method mask --out {tmp_path}/o.jsonl --weights")
    exported = torch.tensor(sum((row["weights"] for row in read_jsonl(tmp_path / "o.jsonl")), []))
    assert torch.equal(exported, weights)


def test_a_mask_needs_no_model_that_can_be_loaded(base, masked, files, tmp_path, capsys):
    """Masks carry over to models with the same tokenizer, whether they are implemented or not."""
    other = shutil.copytree(base, tmp_path / "other")
    edit_json(other / "config.json", model_type="unknown")
    mask = masked / "methods/toss" / MASK
    run = f"--run {tmp_path}/there"
    line = f"select.py {run} --model {other} --custom {files['custom']} --mask {mask}"
    succeed(f"{line} --mask-only")
    assert "unknown" in refused(capsys, line)
    assert same_tensors(tmp_path / "there/methods/mask" / MASK, mask)
    succeed(f"toss.export {run} --method mask --out {tmp_path}/out.jsonl")


def test_show_takes_a_mask_without_a_model_and_evaluate_passes_over_it(masked, files, capsys):
    assert said(capsys, f"toss.audit.show --run {masked} --method toss --row 0")
    succeed(f"select.py --run {masked} --method sft")
    line = f"toss.audit.evaluate --run {masked} --harmful {files['harmful']} --max-new-tokens 2"
    succeed(line)
    assert json.loads((masked / "metrics.json").read_text()).keys() == {"base", "sft"}


def test_a_mask_alone_does_not_decide_how_a_method_is_trained(masked, capsys):
    """Omitted training settings are those of the references, as without the mask."""
    capsys.readouterr()
    succeed(f"select.py --run {masked} --name trained", fast=False)
    assert "lr = 0.01" in capsys.readouterr().out


def test_a_model_beside_another_mask_than_its_own_is_not_shown_with_it(trained, capsys):
    succeed(f"select.py --run {trained}")
    succeed(f"select.py --run {trained} --discard 0.5 --mask-only --overwrite")
    output = said(capsys, f"toss.audit.diagnose --run {trained} --max-rows 2")
    assert "model was made from other inputs (changed since: methods/toss/selection)" in output
    assert "different: " not in output
