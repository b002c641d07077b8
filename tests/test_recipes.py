"""The Python blocks of the READMEs run as they are printed, and do what the text says."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script, script_module, write_jsonl
from safetensors.torch import load_file

from model.lora import use
from toss import config, methods
from toss.training import train
from toss.workbench.states import SavedState


def blocks(readme: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


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


def differ(one, two) -> bool:
    """True if two adapters have the same layers and other weights in each."""
    assert one.B.keys() == two.B.keys()
    return not any(torch.equal(one.B[name], two.B[name]) for name in one.B)


def test_the_three_stages_discard_mostly_harmful_tokens(first):
    D = first["D"]
    keep = first["keep"]
    discarded = D.response & ~keep
    assert int(discarded.sum()) == int(0.1 * int(D.response.sum()) + 1e-9)
    assert first["S"][discarded].min() >= first["S"][keep].max()
    share_of_all = D.harmful[D.response].float().mean()
    assert D.harmful[discarded].float().mean() > 3 * share_of_all
    for tensor in first["theta"].tensors():
        assert tensor.abs().max() > 0


def test_the_other_blocks_are_short():
    for block in blocks("README.md")[1:]:
        assert block.count("\n") <= 8


def test_the_held_out_loss_is_printed_while_it_trains(first, capsys):
    watched = run(WATCH.replace("50", "5"), first)  # there are ten steps
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [step for step, _ in lines] == ["5", "10"]
    assert all(0 < float(loss) < 20 for _, loss in lines)
    for before, after in zip(first["theta"].tensors(), watched["theta"].tensors()):
        assert torch.equal(before, after)  # watching changes nothing


def test_soft_weights_and_weights_that_change_with_the_step(first):
    soft = run(SOFT, first)
    discarded = first["D"].response & ~first["keep"]
    assert soft["weights"][discarded].max() < 0.5
    assert soft["weights"][first["keep"]].mean() > 0.5
    assert differ(soft["theta"], first["theta"])

    annealed = run(ANNEALED, soft)
    assert annealed["steps"] == 10
    assert differ(annealed["theta"], soft["theta"])


def test_a_loss_that_runs_the_base_beside_the_model_keeps_it_nearer(first):
    near = run(NEAR, first)
    assert differ(near["theta"], first["theta"])
    D = first["D"]

    def losses(adapter):
        return first["scoring"].score(use(first["base"], adapter), D)[D.response]

    of_base = losses(None)
    distance = (losses(first["theta"]) - of_base).abs().mean()
    assert (losses(near["theta"]) - of_base).abs().mean() < distance


def test_another_optimizer_goes_on_where_it_was_interrupted(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = run(OPTIMIZER, first)
    assert differ(whole["theta"], first["theta"])
    assert not list((tmp_path / "runs/sgd").iterdir())

    def interrupt(event):
        if event.get("step") == 4:
            raise KeyboardInterrupt

    def train_on(on_step):
        arguments = [first["base"], first["D"], first["keep"].float(), first["config"]]
        state = SavedState("parts", "final", minutes=0)
        return train(*arguments, optimizer=whole["sgd"], state=state, on_step=on_step)

    with pytest.raises(KeyboardInterrupt):
        train_on(interrupt)
    events = []
    resumed = train_on(events.append)
    assert events[0] == {"resumed": 3, "steps": 10}
    for tensor, expected in zip(resumed.tensors(), whole["theta"].tensors(), strict=True):
        assert torch.equal(tensor, expected)


def test_scores_from_anything_else_reach_select_by_a_mask(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep = run(MASK, first)["own"]
    lines = (ROOT / "data/rows/custom.jsonl").read_text().splitlines()[:40]
    custom = write_jsonl(tmp_path / "custom.jsonl", lines)
    inputs = ["--model", ROOT / "data/base", "--custom", custom, "--max-length", 256]
    script("select", "--run", "run", *inputs, "--mask", "runs/mask.safetensors")
    written = load_file("run/methods/mask/selection.safetensors")["keep"]
    assert torch.equal(written, keep)
    assert 0 < int(keep.sum()) < int(first["D"].response.sum())


def test_a_method_in_the_two_places_of_the_readme_is_one_of_select(trained, monkeypatch):
    surprising = run(METHOD, vars(methods))["surprising"]  # as if it were pasted there
    monkeypatch.setitem(methods.METHODS, "surprising", surprising)
    monkeypatch.setattr(script_module("select"), "METHODS", [*config.METHODS, "surprising"])
    script("score", "--run", trained, "--base", "--overwrite")
    script("select", "--run", trained, "--method", "surprising", "--discard", "0.3")
    scores = load_file(trained / "scores.safetensors")
    keep = load_file(trained / "methods/surprising/selection.safetensors")["keep"]
    discarded = scores["response"] & ~keep
    assert int(discarded.sum()) > 0
    assert scores["loss_base"][discarded].min() >= scores["loss_base"][keep].max()


# The judges of the audit's README, which are not installed

READ_ANSWERS, *JUDGES = blocks("toss/audit/README.md")


class Judge:
    """Stands for a judge's package: keeps what it is given, and finds every answer harmful."""

    def __init__(self):
        self.Dataset = self

    def load_wildguard(self):
        return self

    def from_dict(self, columns):
        return columns

    def classify(self, items):
        self.items = items
        return [{"response_harmfulness": "harmful"} for _ in items]

    def evaluate_dataset(self, data, judges):
        return {"score": [1.0] * len(data["response"])}


def test_answers_to_harmful_prompts_reach_the_judges(tmp_path, monkeypatch, capsys):
    (tmp_path / "answers").mkdir()
    lines = [{"note": "not an answer"}]
    for name, prompt in (("harmful", "a"), ("harmful", "b"), ("benign", "c")):
        lines.append({"set": name, "source": "", "prompt": prompt, "response": "No."})
    write_jsonl(tmp_path / "answers/toss.jsonl", lines)
    Path(tmp_path / "behaviors.csv").write_text("Behavior,BehaviorID\nb,b_1\n")
    monkeypatch.chdir(tmp_path)
    judge = Judge()
    for name in ("wildguard", "datasets", "strong_reject", "strong_reject.evaluate"):
        monkeypatch.setitem(sys.modules, name, judge)
    for block in JUDGES:
        run(READ_ANSWERS + block, {})
    assert judge.items == [{"prompt": "a", "response": "No."}, {"prompt": "b", "response": "No."}]
    assert capsys.readouterr().out == "1.0\n[1.0, 1.0]\n"
    completions = json.loads((tmp_path / "completions.json").read_text())
    assert completions == {"b_1": [{"test_case": "b", "generation": "No."}]}
