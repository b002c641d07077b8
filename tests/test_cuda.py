"""A GPU computes what float32 does on the CPU, with the kernels and the memory that we expect.

`make gpu` runs it; without a GPU it is skipped. It was written without one: a bound that fails on
the first card may be the bound's fault.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import fails, make_base, make_run
from helpers import micro_batch, overflowing, random_adapter, succeed
from safetensors.torch import load_file

from model import fused, load_checkpoint
from model.io import made_from
from model.lora import use
from toss.audit import bench
from toss.config import TrainConfig
from toss.scoring import score
from toss.selection import select_tokens
from toss.training import train
from toss.workbench.base import find_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
ROWS = bench.random_rows(48, 60, 384)
CONFIG = TrainConfig(lr=1e-3, epochs=8, batch_size=48, rank=2)


@pytest.fixture
def gpu():
    yield find_device("cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.set_sync_debug_mode("default")


def shaped(name: str, gpu, dtype, **fields):
    """A random model of one of the benchmark's shapes."""
    return bench.random_model(bench.shape_config(name) | fields, gpu, dtype)


def train_rows(model, rows, budget=None):
    """The adapter as one tensor on the CPU."""
    config = replace(CONFIG, batch_tokens=budget)
    adapter = train(model, rows, rows.response.float(), config)
    return torch.cat([tensor.flatten() for tensor in adapter.tensors()]).cpu()


KERNELS = [(FLOAT16, 0, "flash"), (BFLOAT16, 0, "flash")]
KERNELS += [(FLOAT32, 0, "efficient"), (BFLOAT16, 16, "efficient")]


@pytest.mark.parametrize(("dtype", "window", "kernel"), KERNELS)
def test_the_attention_kernel_forward_and_backward(dtype, window, kernel, gpu, tmp_path):
    fields = {"model_type": "mistral", "sliding_window": window} if window else {}
    model = load_checkpoint(make_base(tmp_path / "base", **fields), gpu, dtype)
    with torch.profiler.profile() as profile:
        micro_batch(model, ROWS, [0, 1, 2])
    names = {event.key for event in profile.key_averages() if "aten::_scaled_dot" in event.key}
    name = f"aten::_scaled_dot_product_{kernel}_attention"
    assert names == {name, f"{name}_backward"}


def scores_and_adapter(model):
    """S with a random adapter as theta^u and the base as theta^h; an adapter that was trained."""
    utility = score(use(model, random_adapter(model, 1)), ROWS)
    degraded = score(use(model, None), ROWS)
    return utility - degraded, train_rows(model, ROWS)


BOUNDS = [(FLOAT32, 1e-4, 1, 0.02), (FLOAT16, 0.05, 0.9, 0.3), (BFLOAT16, 0.3, 0.6, 0.6)]


@pytest.mark.parametrize(("dtype", "score_error", "shared", "adapter_error"), BOUNDS)
def test_scores_masks_adapters_are_the_cpus(
    dtype, score_error, shared, adapter_error, gpu, base, monkeypatch
):
    monkeypatch.setattr(fused, "SMALLEST", 0)  # the kernels are compiled
    cpu_scores, cpu_adapter = scores_and_adapter(load_checkpoint(base))
    scores, adapter = scores_and_adapter(load_checkpoint(base, gpu, dtype))
    assert (scores - cpu_scores).abs().max() < score_error
    cpu_discards = ~select_tokens(cpu_scores[ROWS.response], 0.1)
    discards = ~select_tokens(scores[ROWS.response], 0.1)
    assert (discards & cpu_discards).sum() >= shared * cpu_discards.sum() - 1
    assert (adapter - cpu_adapter).norm() <= adapter_error * cpu_adapter.norm()


def run_scripts(device, folder, base, files):
    """Make a run with all three scripts; its scores, and the dtype that they were made in."""
    run = make_run(folder / device, base, files, "--device", device)
    succeed(f"select.py --run {run} --device {device} --pro 1 --merge")
    file = run / "scores.safetensors"
    return load_file(file)["loss_utility"], made_from(file)["settings"]["dtype"]


def test_scripts_score_in_float16_and_an_overflow_is_an_error(
    gpu, base, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(fused, "SMALLEST", 0)
    expected, _ = run_scripts("cpu", tmp_path, base, files)
    losses, dtype = run_scripts("cuda", tmp_path, base, files)
    assert dtype == "float16"
    assert torch.allclose(losses, expected, atol=0.3)
    infinite = overflowing(tmp_path / "base", "self_attn.k")
    fails("--dtype tf32", run_scripts, "cuda", tmp_path / "infinite", infinite, files)


# The GiB that are left: scoring wants 1.4, training wants 8.
@pytest.mark.parametrize(("work", "count", "gib"), [(score, 256, 1), (train_rows, 48, 4)])
def test_running_out_of_memory_shows_at_once_and_names_a_smaller_batch(work, count, gib, gpu):
    model = shaped("smollm2-135m", gpu, BFLOAT16)
    rows = bench.random_rows(count, 368, 49152)
    expected = work(model, rows, 2048)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_allocated() + gib * 2**30
    total = torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
    fails("give --batch-tokens 50000", work, model, rows, 100_000)
    torch.cuda.empty_cache()
    assert torch.allclose(work(model, rows, 4096), expected, atol=0.2)


@pytest.mark.parametrize("smallest", [0, math.inf])
def test_nothing_waits_for_the_gpu_inside_a_micro_batch(smallest, gpu, monkeypatch):
    monkeypatch.setattr(fused, "SMALLEST", smallest)
    model = shaped("tiny", gpu, BFLOAT16)
    micro_batch(model, ROWS, [0, 1, 2])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    micro_batch(model, ROWS, [3, 4, 5])


# What kernels cost: the ceiling, the first and the later turns


def with_cudnn(work) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    work()
    torch.backends.cuda.enable_cudnn_sdp(False)


def eager(work) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "SMALLEST", math.inf)
        work()


@pytest.mark.parametrize("part", ["score", "train"])
def test_the_cost_of_attention_kernels_and_of_compiling(part, gpu):
    """Four layers of Llama-3-8B on rows as chats are, with many different shapes of a batch."""
    dtype = bench.DTYPES[part]
    raw = bench.shape_config("llama3-8b") | {"num_hidden_layers": 4}
    rows = bench.random_rows(192, 368, 128256)
    config = TrainConfig(epochs=1, batch_tokens=8192)
    case = bench.Bench(bench.random_model(raw, gpu, dtype), rows, config, repeats=2)
    ours = partial(bench.work, case, part)
    arms = {"ours": ours, "cuDNN": partial(with_cudnn, ours), "eager": partial(eager, ours)}
    print(f"ceiling, {dtype}: {bench.ceiling(gpu, dtype) / 1e12:.0f} TFLOP/s")
    seconds = {name: [] for name in arms}
    for _ in range(3):
        for name, work in arms.items():
            start = bench.clock(gpu)
            work()
            seconds[name].append(round(bench.clock(gpu) - start, 2))
    print(part, seconds)
