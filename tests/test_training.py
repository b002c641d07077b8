"""One loop trains every model, and one loop scores: AdamW as in the paper, and nothing silent."""

import json
import re
from dataclasses import replace

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
    tokens_of,
)

from model import load_checkpoint, save_checkpoint
from model.io import InputError, made_from
from model.lora import active, new_adapter, use
from toss.config import TrainConfig
from toss.loss import token_loss
from toss.scoring import score
from toss.tokens import batches
from toss.training import adamw, train, training_steps
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


def test_an_unknown_schedule_is_refused(model, tokens):
    fails("'linear' is neither", fit, model, tokens, replace(CONFIG, schedule="linear"))


def test_each_step_is_reported_with_the_rate_of_its_schedule(model, tokens):
    _, events = fit(model, tokens, replace(CONFIG, schedule="cosine"))
    rates = [event["lr"] for event in events]
    assert rates == pytest.approx([1e-2, 8.53553e-3, 5e-3, 1.46447e-3], rel=1e-5)
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    assert events[0].keys() == {"step", "steps", "loss", "grad_norm", "lr", "tokens", "model"}
    assert events[0]["steps"] == 4
    assert events[0]["model"] is model
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


def papers(parameters, config):
    return torch.optim.AdamW(parameters, lr=0.1, betas=(0.9, 0.95), weight_decay=0)


def two_rates(parameters, config):
    """A group of parameters may have a rate of its own."""
    groups = [{"params": parameters[0::2], "lr": 0.2}, {"params": parameters[1::2], "lr": 0.5}]
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)


@pytest.mark.parametrize(("optimizer", "expected"), [(adamw, papers), (two_rates, two_rates)])
def test_the_steps_are_those_of_the_optimizer_with_clipping_at_one(
    optimizer, expected, model, tokens
):
    config = replace(CONFIG, lr=0.1, batch_size=8, seed=6)
    ours, events = fit(model, tokens, config, optimizer=optimizer)
    assert max(event["grad_norm"] for event in events) > 1  # or clipping would not show
    adapter = active(use(model, new_adapter(model, 2, 4, CONFIG.targets.split(","), seed=6)))
    parameters = [parameter.requires_grad_() for parameter in adapter.tensors()]
    by_hand = expected(parameters, config)
    for event in events:
        by_hand.zero_grad()
        losses = [losses_by_hand(model, tokens, row).sum() for row in range(8)]
        loss = sum(losses) / tokens.response.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        by_hand.step()
        assert event["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert event["lr"] == by_hand.param_groups[0]["lr"]
    theirs = flat(parameters)
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(model, tokens):
    def size_kept(checkpointing):
        model.gradient_checkpointing = checkpointing
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            micro_batch(model, tokens, [3, 4, 5])
        return sum(sizes)

    assert size_kept(True) < size_kept(False) / 2


def test_the_flag_for_gradient_checkpointing_reaches_the_base(trained):
    run = open_run(trained, gradient_checkpointing=True)
    assert run.base("train").gradient_checkpointing


def test_a_recipe_holds_what_decides_the_result_in_one_spelling():
    recipe = TrainConfig(alpha=32, batch_tokens=64).recipe()
    assert json.dumps(recipe) == json.dumps(TrainConfig(alpha=32.0).recipe())
    assert "batch_tokens" not in recipe


# An objective of one's own


def noting(calls):
    """The paper's objective, which notes the steps and the rows that it is given."""

    def objective(model, batch, weights):
        calls.append((batch.step, batch.rows))
        return token_loss(model, batch, weights)

    return objective


def planned(tokens, budget):
    """The step and the rows of each batch of a training."""
    calls = []
    for step, rows in enumerate(training_steps(tokens, CONFIG), start=1):
        calls += [(step, group) for group in batches(rows, tokens.lengths, budget)]
    return calls


def test_an_objective_is_told_the_step_and_the_rows_of_its_batch(model, tokens):
    calls = []
    fit(model, tokens, replace(CONFIG, batch_tokens=100), objective=noting(calls))
    assert calls[1:] == planned(tokens, 100)  # behind the rehearsal
    assert len(calls) > 4  # several batches make a step


def test_an_objective_may_look_at_the_base_and_training_is_unchanged(model, tokens):
    model.gradient_checkpointing = True  # the backward pass runs the model again
    expected, events = fit(model, tokens)

    def objective(model, batch, weights):
        loss = token_loss(model, batch, weights)
        with torch.no_grad(), use(model, None):
            token_loss(model, batch, weights)
        return loss

    again, same_events = fit(model, tokens, objective=objective)
    assert torch.equal(again, expected)
    assert same_events == events


# Scores


def test_an_id_without_an_embedding_is_an_error_that_names_the_rows(model, tokens):
    ids = tokens.input_ids.clone()
    ids[3] = model.config.vocab_size
    others = replace(tokens, input_ids=ids)
    message = f"{tokens.name} has the id {ids[3]}, but the base has {ids[3]} embeddings"
    fails(message, score, model, others)
    fails(message, fit, model, others)


def test_scores_can_be_changed_in_place_and_be_part_of_a_loss(model, tokens):
    losses = score(model, tokens)
    losses[~tokens.response] = 0.5
    factor = torch.ones(1, requires_grad=True)
    (factor * losses).sum().backward()
    assert factor.grad.isfinite()


def test_scores_are_the_losses_of_a_plain_loop_in_any_batch(model, tokens):
    use(model, random_adapter(model))
    expected = torch.zeros(len(tokens.input_ids))
    with torch.no_grad():
        losses = [losses_by_hand(model, tokens, row) for row in range(8)]
    expected[tokens.response] = torch.cat(losses)
    for budget in (1, 100, None):
        assert torch.allclose(score(model, tokens, budget), expected, atol=1e-5)


# Memory

CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
TORCHS = torch.OutOfMemoryError("CUDA out of memory")


def small_memory(model, places, error=TORCHS):
    """Make the model run out of memory on a batch of more than `places` ids."""

    def check(module, arguments):
        if arguments[0].numel() > places:
            raise error

    model.register_forward_pre_hook(check)


def test_running_out_of_memory_names_a_smaller_batch_before_the_first_step(model, tokens):
    """Scoring begins with the longest rows; training rehearses its largest micro-batch."""
    small_memory(model, 150)
    words = "out of memory with 1000 tokens per batch, .*give --batch-tokens 500; .*goes on"
    watch = Noted()
    fails(words, score, model, tokens, 1000, watch)
    w = tokens.response.float()
    config = replace(CONFIG, batch_tokens=1000)
    small_memory(model, 150, CUBLAS)
    fails(words, train, model, tokens, w, config, watch=watch)
    assert watch.events == []
    score(model, tokens, 150)
    train(model, tokens, w, replace(CONFIG, batch_tokens=100))


def test_the_rehearsal_is_the_largest_micro_batch_of_all_steps_and_changes_nothing(model, tokens):
    calls = []
    config = replace(CONFIG, batch_tokens=64)
    adapter, _ = fit(model, tokens, config, objective=noting(calls))
    (step, rehearsed), *others = calls
    assert step == 0
    sizes = [len(rows) * tokens.lengths[rows[0]] for _, rows in others]
    assert len(rehearsed) * tokens.lengths[rehearsed[0]] == max(sizes)
    assert torch.equal(adapter, fit(model, tokens, config)[0])


def test_training_that_has_no_steps_is_refused(model, tokens):
    fails("0 epochs of 8 rows", train, model, tokens, tokens.response, replace(CONFIG, epochs=0))


def test_a_single_row_that_does_not_fit_says_what_to_do_unless_it_is_unused(model, tokenizer):
    rows = [{"prompt": "a", "response": "yes " * n} for n in (120, 1, 1, 1, 1, 1)]
    long = tokens_of(rows, tokenizer)
    everywhere = torch.ones(len(long.input_ids))
    without = everywhere.clone()
    without[long.places([0])] = 0  # the long row is not run
    small_memory(model, 2 * max(long.lengths[1:]))
    train(model, long, without, replace(CONFIG, batch_size=6, batch_tokens=30))
    words = "the longest row [0-9]+: lower --max-length, or train with --gradient-checkpointing"
    fails(words, score, model, long, 100)
    fails(words, train, model, long, everywhere, replace(CONFIG, batch_tokens=100))


# Interrupted work


@pytest.fixture
def states(tmp_path):
    """Where the work is saved after every step."""
    return tmp_path / "states"


def interrupt_at(step):
    """Ends the work in this step, before it is saved."""

    def stop(event):
        if event["step"] == step:
            raise KeyboardInterrupt

    return stop


def interrupt_training(model, tokens, states, config=CONFIG, **options):
    """Train for two steps of four."""
    w = tokens.response.float()
    with pytest.raises(KeyboardInterrupt):
        train(model, tokens, w, config, watch=Noted(states, interrupt_at(3)), **options)
    assert active(model) is None


def test_an_interrupted_training_goes_on_and_ends_equal_to_the_bit(model, tokens, states):
    expected, events = fit(model, tokens, optimizer=two_rates)
    interrupt_training(model, tokens, states, optimizer=two_rates)
    again, later_events = fit(model, tokens, optimizer=two_rates, watch=Noted(states))
    assert torch.equal(again, expected)
    assert later_events == [{"resumed": 2, "steps": 4}, *events[2:]]


def test_an_interrupted_scoring_goes_on_and_ends_equal_to_the_bit(model, tokens, states):
    whole = Noted()
    expected = score(model, tokens, 100, whole)
    finished = [event["step"] for event in whole.events]
    assert finished[-1] == sum(tokens.lengths)
    with pytest.raises(KeyboardInterrupt):
        score(model, tokens, 100, Noted(states, interrupt_at(finished[2])))

    later = Noted(states)
    assert torch.equal(score(model, tokens, 100, later), expected)
    resumed = {"resumed": finished[1], "steps": finished[-1], "unit": "token"}
    assert later.events == [resumed, *whole.events[2:]]


def test_a_loss_that_was_saved_as_nan_is_refused_by_all_processes(
    model, tokens, states, monkeypatch
):
    """A maximum over processes drops the NaN of one of them, since the others have 0 there."""
    losses = torch.zeros(len(tokens.input_ids))
    losses[tokens.response] = 1.0
    losses[tokens.response.nonzero()[2]] = torch.nan
    Noted(states).save({"losses": losses}, part=0)

    def beside_another_process(operation, *tensors):
        for tensor in tensors:
            tensor.copy_(tensor.fmax(torch.zeros_like(tensor)))

    monkeypatch.setattr("toss.scoring.over_processes", beside_another_process)
    with pytest.raises(InputError, match="of row 0 "):
        score(model, tokens, 100, Noted(states))


def test_a_resumed_training_may_have_smaller_batches(model, tokens, states):
    interrupt_training(model, tokens, states, replace(CONFIG, batch_tokens=4096))
    calls = []
    config = replace(CONFIG, batch_tokens=64)
    fit(model, tokens, config, objective=noting(calls), watch=Noted(states))
    assert calls[1:] == [(step, rows) for step, rows in planned(tokens, 64) if step > 2]


def test_a_state_of_other_weights_or_settings_is_refused(model, tokens, states):
    weights = tokens.response.float()
    watch = Noted(states)
    train(model, tokens, weights, CONFIG, watch=watch)
    words = "other rows, weights or settings"
    fails(words, train, model, tokens, weights / 2, CONFIG, watch=watch)
    fails(words, train, model, tokens, weights, replace(CONFIG, lr=0.5), watch=watch)


# What is not finite


def test_an_overflow_ends_a_long_pass_early(model, tokens):
    many = tokens.take([*range(8)] * 6)
    watch = Noted()

    def spoil(norm, inputs, hidden):
        return hidden * torch.nan if len(watch.events) == 3 else hidden

    model.model.norm.register_forward_hook(spoil)
    fails("not finite", score, model, many, 1, watch)
    assert len(watch.events) == 17  # of 48: after the 1st, the 17th, ... it looks


def test_a_loss_that_is_not_finite_names_the_row(model, tokens):
    unique = min(set(range(384)) - set(tokens.input_ids.tolist()))
    bad = replace(tokens, input_ids=tokens.input_ids.clone())
    bad.input_ids[bad.offsets[3] + 1] = unique  # no other row has this token
    head = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    model.model.embed_tokens.weight.data[unique] = torch.nan
    fails(
        r"rows: .*not finite on row 3 .*at step 1.*--lr",
        fit,
        model,
        bad,
        replace(CONFIG, batch_size=8),
    )
    first = int(tokens.response[tokens.places([3])].int().argmax())
    words = f"rows: .*token {first} of row 3 .*not finite.*float32"
    fails(words, score, model, bad)


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


LAYERS = "self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down".split()


@pytest.mark.parametrize("layer", LAYERS)
def test_an_overflow_anywhere_in_a_block_shows_in_the_losses(layer, tmp_path, tokens):
    assert_overflows(overflowing(tmp_path / "huge", layer), tokens)


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

    # What a GPU would do
    on_gpu = open_run(run)
    on_gpu.__dict__["device"] = torch.device("cuda")
    assert on_gpu.dtypes == {"train": "bfloat16", "score": "float16"}
