"""The benchmark counts what its table says, its loops do equal work; noise is that of rounding."""

import itertools
import math
from importlib.metadata import version

import pytest
import torch
from conftest import ROOT
from helpers import said

from toss.audit import bench, speed
from toss.audit.noise import noise
from toss.config import TrainConfig
from toss.workbench.run import open_run

CPU = torch.device("cpu")


def test_random_rows_are_the_same_each_time_and_begin_with_a_prompt():
    rows = speed.random_rows(400, 50, vocabulary=384)
    again = speed.random_rows(400, 50, vocabulary=384)
    assert rows.input_ids.equal(again.input_ids) and rows.offsets.equal(again.offsets)
    assert rows.input_ids.max() < 384
    assert not rows.response[rows.offsets[:-1]].any()
    assert rows.response.float().mean() == pytest.approx(0.6, abs=0.02)
    assert (min(rows.lengths), max(rows.lengths)) == (12, 87)
    chats = speed.random_rows(4000, 368, 384, lognormal=True).lengths
    assert sum(chats) / 4000 == pytest.approx(368, rel=0.02)
    assert max(chats) == 2012


@pytest.fixture
def ceiling(monkeypatch):
    """A machine of 100 GFLOP per second, known without measuring."""
    monkeypatch.setattr(speed, "ceiling", lambda device, dtype: 1e11)


def tiny_bench(**family) -> speed.Bench:
    raw = bench.shape_config("tiny") | family
    rows = speed.random_rows(6, 20, vocabulary=384)
    config = TrainConfig(epochs=1, batch_size=3, batch_tokens=100, rank=2)
    return speed.Bench(raw, CPU, rows, config, repeats=1)


@pytest.mark.parametrize(("part", "flop"), [("score", 2), ("train", 4)])
def test_work_is_counted_by_the_parameters_that_a_token_is_multiplied_with(part, flop, ceiling):
    found = speed.compare(tiny_bench(), part)
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # q and o, k and v, the MLP
    head = 384 * 32
    assert found.flop == flop * (2 * block + head) * sum(tiny_bench().tokens.lengths)
    assert found.turns["ours"][0].loss == pytest.approx(math.log(384), abs=0.1)  # random weights


GEMMA = {"model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8}
GEMMA |= {"hidden_activation": "gelu_pytorch_tanh", "layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(("part", "family"), [("score", {}), ("score", GEMMA), ("train", {})])
def test_the_plain_loop_does_the_same_work(part, family, ceiling):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    turns = speed.compare(tiny_bench(**family), part).turns
    assert turns["plain"][0].loss == pytest.approx(turns["ours"][0].loss, rel=1e-5)


def test_arms_take_turns_and_one_that_runs_out_of_memory_ends():
    calls = []

    def small() -> float:
        calls.append("small")
        return 2.0

    def large() -> float:
        calls.append("large")
        raise torch.OutOfMemoryError("no room")

    turns = speed.take_turns({"small": small, "large": large, "other": small}, CPU, repeats=1)
    assert calls == ["small", "large", "small", "small", "small"]
    assert [turn.loss for turn in turns["other"]] == [2.0, 2.0]
    assert turns["large"] == []


def test_the_ceiling_is_the_rate_of_the_best_product(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(speed, "clock", lambda device: next(seconds))
    assert speed.ceiling(CPU, torch.float32) == 2 * 2048**3  # one product in one second


def test_a_line_of_the_table_is_by_the_median_of_all_turns_but_the_first():
    assert sum(tiny_bench().tokens.lengths) == 117
    turns = {}
    for name, taken in {"ours": (9, 1, 2, 4), "plain": (8, 3, 3, 5), "compiled": ()}.items():
        turns[name] = [speed.Turn(seconds, 2.5, loss=5.0) for seconds in taken]
    found = speed.Comparison("Scoring", torch.float32, ceiling=4e9, flop=2e9, turns=turns)
    expected = (ROOT / "tests/bench.txt").read_text()
    assert f"{bench.table(found, tiny_bench())}\n".startswith(expected)


SMALL = "--model tiny --rows 4 --tokens 20 --repeats 1 --device cpu --threads 1"


def test_the_benchmark_prints_its_tables_and_writes_where_they_are_from(tmp_path, capsys, ceiling):
    out = said(capsys, f"toss.audit.bench {SMALL} --out {tmp_path}/bench")
    text = (tmp_path / "bench.md").read_text()
    assert f"`python -m toss.audit.bench {SMALL}" in text
    assert ", commit " in text and " minutes\n" in text
    for words in (f"torch {version('torch')}", "tokens: 78,", "### Training", "\n| ours "):
        assert words in out and words in text

    line = f"{SMALL} --lengths lognormal --part train --out {tmp_path}/train"
    out = said(capsys, f"toss.audit.bench {line}")  # a part may be measured alone
    assert "lengths: lognormal; tokens: 72," in out
    assert "### Training" in out and "### Scoring" not in out


def test_noise_of_float32_is_zero_and_of_half_precision_is_not(trained, capsys):
    own = noise(open_run(trained))
    assert (own["dtype"], own["rows"], own["same"]) == ("float32", 10, 1.0)
    assert own["noise"] < 1e-5
    half = noise(open_run(trained), dtype="bfloat16")
    assert 1e-4 < half["noise"] < half["deviation"]
    flags = "--rows 3 --discard 0.2 --dtype float16 --threads 1"
    out = said(capsys, f"toss.audit.noise --run {trained} {flags}")
    assert "under float16" in out and "on 3 rows" in out and "at d = 0.2 are also discarded" in out
