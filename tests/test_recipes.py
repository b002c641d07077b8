"""The README's recipes run as they are printed."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT, script, write_jsonl
from safetensors.torch import load_file

from toss import config, methods
from toss.audit import experiment

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
    share = lambda chosen: float(D.harmful[chosen].float().mean())
    assert share(gone) > 3 * share(D.response)  # the discarded tokens are mostly harmful ones
    assert all(tensor.abs().max() > 0 for tensor in first["theta"].tensors())


def test_soft_weights_a_new_selection_and_a_new_loss(first):
    soft = run(OTHERS[0], first)
    selection = run(OTHERS[1], soft)  # pasted one after the other
    loss = run(OTHERS[2], selection)
    risky = soft["weights"][~first["keep"] & first["D"].response]
    assert risky.max() < 0.5 < soft["weights"][first["keep"]].mean()
    ranked = selection["losses"]["base"][first["D"].response]
    assert torch.equal(selection["by"], ranked)
    assert ranked[~selection["stays"]].min() >= ranked[selection["stays"]].max()
    assert differ(soft["theta"], first["theta"]) and differ(loss["theta"], first["theta"])


def test_a_method_in_the_two_places_of_the_readme_is_one_of_select(first, trained, monkeypatch):
    surprising = run(OTHERS[1], first)["surprising"]
    monkeypatch.setitem(methods.METHODS, "surprising", surprising)
    monkeypatch.setattr(experiment.script("select"), "METHODS", [*config.METHODS, "surprising"])
    script("score", "--run", trained, "--base", "--overwrite")
    script("select", "--run", trained, "--method", "surprising", "--discard", "0.3")
    losses = load_file(trained / "scores.safetensors")["loss_base"]
    keep = load_file(trained / "methods/surprising/selection.safetensors")["keep"]
    assert 0 < int((~keep).sum()) and losses[~keep].min() >= losses[keep].quantile(0.7)


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
