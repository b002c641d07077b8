"""What a GPU does differently works, as far as it shows without one: kernels, waiting, memory."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import fails
from helpers import micro_batch, random_adapter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from model import fused, load_checkpoint, transformer
from model.io import out_of_memory
from model.lora import active, use
from model.packed import Rows
from toss.audit.bench import random_model, random_rows, shape_config
from toss.loss import token_log_probs
from toss.scoring import score
from toss.tokens import collate
from toss.workbench.base import find_device

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
def test_a_few_graphs_serve_fifty_shapes_and_without_a_compiler_a_note_says_so(
    backend, graphs, notes, model, monkeypatch, capsys
):
    rows = random_rows(50, 60, vocabulary=384)
    assert len(set(rows.lengths)) == 50
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_micro_batch_reads_nothing_back_from_the_device(dtype, base, monkeypatch):
    """Seen on tensors without data, in CUDA's branches; the rows' arithmetic is the CPU's."""
    model = load_checkpoint(base, dtype=dtype)
    tokens = random_rows(6, 40, vocabulary=384)
    batch = collate(tokens, [0, 3, 5], tokens.response, CPU)
    rows = Rows(batch.ids, None, batch.bounds)
    parameters = active(use(model, random_adapter(model))).tensors()
    monkeypatch.setattr(transformer, "Rows", lambda *arguments: rows)
    monkeypatch.setattr(FakeTensor, "is_cuda", True)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name in ("positions", "padded_places"):
            setattr(rows, name, mode.from_tensor(getattr(rows, name)))
        for name in ("ids", "before", "targets"):
            setattr(batch, name, mode.from_tensor(getattr(batch, name)))
        for parameter in parameters:
            parameter.requires_grad_()
        log_p = token_log_probs(model, batch)
        log_p.sum().backward()
        assert log_p.shape == batch.targets.shape
        assert all(parameter.grad is not None for parameter in parameters)
        with pytest.raises(DataDependentOutputException):
            float(log_p.detach().sum())


@pytest.mark.parametrize("given", ["", "backend:native"])
def test_the_allocator_is_set_before_anything_is_allocated(given, monkeypatch):
    used = given or "expandable_segments:True"
    calls = []

    def note(what, *arguments, **options):
        calls.append(what)
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == used
        return SimpleNamespace(device="a GPU")

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    if not given:
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(torch.cuda, "set_device", partial(note, "set_device"))
    monkeypatch.setattr(torch, "empty", partial(note, "empty"))
    assert find_device("cuda") == "a GPU"
    assert calls == ["set_device", "empty"]


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


@pytest.mark.parametrize("text", TEXTS)
def test_memory_errors_of_the_libraries_are_known_by_their_text(text):
    assert out_of_memory(RuntimeError(text))
    assert not out_of_memory(ValueError(text))


def test_other_memory_errors_are_known_by_their_kind():
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("no room"))
    assert not out_of_memory(RuntimeError("an illegal memory access"))
