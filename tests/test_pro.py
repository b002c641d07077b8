"""The scripts are the paper's algorithm: references, scores, TOSS-Pro's rounds, mask and model.

The scripts' own main is run, and every adapter, loss and mask that it leaves is compared to the bit
with the paper's steps, written down here once more from `train`, `score` and the two rules.
"""

from dataclasses import dataclass, field

import pytest
import torch
from conftest import read_jsonl, tree
from helpers import call, refused, said
from safetensors.torch import load_file

from model import load_checkpoint
from model.lora import Adapter, use
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
K = 3


@dataclass
class Steps:
    """What the algorithm gives."""

    adapters: dict[str, Adapter] = field(default_factory=dict)  # by their folders in the run
    utility: torch.Tensor | None = None  # the losses under theta^u
    degraded: dict[str, torch.Tensor] = field(default_factory=dict)  # by the folder of the scores
    added: list[int] = field(default_factory=list)  # the rows that join D^h
    keep: torch.Tensor | None = None


def by_hand(base, files, tokenizer, rounds=0, d=0.1, top=False, keep_eos=False) -> Steps:
    """The paper's steps. top: theta^h learns the riskiest tokens alone of the added rows."""
    steps = Steps()
    model = load_checkpoint(base)
    D_h = tokenise(read_rows(files["harmful"]), tokenizer, 2048)
    D_u = tokenise(read_rows(files["utility"]), tokenizer, 2048)
    D_cus = tokenise(read_rows(files["custom"]), tokenizer, 2048)

    theta_h = train(model, D_h, D_h.response.float(), REFERENCE)
    theta_u = train(model, D_u, D_u.response.float(), REFERENCE)
    steps.adapters |= {"degraded": theta_h, "utility": theta_u}
    L_u = score(use(model, theta_u), D_cus)
    L_h = score(use(model, theta_h), D_cus)
    steps.utility = L_u
    steps.degraded["."] = L_h

    competes = D_cus.response
    if keep_eos:
        competes = competes & (D_cus.input_ids != tokenizer.eos_id)
    ranked = competes.nonzero()[:, 0]
    for t in range(1, rounds + 1):
        S = (L_u - L_h)[ranked]
        riskiest = riskiest_rows(S, D_cus.row_of(ranked), steps.added, K)
        steps.added += [row for row, _ in riskiest]
        weights = torch.zeros(len(L_u)) if top else D_cus.response.float()
        weights[ranked[~select_tokens(S, d)]] = 1
        weights = weights[D_cus.places(steps.added)]
        weights = torch.cat([D_h.response.float(), weights])
        theta_h = train(model, D_h + D_cus.take(steps.added), weights, REFERENCE)
        L_h = score(use(model, theta_h), D_cus)
        steps.adapters[f"methods/new/round-{t}/degraded"] = theta_h
        steps.degraded[f"methods/new/round-{t}"] = L_h

    steps.keep = D_cus.response.clone()
    steps.keep[ranked] = select_tokens((L_u - L_h)[ranked], d)
    steps.adapters["methods/new/model"] = train(model, D_cus, steps.keep.float(), FINAL)
    return steps


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", {}),
        ("--pro 2", {"rounds": 2}),
        (
            "--pro 2 --pro-train top --discard 0.2 --keep-eos",
            {"rounds": 2, "top": True, "d": 0.2, "keep_eos": True},
        ),
    ],
)
def test_the_scripts_are_the_papers_steps(flags, options, trained, base, files, tokenizer):
    """Rounds accumulate rows; theta^h is trained by train.py's settings, not by select.py's."""
    before = tree(trained / "degraded")
    samples = f"--pro-samples {K}" if options else ""
    line = f"select.py --run {trained} --name new --lr 0.1 --epochs 2 --rank 4 {flags} {samples}"
    assert call(line) == 0
    assert tree(trained / "degraded") == before

    steps = by_hand(base, files, tokenizer, **options)
    for folder, adapter in steps.adapters.items():
        written = read_adapter(load_checkpoint(base), trained / folder)
        for tensor, expected in zip(written.tensors(), adapter.tensors(), strict=True):
            assert torch.equal(tensor, expected), folder
    for folder, losses in steps.degraded.items():
        scores = load_file(trained / folder / "scores.safetensors")
        assert torch.equal(scores["loss_degraded"], losses)
        assert torch.equal(scores["loss_utility"], steps.utility)  # theta^u is scored once
    added = []
    for file in sorted((trained / "methods/new").glob("round-*/added.jsonl")):
        added += [line["row"] for line in read_jsonl(file)]
    assert added == steps.added
    assert len(set(added)) == K * options.get("rounds", 0)
    keep = load_file(trained / "methods/new/selection.safetensors")["keep"]
    assert torch.equal(keep, steps.keep)
    response = load_file(trained / "scores.safetensors")["response"]
    assert 0 < int(keep.sum()) < int(response.sum())


def test_added_jsonl_names_the_token_that_brought_each_row_in(trained, tokenizer):
    assert call(f"select.py --run {trained} --pro 1 --pro-samples 2") == 0
    first, second = read_jsonl(trained / "methods/toss-pro/round-1/added.jsonl")
    scores = load_file(trained / "scores.safetensors")
    S = scores["loss_utility"] - scores["loss_degraded"]
    S[~scores["response"]] = -torch.inf
    place = int(S.argmax())
    start = int(scores["offsets"][first["row"]])
    assert place == start + first["token"]
    assert place < scores["offsets"][first["row"] + 1]
    token_id = int(scores["input_ids"][place])
    assert first["text"] == tokenizer.raw.decode([token_id], skip_special_tokens=False)
    assert first["score"] == pytest.approx(float(S.max()), abs=1e-3)
    assert second["row"] != first["row"]
    assert second["score"] <= first["score"]


def test_k_is_six_percent_of_the_rows_unless_given_and_belongs_to_the_result(trained, capsys):
    line = f"select.py --run {trained} --pro 1"
    assert "1 rows added" in said(capsys, line)  # 0.06 * 10 rows, at least one
    assert "skipped" in said(capsys, line)
    assert read_record(trained / "methods/toss-pro")["settings"]["pro"] == 1
    for flags in ("--pro-samples 2", "--pro 2", "--pro-train top"):
        assert "different: pro" in refused(capsys, f"{line} {flags}")
    error = refused(capsys, f"select.py --run {trained} --name toss-pro")
    assert "pro 1 there, None now" in error
    assert "--harmful" in error
    assert call(f"{line} --pro-samples 99 --name all") == 0
    assert len(read_jsonl(trained / "methods/all/round-1/added.jsonl")) == 10  # all there are


def test_theta_h_is_trained_again_as_it_was_trained_first(trained, capsys):
    """By its record: another rate is another result. A note says where the dtype differs."""
    line = f"select.py --run {trained} --pro 1"
    output = said(capsys, f"{line} --dtype bfloat16")
    assert "theta^h was trained in float32, and is trained again in bfloat16" in output
    record = read_record(trained / "methods/toss-pro")
    assert record["settings"]["reference"]["lr"] == 1e-2
    assert call(f"train.py --run {trained} --overwrite --lr 0.02") == 0
    assert call(f"score.py --run {trained} --overwrite") == 0
    assert "reference" in refused(capsys, f"{line} --dtype bfloat16")
