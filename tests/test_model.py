"""The transformer computes what transformers computes: logits and losses against committed golden files."""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path

import agreement
import pytest
import torch
from agreement import ADAPTERS, GOLDENS, MODELS, REAL, goldens
from safetensors.torch import load_file

from model import load_checkpoint, load_tokenizer
from model.config import FAMILIES
from model.generation import generate


@cache
def golden(name):
    return load_checkpoint(GOLDENS / name), load_file(GOLDENS / name / "golden.safetensors")


@torch.no_grad()
def logits_of(model, ids):
    return model.lm_head(model(ids))


def losses_of(logits, ids):
    """-log P(token t | before), 0 at t = 0."""
    losses = torch.zeros(ids.shape)
    losses[:, 1:] = -logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_losses_equal_transformers(name):
    model, want = golden(name)
    logits = logits_of(model, want["input_ids"])
    assert logits.dtype == torch.float32 and logits.shape == want["logits"].shape
    torch.testing.assert_close(logits, want["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(losses_of(logits, want["input_ids"]), want["losses"], atol=1e-4, rtol=0)


def changed(name, tmp_path, change):
    """The golden model, read with another config.json: what `change` makes of its dictionary."""
    folder = shutil.copytree(GOLDENS / name, tmp_path / "m")
    config = change(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    return load_checkpoint(folder)


@pytest.mark.parametrize("name", ["headdim-bias-linear", "llama3-rope", "mistral-window", "qwen2", "qwen2-windows", "qwen3"])
def test_the_hubs_older_spelling_means_the_same(name, tmp_path):
    old = json.loads((GOLDENS / name / "config-old-spelling.json").read_text())
    assert "rope_theta" in old and "rope_parameters" not in old and (name == "llama3-rope" or "layer_types" not in old)
    model, want = golden(name)
    again = changed(name, tmp_path, lambda config: old)
    assert torch.equal(logits_of(again, want["input_ids"]), logits_of(model, want["input_ids"])) and again.config == model.config


def without(*fields, **others):
    return lambda config: {key: value for key, value in config.items() if key not in fields} | others


def default_rope(config):
    return config | {"rope_parameters": {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}}


@pytest.mark.parametrize(("name", "change"), [
    ("headdim-bias-linear", default_rope),
    ("llama3-rope", default_rope),
    ("qwen2", without("rope_parameters")),  # the default is not its 1e6
    ("mistral-window", without(sliding_window=None)),
    ("mistral-window", without("sliding_window")),  # the default is 4096
    ("mistral-window", without(sliding_window=7)),
    ("mistral-window", without(sliding_window=9)),
    ("qwen2-windows", without("layer_types", use_sliding_window=False)),
    ("qwen2-windows", without("layer_types", "use_sliding_window")),
    ("qwen2-windows", without("layer_types", max_window_layers=0)),
    ("qwen2-windows", without("layer_types", max_window_layers=2)),
    ("qwen2-windows", without("layer_types", "max_window_layers")),  # the default is 28
    ("qwen2-windows", without(layer_types=["sliding_attention", "full_attention", "full_attention"])),
    ("qwen2-windows", without(sliding_window=7)),
    ("qwen3-bias-windows", without(layer_types=["full_attention", "sliding_attention"])),
    ("qwen3-bias-windows", without(layer_types=["full_attention", "full_attention"])),
    ("qwen3-bias-windows", without(sliding_window=4)),
])  # fmt: skip
def test_the_goldens_can_tell_a_setting(name, change, tmp_path):
    """With another setting the model is far from the golden logits, so the tests above do pin it."""
    _, want = golden(name)
    assert (logits_of(changed(name, tmp_path, change), want["input_ids"]) - want["logits"]).abs().max() > 0.05


@pytest.mark.parametrize(("name", "part"), [
    ("qwen3", "q_norm"), ("qwen3", "k_norm"), ("qwen3-bias-windows", "k_norm"), ("qwen3-bias-windows", "o_proj.bias"),
    ("qwen2", "q_proj.bias"), ("qwen2", "v_proj.bias"), ("headdim-bias-linear", "o_proj.bias"),
])  # fmt: skip
def test_the_goldens_can_tell_a_part_of_attention(name, part):
    """Without the norm (its place taken by nothing) or with a zero bias, the same."""
    model, want = load_checkpoint(GOLDENS / name), golden(name)[1]
    for layer in model.model.layers:
        owner, _, leaf = part.rpartition(".")
        if leaf == "bias":
            getattr(layer.self_attn, owner).bias.data.zero_()
        else:
            setattr(layer.self_attn, part, torch.nn.Identity())
    assert (logits_of(model, want["input_ids"]) - want["logits"]).abs().max() > 0.05


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-windows"])
def test_a_mask_is_made_once_and_only_for_a_row_longer_than_the_window(name, monkeypatch):
    model, want = golden(name)
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def seen(*args, attn_mask, is_causal, **kwargs):
        assert is_causal == (attn_mask is None)
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    window, layers = model.config.sliding_window, model.config.windowed_layers
    logits_of(model, want["input_ids"][:, :window])
    assert masks == [None] * model.config.num_hidden_layers
    masks.clear()
    logits_of(model, want["input_ids"][:, : window + 1])
    assert [mask is not None for mask in masks] == [i in layers for i in range(model.config.num_hidden_layers)]
    assert len({id(mask) for mask in masks if mask is not None}) == 1


def test_the_call_gives_final_norm_hidden_states():
    model, want = golden("plain")
    with torch.no_grad():
        hidden = model(want["input_ids"])
    assert hidden.shape == (*want["input_ids"].shape, 32)
    rms = (hidden / model.model.norm.weight).pow(2).mean(-1).sqrt()  # a norm's output, its weight divided out
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["plain", "llama3-rope", "mistral-window", "qwen3-bias-windows"])
def test_right_padding_leaves_the_real_positions_alone(name):
    model, want = golden(name)
    row, lengths = want["input_ids"][0], [1, 5, 17, 24]
    batch = torch.full((len(lengths), 24), 7)
    for i, n in enumerate(lengths):
        batch[i, :n] = row[:n]
    with torch.no_grad():
        padded = model(batch)
        for i, n in enumerate(lengths):
            torch.testing.assert_close(padded[i, :n], model(row[None, :n])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_loaded_as_asked_and_close(name, dtype):
    model, want = load_checkpoint(GOLDENS / name, dtype=dtype), golden(name)[1]
    assert {p.dtype for p in model.parameters()} == {dtype} and model.dtype == dtype
    error = (losses_of(logits_of(model, want["input_ids"]), want["input_ids"]) - want["losses"]).abs()
    assert error.mean() < (0.06 if dtype == torch.bfloat16 else 0.01)


def test_the_residual_stream_is_float32_under_half_precision_weights():
    """Rounding and float16's range touch a block's own output only, not the sum of all of them."""
    model, seen = load_checkpoint(GOLDENS / "plain", dtype=torch.float16), []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, args, out: seen.extend((args[0].dtype, out.dtype)))
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.float16
    assert seen == [torch.float32] * 4


def test_gradients_reach_the_input_of_every_layer_under_a_frozen_base():
    """The residual stream and the norms must let a gradient through, though no parameter takes one."""
    model, want = golden("gqa-tied")
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad_()))
    try:
        model.lm_head(model(want["input_ids"])).logsumexp(-1).sum().backward()
    finally:
        handle.remove()
    assert seen[0].grad.abs().sum(-1).gt(0).all()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(not REAL, reason="TOSS_REAL_CHECKPOINT names no checkpoint folder")
def test_a_real_checkpoint_gives_the_stored_losses_prompt_and_answer():
    want = json.loads((GOLDENS / "real.json").read_text())
    if hashlib.sha256((Path(REAL) / "model.safetensors").read_bytes()).hexdigest() != want["sha256"]:
        pytest.skip("the stored figures are another checkpoint's")
    model, tokenizer = load_checkpoint(REAL), load_tokenizer(REAL)
    assert tokenizer.encode(want["text"]) == want["text_ids"] and tokenizer.eos_id == want["eos_id"]
    assert tokenizer.prompt_ids(want["messages"]) == want["prompt_ids"]
    ids = torch.tensor([want["text_ids"]])
    torch.testing.assert_close(losses_of(logits_of(model, ids), ids)[0], torch.tensor(want["losses"]), atol=1e-4, rtol=0)
    assert generate(model, [want["prompt_ids"]], max_new_tokens=16, eos_id=want["eos_id"]) == [want["new_ids"]]


def test_the_table_of_golden_files_is_whole_and_within_the_bound():
    rows = list(goldens())
    assert len(MODELS) == 11 and len(ADAPTERS) == 13
    assert {family for family, _, _ in rows} == set(FAMILIES) and len(rows) == 2 * len(MODELS) + len(ADAPTERS)
    assert all(value < 1e-4 for _, _, value in rows)


def test_the_table_has_a_column_for_every_family_and_a_difference_in_each_cell(capsys, monkeypatch):
    monkeypatch.setattr(agreement, "find_spec", lambda name: None)  # without the live part
    agreement.main()
    head, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert set(head[1:]) == set(FAMILIES) and len(lines) == 3
    for _, *cells in lines:
        assert len(cells) == len(FAMILIES) and all(0 <= float(cell.split(" (")[0]) < 1e-4 for cell in cells)
