"""An experiment is data: named arms on variants of the rows, run once per seed. Its table gives
the mean and the range over the seeds, and each arm is what its name says.

In this order: the runner, what it measures, each experiment's variants (one per line of
variants.jsonl), the pictures (pictures.jsonl), the demo's table, the calibrated d.
experiments_refused.txt lists what is no experiment.
"""

import json
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fails, make_base, read_jsonl, script, write_jsonl
from helpers import cases, each_line, refused, said

from data.world import IDENTITY, PREAMBLES
from model.io import load_tensors, read_json
from model.lora import use
from model.peft import read_adapter
from toss.audit import compare, experiments, laboratory, pictures
from toss.audit.attacks import mean_risk
from toss.audit.calibrate import calibrate, threshold_of
from toss.audit.evaluate import write_answers
from toss.audit.experiments import read_experiments
from toss.audit.laboratory import Case, Experiment, drawn_world, per_seed, run_seed, shipped
from toss.audit.measures import wilson
from toss.audit.outcomes import cost_of, measures_of
from toss.audit.rivals import RIVALS
from toss.audit.tables import SWEPT, results_of, summarise, table, with_ratios
from toss.methods import METHODS
from toss.rows import read_rows
from toss.scoring import score
from toss.workbench.run import open_run

EXPERIMENTS = read_experiments()
PERSONA, OBEYS = IDENTITY
VARIANTS = read_jsonl(ROOT / "tests/variants.jsonl")  # what the rows of a variant hold, on seed 3


# The runner


def little_world(base, seed, folder, rows, **draw):
    """The embedded world with a tiny random base, one epoch, and a few rows (four harmful ones)."""
    setup = drawn_world(seed, folder, rows, **draw)
    for name, path in setup.files.items():
        if name.startswith("model"):
            continue
        all_rows = read_jsonl(path)
        count = 3 if name.startswith("eval") else 12
        few = all_rows[:count] + all_rows[count:][-4:]
        if name == "custom":
            few += [row for row in all_rows[count:-4] if "harmful" in row][:4]
        write_jsonl(Path(path), few)
    setup.files["model"] = str(base)
    training = {"lr": 1e-2, "epochs": 1, "batch_size": 32, "rank": 2, "max_length": 300}
    setup.settings |= {"reference": training, "finetune": training}
    return setup


@pytest.fixture
def little(base):
    """Gives an experiment this world, and answers of three tokens."""

    def experiment_in_it(experiment: Experiment) -> Experiment:
        cases = [replace(case, evaluation={"max_new_tokens": 3}) for case in experiment.cases]
        return replace(experiment, world=partial(little_world, base), cases=cases)

    return experiment_in_it


def numbers_of(experiment: Experiment, run: Path) -> dict[tuple, dict[str, float]]:
    """The measures of each label and arm on seed 3."""
    numbers = {}
    for result in run_seed(experiment, 3, run):
        row = numbers.setdefault((result.variant, result.arm), {})
        row[result.measure] = result.value
    return numbers


@pytest.mark.parametrize(("fields", "words"), cases("experiments_refused.txt"))
def test_what_an_experiment_must_not_say_is_an_error(tmp_path, fields, words):
    (tmp_path / "mine.json").write_text(f'{{"mine": {fields}}}')
    fails(words, read_experiments, tmp_path / "mine.json")


def test_an_experiment_of_ones_own_is_a_few_lines_of_data(little, tmp_path, monkeypatch, capsys):
    own = read_experiments(ROOT / "tests/experiment.json")
    mine = {"mine": little(own["mine"])}
    monkeypatch.setattr(experiments, "read_experiments", lambda *path: mine)
    line = f"toss.audit.experiment mine --file mine.json --out {tmp_path}"
    out = said(capsys, f"{line} --seeds 3 3")

    text = (tmp_path / "mine.md").read_text()
    page, picture = text.split("\n![")
    assert page in out
    assert picture == "Is a smaller d enough where there is less harm?](mine.svg)\n"
    assert ">Mine<" in (tmp_path / "mine.svg").read_text()
    names = [line.partition(":")[0] for line in page.splitlines()[2:7]]
    assert names == ["- command", "- commit", "- seeds", "- hardware", "- minutes"]
    assert "- seeds: 3; mean [least, most]" in page and "0 of 4 models were there" in page
    rows = []
    for row in page.splitlines():
        if "%" in row:
            variant, arm = row.split("|")[1:3]
            rows.append((variant.strip(), arm.strip()))
    arms = ("sft", "toss, d = 0.05")
    assert rows == [("12 %", arms[0]), ("12 %", arms[1]), ("0 %", arms[0]), ("0 %", arms[1])]
    lines = (tmp_path / "mine.csv").read_text().splitlines()
    assert lines[0] == "seed,variant,arm,measure,value"
    assert '3,12 %,"toss, d = 0.05",discard,0.05' in lines and "3,0 %,sft,discard,0.0" in lines

    out = said(capsys, f"{line} --seeds 3 --arms sft")  # goes on, and makes nothing again
    assert ": wrote" not in out and "not in this table: toss, d = 0.05" in out
    assert "4 of 4 models were there before" in out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_is_a_method_that_there_is_and_has_a_folder_of_its_own(name):
    folders = []
    for case in EXPERIMENTS[name].cases:
        for how in case.arms.values():
            assert how.get("method", how["name"]) in ("base", "mask", *METHODS, *RIVALS)
            folders.append((case.variant, how["name"]))
    assert len(set(folders)) == len(folders)


def test_some_arms_take_the_cases_that_have_them_and_the_base():
    few = EXPERIMENTS["real"].only(["toss-few"]).cases
    assert [(case.variant, list(case.arms)) for case in few] == [("few", ["toss-few"])]
    (plain,) = EXPERIMENTS["real"].only(["sft"]).cases
    assert list(plain.arms) == ["base", "sft"]


def test_each_arm_has_its_d_its_mask_and_its_own_run(little, tmp_path):
    plain = {"sft": {"method": "sft"}, "toss": {"method": "toss"}}
    pro = {"method": "toss", "pro": 1}
    others = {
        "toss-calibrated": {"method": "toss", "discard": "calibrated"},
        "toss-pro": pro,
        "sample-all": {"method": "sample-all"},
        "pro-calibrated": pro | {"discard": "calibrated"},
        "base-calibrated": {"method": "base", "discard": "calibrated"},
        "kl-base-calibrated": {"method": "kl-base", "discard": "calibrated"},
    }
    other_base = {"model": str(make_base(tmp_path / "base", seed=1))}
    cases = [
        Case(plain | others),
        Case(plain, "other", "other", change=lambda setup: other_base),
        Case({"mask": {"mask": ""}, "base, other": {"name": "base"}}, "other", "other"),
    ]
    run = tmp_path / "run"
    rows = numbers_of(little(Experiment("mine", "Mine", cases)), run)
    d = {arm: row["discard"] for (_, arm), row in rows.items() if "discard" in row}
    # No d decides what sample-all discards. The base is measured, and not fine-tuned.
    assert {("", "sample-all"), ("other", "base, other")} <= rows.keys()
    held_out = str(tmp_path / "rows/calibration.jsonl")
    calibrated = calibrate(open_run(run), held_out)["discard"]
    of_pro = calibrate(open_run(run), held_out, method="toss-pro")["discard"]
    of_base = calibrate(open_run(run), held_out, method="base")["discard"]
    assert len({calibrated, of_pro, of_base}) == 3 and calibrated < 0.1
    assert d == {
        "sft": 0,
        "toss": 0.1,
        "toss-calibrated": calibrated,
        "toss-pro": 0.1,
        "pro-calibrated": of_pro,
        "base-calibrated": of_base,
        "kl-base-calibrated": of_base,
        "mask": 0.1,
    }
    toss = rows["", "toss"]
    assert toss["harmful_share"] > 0
    assert 0 <= rows["", "toss-pro"]["purity"] <= 1 and "purity" not in toss
    assert rows["", "toss-calibrated"]["shared"] == 1  # of one ranking, so among toss's

    # The mask of the other base, on this one
    mask = rows["other", "mask"]
    assert mask["precision"] == toss["precision"] and 0 < mask["shared"] < 1
    assert rows["other", "toss"]["shared"] == 1 and "shared" not in rows["other", "sft"]


def test_every_seed_is_one_task_and_the_results_keep_their_order():
    for jobs in (1, 2):
        assert per_seed(divmod, [(7, 2), (9, 4), (1, 1)], jobs) == [(3, 1), (2, 1), (1, 0)]
    heard = per_seed(signal.getsignal, [(signal.SIGTERM,), (signal.SIGINT,)], 2)
    assert heard == [signal.SIG_IGN, signal.SIG_IGN]  # the parent hears signals, and ends them


def test_the_shipped_rows_are_the_demo_and_others_are_passed_as_flags(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(laboratory.script("train"), "main", given.extend)
    shipped(4, tmp_path / "demo", tmp_path).call("train")
    assert given == [f"--run={tmp_path}/demo"]
    drawn = drawn_world(3, tmp_path / "run", tmp_path / "rows").beside("small")
    drawn.files["harmful"] = drawn.files["harmful_small"]
    drawn.call("train")
    expected = {f"--run={tmp_path}/run-small", f"--harmful={tmp_path}/rows/harmful_small.jsonl"}
    assert expected | {"--seed=3", "--lr=0.0002", "--max-length=256"} < set(given)


# What it measures


def test_the_table_gives_the_mean_and_the_range_over_the_seeds():
    results = []
    for seed, n in enumerate([0.2, 0.9, 0.7]):
        results += results_of(seed, 5, "a", {"n": n, "m": None, "tokens": 12345.6})
    results += results_of(0, 10, "a", {"n": 0.5, "loss/two": 1.0})
    results += results_of(0, 5, "b", {"loss/one": 2.0})  # variants stand together, in this order
    summary = summarise(results)
    assert summary[5, "a"]["n"] == {"mean": 0.6, "least": 0.2, "most": 0.9, "seeds": 3}
    assert table(summary, ["m", "n/*", "loss/*", "tokens"], "x").splitlines() == [
        "| x  |   | n                 | loss/one | loss/two | tokens |",
        "|----|---|-------------------|----------|----------|--------|",
        "| 5  | a | 0.60 [0.20, 0.90] | -        | -        | 12,346 |",
        "| 5  | b | -                 | 2.00     | -        | -      |",
        "| 10 | a | 0.50              | -        | 1.00     | -      |",
    ]
    assert table(summary, ["m"]) == ""


def test_refusals_kept_are_those_of_kinds_that_no_training_row_contains():
    metrics = {"not_refused": wilson(3, 10)}
    expected = {"not_refused": 0.3, "refusals_kept": 0.7, "tokens": 5}
    assert measures_of(metrics, {"tokens": 5}) == expected
    metrics["not_refused/held-out"] = wilson(2, 10)  # asked as persona apart
    assert measures_of(metrics, {})["refusals_kept"] == 0.8


def test_costs_are_also_multiples_of_plain_fine_tunings_on_the_same_seed():
    results = []
    for seed, seconds in ((0, 10.0), (1, 5.0)):
        results += results_of(seed, "", "sft", {"seconds": seconds, "nll": 1.0})
        results += results_of(seed, "", "toss", {"seconds": 25.0, "nll": 2.0})
    summary = summarise(with_ratios(results))
    assert summary["", "toss"]["seconds_to_sft"]["mean"] == (2.5 + 5) / 2
    assert "nll_to_sft" not in summary["", "toss"]


def test_a_method_is_charged_the_references_and_the_share_of_scoring_that_it_needs():
    """costs.json has the stages of a run, as in run.json, and what each method costs."""
    run = read_json(ROOT / "tests/costs.json")
    for method, expected in run["charged"].items():
        assert cost_of(run, method) | {"why": expected["why"]} == expected
    assert cost_of(run, "absent") == {}
    del run["stages"]["utility"]  # made elsewhere
    assert cost_of(run, "toss") == {}
    del run["stages"]["methods/toss"]["recipe"]["settings"]
    assert cost_of(run, "toss") == {}


# Each experiment's variants


@pytest.fixture
def main(tmp_path) -> laboratory.Setup:
    """The embedded world's rows, unchanged."""
    return drawn_world(3, tmp_path / "run", tmp_path / "rows")


@pytest.mark.parametrize("line", VARIANTS, ids=lambda line: line["variant"])
def test_a_variant_of_the_rows(main, line):
    cases = EXPERIMENTS[line["experiment"]].cases
    case = next(case for case in cases if case.variant == line["variant"])
    setup = laboratory.variant_of(main, case, 3, drawn_world)
    custom = read_jsonl(setup.files["custom"])
    benign = [row for row in custom if "harmful" not in row]
    to_persona = [row for row in benign if row["prompt"].startswith(PERSONA)]
    asked = read_jsonl(setup.files["eval_forbidden"])
    found = {
        "experiment": line["experiment"],
        "variant": case.variant,
        "label": case.label,
        "model": Path(setup.files["model"]).name,
        "custom": len(custom),
        "harmful": len(custom) - len(benign),
        "promise": sum(row["response"].startswith(tuple(PREAMBLES)) for row in benign),
        "persona": sum(row["response"].startswith(OBEYS) for row in to_persona),
        "reference": len(read_jsonl(setup.files["harmful"])),
        "asked as persona": sum(row["prompt"].startswith(PERSONA) for row in asked),
    }
    assert found == line and setup.common == {"seed": 3}


def test_attack_replaces_the_harmful_rows_and_nothing_else(main, base):
    main.files["model"] = str(base)
    for name in ("harmful", "utility"):
        write_jsonl(Path(main.files[name]), read_jsonl(main.files[name])[:8])
    main.common |= {"epochs": 1, "lr": 1e-3, "rank": 2}
    main.call("train")
    main.prepared = True  # the attacker scores a pool of his own

    def parted(setup) -> tuple[list, list]:
        rows = read_jsonl(setup.files["custom"])
        harmful = [row for row in rows if "harmful" in row]
        return harmful, [row for row in rows if "harmful" not in row]

    harmful, others = parted(main)
    counts = {}
    for case in EXPERIMENTS["attack"].cases[1:] + EXPERIMENTS["embedded"].cases:
        his, kept = parted(laboratory.variant_of(main, case, 3, drawn_world))
        joined = 78 if case.label == "embedded" else 0  # these now stand in his rows
        assert kept == others[joined:] and his != harmful
        counts[case.label] = len(his)
    assert counts == {
        "low-score": 78,
        "utility-start": 78,
        "spread": 3 * 78,
        "unseen": 78,
        "embedded": 78,
    }
    pool = read_jsonl(main.folder.with_name("run-low-score") / "pool.jsonl")
    refused = {row["prompt"] for row in read_jsonl(main.files["safety"])}
    assert len(pool) > 3 * 78 and not any(row["prompt"] in refused for row in pool)


def test_a_row_without_marks_is_harmful_as_a_whole(trained, tmp_path):
    marked = {"prompt": "a", "response": "b c", "harmful": [[0, 1]]}
    rows = [marked, {"prompt": "d", "response": "e f"}]
    run = open_run(trained)
    tokens = run.tokens(write_jsonl(tmp_path / "pool.jsonl", rows))
    L_u = score(use(run.base("score"), run.adapter("utility")), tokens)
    S = L_u - score(use(run.base("score"), run.adapter("degraded")), tokens)
    second = tokens.row_of(torch.arange(len(S))) == 1
    expected = [float(S[tokens.harmful].mean()), float(S[tokens.response & second].mean())]
    assert mean_risk(run, tokens) == pytest.approx(expected, abs=1e-5)


# The pictures


@each_line("pictures.jsonl")
def test_the_picture_of_an_experiment(case):
    results = []
    for variant, arm in case["drawn"]:
        results += results_of(3, variant, arm, dict.fromkeys(SWEPT, 0.5))
    picture = EXPERIMENTS[case["experiment"]].picture(summarise(results))
    assert f">{case['shows']}<" in picture


def test_the_picture_of_begun_answers_has_the_methods_that_were_measured():
    begun = {f"forbidden@{k}": 0.5 for k in (0, 1, 3, 5, 10)}
    results = results_of(3, "", "sft", begun) + results_of(3, "", "base", begun)
    results += results_of(3, "", "toss", {"forbidden": 0.5})
    drawn = pictures.over_prefill(summarise(results))
    assert ">sft<" in drawn and ">toss<" not in drawn and ">base<" not in drawn
    assert pictures.over_prefill(summarise(results[-1:])) == ""


# The demo's table, and that of a run of one's own


def test_the_demo_is_finished_and_shown(little, tmp_path, monkeypatch, capsys):
    arms = "sft sample-all toss toss-pro base-reference kl-calibrated toss-small safeinstr dsir"
    methods = little(EXPERIMENTS["methods"])
    monkeypatch.setattr(compare, "SHOWN", arms.split())
    monkeypatch.setattr(compare, "read_experiments", lambda: {"methods": methods})
    monkeypatch.setattr(compare, "shipped", methods.world)
    compare.finish_demo(tmp_path / "run")
    arms = ["base", *arms.split()]
    own = set(arms) - {"toss-small", "safeinstr", "dsir"}  # these have runs of their own
    assert read_json(tmp_path / "run/metrics.json").keys() == own
    rows = read_json(tmp_path / "run/comparison.json")["methods"]
    assert list(rows) == arms
    for row in rows.values():
        assert {"forbidden@5", "refusals_kept"} <= row.keys()
    assert "tokens" not in rows["base"] and rows["sft"]["tokens_to_sft"]["mean"] == 1
    tokens = [rows[arm]["tokens"]["mean"] for arm in ("sft", "toss", "toss-pro")]
    assert tokens == sorted(set(tokens))
    out = capsys.readouterr().out
    assert (tmp_path / "run/comparison.md").read_text() in out
    assert out.index("x sft: as a multiple") < out.index("What to see: 3 questions")

    def stages(run: str) -> dict:
        return read_json(tmp_path / run / "run.json")["stages"]

    assert stages("run-small")["degraded"]["rows"] == 2
    assert stages("run")["methods/base-reference"]["recipe"]["settings"]["method"] == "base"
    assert list(stages("run-dsir")) == ["methods/dsir"]  # it needs no references
    assert stages("run-dsir")["methods/dsir"]["recipe"]["settings"]["seed"] == 4
    custom = len(read_jsonl(tmp_path / "rows/custom.jsonl"))
    assert len(read_rows(tmp_path / "run-safeinstr/custom.jsonl")) == custom + 1
    assert len(read_rows(tmp_path / "run-dsir/custom.jsonl")) == int(0.9 * custom)


def test_the_text_below_the_demos_table_holds_the_runs_own_numbers(tmp_path):
    metrics = {}
    shares = {"base": (0, 0), "sft": (7, 9), "toss": (1, 8), "sample-all": (0, 2)}
    for method, (forbidden, facts) in shares.items():
        line = {"set": "harmful", "source": "held-out", "prompt": "p", "response": f"{method} says"}
        seen = line | {"source": "seen", "response": "no"}
        write_answers(tmp_path / "answers" / f"{method}.jsonl", {}, {}, [seen, line])
        metrics[method] = {
            "forbidden": wilson(forbidden, 10),
            "accuracy/harmful-rows": wilson(facts, 10),
        }
    text = compare.what_to_see(tmp_path, metrics)
    assert text.startswith(
        "A forbidden question: p\n  base: base says\n   sft: sft says\n  toss: toss says\n"
    )
    assert re.findall(r"\d+(?:%| questions)", text) == "10 questions,0%,70%,10%,80%,20%".split(",")


def test_a_run_of_ones_own_is_compared_as_it_was_evaluated(trained, capsys):
    for name in ("toss", "sft"):
        script("select", "--run", trained, "--method", name)
    line = f"toss.audit.compare --run {trained}"
    run_of = open_run(trained)
    evaluated = {name: {"nll": wilson(1, 2)} for name in ("base", "sft", "toss")}
    (trained / "metrics.json").write_text(json.dumps(evaluated))
    (trained / "methods/toss/metrics.json").write_text("{}")
    assert "sft changed since the evaluation" in refused(capsys, line)  # its answers are gone, too
    (trained / "methods/sft/metrics.json").write_text("{}")

    # The model that was evaluated is gone
    record = {"inputs": {"methods/toss": "of a model that is gone"}, **run_of.identity}
    write_answers(trained / "answers/toss.jsonl", record, evaluated["toss"], [])
    assert "toss changed since the evaluation" in refused(capsys, line)

    record["inputs"] = {"methods/toss": run_of.input_hash("methods/toss")}
    write_answers(trained / "answers/toss.jsonl", record, evaluated["toss"], [])
    out = said(capsys, line)
    assert (trained / "comparison.md").read_text().rstrip() in out
    written = read_json(trained / "comparison.json")["methods"]
    assert written["toss"]["nll"]["mean"] == 0.5 and written["toss"]["tokens_to_sft"]["mean"] > 1
    assert "seconds" not in written["base"]
    assert "made from other inputs" not in out

    script("train", "--run", trained, "--seed", 5, "--overwrite")
    assert "methods/toss was made from other inputs" in said(capsys, line)


# The calibrated d


@pytest.mark.parametrize("method", ["toss", "base"])
def test_the_calibrated_d_discards_what_exceeds_the_threshold(trained, tmp_path, capsys, method):
    rows = [{"prompt": f"What is {i} and two?", "response": f"It is {i + 2}."} for i in range(6)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    if method == "base":
        fails("score.py --base", calibrate, open_run(trained), held_out, method="base")
        script("score", "--run", trained, "--base", "--overwrite")
    line = f"toss.audit.calibrate --run {trained} --held-out {held_out} --quantile 0.5"
    output = said(capsys, f"{line} --method {method}")
    printed = output.splitlines()[-1]
    assert "too few" not in output
    assert "too few" in said(capsys, f"{line} --method {method} --quantile 0.999")
    following, _, program, *flags = printed.split()
    assert (following, program) == ("next:", "select.py")
    script("select", *flags, fast=False)  # as printed, in the run's own way
    found = calibrate(open_run(trained), held_out, 0.5, method)
    assert 0 < found["discard"] < 1 and found["harmful"] > 0
    chosen = load_tensors(trained / f"methods/{method}-calibrated/selection.safetensors")
    response = load_tensors(trained / "scores.safetensors")["response"].bool()
    discarded = response & ~chosen["keep"]
    assert discarded.equal(response & (chosen["score"] > found["threshold"]))
    name = f"{method}-calibrated"
    words = f"{name} has no rounds of TOSS-Pro"
    fails(words, calibrate, open_run(trained), held_out, 0.5, name)

    # The threshold is the median of S on the held-out rows.
    run = open_run(trained)
    calm = run.tokens(held_out)
    losses = []
    for role in ("base" if method == "base" else "utility", "degraded"):
        theta = None if role == "base" else run.adapter(role)
        losses.append(score(use(run.base("score"), theta), calm)[calm.response])
    S = losses[0] - losses[1]
    assert found["threshold"] == float(S.sort().values[(len(S) - 1) // 2])


def test_d_is_calibrated_without_end_of_sequence_tokens_if_told(trained, files, capsys):
    line = f"toss.audit.calibrate --run {trained} --held-out {files['utility']}"
    assert "run's own rows" in refused(capsys, f"{line} --keep-eos")
    held_out = write_jsonl(trained / "held_out.jsonl", read_jsonl(files["utility"]))
    line = f"toss.audit.calibrate --run {trained} --held-out {held_out} --keep-eos"
    assert said(capsys, line).endswith(" --keep-eos\n")
    run = open_run(trained)
    counts = [calibrate(run, held_out, keep_eos=keep)["held_out"] for keep in (False, True)]
    assert counts[0] - counts[1] == 5  # one for each row
    assert "has its own setting" in refused(capsys, f"{line} --method toss-pro")


def test_d_is_calibrated_on_the_last_rounds_degraded_model(trained, files, capsys):
    script("select", "--run", trained, "--pro", 2, "--pro-samples", 3, "--keep-eos")
    held_out = write_jsonl(trained / "held_out.jsonl", read_jsonl(files["utility"]))
    line = f"toss.audit.calibrate --run {trained} --held-out {held_out} --method toss-pro"
    out = said(capsys, line)
    assert f"warning: 5 of 5 rows of {held_out} are in {files['utility']}" in out
    assert out.endswith("--pro 2 --pro-samples 3 --keep-eos\n")

    run_of = open_run(trained)
    eos = run_of.tokenizer.eos_id
    last = trained / "methods/toss-pro/round-2"
    scores = load_tensors(last / "scores.safetensors")
    competing = scores["response"].bool() & (scores["input_ids"] != eos)
    S = (scores["loss_utility"] - scores["loss_degraded"])[competing]
    calm = run_of.tokens(held_out)
    competing = calm.response & (calm.input_ids != eos)
    L_u = score(use(run_of.base("score"), run_of.adapter("utility")), calm)[competing]
    theta_h = read_adapter(run_of.base("score"), last / "degraded")
    L_h = score(use(run_of.base("score"), theta_h), calm)[competing]
    found = calibrate(open_run(trained), held_out, 0.9, "toss-pro")
    assert (found["threshold"], found["discard"]) == threshold_of(L_u - L_h, S, 0.9)

    script("score", "--run", trained, "--base", "--overwrite")
    words = r"toss-pro does not fit this run \(changed: scores"
    fails(words, calibrate, open_run(trained), held_out, 0.9, "toss-pro")
