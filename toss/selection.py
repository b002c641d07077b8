"""Which tokens stay in the loss: the paper's global ranking, and the plain alternatives that it is compared with.

A method is two things: what it ranks the competing tokens by, and where it cuts. Both stand in METHODS, at the end of
this file; to add a method, add its line there.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.errors import InputError
from toss.dataset import Tokens


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


@dataclass
class Candidates:
    """The n tokens that compete, and what is known of them."""

    tokens: Tokens
    entries: Tensor  # int64 [n]: their places in the flat arrays, see ranked_entries
    losses: dict[str, Tensor]  # float32 [N] each: loss_utility, loss_degraded, and loss_base where it was asked for
    seed: int = 0  # of the random method
    weights: tuple[float, float] = (1.0, 1.0)  # alpha and beta of the weighted score

    def loss(self, model: str) -> Tensor:
        """L of the competing tokens under "utility", "degraded" or "base", float32 [n]."""
        if f"loss_{model}" not in self.losses:
            flags = " with --base --overwrite" if model == "base" else ""
            raise InputError(f"the losses under the {model} model are not in scores.safetensors: run score.py{flags} on this run")
        return self.losses[f"loss_{model}"][self.entries]

    @cached_property
    def rows(self) -> Tensor:
        """The row of each, int64 [n]."""
        return self.tokens.row_of(self.entries)

    def truth(self) -> Tensor:
        """Which of them are harmful by the rows' ground truth, bool [n]; InputError where there is none."""
        if not self.tokens.harmful.any():
            raise InputError("this method is told the truth, but the custom set marks no harm (`harmful` in its rows)")
        return self.tokens.harmful[self.entries]


def risk(c: Candidates) -> Tensor:
    """The paper's score S = L^u - L^h."""
    return c.loss("utility") - c.loss("degraded")


def weighted(c: Candidates) -> Tensor:
    """alpha L^u - beta L^h. (1, 1) ranks as toss does, (0, 1) as degraded-only, (1, 0) as utility-only."""
    return c.weights[0] * c.loss("utility") - c.weights[1] * c.loss("degraded")


def mean_risk(c: Candidates) -> Tensor:
    """The mean S of the token's row, the same for all of its tokens."""
    rows = c.rows
    sums = torch.zeros(c.tokens.rows, dtype=torch.float64).index_add_(0, rows, risk(c).double())
    return (sums / torch.bincount(rows, minlength=c.tokens.rows))[rows].float()


def earliness(c: Candidates) -> Tensor:
    """Minus the token's place among the response tokens of its row."""
    rows = c.rows
    first = torch.searchsorted(rows, rows)  # where the row begins among the competing tokens
    return (first - torch.arange(len(rows))).float()


def everywhere(scores: Tensor, d: float, c: Candidates) -> Tensor:
    """The highest floor(d n) of all rows together: the paper's rule. Every cut returns gone: bool [n]."""
    return ~select_tokens(scores, d)


def in_each_row(scores: Tensor, d: float, c: Candidates) -> Tensor:
    """The highest floor(d L_i) of each row by itself: less than d of all tokens, since each row's share is rounded down."""
    rows = c.rows
    order = scores.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]  # by row, and the riskiest first within one
    place = torch.arange(len(rows)) - torch.searchsorted(rows, rows)
    sizes = torch.bincount(rows, minlength=c.tokens.rows)[rows]
    return torch.zeros(len(rows), dtype=torch.bool).index_put((order,), place < (d * sizes.double() + 1e-9).floor())


def whole_rows(scores: Tensor, d: float, c: Candidates) -> Tensor:
    """Whole rows, the riskiest first, as many as fit into d of the tokens."""
    order, sizes = rows_by_risk(scores, c)
    fit = int((sizes[order].cumsum(0) <= math.floor(d * len(scores) + 1e-9)).sum())
    return torch.isin(c.rows, order[:fit])


def as_many_rows_as_hold_harm(scores: Tensor, d: float, c: Candidates) -> Tensor:
    """The N riskiest rows, whatever d: N is the true number of rows with harm."""
    truth = c.truth()
    return torch.isin(c.rows, rows_by_risk(scores, c)[0][: len(c.rows[truth].unique())])


def rows_by_risk(scores: Tensor, c: Candidates) -> tuple[Tensor, Tensor]:
    """Rows from the riskiest on (scores are equal within a row), and how many tokens of each compete."""
    rows = c.rows
    of_row = torch.full((c.tokens.rows,), -torch.inf).index_put((rows,), scores)
    return of_row.argsort(descending=True, stable=True), torch.bincount(rows, minlength=c.tokens.rows)


def the_truth(scores: Tensor, d: float, c: Candidates) -> Tensor:
    """Exactly the harmful tokens, whatever d."""
    return c.truth()


# name: (what it ranks by, where it cuts)
METHODS = {
    "toss": (risk, everywhere),
    "toss-pro": (risk, everywhere),  # S under the refined degraded model
    "sft": (None, None),  # nothing goes: plain fine-tuning
    "random": (lambda c: torch.rand(len(c.entries), generator=torch.Generator().manual_seed(c.seed)), everywhere),
    "first-k": (earliness, everywhere),  # the first tokens of every response
    "local": (risk, in_each_row),
    "sample": (mean_risk, whole_rows),
    "sample-all": (mean_risk, as_many_rows_as_hold_harm),
    "degraded-only": (lambda c: -c.loss("degraded"), everywhere),
    "utility-only": (lambda c: c.loss("utility"), everywhere),
    "base": (lambda c: c.loss("base") - c.loss("degraded"), everywhere),  # theta^0 in place of theta^u
    "weighted": (weighted, everywhere),
    "oracle": (lambda c: c.truth().float(), the_truth),
}
UNSCORED = ("sft", "random", "first-k", "oracle", "mask")  # these need no reference model; mask: select.py --mask


def choose(method: str, candidates: Candidates, d: float) -> tuple[Tensor, Tensor | None]:
    """The mask of a method: keep, bool [N], True everywhere but at the discarded response tokens.

    Also the scores that it ranked by, float [n] for the competing tokens, or None where it ranks by nothing.
    """
    keep = torch.ones(len(candidates.tokens.input_ids), dtype=torch.bool)
    rank, cut = METHODS[method]
    if rank is None:
        return keep, None
    scores = rank(candidates)
    keep[candidates.entries[cut(scores, d, candidates)]] = False
    return keep, scores
