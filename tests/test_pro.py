"""The scripts are the paper's algorithm: references, scores, TOSS-Pro's rounds, mask and model.

The scripts' own main is run, and every adapter, loss and mask that it leaves is compared to the bit
with the paper's steps, written down here once more from `train`, `score` and the two rules.
"""

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import refused, said, succeed
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
from toss.workbench.records import read_record

REFERENCE = TrainConfig(lr=1e-2, epochs=1, batch_size=4, rank=2)  # as train.py is called in tests
FINAL = TrainConfig(lr=0.1, epochs=2, batch_size=4, rank=4)
D = 0.2
K = 3


def is_written(adapter: Adapter, folder: Path, model) -> bool:
    """True if a folder holds this adapter, to the bit."""
    pairs = zip(read_adapter(model, folder).tensors(), adapter.tensors(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


PRO = f"--pro 2 --pro-samples {K}"


@pytest.mark.parametrize(
    ("rounds", "flags"), [(0, ""), (2, PRO), (2, f"{PRO} --keep-eos")], ids=["toss", "pro", "eos"]
)
def test_the_scripts_are_the_papers_steps(rounds, flags, trained, base, files, tokenizer):
    """Rounds accumulate rows; theta^h is trained by train.py's settings, not by select.py's."""
    line = f"select.py --run {trained} --name new --lr 0.1 --epochs 2 --rank 4 --discard {D}"
    succeed(f"{line} {flags}")

    # Stage 1: the references.
    model = load_checkpoint(base)
    D_h, D_u, D_cus = (tokenise(read_rows(file), tokenizer, 2048) for file in files.values())
    theta_h = train(model, D_h, D_h.response.float(), REFERENCE)
    theta_u = train(model, D_u, D_u.response.float(), REFERENCE)
    assert is_written(theta_h, trained / "degraded", model)
    assert is_written(theta_u, trained / "utility", model)

    # Stage 2: the losses of the custom set.
    L_u = score(use(model, theta_u), D_cus)

    def scored(theta_h, folder) -> torch.Tensor:
        """L^h, which must be the file's. theta^u is scored once."""
        L_h = score(use(model, theta_h), D_cus)
        scores = load_file(folder / "scores.safetensors")
        assert torch.equal(scores["loss_utility"], L_u)
        assert torch.equal(scores["loss_degraded"], L_h)
        return L_h

    S = L_u - scored(theta_h, trained)

    # TOSS-Pro: the riskiest rows join D^h, and theta^h is trained again from the base.
    competes = D_cus.response.clone()
    if "--keep-eos" in flags:
        competes &= D_cus.input_ids != tokenizer.eos_id
    ranked = competes.nonzero()[:, 0]
    added = []
    for t in range(1, rounds + 1):
        folder = trained / "methods/new" / f"round-{t}"
        riskiest = riskiest_rows(S[ranked], D_cus.row_of(ranked), added, K)
        recorded = read_record(folder / "degraded")["added"]  # of all rounds: row, and token
        assert recorded[len(added) :] == [[row, int(ranked[i])] for row, i in riskiest]
        added = [row for row, _ in recorded]
        assert len(set(added)) == K * t
        rows = D_h + D_cus.take(added)
        theta_h = train(model, rows, rows.response.float(), REFERENCE)
        assert is_written(theta_h, folder / "degraded", model)
        S = L_u - scored(theta_h, folder)

    # Stage 3: the mask, and the base fine-tuned with it.
    keep = D_cus.response.clone()
    keep[ranked] = select_tokens(S[ranked], D)
    selection = load_file(trained / "methods/new/selection.safetensors")
    assert torch.equal(selection["keep"], keep)
    assert torch.equal(selection["score"], S)
    theta = train(model, D_cus, keep.float(), FINAL)
    assert is_written(theta, trained / "methods/new/model", model)


def test_the_scripts_are_the_papers_steps_and_k_is_6_percent_of_the_rows(trained, capsys):
    custom = ROOT / "data/rows/calibration.jsonl"  # 80 rows
    succeed(f"score.py --run {trained} --custom {custom} --overwrite")
    output = said(capsys, f"select.py --run {trained} --pro 1 --mask-only")
    assert "TOSS-Pro round 1: 5 rows join D^h" in output


def test_a_round_that_is_there_is_not_made_again(trained, capsys):
    line = f"select.py --run {trained} --pro 1 --pro-samples 2"
    succeed(line)
    output = said(capsys, line.replace("--pro 1", "--pro 2") + " --overwrite")
    written = [name.split(": ")[0] for name in output.splitlines() if ": wrote " in name]
    rounds = ["round-2/degraded", "round-2/scores", "selection", "model"]
    assert written == [f"methods/toss-pro/{name}" for name in rounds]
    folders = [trained / f"methods/toss-pro/round-{t}/degraded" for t in (1, 2)]
    first, second = (read_record(folder)["added"] for folder in folders)
    assert second[:2] == first


def test_a_round_without_a_row_to_add_is_refused(trained, capsys):
    line = f"select.py --run {trained} --pro 2 --pro-samples 10"  # all rows join in the first
    assert "no row is left that could join D^h" in refused(capsys, line)


def test_a_round_is_scored_in_the_dtype_of_the_scores(trained):
    succeed(f"score.py --run {trained} --dtype bfloat16 --overwrite")
    succeed(f"select.py --run {trained} --pro 1 --mask-only")
    record = read_record(trained / "methods/toss-pro/round-1/scores.safetensors")
    assert record["settings"]["dtype"] == "bfloat16"
