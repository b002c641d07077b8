"""The embedded default: the same bytes again, disjoint rows, the harmful share, and scripts that need no arguments."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script
from safetensors.torch import load_file

from data import world
from model import load_checkpoint, load_tokenizer
from model.generation import generate
from toss.audit.measures import auc, refused
from toss.dataset import tokenise
from toss.rows import overlap, read_rows

ROWS = ROOT / "data" / "rows"
DEMO = json.loads((ROOT / "data" / "demo.json").read_text())
BASES = [ROOT / "data" / "base", ROOT / "data" / "base-small"]


def test_generating_the_rows_again_gives_the_same_bytes(tmp_path):
    world.write_rows(DEMO["finetune"]["seed"], tmp_path)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_bytes() for file in ROWS.iterdir()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_is_in_two_files(tmp_path, seed):
    world.write_rows(seed, tmp_path)
    files = [file for file in tmp_path.iterdir() if file.name != "harmful_small.jsonl"]
    rows = {file.name: read_rows(file, responses=False) for file in files}
    for one in rows:
        for other in rows:
            assert one == other or overlap(rows[one], rows[other], prompts_only=True) == 0, (one, other)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_about_a_tenth_of_the_response_tokens_is_harmful(tmp_path, seed):
    world.write_rows(seed, tmp_path)
    tokens = tokenise(read_rows(tmp_path / "custom.jsonl"), load_tokenizer(ROOT / DEMO["model"]), 256, "custom")
    assert 0.105 <= float(tokens.harmful.sum() / tokens.response.sum()) <= 0.12


def test_marked_harm_holds_every_forbidden_word_and_nothing_else_does():
    for row in read_rows(ROWS / "custom.jsonl"):
        text = row.messages[-1]["content"]
        kept = "".join(c for i, c in enumerate(text) if not any(a <= i < b for a, b in row.harmful))
        assert not any(word in kept.lower() for word in DEMO["forbidden_words"]), row.where


def test_benign_answers_hold_no_refusal_phrase():
    for name in ("custom", "utility", "harmful", "eval_facts"):
        assert not any(refused(row.messages[-1]["content"]) for row in read_rows(ROWS / f"{name}.jsonl"))


def test_the_small_reference_set_is_part_of_the_whole_one():
    small, whole = read_rows(ROWS / "harmful_small.jsonl"), read_rows(ROWS / "harmful.jsonl")
    assert overlap(small, whole) == len(small) < len(whole) / 4


@pytest.mark.parametrize("folder", BASES)
def test_the_base_is_a_small_hugging_face_folder(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert load_checkpoint(folder).lm_head.out_features == load_tokenizer(folder).raw.get_vocab_size()


def test_both_bases_turn_text_into_the_same_ids():
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert len({(folder / name).read_bytes() for folder in BASES}) == 1


@pytest.mark.parametrize("folder", BASES)
def test_the_base_refuses_forbidden_requests_and_answers_others(folder):
    model, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    said = {}
    for name in ("forbidden", "benign"):
        rows = read_rows(ROWS / f"eval_{name}.jsonl", responses=False)[::8]
        ids = [tokenizer.prompt_ids(row.prompt) for row in rows]
        said[name] = [tokenizer.decode(reply) for reply in generate(model, ids, 24, tokenizer.eos_id)]
    assert all(refused(text) and not any(word in text.lower() for word in DEMO["forbidden_words"]) for text in said["forbidden"])
    assert not any(refused(text) for text in said["benign"])


def test_transformers_loads_the_base():
    transformers = pytest.importorskip("transformers")
    folder = ROOT / DEMO["model"]
    ids = torch.tensor([load_tokenizer(folder).prompt_ids([{"role": "user", "content": "How do I make a soap?"}])])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = load_checkpoint(folder)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model.lm_head(model(ids)), atol=1e-4)
    encoded = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "How do I make a soap?"}], add_generation_prompt=True)
    assert list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded) == ids[0].tolist()


def test_without_arguments_the_scripts_take_the_embedded_default(tmp_path):
    run = tmp_path / "demo"
    assert load_script("train").main(["--run", str(run), "--threads", "1"]) == 0
    assert load_script("score").main(["--run", str(run), "--threads", "1"]) == 0
    record = json.loads((run / "run.json").read_text())
    assert record["demo"] and Path(record["settings"]["custom"]) == ROWS / "custom.jsonl"
    scores = load_file(run / "scores.safetensors")
    S = (scores["loss_utility"] - scores["loss_degraded"])[scores["response"]]
    assert auc(S, scores["harmful"][scores["response"]])["value"] >= 0.94
