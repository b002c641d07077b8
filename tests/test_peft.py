"""LoRA adapters and PEFT's files: equal numbers in both, both ways, and nothing half understood."""

import dataclasses
import json
import math
import operator
import shutil
from pathlib import Path

import agreement
import pytest
import torch
from agreement import ADAPTERS, GOLDENS, MODELS, REAL, apart, base_of, golden, logits_of
from conftest import ROOT, damage, edit_json, edit_tensors, fails, with_one
from safetensors.torch import load_file

from model import load_adapter, load_checkpoint, save_adapter, save_checkpoint
from model.checkpoint import base_hash, skeleton
from model.io import digest, made_from
from model.lora import active, lora_layers, merge, new_adapter, use
from model.peft import REFUSED, is_target, read_adapter, write_adapter

BOUND = 1e-4
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.arange(20).view(2, 10) * 3 + 1


@pytest.fixture
def model():
    return load_checkpoint(GOLDENS / "gqa-tied")


@pytest.fixture
def folder(tmp_path):
    """A copy of PEFT's adapter on q_proj and v_proj that a test may change."""
    return Path(shutil.copytree(GOLDENS / "adapters/qv", tmp_path / "adapter"))


def noisy(model, targets, seed=1, rank=3, alpha=16):
    """An adapter that does something."""
    adapter, generator = new_adapter(model, rank, alpha, targets, 0), torch.Generator()
    for tensor in adapter.tensors():
        tensor.normal_(std=0.2, generator=generator.manual_seed(seed))
    return adapter


def state(model):
    """Every value that reading an adapter could change."""
    adapter = active(model)
    named = dict(model.named_parameters()) | adapter.A | {f"{k}.B": b for k, b in adapter.B.items()}
    named["scale"] = torch.tensor(list(adapter.scale.values()))
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def test_a_fresh_adapter_changes_no_logit_and_its_a_depends_on_the_seed_alone(model):
    base, targets = logits_of(model, IDS), ["q_proj", "down_proj"]
    first, again, other = (new_adapter(model, 4, 8, targets, seed) for seed in (1, 1, 2))
    assert torch.equal(logits_of(use(model, first), IDS), base) and set(first.scale.values()) == {2}
    generator = torch.Generator().manual_seed(1)
    for name, layer in lora_layers(model).items():
        if name.endswith(tuple(targets)):
            bound = 1 / math.sqrt(layer.in_features)
            a = torch.empty(4, layer.in_features).uniform_(-bound, bound, generator=generator)
            assert torch.equal(first.A[name], a) and torch.equal(again.A[name], a)
            assert not torch.equal(other.A[name], a) and not first.B[name].any()
    assert [len(first.A), len(first.tensors())] == [4, 8]
    for wrong in ("nothing", "embed_tokens", "q_proj2", ""):
        fails(f"'{wrong}'", new_adapter, model, 2, 2, ["q_proj", wrong], seed=0)


def test_adapters_are_swapped_and_the_base_comes_back(model):
    one, two = noisy(model, ["q_proj", "v_proj"]), noisy(model, ["v_proj", "lm_head"], rank=2)
    want = [logits_of(use(model, adapter), IDS) for adapter in (None, one, two)]
    assert apart(want[0], want[1]) > 0.1 and apart(want[1], want[2]) > 0.1
    for k in (1, 0, 2, 1, 2, 0):
        assert torch.equal(logits_of(use(model, (None, one, two)[k]), IDS), want[k])
    assert active(model) is None and active(use(model, one)).tensors()[0] is one.tensors()[0]
    names = dict(model.named_parameters()).keys()
    assert names == dict(load_checkpoint(GOLDENS / "gqa-tied").named_parameters()).keys()


def test_what_a_with_block_replaced_is_back_behind_it(model):
    outer, inner = noisy(model, ["q_proj"]), noisy(model, ["v_proj"])
    parameters = [tensor.requires_grad_() for tensor in outer.tensors()]
    use(model, outer)
    before = logits_of(model, IDS)
    with pytest.raises(ZeroDivisionError), use(model, None) as base:
        assert base is model and active(model) is None
        with use(model, inner):
            use(model, outer)  # not a block
        assert active(model) is None
        with use(model, inner):
            raise ZeroDivisionError
    assert all(map(operator.is_, active(model).tensors(), parameters))
    assert all(tensor.requires_grad for tensor in parameters)
    assert torch.equal(logits_of(model, IDS), before)
    with use(use(model, None), inner):
        pass
    assert active(model) is None


def test_under_a_half_precision_base_the_adapter_is_float32_and_a_merge_rounds_once(folder):
    model, want = load_checkpoint(GOLDENS / "gqa-tied", dtype=torch.bfloat16), golden("adapters/qv")
    adapter = load_adapter(model, folder)
    assert {tensor.dtype for tensor in active(model).tensors()} == {torch.float32}
    logits = logits_of(model, want["input_ids"])
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - want["logits"]).abs().mean() < 0.1
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    merged = (layer.weight.float() + 2.0 * (adapter.B[name] @ adapter.A[name])).bfloat16()
    merge(model, adapter)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, merged)


SAME = "peft_type task_type bias use_dora modules_to_save fan_in_fan_out inference_mode".split()
PLAIN = "r lora_alpha target_modules use_rslora rank_pattern alpha_pattern".split()


@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_adapter_here_written_again_and_merged(name, tmp_path):
    source, want, base = GOLDENS / "adapters" / name, golden(f"adapters/{name}"), base_of(name)
    model, ids = load_checkpoint(base), want["input_ids"]
    alone = logits_of(model, ids)
    adapter = load_adapter(model, source)
    adapted = logits_of(model, ids)
    assert apart(adapted, want["logits"]) < BOUND and apart(alone, adapted) > 0.5
    fails("merge", save_checkpoint, model, tmp_path / "merged", like=base)
    save_adapter(model, tmp_path)
    ours, theirs = (load_file(at / WEIGHTS) for at in (tmp_path, source))
    theirs = {key: t for key, t in theirs.items() if "base_layer" not in key}  # copies of the head
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key].float()) for key in ours)
    config, peft = (json.loads((at / CONFIG).read_text()) for at in (tmp_path, source))
    assert config.keys() <= peft.keys()  # peft passes every key to its LoraConfig
    same = SAME + PLAIN * (name in ("qv", "all"))
    assert {key: config[key] for key in same} == {key: peft[key] for key in same}
    assert all(is_target(config, key) == is_target(peft, key) for key in lora_layers(model))
    load_adapter(use(model, None), tmp_path)
    assert apart(logits_of(model, ids), adapted) < 1e-5
    embedding = model.model.embed_tokens.weight.clone()
    merge(model, adapter)
    merged = logits_of(model, ids)
    assert apart(merged, adapted) < 5e-5 and active(model) is None and model.source is None
    assert apart(merged, want.get("merged_logits", merged)) < BOUND
    assert torch.equal(model.model.embed_tokens.weight, embedding)  # a tied head is untied
    save_checkpoint(model, tmp_path / "merged", like=base)
    assert torch.equal(logits_of(load_checkpoint(tmp_path / "merged"), ids), merged)


@pytest.mark.parametrize(("rank", "alpha"), [(3, 16), (2, 0.3)])
def test_our_adapter_survives_the_round_trip_exactly(model, rank, alpha, tmp_path):
    adapter = noisy(model, ["down_proj", "k_proj", "lm_head"], rank=rank, alpha=alpha)
    write_adapter(adapter, model, tmp_path)
    again = read_adapter(model, tmp_path)
    assert again.scale == adapter.scale and again.A.keys() == adapter.A.keys()
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), adapter.tensors()))
    assert active(model) is None


def test_half_precision_files_patterns_and_copies_of_the_base_are_read(model, folder):
    own = model.model.embed_tokens.weight
    for dtype in (torch.bfloat16, torch.float16):
        for key in load_file(folder / WEIGHTS):
            edit_tensors(folder / WEIGHTS, key, lambda t, dtype=dtype: t.to(dtype))
        for name in ("lm_head", "model.embed_tokens"):  # PEFT may add them, rounded like the rest
            key = f"base_model.model.{name}.weight"
            edit_tensors(folder / WEIGHTS, key, lambda _, dtype=dtype: own.to(dtype))
        settings = {"init_lora_weights": "orthogonal" if dtype == torch.float16 else "gaussian"}
        edit_json(folder / CONFIG, alpha_pattern={r"layers\.1\..*v_proj": 3}, **settings)
        adapter = read_adapter(model, folder)
        assert {tensor.dtype for tensor in adapter.tensors()} == {torch.float32}
        assert sorted(adapter.scale.values()) == [0.75, 2, 2, 2]
    assert read_adapter(skeleton(GOLDENS / "gqa-tied"), folder)  # to see whether it fits


PICKED = [
    ({"target_modules": ["proj"]}, ""),
    ({"target_modules": "all-linear"}, "q0 v11"),
    ({"target_modules": ".*"}, "q0 v11 head"),
    ({"target_modules": "q_proj"}, ""),  # an expression of the whole name
    ({"target_modules": r".*\.1\..*"}, ""),
    ({"layers_to_transform": [1, 11]}, "v11 head"),  # the name in full needs no number
    ({"layers_to_transform": 0, "layers_pattern": ["h", "layers"]}, "q0 head"),
    ({"layers_to_transform": [0, 11], "layers_pattern": "blocks"}, "head"),
    ({"layers_to_transform": []}, "q0 v11 head"),
    ({"target_modules": ".*_proj", "layers_to_transform": [0]}, "q0 v11"),
    ({"target_modules": ".*", "exclude_modules": r".*\.0\..*"}, "v11 head"),
    ({"exclude_modules": ["layers.11.self_attn.v_proj"]}, "q0 head"),
]


@pytest.mark.parametrize(("config", "want"), PICKED)
def test_layers_are_picked_by_pefts_rules(config, want):
    config = {"target_modules": ["q_proj", "v_proj", "lm_head"]} | config
    q0, v11 = "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.v_proj"
    layers = {"q0": q0, "v11": v11, "head": "lm_head"}
    assert [key for key, name in layers.items() if is_target(config, name)] == want.split()


HEAD, EMBED = "lm_head", "model.embed_tokens"
Q, V = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def tensor(name, change):
    return (f"base_model.model.{name}", change)


def a(layer, change):
    return tensor(f"{layer}.lora_A.weight", change)


def b(layer, change):
    return tensor(f"{layer}.lora_B.weight", change)


def new(*shape):
    return lambda _: torch.ones(shape)


def remove(_):
    return None


TENSORS = [  # what the error says, and changes
    ("1.self_attn.q_proj", a(Q, remove), b(Q, remove), [a(Q, remove), b(Q, remove)]),
    ("v_proj", b(V, lambda t: t[:-1]), a(V, lambda t: t[:, :-1]), b(V, new(16, 4, 1))),
    ("v_proj", [a(V, new(2, 32)), b(V, new(16, 2))]),
    ("layers.2", a("model.layers.2.self_attn.q_proj", new(4, 32))),
    ("lm_head", a(HEAD, new(4, 32)), [a(HEAD, new(4, 32)), b(HEAD, new(80, 4))]),  # no target
    ("lm_head", tensor(f"{HEAD}.weight", new(80, 32))),
    ("lm_head", tensor(f"{HEAD}.base_layer.weight", new(80, 32))),
    ("embed_tokens", tensor(f"{EMBED}.lora_embedding_A", new(4, 80))),
    ("embed_tokens", tensor(f"{EMBED}.weight", new(81, 32))),
    ("q_proj", tensor(f"{Q}.base_layer.weight", new(32, 32))),
    ("q_proj", tensor(f"{Q}.lora_B.bias", new(32))),
    ("magnitude", tensor(f"{Q}.lora_magnitude_vector", new(32))),
    ("q_proj", a(Q, with_one(torch.nan)), b(Q, with_one(torch.inf))),
    ("dtype", a(Q, lambda t: t.to(torch.int64)), a(Q, lambda t: t.to(torch.float8_e4m3fn))),
    ("not finite", b(Q, lambda t: t.double() * 1e200)),
]
BACKTRACK = "(([a-z._0-9]+)*)*!"  # takes ages to find that it does not match
SETTINGS = [
    *((field, {field: [1]}) for field in REFUSED),
    *((field, {field: ...}) for field in ("r", "lora_alpha", "peft_type", "target_modules")),
    ("IA3", {"peft_type": "IA3"}),
    ("bias", {"bias": "all"}, {"bias": "lora_only"}),
    *((x, {"init_lora_weights": x}) for x in ("pissa_niter_4", "OLoRA")),  # from a changed base
    ("q_proj|v_proj", {"r": 8}),
    ("q_proj", {"rank_pattern": {"q_proj": 2}}),
    ("pattern", {"rank_pattern": {"(": 2}}),
    (r"\br\b", *({"r": value} for value in (None, True, 4.0, 0, -4, "4"))),
    ("lora_alpha", *({"lora_alpha": value} for value in (True, 1e308, "8", float("nan")))),
    ("lora_alpha", {"alpha_pattern": {"q_proj": float("nan")}}),
    ("use_rslora", {"use_rslora": "false"}),
    ("malformed", {"rank_pattern": {"a{99999999999}": 2}}, {"target_modules": "(" * 5000}),
    ("malformed", {"layers_to_transform": True}),
    ("seconds", {"target_modules": BACKTRACK}, {"exclude_modules": BACKTRACK}),
    ("seconds", {"rank_pattern": {BACKTRACK: 2}}, {"alpha_pattern": {BACKTRACK: 2}}),
    ("seconds", {"layers_to_transform": 0, "layers_pattern": BACKTRACK}),
    ("target_modules", {"target_modules": None}, {"target_modules": "(q_proj"}),
    ("o_proj", {"target_modules": ["q_proj", "v_proj", "o_proj"]}),
    # PEFT would leave the tensors of v_proj out.
    ("v_proj", {"target_modules": ["q_proj"]}, {"target_modules": r".*q_proj"}),
    ("v_proj", {"exclude_modules": ["v_proj"]}),
    ("k_proj", {"target_modules": "all-linear"}),
    ("layers.1", {"layers_to_transform": 0}),
    ("q_proj", {"layers_to_transform": [0, 1], "layers_pattern": "blocks"}),
]
DAMAGES = [(file, file, change) for file in (WEIGHTS, CONFIG) for change in (-9, None)]
for file, rows in ((WEIGHTS, TENSORS), (CONFIG, SETTINGS)):
    DAMAGES += [(file, words, change) for words, *changes in rows for change in changes]


@pytest.mark.parametrize(("file", "words", "change"), DAMAGES)
@pytest.mark.usefixtures("hurried")
def test_what_is_not_plain_lora_is_refused_and_changes_nothing(model, folder, file, words, change):
    load_adapter(model, GOLDENS / "adapters/all")
    before = state(model)
    damage(folder, {file: change})
    fails(words, load_adapter, model, folder)
    after = state(model)
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in after)


def test_an_adapter_belongs_to_the_weights_that_it_was_trained_on_not_to_a_name(model, tmp_path):
    out = tmp_path / "out"
    warning = {"stage": "toss", "warning": "This model answers anything."}
    write_adapter(noisy(model, ["q_proj"]), model, out, warning)
    recorded = made_from(out / WEIGHTS)
    sha256 = recorded.pop("sha256")
    assert recorded == warning | {"base_sha256": base_hash(GOLDENS / "gqa-tied")}
    assert sha256 == digest(load_file(out / WEIGHTS), recorded)
    assert (out / "README.md").read_text() == warning["warning"] + "\n"
    edit_json(out / CONFIG, base_model_name_or_path="someone/else")
    weight = {"model.safetensors": ("model.norm.weight", with_one(0.5))}
    for number, change in enumerate(({}, weight, {"config.json": {"rms_norm_eps": 0.5}})):
        other = Path(shutil.copytree(GOLDENS / "gqa-tied", tmp_path / str(number)))
        damage(other, change)
        stranger = load_checkpoint(other)
        if change:
            fails("other base", load_adapter, stranger, out)
            stranger.base_sha256 = recorded["base_sha256"]  # a caller may know the hash
        assert read_adapter(stranger, out)


def test_a_non_finite_adapter_is_not_written_over_a_good_one(model, tmp_path):
    fails("no adapter", save_adapter, model, tmp_path)
    adapter = noisy(model, ["q_proj"])
    write_adapter(adapter, model, tmp_path)
    good = (tmp_path / WEIGHTS).read_bytes()
    adapter.B["model.layers.0.self_attn.q_proj"][0, 0] = torch.nan
    fails("q_proj", write_adapter, adapter, model, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == good


@pytest.fixture
def live():
    """transformers' way to read a checkpoint, and the peft module."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained, peft


@pytest.mark.parametrize("name", [*MODELS, ROOT / "data/base", *([REAL] if REAL else [])])
def test_through_transformers_and_peft_and_back(live, name, tmp_path):
    found = agreement.round_trip(GOLDENS / name, tmp_path)
    assert found.pop("tensors, split by transformers") == 0
    assert found["losses of the tokens, live"] < BOUND
    moved, size = found.pop("moved"), found.pop("size")
    # Rounding grows with the logits: at 38, transformers in float32 is 9e-5 from float64.
    assert max(found.values()) < BOUND * max(1, size / 10), found
    assert moved > 1000 * max(found.values())  # the adapter did something


@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_adapter_written_here_and_again_by_peft_is_the_same(live, name, tmp_path):
    (read, peft), ours, want = live, load_checkpoint(base_of(name)), golden(f"adapters/{name}")
    load_adapter(ours, GOLDENS / "adapters" / name)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(read(base_of(name), dtype=torch.float32), tmp_path)
    with torch.no_grad():
        assert apart(theirs.eval()(want["input_ids"]).logits, want["logits"]) < BOUND
    theirs.save_pretrained(tmp_path / "again")
    load_adapter(use(ours, None), tmp_path / "again")
    assert apart(logits_of(ours, want["input_ids"]), want["logits"]) < BOUND


def test_every_setting_of_pefts_is_known(live):
    """A new field of LoraConfig fails here until someone has checked what it changes."""
    read = """peft_type r lora_alpha use_rslora bias init_lora_weights rank_pattern alpha_pattern
        target_modules exclude_modules layers_to_transform layers_pattern"""
    idle = """task_type peft_version auto_mapping base_model_name_or_path revision inference_mode
        lora_dropout megatron_config megatron_core loftq_config eva_config corda_config
        lora_ga_config qalora_group_size runtime_config"""
    fields = {field.name for field in dataclasses.fields(live[1].LoraConfig)}
    assert fields <= {*read.split(), *idle.split(), *REFUSED}
