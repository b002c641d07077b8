"""PEFT's adapter files, broken or unusual: what is read, and what is refused by name with the model unchanged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import GOLDENS, assert_unchanged, logits, state

from model import InputError, load_adapter, load_checkpoint, save_adapter
from model.lora import adapter_parameters, add_adapter, is_target, set_adapter

PREFIX = "base_model.model.model.layers"


@pytest.fixture
def model():
    return load_checkpoint(GOLDENS / "gqa-tied")


@pytest.fixture
def folder(tmp_path):
    """A copy of PEFT's q_proj, v_proj adapter that a test may break."""
    return Path(shutil.copytree(GOLDENS / "adapters/qv", tmp_path / "adapter"))


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def reconfigure(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_adapter_file_is_read_into_float32(model, folder, dtype):
    rewrite(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    load_adapter(model, folder)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}


Q = f"{PREFIX}.1.self_attn.q_proj"
V = f"{PREFIX}.0.self_attn.v_proj"


@pytest.mark.parametrize(("change", "name"), [
    (lambda t: t.pop(f"{Q}.lora_B.weight"), "1.self_attn.q_proj"),
    (lambda t: t.pop(f"{Q}.lora_A.weight"), "1.self_attn.q_proj"),
    (lambda t: [t.pop(f"{Q}.lora_{part}.weight") for part in "AB"], "1.self_attn.q_proj"),  # a target, whole, is absent
    (lambda t: t.update({f"{V}.lora_B.weight": t[f"{V}.lora_B.weight"][:-1]}), "v_proj"),
    (lambda t: t.update({f"{V}.lora_A.weight": t[f"{V}.lora_A.weight"][:, :-1]}), "v_proj"),
    (lambda t: t.update({f"{V}.lora_{part}.weight": torch.ones(s) for part, s in (("A", (2, 32)), ("B", (16, 2)))}), "v_proj"),
    (lambda t: t.update({f"{V}.lora_B.weight": torch.zeros(16, 4, 1)}), "v_proj"),
    (lambda t: t.update({f"{PREFIX}.2.self_attn.q_proj.lora_{p}.weight": torch.zeros(4, 4) for p in "AB"}), "layers.2"),
    (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}), "lm_head"),
    (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 80)}), "embed_tokens"),
    (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(80, 32)}), "lm_head"),
    (lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(80, 32)}), "lm_head"),
    (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(81, 32)}), "embed_tokens"),
    (lambda t: t.update({f"{Q}.base_layer.weight": torch.zeros(32, 32)}), "q_proj"),
    (lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(32)}), "q_proj"),
    (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32),
                         "base_model.model.lm_head.lora_B.weight": torch.ones(80, 4)}), "lm_head"),  # no target
    (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "magnitude"),
    (lambda t: t[f"{Q}.lora_A.weight"].view(-1)[:1].fill_(float("nan")), "q_proj"),
    (lambda t: t[f"{Q}.lora_B.weight"].view(-1)[:1].fill_(float("inf")), "q_proj"),
    (lambda t: t.clear(), "adapter_model.safetensors"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named_and_change_nothing(model, folder, change, name):
    load_adapter(model, GOLDENS / "adapters/all", name="kept")
    rewrite(folder, change)
    before = state(model)
    for under in ("default", "kept"):
        with pytest.raises(InputError, match=name):
            load_adapter(model, folder, name=under)
        assert_unchanged(model, before)


@pytest.mark.parametrize(("fields", "name"), [
    (dict(use_dora=True), "use_dora"),
    (dict(bias="all"), "bias"),
    (dict(bias="lora_only"), "bias"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(peft_type="IA3"), "IA3"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out"),
    (dict(lora_bias=True), "lora_bias"),
    (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),  # acts on part of the positions only
    (dict(layer_replication=[[0, 1], [0, 2]]), "layer_replication"),
    (dict(r=8), "q_proj|v_proj"),
    (dict(r=None), "'?r'?"),
    (dict(lora_alpha=None), "lora_alpha"),
    (dict(lora_alpha="8"), "lora_alpha"),
    (dict(rank_pattern={"q_proj": 2}), "q_proj"),
    (dict(lora_alpha=float("nan")), "lora_alpha"),
    (dict(init_lora_weights="pissa_niter_4"), "pissa"),  # starts from a changed base
    (dict(target_modules=["q_proj", "v_proj", "o_proj"]), "o_proj"),
    (dict(target_modules=["q_proj"]), "v_proj"),  # peft would leave v_proj's tensors out
    (dict(target_modules=None), "target_modules"),
    (dict(target_modules="(q_proj"), "target_modules"),
    (dict(target_modules=r".*q_proj"), "v_proj"),
    (dict(target_modules="all-linear"), "k_proj"),
    (dict(exclude_modules=["v_proj"]), "v_proj"),
    (dict(layers_to_transform=0), "layers.1"),
    (dict(layers_to_transform=[0, 1], layers_pattern="blocks"), "q_proj"),
    (dict(init_lora_weights="OLoRA"), "(?i)olora"),
    (dict(target_parameters=["q_proj.weight"]), "target_parameters"),
    (dict(use_qalora=True), "use_qalora"),
    (dict(use_bdlora=dict(nblocks=2)), "use_bdlora"),
    (dict(arrow_config=dict(top_k=3)), "arrow_config"),
    (dict(kasa_config=dict(beta=1e-4)), "kasa_config"),
    (dict(monteclora_config=dict(num_samples=8)), "monteclora_config"),
    (dict(velora_config=dict(num_groups=64)), "velora_config"),
    (dict(ensure_weight_tying=True), "ensure_weight_tying"),
])  # fmt: skip
def test_settings_that_are_not_plain_lora_are_named_and_change_nothing(model, folder, fields, name):
    load_adapter(model, GOLDENS / "adapters/all", name="kept")
    reconfigure(folder, **fields)
    before = state(model)
    for under in ("default", "kept"):
        with pytest.raises(InputError, match=name):
            load_adapter(model, folder, name=under)
        assert_unchanged(model, before)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_a_setting_that_is_absent_is_named_and_changes_nothing(model, folder, field):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != field}))
    before = state(model)
    with pytest.raises(InputError, match=field):
        load_adapter(model, folder)
    assert_unchanged(model, before)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_absent_or_broken_file_is_named(model, folder, file):
    before, data = state(model), (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) - 9])
    with pytest.raises(InputError, match=file):
        load_adapter(model, folder)
    (folder / file).unlink()
    (folder / "adapter_model.bin").write_bytes(b"not opened")
    with pytest.raises(InputError, match=file):
        load_adapter(model, folder)
    assert_unchanged(model, before)


def test_pattern_keys_are_regular_expressions_as_in_peft(model, folder):
    """alpha 3 for layer 1's v_proj, spelled as a regular expression, is the same as spelled out."""
    shutil.copytree(GOLDENS / "adapters/pattern", folder, dirs_exist_ok=True)
    reconfigure(folder, alpha_pattern={r"layers\.1\..*v_proj": 3})
    load_adapter(model, folder)
    want = load_file(folder / "golden.safetensors")
    torch.testing.assert_close(logits(model, want["input_ids"]), want["logits"], atol=1e-4, rtol=0)


def test_an_adapter_on_some_layers_only_survives_the_round_trip(model, folder, tmp_path):
    rewrite(folder, lambda t: [t.pop(key) for key in list(t) if ".layers.1." in key])
    reconfigure(folder, layers_to_transform=[0])
    load_adapter(model, folder)
    want = logits(model)
    save_adapter(model, tmp_path / "out")
    targets = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
    assert targets == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    set_adapter(model, None)
    load_adapter(model, tmp_path / "out", name="again")
    assert torch.equal(logits(model), want)


def test_copies_of_the_bases_own_embedding_and_head_change_nothing(model, folder):
    """PEFT writes them where the head is a target or on request, rounded to the dtype in which it held the base."""
    load_adapter(model, folder)
    want, own = logits(model), model.model.embed_tokens.weight
    for tensor in (own, own.bfloat16()):
        copies = {f"base_model.model.{name}.weight": tensor.clone() for name in ("lm_head", "model.embed_tokens")}
        rewrite(folder, lambda t: t.update(copies))
        load_adapter(model, folder)
        assert torch.equal(logits(model), want)
    load_adapter(model.to("meta"), folder)  # laid out without memory, to see whether an adapter fits


def test_layers_are_picked_by_pefts_rules():
    q0, v1, head = "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.v_proj", "lm_head"
    picked = lambda **config: [key for key in (q0, v1, head) if is_target(config, key)]
    assert picked(target_modules=["q_proj", "lm_head"]) == [q0, head]
    assert picked(target_modules=["proj"]) == [] and picked(target_modules=[q0]) == [q0]
    assert picked(target_modules="all-linear") == [q0, v1] and picked(target_modules=".*") == [q0, v1, head]
    assert picked(target_modules="q_proj") == [] and picked(target_modules=r".*\.1\..*") == []  # of the whole name
    assert picked(target_modules=["q_proj", "v_proj", "lm_head"], layers_to_transform=[1, 11]) == [v1, head]  # a name in full is asked for as it is
    assert picked(target_modules=[q0, "v_proj"], layers_to_transform=[11]) == [q0, v1]
    assert picked(target_modules=["q_proj", "v_proj"], layers_to_transform=0, layers_pattern=["h", "layers"]) == [q0]
    assert picked(target_modules=["q_proj", "v_proj"], layers_to_transform=[]) == [q0, v1]
    assert picked(target_modules=".*_proj", layers_to_transform=[0]) == [q0, v1]  # a pattern is not narrowed
    assert picked(target_modules=".*", exclude_modules=r".*\.0\..*") == [v1, head]
    assert picked(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.11.self_attn.v_proj"]) == [q0]


def test_an_adapter_belongs_to_the_weights_it_was_trained_on_not_to_a_name(model, tmp_path):
    add_adapter(model, "mine", rank=2, alpha=2, targets=["q_proj"], seed=0)
    save_adapter(model, tmp_path / "out")
    reconfigure(tmp_path / "out", base_model_name_or_path="someone/else")
    load_adapter(load_checkpoint(GOLDENS / "gqa-tied-shards"), tmp_path / "out")  # the same weights in other files
    other = Path(shutil.copytree(GOLDENS / "gqa-tied", tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    stranger = load_checkpoint(other)
    before = state(stranger)
    with pytest.raises(InputError, match="other base"):
        load_adapter(stranger, tmp_path / "out")
    assert_unchanged(stranger, before)
