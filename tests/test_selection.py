"""One global ranking: the floor(d n) riskiest tokens of all rows leave the loss, no others.

The other methods are counted out by hand on the thirteen tokens of ranked_tokens.jsonl, a case per
line of methods.jsonl.
"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, fails, read_jsonl
from helpers import each_line

from toss.methods import METHODS, Candidates
from toss.selection import competing_tokens, riskiest_rows, select_tokens
from toss.tokens import Tokens

CHOSEN = [name for name, method in METHODS.items() if method.choose]  # toss is in select.py

# TOSS


def discards(scores, d):
    """The places that TOSS discards."""
    keep = select_tokens(torch.tensor(scores), d)
    return (~keep).nonzero()[:, 0].tolist()


def test_exactly_floor_d_n_go_and_of_equal_scores_the_earlier_first():
    assert discards([1.0] * 10, 0.3) == [0, 1, 2]
    assert discards([1.0, 2, 1, 2, 1, 3], 0.5) == [1, 3, 5]
    assert discards([1.0, 2, 1, 2, 1, 3], 0.34) == [1, 5]
    assert discards([1.0], 0.999) == []
    falling = [-float(i) for i in range(100)]
    assert discards(falling, 0.29) == list(range(29))  # 0.29 * 100 is 28.999999999999996


def test_a_score_that_is_not_finite_and_a_share_out_of_range_are_errors():
    for bad in (math.nan, -math.inf):
        fails("score 1 of 3", discards, [0.0, bad, 1.0], 0.5)
    for d in (-0.1, 1, math.nan):
        fails("discard", discards, [1.0], d)


# TOSS-Pro


# Scores and rows of six tokens.
SIX = (torch.tensor([3.0, 9, 8, 8, 8, 1]), torch.tensor([0, 1, 1, 2, 3, 4]))


def test_pro_walks_down_the_tokens_and_takes_each_row_once_of_equal_ones_the_earlier():
    assert riskiest_rows(*SIX, set(), 3) == [(1, 1), (2, 3), (3, 4)]
    assert riskiest_rows(*SIX, [1, 3], 2) == [(2, 3), (0, 0)]  # rows of an earlier round
    assert riskiest_rows(*SIX, {0, 1, 2, 3}, 5) == [(4, 5)]  # fewer when they run out


# The other methods: rows of a prompt token and of 2, 0 (skipped), 3 and 5 response tokens

TOKENS = read_jsonl(ROOT / "tests/ranked_tokens.jsonl")
EOS = 9


def column(name):
    return torch.tensor([token[name] for token in TOKENS])


def candidates(d=0.3, eos_id=None, seed=0):
    offsets = torch.tensor([0, 3, 3, 7, 13])
    tokens = Tokens(column("id"), offsets, column("response"), column("harmful"))
    losses = {name: column(name).float() for name in ("utility", "degraded", "base")}
    return Candidates(tokens, losses, competing_tokens(tokens, eos_id), d, seed)


def discarded(method, c):
    """Places of the flat arrays that a method discards."""
    keep, scores = METHODS[method].choose(c)
    assert len(keep) == len(c.ranked)
    assert scores is None or len(scores) == len(c.ranked)
    return c.ranked[~keep].tolist()


def test_competing_tokens_are_all_response_tokens_or_all_but_eos():
    tokens = candidates().tokens
    assert competing_tokens(tokens).tolist() == [1, 2, 4, 5, 6, 8, 9, 10, 11, 12]
    assert competing_tokens(tokens, eos_id=EOS).tolist() == [1, 4, 5, 8, 9, 10, 11]


@each_line("methods.jsonl")
def test_each_method_by_hand(case):
    assert discarded(case["method"], candidates(case["d"])) == case["discards"]


def test_random_draws_by_the_seed_alone():
    one = discarded("random", candidates(seed=1))
    assert len(one) == 3  # as many as TOSS
    assert one == discarded("random", candidates(seed=1))
    assert one != discarded("random", candidates(seed=2))


@pytest.mark.parametrize("method", CHOSEN)
def test_a_method_needs_the_losses_that_the_registry_names_and_no_others(method):
    needed = METHODS[method].losses
    c = candidates()
    c.losses = {name: c.losses[name] for name in needed}
    METHODS[method].choose(c)
    for name in needed:
        others = replace(c, losses={other: c.losses[other] for other in needed if other != name})
        fails("run score.py", METHODS[method].choose, others)


@pytest.mark.parametrize("method", CHOSEN)
def test_d_decides_exactly_where_the_registry_says_so(method):
    masks = [METHODS[method].choose(candidates(d))[0] for d in (0.1, 0.6)]
    assert torch.equal(*masks) == (not METHODS[method].uses_d)
