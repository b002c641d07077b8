"""The benchmark counts what its table says; noise is that of rounding."""

import itertools
import re

import pytest
import torch
from helpers import said

from toss.audit import bench
from toss.audit.noise import noise
from toss.config import TrainConfig
from toss.workbench.run import open_run

CPU = torch.device("cpu")
SMALL = "--model tiny --rows 4 --repeats 1 --device cpu --threads 1"


def test_random_rows_begin_with_a_prompt_and_differ_in_length():
    rows = bench.random_rows(400, 50, vocabulary=384)
    assert not rows.response[rows.offsets[:-1]].any()
    assert rows.response.float().mean() == pytest.approx(0.6, abs=0.02)
    assert (min(rows.lengths), max(rows.lengths)) == (12, 87)


@pytest.mark.parametrize(("part", "flop"), [("score", 2), ("train", 4)])
def test_a_share_is_by_the_parameters_that_a_token_is_multiplied_with(part, flop, monkeypatch):
    raw = bench.shape_config("tiny")
    rows = bench.random_rows(6, 20, vocabulary=384)
    config = TrainConfig(epochs=1, batch_size=3, batch_tokens=100, rank=2)
    case = bench.Bench(bench.random_model(raw, CPU, torch.float32), rows, config, repeats=1)
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # q and o, k and v, the MLP
    head = 384 * 32
    assert bench.linear_parameters(case.model) == 2 * block + head
    count = flop * (2 * block + head) * len(rows.input_ids)
    seconds = itertools.count()  # each turn takes one
    monkeypatch.setattr(bench, "clock", lambda device: next(seconds))
    monkeypatch.setattr(bench, "ceiling", lambda device, dtype: 2 * count)
    tokens = len(rows.input_ids)
    line = [part, f"{tokens}", "50%", "0", "1.00 [1.00, 1.00]"]
    assert list(bench.measure(case, part).values())[:-1] == line


def test_the_ceiling_is_the_rate_of_the_best_product(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(bench, "clock", lambda device: next(seconds))
    assert bench.ceiling(CPU, torch.float32) == 2 * 2048**3  # one product in one second


def test_the_benchmark_prints_its_table_and_where_it_is_from(capsys, monkeypatch):
    monkeypatch.setattr(bench, "ceiling", lambda device, dtype: 1e11)
    out = said(capsys, f"toss.audit.bench {SMALL}")
    for words in (f"torch {torch.__version__}", "4 rows, ", "| train ", "| score "):
        assert words in out


def test_noise_of_float32_is_zero_and_of_half_precision_is_not(trained, capsys):
    own = noise(open_run(trained))
    assert (own["dtype"], own["rows"], own["same"]) == ("float32", 10, 1.0)
    assert own["noise"] < 1e-5
    half = noise(open_run(trained), dtype="bfloat16")
    assert 1e-4 < half["noise"] < half["deviation"]
    flags = "--rows 3 --discard 0.2 --dtype float16 --threads 1"
    out = said(capsys, f"toss.audit.noise --run {trained} {flags}")
    assert re.search("under float16.*on 3 rows.*at d = 0.2 are also discarded", out, re.DOTALL)
