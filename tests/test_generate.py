"""Greedy answers with a cache are those without one, in any batch, up to the limit or the EOS."""

import pytest
import torch
from agreement import GOLDENS, MODELS, golden, logits_of
from conftest import fails
from helpers import random_adapter, said

from model import load_checkpoint, save_adapter
from model.generate import generate, main
from model.io import NotFinite
from model.lora import use
from model.packed import Cache

EARLY, LATE = [5, 9, 2], [20, 7]  # two prompts, whose answers end at different steps
LENGTH = 24


@pytest.mark.parametrize("name", MODELS)
def test_each_new_token_is_the_likeliest_by_the_whole_rows_logits(name):
    model = load_checkpoint(GOLDENS / name)
    eos = int(golden(name)["eos_id"])
    prompts = golden(name)["prompts"]
    for length in (2, 9, 30):
        prompts.append([3 + (7 * length + i) % 70 for i in range(length)])

    for prompt, answer in zip(prompts, generate(model, prompts, 20, eos)):
        assert eos not in answer
        whole = answer if len(answer) == 20 else [*answer, eos]
        logits = logits_of(model, torch.tensor([prompt + whole]))[0]
        likeliest = logits.argmax(-1).tolist()
        assert likeliest[len(prompt) - 1 : -1] == whole


def test_batches_change_neither_answers_nor_their_order():
    model = load_checkpoint(GOLDENS / "gqa-tied")
    stored = golden("gqa-tied")
    order = [3, 0, 4, 1, 0, 2]
    prompts = [stored["prompts"][i] for i in order]
    answers = [stored["new_ids"][i] for i in order]
    before = [list(prompt) for prompt in prompts]
    # Slots of the cache that a batch may have, and the answers that are there after each batch.
    batches = {1: [1, 2, 3, 4, 5, 6], 30: [1, 2, 4, 6], 10**6: [6]}
    calls = []

    def progress(done: int, new_answers: dict) -> None:
        calls.append((done, new_answers))

    for batch_tokens, expected in batches.items():
        calls.clear()
        eos = int(stored["eos_id"])
        new = generate(model, prompts, 12, eos, batch_tokens, progress=progress)
        assert new == answers
        assert [done for done, new_answers in calls if new_answers] == expected
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        handed_over = {}
        for _, new_answers in calls:
            handed_over |= new_answers
        assert handed_over == dict(enumerate(answers))
    assert prompts == before


def test_a_batch_ends_with_its_last_row():
    model = load_checkpoint(GOLDENS / "gqa-tied")
    stored = golden("gqa-tied")
    short = [i for i, answer in enumerate(stored["new_ids"]) if len(answer) < 12]
    answers = [stored["new_ids"][i] for i in short]
    lengths = {len(answer) for answer in answers}
    assert len(lengths) > 1
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    prompts = [stored["prompts"][i] for i in short]
    assert generate(model, prompts, 100, int(stored["eos_id"])) == answers
    assert len(calls) == max(lengths) + 1  # the EOS itself takes one
    assert not any(weight.is_inference() for weight in model.state_dict().values())


def test_a_lower_limit_and_an_eos_cut_the_answer():
    model = load_checkpoint(GOLDENS / "plain")
    stored = golden("plain")
    prompts = stored["prompts"]
    answers = stored["new_ids"]
    eos = int(stored["eos_id"])
    for limit in (0, 1, 5):
        assert generate(model, prompts, limit, eos) == [answer[:limit] for answer in answers]
    assert generate(model, prompts[:1], 5, eos_id=answers[0][0]) == [[]]
    assert generate(model, [], 5, eos) == []


def test_limits_and_ids_out_of_range_are_refused():
    model = load_checkpoint(GOLDENS / "plain")
    fails("a prompt has no tokens", generate, model, [[1], []], 5, 0)
    fails("a prompt holds the id 80", generate, model, [[80]], 5, 0)
    for limit in (-1, 10**20):
        fails(f"not {limit}", generate, model, [[1]], limit, 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_no_answer(value):
    model = load_checkpoint(GOLDENS / "plain")
    model.lm_head.weight[7] = value
    fails("logits are not finite", generate, model, [[1, 2], [3]], 5, 0, error=NotFinite)


def test_the_command_answers_with_an_adapter_and_in_either_form(base, model, tmp_path, capsys):
    adapter = random_adapter(model)
    for B in adapter.B.values():
        B += 1
    save_adapter(use(model, adapter), tmp_path)
    line = f"model.generate --model {base} --device cpu --max-new-tokens 8 --prompt Hi"
    answers = {
        said(capsys, line),
        said(capsys, f"{line} --template human"),
        said(capsys, f"{line} --adapter {tmp_path}"),
    }
    assert len(answers) == 3


@pytest.fixture
def ending(model):
    """The model, and an id that ends the answer to EARLY, but does not occur in that to LATE."""
    use(model, random_adapter(model))
    early, late = generate(model, [EARLY, LATE], LENGTH, eos_id=1)
    for k in range(2, LENGTH):
        if early[k] not in early[:k] + late:
            return model, early[k]
    pytest.fail("the random model gives no such id")


def test_answers_of_a_batch_equal_those_of_single_prompts(ending):
    model, eos_id = ending
    (early,) = generate(model, [EARLY], LENGTH, eos_id)
    (late,) = generate(model, [LATE], LENGTH, eos_id)
    assert 2 <= len(early) < len(late) == LENGTH
    answers = generate(model, [EARLY, LATE, EARLY, EARLY, LATE, EARLY], LENGTH, eos_id)
    assert answers == [early, late, early, early, late, early]


def test_rows_that_have_ended_are_not_computed(ending, monkeypatch):
    model, eos_id = ending
    sizes = []
    update = Cache.update

    def noted(self, layer, positions, k, v):
        if layer == 0:
            sizes.append(len(k))
        return update(self, layer, positions, k, v)

    monkeypatch.setattr(Cache, "update", noted)
    early, *_ = generate(model, [EARLY, LATE, EARLY, EARLY, LATE, EARLY], LENGTH, eos_id)
    steps = len(early) + 1  # the EOS itself takes one
    assert sizes == [6] * steps + [2] * (LENGTH - steps)


def test_threads_are_set_and_checked(base, capsys):
    threads = torch.get_num_threads()
    try:
        line = f"--model {base} --prompt Hi --max-new-tokens 1 --threads 1"
        assert main(line.split()) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(SystemExit):
        main(["--model", str(base), "--prompt", "Hi", "--threads", "0"])
    assert "--threads" in capsys.readouterr().err
