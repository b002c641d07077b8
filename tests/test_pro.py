"""The whole algorithm: references, scores, mask and model, and TOSS-Pro's rounds between them.

The scripts' own main is run, and every adapter, loss and mask that it leaves is compared to the bit
with the paper's steps, written down here once more from `train`, `score` and the two rules.
"""

import pytest
import torch
from conftest import read_jsonl, tree
from helpers import call, refused, said
from safetensors.torch import load_file

from model import load_checkpoint
from model.lora import use
from model.peft import read_adapter
from toss.config import TrainConfig
from toss.rows import read_rows
from toss.scoring import score
from toss.selection import riskiest_rows, select_tokens
from toss.tokens import tokenise
from toss.training import train
from toss.workbench.results import read_record

REFERENCE = TrainConfig(lr=1e-2, epochs=1, batch_size=4, rank=2)  # as train.py is called in tests
FINAL = TrainConfig(lr=0.1, epochs=2, batch_size=4, rank=4)


def by_hand(base, files, tokenizer, rounds, k=3, d=0.1, top=False, keep_eos=False):
    """The paper's steps: adapters by folder, L^u, L^h by folder, the rows added, and the mask."""
    model, theta, L = load_checkpoint(base), {}, {}
    D = {name: tokenise(read_rows(path), tokenizer, 2048) for name, path in files.items()}
    cus = D["custom"]
    for role, name in {"degraded": "harmful", "utility": "utility"}.items():
        theta[role] = train(model, D[name], D[name].response.float(), REFERENCE)
        L[role] = score(use(model, theta[role]), cus)
    ranked = cus.response & (cus.input_ids != tokenizer.eos_id) if keep_eos else cus.response
    ranked, losses, added = ranked.nonzero()[:, 0], {".": L["degraded"]}, []
    for t in range(1, rounds + 1):
        S, folder = (L["utility"] - L["degraded"])[ranked], f"methods/new/round-{t}"
        added = added + [row for row, _ in riskiest_rows(S, cus.row_of(ranked), added, k)]
        learn = torch.full((len(cus.response),), 0.0 if top else 1.0)
        learn[ranked[~select_tokens(S, d)]] = 1
        weights = torch.cat([torch.ones(len(D["harmful"].response)), learn[cus.places(added)]])
        theta_h = train(model, D["harmful"] + cus.take(added), weights, REFERENCE)
        L["degraded"] = losses[folder] = score(use(model, theta_h), cus)
        theta[f"{folder}/degraded"] = theta_h
    keep = cus.response.clone()
    keep[ranked] = select_tokens((L["utility"] - L["degraded"])[ranked], d)
    theta["methods/new/model"] = train(model, cus, keep.float(), FINAL)
    return theta, L["utility"], losses, added, keep


TOP = "--pro 2 --pro-samples 3 --pro-train top --discard 0.2 --keep-eos"
STEPS = {"": {"rounds": 0}, "--pro 2 --pro-samples 3": {"rounds": 2}}
STEPS[TOP] = {"rounds": 2, "top": True, "d": 0.2, "keep_eos": True}


@pytest.mark.parametrize("flags", STEPS)
def test_the_scripts_are_the_papers_steps(trained, base, files, tokenizer, flags):
    """Rounds accumulate rows; theta^h is trained by train.py's settings, not by select.py's."""
    steps = STEPS[flags]
    before = tree(trained / "degraded")
    line = f"select.py --run {trained} --name new --lr 0.1 --epochs 2 --rank 4 {flags}"
    assert call(line) == 0 and tree(trained / "degraded") == before
    theta, utility, losses, added, keep = by_hand(base, files, tokenizer, **steps)
    for name, adapter in theta.items():
        written = read_adapter(load_checkpoint(base), trained / name)
        for ours, expected in zip(written.tensors(), adapter.tensors(), strict=True):
            assert torch.equal(ours, expected), name
    for place, degraded in losses.items():
        scores = load_file(trained / place / "scores.safetensors")
        assert torch.equal(scores["loss_utility"], utility)  # theta^u is scored once
        assert torch.equal(scores["loss_degraded"], degraded)
    rounds = [trained / "methods/new" / f"round-{t + 1}" for t in range(steps["rounds"])]
    assert [line["row"] for place in rounds for line in read_jsonl(place / "added.jsonl")] == added
    assert len(set(added)) == 3 * len(rounds)
    mask = load_file(trained / "methods/new/selection.safetensors")
    assert torch.equal(mask["keep"], keep)
    assert (
        0 < int(keep.sum()) < int((utility > 0).sum())
    )  # a loss is above 0 on each response token


def test_added_jsonl_names_the_token_that_brought_each_row_in(trained, tokenizer):
    assert call(f"select.py --run {trained} --pro 1 --pro-samples 2") == 0
    first, second = read_jsonl(trained / "methods/toss-pro/round-1/added.jsonl")
    scores = load_file(trained / "scores.safetensors")
    S = (scores["loss_utility"] - scores["loss_degraded"]).masked_fill(~scores["response"], -1e9)
    place = int(S.argmax())
    row = int(torch.searchsorted(scores["offsets"], place, right=True)) - 1
    assert (first["row"], first["token"]) == (row, place - int(scores["offsets"][row]))
    text = tokenizer.raw.decode([int(scores["input_ids"][place])], skip_special_tokens=False)
    assert first["text"] == text and first["score"] == pytest.approx(float(S.max()), abs=1e-3)
    assert second["row"] != first["row"] and second["score"] <= first["score"]


def test_k_is_six_percent_of_the_rows_unless_given_and_belongs_to_the_result(trained, capsys):
    line, folder = f"select.py --run {trained} --pro 1", trained / "methods" / "toss-pro"
    assert "1 rows added" in said(capsys, line)  # 0.06 * 10 rows, at least one
    assert "skipped" in said(capsys, line) and read_record(folder)["settings"]["pro"] == 1
    logs = sorted(file.stem for file in (trained / "log").glob("*pro*"))
    assert logs == ["toss-pro", "toss-pro-round-1"]
    for flags in ("--pro-samples 2", "--pro 2", "--pro-train top"):
        assert "different: pro" in refused(capsys, f"{line} {flags}")
    error = refused(capsys, f"select.py --run {trained} --name toss-pro")
    assert "pro 1 there, None now" in error and "--harmful" in error
    half = said(capsys, f"{line} --name half --dtype bfloat16")
    assert "theta^h was trained in float32, and is trained again in bfloat16" in half
    assert call(f"{line} --pro-samples 99 --name all") == 0
    assert len(read_jsonl(trained / "methods/all/round-1/added.jsonl")) == 10  # all there are
