"""Greedy answers are the same in any batch, up to the limit or the EOS.

That they are transformers' own, which has no cache here, is tested in test_transformer.py.
"""

import pytest
import torch
from agreement import GOLDENS, golden
from conftest import fails
from helpers import random_adapter, refused, said

from model import load_checkpoint, save_adapter
from model.generate import generate
from model.lora import use

STORED = golden("gqa-tied")  # five prompts, whose answers have 6, 2, 12, 2 and 12 tokens
EOS = int(STORED["eos_id"])


@pytest.fixture
def model():
    return load_checkpoint(GOLDENS / "gqa-tied")


# Slots of the cache that a batch may have, and the answers that are there after each batch.
@pytest.mark.parametrize(
    ("batch_tokens", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (30, [1, 2, 4, 6]), (10**6, [6])]
)
def test_batches_change_neither_answers_nor_their_order(batch_tokens, expected, model):
    order = [3, 0, 4, 1, 0, 2]
    prompts = [STORED["prompts"][i] for i in order]
    counts = []
    batches = []
    handed_over = {}

    def progress(count, new_answers):
        counts.append(count)
        if new_answers:
            batches.append(count)
            handed_over.update(new_answers)

    answers = generate(model, prompts, 12, EOS, batch_tokens, progress)
    assert answers == [STORED["new_ids"][i] for i in order]
    assert handed_over == dict(enumerate(answers))
    assert batches == expected
    assert counts == sorted(counts)


def test_a_lower_limit_and_an_eos_cut_the_answer(model):
    prompts = STORED["prompts"]
    for limit in (0, 1, 5):
        cut = [answer[:limit] for answer in STORED["new_ids"]]
        assert generate(model, prompts, limit, EOS) == cut
    assert generate(model, prompts[1:2], 5, eos_id=45) == [[]]
    assert generate(model, [], 5, EOS) == []


def test_ids_out_of_range_are_refused(model):
    for prompt, words in (([], "has no tokens"), ([80], "the id 80"), ([-1], "the id -1")):
        fails(words, generate, model, [[1], prompt], 5, 0)


def test_logits_that_are_not_finite_are_no_answer(model):
    model.lm_head.weight[7] = torch.nan
    fails("logits are not finite", generate, model, [[1, 2], [3]], 5, 0)


def test_the_command_answers_with_an_adapter_and_in_either_form(base, tmp_path, capsys):
    model = load_checkpoint(base)
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
    assert "--threads" in refused(capsys, f"{line} --threads 0")
