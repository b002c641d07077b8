"""The loss, its gradient through the real loader and loop, and scoring."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_base, write_jsonl
from safetensors.torch import load_file, save_file

import toss.loss
from model import load_checkpoint, save_adapter
from model.errors import InputError
from model.lora import adapter_parameters, add_adapter
from toss.base import Base
from toss.dataset import tokenise
from toss.rows import read_rows
from toss.run import Run
from toss.scoring import rounding_noise, score, score_under
from toss.settings import Settings
from toss.training import Clock, step_gradients, train, training_steps

SETTINGS = Settings(rank=2, alpha=4, lr=1e-2, epochs=2, batch_size=3, targets="q_proj,v_proj,down_proj")


@pytest.fixture
def model(base):
    model = load_checkpoint(base)
    add_adapter(model, "default", 2, 4, SETTINGS.target_list, seed=0)
    for i, parameter in enumerate(adapter_parameters(model)):  # B = 0 would hide A's gradient
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    return model


@pytest.fixture
def tokens(tmp_path, tokenizer):
    rows = [{"prompt": "a " * n, "response": "yes I can " * (6 - n)} for n in range(1, 6)]
    return tokenise(read_rows(write_jsonl(tmp_path / "rows.jsonl", rows)), tokenizer, 512, "rows")


def gradients(model, tokens, keep, budget=10_000, rows=range(5)):
    loss = step_gradients(model, tokens, list(rows), tokens.response & keep, budget)
    return loss, torch.cat([p.grad.flatten() for p in adapter_parameters(model)])


def by_hand(model, tokens, keep, rows=range(5)):
    """The paper's loss and its gradient, row by row, from all logits."""
    total, count = 0.0, 0
    for i in rows:
        a, b = int(tokens.offsets[i]), int(tokens.offsets[i + 1])
        ids = tokens.input_ids[a:b].long()
        logits = model.lm_head(model(ids[None]))[0]
        losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        total = total + (losses * (tokens.response & keep)[a + 1 : b]).sum()
        count += int(tokens.response[a:b].sum())
    loss = total / count
    return float(loss.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(loss, adapter_parameters(model))])


def everything(tokens):
    return torch.ones_like(tokens.response)


def close(a, b, tolerance=1e-5):
    return (a - b).norm() <= tolerance * b.norm()


def test_loss_and_gradient_are_the_papers_whatever_is_discarded(model, tokens):
    keep = torch.rand(len(tokens.response), generator=torch.Generator().manual_seed(0)) > 0.3
    for mask in (everything(tokens), keep):
        (loss, grad), (expected, expected_grad) = gradients(model, tokens, mask), by_hand(model, tokens, mask)
        assert loss == pytest.approx(expected, rel=1e-5) and close(grad, expected_grad)


def test_a_discarded_token_has_zero_gradient_and_a_kept_one_the_right_one(model, tokens):
    entry = int(tokens.response.nonzero()[7])
    only = torch.zeros_like(tokens.response)
    only[entry] = True
    alone = gradients(model, tokens, only)[1]
    assert alone.norm() > 0 and close(alone, by_hand(model, tokens, only)[1])
    whole, without = gradients(model, tokens, everything(tokens))[1], gradients(model, tokens, ~only)[1]
    assert close(whole - without, alone, 1e-4)
    assert gradients(model, tokens, torch.zeros_like(only))[1].norm() == 0


@pytest.mark.parametrize("budget", [1, 40, 100])
def test_any_split_into_micro_batches_gives_the_same_gradients(model, tokens, budget):
    keep = torch.rand(len(tokens.response), generator=torch.Generator().manual_seed(1)) > 0.3
    loss, grad = gradients(model, tokens, keep)
    loss_split, grad_split = gradients(model, tokens, keep, budget)
    assert loss_split == pytest.approx(loss, rel=1e-5) and close(grad_split, grad)


def test_a_chunked_head_gives_the_same_gradients_and_bounded_logits(model, tokens, monkeypatch):
    whole = gradients(model, tokens, everything(tokens))[1]
    sizes, forward = [], model.lm_head.forward
    monkeypatch.setattr(toss.loss, "LOGITS", 5 * model.lm_head.out_features)
    monkeypatch.setattr(model.lm_head, "forward", lambda h: (sizes.append(len(h)), forward(h))[1])
    assert close(gradients(model, tokens, everything(tokens))[1], whole)
    assert max(sizes) == 5


def test_a_fully_masked_row_adds_its_length_to_the_count_and_nothing_else(model, tokens):
    keep = everything(tokens)
    keep[tokens.offsets[2] : tokens.offsets[3]] = False
    loss, grad = gradients(model, tokens, keep)
    expected, expected_grad = by_hand(model, tokens, keep)
    assert loss == pytest.approx(expected, rel=1e-5) and close(grad, expected_grad)


def test_a_step_whose_rows_are_all_masked_changes_no_parameter_at_the_start(base, tokens):
    model = load_checkpoint(base)
    train(model, tokens, torch.zeros_like(tokens.response), SETTINGS, 1000, "nothing")
    assert all((layer == 0).all() for layer in adapter_parameters(model)[1::2])  # every B


def test_training_lowers_the_loss_and_logs_each_step(base, tokens):
    model, lines = load_checkpoint(base), []
    cost = train(model, tokens, everything(tokens), replace(SETTINGS, epochs=10), 1000, "stage", lines.append)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert [line["step"] for line in lines] == list(range(1, cost["steps"] + 1)) and lines[0].keys() >= {"step", "loss", "grad_norm"}


def test_the_order_depends_on_the_seed_alone_and_skipped_rows_are_left_out(tokens):
    tokens.lengths[1] = 0
    steps = training_steps(tokens, SETTINGS)
    assert steps == training_steps(tokens, replace(SETTINGS, lr=1)) and steps != training_steps(tokens, replace(SETTINGS, seed=1))
    assert sorted(sum(steps, [])) == sorted([0, 2, 3, 4] * 2) and max(map(len, steps)) == 3


def test_the_steps_are_adamw_with_the_papers_betas_no_decay_and_clipping_at_one(base, tokens):
    settings = replace(SETTINGS, epochs=2, batch_size=5, lr=0.1)
    trained, by_hand_model = load_checkpoint(base), load_checkpoint(base)
    norms = []
    train(trained, tokens, everything(tokens), settings, 10_000, "s", lambda line: norms.append(line["grad_norm"]))
    assert max(norms) > 1  # or clipping would not show
    add_adapter(by_hand_model, "default", settings.rank, settings.alpha, settings.target_list, settings.seed)
    parameters = adapter_parameters(by_hand_model)
    first, second = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    for step, rows in enumerate(training_steps(tokens, settings), start=1):
        step_gradients(by_hand_model, tokens, rows, tokens.response, 10_000)
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        for p, m, v in zip(parameters, first, second):
            grad = p.grad / max(1.0, float(norm))
            m.mul_(0.9).add_(0.1 * grad)
            v.mul_(0.95).add_(0.05 * grad**2)
            p.data -= settings.lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    ours = torch.cat([p.flatten() for p in adapter_parameters(trained)])
    assert close(ours, torch.cat([p.flatten() for p in parameters]), 1e-3)


def test_cosine_schedule_falls_and_constant_does_not(base, tokens):
    for schedule, check in (("constant", lambda r: len(set(r)) == 1), ("cosine", lambda r: r == sorted(r, reverse=True) and r[-1] < r[0] / 2)):
        lines = []
        train(load_checkpoint(base), tokens, everything(tokens), replace(SETTINGS, schedule=schedule), 1000, "s", lines.append)
        assert check([line["lr"] for line in lines])


def test_a_loss_that_is_not_finite_names_the_row(model, tokens):
    token = int(tokens.input_ids[tokens.offsets[3] + 1])
    tokens.input_ids[tokens.offsets[3] + 1] = 0 if token else 1
    other = tokens.input_ids.clone()
    other[tokens.offsets[3] + 1] = -1
    unique = (set(range(384)) - set(other.tolist())).pop()  # a token that no other row holds
    tokens.input_ids[tokens.offsets[3] + 1] = unique
    model.model.embed_tokens.weight.data[unique] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(torch.nan_to_num(model.lm_head.weight.data), requires_grad=False)
    with pytest.raises(InputError, match="row 3"):
        train(model, tokens, everything(tokens), SETTINGS, 1000, "stage")
    with pytest.raises(InputError, match="row 3"):
        score(model, tokens, 1000, "loss")


def test_scores_are_the_losses_of_the_response_tokens_in_any_batch(model, tokens):
    losses = score(model, tokens, 100, "loss")
    assert (losses[~tokens.response] == 0).all() and (losses[tokens.response] > 0).all()
    assert torch.allclose(losses, score(model, tokens, 1, "loss"), atol=1e-5)
    i = 2
    a, b = int(tokens.offsets[i]), int(tokens.offsets[i + 1])
    ids = tokens.input_ids[a:b].long()
    with torch.no_grad():
        expected = F.cross_entropy(model.lm_head(model(ids[None]))[0, :-1], ids[1:], reduction="none")
    assert torch.allclose(losses[a + 1 : b], expected * tokens.response[a + 1 : b], atol=1e-5)


def run_of(base, tmp_path, **more):
    return Run(Settings(run=str(tmp_path / "run"), model=str(base), device="cpu", **more))


def test_an_overflow_in_float16_falls_back_to_float32(tmp_path, tokens, capsys):
    folder = make_base(tmp_path / "huge")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e5  # finite in float16 as weights, not as products
    tensors["model.layers.0.mlp.down_proj.weight"].clamp_(-6e4, 6e4)
    save_file(tensors, path, metadata={"format": "pt"})
    half, full = (score_under(Base(run_of(folder, tmp_path, dtype=dtype)), tokens, {"loss_base": None}) for dtype in ("float16", "float32"))
    assert "warning" in capsys.readouterr().out and half[1]["dtype"] == "tf32"
    assert torch.allclose(half[0]["loss_base"], full[0]["loss_base"], rtol=1e-4)


def test_the_rounding_noise_is_measured_against_float32(tmp_path, tokens, base):
    model = load_checkpoint(base)
    for seed, name in enumerate(("one", "two")):
        train(model, tokens, everything(tokens), replace(SETTINGS, seed=seed), 1000, name)
        save_adapter(model, tmp_path / name)
    adapters = {"loss_utility": tmp_path / "one", "loss_degraded": tmp_path / "two"}
    for dtype, low, high in (("float32", -1e-9, 1e-5), ("bfloat16", 1e-4, 0.5)):
        holder = Base(run_of(base, tmp_path, dtype=dtype))
        losses, _ = score_under(holder, tokens, adapters)
        line = rounding_noise(holder, tokens, adapters, losses, 0.1)
        assert low < float(line.split(": ")[1].split()[0]) < high, line
    assert "on 5 rows" in line and holder.dtypes["score"] == "bfloat16"


def test_a_stages_peak_memory_is_not_that_of_an_earlier_one():
    clock = Clock(torch.device("cpu"))
    big = torch.ones(2**27)  # 512 MiB
    first = clock.stop()["peak_memory_gib"]
    del big
    second = Clock(torch.device("cpu")).stop()["peak_memory_gib"]
    assert first > 0.5 and (second < first - 0.4 or not Path("/proc/self/clear_refs").exists())
