"""One global ranking: the floor(d n) riskiest tokens of all rows leave the loss, no others.

The other methods are counted out by hand on the thirteen tokens of ranked_tokens.jsonl, a case per
line of methods.jsonl.
"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, fails, read_jsonl
from helpers import each_line, succeed
from safetensors.torch import load_file

from toss.methods import METHODS, Candidates
from toss.selection import competing_tokens, riskiest_rows, select_tokens
from toss.tokens import Tokens

CHOSEN = [name for name, method in METHODS.items() if method.choose]  # toss is in select.py

# TOSS

# In floats 0.29 * 100 is a little below 29.
COUNTS = [(100, 0.29, 29), (7, 0.5, 3), (1, 0.999, 0)]


@pytest.mark.parametrize(("n", "d", "k"), COUNTS)
def test_exactly_floor_d_n_of_the_highest_go(n, d, k):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
    keep = select_tokens(scores, d)
    assert keep.dtype == torch.bool
    highest = scores.sort(descending=True).values[:k]
    assert scores[~keep].sort(descending=True).values.equal(highest)


def test_exactly_floor_d_n_go_and_of_equal_scores_the_earlier_first():
    def discarded(scores, d):
        return (~select_tokens(torch.tensor(scores), d)).nonzero()[:, 0].tolist()

    assert discarded([1.0] * 10, 0.3) == [0, 1, 2]
    assert discarded([1.0, 2, 1, 2, 1, 3], 0.5) == [1, 3, 5]
    assert discarded([1.0, 2, 1, 2, 1, 3], 0.34) == [1, 5]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_score_that_is_not_finite_is_an_error(bad):
    fails("score 1 of 3", select_tokens, torch.tensor([0.0, bad, 1.0]), 0.5)


@pytest.mark.parametrize("d", [-0.1, 1, math.nan])
def test_a_share_out_of_range_is_an_error(d):
    fails("discard", select_tokens, torch.ones(3), d)


# TOSS-Pro


def test_pro_walks_down_the_tokens_and_takes_each_row_once_of_equal_ones_the_earlier():
    scores = torch.tensor([3.0, 9, 8, 8, 8, 1])
    rows = torch.tensor([0, 1, 1, 2, 3, 4])
    assert riskiest_rows(scores, rows, set(), 3) == [(1, 1), (2, 3), (3, 4)]
    assert riskiest_rows(scores, rows, [1, 3], 2) == [(2, 3), (0, 0)]  # rows of an earlier round
    assert riskiest_rows(scores, rows, {0, 1, 2, 3}, 5) == [(4, 5)]  # fewer when they run out


def test_pro_walks_as_far_as_it_must():
    n = 70_000  # more than the walk takes at once
    scores = torch.arange(n).flip(0).float()
    rows = torch.zeros(n, dtype=torch.int64)
    rows[-1] = 1
    assert riskiest_rows(scores, rows, set(), 2) == [(0, 0), (1, n - 1)]


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


def test_a_row_without_ranked_tokens_is_no_row_of_mean_zero():
    c = candidates()
    c.losses["degraded"] += 10  # every mean is below 0; row 1 has none
    assert discarded("sample-all", c) == [4, 5, 6]


def test_random_draws_by_the_seed_alone():
    one = discarded("random", candidates(seed=1))
    assert len(one) == 3  # as many as TOSS
    assert one == discarded("random", candidates(seed=1))
    assert one != discarded("random", candidates(seed=2))


@pytest.mark.parametrize("method", CHOSEN)
def test_a_method_keeps_to_its_budget(method):
    """But those without a d, that are told the truth, or take the first tokens."""
    count = len(discarded(method, candidates(0.35)))
    assert count <= 3 or not METHODS[method].uses_d


def test_first_5_takes_five_tokens_of_a_longer_response():
    n = 8
    response = torch.arange(n) > 0
    tokens = Tokens(torch.arange(n), torch.tensor([0, n]), response, harmful=~response)
    c = Candidates(tokens, {}, competing_tokens(tokens), d=0.1)
    assert discarded("first-5", c) == [1, 2, 3, 4, 5]


def test_the_seed_of_the_command_draws_the_random_tokens(trained):
    masks = []
    for seed in (0, 1):
        succeed(f"select.py --run {trained} --method random --name r{seed} --seed {seed}")
        masks.append(load_file(trained / f"methods/r{seed}/selection.safetensors")["keep"])
    assert masks[0].sum() == masks[1].sum()
    assert not torch.equal(masks[0], masks[1])


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
