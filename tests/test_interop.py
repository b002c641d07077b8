"""Live beside transformers and PEFT, which the project does not need: skipped where they are not installed.

The numbers are those that `python -m tests.agreement` prints; the golden files hold the same without the two packages.
"""

import dataclasses

import pytest
import torch
from agreement import ADAPTERS, GOLDENS, MODELS, REAL, base_of, golden_round_trip, real_round_trip
from safetensors.torch import load_file

from model import InputError, load_adapter, load_checkpoint, save_adapter
from model.config import FAMILIES, Config
from model.lora import REFUSED

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
BOUND = 1e-4  # logits in float32; those of the golden models stay below 10
IDS = torch.arange(20).view(2, 10) * 3 + 1


def assert_close(found):
    moved, exact, size = found.pop("moved"), found.pop("tensors, split by transformers"), found.pop("size")
    assert exact == 0 and found["losses of the tokens, live"] < BOUND
    # Rounding grows with the logits: where they reach 38, transformers in float32 is 9e-5 from itself in float64, as we are.
    assert all(value < BOUND * max(1, size / 10) for value in found.values()), found
    assert moved > 1000 * max(found.values())  # the adapter did something, so its differences mean something


@pytest.mark.parametrize("name", MODELS)
def test_through_transformers_and_peft_and_back(name, tmp_path):
    assert_close(golden_round_trip(name, tmp_path))


@pytest.mark.skipif(not REAL, reason="TOSS_REAL_CHECKPOINT names no checkpoint folder")
def test_a_real_checkpoint_through_transformers_and_peft_and_back(tmp_path):
    assert_close(real_round_trip(tmp_path))


@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_adapter_written_here_is_peft_readable(name, tmp_path):
    """Rank and alpha patterns, some layers only, the head: from PEFT's file through ours to PEFT's golden logits."""
    folder, want = base_of(name), load_file(GOLDENS / "adapters" / name / "golden.safetensors")
    ours = load_checkpoint(folder)
    load_adapter(ours, GOLDENS / "adapters" / name)
    save_adapter(ours, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(want["input_ids"]).logits, want["logits"], atol=BOUND, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [
    {}, dict(num_key_value_heads=4), dict(attention_bias=True, mlp_bias=True), dict(sliding_window=None), dict(head_dim=6),
    dict(use_sliding_window=True), dict(use_sliding_window=True, sliding_window=9, max_window_layers=2),
    dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0)), dict(tie_word_embeddings=True, rms_norm_eps=1e-5),
])  # fmt: skip
def test_what_a_config_leaves_out_is_what_transformers_fills_in(family, fields):
    """The hub's config.json, and the one that transformers makes of it with every field filled in, mean one Config."""
    sizes = dict(vocab_size=80, hidden_size=128, intermediate_size=48, num_hidden_layers=30, num_attention_heads=32)
    full = transformers.AutoConfig.for_model(family, **sizes, **fields).to_dict()
    config = Config.from_dict({"model_type": family, **sizes, **fields}, "config.json")
    assert config == Config.from_dict(full, "config.json")
    full |= dict(num_hidden_layers=1, layer_types=None)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**full))
    tensors = {name.removeprefix("model.layers.0.") for name, _ in model.named_parameters()}
    switches = dict(attention_bias="self_attn.q_proj.bias", output_bias="self_attn.o_proj.bias", mlp_bias="mlp.up_proj.bias",
                    qk_norm="self_attn.q_norm.weight")  # fmt: skip
    assert {name: getattr(config, name) for name in switches} == {name: tensor in tensors for name, tensor in switches.items()}
    assert config.head_dim == model.model.layers[0].self_attn.head_dim


@pytest.mark.parametrize(("settings", "name"), [
    (dict(use_dora=True), "use_dora"),
    (dict(bias="lora_only"), "bias"),
    (dict(bias="all"), "bias"),
    (dict(lora_bias=True), "lora_bias"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(target_modules=["q_proj", "embed_tokens"]), "embed_tokens"),
    (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    (dict(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    (dict(init_lora_weights="pissa"), "pissa"),
    (dict(init_lora_weights="olora"), "olora"),
    (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
])  # fmt: skip
def test_what_is_not_plain_lora_is_refused_as_peft_writes_it(settings, name, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDENS / "plain", dtype=torch.float32)
    config = peft.LoraConfig(**dict(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]) | settings)
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=name):
        load_adapter(load_checkpoint(GOLDENS / "plain"), tmp_path)


@pytest.mark.parametrize("settings", [
    dict(target_modules=r".*\.(0\.self_attn\.[qk]|1\.mlp\.\w+)_proj"),
    dict(target_modules="all-linear", exclude_modules=r".*\.0\.mlp\..*"),
    dict(target_modules=["layers.1.mlp.up_proj", "lm_head"]),
    dict(target_modules=["up_proj", "k_proj"], layers_to_transform=1, layers_pattern=["h", "layers"]),
    dict(target_modules=["q_proj", "v_proj"], r=3, use_rslora=True, rank_pattern={r"1\..*q_proj": 5},
         alpha_pattern={"v_proj": 7}),
    dict(target_modules=["q_proj"], init_lora_weights="gaussian"),
    dict(target_modules=["q_proj"], init_lora_weights="orthogonal"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pefts_way_of_naming_layers_here(settings, dtype, tmp_path):
    """An adapter that PEFT makes on a base of `dtype` and saves, against PEFT's own reading of that file, in float32."""
    read = transformers.AutoModelForCausalLM.from_pretrained
    read(GOLDENS / "plain", dtype=dtype).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**dict(task_type="CAUSAL_LM", r=4) | settings)
    model = peft.get_peft_model(read(tmp_path / "base", dtype=dtype), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").values()} == {dtype}
    ours = load_checkpoint(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(read(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(IDS)), theirs(IDS).logits, atol=BOUND, rtol=0)


def test_every_setting_of_pefts_is_known():
    """A new field of LoraConfig's fails here until someone has looked whether it changes what an adapter computes."""
    read = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "rank_pattern", "alpha_pattern",
            "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}  # fmt: skip
    idle = {"task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
            "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
            "qalora_group_size", "runtime_config"}  # fmt: skip
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= {*read, *idle, *REFUSED}
