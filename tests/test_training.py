"""One loop trains every model, and one loop scores: AdamW as in the paper, and nothing silent."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import edit_tensors, fails, make_base, sources, tree
from helpers import call, losses_by_hand, overflowing, random_adapter, refused, said, tokens_of
from safetensors.torch import load_file

from model import load_checkpoint, products
from model.io import DoesNotFit, NotFinite, made_from, save_tensors
from model.lora import active, new_adapter, use
from toss.config import TrainConfig
from toss.loss import token_loss
from toss.scoring import score
from toss.tokens import batches
from toss.training import adamw, train, training_steps
from toss.workbench.progress import Cost
from toss.workbench.results import read_record
from toss.workbench.run import open_run
from toss.workbench.states import SavedState

CONFIG = TrainConfig(lr=1e-2, batch_size=4, rank=2, alpha=4, targets="q_proj,v_proj,down_proj")


def fit(model, tokens, objective=token_loss, optimizer=adamw, start=None, state=None, **settings):
    """The adapter, flat, and the events of training on every response token."""
    events = []
    adapter = train(
        model,
        tokens,
        tokens.response.float(),
        replace(CONFIG, **settings),
        objective=objective,
        optimizer=optimizer,
        start=start,
        state=state,
        on_step=events.append,
    )
    assert active(model) is None  # the base is left alone
    return flat(adapter), events


def flat(adapter):
    return torch.cat([tensor.flatten() for tensor in adapter.tensors()])


def test_each_step_is_reported_with_the_rate_of_its_schedule(model, tokens):
    expected = {"constant": [1e-2] * 4, "cosine": [1e-2, 8.53553e-3, 5e-3, 1.46447e-3]}
    for schedule, rates in expected.items():
        events = fit(model, tokens, schedule=schedule)[1]
        assert [event["lr"] for event in events] == pytest.approx(rates, rel=1e-5)
    assert [(event["step"], event["steps"]) for event in events] == [(n, 4) for n in range(1, 5)]
    assert events[0].keys() == {"step", "steps", "loss", "grad_norm", "lr", "tokens", "model"}
    assert events[0]["model"] is model
    assert sum(event["tokens"] for event in events) == 2 * sum(tokens.lengths)


def test_the_seed_alone_draws_the_order_and_the_start(model, tokens):
    empty = replace(tokens)
    empty.lengths[1] = 0  # skipped rows are in no step
    steps = list(training_steps(empty, CONFIG))
    assert steps == list(training_steps(empty, replace(CONFIG, lr=1.0, rank=7, schedule="cosine")))
    assert steps != list(training_steps(empty, replace(CONFIG, seed=1)))
    assert [len(rows) for rows in steps] == [4, 3, 4, 3]
    assert next(training_steps(empty, replace(CONFIG, epochs=2**31 - 1))) == steps[0]  # at once
    first, second = sum(steps[:2], []), sum(steps[2:], [])
    assert sorted(first) == sorted(second) == [0, 2, 3, 4, 5, 6, 7] and first != second
    one, two, other = (fit(model, tokens, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_training_goes_on_from_a_given_adapter_and_leaves_it_as_it_is(model, tokens):
    start, same = random_adapter(model), random_adapter(model)
    before = torch.cat([tensor.flatten() for tensor in same.tensors()])
    assert torch.allclose(fit(model, tokens, start=start, lr=1e-9)[0], before, atol=1e-6)
    assert not torch.allclose(fit(model, tokens, start=start)[0], before, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(start.tensors(), same.tensors()))


def test_the_steps_are_adamw_with_the_papers_betas_no_decay_and_clipping_at_one(model, tokens):
    ours, events = fit(model, tokens, batch_size=8, lr=0.1)
    assert max(event["grad_norm"] for event in events) > 1  # or clipping would not show
    adapter = active(use(model, new_adapter(model, 2, 4, CONFIG.targets.split(","), 0)))
    parameters = [p.requires_grad_() for p in adapter.tensors()]
    adamw = torch.optim.AdamW(parameters, 0.1, betas=(0.9, 0.95), weight_decay=0)
    for event in events:
        adamw.zero_grad()
        loss = sum(losses_by_hand(model, tokens, i).sum() for i in range(8)) / tokens.response.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        assert event["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert event["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    expected = torch.cat([p.detach().flatten() for p in parameters])
    assert (ours - expected).norm() < 1e-3 * expected.norm()


def test_scores_are_the_losses_of_a_plain_loop_in_any_batch(model, tokens):
    use(model, random_adapter(model))
    losses = score(model, tokens)
    assert losses.dtype == torch.float32 and (losses[~tokens.response] == 0).all()
    with torch.no_grad():
        expected = torch.cat([losses_by_hand(model, tokens, i) for i in range(8)])
    assert torch.allclose(losses[tokens.response], expected, atol=1e-5)
    for budget in (1, 100):
        events = []
        again = score(model, tokens, budget, on_batch=events.append)
        assert torch.allclose(again, losses, atol=1e-5)
        finished = [event["step"] for event in events]
        assert finished == sorted(set(finished)) and finished[-1] == sum(tokens.lengths)
        expected_events = {"steps": sum(tokens.lengths), "unit": "token"}
        assert all(event.items() >= expected_events.items() for event in events)
    assert not torch.allclose(score(use(model, None), tokens), losses, atol=1e-2)


CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def small_memory(model, places, error=torch.OutOfMemoryError("CUDA out of memory")):  # noqa: B008
    """Make the model run out of memory on a batch of more than `places` ids, padding included."""
    sizes = []

    def check(module, arguments):
        if arguments[0].numel() > places:
            raise error
        sizes.append(arguments[0].numel())

    model.register_forward_pre_hook(check)
    return sizes


def test_scoring_halves_its_batches_when_memory_runs_out_and_gives_the_same(model, tokens):
    expected, events = score(model, tokens, 10_000), []
    sizes = small_memory(model, 150)
    again = score(model, tokens, 1000, on_batch=events.append)
    assert torch.allclose(again, expected, atol=1e-5)
    assert max(sizes) <= 150 and len(sizes) < tokens.rows
    remarks = [event["remark"] for event in events if "remark" in event]
    assert "out of memory with 1000 tokens per batch; continuing with 500" in remarks[0]


def test_training_halves_its_micro_batches_and_makes_the_step_again(model, tokens):
    expected = fit(model, tokens, batch_tokens=400)[0]
    small_memory(model, 100, CUBLAS)
    again, events = fit(model, tokens, batch_tokens=400)
    assert torch.allclose(again, expected, rtol=1e-3, atol=1e-5)
    remarks = [event["remark"] for event in events if "remark" in event]
    assert len(remarks) == 2 and len(events) == 2 + 4  # 400, 200; and 100 for the other steps


class Interrupted(Exception):
    pass


class ThirdStep:
    """For on_step and on_batch: ends the work in its third step, when two have been saved."""

    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)
        if len(self.events) == 3:
            raise Interrupted


@pytest.fixture
def state(tmp_path):
    """Where the work is saved after every step."""
    return SavedState(tmp_path / "states", "work", minutes=0, before_save=do_nothing)


def do_nothing():
    pass


def sgd(parameters, config):
    return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9)


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_an_interrupted_training_goes_on_and_ends_equal_to_the_bit(optimizer, model, tokens, state):
    expected, events = fit(model, tokens, optimizer=optimizer)
    weights = tokens.response.float()
    with pytest.raises(Interrupted):
        train(model, tokens, weights, CONFIG, optimizer=optimizer, state=state, on_step=ThirdStep())

    again, later_events = fit(model, tokens, optimizer=optimizer, state=state)

    assert torch.equal(again, expected)
    assert later_events == [{"resumed": 2, "steps": 4}, *events[2:]]


def test_another_optimizer_trains_as_it_does_alone(model, tokens):
    ours, events = fit(model, tokens, optimizer=sgd, batch_size=8, lr=0.1)
    assert events[-1]["loss"] < events[0]["loss"]
    adapter = active(use(model, new_adapter(model, 2, 4, CONFIG.targets.split(","), 0)))
    parameters = [parameter.requires_grad_() for parameter in adapter.tensors()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for _ in events:
        optimizer.zero_grad()
        losses = [losses_by_hand(model, tokens, row).sum() for row in range(8)]
        loss = sum(losses) / tokens.response.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in parameters])
    assert (ours - expected).norm() < 1e-3 * expected.norm()


def test_a_state_from_elsewhere_is_not_used(tmp_path, capsys):
    own = SavedState(tmp_path / "own", "degraded", minutes=2)
    other = SavedState(tmp_path / "other", "degraded", minutes=2)
    own.save({"step": 1}, part=0)
    other.save({"step": 2}, part=0)
    assert own.load(part=0) == {"step": 1}
    own.file(part=0).write_bytes(other.file(part=0).read_bytes())
    assert own.load(part=0) is None
    assert "is damaged and not used" in capsys.readouterr().out


def test_a_state_of_other_weights_or_settings_is_refused(model, tokens, state):
    weights = tokens.response.float()
    train(model, tokens, weights, CONFIG, state=state)
    fails("other rows, weights or settings", train, model, tokens, weights / 2, CONFIG, state=state)
    other = replace(CONFIG, lr=0.5)
    fails("other rows, weights or settings", train, model, tokens, weights, other, state=state)


def test_a_group_of_parameters_may_have_a_rate_of_its_own(model, tokens):
    def two_rates(parameters, config):
        groups = [{"params": parameters[0::2]}, {"params": parameters[1::2], "lr": 0.5}]
        return torch.optim.SGD(groups, lr=config.lr)

    plain, events = fit(model, tokens, optimizer=lambda p, c: torch.optim.SGD(p, lr=c.lr))
    uneven, _ = fit(model, tokens, optimizer=two_rates)
    assert not torch.equal(plain, uneven)
    assert events[0]["lr"] == CONFIG.lr


def test_an_interrupted_scoring_goes_on_and_ends_equal_to_the_bit(model, tokens, state):
    use(model, random_adapter(model))
    events = []
    expected = score(model, tokens, 100, on_batch=events.append)
    with pytest.raises(Interrupted):
        score(model, tokens, 100, state, ThirdStep())

    later_events = []
    again = score(model, tokens, 100, state, later_events.append)

    assert torch.equal(again, expected)
    done = events[1]["step"]
    resumed = {"resumed": done, "steps": sum(tokens.lengths), "unit": "token"}
    assert later_events == [resumed, *events[2:]] and len(events) > 3


def test_an_objective_is_told_the_step_and_the_rows_of_its_batch(model, tokens):
    seen = []

    def objective(model, batch, weights):
        seen.append((batch.step, batch.rows))
        assert len(weights) == len(batch.targets) == len(batch.places)
        assert tokens.row_of(batch.places).unique().tolist() == sorted(batch.rows)
        return token_loss(model, batch, weights)

    fit(model, tokens, objective, batch_tokens=100)
    rows_of_step = {1: [], 2: [], 3: [], 4: []}
    for step, rows in seen:
        rows_of_step[step] += rows
    expected = [sorted(rows) for rows in training_steps(tokens, CONFIG)]
    assert [sorted(rows) for rows in rows_of_step.values()] == expected
    assert len(seen) > 4  # several batches make a step


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_objective_may_look_at_the_base_and_training_is_unchanged(checkpointing, model, tokens):
    model.gradient_checkpointing = checkpointing  # the backward pass runs the model again
    expected, events = fit(model, tokens)
    base_losses = []

    def objective(model, batch, weights):
        adapter = active(model)
        loss = token_loss(model, batch, weights)
        with torch.no_grad(), use(model, None):
            assert active(model) is None
            base_losses.append(float(token_loss(model, batch, weights)))
        assert all(a is b for a, b in zip(active(model).tensors(), adapter.tensors()))
        return loss

    again, same_events = fit(model, tokens, objective)

    assert torch.equal(again, expected) and same_events == events
    base_loss = float(score(model, tokens).sum())
    assert sum(base_losses) == pytest.approx(CONFIG.epochs * base_loss, rel=1e-5)


@pytest.mark.parametrize(("saved", "given"), [(4096, 64), (64, 4096)])
def test_a_resumed_training_takes_the_smaller_of_the_saved_and_the_given_batches(
    saved, given, model, tokens, state
):
    config = replace(CONFIG, batch_tokens=saved)
    with pytest.raises(Interrupted):
        train(model, tokens, tokens.response.float(), config, state=state, on_step=ThirdStep())
    groups = []

    def objective(model, batch, weights):
        groups.append(batch.rows)
        return token_loss(model, batch, weights)

    fit(model, tokens, objective, state=state, batch_tokens=given)
    expected = []
    for rows in list(training_steps(tokens, CONFIG))[2:]:
        expected += batches(rows, tokens.lengths, 64)
    assert sorted(groups) == sorted(expected) and len(groups) > 2


def test_a_single_row_that_does_not_fit_says_what_to_do_unless_it_is_unused(model, tokenizer):
    rows = [{"prompt": "a", "response": "yes " * n} for n in (120, 1, 1, 1, 1, 1)]
    long = tokens_of(rows, tokenizer)
    weights = torch.ones(len(long.input_ids))
    weights[long.places([0])] = 0  # the long row is not run
    small_memory(model, 2 * max(long.lengths[1:]))
    train(model, long, weights, replace(CONFIG, batch_size=6, batch_tokens=300))
    fails("single row.*--max-length", score, model, long, 1000, error=DoesNotFit)
    words, ones = "single row.*--gradient-checkpointing", torch.ones_like(weights)
    fails(words, train, model, long, ones, CONFIG, error=DoesNotFit)


def test_gradient_checkpointing_gives_the_same_and_keeps_less(model, tokens, trained):
    kept, adapters = [], []
    sizes = []  # of what autograd keeps for the backward pass

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    for model.gradient_checkpointing in (False, True):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            adapters.append(fit(model, tokens, epochs=1, start=random_adapter(model))[0])
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2 and torch.allclose(*adapters, rtol=1e-3, atol=1e-5)
    assert open_run(trained, gradient_checkpointing=True).base("train").gradient_checkpointing


@pytest.fixture
def wide(tmp_path, monkeypatch):
    """A base that is large enough for oneDNN's products, which are taken to be exact."""
    monkeypatch.setattr(products, "exact", lambda: True)
    return make_base(tmp_path / "wide", hidden_size=products.SMALLEST)


def test_products_are_onednns_in_train_and_score_alone(wide, model, tokens, monkeypatch):
    large, before, seen = load_checkpoint(wide), products.chosen(), []

    def used(work):
        seen.clear()
        work()
        assert products.chosen() == before
        return set(seen)

    for one in (large, model):
        one.model.norm.register_forward_hook(lambda *_: seen.append(products.chosen()))

    def scoring(one):
        score(one, tokens)

    def training(one):
        fit(one, tokens, epochs=1)

    for work in (scoring, training):
        assert used(partial(work, large)) == {products.ONEDNN}
        assert used(partial(work, model)) == {before}  # tiny
    with pytest.raises(ZeroDivisionError):
        fit(large, tokens, lambda *_: 1 / 0)
    assert products.chosen() == before
    monkeypatch.setattr(products, "exact", lambda: False)
    assert used(partial(scoring, large)) == {before}


@pytest.mark.skipif(not products.exact(), reason="this CPU's oneDNN rounds to bfloat16")
def test_onednn_changes_results_by_rounding_and_equally_each_time(wide, tokens, monkeypatch):
    model, found = load_checkpoint(wide), []
    for onednn, model.gradient_checkpointing in ((0, 0), (1, 0), (1, 0), (1, 1)):
        monkeypatch.setattr(products, "exact", partial(bool, onednn))
        adapter = fit(model, tokens, start=random_adapter(model), lr=1e-3)[0]
        found.append((adapter, score(model, tokens)))
    for default, fast in zip(found[0], found[1]):
        assert torch.allclose(default, fast, rtol=1e-3, atol=1e-4)
    assert all(map(torch.equal, found[1], found[2])) and torch.allclose(found[1][0], found[3][0])


def test_inside_attention_short_rows_take_the_default_forward_and_backward(monkeypatch):
    seen, real, choose = [], F.scaled_dot_product_attention, products.choose
    monkeypatch.setattr(products, "choose", lambda kind: (seen.append(kind), choose(kind))[1])
    for T, kinds in ((8, [products.DEFAULT, products.ONEDNN] * 2), (products.LONG, [])):
        q = torch.randn(1, 2, T, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with products.products(products.ONEDNN):
            seen.clear()
            gradient = torch.autograd.grad(products.attention(q, q, q, is_causal=True).sum(), q)[0]
            assert seen == kinds and products.chosen() == products.ONEDNN
        expected = torch.autograd.grad(real(q, q, q, is_causal=True).sum(), q)[0]
        bound = 1e-5 if kinds or products.exact() else 0.02
        assert (gradient - expected).norm() < bound * expected.norm()


def test_onednn_is_refused_where_it_rounds_to_bfloat16(monkeypatch):
    real, half = torch.Tensor.__matmul__, torch.Tensor.bfloat16

    def rounded(x, y):
        rounds = products.chosen() == products.ONEDNN and x.dtype == torch.float32
        return real(half(x), half(y)).float() if rounds else real(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products.exact.__wrapped__()  # past the cache


def test_a_script_says_once_that_products_are_onednns(wide, tmp_path, files, capsys):
    line = f"train.py {sources(files, wide)} --run {tmp_path / 'run'}"
    assert said(capsys, line).count("oneDNN") == 1


def test_an_overflow_ends_a_long_pass_early(model, tokens, monkeypatch):
    many, events = tokens.take([*range(8)] * 6), []
    model.model.embed_tokens.weight.data[many.input_ids[many.places([7])[-2]]] = torch.inf
    fails("not finite", score, model, many, 1, on_batch=events.append, error=NotFinite)
    assert len(events) == 1 and events[0]["steps"] == 6 * sum(tokens.lengths)


def test_a_loss_that_is_not_finite_names_the_row(model, tokens):
    unique = (set(range(384)) - set(tokens.input_ids.tolist())).pop()
    bad = replace(tokens, input_ids=tokens.input_ids.clone())
    bad.input_ids[bad.offsets[3] + 1] = unique  # no other row has this token
    head = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    model.model.embed_tokens.weight.data[unique] = float("nan")
    fails(r"rows: .*not finite on row 3 .*at step 1.*--lr", fit, model, bad, batch_size=8)
    fails(r"rows: .*of row 3 .*not finite.*float32", score, model, bad, error=NotFinite)


def test_an_adapter_that_ends_in_infinities_is_an_error(model, tokens):
    def spoil(event):
        active(event["model"]).tensors()[0].data.fill_(torch.inf)

    weights, config = tokens.response.float(), replace(CONFIG, epochs=1, batch_size=99)
    words = "rows: the trained adapter is not finite; lower --lr"
    fails(words, train, model, tokens, weights, config, on_step=spoil)


def test_the_peak_memory_of_a_stage_is_its_own():
    cpu, big = torch.device("cpu"), torch.ones(2**26)  # 256 MiB
    first = Cost(cpu).read()["peak_memory_gib"]
    del big
    second = Cost(cpu).read()["peak_memory_gib"]
    assert second < first - 0.2 or not Path("/proc/self/clear_refs").exists()  # Linux alone can


def test_training_that_diverges_leaves_what_was_there(trained, capsys):
    assert call(f"select.py --run {trained}") == 0
    before, line = tree(trained / "methods"), f"select.py --run {trained} --lr 1e30 --batch-size 1"
    assert "not finite" in refused(capsys, f"{line} --epochs 9 --overwrite")
    assert "not finite" in refused(capsys, f"{line} --epochs 9 --name new")
    assert tree(trained / "methods") == before


def overflows(folder, tokens):
    """True if float32 scores under a base are finite, and those in float16 are refused."""
    assert score(load_checkpoint(folder), tokens).isfinite().all()
    fails("float16", score, load_checkpoint(folder, dtype=torch.float16), tokens, error=NotFinite)
    return True


LAYERS = "self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down".split()


@pytest.mark.parametrize("layer", LAYERS)
def test_an_overflow_anywhere_in_a_block_shows_in_the_losses(layer, tmp_path, tokens):
    assert overflows(overflowing(tmp_path / "huge", layer), tokens)


def test_an_infinite_key_that_no_query_wants_shows_too(tmp_path, tokens):
    """Its attention weight would be 0, and every number finite but wrong."""
    folder = make_base(tmp_path / "biased", attention_bias=True)

    def edit(layer, name, part, change):
        key = f"model.layers.{layer}.self_attn.{name}_proj.{part}"
        edit_tensors(folder / "model.safetensors", key, change)

    def fill_slow_channels(tensor, value):
        """The slowest pair of channels of each head of 8: its angles stay small over a row."""
        slow = [channel for channel in range(len(tensor)) if channel % 8 in (3, 7)]
        return tensor.index_fill(0, torch.tensor(slow), value)

    for name, size in {"q": 32, "k": 16, "v": 16, "o": 32}.items():
        zeros = torch.zeros(size)
        for layer in (0, 1):
            edit(layer, name, "bias", lambda none, zeros=zeros: zeros)
    for name, bias in {"q": -1e-4, "k": 6.2e4}.items():
        edit(0, name, "bias", partial(fill_slow_channels, value=bias))
        edit(0, name, "weight", partial(fill_slow_channels, value=0.0))
    assert overflows(folder, tokens)


def test_an_overflow_in_float16_falls_back_with_a_warning(tmp_path, files, capsys):
    run, base, losses = tmp_path / "run", overflowing(tmp_path / "huge", "mlp.down"), {}
    scores, custom = run / "scores.safetensors", files["custom"]
    assert call(f"train.py --run {run} {sources(files, base)}") == 0
    for dtype, used in {"float32": "float32", "float16": "tf32"}.items():
        line = f"score.py --run {run} --custom {custom} --dtype {dtype} --overwrite"
        assert ("warning" in said(capsys, line)) == (dtype == "float16")
        assert made_from(scores)["dtype"] == used
        losses[dtype] = load_file(scores)["loss_utility"]
    assert torch.allclose(losses["float16"], losses["float32"], rtol=1e-4)
    # As if these scores were in float16: a round of TOSS-Pro begins with it and falls back once.
    record = read_record(scores)
    save_tensors(load_file(scores), scores, {**record, "dtype": "float16"})
    assert said(capsys, f"select.py --run {run} --pro 1").count("scoring again in tf32") == 1
    assert made_from(run / "methods/toss-pro/round-1/scores.safetensors")["dtype"] == "tf32"
