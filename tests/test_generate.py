"""Greedy generation: transformers' answers, whatever the batch, with and without a cache."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from agreement import GOLDENS, MODELS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import load_adapter, load_checkpoint
from model.generate import main
from model.generation import generate
from model.lora import merge_adapter


def golden(name):
    """The model, its prompts, its eos and transformers' answers."""
    file = GOLDENS / name / "golden.safetensors"
    want = load_file(file)
    with safe_open(file, "pt") as f:
        eos = int(f.metadata()["eos_id"])
    cut = lambda rows, lengths: [row[:n] for row, n in zip(rows.tolist(), lengths.tolist())]
    return load_checkpoint(GOLDENS / name), cut(want["prompts"], want["lengths"]), eos, cut(want["new_ids"], want["new_lengths"])


@torch.no_grad()
def uncached(model, prompt, max_new_tokens, eos):
    """The plainest greedy loop: the whole row again for every token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        token = int(model.lm_head(model(torch.tensor([ids])))[0, -1].argmax())
        if token == eos:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_transformers(name):
    model, prompts, eos, want = golden(name)
    assert len({len(p) for p in prompts}) > 2 and len({len(w) for w in want}) > 1  # lengths differ, some stop early
    assert generate(model, prompts, max_new_tokens=12, eos_id=eos) == want


@pytest.mark.parametrize("name", MODELS)
def test_with_a_cache_as_without(name):
    model, prompts, eos, _ = golden(name)
    longer = [[3 + (7 * i + k) % 70 for k in range(i)] for i in (2, 9, 30)]  # past the golden's lengths
    got = generate(model, prompts + longer, max_new_tokens=20, eos_id=eos)
    assert got == [uncached(model, p, 20, eos) for p in prompts + longer]


def test_batches_change_neither_answers_nor_their_order():
    model, prompts, eos, want = golden("gqa-tied")
    rows = [3, 0, 4, 1, 0, 2]
    for batch_tokens in (1, 30, 10**6):
        finished = []
        got = generate(model, [prompts[i] for i in rows], 12, eos, batch_tokens=batch_tokens, progress=finished.append)
        assert got == [want[i] for i in rows] and sum(finished) == len(rows)
        assert (len(finished) == len(rows)) == (batch_tokens == 1)


def test_a_shorter_limit_gives_the_beginning():
    model, prompts, eos, want = golden("plain")
    for n in (0, 1, 5):
        assert generate(model, prompts, max_new_tokens=n, eos_id=eos) == [w[:n] for w in want]
    assert generate(model, [], max_new_tokens=5, eos_id=eos) == []


def test_the_eos_as_first_token_is_an_empty_answer():
    model, prompts, _, want = golden("plain")
    first = want[0][0]
    assert generate(model, prompts[:1], max_new_tokens=5, eos_id=first) == [[]]


def test_a_batch_ends_with_its_last_row():
    model, prompts, eos, want = golden("gqa-tied")
    rows = [i for i, w in enumerate(want) if len(w) < 12]
    assert len({len(want[i]) for i in rows}) > 1
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert generate(model, [prompts[i] for i in rows], 100, eos) == [want[i] for i in rows]
    assert len(calls) == max(len(want[i]) for i in rows) + 1  # the eos itself takes one


def test_generation_leaves_prompts_and_weights_alone():
    model, prompts, eos, _ = golden("plain")
    before, weights = [list(p) for p in prompts], {k: v.clone() for k, v in model.named_parameters()}
    generate(model, prompts, 4, eos)
    assert prompts == before and all(torch.equal(v, weights[k]) for k, v in model.named_parameters())
    assert not any(v.is_inference() for v in model.state_dict().values())


def test_the_active_adapter_answers():
    model, prompts, eos, _ = golden("gqa-tied")
    base = generate(model, prompts, 12, eos)
    load_adapter(model, GOLDENS / "adapters/all")
    adapted = generate(model, prompts, 12, eos)
    assert adapted != base and adapted == [uncached(model, p, 12, eos) for p in prompts]
    merge_adapter(model)
    assert generate(model, prompts, 12, eos) == adapted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(dtype):
    _, prompts, eos, want = golden("plain")
    model = load_checkpoint(GOLDENS / "plain", dtype=dtype)
    got = generate(model, prompts, 12, eos)
    assert sum(g[:1] == w[:1] for g, w in zip(got, want)) >= len(want) - 1  # rounding may turn one, not most


def test_the_command_answers_a_prompt_and_names_what_is_wrong(tmp_path, capsys):
    folder = Path(shutil.copytree(GOLDENS / "tokenizer-chatml", tmp_path / "m"))
    tensors, config = load_file(GOLDENS / "gqa-tied/model.safetensors"), json.loads((GOLDENS / "gqa-tied/config.json").read_text())
    config["vocab_size"] = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    tensors["model.embed_tokens.weight"] = torch.randn(config["vocab_size"], 32, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    command = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "4", "--prompt", "Hi"]
    assert main([*command, "--adapter", str(GOLDENS / "adapters/qv")]) == 0
    assert capsys.readouterr().out.strip()
    assert main([*command, "--adapter", str(tmp_path / "nowhere")]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and "nowhere" in err and err.count("\n") == 1
