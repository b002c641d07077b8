"""A checkpoint is read exactly as Hugging Face means it, written back equal, or refused by name.

What is refused stands in broken_checkpoints.jsonl (a file changed) and configs_refused.txt (a
config.json changed), a line each; what an absent field of config.json means in config_fields.jsonl.
"""

import json
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from agreement import GOLDENS, MODELS
from conftest import ROOT, edit_json, edit_tensors, fails, make_base, read_jsonl, tree
from helpers import cases, each_line, same_weights, set_tensor, spoil
from safetensors.torch import load_file, save_file

from model import load_checkpoint, save_checkpoint
from model.checkpoint import BLOCK, base_hash
from model.config import Config
from model.io import read_json

WEIGHTS = "model.safetensors"
GATE = "model.layers.1.mlp.gate_proj.weight"


def copied(name, tmp_path):
    """A copy of a golden model that a test may change."""
    return shutil.copytree(GOLDENS / name, tmp_path / "checkpoint")


# Reading


def test_what_is_loaded_is_frozen_and_its_head_may_be_tied():
    model = load_checkpoint(GOLDENS / "gqa-tied")
    assert not model.training
    for tensor in [*model.parameters(), *model.buffers()]:
        assert not tensor.requires_grad and not tensor.is_meta
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_old_rotary_tables_and_a_copy_of_a_tied_head_change_nothing(tmp_path):
    model = load_checkpoint(GOLDENS / "gqa-tied")
    assert same_weights(load_checkpoint(GOLDENS / "gqa-tied-shards"), model)
    folder = copied("gqa-tied", tmp_path)
    set_tensor(folder / WEIGHTS, "model.layers.0.self_attn.rotary_emb.inv_freq", [4])
    stored = load_file(folder / WEIGHTS)
    head = stored["model.embed_tokens.weight"]
    save_file({**stored, "lm_head.weight": head.clone()}, folder / WEIGHTS)
    assert same_weights(load_checkpoint(folder), model)


@each_line("broken_checkpoints.jsonl")
def test_a_broken_checkpoint_is_refused_by_name(case, tmp_path):
    folder = copied(case["base"], tmp_path)
    spoil(folder, case)
    fails(case["error"], load_checkpoint, folder)


@pytest.mark.parametrize(("change", "words"), cases("configs_refused.txt"))
def test_an_unknown_or_malformed_config_is_refused_by_name(change, words, tmp_path):
    folder = copied("plain", tmp_path)
    edit_json(folder / "config.json", **json.loads(change))
    fails(words, load_checkpoint, folder)


def test_a_pickle_is_never_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copied("gqa-tied-shards", tmp_path)
    (folder / "pytorch_model.bin").write_text("cos\nmkdir\n(Vopened\ntR.")  # would make a folder
    edit_json(folder / f"{WEIGHTS}.index.json", weight_map={"a": "pytorch_model.bin"})
    fails("pytorch_model.bin", load_checkpoint, folder)
    assert not Path("opened").exists()


def test_a_weight_beyond_float16_is_refused_in_float16_only(tmp_path):
    folder = copied("plain", tmp_path)
    edit_tensors(folder / WEIGHTS, GATE, lambda weight: weight * 1e6)
    assert load_checkpoint(folder, dtype=torch.bfloat16)
    fails(GATE, load_checkpoint, folder, dtype=torch.float16)


# config.json

SIZES = {
    "vocab_size": 80,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 30,
    "num_attention_heads": 64,
}
FIELDS = read_jsonl(ROOT / "tests/config_fields.jsonl")
PLAIN = {case["model_type"]: case["means"] for case in FIELDS if not case["given"]}


def as_json(config):
    """A config's fields, with lists for sets."""
    return json.loads(json.dumps(asdict(config), default=sorted))


@each_line("config_fields.jsonl")
def test_an_absent_field_means_what_it_means_in_its_family_and_in_transformers(case):
    family = case["model_type"]
    given = {**SIZES, "model_type": family, **case["given"]}
    config = Config.from_dict(given, "config.json")
    default = as_json(Config(**SIZES, num_key_value_heads=0, head_dim=0, query_scalar=0))
    assert as_json(config) == {**default, **PLAIN[family], **case["means"]}
    if find_spec("transformers"):
        from transformers import AutoConfig

        whole = AutoConfig.for_model(**given).to_dict()
        assert config == Config.from_dict(whole, "config.json")


# Writing


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_again_is_equal(name, tmp_path):
    model = load_checkpoint(GOLDENS / name)
    save_checkpoint(model, tmp_path, like=GOLDENS / name)
    assert same_weights(load_checkpoint(tmp_path), model)
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(GOLDENS / name / WEIGHTS).keys()


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    model = load_checkpoint(GOLDENS / "gqa-tied")
    model.get_parameter(GATE)[0, 0] = torch.inf
    fails(f"{GATE} is not finite", save_checkpoint, model, tmp_path, like=GOLDENS / "gqa-tied")
    assert not tree(tmp_path)


def test_saving_copies_the_tokenizer_and_states_the_dtype(tmp_path):
    like = make_base(tmp_path / "like")
    (like / "additional_chat_templates").mkdir()
    (like / "additional_chat_templates/default.jinja").write_text("wins over the others")
    out = tmp_path / "out"
    save_checkpoint(load_checkpoint(like, dtype=torch.bfloat16), out, like=like)
    config = read_json(out / "config.json")
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    assert load_file(out / WEIGHTS)["model.norm.weight"].dtype == torch.bfloat16
    files = tree(out)
    for name, content in tree(like).items():
        assert files[name] == content or name in ("config.json", WEIGHTS)


# What identifies a base


def test_an_edit_of_any_tensor_or_of_the_config_changes_what_identifies_a_base(tmp_path):
    """Also where so many lie in one file that the spread blocks miss some of them."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    tensors = {f"{i}.large": torch.randn(BLOCK // 2) for i in range(40)}  # of two blocks each
    tensors |= {f"{i}.small": torch.randn(3) for i in range(120)}
    file = base / WEIGHTS
    save_file(tensors, file)
    digests = {base_hash(base)}
    moved = shutil.copytree(base, tmp_path / "moved")
    assert digests == {base_hash(moved)}
    (moved / "config.json").write_text("[]")
    digests.add(base_hash(moved))

    # The file in memory: each tensor in it is scaled.
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    stored = torch.from_file(str(file), shared=True, size=len(content), dtype=torch.uint8)
    for tensor in header.values():
        begin, end = tensor["data_offsets"]
        stored[start + begin : start + end].view(torch.float32).mul_(1.01)
        digests.add(base_hash(base))
    assert len(digests) == 2 + len(tensors)
