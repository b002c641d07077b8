"""TOSS-Pro: refine the degraded model on the rows of the custom set that hold the riskiest tokens."""

import json
from pathlib import Path

import torch
from torch import Tensor

from model import save_adapter
from model.files import save_tensors
from toss.base import Base, reference_note
from toss.dataset import Tokens, concatenate, take
from toss.scoring import score_under
from toss.settings import Settings
from toss.training import train


def refine(base: Base, harmful: Tokens, custom: Tokens, losses: dict[str, Tensor], entries: Tensor, settings: Settings,
           rounds: int, k: int, folder: Path) -> tuple[dict[str, Tensor], dict]:
    """The paper's TOSS-Pro: for t = 0..T-1, add the k riskiest rows to D^h_t and retrain theta^h_{t+1} from the base.

    The rows stay in D^cus too. theta^u is never scored again. harmful: D^h_0. losses: the scores under theta^h_0;
    returned are those under theta^h_T, and the summed cost. entries: the places of the flat arrays that compete.
    settings: those that theta^h_0 was trained with. Writes folder/round-t/ with the adapter theta^h_t, its scores, and
    added.jsonl: which rows were added to train it, and the token that brought each in.
    """
    rows = custom.row_of(entries)
    added: list[int] = []
    total: dict = {"seconds": 0.0, "tokens": 0, "peak_memory_gib": 0.0}
    for t in range(1, rounds + 1):
        scores = (losses["loss_utility"] - losses["loss_degraded"])[entries]
        found = riskiest_rows(scores, rows, set(added), k)
        place = folder / f"round-{t}"
        place.mkdir(parents=True)
        with open(place / "added.jsonl", "w", encoding="utf-8") as f:
            for row, index in found:
                entry = int(entries[index])
                f.write(json.dumps({
                    "row": row, "token": entry - int(custom.offsets[row]), "score": round(float(scores[index]), 4),
                    "text": base.run.tokenizer.raw.decode([int(custom.input_ids[entry])], skip_special_tokens=False),
                }) + "\n")  # fmt: skip
        added += [row for row, _ in found]
        data = concatenate(harmful, take(custom, added))
        stage = f"degraded, round {t}"
        cost = train(base.load("train"), data, torch.ones_like(data.response), settings, base.budget, stage, base.log)
        save_adapter(base.model, place / "degraded", reference_note("degraded", base.run, added_rows=json.dumps(added)))
        scored, scoring = score_under(base, custom, {"loss_degraded": place / "degraded"})
        losses = {**losses, **scored}
        save_tensors({"input_ids": custom.input_ids, "offsets": custom.offsets, "response": custom.response, **losses},
                  place / "scores.safetensors", {**base.run.identity, "round": str(t)})
        for part in (cost, scoring):
            total = {"seconds": total["seconds"] + part["seconds"], "tokens": total["tokens"] + part["tokens"],
                     "peak_memory_gib": max(total["peak_memory_gib"], part["peak_memory_gib"])}
        print(f"TOSS-Pro round {t}: {len(found)} rows added, {data.rows} in all, the last with a top score of "
              f"{float(scores[found[-1][1]]):.2f}" if found else f"TOSS-Pro round {t}: no rows are left to add")
    return losses, total


def riskiest_rows(scores: Tensor, rows: Tensor, taken: set[int], k: int) -> list[tuple[int, int]]:
    """Walk down the globally sorted tokens and collect the rows that hold them, until k new ones are found.

    scores: float [n] of the response tokens, in the order of the flat arrays; rows: int64 [n], the row of each; taken:
    rows that are in D^h already, passed over. Returns (row, index into scores of the token that brought it in), the
    riskiest first; fewer than k when the rows run out. Of equal scores the earlier comes first.

    >>> riskiest_rows(torch.tensor([1.0, 9.0, 8.0, 7.0, 2.0]), torch.tensor([0, 1, 1, 2, 3]), {2}, 2)
    [(1, 1), (3, 4)]
    """
    found: dict[int, int] = {}
    for index in scores.argsort(descending=True, stable=True).tolist():
        if len(found) == k:
            break
        row = int(rows[index])
        if row not in taken and row not in found:
            found[row] = index
    return list(found.items())


def default_samples(tokens: Tokens) -> int:
    """k when none is given: 6 % of the rows of D^cus, at least one. The paper names no k."""
    return max(1, round(0.06 * tokens.rows))
