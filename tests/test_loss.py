"""The loss of a step is the paper's, and a discarded token gives it exactly nothing.

(1 / sum_i L_i) * sum_ij w_ij * -log P(y_ij | x_i, y_i,<j), where L_i counts all response tokens of
row i, the discarded ones too, and a discarded token stays in the input. Gradients are taken in the
real loop, `train`, and compared with those of all logits at once.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import losses_by_hand, random_adapter

import toss.loss
from model.lora import active, use
from toss.config import TrainConfig
from toss.loss import hidden_states, token_log_probs, token_loss
from toss.scoring import score
from toss.tokens import collate
from toss.training import train


def same(one, two) -> bool:
    """True if two steps have the same loss and the same gradient, but for rounding."""
    (loss, gradient), (expected_loss, expected) = one, two
    close = (gradient - expected).norm() <= 1e-5 * expected.norm()
    return loss == pytest.approx(expected_loss, rel=1e-5) and bool(close)


def weights_of(tokens, kind):
    """Weights of TOSS (a mask), of plain fine-tuning, or of a fork."""
    drawn = torch.rand(len(tokens.input_ids), generator=torch.Generator().manual_seed(0))
    return {"all": torch.ones_like(drawn), "mask": (drawn > 0.3).float(), "soft": 3 * drawn}[kind]


def step(model, tokens, weights, objective=token_loss, **config):
    """Loss and gradient of one step of `train` over all rows, and what it reported."""
    start, gradients, events = random_adapter(model), [], []

    def watched(model, batch, weights):
        if not gradients:
            for parameter in active(model).tensors():
                gradients.append(torch.zeros_like(parameter))
                parameter.register_hook(partial(add_to, gradients[-1]))
        return objective(model, batch, weights)

    config = TrainConfig(lr=1e-9, epochs=1, batch_size=tokens.rows, **config)
    train(model, tokens, weights, config, watched, start=start, on_step=events.append)
    flat = torch.cat([g.flatten() for g in gradients]) if gradients else torch.zeros(1)
    assert events[0]["grad_norm"] == pytest.approx(float(flat.norm()), rel=1e-4)
    return events[0]["loss"], flat


def add_to(total, gradient):
    """For a hook of a tensor: add its gradient to the total, and leave the gradient as it is."""
    total.add_(gradient)


def cross_entropy(log_p, w):
    return -(w * log_p).sum()


def by_hand(model, tokens, weights, of=cross_entropy):
    """The same from all logits of each row by itself, the discarded tokens in the input."""
    parameters = active(use(model, random_adapter(model))).tensors()
    for parameter in parameters:
        parameter.requires_grad_()
    total = 0.0
    for i in range(tokens.rows):
        at = tokens.places([i])
        total = total + of(-losses_by_hand(model, tokens, i), weights[at][tokens.response[at]])
    loss = total / tokens.response.sum()
    gradients = torch.autograd.grad(loss, parameters)
    use(model, None)
    return float(loss.detach()), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("kind", ["all", "mask", "soft"])
def test_loss_and_gradient_are_those_of_the_formula(model, tokens, kind):
    weights = weights_of(tokens, kind)
    made = step(model, tokens, weights)
    assert same(made, by_hand(model, tokens, weights))
    weights[~tokens.response] = 7.0  # prompts have no loss, whatever their weights
    assert torch.equal(step(model, tokens, weights)[1], made[1])


def test_a_discarded_token_has_exactly_no_gradient(model, tokens):
    """Another token in its place changes nothing, to the bit, through the whole loop."""
    config = TrainConfig(lr=1e-2, epochs=2, batch_size=2, rank=2, alpha=4)
    other, last = replace(tokens, input_ids=tokens.input_ids.clone()), int(tokens.offsets[3]) - 1
    other.input_ids[last] = 5  # the EOS of row 2: no later token sees it, so only its own loss can
    for weight, same in ((0.0, True), (1e-3, False)):
        weights = weights_of(tokens, "all")
        weights[last] = weight
        one, two = (train(model, data, weights, config) for data in (tokens, other))
        equal = all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors()))
        assert equal == same, weight


def test_a_row_without_a_kept_token_counts_and_a_step_without_one_moves_nothing(model, tokens):
    weights = weights_of(tokens, "all")
    weights[tokens.places([2])] = 0
    assert same(step(model, tokens, weights), by_hand(model, tokens, weights))
    assert step(model, tokens, torch.zeros_like(weights))[0] == 0  # and no NaN
    adapter = train(model, tokens, torch.zeros_like(weights), TrainConfig(lr=1, rank=2))
    assert all((B == 0).all() for B in adapter.B.values())


@pytest.mark.parametrize("budget", [1, 40, 100])
def test_micro_batches_change_nothing(model, tokens, budget):
    weights = weights_of(tokens, "mask")
    assert same(step(model, tokens, weights, batch_tokens=budget), step(model, tokens, weights))


def test_chunks_of_the_head_change_nothing_and_bound_the_logits(model, tokens, monkeypatch):
    weights = weights_of(tokens, "soft")
    whole, losses, sizes = step(model, tokens, weights), score(model, tokens), []
    monkeypatch.setattr(toss.loss, "LOGITS", 5 * 384)
    hook = model.lm_head.register_forward_hook(lambda head, x, y: sizes.append(y.numel()))
    assert same(step(model, tokens, weights), whole)
    assert torch.allclose(score(model, tokens), losses, atol=1e-5)
    hook.remove()
    assert max(sizes) == 5 * 384


def test_an_objective_of_ones_own(model, tokens):
    weights = weights_of(tokens, "soft")

    def brier(log_p, w):
        return (w * (1 - log_p.exp()) ** 2).sum()

    def objective(model, batch, w):
        return brier(token_log_probs(model, batch), w)

    made = step(model, tokens, weights, objective)
    assert same(made, by_hand(model, tokens, weights, brier))


def test_an_objective_has_the_hidden_states_that_predict_the_tokens(model, tokens):
    batch = collate(tokens, [0, 3], tokens.response, torch.device("cpu"))
    with torch.no_grad():
        log_p = token_log_probs(model, batch)
        hidden = hidden_states(model, batch)
        expected = model.lm_head(hidden).log_softmax(-1)
    at = torch.arange(len(log_p))
    assert hidden.shape == (len(log_p), 32) and log_p.dtype == torch.float32
    assert torch.allclose(log_p, expected[at, batch.targets], atol=1e-5)
