"""Which tokens stay in the loss: the paper's global ranking, and the plain alternatives that it is compared with.

A method turns the losses of the references into one number a response token; `select_tokens` drops the highest. The
tokens that compete are given by `entries`, their places in the flat arrays of toss/dataset.py. To add a method, add
its line to `method_scores`.
"""

import math

import torch
from torch import Tensor

from model.errors import InputError
from toss.dataset import Tokens

METHODS = ("toss", "toss-pro", "sft", "random", "sample", "sample-all")


def select_tokens(scores: Tensor, d: float) -> Tensor:
    """The mask m of the paper's section on token selection: False for the floor(d n) highest of n scores.

    scores: float [n], finite. d: share to discard, 0 <= d < 1. Returns keep: bool [n]. Of equal scores the earlier
    goes first. One partial sort, no full one. Raises InputError for a score that is not finite or d out of range.

    Six tokens with the losses L^u and L^h; S = L^u - L^h; at d = 0.3, floor(1.8) = 1 token goes:

    >>> loss_utility = torch.tensor([2.0, 5.0, 1.0, 4.0, 0.5, 3.0])
    >>> loss_degraded = torch.tensor([1.5, 1.0, 1.0, 0.0, 0.5, 3.5])
    >>> scores = loss_utility - loss_degraded  # 0.5, 4, 0, 4, 0, -0.5: two tokens share the highest score
    >>> select_tokens(scores, 0.3).tolist()  # the earlier of the two goes
    [True, False, True, True, True, True]
    >>> select_tokens(scores, 0.5).tolist()  # three go: both, and the next highest
    [False, False, True, False, True, True]
    """
    if not 0 <= d < 1:
        raise InputError(f"the share to discard (--discard) must lie in [0, 1), not {d}")
    if not scores.isfinite().all():
        raise InputError(f"score {int((~scores.isfinite()).nonzero()[0])} of {len(scores)} is not finite")
    n = len(scores)
    k = math.floor(d * n + 1e-9)  # 0.29 * 100 is 28.999999999999996
    keep = torch.ones(n, dtype=torch.bool, device=scores.device)
    if k == 0:
        return keep
    threshold = scores.kthvalue(n - k + 1).values  # the k-th highest
    keep[scores > threshold] = False
    ties = (scores == threshold).nonzero().squeeze(1)
    keep[ties[: k - int((~keep).sum())]] = False
    return keep


def ranked_entries(tokens: Tokens, keep_eos: bool, eos_id: int) -> Tensor:
    """Places in the flat arrays of the tokens that compete: all response tokens, less EOS with `keep_eos`."""
    competes = tokens.response & (tokens.input_ids != eos_id) if keep_eos else tokens.response
    return competes.nonzero().squeeze(1)


def method_scores(method: str, tokens: Tokens, losses: dict[str, Tensor], seed: int, entries: Tensor) -> Tensor | None:
    """The number that a method ranks by, float [n] for the competing tokens `entries`; None where nothing is dropped.

    losses: `loss_utility` and `loss_degraded`, float32 [N] each, for the methods that need them. Methods:
      sft         nothing goes: plain fine-tuning
      random      random numbers, drawn by `seed`
      toss        S = L^u - L^h of the token (toss-pro: the same, under the refined degraded model)
      sample      the mean S of the token's row; whole rows go, as many as fit into d of the tokens
      sample-all  the same, but the N highest rows go, N = the true number of rows with harm: it is told the truth
    """
    if method == "sft":
        return None
    if method == "random":
        return torch.rand(len(entries), generator=torch.Generator().manual_seed(seed))
    scores = (losses["loss_utility"] - losses["loss_degraded"])[entries]
    if method in ("sample", "sample-all"):
        rows = tokens.row_of(entries)
        sums = torch.zeros(tokens.rows, dtype=torch.float64).index_add_(0, rows, scores.double())
        return (sums / torch.bincount(rows, minlength=tokens.rows))[rows].float()
    return scores


def discard(method: str, tokens: Tokens, scores: Tensor | None, d: float, entries: Tensor) -> Tensor:
    """keep: bool [N], True everywhere but at the response tokens that the method discards. See method_scores."""
    keep = torch.ones(len(tokens.input_ids), dtype=torch.bool)
    if scores is None:
        return keep
    if method not in ("sample", "sample-all"):
        keep[entries] = select_tokens(scores, d)
        return keep
    rows = tokens.row_of(entries)
    of_row = torch.full((tokens.rows,), -torch.inf).index_put((rows,), scores)  # equal within a row
    order = of_row.argsort(descending=True, stable=True)
    if method == "sample":
        sizes = torch.bincount(rows, minlength=tokens.rows)[order]
        gone = order[: int((sizes.cumsum(0) <= math.floor(d * len(entries) + 1e-9)).sum())]
    elif not tokens.harmful.any():
        raise InputError("sample-all is told the true number of harmful rows, but the custom set carries no ground truth")
    else:
        gone = order[: len(tokens.row_of(tokens.harmful.nonzero().squeeze(1)).unique())]
    keep[entries[torch.isin(rows, gone)]] = False
    return keep
