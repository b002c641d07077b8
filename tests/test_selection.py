"""The mask: the worked example, ties, the count, and each way of choosing on a case made by hand."""

import doctest
import math

import pytest
import torch

import toss.refinement
import toss.selection
from model.errors import InputError
from toss.dataset import Tokens
from toss.refinement import default_samples, riskiest_rows
from toss.selection import METHODS, Candidates, choose, ranked_entries, select_tokens


def hand_made() -> tuple[Tokens, dict]:
    """Three rows of a prompt token and 2, 3 and 5 response tokens; row 1 was skipped and is empty. EOS is 9."""
    ids = torch.tensor([1, 5, 9, 1, 6, 7, 9, 1, 2, 3, 4, 5, 9], dtype=torch.int32)
    response = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    harmful = torch.zeros(13, dtype=torch.bool)
    harmful[5] = True
    tokens = Tokens(ids, torch.tensor([0, 3, 3, 7, 13]), response, harmful, "hand-made")
    utility = torch.tensor([0, 1.0, 1, 0, 4, 5, 6, 0, 9, 0, 0, 0, 1])
    return tokens, {"loss_utility": utility, "loss_degraded": torch.zeros(13)}


@pytest.mark.parametrize("module", [toss.selection, toss.refinement])
def test_the_worked_examples_in_the_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("d", [0, 0.05, 0.1, 0.29, 0.5, 0.999])
@pytest.mark.parametrize("n", [1, 7, 100, 1000])
def test_exactly_floor_d_n_of_the_highest_go(d, n):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
    keep = select_tokens(scores, d)
    k = math.floor(d * n + 1e-9)
    assert keep.dtype == torch.bool and int((~keep).sum()) == k
    assert k == 0 or keep.all() or scores[~keep].min() >= scores[keep].max()


def test_of_equal_scores_the_earlier_goes_first():
    assert select_tokens(torch.ones(10), 0.3).tolist() == [False] * 3 + [True] * 7


@pytest.mark.parametrize("d", [-0.1, 1, 1.5, math.nan])
def test_d_outside_its_range_is_an_error(d):
    with pytest.raises(InputError, match="discard"):
        select_tokens(torch.ones(3), d)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_an_error(bad):
    with pytest.raises(InputError, match="score 1 of 3"):
        select_tokens(torch.tensor([0.0, bad, 1.0]), 0.5)


def gone(method, d=0.3, keep_eos=False, **more):
    tokens, losses = hand_made()
    entries = ranked_entries(tokens, keep_eos, 9)
    keep, scores = choose(method, Candidates(tokens, entries, losses, **more), d)
    assert keep[~tokens.response].all() and (scores is None or len(scores) == len(entries))
    return (~keep).nonzero().squeeze(1).tolist()


def test_toss_ranks_all_rows_together():
    assert gone("toss") == [5, 6, 8]  # S = 9, 6, 5 in rows 3, 2, 2


def test_eos_competes_unless_told_otherwise():
    assert gone("toss", keep_eos=True) == [5, 8]  # floor(0.3 * 7): the count shrinks too


def test_sample_drops_whole_rows_within_the_budget():
    assert gone("sample", d=0.3) == [4, 5, 6]  # the row of mean 5; the next would exceed the budget
    assert gone("sample", d=0.2) == []


def test_sample_all_is_told_how_many_rows_hold_harm():
    assert gone("sample-all") == [4, 5, 6]


def test_random_draws_the_same_count_by_seed():
    assert len(gone("random")) == 3 and gone("random") == gone("random")
    assert gone("random", seed=1) != gone("random", seed=2)


def test_local_cuts_in_each_row_by_itself():
    assert gone("local", d=0.5) == [1, 6, 8, 12]  # 1 of 2 (equal scores: the earlier), 1 of 3, 2 of 5
    assert gone("local", d=0.3) == [8]  # floor(0.3 * 5) = 1 in the last row, none in the others


@pytest.mark.parametrize("d", [0.1, 0.13, 0.29, 0.57])
def test_local_takes_exactly_the_floor_of_each_row(d):
    lengths = [1, 7, 100, 900, 999]
    tokens = Tokens(torch.zeros(2007, dtype=torch.int32), torch.tensor([0, *lengths]).cumsum(0), torch.ones(2007, dtype=torch.bool),
                    torch.zeros(2007, dtype=torch.bool), "rows of every length")
    losses = {"loss_utility": torch.randn(2007, generator=torch.Generator().manual_seed(0)), "loss_degraded": torch.zeros(2007)}
    keep, _ = choose("local", Candidates(tokens, torch.arange(2007), losses), d)
    gone = [int((~part).sum()) for part in keep.split(lengths)]
    assert gone == [math.floor(d * length + 1e-9) for length in lengths]


def test_first_k_takes_the_beginnings_of_all_rows():
    assert gone("first-k", d=0.3) == [1, 4, 8]
    assert gone("first-k", d=0.5) == [1, 2, 4, 5, 8]  # the first of each, then the second of each, the earlier row first


def test_the_corners_of_the_weighted_score():
    tokens, losses = hand_made()
    losses["loss_degraded"] = torch.tensor([0, 2.0, 0.5, 0, 4, 1, 6, 0, 3, 0.1, 0.2, 7, 0])
    entries = ranked_entries(tokens, False, 9)
    for weights, corner in [((1, 1), "toss"), ((0, 1), "degraded-only"), ((1, 0), "utility-only")]:
        keep, _ = choose("weighted", Candidates(tokens, entries, losses, weights=weights), 0.4)
        assert keep.equal(choose(corner, Candidates(tokens, entries, losses), 0.4)[0]), corner
    scores = choose("weighted", Candidates(tokens, entries, losses, weights=(2.0, 0.5)), 0.4)[1]
    assert scores[0] == 2 * 1.0 - 0.5 * 2.0


def test_degraded_only_drops_what_the_degraded_model_expects():
    tokens, losses = hand_made()
    losses["loss_degraded"] = torch.arange(13.0)
    keep, _ = choose("degraded-only", Candidates(tokens, ranked_entries(tokens, False, 9), losses), 0.2)
    assert (~keep).nonzero().squeeze(1).tolist() == [1, 2]  # the lowest L^h


def test_base_needs_the_losses_of_the_base():
    tokens, losses = hand_made()
    candidates = Candidates(tokens, ranked_entries(tokens, False, 9), losses)
    with pytest.raises(InputError, match="--base"):
        choose("base", candidates, 0.3)
    losses["loss_base"] = losses["loss_utility"].flip(0)
    scores = choose("base", candidates, 0.3)[1]
    assert scores.equal((losses["loss_base"] - losses["loss_degraded"])[candidates.entries])


def test_oracle_drops_the_truth_whatever_d():
    assert gone("oracle", d=0) == gone("oracle", d=0.9) == [5]


@pytest.mark.parametrize("method", ["oracle", "sample-all"])
def test_methods_that_are_told_the_truth_need_it(method):
    tokens, losses = hand_made()
    tokens.harmful[:] = False
    with pytest.raises(InputError, match="marks no harm"):
        choose(method, Candidates(tokens, ranked_entries(tokens, False, 9), losses), 0.3)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("sft", "oracle", "sample-all", "base")])
def test_no_method_exceeds_its_budget(method):
    assert len(gone(method, d=0.35)) <= 3


def test_sft_drops_nothing():
    assert gone("sft") == []


def test_pro_walks_down_the_tokens_and_takes_each_row_once():
    scores, rows = torch.tensor([3.0, 9.0, 8.0, 8.0, 7.0, 1.0]), torch.tensor([0, 1, 1, 2, 3, 4])
    assert riskiest_rows(scores, rows, set(), 3) == [(1, 1), (2, 3), (3, 4)]
    assert riskiest_rows(scores, rows, {1, 3}, 2) == [(2, 3), (0, 0)]  # rows of an earlier round are passed over
    assert riskiest_rows(scores, rows, {0, 1, 2, 3}, 5) == [(4, 5)]  # fewer when they run out
    assert riskiest_rows(torch.ones(3), torch.tensor([2, 0, 1]), set(), 2) == [(2, 0), (0, 1)]  # ties: the earlier first


def test_pro_takes_six_percent_of_the_rows_by_default():
    few, _ = hand_made()
    assert default_samples(few) == 1
    hundred = Tokens(torch.zeros(100), torch.arange(101), torch.ones(100), torch.zeros(100), "hundred rows")
    assert default_samples(hundred) == 6
