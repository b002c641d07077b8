"""Memory that runs out, gradient checkpointing, float32 a block at a time, overflow, and several processes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_base, write_jsonl
from safetensors.torch import load_file, save_file

import toss.scoring
import toss.training
from model import InputError, load_adapter, load_checkpoint
from model.errors import NotFinite
from model.lora import adapter_parameters, add_adapter
from toss.dataset import tokenise
from toss.loss import token_losses
from toss.rows import read_rows
from toss.scoring import in_float32, score
from toss.settings import Settings
from toss.training import step_gradients, train

GOLDENS = Path(__file__).parent / "goldens"
SETTINGS = Settings(rank=2, alpha=4, lr=1e-2, epochs=2, batch_size=4, targets="q_proj,v_proj,down_proj")


@pytest.fixture
def tokens(tmp_path, tokenizer):
    rows = [{"prompt": "a " * n, "response": "yes I can " * (9 - n)} for n in range(1, 9)]
    return tokenise(read_rows(write_jsonl(tmp_path / "rows.jsonl", rows)), tokenizer, 512, "rows")


def with_adapter(base, dtype=torch.float32):
    model = load_checkpoint(base, dtype=dtype)
    add_adapter(model, "default", 2, 4, SETTINGS.target_list, seed=0)
    for i, parameter in enumerate(adapter_parameters(model)):  # B = 0 would hide A's gradient
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    return model


def gradient(model, tokens):
    step_gradients(model, tokens, list(range(tokens.rows)), tokens.response, 200)
    return torch.cat([p.grad.flatten() for p in adapter_parameters(model)])


def kept_for_backward(model, tokens):
    """Bytes that autograd keeps until the backward pass of one batch, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # held by the graph, so no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = token_losses(model, toss.training.collate(tokens, [0, 1], tokens.response, model.device)).sum()
    loss.backward()
    return sum(kept.values())


def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less(base, tokens):
    model = with_adapter(base)
    plain, kept = gradient(model, tokens), kept_for_backward(model, tokens)
    model.gradient_checkpointing = True
    assert torch.allclose(gradient(model, tokens), plain, rtol=1e-4, atol=1e-7) and plain.norm() > 0
    assert kept_for_backward(model, tokens) < kept / 2


def test_the_flag_reaches_the_model(tmp_path, base, files, scripts, monkeypatch):
    seen = []
    whole = toss.training.step_gradients
    monkeypatch.setattr(toss.training, "step_gradients", lambda model, *a: (seen.append(model.gradient_checkpointing), whole(model, *a))[1])
    run = ["--run", tmp_path / "run", "--method", "sft", "--model", base, "--custom", files["custom"]]
    assert scripts["select"](*run, "--gradient-checkpointing") == 0 and set(seen) == {True}
    assert scripts["select"](*run) == 0  # the same result, so the same stage: skipped


@pytest.fixture
def small_memory(monkeypatch):
    """A device on which a batch of more than `limit` places, padding included, runs out of memory."""

    def limit(places, module):
        sizes = []

        def losses(model, batch):
            if batch.ids.numel() > places:
                raise torch.OutOfMemoryError("CUDA out of memory")
            sizes.append(batch.ids.numel())
            return token_losses(model, batch)

        monkeypatch.setattr(module, "token_losses", losses)
        return sizes

    return limit


def test_scoring_halves_its_batches_when_memory_runs_out_and_gives_the_same(base, tokens, small_memory, capsys):
    model = with_adapter(base)
    expected = score(model, tokens, 10_000, "loss")
    sizes = small_memory(150, toss.scoring)
    assert torch.allclose(score(model, tokens, 1000, "loss"), expected, atol=1e-5)
    assert max(sizes) <= 150 and len(sizes) < tokens.rows
    assert "out of memory with 1000 tokens a batch; going on with 500" in capsys.readouterr().err


def test_training_halves_its_micro_batches_and_makes_the_step_again(base, tokens, small_memory, capsys):
    def trained():
        model = load_checkpoint(base)
        train(model, tokens, torch.ones_like(tokens.response), SETTINGS, 400, "stage")
        return torch.cat([p.flatten() for p in adapter_parameters(model)])

    expected = trained()
    small_memory(100, toss.training)
    assert torch.allclose(trained(), expected, rtol=1e-3, atol=1e-5)
    assert capsys.readouterr().err.count("out of memory") == 2  # 400, 200; and 100 for the rest of the stage


def test_rows_that_are_not_run_do_not_stop_the_halving(base, tmp_path, tokenizer, small_memory):
    rows = [{"prompt": "a", "response": "yes I can " * 40}] + [{"prompt": f"a {i}", "response": "yes"} for i in range(5)]
    tokens = tokenise(read_rows(write_jsonl(tmp_path / "long.jsonl", rows)), tokenizer, 512, "rows")
    keep = torch.ones_like(tokens.response)
    keep[: tokens.offsets[1]] = False  # the long row is masked whole
    small_memory(2 * max(tokens.lengths[1:]), toss.training)
    train(load_checkpoint(base), tokens, keep, replace(SETTINGS, batch_size=6), 300, "stage")
    assert tokens.lengths[0] > 150


def test_a_single_row_that_does_not_fit_is_an_error_that_says_what_to_do(base, tokens, small_memory):
    model = with_adapter(base)
    small_memory(20, toss.scoring), small_memory(20, toss.training)
    with pytest.raises(InputError, match="single row.*--max-length"):
        score(model, tokens, 1000, "loss")
    with pytest.raises(InputError, match="single row.*--gradient-checkpointing"):
        train(model, tokens, torch.ones_like(tokens.response), SETTINGS, 1000, "stage")


@pytest.mark.parametrize("name", ["gqa-tied-shards", "plain"])
def test_float32_a_block_at_a_time_equals_a_float32_base(name, tmp_path):
    ids = torch.randint(80, (2, 24), generator=torch.Generator().manual_seed(0))
    half, full = load_checkpoint(GOLDENS / name, dtype=torch.float16), load_checkpoint(GOLDENS / name)
    logits = lambda model: model.lm_head(model(ids))  # noqa: E731
    for model in (half, full):
        load_adapter(model, GOLDENS / "adapters/qv") if name.startswith("gqa") else None
    with torch.no_grad():
        before, exact = logits(half), logits(full)
        with in_float32(half):
            inside = logits(half)
        assert torch.equal(inside, exact) and not torch.allclose(before.float(), exact, atol=1e-4)
        assert torch.equal(logits(half), before)
    assert {p.dtype for key, p in half.named_parameters() if "lora" not in key} == {torch.float16}


def test_a_pass_that_is_made_again_in_float32_leaves_every_weight_its_own(monkeypatch):
    model = load_checkpoint(GOLDENS / "plain", dtype=torch.float16)
    ids, forward, calls = torch.tensor([[1, 2]]), model.model.layers[1].mlp.forward, []

    def once(x):
        calls.append(x.dtype)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", once)
    with torch.no_grad(), in_float32(model):
        with pytest.raises(torch.OutOfMemoryError):
            model(ids)
        assert torch.equal(model(ids), load_checkpoint(GOLDENS / "plain")(ids))
    assert calls == [torch.float32] * 2 and {p.dtype for p in model.parameters()} == {torch.float16}


def test_float32_a_block_at_a_time_is_undone_when_a_pass_breaks_off():
    model = load_checkpoint(GOLDENS / "plain", dtype=torch.float16)
    with pytest.raises(IndexError), in_float32(model):
        model(torch.tensor([[10_000]]))
    with pytest.raises(RuntimeError), in_float32(model):
        model.model.layers[1].mlp.forward = lambda x: (_ for _ in ()).throw(RuntimeError())
        model(torch.tensor([[1, 2]]))
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"])
def test_an_overflow_anywhere_in_a_block_shows_in_the_losses(layer, tmp_path, tokens):
    folder = make_base(tmp_path / "huge")
    tensors = load_file(folder / "model.safetensors")
    weight = tensors[f"model.layers.0.{layer}.weight"]
    weight.copy_((weight * 1e7).clamp(-6e4, 6e4))  # finite in float16, but the products with it are not
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert score(load_checkpoint(folder), tokens, 1000, "float32").isfinite().all()
    with pytest.raises(NotFinite):
        score(load_checkpoint(folder, dtype=torch.float16), tokens, 1000, "float16")


def test_an_infinite_key_that_no_query_wants_shows_too(tmp_path, tokens):
    """Its weight would be 0 and every number finite, but wrong."""
    folder = make_base(tmp_path / "biased")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for name in "qkvo":
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.zeros(
                len(tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"]))
    half = config["head_dim"] // 2
    for bias, size in (("q", -1e-4), ("k", 6.2e4)):  # the slowest pair of channels: its angles stay small over a row
        for channel in (half - 1, 2 * half - 1):
            tensors[f"model.layers.0.self_attn.{bias}_proj.bias"][channel :: 2 * half] = size
            tensors[f"model.layers.0.self_attn.{bias}_proj.weight"][channel :: 2 * half] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert score(load_checkpoint(folder), tokens, 1000, "float32").isfinite().all()
    with pytest.raises(NotFinite):
        score(load_checkpoint(folder, dtype=torch.float16), tokens, 1000, "float16")


def torchrun(processes, *command):
    """A script under torchrun on the CPU; its standard output."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--", *map(str, command)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "error" not in done.stderr
    return done.stdout


def test_two_processes_give_what_one_gives(tmp_path, base, files, scripts):
    """The references train on steps of one row, so that the second process has nothing to run and only takes part in the sums."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_flags = ["--epochs", 2, "--rank", 2, "--lr", "1e-2", "--device", "cpu", "--batch-size", 3]
    stages = {"train": ["--model", base, "--harmful", files["harmful"], "--utility", files["utility"], *train_flags[:-1], 1],
              "score": ["--custom", files["custom"], "--batch-tokens", 60, "--device", "cpu"],
              "select": ["--method", "toss", "--pro", 1, "--pro-samples", 2, "--merge", *train_flags]}  # fmt: skip
    for name, flags in stages.items():
        assert scripts[name]("--run", one, *flags, fast_flags=False) == 0
        said = torchrun(2, f"{name}.py", "--run", two, *flags)
        assert said.count(f"wrote {two}") == (2 if name == "train" else 1)  # one process alone speaks
    written = lambda run: sorted(str(f.relative_to(run)) for f in run.rglob("*"))  # noqa: E731
    assert written(one) == written(two)
    for file in written(one):
        if file.endswith(".safetensors"):
            a, b = load_file(one / file), load_file(two / file)
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-4, msg=f"{file} {key}")
    first, second = ([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, two))
    assert [(line["stage"], line["step"]) for line in first] == [(line["stage"], line["step"]) for line in second]
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(first, second)) and len(first) > 8


def test_losses_of_two_processes_are_those_of_one_to_the_bit(tmp_path, trained, scripts):
    two, flags = tmp_path / "again", ["--device", "cpu", "--batch-tokens", "200"]
    shutil.copytree(trained, two)
    for run in (trained, two):
        (run / "scores.safetensors").unlink()
    assert scripts["score"]("--run", trained, *flags) == 0
    assert f"wrote {two}" in torchrun(2, "score.py", "--run", two, *flags)
    assert (two / "scores.safetensors").read_bytes() == (trained / "scores.safetensors").read_bytes()


def test_an_error_in_several_processes_is_said_and_nothing_is_written(tmp_path, base, files):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--", "score.py", "--run", str(tmp_path / "r"),
            "--model", str(base), "--custom", files["custom"]]
    done = subprocess.run([*call, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "error: process " in done.stderr and "run train.py" in done.stderr
    assert not (tmp_path / "r").exists()
