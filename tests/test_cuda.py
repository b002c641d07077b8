"""What a GPU does, against float32 on the CPU. `make gpu` runs it; without a GPU it is skipped.

It was written without one: a bound that fails on the first card may be the bound's fault.
"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import make_base, make_run
from helpers import call, micro_batch, overflowing, random_adapter
from safetensors.torch import load_file

from model import fused, load_checkpoint
from model.generate import generate
from model.io import made_from
from model.lora import use
from toss.audit.bench import FIELDS, LLAMA, SHAPES
from toss.audit.speed import random_model, random_rows
from toss.config import TrainConfig
from toss.scoring import score
from toss.selection import select_tokens
from toss.training import train
from toss.workbench.base import find_device
from toss.workbench.progress import Cost

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu")
ROWS, CONFIG = random_rows(48, 60, 384), TrainConfig(lr=1e-3, epochs=8, batch_size=48, rank=2)
FULL, FLOAT, BFLOAT = torch.float32, torch.float16, torch.bfloat16
KERNELS = [(FLOAT, 0, "flash"), (BFLOAT, 0, "flash")]
KERNELS += [(FULL, 0, "efficient"), (BFLOAT, 16, "efficient")]


@pytest.fixture
def gpu():
    yield find_device("cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.set_sync_debug_mode("default")


def shaped(name, dtype, **more):
    raw = {**LLAMA, **dict(zip(FIELDS, SHAPES[name])), **more}
    return random_model(raw, torch.device("cuda:0"), dtype)


def trained(model, rows=ROWS, budget=None):
    """The adapter, flat, and the remarks of a training."""
    events, config = [], replace(CONFIG, batch_tokens=budget)
    adapter = train(model, rows, rows.response.float(), config, on_step=events.append)
    return torch.cat([t.flatten() for t in adapter.tensors()]).cpu(), str(events)


@pytest.mark.parametrize(("dtype", "window", "kernel"), KERNELS)
def test_the_attention_kernel_forward_and_backward(dtype, window, kernel, gpu, tmp_path):
    more = {"model_type": "mistral", "sliding_window": window} if window else {}
    model = load_checkpoint(make_base(tmp_path / "base", **more), gpu, dtype)
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), settings)
    assert settings["expandable_segments"] and fused.works("cuda")
    with torch.profiler.profile() as profile:
        micro_batch(model, ROWS, [0, 1, 2])
    names = {event.key for event in profile.key_averages() if "aten::_scaled_dot" in event.key}
    assert names == {f"aten::_scaled_dot_product_{kernel}_attention{x}" for x in ("", "_backward")}


def scores(model):
    """S, with a random adapter in the place of theta^u and the base in that of theta^h."""
    utility = score(use(model, random_adapter(model, 1)), ROWS)
    return utility - score(use(model, None), ROWS)


def test_losses_masks_adapters_and_answers_are_the_cpus(gpu, base):
    cpu, prompts = load_checkpoint(base), [[5, 6, 7], [8, 9], list(range(1, 40))]
    expected, adapter = scores(cpu), trained(use(cpu, None))[0]
    gone = ~select_tokens(expected[ROWS.response], 0.1)
    bounds = (FULL, 1e-4, 1, 0.02), (FLOAT, 0.05, 0.9, 0.3), (BFLOAT, 0.3, 0.6, 0.6)
    for dtype, near, same, close in bounds:
        model = load_checkpoint(base, gpu, dtype)
        found = scores(model)
        assert torch.allclose(found, expected, atol=near), (found - expected).abs().max()
        assert (gone & ~select_tokens(found[ROWS.response], 0.1)).sum() >= same * gone.sum() - 1
        assert (trained(use(model, None))[0] - adapter).norm() <= close * adapter.norm()
    assert generate(load_checkpoint(base, gpu), prompts, 12, 0) == generate(cpu, prompts, 12, 0)


@pytest.mark.parametrize(("layer", "used"), [("", "float16"), ("self_attn.k", "tf32")])
def test_scripts_and_tf32_after_an_overflow(layer, used, gpu, base, files, tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "SMALLEST", 0)
    folder, found = (overflowing(tmp_path / "base", layer) if layer else base), []
    for device in ("cpu", "cuda"):
        run = make_run(tmp_path / device, folder, files, "--device", device)
        assert call(f"select.py --run {run} --device {device} --pro 1 --merge") == 0
        found.append(load_file(tmp_path / device / "scores.safetensors")["loss_utility"])
    assert made_from(tmp_path / "cuda/scores.safetensors")["dtype"] == used
    assert layer or torch.allclose(*found, atol=0.3)


def test_batches_are_halved_when_memory_runs_out(gpu):
    """The limits leave 1 GiB where scoring wants 1.4, and 4 where training wants 8."""
    model, rows = shaped("smollm2-135m", BFLOAT), random_rows(256, 368, 49152)
    total, few = torch.cuda.get_device_properties(gpu).total_memory, rows.take(range(48))

    def scored(budget):
        events = []
        return score(model, rows, budget, on_batch=events.append), str(events)

    def train_few(budget):
        return trained(model, few, budget)

    for gib, work in ((1, scored), (4, train_few)):
        expected, _ = work(2048)
        torch.cuda.empty_cache()
        room = torch.cuda.memory_allocated() + gib * 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
        again, said = work(100_000)
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert "continuing with" in said and torch.allclose(expected, again, atol=0.2)


@pytest.mark.parametrize("least", [0, math.inf])
def test_nothing_waits_for_the_gpu_inside_a_micro_batch(least, gpu, monkeypatch):
    monkeypatch.setattr(fused, "SMALLEST", least)
    model = shaped("tiny", BFLOAT)
    micro_batch(model, ROWS, [0, 1, 2])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    micro_batch(model, ROWS, [3, 4, 5])


def test_compiled_kernels_give_the_eager_losses(gpu, monkeypatch):
    model, rows, found = shaped("smollm2-135m", FLOAT), random_rows(50, 400, 49152), []
    for least in (math.inf, 0):
        monkeypatch.setattr(fused, "SMALLEST", least)
        found.append(torch.cat([micro_batch(model, rows, [i]) for i in range(50)]))
    assert torch.allclose(*found, atol=0.02) and not torch.equal(*found)


def test_the_memory_of_8b_by_what_two_more_layers_take(gpu):
    """Peaks with 2 and 4 layers of Llama-3-8B, continued to 32, beside results/memory.md.

    Compiled, SwiGLU keeps two tensors, not three: up to 1.8 GiB less than the table.
    """
    rows, table, peaks = random_rows(64, 32, 128256), {"score": 15.9, "train": 25.1}, {}
    for layers in (2, 4):
        model = shaped("llama3-8b", BFLOAT, num_hidden_layers=layers)
        cost = Cost(gpu)
        score(model, rows, 8192)
        peaks["score", layers] = cost.read()["peak_memory_gib"]
        cost = Cost(gpu)
        micro_batch(model, rows, range(64))
        peaks["train", layers] = cost.read()["peak_memory_gib"]
    for name, known in table.items():
        whole = peaks[name, 2] + 15 * (peaks[name, 4] - peaks[name, 2])
        print(f"{name}: {whole:.1f} GiB with {sum(rows.lengths)} tokens, by arithmetic {known}")
        assert 0.8 * known < whole < 1.1 * known
