"""Which tokens leave the loss (the paper's global ranking), and which rows join D^h (TOSS-Pro)."""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from model.io import InputError
from toss.tokens import Tokens


def competing_tokens(tokens: Tokens, eos_id: int | None = None) -> Tensor:
    """Flat places of the ranked tokens, int64 [n]: all response tokens, less EOS if given."""
    competing = tokens.response
    if eos_id is not None:
        competing = competing & (tokens.input_ids != eos_id)
    return competing.nonzero()[:, 0]


def select_tokens(scores: Tensor, d: float) -> Tensor:
    """The mask m of the paper's token selection: False for the floor(d n) highest of n scores.

    scores: float [n], finite. d: share to discard, 0 <= d < 1. Returns keep, bool [n]. Of equal
    scores the earlier is discarded first. One partial sort instead of a full one. Raises InputError
    for a score that is not finite and for d out of range.

    Six tokens with the losses L^u and L^h; S = L^u - L^h; at d = 0.3, floor(1.8) = 1 token goes:

    >>> loss_utility = torch.tensor([2.0, 5.0, 1.0, 4.0, 0.5, 3.0])
    >>> loss_degraded = torch.tensor([1.5, 1.0, 1.0, 0.0, 0.5, 3.5])
    >>> S = loss_utility - loss_degraded  # 0.5, 4, 0, 4, 0, -0.5: two tokens share the highest
    >>> select_tokens(S, 0.3).tolist()  # the earlier of the two goes
    [True, False, True, True, True, True]
    >>> select_tokens(S, 0.5).tolist()  # three go: both, and the next highest
    [False, False, True, False, True, True]
    """
    if not 0 <= d < 1:
        raise InputError(f"the share to discard (--discard) must be in [0, 1), not {d}")
    if not scores.isfinite().all():
        first = int((~scores.isfinite()).nonzero()[0])
        raise InputError(f"score {first} of {len(scores)} is not finite")
    n = len(scores)
    k = math.floor(d * n + 1e-9)  # 0.29 * 100 is 28.999999999999996
    keep = torch.ones(n, dtype=torch.bool, device=scores.device)
    if k == 0:
        return keep
    threshold = scores.kthvalue(n - k + 1).values  # the k-th highest
    above = scores > threshold
    keep[above] = False
    # Tokens that share the k-th highest score fill the rest of the k, the earliest first.
    ties = (scores == threshold).nonzero()[:, 0]
    keep[ties[: k - int(above.sum())]] = False
    return keep


def riskiest_rows(
    scores: Tensor, rows: Tensor, skip: Collection[int], k: int
) -> list[tuple[int, int]]:
    """TOSS-Pro: walk down the sorted tokens and collect the rows that hold them, until k are found.

    scores: float [n] of the ranked tokens; rows: int64 [n], the row of each; skip: rows that
    earlier rounds added. Returns (row, index into scores of the token that brought it in), riskiest
    first; fewer than k when the rows run out. Of equal scores the earlier comes first.

    >>> scores, rows = torch.tensor([1.0, 9.0, 8.0, 7.0, 2.0]), torch.tensor([0, 1, 1, 2, 3])
    >>> riskiest_rows(scores, rows, skip={2}, k=2)
    [(1, 1), (3, 4)]
    """
    skip = set(skip)
    found: dict[int, int] = {}  # row -> index of its riskiest token
    order = scores.argsort(descending=True, stable=True)
    # In parts: the walk ends long before the last one, and a list of all would take gigabytes.
    for part in order.split(2**16):
        for index in part.tolist():
            if len(found) == k:
                return list(found.items())
            row = int(rows[index])
            if row not in skip and row not in found:
                found[row] = index
    return list(found.items())
