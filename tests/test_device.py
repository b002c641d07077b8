"""What a GPU does differently works, as far as it shows without one: kernels and memory."""

import pytest
import torch
from conftest import fails

from model import fused, load_checkpoint
from model.io import out_of_memory
from toss.audit.bench import random_model, shape_config
from toss.scoring import score

CPU = torch.device("cpu")


def test_compiled_kernels_compute_the_same_and_without_a_compiler_a_note_says_so(
    model, tokens, monkeypatch, capsys
):
    expected = score(model, tokens)
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    monkeypatch.setattr(fused, "SMALLEST", 0)
    for backend, notes in (("aot_eager", 0), ("no such compiler", 1)):
        torch._dynamo.reset()
        fused.works.cache_clear()
        monkeypatch.setattr(fused, "BACKEND", backend)
        torch.testing.assert_close(score(model, tokens), expected, rtol=1e-3, atol=1e-4)
        assert capsys.readouterr().out.count("note: kernels are not compiled") == notes
    fused.works.cache_clear()


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
