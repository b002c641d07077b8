"""The benchmark: what it counts, that its arms do the same work, and what it writes."""

import builtins
import doctest
import json

import pytest
import torch

from toss.audit import bench, published
from toss.audit.compare import cost
from toss.settings import Settings

CPU = torch.device("cpu")


def test_the_worked_example_of_the_cost():
    result = doctest.testmod(bench)
    assert result.attempted > 0 and result.failed == 0


def test_without_rounds_or_references_only_the_scoring_is_left():
    assert bench.cost_to_sft(0, 0, 10, 1, 0, 0) == (2.0, 2.0)
    assert bench.cost_to_sft(0, 0, 10, 2, 0, 0) == (1.5, 1.5)
    one, two = (bench.cost_to_sft(10, 10, 100, 2, rounds, 5)[1] for rounds in (1, 2))
    assert two - one == pytest.approx((4 * 2 * 20 + 2 * 100) / (4 * 2 * 100))  # the second round has 10 + 2 * 5 rows


def test_random_rows_are_the_same_each_time_and_begin_with_a_prompt():
    tokens, again = bench.random_rows(400, 50, 384), bench.random_rows(400, 50, 384)
    assert tokens.fingerprint() == again.fingerprint() and tokens.rows == 400
    assert not tokens.response[tokens.offsets[:-1]].any() and int(tokens.input_ids.max()) < 384
    assert sum(tokens.lengths) / 400 == pytest.approx(50, rel=0.1) and min(tokens.lengths) >= 12 and max(tokens.lengths) <= 87
    assert float(tokens.response.double().mean()) == pytest.approx(0.6, abs=0.02)


def test_turns_alternate_and_the_first_is_not_counted():
    order = []
    arms = {"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}
    found = bench.take_turns(arms, CPU, 2)
    assert order == ["a", "b"] * 3
    assert found["a"]["loss"] == 1.0 and found["b"]["least"] <= found["b"]["seconds"] <= found["b"]["most"]


def test_an_arm_that_runs_out_of_memory_is_left_out_and_the_others_go_on():
    def large():
        raise torch.OutOfMemoryError("no room")

    assert set(bench.take_turns({"large": large, "a": lambda: 1.0}, CPU, 1)) == {"a"}


def test_selection_is_counted_in_a_process_of_its_own():
    found = bench.in_fresh_process(5000, 1)
    assert found["competing"] == pytest.approx(5000, rel=0.1) and found["discarded"] == int(0.1 * found["competing"] + 1e-9)
    assert found["extra_gib"] is None or 0 <= found["extra_gib"] < 0.5


def small(kind: str) -> dict:
    raw = bench.SHAPES["tiny"]
    settings = Settings(epochs=1, batch_size=3, batch_tokens=100, rank=2)
    return bench.speed(kind, bench.random_model(raw, CPU, torch.float32), raw, bench.random_rows(6, 20, 384), settings, 1)


def test_rates_and_shares_follow_from_seconds_and_parameters():
    part = small("scoring")
    ours = part["arms"]["ours"]
    assert part["parameters"] == 384 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32  # the tied head counts
    assert ours["tokens_per_second"] == pytest.approx(part["tokens"] / ours["work"])
    assert ours["share_of_ceiling"] == pytest.approx(ours["tokens_per_second"] * 2 * part["parameters"] / part["ceiling"])
    assert ours["loss"] == pytest.approx(5.94, abs=0.1)  # ln 384, of random weights


@pytest.mark.parametrize("kind", ["scoring", "training"])
def test_the_other_loops_do_the_same_work(kind):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    arms = small(kind)["arms"]
    assert set(arms) == {"ours", *published.ARMS}
    assert arms["sorted"]["loss"] == pytest.approx(arms["ours"]["loss"], rel=1e-5)
    mean_of_means = kind == "training"
    assert arms["published"]["loss"] == pytest.approx(arms["ours"]["loss"], rel=0.05 if mean_of_means else 1e-5)
    assert arms["sorted"]["to_sorted"] == 1


@pytest.fixture
def alone(monkeypatch):
    """As if transformers and peft were not installed."""
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] in ("transformers", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)


def test_one_command_prints_and_writes_the_tables(tmp_path, trained, scripts, alone, monkeypatch, capsys):
    assert scripts["select"]("--run", trained, "--method", "sft") == 0 == scripts["select"]("--run", trained, "--method", "toss")
    monkeypatch.setattr(bench, "COMPETING", 5000)
    capsys.readouterr()
    flags = ["--shape", "tiny", "--rows", "4", "--tokens", "20", "--repeats", "1", "--device", "cpu", "--threads", "1"]
    assert bench.main([*flags, "--run", str(trained), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/bench.md").read_text()
    assert text in capsys.readouterr().out and text.count("is not installed") == 2
    found = json.loads((tmp_path / "out/bench.json").read_text())
    assert [part["kind"] for part in found["parts"]] == ["scoring", "training"] and found["rows"] == 4
    record = json.loads((trained / "run.json").read_text())
    spent = {name: cost(record, name) for name in ("sft", "toss")}
    ratio = f"{spent['toss']['tokens'] / spent['sft']['tokens']:.2f}"
    assert found["run"] == [[name, f"{spent[name]['seconds']:,.1f}", found["run"][i][2], f"{spent[name]['tokens']:,}",
                             ("1.00", ratio)[i]] for i, name in enumerate(("sft", "toss"))]  # fmt: skip


def test_a_wrong_number_or_run_writes_nothing(tmp_path, capsys):
    for flags in (["--repeats", "0"], ["--rows", "0"], ["--device", "abacus"], ["--run", str(tmp_path)]):
        assert bench.main([*flags, "--out", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()
