"""The alternatives that TOSS is compared with, one plain function each.

A method is given the ranked tokens and returns which stay, bool [n], and the scores it went by,
float [n] or None. To add one, put it into METHODS below: flags, records and tables ask there.
"""

import math
from collections.abc import Callable
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
            advice = "run score.py --base with this --run"
            raise InputError(f"no losses under the {model} model: {advice}")
        return self.losses[model][self.ranked]

    def S(self, reference: str = "utility") -> Tensor:
        """The paper's score L^u - L^h; or with the losses under the "base" in place of L^u."""
        return self.loss(reference) - self.loss("degraded")

    def position(self) -> Tensor:
        """Which of its row's response tokens each one is, from 0, int64 [n]."""
        return self.tokens.positions()[self.ranked]

    def harmful(self) -> Tensor:
        """Ground truth, bool [n]."""
        if not self.tokens.harmful.any():
            raise InputError("this method needs the ground truth: no row marks harm (`harmful`)")
        return self.tokens.harmful[self.ranked]


def top(scores: Tensor, c: Candidates) -> Choice:
    """One ranking of all rows together, as in TOSS, but by other scores."""
    return select_tokens(scores, c.d), scores


# Tokens, without a reference model


def sft(c: Candidates) -> Choice:
    """Plain fine-tuning: every token stays."""
    return torch.ones(len(c.ranked), dtype=torch.bool), None


def random(c: Candidates) -> Choice:
    """Tokens drawn at random."""
    generator = torch.Generator().manual_seed(c.seed)
    return top(torch.rand(len(c.ranked), generator=generator), c)


def first_k(c: Candidates) -> Choice:
    """The first tokens of every row, equally many of each as far as its length allows."""
    return top(-c.position().float(), c)


def first_5(c: Candidates) -> Choice:
    """The first five response tokens of each row, as far as they compete, whatever d."""
    return c.position() >= 5, -c.position().float()


# Tokens, by losses


def local(c: Candidates) -> Choice:
    """The highest floor(d |y_i|) of each row by itself: by the rounding, less than d in all."""
    S = c.S()
    keep = [select_tokens(S_of_row, c.d) for S_of_row in S.split(c.sizes.tolist())]
    return torch.cat(keep), S


def degraded_only(c: Candidates) -> Choice:
    """What theta^h expects most."""
    return top(-c.loss("degraded"), c)


def utility_only(c: Candidates) -> Choice:
    """What theta^u expects least."""
    return top(c.loss("utility"), c)


def base(c: Candidates) -> Choice:
    """S with the base theta^0 in place of theta^u."""
    return top(c.S("base"), c)


def weighted(c: Candidates) -> Choice:
    """L^u - 0.5 L^h."""
    return top(c.loss("utility") - 0.5 * c.loss("degraded"), c)


# Whole rows


def mean_of_row(c: Candidates) -> tuple[Tensor, Tensor]:
    """The mean S of each token's row, float32 [n], and the rows sorted by it, highest first."""
    sums = torch.zeros(c.tokens.rows, dtype=torch.float64)
    sums.index_add_(0, c.row, c.S().double())
    means = (sums / c.sizes).float()  # NaN for a row without ranked tokens, which comes last
    order = means.nan_to_num(-math.inf).argsort(descending=True, stable=True)
    return means[c.row], order


def sample(c: Candidates) -> Choice:
    """Whole rows, highest mean S first, as many as fit into d of the tokens."""
    scores, order = mean_of_row(c)
    budget = math.floor(c.d * len(scores) + 1e-9)
    count = int((c.sizes[order].cumsum(0) <= budget).sum())
    return ~torch.isin(c.row, order[:count]), scores


def sample_all(c: Candidates) -> Choice:
    """Whole rows, highest mean S first, as many as truly hold harm, whatever d."""
    scores, order = mean_of_row(c)
    count = len(c.row[c.harmful()].unique())
    return ~torch.isin(c.row, order[:count]), scores


def oracle(c: Candidates) -> Choice:
    """Exactly the harmful tokens."""
    return ~c.harmful(), c.harmful().float()


# The registry


@dataclass(frozen=True)
class Method:
    """A way of choosing tokens, and what others need to know of it."""

    choose: Callable[[Candidates], Choice] | None  # None: select.py has it
    about: str  # a line for people: what is trained
    losses: tuple[str, ...] = ("utility", "degraded")  # the models whose losses it needs
    uses_d: bool = True  # d decides what it discards


METHODS = {
    "toss": Method(None, "without the loss of the tokens with the highest S"),
    "sft": Method(sft, "plain fine-tuning, on every response token", losses=(), uses_d=False),
    "mask": Method(None, "with the mask of another run", losses=(), uses_d=False),
    "random": Method(random, "without the loss of random tokens", losses=()),
    "first-k": Method(first_k, "without the loss of each row's first tokens", losses=()),
    "first-5": Method(
        first_5, "without the loss of each row's first five tokens", losses=(), uses_d=False
    ),
    "local": Method(local, "TOSS with a ranking per row"),
    "sample": Method(sample, "without whole rows, those with the highest mean S"),
    "sample-all": Method(sample_all, "without whole rows, as many as are harmful", uses_d=False),
    "degraded-only": Method(
        degraded_only, "ranked by the degraded model's loss alone", losses=("degraded",)
    ),
    "utility-only": Method(
        utility_only, "ranked by the utility model's loss alone", losses=("utility",)
    ),
    "base": Method(
        base, "TOSS with the base in place of the utility model", losses=("base", "degraded")
    ),
    "weighted": Method(weighted, "ranked by L^u - 0.5 L^h"),
    "oracle": Method(
        oracle, "without the loss of exactly the harmful tokens", losses=(), uses_d=False
    ),
}


def choose(name: str, c: Candidates) -> tuple[Tensor, Tensor | None]:
    """The loss mask of a method, bool [N], and the scores it went by, float32 [N] or None."""
    keep = c.tokens.response.clone()
    keep[c.ranked], scores = METHODS[name].choose(c)
    if scores is None:
        return keep, None
    return keep, torch.zeros(len(keep)).index_put((c.ranked,), scores.float())
