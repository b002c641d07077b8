"""TOSS-Pro: refine the degraded model on the rows of the custom set that hold the riskiest tokens."""

import json
from pathlib import Path

import torch
from torch import Tensor

from model import save_adapter
from model.files import file_hash, save_tensors
from toss.base import Base, reference_note
from toss.dataset import Tokens, concatenate, take
from toss.parallel import rank
from toss.scoring import score_under
from toss.selection import select_tokens
from toss.settings import Settings
from toss.training import train


def refine(base: Base, harmful: Tokens, custom: Tokens, losses: dict[str, Tensor], entries: Tensor, settings: Settings,
           rounds: int, k: int, folder: Path, sources: dict[str, str]) -> tuple[dict[str, Tensor], dict]:
    """The paper's TOSS-Pro: for t = 0..T-1, add the k riskiest rows to D^h_t and retrain theta^h_{t+1} from the base.

    The rows stay in D^cus too, and theta^u is never scored again. harmful: D^h_0. losses: those under theta^u and
    theta^h_0; returned are those under theta^u and theta^h_T, and the summed cost. entries: the places of the flat
    arrays that compete. settings: those that theta^h_0 was trained with. sources: hashes of what the losses come from.

    Writes folder/round-t/: the adapter theta^h_t, its scores, and added.jsonl, which names the rows that were added to
    train it and the token that brought each in.
    """
    rows, added = custom.row_of(entries), []
    total: dict = {"seconds": 0.0, "tokens": 0, "peak_memory_gib": 0.0}
    for t in range(1, rounds + 1):
        scores = (losses["loss_utility"] - losses["loss_degraded"])[entries]
        found = riskiest_rows(scores, rows, set(added), k)
        added += [row for row, _ in found]
        place, stage = folder / f"round-{t}", f"{settings.name}: degraded, round {t}"
        place.mkdir(parents=True)
        lines = [added_line(base, custom, row, int(entries[index]), float(scores[index])) for row, index in found]
        (place / "added.jsonl").write_text("".join(lines), encoding="utf-8")

        data, learn = concatenate(harmful, take(custom, added)), torch.ones_like(custom.response)
        if settings.pro_train == "top":
            learn = torch.zeros_like(learn).index_put((entries,), ~select_tokens(scores, settings.discard))
        learned = [learn[custom.offsets[i] : custom.offsets[i + 1]] for i in added]
        learn = torch.cat((torch.ones_like(harmful.response), *learned))
        cost = train(base.load("train"), data, learn, settings, base.budget, stage, base.log(stage))
        note = reference_note("degraded", base.run, **sources, added_rows=json.dumps(added))
        save_adapter(base.model, place / "degraded", note)
        scored, scoring = score_under(base, custom, {"loss_degraded": place / "degraded"})
        losses = {**losses, **scored}
        arrays = {name: getattr(custom, name) for name in ("input_ids", "offsets", "response")}
        note = {**base.run.identity, **sources, "tokens_sha256": custom.fingerprint(), "dtype": scoring["dtype"],
                "degraded_sha256": file_hash(place / "degraded" / "adapter_model.safetensors")}
        if rank() == 0:
            save_tensors({**arrays, **losses}, place / "scores.safetensors", note)
        for part in (cost, scoring):
            total = {"seconds": round(total["seconds"] + part["seconds"], 2), "tokens": total["tokens"] + part["tokens"],
                     "peak_memory_gib": max(total["peak_memory_gib"], part["peak_memory_gib"])}
        print(f"TOSS-Pro round {t}: {len(found)} rows added to the harmful reference set, which now has {data.rows}")
    return losses, total


def added_line(base: Base, custom: Tokens, row: int, entry: int, score: float) -> str:
    """A line of added.jsonl: the row, and the token (its position in the row, its text, its score) that brought it in."""
    text = base.run.tokenizer.raw.decode([int(custom.input_ids[entry])], skip_special_tokens=False)
    line = {"row": row, "token": entry - int(custom.offsets[row]), "text": text, "score": round(score, 4)}
    return json.dumps(line, ensure_ascii=False) + "\n"


def riskiest_rows(scores: Tensor, rows: Tensor, taken: set[int], k: int) -> list[tuple[int, int]]:
    """Walk down the globally sorted tokens and collect the rows that hold them, until k new ones are found.

    scores: float [n] of the response tokens, in the order of the flat arrays; rows: int64 [n], the row of each; taken:
    rows that are in D^h already, passed over. Returns (row, index into scores of the token that brought it in), the
    riskiest first; fewer than k when the rows run out. Of equal scores the earlier comes first.

    >>> riskiest_rows(torch.tensor([1.0, 9.0, 8.0, 7.0, 2.0]), torch.tensor([0, 1, 1, 2, 3]), {2}, 2)
    [(1, 1), (3, 4)]
    """
    found: dict[int, int] = {}
    order = scores.argsort(descending=True, stable=True)
    for index in (i for part in order.split(2**16) for i in part.tolist()):  # the walk ends long before the last part
        if len(found) == k:
            break
        row = int(rows[index])
        if row not in taken and row not in found:
            found[row] = index
    return list(found.items())


def default_samples(tokens: Tokens) -> int:
    """k when none is given: 6 % of the rows of D^cus, at least one. The paper names no k."""
    return max(1, round(0.06 * tokens.rows))
