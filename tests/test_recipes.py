"""The README's recipes run as they are printed."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT, script, write_jsonl
from safetensors.torch import load_file

from model.lora import use
from toss import config, methods
from toss.audit import experiment
from toss.training import train
from toss.workbench.states import SavedState

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST, *OTHERS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def first() -> dict:
    """What the first block leaves: data, references, scores, the mask and its adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        exec(FIRST, names := {})
    return names


def run(block: str, first: dict) -> dict:
    """Run another block, which continues from the first, in a namespace of its own."""
    exec(block, names := dict(first))
    return names


def differ(one, two) -> bool:
    """True if two adapters have the same layers and other weights in each."""
    assert one.B.keys() == two.B.keys()
    return not any(torch.equal(one.B[name], two.B[name]) for name in one.B)


def test_the_three_stages_from_python(first):
    D, gone = first["D"], first["D"].response & ~first["keep"]
    assert int(gone.sum()) == int(0.1 * int(D.response.sum()) + 1e-9)
    assert first["S"][gone].min() >= first["S"][first["keep"]].max()
    share = D.harmful[gone].float().mean()
    assert share > 3 * D.harmful[D.response].float().mean()  # they are mostly harmful ones
    assert all(tensor.abs().max() > 0 for tensor in first["theta"].tensors())


SOFT, ANNEALED, NEAR, OPTIMIZER, MASK, METHOD = OTHERS


def test_every_block_of_the_readme_is_tested_and_short():
    for block in OTHERS:
        assert block.count("\n") <= 8


def test_soft_weights_and_weights_that_change_with_the_step(first):
    soft = run(SOFT, first)
    risky = soft["weights"][first["D"].response & ~first["keep"]]
    assert risky.max() < 0.5 < soft["weights"][first["keep"]].mean()
    assert differ(soft["theta"], first["theta"])

    annealed = run(ANNEALED, soft)
    assert annealed["steps"] == 10
    assert differ(annealed["theta"], soft["theta"])


def test_a_loss_that_runs_the_base_beside_the_model_keeps_it_nearer(first):
    near = run(NEAR, first)
    assert differ(near["theta"], first["theta"])
    D = first["D"]

    def distance(theta) -> float:
        """How far the losses of the response tokens are from the base's."""
        losses = [first["scoring"].score(use(first["base"], a), D) for a in (None, theta)]
        return float((losses[1] - losses[0])[D.response].abs().mean())

    assert distance(near["theta"]) < distance(first["theta"])


def test_another_optimizer_goes_on_where_it_was_interrupted(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = run(OPTIMIZER, first)
    assert differ(whole["theta"], first["theta"])
    assert not list((tmp_path / "runs/sgd").iterdir())

    def interrupted(event):
        if event.get("step") == 4:
            raise KeyboardInterrupt

    def call(**options):
        state = SavedState("parts", "final", minutes=0)
        arguments = [first["base"], first["D"], first["keep"].float(), first["config"]]
        return train(*arguments, optimizer=whole["sgd"], state=state, **options)

    with pytest.raises(KeyboardInterrupt):
        call(on_step=interrupted)
    events = []
    parts = call(on_step=events.append)
    assert events[0] == {"resumed": 3, "steps": 10}
    for ours, expected in zip(parts.tensors(), whole["theta"].tensors(), strict=True):
        assert torch.equal(ours, expected)


def test_scores_from_anything_else_reach_select_by_a_mask(first, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = run(MASK, first)["own"]
    lines = (ROOT / "data/rows/custom.jsonl").read_text().splitlines()[:40]
    custom = write_jsonl(tmp_path / "custom.jsonl", lines)
    flags = ["--model", ROOT / "data/base", "--custom", custom, "--max-length", 256]
    script("select", "--run", "run", *flags, "--mask", "runs/mask.safetensors")
    written = load_file("run/methods/mask/selection.safetensors")["keep"]
    assert torch.equal(written, own) and 0 < int(own.sum()) < int(first["D"].response.sum())


def test_a_method_in_the_two_places_of_the_readme_is_one_of_select(first, trained, monkeypatch):
    exec(METHOD, names := dict(vars(methods)))  # as if it were pasted there
    surprising = names["surprising"]
    monkeypatch.setitem(methods.METHODS, "surprising", surprising)
    monkeypatch.setattr(experiment.script("select"), "METHODS", [*config.METHODS, "surprising"])
    script("score", "--run", trained, "--base", "--overwrite")
    script("select", "--run", trained, "--method", "surprising", "--discard", "0.3")
    scores = load_file(trained / "scores.safetensors")
    losses = scores["loss_base"]
    keep = load_file(trained / "methods/surprising/selection.safetensors")["keep"]
    gone = scores["response"] & ~keep
    assert int(gone.sum()) > 0
    assert losses[gone].min() >= losses[keep].max()


AUDIT = (ROOT / "toss/audit/README.md").read_text(encoding="utf-8")
JUDGES = re.findall(r"^```python\n(.*?)^```", AUDIT, re.DOTALL | re.MULTILINE)


class Stub:
    """Stands for a judge's package: keeps what it is given, and finds every answer harmful."""

    def __init__(self):
        self.load_wildguard = self.from_dict = lambda *given: self
        self.Dataset = self

    def classify(self, items):
        self.asked = items
        return [{"response_harmfulness": "harmful"} for _ in items]

    def evaluate_dataset(self, data, judges):
        return {"score": [1.0]}


def test_answers_reach_the_judges(tmp_path, monkeypatch, capsys):
    """The blocks that hand answers on, up to the judges, which are not installed."""
    (tmp_path / "answers").mkdir()
    said = [{"set": "harmful", "source": "", "prompt": p, "response": "No."} for p in ("a", "b")]
    lines = [{"note": "x"}, *said, {**said[0], "set": "benign", "prompt": "c"}]
    write_jsonl(tmp_path / "answers/toss.jsonl", lines)
    (tmp_path / "behaviors.csv").write_text("Behavior,BehaviorID\nb,b_1\n")
    monkeypatch.chdir(tmp_path)
    stub = Stub()
    for name in ("wildguard", "datasets", "strong_reject", "strong_reject.evaluate"):
        monkeypatch.setitem(sys.modules, name, stub)
    for block in JUDGES[1:]:
        exec(JUDGES[0] + block, {})
    assert stub.asked == [{"prompt": p, "response": "No."} for p in ("a", "b")]
    assert capsys.readouterr().out == "1.0\n[1.0]\n"
    found = json.loads((tmp_path / "completions.json").read_text())
    assert found == {"b_1": [{"test_case": "b", "generation": "No."}]}
