"""The scripts are the paper's algorithm: references, scores, TOSS-Pro's rounds, mask and model.

The scripts' own main is run, and every adapter, loss and mask that it leaves is compared to the bit
with the paper's steps, written down here once more from `train`, `score` and the two rules.
"""

from pathlib import Path

import pytest
import torch
from conftest import read_jsonl
from helpers import call
from safetensors.torch import load_file

from model import load_checkpoint
from model.lora import Adapter, use
from model.peft import read_adapter
from toss.config import TrainConfig
from toss.rows import read_rows
from toss.scoring import score
from toss.selection import riskiest_rows, select_tokens
from toss.tokens import Tokens, tokenise
from toss.training import train

REFERENCE = TrainConfig(lr=1e-2, epochs=1, batch_size=4, rank=2)  # as train.py is called in tests
FINAL = TrainConfig(lr=0.1, epochs=2, batch_size=4, rank=4)
K = 3


def tokens_of(file: str, tokenizer) -> Tokens:
    return tokenise(read_rows(file), tokenizer, 2048)


def is_written(adapter: Adapter, folder: Path, model) -> bool:
    """True if a folder holds this adapter, to the bit."""
    pairs = zip(read_adapter(model, folder).tensors(), adapter.tensors(), strict=True)
    return all(torch.equal(written, expected) for written, expected in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 0, "d": 0.1, "top": False, "keep_eos": False},
        {"rounds": 2, "d": 0.1, "top": False, "keep_eos": False},
        {"rounds": 2, "d": 0.2, "top": True, "keep_eos": True},
    ],
)
def test_the_scripts_are_the_papers_steps(options, trained, base, files, tokenizer):
    """Rounds accumulate rows; theta^h is trained by train.py's settings, not by select.py's."""
    rounds = options["rounds"]
    d = options["d"]
    line = f"select.py --run {trained} --name new --lr 0.1 --epochs 2 --rank 4 --discard {d}"
    if rounds:
        line += f" --pro {rounds} --pro-samples {K}"
    if options["top"]:
        line += " --pro-train top"
    if options["keep_eos"]:
        line += " --keep-eos"
    assert call(line) == 0

    # Stage 1: the references.
    model = load_checkpoint(base)
    D_h = tokens_of(files["harmful"], tokenizer)
    D_u = tokens_of(files["utility"], tokenizer)
    theta_h = train(model, D_h, D_h.response.float(), REFERENCE)
    theta_u = train(model, D_u, D_u.response.float(), REFERENCE)
    assert is_written(theta_h, trained / "degraded", model)
    assert is_written(theta_u, trained / "utility", model)

    # Stage 2: the losses of the custom set.
    D_cus = tokens_of(files["custom"], tokenizer)
    L_u = score(use(model, theta_u), D_cus)
    L_h = score(use(model, theta_h), D_cus)
    scores = load_file(trained / "scores.safetensors")
    assert torch.equal(scores["loss_utility"], L_u)
    assert torch.equal(scores["loss_degraded"], L_h)

    # TOSS-Pro: the riskiest rows join D^h, and theta^h is trained again from the base.
    competes = D_cus.response
    if options["keep_eos"]:
        competes = competes & (D_cus.input_ids != tokenizer.eos_id)
    ranked = competes.nonzero()[:, 0]
    added = []
    for t in range(1, rounds + 1):
        folder = trained / "methods/new" / f"round-{t}"
        S = (L_u - L_h)[ranked]
        new = [row for row, _ in riskiest_rows(S, D_cus.row_of(ranked), added, K)]
        assert [line["row"] for line in read_jsonl(folder / "added.jsonl")] == new
        added += new
        assert len(set(added)) == K * t
        weights = torch.zeros(len(L_u)) if options["top"] else D_cus.response.float()
        weights[ranked[~select_tokens(S, d)]] = 1
        weights = torch.cat([D_h.response.float(), weights[D_cus.places(added)]])
        theta_h = train(model, D_h + D_cus.take(added), weights, REFERENCE)
        assert is_written(theta_h, folder / "degraded", model)
        L_h = score(use(model, theta_h), D_cus)
        scores = load_file(folder / "scores.safetensors")
        assert torch.equal(scores["loss_degraded"], L_h)
        assert torch.equal(scores["loss_utility"], L_u)  # theta^u is scored once

    # Stage 3: the mask, and the base fine-tuned with it.
    keep = D_cus.response.clone()
    keep[ranked] = select_tokens((L_u - L_h)[ranked], d)
    assert 0 < int(keep.sum()) < int(D_cus.response.sum())
    selection = load_file(trained / "methods/new/selection.safetensors")
    assert torch.equal(selection["keep"], keep)
    assert torch.equal(selection["score"], L_u - L_h)
    theta = train(model, D_cus, keep.float(), FINAL)
    assert is_written(theta, trained / "methods/new/model", model)


def test_added_jsonl_names_the_token_that_brought_each_row_in(trained, tokenizer):
    assert call(f"select.py --run {trained} --pro 1 --pro-samples 2") == 0
    first, second = read_jsonl(trained / "methods/toss-pro/round-1/added.jsonl")
    scores = load_file(trained / "scores.safetensors")
    S = scores["loss_utility"] - scores["loss_degraded"]
    S[~scores["response"]] = -torch.inf
    place = int(S.argmax())
    assert place == int(scores["offsets"][first["row"]]) + first["token"]
    token_id = int(scores["input_ids"][place])
    assert first["text"] == tokenizer.raw.decode([token_id], skip_special_tokens=False)
    assert first["score"] == pytest.approx(float(S.max()), abs=1e-3)
    assert second["score"] <= first["score"]
