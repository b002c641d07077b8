"""One loop trains every model, and one loop scores: AdamW as in the paper, and nothing silent."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import fails, make_base, sources
from helpers import (
    Noted,
    losses_by_hand,
    micro_batch,
    overflowing,
    random_adapter,
    refused,
    succeed,
)

from model import load_checkpoint, save_checkpoint
from model.io import made_from
from model.lora import active, new_adapter, use
from toss.config import TrainConfig
from toss.loss import token_loss
from toss.scoring import score
from toss.tokens import batches
from toss.training import train, training_steps
from toss.workbench.run import open_run

CONFIG = TrainConfig(lr=1e-2, batch_size=4, rank=2, alpha=4, targets="q_proj,v_proj,down_proj")


def fit(model, tokens, config=CONFIG, **options):
    """The adapter, flat, and the events of training on every response token."""
    w = tokens.response.float()
    watch = options.pop("watch", None) or Noted()
    adapter = train(model, tokens, w, config, watch=watch, **options)
    assert active(model) is None  # the base is left alone
    return flat(adapter.tensors()), watch.events


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


# The steps


def test_each_step_is_reported_with_the_rate_of_its_schedule(model, tokens):
    _, events = fit(model, tokens, replace(CONFIG, schedule="cosine"))
    rates = [event["lr"] for event in events]
    assert rates == pytest.approx([1e-2, 8.53553e-3, 5e-3, 1.46447e-3], rel=1e-5)
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    assert sum(event["tokens"] for event in events) == 2 * sum(tokens.lengths)


def test_the_seed_draws_the_order_of_the_rows(tokens):
    some = replace(tokens)
    some.lengths[1] = 0  # skipped rows are in no step
    steps = list(training_steps(some, CONFIG))
    assert steps != list(training_steps(some, replace(CONFIG, seed=1)))
    assert [len(rows) for rows in steps] == [4, 3, 4, 3]
    first_epoch = steps[0] + steps[1]
    second_epoch = steps[2] + steps[3]
    assert sorted(first_epoch) == sorted(second_epoch) == [0, 2, 3, 4, 5, 6, 7]
    assert first_epoch != second_epoch


def two_rates(parameters, config):
    """A group of parameters may have a rate of its own."""
    groups = [{"params": parameters[0::2], "lr": 0.2}, {"params": parameters[1::2], "lr": 0.5}]
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)


def test_the_steps_are_the_papers_adamw_with_clipping_at_one(model, tokens):
    config = replace(CONFIG, lr=0.1, batch_size=8, seed=6)
    ours, events = fit(model, tokens, config)
    assert max(event["grad_norm"] for event in events) > 1  # or clipping would not show
    adapter = active(use(model, new_adapter(model, 2, 4, CONFIG.targets.split(","), seed=6)))
    parameters = [parameter.requires_grad_() for parameter in adapter.tensors()]
    by_hand = torch.optim.AdamW(parameters, lr=0.1, betas=(0.9, 0.95), weight_decay=0)
    for event in events:
        by_hand.zero_grad()
        losses = [losses_by_hand(model, tokens, row).sum() for row in range(8)]
        loss = sum(losses) / tokens.response.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        by_hand.step()
        assert event["loss"] == pytest.approx(loss.item(), rel=1e-4)
    theirs = flat(parameters)
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(trained, tokens):
    def size_kept(checkpointing):
        model = open_run(trained, gradient_checkpointing=checkpointing).base("train")
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            micro_batch(model, tokens, [3, 4, 5])
        return sum(sizes)

    assert size_kept(True) < size_kept(False) / 2


# An objective of one's own


def noting(calls):
    """The paper's objective, which notes the steps and the rows that it is given."""

    def objective(model, batch, weights):
        calls.append((batch.step, batch.rows))
        return token_loss(model, batch, weights)

    return objective


def test_an_objective_is_told_step_and_rows_of_its_batch_behind_the_rehearsal_of_the_largest(
    model, tokens
):
    calls = []
    config = replace(CONFIG, batch_tokens=64)
    fit(model, tokens, config, objective=noting(calls))
    planned = []
    for step, rows in enumerate(training_steps(tokens, CONFIG), start=1):
        planned += [(step, group) for group in batches(rows, tokens.lengths, 64)]
    (step, rehearsed), *others = calls
    assert others == planned
    assert len(planned) > 4  # several batches make a step
    assert step == 0
    sizes = [len(rows) * tokens.lengths[rows[0]] for _, rows in others]
    assert len(rehearsed) * tokens.lengths[rehearsed[0]] == max(sizes)


def test_an_objective_may_look_at_the_base_and_training_is_unchanged(model, tokens):
    model.gradient_checkpointing = True  # the backward pass runs the model again
    expected, _ = fit(model, tokens)

    def objective(model, batch, weights):
        loss = token_loss(model, batch, weights)
        with torch.no_grad(), use(model, None):
            token_loss(model, batch, weights)
        return loss

    again, _ = fit(model, tokens, objective=objective)
    assert torch.equal(again, expected)


# Scores


def test_an_id_without_an_embedding_is_an_error_that_names_the_rows(model, tokens):
    ids = tokens.input_ids.clone()
    ids[3] = model.config.vocab_size
    others = replace(tokens, input_ids=ids)
    message = f"{tokens.name} has the id {ids[3]}, but the base has {ids[3]} embeddings"
    fails(message, score, model, others)
    fails(message, fit, model, others)


def test_scores_are_the_losses_of_a_plain_loop_in_any_batch(model, tokens):
    use(model, random_adapter(model))
    expected = torch.zeros(len(tokens.input_ids))
    with torch.no_grad():
        losses = [losses_by_hand(model, tokens, row) for row in range(8)]
    expected[tokens.response] = torch.cat(losses)
    for budget in (1, 100, None):
        assert torch.allclose(score(model, tokens, budget), expected, atol=1e-5)


# Memory


def test_running_out_of_memory_names_a_smaller_batch_before_the_first_step(model, tokens):
    """Scoring begins with the longest rows; training rehearses its largest micro-batch."""

    def has_little_memory(module, arguments):
        if arguments[0].numel() > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(has_little_memory)
    words = "out of memory with 1000 tokens per batch, .*give --batch-tokens 500; .*goes on"
    watch = Noted()
    fails(words, score, model, tokens, 1000, watch)
    fails(words, fit, model, tokens, replace(CONFIG, batch_tokens=1000), watch=watch)
    assert watch.events == []
    score(model, tokens, 150)


# Interrupted work


def interrupted(work, step, states):
    """Begin work that is saved after every step, and end it in this one."""

    def stop(event):
        if event["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(watch=Noted(states, stop))


def test_an_interrupted_training_goes_on_and_ends_equal_to_the_bit(model, tokens, tmp_path):
    work = partial(fit, model, tokens, optimizer=two_rates)
    expected, events = work()
    interrupted(work, 3, tmp_path)
    again, later_events = work(watch=Noted(tmp_path))
    assert torch.equal(again, expected)
    assert later_events == [{"resumed": 2, "steps": 4}, *events[2:]]


def test_an_interrupted_scoring_goes_on_and_ends_equal_to_the_bit(model, tokens, tmp_path):
    work = partial(score, model, tokens, 100)
    whole = Noted()
    expected = work(watch=whole)
    finished = [event["step"] for event in whole.events]
    assert finished[-1] == sum(tokens.lengths)
    interrupted(work, finished[2], tmp_path)
    later = Noted(tmp_path)
    assert torch.equal(work(watch=later), expected)
    resumed = {"resumed": finished[1], "steps": finished[-1], "unit": "token"}
    assert later.events == [resumed, *whole.events[2:]]


def test_a_resumed_training_may_have_smaller_batches_but_no_other_settings(model, tokens, tmp_path):
    interrupted(partial(fit, model, tokens), 3, tmp_path)
    calls = []
    smaller = replace(CONFIG, batch_tokens=64)
    fit(model, tokens, smaller, objective=noting(calls), watch=Noted(tmp_path))
    assert {step for step, _ in calls} == {0, 3, 4}
    words = "other rows, weights or settings"
    watch = Noted(tmp_path)
    fails(words, fit, model, tokens, replace(CONFIG, lr=0.5), watch=watch)
    fails(words, train, model, tokens, tokens.response / 2, CONFIG, watch=watch)


# What is not finite


def test_a_loss_that_is_not_finite_names_the_row(model, tokens):
    ids = tokens.input_ids.clone()
    ids[tokens.offsets[3] + 1] = 383  # no other row has this token
    assert (ids == 383).sum() == 1
    bad = replace(tokens, input_ids=ids)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), False)
    model.model.embed_tokens.weight.data[383] = torch.nan
    words = r"rows: .*not finite on row 3 .*at step 1.*--lr"
    fails(words, fit, model, bad, replace(CONFIG, batch_size=8))
    fails(r"rows: .*token \d+ of row 3 .*not finite.*float32", score, model, bad)


def test_an_adapter_that_ends_in_infinities_is_an_error(model, tokens):
    def spoil(event):
        active(event["model"]).tensors()[0].data.fill_(torch.inf)

    weights = tokens.response.float()
    config = replace(CONFIG, epochs=1, batch_size=99)
    words = "rows: the trained adapter is not finite; lower --lr"
    fails(words, train, model, tokens, weights, config, watch=Noted(act=spoil))


# Overflow in float16


def assert_overflows(folder, tokens):
    """Float32 scores under a base are finite, and those in float16 are refused."""
    assert score(load_checkpoint(folder), tokens).isfinite().all()
    fails("float16", score, load_checkpoint(folder, dtype=torch.float16), tokens)


def test_an_infinite_key_that_no_query_wants_shows_too(tmp_path, tokens):
    """Its attention weight would be 0, and every number finite but wrong."""
    folder = make_base(tmp_path / "biased", attention_bias=True)
    model = load_checkpoint(folder)
    # The slowest pair of channels of each head of 8: its angles stay small over a row.
    attention = model.model.layers[0].self_attn
    for layer, bias in ((attention.q_proj, -1e-4), (attention.k_proj, 6.2e4)):
        slow = torch.arange(layer.out_features) % 4 == 3
        layer.bias[slow] = bias
        layer.weight[slow] = 0
    save_checkpoint(model, folder, like=folder)
    assert_overflows(folder, tokens)


def test_an_overflow_in_float16_is_an_error_that_names_what_holds_it(tmp_path, files, capsys):
    base = overflowing(tmp_path / "huge", "mlp.down")
    run = tmp_path / "run"
    succeed(f"train.py --run {run} {sources(files, base)}")
    line = f"score.py --run {run} --custom {files['custom']}"
    error = refused(capsys, f"{line} --dtype float16")
    assert re.search("token .* of row .* is not finite in torch.float16: give --dtype tf32", error)
    succeed(f"{line} --dtype tf32")
    assert made_from(run / "scores.safetensors")["settings"]["dtype"] == "tf32"
    on_gpu = open_run(run)
    on_gpu.__dict__["device"] = torch.device("cuda")
    assert on_gpu.dtypes == {"train": "bfloat16", "score": "float16"}
