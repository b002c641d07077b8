"""The loss of every response token of a dataset, from which the scores are made."""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from model.io import NotFinite
from model.process import halve_budget, out_of_memory
from model.products import fast
from model.sharding import keep_up
from model.transformer import Transformer
from toss.loss import token_log_probs
from toss.parallel import any_process, over_processes, rank, share
from toss.tokens import BATCH_TOKENS, Tokens, batches, collate

CHECKED = 16  # batches from one look for an overflow to the next


@fast
@torch.inference_mode()
def score(
    model: Transformer,
    tokens: Tokens,
    batch_tokens: int | None = None,
    on_batch: Callable[[dict], None] = lambda event: None,
    start: Callable[[Tensor, str], object] = lambda losses, plan: None,
) -> Tensor:
    """-log P(y_ij | x_i, y_i,<j) of every response token under the model, float32 [N] on the CPU.

    Entry t belongs to token t of the flat arrays, and is 0 where that is no response token.
    batch_tokens: per batch, padding included; halved when memory runs out. on_batch gets {"step",
    "steps", "tokens"} after each batch, with the losses so far as "work", and {"remark": text}.
    start: puts the losses of an interrupted call into a tensor; it is also given the plan, a text.
    Raises NotFinite naming the row for a NaN or an infinity; an overflow of float16 ends in one.
    """
    budget = batch_tokens or BATCH_TOKENS[model.device.type]
    losses = torch.zeros(len(tokens.input_ids), device=model.device)
    there = [i for i, length in enumerate(tokens.lengths) if length]
    start(losses, f"rows: {len(there)}, tokens: {len(losses)}, the longest rows first")
    over_processes("MAX", losses)  # no sum: two states may hold the same entry
    known = set(tokens.row_of(losses.cpu().nonzero()[:, 0]).tolist())
    if rank() > 0:
        losses.zero_()  # each entry is held by one process
    groups = share(batches(there, tokens.lengths, budget))
    groups = sorted(([i for i in group if i not in known] for group in groups), key=bool)
    done, rest = groups.count([]), sum(tokens.lengths[i] for i in there if i not in known)
    turns = count()
    while any_process(done < len(groups)):
        if next(turns) % CHECKED == 1 and any_process(not losses.isfinite().all()):
            break  # a long pass is not made in vain
        if done == len(groups):  # others are still at work
            keep_up(model)
            continue
        try:
            batch = collate(tokens, groups[done], tokens.response, model.device)
            losses[batch.places] = -token_log_probs(model, batch)[0]
            full = False
        except RuntimeError as error:
            if model.sharded or not out_of_memory(error):
                raise
            full = True
        if full:  # here, where the error no longer holds the batch's memory
            budget = halve_budget(budget, tokens.lengths[groups[done][0]], on_batch)
            left = (i for group in groups[done:] for i in group)
            groups[done:] = batches(left, tokens.lengths, budget)
            continue
        done += 1
        own = sum(tokens.lengths[i] for i in groups[done - 1])
        seen = own if done < len(groups) else rest  # at the end also what other processes ran
        rest -= seen
        on_batch({"step": done, "steps": len(groups), "tokens": seen, "work": losses})
    over_processes("SUM", losses)  # each entry was filled by one of them
    losses = losses.cpu()
    for place in (~losses.isfinite()).nonzero()[:1, 0]:
        row = int(tokens.row_of(place))
        where = f"token {place - tokens.offsets[row]} of row {row} (both counted from 0)"
        raise NotFinite(f"{tokens.name}: the loss of {where} is not finite in {model.dtype}")
    return losses
