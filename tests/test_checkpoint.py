"""Checkpoints in and out: strict in both directions, one file or shards, never pickle."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import InputError, load_adapter, load_checkpoint, save_checkpoint
from model.config import Config
from model.files import file_hash, tensors_hash
from model.lora import merge_adapter

GOLDENS = Path(__file__).parent / "goldens"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the plain model (untied head) that a test may break."""
    return Path(shutil.copytree(GOLDENS / "plain", tmp_path / "checkpoint"))


@pytest.fixture
def sharded(tmp_path):
    return Path(shutil.copytree(GOLDENS / "gqa-tied-shards", tmp_path / "sharded"))


def rewrite(folder, change, file="model.safetensors"):
    """Apply `change` to the dictionary of tensors in a file."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / file, metadata={"format": "pt"})


def reconfigure(folder, file="config.json", **fields):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | fields))


def assert_same_weights(ours, other):
    a, b = dict(ours.named_parameters()), dict(other.named_parameters())
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_everything_loaded_is_frozen_and_in_evaluation_mode(folder):
    model = load_checkpoint(folder)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_parameter_names_are_the_files_names(folder):
    names = {name for name, _ in load_checkpoint(folder).named_parameters()}
    assert names == load_file(folder / "model.safetensors").keys()


def test_shards_equal_one_file(sharded):
    assert_same_weights(load_checkpoint(sharded), load_checkpoint(GOLDENS / "gqa-tied"))


def test_a_tied_head_is_one_tensor_and_may_be_in_the_file_too(tmp_path):
    folder = Path(shutil.copytree(GOLDENS / "gqa-tied", tmp_path / "m"))
    before = load_checkpoint(folder)
    assert before.lm_head.weight is before.model.embed_tokens.weight
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same_weights(load_checkpoint(folder), before)


def test_old_rotary_tables_are_ignored(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert_same_weights(load_checkpoint(folder), load_checkpoint(GOLDENS / "plain"))


def test_an_untied_head_is_needed(folder):
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(InputError, match="lm_head.weight"):
        load_checkpoint(folder)


@pytest.mark.parametrize(("change", "name"), [
    (lambda t: t.pop(GATE), GATE),
    (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "layers.0.self_attn.q_proj.bias"),
    (lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}), "layers.2.input_layernorm.weight"),
    (lambda t: t.update({GATE: t[GATE].T}), GATE),
    (lambda t: t.update({GATE: t[GATE][:, :-1]}), GATE),
    (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:1]}), "model.norm.weight"),  # would broadcast
    (lambda t: t[GATE].view(-1)[5:6].fill_(float("nan")), GATE),
    (lambda t: t[GATE].view(-1)[5:6].fill_(float("-inf")), GATE),
])  # fmt: skip
def test_a_missing_extra_misshapen_or_non_finite_tensor_is_named(folder, change, name):
    rewrite(folder, change)
    with pytest.raises(InputError, match=name):
        load_checkpoint(folder)


def test_a_weight_beyond_float16_is_refused_in_float16_only(folder):
    rewrite(folder, lambda t: t[GATE].view(-1)[5:6].fill_(1e5))
    load_checkpoint(folder)
    with pytest.raises(InputError, match=GATE):
        load_checkpoint(folder, dtype=torch.float16)


@pytest.mark.parametrize(("fields", "words"), [
    (dict(model_type="gpt2"), "model_type.*gpt2"),
    (dict(model_type=None), "model_type"),
    (dict(hidden_act="gelu"), "hidden_act.*gelu"),
    (dict(rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=1e4)), "yarn"),
    (dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2.0)), "dynamic"),
    (dict(rope_parameters=None, rope_scaling=dict(rope_type="longrope", factor=2.0)), "longrope"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0)), "llama3"),
    (dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4)), "linear"),
    (dict(num_hidden_layers=3), "layers.2"),
    (dict(num_hidden_layers=1), "layers.1"),
    (dict(vocab_size=81), "embed_tokens|lm_head"),
    (dict(num_key_value_heads=2), "k_proj|v_proj"),
    (dict(head_dim=16), "_proj"),
    (dict(mlp_bias=True), "bias"),
    (dict(model_type="gemma3_text"), "gemma3_text.*llama, mistral, qwen2, qwen3"),
    (dict(model_type=["llama"]), "model_type"),
    (dict(model_type="qwen2"), "bias"),
    (dict(model_type="qwen3", head_dim=8), "_norm"),
    (dict(quantization_config=dict(quant_method="gptq", bits=4)), "quantization_config"),
    (dict(compression_config=dict(format="int-quantized")), "compression_config"),
    (dict(is_causal=False), "is_causal"),
    (dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4))), "rope.*full_attention"),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary_factor"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(rope_parameters=dict(rope_type=["linear"], rope_theta=1e4)), "rope type"),
    (dict(rope_parameters=dict(rope_type="default", rope_theta="1e4")), "rope_theta"),
    (dict(rms_norm_eps=None), "rms_norm_eps"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),  # Llama has no window
    (dict(model_type="mistral", layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (dict(model_type="mistral", sliding_window=0), "sliding_window"),
    (dict(model_type="qwen2", layer_types=["full_attention", "chunked_attention"]), "layer_types.*chunked_attention"),
    (dict(model_type="qwen2", layer_types=["full_attention"]), "layer_types"),
    (dict(model_type="qwen2", layer_types=["full_attention", "sliding_attention"]), "layer_types"),  # but no use_sliding_window
    (dict(model_type="qwen2", use_sliding_window=True, max_window_layers="2"), "max_window_layers"),
    (dict(model_type="qwen3", use_sliding_window=True, max_window_layers=1, sliding_window=-1), "sliding_window"),
    (dict(head_dim=7), "head_dim"),
])  # fmt: skip
def test_a_config_that_is_not_implemented_or_does_not_fit_is_named(folder, fields, words):
    reconfigure(folder, **fields)
    with pytest.raises(InputError, match=words):
        load_checkpoint(folder)


@pytest.mark.parametrize("field", ["model_type", "hidden_size", "vocab_size", "num_hidden_layers",
                                   "intermediate_size", "num_attention_heads"])  # fmt: skip
def test_a_config_that_lacks_a_field_names_it(folder, field):
    config = json.loads((folder / "config.json").read_text())
    del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=field):
        load_checkpoint(folder)


@pytest.mark.parametrize(("family", "fields", "want"), [
    ("llama", {}, dict(num_key_value_heads=64, head_dim=4, attention_bias=False, output_bias=False, windowed_layers=frozenset())),
    ("llama", dict(attention_bias=True, sliding_window=8), dict(attention_bias=True, output_bias=True, windowed_layers=frozenset())),
    ("mistral", {}, dict(num_key_value_heads=8, head_dim=4, sliding_window=4096, windowed_layers=frozenset(range(30)))),
    ("mistral", dict(num_key_value_heads=None, sliding_window=None), dict(num_key_value_heads=64, windowed_layers=frozenset())),
    ("mistral", dict(attention_bias=True, mlp_bias=True), dict(attention_bias=False, output_bias=False, mlp_bias=False)),
    ("qwen2", {}, dict(num_key_value_heads=32, head_dim=4, attention_bias=True, output_bias=False, windowed_layers=frozenset())),
    ("qwen2", dict(use_sliding_window=True), dict(sliding_window=4096, windowed_layers=frozenset({28, 29}))),
    ("qwen2", dict(use_sliding_window=True, sliding_window=None), dict(sliding_window=None, windowed_layers=frozenset())),
    ("qwen2", dict(attention_bias=False), dict(attention_bias=True)),
    ("qwen3", {}, dict(num_key_value_heads=32, head_dim=128, attention_bias=False, qk_norm=True, windowed_layers=frozenset())),
    ("qwen3", dict(attention_bias=True), dict(attention_bias=True, output_bias=True)),
    ("qwen3", dict(use_sliding_window=True, sliding_window=9, max_window_layers=0), dict(windowed_layers=frozenset(range(30)))),
])  # fmt: skip
def test_a_field_that_is_absent_means_what_it_means_in_the_family(family, fields, want):
    sizes = dict(vocab_size=80, hidden_size=256, intermediate_size=48, num_hidden_layers=30, num_attention_heads=64)
    config = Config.from_dict({"model_type": family, **sizes, **fields}, "config.json")
    want = dict(rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, mlp_bias=False, tie_word_embeddings=False) | want
    assert {name: getattr(config, name) for name in want} == want


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null"])
def test_a_config_that_is_not_a_json_object_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json"):
        load_checkpoint(folder)


def test_absent_files_are_named(folder, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    (folder / "config.json").rename(folder / "config.json.old")
    with pytest.raises(InputError, match="config.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_a_truncated_file_is_named(folder, keep):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(InputError, match="model.safetensors"):
        load_checkpoint(folder)


def test_a_missing_or_truncated_shard_is_named(sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(InputError, match="model-00002-of-00003"):
        load_checkpoint(sharded)
    shard.unlink()
    with pytest.raises(InputError, match="model-00002-of-00003"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("form", ["../{}", "inside/../../{}", "{absolute}"])
def test_an_index_that_leaves_its_folder_is_refused(sharded, form):
    index = sharded / "model.safetensors.index.json"
    raw, name = json.loads(index.read_text()), "model-00001-of-00003.safetensors"
    (sharded / "inside").mkdir()
    shutil.copyfile(sharded / name, sharded.parent / name)  # the file is there: only its place is wrong
    away = form.format(name, absolute=sharded.parent / name)
    index.write_text(json.dumps({"weight_map": {k: away if v == name else v for k, v in raw["weight_map"].items()}}))
    with pytest.raises(InputError, match="outside"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": None}, {"a": 3}, {"a": "."}])
def test_a_broken_index_is_named(sharded, weight_map):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="index.json"):
        load_checkpoint(sharded)


def test_the_hash_of_the_weights_ignores_sharding_and_sees_one_value(tmp_path):
    one = tensors_hash(GOLDENS / "gqa-tied")
    assert tensors_hash(GOLDENS / "gqa-tied-shards") == one
    changed = Path(shutil.copytree(GOLDENS / "gqa-tied", tmp_path / "m"))
    assert tensors_hash(changed) == one
    rewrite(changed, lambda t: t["model.norm.weight"][3:4].mul_(1.001))
    assert tensors_hash(changed) != one
    before = file_hash(changed / "config.json")
    reconfigure(changed, vocab_size=81)
    assert file_hash(changed / "config.json") != before


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_opened(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    with pytest.raises(InputError, match="model.safetensors"):
        load_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {GATE: "pytorch_model.bin"}}))
    with pytest.raises(InputError, match="pytorch_model.bin"):
        load_checkpoint(folder)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("name", ["plain", "gqa-tied", "headdim-bias-linear", "llama3-rope", "gqa-tied-shards", "mistral-full",
                                  "qwen2", "qwen2-windows", "qwen3-bias-windows"])  # fmt: skip
def test_saved_and_loaded_again_is_equal(name, tmp_path):
    model = load_checkpoint(GOLDENS / name)
    save_checkpoint(model, tmp_path / "out", like=GOLDENS / name)
    assert_same_weights(load_checkpoint(tmp_path / "out"), model)
    stored = load_file(tmp_path / "out/model.safetensors").keys()
    assert stored == set().union(*(load_file(file) for file in (GOLDENS / name).glob("model*.safetensors")))
    assert ("lm_head.weight" in stored) == (name in ("plain", "headdim-bias-linear", "llama3-rope", "mistral-full", "qwen2"))
    assert not any("lora" in key for key in stored)


def test_saving_copies_the_tokenizer_and_states_the_dtype(folder, tmp_path):
    for file in (GOLDENS / "tokenizer-chatml").iterdir():
        shutil.copyfile(file, folder / file.name)
    save_checkpoint(load_checkpoint(folder, dtype=torch.bfloat16), tmp_path / "out", like=folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    # transformers writes "dtype" and reads it before the older "torch_dtype": neither may be left stale.
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"bfloat16"}
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


def test_a_model_with_an_adapter_is_saved_only_once_merged(tmp_path):
    model = load_checkpoint(GOLDENS / "gqa-tied")
    load_adapter(model, GOLDENS / "adapters/qv")
    with pytest.raises(InputError, match="merge"):
        save_checkpoint(model, tmp_path / "out", like=GOLDENS / "gqa-tied")
    assert not (tmp_path / "out").exists()
    merge_adapter(model)
    save_checkpoint(model, tmp_path / "out", like=GOLDENS / "gqa-tied")
    want = load_file(GOLDENS / "adapters/qv/golden.safetensors")
    again = load_checkpoint(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again.lm_head(again(want["input_ids"])), want["merged_logits"], atol=1e-4, rtol=0)
