"""What a GPU does differently works, as far as it shows without one: kernels and memory."""

import pytest
import torch
from conftest import fails
from helpers import micro_batch

from model import fused, load_checkpoint
from model.io import out_of_memory
from model.lora import active, use
from toss.audit.bench import random_model, random_rows, shape_config
from toss.scoring import score

CPU = torch.device("cpu")


def losses_and_gradients(model, rows):
    """All losses one row at a time, and the sum of the gradients of every fourth row."""
    parts = [score(use(model, None), rows, 1)]
    for row in range(0, rows.rows, 4):
        parts.append(micro_batch(model, rows, [row]))
    parts += [tensor.grad.flatten() for tensor in active(model).tensors()]
    return torch.cat(parts)


BACKENDS = [("aot_eager", range(3, 17), 0), ("no such compiler", [0], 1)]


@pytest.mark.parametrize(("backend", "graphs", "notes"), BACKENDS)
def test_a_few_graphs_serve_all_shapes_and_without_a_compiler_a_note_says_so(
    backend, graphs, notes, model, monkeypatch, capsys
):
    rows = random_rows(16, 60, vocabulary=384)
    assert len(set(rows.lengths)) == 16
    expected = losses_and_gradients(model, rows)

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    fused.works.cache_clear()
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    monkeypatch.setattr(fused, "SMALLEST", 0)
    monkeypatch.setattr(fused, "BACKEND", backend)
    model.gradient_checkpointing = True
    result = losses_and_gradients(model, rows)
    fused.works.cache_clear()
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] in graphs
    assert not counters["graph_break"]
    assert capsys.readouterr().out.count("note: kernels are not compiled") == notes


def test_no_model_on_a_gpu_has_cudnns_attention(base, monkeypatch):
    allowed = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
    fails("device cuda cannot be used", load_checkpoint, base, "cuda")  # there is none
    assert allowed == [False]
    with pytest.raises((AssertionError, RuntimeError)):
        random_model(shape_config("tiny"), torch.device("cuda"), torch.float16)
    assert allowed == [False, False]


TEXTS = [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
]


def test_memory_errors_of_the_libraries_are_known_by_their_text_or_kind():
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert out_of_memory(torch.OutOfMemoryError("no room"))
    assert not out_of_memory(RuntimeError("an illegal memory access"))
