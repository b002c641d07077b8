"""LoRA: PEFT's files in and out with equal logits, swapping, merging, and refusing what is not plain LoRA."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import InputError, load_adapter, load_checkpoint, save_adapter
from model.lora import adapter_parameters, add_adapter, merge_adapter, set_adapter

GOLDENS = Path(__file__).parent / "goldens"
ADAPTERS = ["qv", "all", "rslora", "pattern"]
PREFIX = "base_model.model.model.layers"
IDS = torch.arange(20).view(2, 10) * 3 + 1


@pytest.fixture
def model():
    return load_checkpoint(GOLDENS / "gqa-tied")


@pytest.fixture
def folder(tmp_path):
    """A copy of PEFT's q_proj, v_proj adapter that a test may break."""
    return Path(shutil.copytree(GOLDENS / "adapters/qv", tmp_path / "adapter"))


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


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def reconfigure(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_adapters_give_pefts_logits(model, name):
    want = load_file(GOLDENS / "adapters" / name / "golden.safetensors")
    base = logits(model, want["input_ids"])
    load_adapter(model, GOLDENS / "adapters" / name)
    torch.testing.assert_close(logits(model, want["input_ids"]), want["logits"], atol=1e-4, rtol=0)
    assert (base - want["logits"]).abs().max() > 0.5  # the adapter does something


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_equals_the_adapter_and_pefts_merge(model, name):
    want = load_file(GOLDENS / "adapters" / name / "golden.safetensors")
    load_adapter(model, GOLDENS / "adapters" / name)
    adapted = logits(model, want["input_ids"])
    merge_adapter(model)
    merged = logits(model, want["input_ids"])
    torch.testing.assert_close(merged, adapted, atol=5e-5, rtol=0)  # logits reach 10
    torch.testing.assert_close(merged, want["merged_logits"], atol=1e-4, rtol=0)
    assert not any("lora" in key for key, _ in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError):
        merge_adapter(model)


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


@pytest.mark.parametrize("target", ["nothing", "lm_head", "q_proj2", ""])
def test_targets_that_the_model_lacks_are_named(model, target):
    before = state(model)
    with pytest.raises(InputError, match=f"'{target}'"):
        add_adapter(model, "x", rank=2, alpha=2, targets=["q_proj", target], seed=0)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_adapter_written_here_is_the_same_adapter(model, name, tmp_path):
    load_adapter(model, GOLDENS / "adapters" / name)
    want = logits(model)
    save_adapter(model, tmp_path / "out")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", GOLDENS / "adapters" / name))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
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
    assert sorted(ours)[0] == f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj", "o_proj", "k_proj"]])
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


def test_a_half_precision_adapter_file_is_read_into_float32(model, folder):
    rewrite(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
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


def test_peft_itself_loads_what_is_written_here(model, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    load_adapter(model, GOLDENS / "adapters/pattern")
    randomise(model, 3)
    save_adapter(model, tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDENS / "gqa-tied", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(IDS).logits, atol=1e-4, rtol=0)
