"""LoRA: PEFT's files in and out with equal logits, swapping, merging, and refusing what is not plain LoRA."""

import json
import math

import pytest
import torch
from agreement import ADAPTERS, GOLDENS, base_of
from safetensors.torch import load_file

from model import InputError, load_adapter, load_checkpoint, save_adapter, save_checkpoint
from model.lora import adapter_parameters, add_adapter, is_target, lora_layers, merge_adapter, set_adapter

IDS = torch.arange(20).view(2, 10) * 3 + 1


@pytest.fixture
def model():
    return load_checkpoint(GOLDENS / "gqa-tied")


@torch.no_grad()
def logits(model, ids=IDS):
    return model.lm_head(model(ids))


def randomise(model, seed):
    """Random B for the active adapter, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))


def state(model):
    """Everything that an operation on adapters could change."""
    active = {name: m.active for name, m in model.named_modules() if hasattr(m, "active")}
    scales = {name: dict(m.scale) for name, m in model.named_modules() if hasattr(m, "scale")}
    return {k: v.detach().clone() for k, v in model.named_parameters()}, active, scales


def assert_unchanged(model, before):
    parameters, active, scales = state(model)
    assert (active, scales) == before[1:] and parameters.keys() == before[0].keys()
    assert all(torch.equal(parameters[k], before[0][k]) for k in parameters)


@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_adapters_give_pefts_logits(name):
    model = load_checkpoint(base_of(name))
    want = load_file(GOLDENS / "adapters" / name / "golden.safetensors")
    base = logits(model, want["input_ids"])
    load_adapter(model, GOLDENS / "adapters" / name)
    torch.testing.assert_close(logits(model, want["input_ids"]), want["logits"], atol=1e-4, rtol=0)
    assert (base - want["logits"]).abs().max() > 0.5  # the adapter does something


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_equals_the_adapter_and_pefts_merge(name):
    model = load_checkpoint(base_of(name))
    want = load_file(GOLDENS / "adapters" / name / "golden.safetensors")
    load_adapter(model, GOLDENS / "adapters" / name)
    adapted = logits(model, want["input_ids"])
    merge_adapter(model)
    merged = logits(model, want["input_ids"])
    torch.testing.assert_close(merged, adapted, atol=5e-5, rtol=0)  # logits reach 10
    if name != "head-tied-float16":  # there peft's merge changes the embedding too, and with it the answers
        torch.testing.assert_close(merged, want["merged_logits"], atol=1e-4, rtol=0)
    assert not any("lora" in key for key, _ in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError):
        merge_adapter(model)


def test_merging_into_a_tied_head_unties_it(model, tmp_path):
    load_adapter(model, GOLDENS / "adapters/head-tied-float16")
    embedding, adapted = model.model.embed_tokens.weight.clone(), logits(model)
    merge_adapter(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding) and not torch.equal(model.lm_head.weight, embedding)
    save_checkpoint(model, tmp_path / "merged", like=GOLDENS / "gqa-tied")
    again = load_checkpoint(tmp_path / "merged")
    assert torch.equal(logits(again), logits(model)) and (logits(again) - adapted).abs().max() < 5e-5


def test_a_merge_into_half_precision_rounds_once():
    model = load_checkpoint(GOLDENS / "gqa-tied", dtype=torch.bfloat16)
    load_adapter(model, GOLDENS / "adapters/qv")
    layer = model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
    want = (layer.weight.float() + 2.0 * (b @ a)).bfloat16()
    merge_adapter(model)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, want)


def test_a_fresh_adapter_changes_no_logit_and_a_gradient_reaches_it(model):
    before = logits(model)
    add_adapter(model, "new", rank=4, alpha=8, targets=["q_proj", "v_proj"], seed=0)
    assert torch.equal(logits(model), before)
    pairs = adapter_parameters(model)
    assert len(pairs) == 2 * 2 * 2 and all(p.requires_grad and p.dtype == torch.float32 for p in pairs)
    assert sum(p.requires_grad for p in model.parameters()) == len(pairs)
    model.lm_head(model(IDS)).logsumexp(-1).sum().backward()
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_B["new"].grad.abs().sum() > 0 and layer.lora_A["new"].grad.abs().sum() == 0  # B is 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_first_a_depends_on_the_seed_alone(model):
    draw = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        add_adapter(model, name, rank=4, alpha=8, targets=["q_proj", "down_proj"], seed=seed)
        draw[name] = [p.detach().clone() for p in adapter_parameters(model)]
    assert all(torch.equal(p, q) for p, q in zip(draw["one"], draw["again"]))
    assert not any(torch.equal(p, q) for p, q in zip(draw["one"], draw["two"]) if p.any())
    for p in draw["one"]:
        assert not p.any() or 0.5 < p.abs().max() * math.sqrt(p.shape[1]) <= 1  # U(-1/sqrt(in), 1/sqrt(in))


def test_swapping_two_adapters_and_back_gives_identical_results(model):
    base = logits(model)
    load_adapter(model, GOLDENS / "adapters/qv", name="one")
    one = logits(model)
    load_adapter(model, GOLDENS / "adapters/all", name="two")
    two = logits(model)
    assert not torch.equal(one, two) and not torch.equal(one, base)
    for name, want in (("one", one), ("two", two), (None, base), ("two", two), ("one", one), (None, base)):
        set_adapter(model, name)
        assert torch.equal(logits(model), want)
    with pytest.raises(InputError, match="nobody"):
        set_adapter(model, "nobody")


def test_adapter_parameters_are_the_active_ones_only(model):
    add_adapter(model, "one", rank=2, alpha=2, targets=["q_proj"], seed=0)
    add_adapter(model, "two", rank=3, alpha=3, targets=["k_proj"], seed=0)
    assert {p.shape for p in adapter_parameters(model)} == {(3, 32), (16, 3)}
    set_adapter(model, "one")
    assert {p.shape for p in adapter_parameters(model)} == {(2, 32), (32, 2)}
    set_adapter(model, None)
    assert adapter_parameters(model) == []


def test_loading_under_a_name_in_use_replaces_that_adapter(model):
    load_adapter(model, GOLDENS / "adapters/all")
    load_adapter(model, GOLDENS / "adapters/qv")
    want = load_file(GOLDENS / "adapters/qv/golden.safetensors")
    torch.testing.assert_close(logits(model, want["input_ids"]), want["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", ["nothing", "embed_tokens", "q_proj2", ""])
def test_targets_that_the_model_lacks_are_named(model, target):
    before = state(model)
    with pytest.raises(InputError, match=f"'{target}'"):
        add_adapter(model, "x", rank=2, alpha=2, targets=["q_proj", target], seed=0)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_adapter_written_here_is_the_same_adapter(name, tmp_path):
    model = load_checkpoint(base_of(name))
    load_adapter(model, GOLDENS / "adapters" / name)
    want = logits(model)
    save_adapter(model, tmp_path / "out")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", GOLDENS / "adapters" / name))
    theirs = {k: v.float() for k, v in theirs.items() if "base_layer" not in k}  # peft adds a copy of a head that is a target
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    config, peft = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "out", GOLDENS / "adapters" / name))
    assert config.keys() <= peft.keys()  # peft passes every key to its LoraConfig
    same = ["peft_type", "task_type", "bias", "use_dora", "modules_to_save", "fan_in_fan_out", "inference_mode"]
    assert {k: config[k] for k in same} == {k: peft[k] for k in same}
    assert [is_target(config, key) for key in lora_layers(model)] == [is_target(peft, key) for key in lora_layers(model)]
    set_adapter(model, None)
    load_adapter(model, tmp_path / "out", name="again")
    torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=0)


def test_the_written_files_are_pefts(model, tmp_path):
    add_adapter(model, "mine", rank=4, alpha=8, targets=["v_proj", "q_proj"], seed=0)
    randomise(model, 1)
    save_adapter(model, tmp_path / "out")
    config, peft = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "out", GOLDENS / "adapters/qv"))
    assert config.keys() <= peft.keys()  # peft passes every key to its LoraConfig
    same = ["peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora", "modules_to_save",
            "fan_in_fan_out", "rank_pattern", "alpha_pattern", "inference_mode"]
    assert {k: config[k] for k in same} == {k: peft[k] for k in same}
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", GOLDENS / "adapters/qv"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert sorted(ours)[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj", "o_proj", "k_proj"], ["lm_head"]])
def test_a_trained_adapter_survives_the_round_trip_exactly(model, targets, tmp_path):
    add_adapter(model, "mine", rank=3, alpha=16, targets=targets, seed=0)
    randomise(model, 1)
    want = logits(model)
    save_adapter(model, tmp_path / "out")
    other = load_checkpoint(GOLDENS / "gqa-tied")
    load_adapter(other, tmp_path / "out")
    assert torch.equal(logits(other), want)


def test_saving_writes_the_active_adapter_and_needs_one(model, tmp_path):
    with pytest.raises(InputError):
        save_adapter(model, tmp_path / "out")
    load_adapter(model, GOLDENS / "adapters/all", name="one")
    load_adapter(model, GOLDENS / "adapters/qv", name="two")
    set_adapter(model, "one")
    save_adapter(model, tmp_path / "out")
    ours, one = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", GOLDENS / "adapters/all"))
    assert ours.keys() == one.keys()


def test_a_non_finite_adapter_is_not_written_over_a_good_one(model, tmp_path):
    add_adapter(model, "mine", rank=2, alpha=2, targets=["q_proj"], seed=0)
    save_adapter(model, tmp_path / "out")
    good = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        adapter_parameters(model)[1][0, 0] = float("nan")
    with pytest.raises(InputError, match="q_proj"):
        save_adapter(model, tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == good


def test_under_a_half_precision_base_the_adapter_stays_float32(tmp_path):
    model = load_checkpoint(GOLDENS / "gqa-tied", dtype=torch.bfloat16)
    load_adapter(model, GOLDENS / "adapters/all")
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    want = load_file(GOLDENS / "adapters/all/golden.safetensors")
    got = logits(model, want["input_ids"])
    assert got.dtype == torch.bfloat16 and (got.float() - want["logits"]).abs().mean() < 0.1
    save_adapter(model, tmp_path / "out")
    theirs = load_file(GOLDENS / "adapters/all/adapter_model.safetensors")
    assert all(torch.equal(v, theirs[k]) for k, v in load_file(tmp_path / "out/adapter_model.safetensors").items())
