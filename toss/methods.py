"""The alternatives that TOSS is compared with, one plain function each.

A method is given the ranked tokens and returns which stay, bool [n], and the scores it went by,
float [n] or None. To add one, put it into METHODS below, and its name into toss/config.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.io import InputError
from toss.selection import select_tokens
from toss.tokens import Tokens

Choice = tuple[Tensor, Tensor | None]


@dataclass
class Candidates:
    """The n ranked tokens, and what is known of them."""

    tokens: Tokens
    losses: dict[str, Tensor]  # under "utility", "degraded" (and "base"): float32 [N] each
    ranked: Tensor  # int64 [n]: their places in the flat arrays
    d: float  # share to discard
    seed: int = 0

    def __post_init__(self):
        self.row = self.tokens.row_of(self.ranked)  # int64 [n]
        self.sizes = torch.bincount(self.row, minlength=self.tokens.rows)  # int64 [rows]

    def loss(self, model: str) -> Tensor:
        """Losses of the ranked tokens under "utility", "degraded" or "base", float32 [n]."""
        if model not in self.losses:
            raise InputError(f"no losses under the {model} model: run score.py --base --overwrite")
        return self.losses[model][self.ranked]

    def S(self) -> Tensor:
        """The paper's score L^u - L^h."""
        return self.loss("utility") - self.loss("degraded")

    def position(self) -> Tensor:
        """Which of its row's ranked tokens each one is, from 0, int64 [n]."""
        return torch.arange(len(self.row)) - torch.searchsorted(self.row, self.row)

    def harmful(self) -> Tensor:
        """Ground truth, bool [n]."""
        if self.tokens.harmful.any():
            return self.tokens.harmful[self.ranked]
        raise InputError("this method needs the ground truth, but no row marks harm (`harmful`)")


def top(scores: Tensor, c: Candidates) -> Choice:
    """One ranking of all rows together, as in TOSS, but by other scores."""
    return select_tokens(scores, c.d), scores


def random(c: Candidates) -> Choice:
    """Tokens drawn at random."""
    return top(torch.rand(len(c.ranked), generator=torch.Generator().manual_seed(c.seed)), c)


def local(c: Candidates) -> Choice:
    """The highest floor(d L_i) of each row by itself: by the rounding, less than d in all."""
    S = c.S()
    order = S.argsort(descending=True, stable=True)
    order = order[c.row[order].argsort(stable=True)]  # by row, riskiest first within a row
    keep = c.position() >= (c.d * c.sizes[c.row].double() + 1e-9).floor()
    return keep[order.argsort()], S


def mean_of_row(c: Candidates) -> tuple[Tensor, Tensor]:
    """The mean S of each token's row, float32 [n], and the rows sorted by it, highest first."""
    sums = torch.zeros(c.tokens.rows, dtype=torch.float64).index_add_(0, c.row, c.S().double())
    means = (sums / c.sizes).float()  # NaN for a row without ranked tokens
    return means[c.row], means.nan_to_num(-math.inf).argsort(descending=True, stable=True)


def sample(c: Candidates) -> Choice:
    """Whole rows, highest mean S first, as many as fit into d of the tokens."""
    scores, order = mean_of_row(c)
    fit = int((c.sizes[order].cumsum(0) <= math.floor(c.d * len(scores) + 1e-9)).sum())
    return ~torch.isin(c.row, order[:fit]), scores


def sample_all(c: Candidates) -> Choice:
    """Whole rows, highest mean S first, as many as truly hold harm, whatever d."""
    scores, order = mean_of_row(c)
    return ~torch.isin(c.row, order[: len(c.row[c.harmful()].unique())]), scores


METHODS = {
    "sft": lambda c: (torch.ones(len(c.ranked), dtype=torch.bool), None),  # every token stays
    "random": random,
    "first-k": lambda c: top(-c.position().float(), c),  # equally many of every row, if it can
    "first-5": lambda c: (c.position() >= 5, -c.position().float()),  # of each row, whatever d
    "local": local,
    "sample": sample,
    "sample-all": sample_all,
    "degraded-only": lambda c: top(-c.loss("degraded"), c),
    "utility-only": lambda c: top(c.loss("utility"), c),
    "base": lambda c: top(c.loss("base") - c.loss("degraded"), c),  # theta^0 in place of theta^u
    "weighted": lambda c: top(c.loss("utility") - 0.5 * c.loss("degraded"), c),
    "oracle": lambda c: (~c.harmful(), c.harmful().float()),  # exactly the harmful ones
}


def choose(method: str, c: Candidates) -> Choice:
    """A method's mask over the flat arrays, bool [N], and its scores, float [N] or None."""
    keep = torch.ones(len(c.tokens.input_ids), dtype=torch.bool)
    keep[c.ranked], scores = METHODS[method](c)
    if scores is not None:
        scores = torch.zeros(len(keep)).index_put((c.ranked,), scores)
    return keep, scores
