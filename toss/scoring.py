"""The loss of every response token of a dataset, from which the scores are made."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.io import InputError
from model.products import fast
from model.sharding import with_dummy_passes
from model.transformer import Transformer
from toss.loss import token_log_probs
from toss.parallel import State, fitting, ignore, over_processes, rank, share
from toss.tokens import BATCH_TOKENS, Tokens, batches, check_ids, collate

CHECK_EVERY = 16  # batches from one look for an overflow to the next


@fast
@torch.no_grad()
def score(
    model: Transformer,
    tokens: Tokens,
    batch_tokens: int | None = None,
    state: State | None = None,
    on_batch: Callable[[dict[str, Any]], None] = ignore,
) -> Tensor:
    """-log P(y_ij | x_i, y_i,<j) of every response token under the model, float32 [N] on the CPU.

    Entry t belongs to token t of the flat arrays, and is 0 where that is no response token.
    batch_tokens: per batch, padding included. state: where the losses are saved, and from where an
    interrupted call goes on. on_batch gets {"step", "steps", "unit"} after each batch, in tokens,
    and {"resumed", "steps", "unit"} before the first one if earlier work is taken over.
    Raises InputError naming the row for a NaN or an infinity, in which an overflow of float16 ends,
    and with advice when memory runs out.
    """
    check_ids(tokens, model.config.vocab_size)
    losses = saved_losses(model, tokens, state)
    rows = rows_without(losses, tokens)
    if rank() > 0:
        losses.zero_()  # one process holds what was saved, so that the sum below counts it once

    # The longest rows come first, so running out of memory shows at once.
    budget = batch_tokens or BATCH_TOKENS[model.device.type]
    groups = share(batches(rows, tokens.lengths, budget))
    # In tokens of this process's share. What an interrupted call has saved counts as finished.
    finished = len(losses) - count_tokens(rows, tokens)
    total = finished + sum(count_tokens(group, tokens) for group in groups)
    if finished:
        on_batch({"resumed": finished, "steps": total, "unit": "token"})

    with fitting(budget, max(tokens.lengths, default=0)):
        for turn, batch_rows in enumerate(with_dummy_passes(model, groups)):
            batch = collate(tokens, batch_rows, tokens.response, model.device)
            losses[batch.places] = -token_log_probs(model, batch)

            finished += count_tokens(batch_rows, tokens)
            on_batch({"step": finished, "steps": total, "unit": "token"})
            if state and state.is_due(last=finished == total):
                state.save({"losses": losses}, part=rank())
            # An overflow is looked for now and then, so that a long pass is not made in vain.
            if turn % CHECK_EVERY == 0:
                check_finite(losses, tokens, model.dtype)

    over_processes("SUM", losses)  # each entry was filled by one of them
    check_finite(losses, tokens, model.dtype)
    return losses.cpu()


def saved_losses(model: Transformer, tokens: Tokens, state: State | None) -> Tensor:
    """What an interrupted call has saved, of all processes; zeros elsewhere. float32 [N]."""
    losses = torch.zeros(len(tokens.input_ids), device=model.device)
    saved = state.load(part=rank()) if state else None
    if saved:
        # NaN as infinity, which is refused alike: a maximum over processes may drop a NaN.
        losses.copy_(saved["losses"].nan_to_num(nan=math.inf, posinf=math.inf))
    over_processes("MAX", losses)  # no sum: two processes may have saved the same entry
    return losses


def rows_without(losses: Tensor, tokens: Tokens) -> list[int]:
    """The rows that have tokens, but no loss yet."""
    scored = set(tokens.row_of(losses.cpu().nonzero()[:, 0]).tolist())
    return [row for row in tokens.filled if row not in scored]


def count_tokens(rows: list[int], tokens: Tokens) -> int:
    return sum(tokens.lengths[row] for row in rows)


def check_finite(losses: Tensor, tokens: Tokens, dtype: torch.dtype) -> None:
    """Raise InputError naming the first token whose loss is NaN or infinite."""
    if losses.isfinite().all():
        return
    first = (~losses.isfinite()).nonzero()[0].cpu()
    row = int(tokens.row_of(first))
    position = int(first - tokens.offsets[row])
    place = f"token {position} of row {row} (both counted from 0)"
    problem = f"{tokens.name}: the loss of {place} is not finite in {dtype}"
    if dtype == torch.float16:
        problem += ": give --dtype tf32 (or bfloat16, which takes half the memory)"
    raise InputError(problem)
