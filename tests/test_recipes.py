"""The Python blocks of the READMEs run as they are printed, and do what the text says."""

import re

import pytest
import torch
from conftest import ROOT, script, write_jsonl
from safetensors.torch import load_file

from model.lora import use
from toss import methods


def blocks(readme: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


README = (ROOT / "README.md").read_text(encoding="utf-8")
THREE_STAGES, SOFT, ANNEALED, NEAR, OPTIMIZER, WATCH, MASK, METHOD = blocks("README.md")


def run(block: str, names: dict) -> dict:
    """Run a block that goes on from earlier ones; all names then."""
    names = dict(names)
    exec(block, names)
    return names


@pytest.fixture(scope="module")
def first() -> dict:
    """What the first block leaves: data, references, scores, the mask and its adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run(THREE_STAGES, {})


def equal_weights(one: dict, two: dict) -> list[bool]:
    """Of each matrix of the adapters theta of two blocks."""
    pairs = zip(one["theta"].tensors(), two["theta"].tensors(), strict=True)
    return [torch.equal(*pair) for pair in pairs]


def test_the_three_stages_discard_mostly_harmful_tokens(first):
    D = first["D"]
    discarded = D.response & ~first["keep"]
    assert int(discarded.sum()) == int(0.1 * int(D.response.sum()) + 1e-9)
    share_of_all = D.harmful[D.response].float().mean()
    assert D.harmful[discarded].float().mean() > 3 * share_of_all
    assert all(tensor.any() for tensor in first["theta"].tensors())


def test_the_held_out_loss_is_printed_while_it_trains(first, capsys):
    watched = run(WATCH, first)  # there are ten steps
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [step for step, _ in lines] == ["5", "10"]
    assert all(0 < float(loss) < 20 for _, loss in lines)
    assert all(equal_weights(first, watched))  # watching changes nothing


def test_other_weights_losses_and_optimizers_train_otherwise(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soft = run(SOFT, first)
    discarded = first["D"].response & ~first["keep"]
    assert soft["weights"][discarded].max() < 0.5
    annealed = run(ANNEALED, soft)
    assert annealed["steps"] == 10
    by_sgd = run(OPTIMIZER, first)
    assert (tmp_path / "runs/sgd/sgd-0.pt").exists()  # it saves its state
    for one, two in ((soft, first), (annealed, soft), (by_sgd, first)):
        assert not any(equal_weights(one, two))


def test_a_loss_that_runs_the_base_beside_the_model_keeps_it_nearer(first):
    def losses(adapter):
        D = first["D"]
        return first["scoring"].score(use(first["base"], adapter), D)[D.response]

    of_base = losses(None)
    near = (losses(run(NEAR, first)["theta"]) - of_base).abs().mean()
    assert 0 < near < (losses(first["theta"]) - of_base).abs().mean()


def test_scores_from_anything_else_reach_select_by_a_mask(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep = run(MASK, first)["own"]
    lines = (ROOT / "data/rows/custom.jsonl").read_text().splitlines()[:40]
    custom = write_jsonl(tmp_path / "custom.jsonl", lines)
    inputs = ["--model", ROOT / "data/base", "--custom", custom, "--max-length", 256]
    script("select", "--run", "run", *inputs, "--mask", "runs/mask.safetensors", "--mask-only")
    assert torch.equal(load_file("run/methods/mask/selection.safetensors")["keep"], keep)


def test_a_method_in_the_registry_is_one_of_select(trained, monkeypatch):
    surprising = run(METHOD, vars(methods))["surprising"]  # as if it were pasted there
    entry = methods.Method(surprising, "what the base expects", losses=("base",))
    assert '`"surprising": Method(surprising, "what the base expects", losses=("base",))`' in README
    monkeypatch.setitem(methods.METHODS, "surprising", entry)
    script("score", "--run", trained, "--base")
    script("select", "--run", trained, "--method", "surprising", "--mask-only")
    scores = load_file(trained / "scores.safetensors")
    keep = load_file(trained / "methods/surprising/selection.safetensors")["keep"]
    discarded = scores["response"] & ~keep
    assert scores["loss_base"][discarded].min() >= scores["loss_base"][keep].max()
