"""Speed and exactness: what the benchmark counts, that its loops do equal work, rounding noise."""

from importlib.metadata import version

import pytest
import torch
from conftest import ROOT
from helpers import call, said

from model.io import read_json
from toss.audit import bench, noise, speed
from toss.config import TrainConfig
from toss.workbench.files import fingerprint
from toss.workbench.run import open_run

CPU = torch.device("cpu")
SMALL = "--model tiny --rows 4 --tokens 20 --repeats 1 --device cpu"
TINY = {**bench.LLAMA, **dict(zip(bench.FIELDS, bench.SHAPES["tiny"]))}


def test_random_rows_are_the_same_each_time_and_begin_with_a_prompt():
    tokens, again = (speed.random_rows(400, 50, 384) for _ in range(2))
    assert fingerprint(tokens) == fingerprint(again) and tokens.rows == 400
    assert not tokens.response[tokens.offsets[:-1]].any() and int(tokens.input_ids.max()) < 384
    assert min(tokens.lengths) >= 12 and max(tokens.lengths) <= 87
    assert sum(tokens.lengths) / 400 == pytest.approx(50, rel=0.1)
    assert float(tokens.response.double().mean()) == pytest.approx(0.6, abs=0.02)
    lengths = speed.random_rows(4000, 368, 384, lognormal=True).lengths  # as of chats, and cut
    assert sum(lengths) / 4000 == pytest.approx(368, rel=0.05) and max(lengths) == 2012


def test_arms_take_turns_the_first_is_not_counted_and_one_without_memory_is_left_out():
    order = []
    arms = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    found = speed.take_turns(arms, CPU, 2)
    assert order == ["a", "b"] * 3
    assert (found["a"]["loss"], found["b"]["loss"]) == (3, 4)  # of the second turn
    assert found["b"]["least"] <= found["b"]["seconds"] <= found["b"]["most"]

    def large():
        raise torch.OutOfMemoryError("no room")

    assert set(speed.take_turns({"large": large, "small": lambda: 1.0}, CPU, 1)) == {"small"}


def test_selecting_is_counted_with_the_memory_it_takes():
    found = speed.selection_cost(2_000_000, 1)
    assert found["competing"] == pytest.approx(2_000_000, rel=0.05)
    assert found["discarded"] == int(0.1 * found["competing"] + 1e-9)
    assert 0 <= found["extra_gib"] < 0.3


def small(kind, **family) -> dict:
    raw, rows = TINY | family, speed.random_rows(6, 20, 384)
    model = speed.random_model(raw, CPU, torch.float32)
    config = TrainConfig(epochs=1, batch_size=3, batch_tokens=100, rank=2)
    arms = speed.variants("score", kind(model, raw, rows, config, 50), CPU)
    sizes = speed.paddings(kind, rows, config, 50)
    return speed.speed(arms, model, sizes, 2, {"sustained": 1e11}, n=1)


def test_rates_and_shares_follow_from_seconds_and_parameters():
    part = small(speed.scoring)
    ours, block = part["arms"]["ours"], 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert part["parameters"] == 384 * 32 + 2 * block + 32  # the tied head counts once
    tokens = sum(speed.random_rows(6, 20, 384).lengths)
    assert ours["tokens_per_second"] == pytest.approx(tokens / ours["work"])
    share = ours["tokens_per_second"] * 2 * part["parameters"] / 1e11
    assert ours["share_of_ceiling"] == pytest.approx(share)
    assert ours["loss"] == pytest.approx(5.95, abs=0.1)  # ln 384: the weights are random


GEMMA = {"model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8}
GEMMA |= {"hidden_activation": "gelu_pytorch_tanh", "layer_types": ["full_attention"] * 2}
LOOPS = [("scoring", {}), ("scoring", GEMMA), ("training", {})]


@pytest.mark.parametrize(("kind", "family"), LOOPS)
def test_the_other_loops_do_the_same_work(kind, family):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    arms = small(getattr(speed, kind), **family)["arms"]
    assert list(arms) == ["ours", "published", "sorted"] and arms["sorted"]["to_sorted"] == 1
    assert arms["sorted"]["loss"] == pytest.approx(arms["ours"]["loss"], rel=1e-5)
    # The published training averages the means of rows.
    tolerance = 1e-5 if kind == "scoring" else 0.05
    assert arms["published"]["loss"] == pytest.approx(arms["ours"]["loss"], rel=tolerance)


def test_the_benchmark_prints_and_writes_its_tables(tmp_path, capsys):
    bench.main(f"{SMALL} --threads 1 --out {tmp_path}".split(), competing=5000)
    text, found = (tmp_path / "bench.md").read_text(), read_json(tmp_path / "bench.json")
    assert text in capsys.readouterr().out and "\n| ours " in text
    assert f"The mask of {found['selection'][0]['competing']:,} ranked tokens" in text
    assert (found["score"][0]["kind"], found["train"][0]["kind"]) == ("scoring", "training")
    assert (found["rows"], found["model"], found["torch"]) == (4, "tiny", version("torch"))


def test_a_part_may_be_measured_alone(tmp_path, monkeypatch):
    ceiling = {"dtype": "float32", "sustained": 1e11, "burst": 2e11}
    monkeypatch.setattr(speed, "ceiling", lambda *_: ceiling)
    line = f"toss.audit.bench {SMALL} --lengths lognormal --out {tmp_path} --part"
    for part, arms in (("sdp", ["ours", "cuDNN"]), ("compile", ["eager", "ours", "padded"])):
        assert call(f"{line} {part}") == 0
        found = read_json(tmp_path / "bench.json")
        assert [one["kind"] for one in found[part]] == ["scoring", "training"]
        assert list(found[part][0]["arms"]) == arms and not found["selection"]
    assert call(f"{line} ceiling") == 0
    assert "Ceiling in float32" in (tmp_path / "bench.md").read_text()


def test_the_readme_states_the_cost_of_the_method_at_the_papers_sizes():
    text = (ROOT / "toss/audit/README.md").read_text()
    sft, references, scores = 2 * 4, 2 * 2 * 4 / 10, 2 * 2
    toss, pro = sft + references + scores, 2 * 4 * (0.1 + 0.06) + 2
    for part, number in [(toss, "1.70"), (toss + pro, "2.11")]:
        assert f"{part / sft:.2f}" == number and number in text


def test_noise_of_float32_is_zero_and_of_half_precision_is_not(trained, capsys):
    found = {dtype: noise.noise(open_run(trained), dtype=dtype) for dtype in ("auto", "bfloat16")}
    assert found["auto"]["dtype"] == "float32" and found["auto"]["rows"] == 10
    assert found["auto"]["noise"] < 1e-5 and found["auto"]["same"] == 1
    assert 1e-4 < found["bfloat16"]["noise"] < found["bfloat16"]["deviation"]
    flags = "--rows 3 --discard 0.2 --dtype float16 --threads 1"
    out = said(capsys, f"toss.audit.noise --run {trained} {flags}")
    for words in ("under float16", "on 3 rows", "at d = 0.2 are also discarded"):
        assert words in out
