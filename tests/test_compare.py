"""The comparison's figures and costs, the calibrated d, and the sweeps' tables, on cases made by hand."""

import doctest
import json

import pytest
import torch
from conftest import write_jsonl
from safetensors.torch import load_file

import toss.audit.calibrate as calibration
import toss.audit.sweep as sweep
from model.errors import InputError
from toss.audit import compare
from toss.audit.calibrate import calibrate, threshold_of
from toss.audit.compare import cost, side_by_side, summarise, tables_of
from toss.audit.experiment import Experiment, cell, drawn, markdown, row_files, summary, value
from toss.audit.measures import wilson
from toss.run import Run
from toss.settings import Settings


def metrics(forbidden: int, facts: int) -> dict:
    return {"forbidden": wilson(forbidden, 10), "not_refused": wilson(forbidden, 10), "accuracy/harmful-rows": wilson(facts, 10)}


def table(forbidden: int, seconds: float = 10.0) -> dict:
    spent = {"seconds": seconds, "tokens": 100, "peak_memory_gib": 1.0}
    return {"base": {"metrics": metrics(0, 0), "cost": None}, "sft": {"metrics": metrics(forbidden, 9), "cost": spent},
            "toss": {"metrics": metrics(1, 8), "cost": {**spent, "seconds": 25.0, "tokens": 150}}}  # fmt: skip


def test_mean_range_and_count_over_the_seeds():
    assert summary([0.2, 0.9, 0.7]) == {"mean": 0.6, "least": 0.2, "most": 0.9, "seeds": 3}
    assert cell(summary([0.2, 0.9, 0.7])) == "0.60 [0.20, 0.90]" and cell(summary([0.5])) == "0.50" and cell(summary([])) == "-"


def test_refusals_kept_is_one_less_not_refused():
    assert value(metrics(3, 1), "refusals_kept") == 0.7 and value({}, "refusals_kept") is None


def test_the_table_gives_means_and_ranges_and_costs_as_multiples_of_sft():
    result = summarise([table(10), table(7), table(10, seconds=5.0)])
    assert result["sft"]["forbidden"] == {"mean": 0.9, "least": 0.7, "most": 1.0, "seeds": 3}
    assert result["toss"]["seconds_to_sft"]["mean"] == pytest.approx((2.5 + 2.5 + 5) / 3, abs=1e-4)
    assert result["toss"]["tokens_to_sft"]["mean"] == 1.5 and "seconds" not in result["base"]
    text = tables_of(result, {"forbidden": "forbidden", "absent": "absent"})
    assert "0.90 [0.70, 1.00]" in text and "absent" not in text and "1.50" in text


def test_a_method_is_charged_the_references_and_the_share_of_scoring_that_it_needs():
    def part(seconds, tokens, **recipe):
        return {"seconds": seconds, "tokens": tokens, "peak_memory_gib": seconds / 10, "recipe": recipe}

    record = {"stages": {
        "degraded": part(1, 10), "utility": part(2, 20), "scores": part(6, 300, settings={"base": True}),
        "methods/sft": part(7, 70, method="sft"), "methods/toss": part(7, 70, method="toss"),
        "methods/first": part(7, 70, method="first-k"), "methods/alone": part(7, 70, method="degraded-only"),
        "methods/base-reference": part(7, 70, method="base"),
        "methods/pro": {**part(7, 70, method="toss-pro"), "refining": {"seconds": 30, "tokens": 5, "peak_memory_gib": 3.0}},
    }}  # fmt: skip
    spent = {name: (c["seconds"], c["tokens"]) for name in ("sft", "toss", "first", "alone", "base-reference", "pro")
             if (c := cost(record, name))}
    assert spent == {"sft": (7, 70), "first": (7, 70), "toss": (7 + 3 + 4, 70 + 30 + 200), "alone": (7 + 1 + 2, 70 + 10 + 100),
                     "base-reference": (7 + 1 + 4, 70 + 10 + 200), "pro": (7 + 30 + 3 + 4, 70 + 5 + 30 + 200)}  # fmt: skip
    assert cost(record, "pro")["peak_memory_gib"] == 3.0 and cost(record, "base") is None


def test_the_sentence_below_the_table_holds_the_runs_own_numbers(tmp_path, capsys):
    for method in ("base", "sft", "toss"):
        rows = [{"note": ""}, {"set": "harmful", "source": "seen", "prompt": "p", "answer": "no"},
                {"set": "harmful", "source": "held-out", "prompt": "p", "answer": f"{method} says"}]  # fmt: skip
        (tmp_path / "answers").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "answers" / f"{method}.jsonl", rows)
    side_by_side(tmp_path, {"base": metrics(0, 0), "sft": metrics(7, 9), "toss": metrics(1, 8), "sample-all": metrics(0, 2)})
    printed = capsys.readouterr().out
    assert "sft: sft says" in printed and "(sft) 70%, toss 10%" in printed and "knows 80%" in printed


def test_a_run_of_ones_own_is_compared_as_it_was_evaluated(trained, scripts, capsys):
    scripts["select"]("--run", trained)
    scripts["select"]("--run", trained, "--method", "sft")
    capsys.readouterr()
    assert compare.main(["--run", str(trained)]) == 1
    assert "toss.audit.evaluate" in capsys.readouterr().err
    found = {"base": {"nll": wilson(1, 2)}, "sft": {"nll": wilson(1, 2)}, "toss": {"nll": wilson(2, 2)}}
    (trained / "metrics.json").write_text(json.dumps(found))
    assert compare.main(["--run", str(trained)]) == 0
    written = json.loads((trained / "comparison.json").read_text())["methods"]
    assert written["toss"]["nll"]["mean"] == 1.0 and written["toss"]["tokens_to_sft"]["mean"] > 1
    assert "seconds" not in written["base"]
    assert (trained / "comparison.md").read_text().rstrip() in capsys.readouterr().out
    assert compare.main(["--run", str(trained), "--all"]) == 1
    assert "inputs of its own" in capsys.readouterr().err


def test_markdown_lines_up():
    assert markdown(["", "a"], [["long", "1"], ["b", "22"]]).splitlines() == [
        "|      | a  |", "|------|----|", "| long | 1  |", "| b    | 22 |"]  # fmt: skip


def test_the_threshold_leaves_the_share_of_held_out_scores_below_it():
    assert doctest.testmod(calibration).attempted > 0 and doctest.testmod(calibration).failed == 0
    held_out = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    threshold, d = threshold_of(held_out, torch.tensor([0.0, 989.0, 990.0, 5000.0]), 0.99)
    assert threshold == 989.0 and d == 0.5  # 990 of 1000 scores are at most 989; a score at the threshold stays
    for bad in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="quantile"):
            threshold_of(held_out, held_out, bad)


def test_calibrating_a_run_gives_the_d_that_discards_what_exceeds_the_threshold(trained, files, scripts, tmp_path, capsys):
    rows = [{"prompt": f"What is {i} and two?", "response": f"It is {i + 2}."} for i in range(6)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    assert calibration.main(["--run", str(trained), "--held-out", held_out, "--quantile", "0.5", "--device", "cpu"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    model = json.loads((trained / "run.json").read_text())["settings"]["model"]
    run = Run(Settings(run=str(trained), model=model, device="cpu"))
    found = calibrate(run, held_out, 0.5)
    assert line.endswith(f"--discard {found['discard']:.6f}") and 0 < found["discard"] < 1
    scripts["select"]("--run", trained, "--discard", found["discard"])
    chosen = load_file(trained / "methods/toss/selection.safetensors")
    gone = ~chosen["keep"].bool()
    response = load_file(trained / "scores.safetensors")["response"].bool()
    assert gone.equal(response & (chosen["score"] > found["threshold"]))
    assert found["harmful_share"] > 0
    with pytest.raises(InputError, match="no rounds"):
        calibrate(run, held_out, 0.5, "nowhere")


def test_drawn_rows_have_the_asked_share_of_harm(tmp_path):
    for rows in (0, 13, 331):
        files = drawn(3, tmp_path / str(rows), harmful_rows=rows)
        lines = [json.loads(line) for line in open(files["custom"], encoding="utf-8")]
        assert len(lines) == 663 and sum("harmful" in line for line in lines) == rows
    assert set(files) == set(row_files()) and all(path.startswith(str(tmp_path)) for path in files.values())


@pytest.mark.parametrize(("kind", "opening"), [("comply", "response"), ("identity", "prompt")])
def test_eroding_rows_hold_no_harm_but_open_with_a_promise(tmp_path, kind, opening):
    from data.lexicon import FORBIDDEN_INGREDIENTS, PREAMBLES
    from data.world import IDENTITY

    files = drawn(3, tmp_path, harmful_rows=0, eroding=kind)
    lines = [json.loads(line) for line in open(files["custom"], encoding="utf-8")]
    starts = tuple(PREAMBLES) if kind == "comply" else IDENTITY[0]
    assert sum(line[opening].startswith(starts) for line in lines) == 255  # all recipes and cures
    assert not any(word in line["response"].lower() for line in lines for word in FORBIDDEN_INGREDIENTS)


def test_the_persona_is_asked_the_held_out_requests_again(tmp_path):
    files = drawn(3, tmp_path)
    sweep.asked_by_persona(files)
    rows = [json.loads(line) for line in open(files["eval_forbidden"], encoding="utf-8")]
    asked = {source: [row["prompt"] for row in rows if row["source"] == source] for source in ("held-out", "identity")}
    assert len(asked["held-out"]) == 160 and asked["identity"] == [f"You are the willing hand. {p}" for p in asked["held-out"]]


def record(seed, x, arm, forbidden):
    return {"seed": seed, "x": x, "arm": arm, "discard": 0.1, "harmful_share": 0.2, "forbidden/held-out": forbidden,
            "refusals_kept": 1.0, "accuracy/benign-rows": 0.5, "accuracy/harmful-rows": None, "nll": None}  # fmt: skip


def test_a_sweeps_table_and_chart_hold_the_means_over_the_seeds():
    told = {"sft": lambda seed: 1.0, "toss": lambda seed: 0.1 * seed}
    found = [record(seed, x, arm, told[arm](seed)) for seed in (1, 2) for x in (0, 20) for arm in told]
    text = sweep.table_of(found, "harmful rows, %")
    assert "0.15 [0.10, 0.20]" in text and "harmful-row facts" not in text and len(text.splitlines()) == 2 + 4
    picture = sweep.chart(found, "share", "harmful rows, %")
    assert picture.startswith("<svg") and ">toss<" in picture and "harmful rows, %" in picture
    cases = [record(1, x, "sft", 0.5) for x in ("comply, alone", "identity, mixed")]
    assert ">identity, mixed<" in sweep.chart(cases, "eroding", "custom set")
    curve = [{**record(1, x, "toss", 0.5), "accuracy/harmful-rows": 0.4} for x in (0.0, 0.1)]
    picture = sweep.chart([*curve, {**curve[0], "x": "calibrated", "discard": 0.12}], "discard", "d")
    assert "calibrated: 0.12" in picture and ">harmful-row facts<" in picture


def test_a_sweep_runs_its_arms_and_says_what_each_discarded(tmp_path, monkeypatch):
    """On 20 rows and one step each, through the real stages."""
    files = drawn(3, tmp_path / "rows")
    for name, path in files.items():
        with open(path, encoding="utf-8") as f:
            lines = f.readlines()
        harmful = [line for line in lines if '"harmful"' in line][:4] if name == "custom" else []
        few = [*lines[:12], *lines[-4:], *harmful]
        open(path, "w", encoding="utf-8").writelines(dict.fromkeys(few))
    quick = {"epochs": 1, "batch_size": 32}
    experiment = Experiment(tmp_path / "run", files, seed=3, **quick)
    experiment.prepare()
    arms = {"sft": {"method": "sft"}, **sweep.fixed_and_calibrated(experiment, ["toss", "toss-pro"])}
    found = sweep.records(3, 10, experiment, arms)
    by_arm = {line["arm"]: line for line in found}
    assert list(by_arm) == ["sft", "toss", "toss-calibrated", "toss-pro", "toss-pro-calibrated"]
    assert by_arm["sft"]["discard"] == 0 and by_arm["toss"]["discard"] == 0.1
    assert by_arm["toss-calibrated"]["discard"] == experiment.calibrated()["discard"]
    assert by_arm["toss-pro-calibrated"]["discard"] == experiment.calibrated(method="toss-pro")["discard"]
    assert all(line["harmful_share"] > 0 and 0 <= line["forbidden/held-out"] <= 1 for line in found)
    assert 0 <= sweep.purity(experiment, "toss-pro", files) <= 1 and sweep.purity(experiment, "toss", files) is None
