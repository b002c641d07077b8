"""The loss of a step is the paper's, and a discarded token gives it exactly nothing.

(1 / sum_i L_i) * sum_ij w_ij * -log P(y_ij | x_i, y_i,<j), where L_i counts all response tokens of
row i, the discarded ones too, and a discarded token stays in the input. Losses and gradients are
compared with those of all logits at once.
"""

from dataclasses import replace

import pytest
import torch
from agreement import GOLDENS
from helpers import Noted, losses_by_hand, random_adapter

import toss.loss
from model import load_checkpoint
from model.lora import active, use
from toss.config import TrainConfig
from toss.loss import log_probs, token_loss
from toss.scoring import score
from toss.training import Gradient, train


@pytest.fixture
def weights(tokens):
    """Weights of plain fine-tuning, of TOSS (a mask), and of a fork."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(len(tokens.input_ids), generator=generator)
    return {"all": torch.ones_like(drawn), "mask": (drawn > 0.3).float(), "soft": 3 * drawn}


def trainable(model):
    """The parameters of an adapter that is put on the model."""
    parameters = active(use(model, random_adapter(model))).tensors()
    return [parameter.requires_grad_() for parameter in parameters]


def assert_a_step_is_the_formulas(model, tokens, weights, budget=10_000):
    """Loss and gradient of a step over all rows are those from all logits of each row by itself."""
    parameters = trainable(model)
    config = TrainConfig(batch_tokens=budget)
    gradient = Gradient(model, parameters, tokens, weights, token_loss, config)
    loss = gradient.compute(list(range(tokens.rows)), step=1)

    expected = trainable(model)
    total = 0.0
    for row in range(tokens.rows):
        places = tokens.places([row])
        w = weights[places][tokens.response[places]]
        total = total + (w * losses_by_hand(model, tokens, row)).sum()
    expected_loss = total / tokens.response.sum()
    expected_loss.backward()
    assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
    for ours, theirs in zip(parameters, expected):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()


@pytest.mark.parametrize(("kind", "budget"), [("mask", 1), ("soft", 100)])
def test_loss_and_gradient_are_those_of_the_formula_in_any_micro_batches(
    model, tokens, weights, kind, budget
):
    model.gradient_checkpointing = kind == "soft"  # it changes no gradient
    assert_a_step_is_the_formulas(model, tokens, weights[kind], budget)


def test_a_discarded_token_has_exactly_no_gradient(model, tokens, weights):
    """Another token in its place changes nothing, to the bit, through the whole loop."""
    last = int(tokens.offsets[3]) - 1  # the EOS of row 2: no later token sees it
    other = replace(tokens, input_ids=tokens.input_ids.clone())
    other.input_ids[last] = 5
    w = weights["all"]
    w[last] = 0
    config = TrainConfig(lr=1e-2, epochs=1, batch_size=2, rank=2, alpha=4)
    one = train(model, tokens, w, config)
    two = train(model, other, w, config)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors()))


def test_a_row_without_a_kept_token_adds_zero_and_its_length(model, tokens, weights):
    w = weights["all"]
    w[tokens.places([2])] = 0
    assert_a_step_is_the_formulas(model, tokens, w)


def test_a_training_without_a_kept_token_moves_nothing(model, tokens):
    watch = Noted()
    w = torch.zeros(len(tokens.input_ids))
    adapter = train(model, tokens, w, TrainConfig(lr=1, rank=2), watch=watch)
    assert not any(event["loss"] for event in watch.events)  # a NaN is true
    assert not any(B.any() for B in adapter.B.values())


def test_chunks_of_the_head_change_nothing_and_bound_the_logits(
    model, tokens, weights, monkeypatch
):
    losses = score(model, tokens)
    sizes = []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: sizes.append(len(logits)))
    monkeypatch.setattr(toss.loss, "LOGITS", 5 * 384)
    assert torch.allclose(score(model, tokens), losses, atol=1e-5)
    w = tokens.response.float()
    gradient = Gradient(model, trainable(model), tokens, w, token_loss, TrainConfig())
    sizes.clear()
    gradient.compute(list(range(tokens.rows)), step=1)
    assert max(sizes) <= 5
    count = int(tokens.response.sum())
    assert len(sizes) == 2 * ((count + 4) // 5)  # computed anew in the backward pass
    assert_a_step_is_the_formulas(model, tokens, weights["soft"])


def test_log_p_is_the_heads_log_softmax_in_float32():
    head = load_checkpoint(GOLDENS / "plain", dtype=torch.bfloat16).lm_head
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([7, 0, 79])
    expected = head(hidden).float().log_softmax(-1)[torch.arange(3), targets]
    assert torch.allclose(log_probs(head, hidden, targets), expected, atol=1e-5)
