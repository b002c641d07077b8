"""One global ranking: the floor(d n) riskiest tokens of all rows leave the loss, no others."""

import math

import pytest
import torch
from conftest import fails

from model.io import InputError
from toss import config
from toss.methods import METHODS, Candidates
from toss.selection import competing_tokens, riskiest_rows, select_tokens
from toss.tokens import Tokens


@pytest.mark.parametrize("d", [0, 0.05, 0.1, 0.13, 0.29, 0.5, 0.57, 0.999])
@pytest.mark.parametrize("n", [1, 7, 100, 1000])
def test_exactly_floor_d_n_of_the_highest_go(d, n):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
    keep, k = select_tokens(scores, d), math.floor(round(d * 1000) * n / 1000)
    assert keep.dtype == torch.bool and int((~keep).sum()) == k
    assert k == 0 or keep.all() or scores[~keep].min() >= scores[keep].max()


def test_of_equal_scores_the_earlier_goes_first():
    assert select_tokens(torch.ones(10), 0.3).tolist() == [False] * 3 + [True] * 7
    scores = torch.tensor([1.0, 2, 1, 2, 1, 3])
    assert select_tokens(scores, 0.5).tolist() == [True, False, True, False, True, False]
    assert select_tokens(scores, 0.34).tolist() == [True, False, True, True, True, False]


def test_a_score_that_is_not_finite_and_d_out_of_range_are_errors():
    for bad in (math.nan, math.inf, -math.inf):
        fails("score 1 of 3", select_tokens, torch.tensor([0.0, bad, 1.0]), 0.5)
    for d in (-0.1, 1, 1.5, math.nan):
        fails("discard", select_tokens, torch.ones(3), d)


def test_pro_walks_down_the_tokens_and_takes_each_row_once():
    scores, rows = torch.tensor([3.0, 9, 8, 8, 7, 1]), torch.tensor([0, 1, 1, 2, 3, 4])
    assert riskiest_rows(scores, rows, set(), 3) == [(1, 1), (2, 3), (3, 4)]
    assert riskiest_rows(scores, rows, [1, 3], 2) == [(2, 3), (0, 0)]  # rows of an earlier round
    assert riskiest_rows(scores, rows, {0, 1, 2, 3}, 5) == [(4, 5)]  # fewer when they run out
    ties = riskiest_rows(torch.ones(3), torch.tensor([2, 0, 1]), set(), 2)
    assert ties == [(2, 0), (0, 1)]  # the earlier token first
    assert riskiest_rows(scores, rows, set(), 0) == []


# Rows of a prompt token and of 2, 0 (skipped), 3 and 5 response tokens; EOS is 9; one is harmful.
IDS = [1, 5, 9, 1, 6, 7, 9, 1, 2, 3, 4, 5, 9]
PROMPTS = [0, 3, 7]
UTILITY = [0, 1.0, 1, 0, 4, 5, 6, 0, 9, 0, 0, 0, 1]
DEGRADED = [0, 2.0, 0.5, 0, 4, 1, 6, 0, 3, 0.1, 0.2, 7, 0]
HARMFUL = 5


def candidates(d=0.3, degraded=(0.0,) * 13, keep_eos=False, seed=0) -> Candidates:
    response, harmful = torch.ones(13, dtype=torch.bool), torch.zeros(13, dtype=torch.bool)
    response[PROMPTS], harmful[HARMFUL] = False, True
    ids = torch.tensor(IDS, dtype=torch.int32)
    tokens = Tokens(ids, torch.tensor([0, 3, 3, 7, 13]), response, harmful)
    losses = {"utility": torch.tensor(UTILITY), "degraded": torch.tensor(degraded)}
    losses["base"] = losses["utility"].flip(0)
    return Candidates(tokens, losses, competing_tokens(tokens, 9 if keep_eos else None), d, seed)


def gone(method, d=0.3, **more) -> list[int]:
    """Places of the flat arrays that a method discards."""
    c = candidates(d, **more)
    keep, scores = METHODS[method](c)
    assert keep.dtype == torch.bool and len(keep) == len(c.ranked)
    assert scores is None or len(scores) == len(c.ranked)
    return c.ranked[~keep].tolist()


def test_competing_tokens_are_all_response_tokens_or_all_but_eos():
    tokens = candidates().tokens
    places = [i for i in range(13) if i not in PROMPTS]
    assert competing_tokens(tokens).tolist() == places
    assert competing_tokens(tokens, eos_id=9).tolist() == [i for i in places if IDS[i] != 9]


GONE = [
    ("sft", 0.3, []),  # plain fine-tuning
    ("first-k", 0.3, [1, 4, 8]),  # the first token of each row
    ("first-k", 0.5, [1, 2, 4, 5, 8]),  # then the second of each, the earlier row first
    ("local", 0.5, [1, 6, 8, 12]),  # 1 of 2 (a tie: the earlier), 1 of 3, 2 of 5
    ("local", 0.3, [8]),  # floor(0.3 * 5) = 1 in the last row, 0 in the others
    ("sample", 0.3, [4, 5, 6]),  # the row of the highest mean; the next exceeds the budget
    ("sample", 0.2, []),
    ("sample-all", 0.01, [4, 5, 6]),  # as many rows as hold harm: 1
    ("utility-only", 0.3, [5, 6, 8]),
    *(("oracle", d, [HARMFUL]) for d in (0.0, 0.9)),  # whatever d
]


@pytest.mark.parametrize(("method", "d", "expected"), GONE)
def test_each_method_by_hand(method, d, expected):
    assert gone(method, d) == expected


def test_methods_that_go_by_other_losses():
    assert gone("degraded-only", 0.2, degraded=tuple(map(float, range(13)))) == [1, 2]  # lowest L^h
    # At place 1, where L^u = 1, L^h = 2, L^0 = 0:
    S = {"weighted": 1 - 0.5 * 2, "degraded-only": -2, "utility-only": 1, "base": 0 - 2}
    S["local"] = 1 - 2
    for method, expected in S.items():
        keep, scores = METHODS[method](candidates(degraded=DEGRADED))
        assert float(scores[0]) == expected, method
        assert method == "local" or keep.equal(select_tokens(scores, 0.3)), method


def test_random_draws_the_same_count_by_seed():
    assert len(gone("random")) == 3 and gone("random") == gone("random")
    assert gone("random", seed=1) != gone("random", seed=2)


@pytest.mark.parametrize("d", [0.1, 0.13, 0.29, 0.57])
def test_local_takes_exactly_the_floor_of_each_row(d):
    lengths = [1, 7, 100, 900, 999]
    flags, n = torch.ones(2007, dtype=torch.bool), 2007
    tokens = Tokens(flags.int(), torch.tensor([0, *lengths]).cumsum(0), flags, ~flags)
    losses = {"utility": torch.randn(n, generator=torch.Generator().manual_seed(0))}
    losses["degraded"] = torch.zeros(n)
    keep, scores = METHODS["local"](Candidates(tokens, losses, torch.arange(n), d))
    for kept, S, length in zip(keep.split(lengths), scores.split(lengths), lengths):
        assert int((~kept).sum()) == math.floor(round(d * 100) * length / 100)
        assert kept.all() or S[~kept].min() >= S[kept].max()


def test_no_method_but_those_told_the_truth_exceeds_its_budget_and_eos_can_be_left_out():
    for method in METHODS.keys() - {"oracle", "sample-all", "first-5"}:
        assert len(gone(method, 0.35)) <= 3, method
        assert not {2, 6, 12} & set(gone(method, 0.9, keep_eos=True)), method


def test_every_name_of_a_method_has_its_function():
    assert {"toss", *METHODS} == set(config.METHODS)
    for method, choose in METHODS.items():
        c = candidates()
        c.losses = {}
        if method in config.UNSCORED:
            choose(c)
        else:
            with pytest.raises(InputError, match="run score.py"):
                choose(c)
                pytest.fail(f"{method} needs no losses: name it in UNSCORED of toss/config.py")
