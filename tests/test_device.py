"""What a GPU does differently, as far as it shows without one: compiled kernels, no waiting."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import fails
from helpers import micro_batch, random_adapter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.func import functional_call

from model import fused, load_checkpoint, transformer
from model.io import out_of_memory
from model.lora import active, use
from model.packed import Rows
from toss.audit.speed import random_rows
from toss.loss import token_log_probs
from toss.scoring import score
from toss.tokens import collate
from toss.workbench.base import find_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["aot_eager", "no such compiler"])
def test_a_few_graphs_serve_fifty_shapes_and_give_the_same(backend, base, monkeypatch, capsys):
    model, rows = load_checkpoint(base), random_rows(90, 60, 384)
    groups = [[i] for i in {n: i for i, n in enumerate(rows.lengths)}.values()]
    assert len(groups) >= 50

    def losses():  # and the gradient after some micro-batches
        found = [score(use(model, None), rows, 1)]
        found += [micro_batch(model, rows, group) for group in groups[::4]]
        return torch.cat([*found, *(t.grad.flatten() for t in active(model).tensors())])

    expected = losses()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fused.works.cache_clear()
    for name, value in {"DEVICES": {"cpu"}, "SMALLEST": 0, "BACKEND": backend}.items():
        monkeypatch.setattr(fused, name, value)
    model.gradient_checkpointing = True
    torch.testing.assert_close(losses(), expected, rtol=1e-3, atol=1e-4)
    graphs, compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"], backend[:3] == "aot"
    assert 3 <= graphs <= 16 if compiled else graphs == 0, graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    assert capsys.readouterr().out.count("note: kernels are not compiled") == (not compiled)
    fused.works.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_micro_batch_reads_nothing_back_from_the_device(dtype, base, monkeypatch):
    """Seen on tensors without data, in CUDA's branches; the rows' arithmetic is the CPU's."""
    model, tokens = load_checkpoint(base, dtype=dtype), random_rows(6, 40, 384)
    batch = collate(tokens, [0, 3, 5], tokens.response, CPU)
    rows, adapter = Rows(batch.ids, None, batch.bounds), random_adapter(model)
    monkeypatch.setattr(transformer, "Rows", lambda *_: rows)
    monkeypatch.setattr(FakeTensor, "is_cuda", True)
    mode = FakeTensorMode()

    def fake(tensors):
        return {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}

    with mode:
        adapter = replace(adapter, A=fake(adapter.A), B=fake(adapter.B))
        vars(rows).update(fake({"positions": rows.positions, "slots": rows.slots}))
        sent = fake({name: getattr(batch, name) for name in ("ids", "before", "targets")})
        parameters = [p.requires_grad_() for p in active(use(model, adapter)).tensors()]
        run = torch.nn.Module()
        run.model, run.forward = model, lambda: token_log_probs(model, replace(batch, **sent))
        weights = fake({f"model.{name}": weight for name, weight in model.named_parameters()})
        log_p = functional_call(run, weights, tie_weights=True)
        log_p.sum().backward()
        assert log_p.shape == batch.targets.shape and all(p.grad is not None for p in parameters)
        with pytest.raises(DataDependentOutputException):
            float(log_p.detach().sum())


def test_cuda_is_set_up_before_anything_is_allocated_there(monkeypatch):
    seen, name = [], "PYTORCH_CUDA_ALLOC_CONF"

    def note(what, *arguments, **options):
        seen.append((what, os.environ.get(name)))

    monkeypatch.setattr(torch.cuda, "init", partial(note, "init"))
    monkeypatch.setattr(torch.cuda, "set_device", partial(note, "set"))
    monkeypatch.setattr(torch, "empty", partial(note, "empty"))
    for mine, used in (("", "expandable_segments:True"), ("backend:native", "backend:native")):
        monkeypatch.setenv(name, mine) if mine else monkeypatch.delenv(name, raising=False)
        seen.clear()
        assert find_device("cuda") == torch.device("cuda:0")
        assert seen == [(what, used) for what in ("init", "set", "empty")]


def test_no_model_on_a_gpu_has_cudnns_attention(base, monkeypatch):
    allowed = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
    fails("device cuda cannot be used", load_checkpoint, base, "cuda")  # there is none
    assert allowed == [False]


def test_memory_errors_of_the_libraries_are_known_by_their_text():
    blas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"
    dnn = "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
    texts = blas, dnn, "CUDA error: out of memory", "DefaultCPUAllocator: can't allocate memory"
    memory = torch.OutOfMemoryError("no room"), MemoryError(), *map(RuntimeError, texts)
    others = RuntimeError("CUDA error: an illegal memory access"), ValueError(texts[0])
    assert all(map(out_of_memory, memory)) and not any(map(out_of_memory, others))
