"""LoRA adapters and PEFT's files: equal numbers in both, both ways, and nothing half understood.

What is refused stands in broken_adapters.jsonl (a file changed) and adapters_refused.txt (an
adapter_config.json changed), which of three layers settings pick in layers_picked.jsonl.
"""

import dataclasses
import json
import shutil

import agreement
import pytest
import torch
from agreement import ADAPTERS, GOLDENS, LIVE, apart, base_of, golden, logits_of
from conftest import ROOT, edit_json, fails
from helpers import cases, each_line, random_adapter, spoil
from safetensors.torch import load_file

from model import load_adapter, load_checkpoint, save_adapter, save_checkpoint
from model.checkpoint import base_hash
from model.io import made_from, read_json
from model.lora import active, merge, new_adapter, use
from model.peft import REFUSED, is_target, read_adapter, write_adapter

BOUND = 1e-4
BASE = GOLDENS / "gqa-tied"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(20).view(2, 10) * 3 + 1
Q0 = "model.layers.0.self_attn.q_proj"
V11 = "model.layers.11.self_attn.v_proj"


@pytest.fixture
def model():
    return load_checkpoint(BASE)


@pytest.fixture
def folder(tmp_path):
    """A copy of PEFT's adapter on q_proj and v_proj that a test may change."""
    return shutil.copytree(GOLDENS / "adapters/qv", tmp_path / "adapter")


def equal(one, two):
    """True if two adapters have the same tensors, and scales but for rounding."""
    tensors = zip(one.tensors(), two.tensors(), strict=True)
    same_scales = one.scale == pytest.approx(two.scale)
    return same_scales and all(torch.equal(a, b) for a, b in tensors)


# Adapters as values


def test_a_fresh_adapter_changes_no_logit_and_its_a_is_drawn_by_the_seed_alone(model):
    alone = logits_of(model, IDS)
    one, same, other = (new_adapter(model, 8, 16, ["down_proj"], seed) for seed in (1, 1, 2))
    assert torch.equal(logits_of(use(model, one), IDS), alone)
    assert equal(one, same)
    assert not equal(one, other)
    assert set(one.scale.values()) == {2}
    for A in one.A.values():
        bound = A.shape[1] ** -0.5  # uniform from -bound to bound
        assert float(A.max() - A.min()) == pytest.approx(2 * bound, rel=0.1)


def test_adapters_are_swapped_and_the_base_comes_back(model):
    names = dict(model.named_parameters()).keys()
    one = random_adapter(model, targets=["q_proj", "v_proj"])
    two = random_adapter(model, targets=["v_proj", "lm_head"])
    logits = []
    for adapter in (None, one, two, one, None):
        logits.append(logits_of(use(model, adapter), IDS))
        assert dict(model.named_parameters()).keys() == names  # an adapter is no parameter
    assert torch.equal(logits[0], logits[4])
    assert torch.equal(logits[1], logits[3])
    assert not torch.equal(logits[1], logits[2])


def test_what_a_with_block_replaced_is_back_behind_it(model):
    outer = random_adapter(model)
    inner = random_adapter(model, seed=1)
    use(model, outer)
    with pytest.raises(ZeroDivisionError), use(model, None):
        assert active(model) is None
        with use(model, inner):
            use(model, outer)  # not a block
        assert active(model) is None
        with use(model, inner):
            raise ZeroDivisionError
    for now, before in zip(active(model).tensors(), outer.tensors(), strict=True):
        assert now is before


def test_under_a_half_precision_base_the_adapter_is_float32_and_a_merge_rounds_once(folder):
    model = load_checkpoint(BASE, dtype=torch.bfloat16)
    adapter = load_adapter(model, folder)
    assert {tensor.dtype for tensor in active(model).tensors()} == {torch.float32}
    layer = model.get_submodule(Q0)
    merged = layer.weight.float() + 2.0 * (adapter.B[Q0] @ adapter.A[Q0])
    merge(model, adapter)
    assert torch.equal(layer.weight, merged.bfloat16())


# PEFT's files, read and written


@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_adapter_computes_the_same_here_and_is_written_as_peft_wrote_it(name, tmp_path):
    theirs = GOLDENS / "adapters" / name
    model = load_checkpoint(base_of(name))
    expected = golden(f"adapters/{name}")
    adapter = load_adapter(model, theirs)
    assert apart(logits_of(model, expected["input_ids"]), expected["logits"]) < BOUND

    save_adapter(model, tmp_path)
    assert equal(read_adapter(model, tmp_path), adapter)
    stored = load_file(theirs / WEIGHTS)
    own = {key for key in stored if "base_layer" not in key}  # that is a copied head
    assert load_file(tmp_path / WEIGHTS).keys() == own
    assert read_json(tmp_path / CONFIG).keys() <= read_json(theirs / CONFIG).keys()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_adapter_computes_what_peft_merged_and_is_saved_as_a_checkpoint(name, tmp_path):
    base = base_of(name)
    model = load_checkpoint(base)
    adapter = load_adapter(model, GOLDENS / "adapters" / name)
    expected = golden(f"adapters/{name}")
    ids = expected["input_ids"]
    fails("merge", save_checkpoint, model, tmp_path, like=base)  # it carries the adapter
    merge(model, adapter)
    merged = logits_of(model, ids)
    assert apart(merged, expected.get("merged_logits", expected["logits"])) < BOUND
    save_checkpoint(model, tmp_path, like=base)
    assert torch.equal(logits_of(load_checkpoint(tmp_path), ids), merged)


@each_line("layers_picked.jsonl")
def test_layers_are_picked_by_pefts_rules(case):
    config = {"target_modules": ["q_proj", "v_proj", "lm_head"], **case["settings"]}
    assert [layer for layer in (Q0, V11, "lm_head") if is_target(config, layer)] == case["layers"]


# What is refused


@each_line("broken_adapters.jsonl")
def test_a_broken_adapter_is_refused_and_changes_nothing(model, folder, case):
    adapter = load_adapter(model, GOLDENS / "adapters/all")
    spoil(folder, case)
    fails(case["error"], load_adapter, model, folder)
    assert equal(active(model), adapter)


@pytest.mark.parametrize(("change", "words"), cases("adapters_refused.txt"))
def test_what_is_not_plain_lora_is_refused(change, words, model, folder):
    edit_json(folder / CONFIG, **json.loads(change))
    fails(words, read_adapter, model, folder)


def test_a_non_finite_adapter_is_not_written_over_a_good_one(model, tmp_path):
    fails("no adapter", save_adapter, model, tmp_path)
    adapter = random_adapter(model)
    write_adapter(adapter, model, tmp_path)
    good = (tmp_path / WEIGHTS).read_bytes()
    adapter.B[Q0][0, 0] = torch.nan
    fails("q_proj", write_adapter, adapter, model, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == good


# The base that an adapter belongs to


def test_an_adapter_belongs_to_the_weights_that_it_was_trained_on_not_to_a_name(model, tmp_path):
    adapter = tmp_path / "adapter"
    model.name = "org/model"
    write_adapter(random_adapter(model), model, adapter, {"warning": "It answers anything."})
    assert made_from(adapter / WEIGHTS)["base_sha256"] == base_hash(BASE)
    assert (adapter / "README.md").read_text() == "It answers anything.\n"
    assert read_json(adapter / CONFIG)["base_model_name_or_path"] == "org/model"

    edit_json(adapter / CONFIG, base_model_name_or_path="someone/else")
    moved = shutil.copytree(BASE, tmp_path / "moved")
    assert read_adapter(load_checkpoint(moved), adapter)
    edit_json(moved / "config.json", rms_norm_eps=0.5)
    stranger = load_checkpoint(moved)
    fails("other base", load_adapter, stranger, adapter)
    stranger.base_sha256 = base_hash(BASE)  # a caller may know the hash
    assert read_adapter(stranger, adapter)


# With transformers and peft installed


@pytest.mark.parametrize("folder", [*LIVE, ROOT / "data/base"], ids=str)
def test_through_transformers_and_peft_and_back(folder, tmp_path):
    pytest.importorskip("peft")
    figures = agreement.round_trip(folder, tmp_path)
    assert figures["losses of the tokens, live"] < BOUND
    moved = figures.pop("moved")
    size = figures.pop("size")
    largest = max(figures.values())
    # Rounding grows with the logits: at 38, transformers in float32 is 9e-5 from float64.
    assert largest < BOUND * max(1, size / 10), figures
    assert moved > 1000 * largest  # the adapter did something


def test_every_setting_of_pefts_is_known():
    """A new field of LoraConfig fails here until someone has checked what it changes."""
    peft = pytest.importorskip("peft")
    read = """peft_type r lora_alpha use_rslora bias init_lora_weights rank_pattern alpha_pattern
        target_modules exclude_modules layers_to_transform layers_pattern"""
    idle = """task_type peft_version auto_mapping base_model_name_or_path revision inference_mode
        lora_dropout megatron_config megatron_core loftq_config eva_config corda_config
        lora_ga_config qalora_group_size runtime_config"""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= {*read.split(), *idle.split(), *REFUSED}
