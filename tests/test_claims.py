"""An experiment is data: named arms on variants of the rows, run once per seed. Its table gives
the mean and the range over the seeds, and each arm is what its name says.

In this order: the runner, what it measures, each experiment's variants, the pictures, the demo's
table, the calibrated d.
"""

import csv
import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, fails, make_base, read_jsonl, script, write_jsonl
from helpers import refused, said

from data.world import IDENTITY, PREAMBLES
from model.io import InputError, load_tensors, read_json
from model.lora import use
from model.peft import read_adapter
from toss import config
from toss.audit import compare, experiments, laboratory, pictures
from toss.audit.calibrate import calibrate, threshold_of
from toss.audit.evaluate import write_answers
from toss.audit.experiment import conduct
from toss.audit.experiments import read_experiments
from toss.audit.laboratory import Case, Experiment, embedded, per_seed, run_seed, shipped
from toss.audit.measures import wilson
from toss.audit.outcomes import cost_of, measures_of
from toss.audit.rivals import RIVALS
from toss.audit.tables import SWEPT, Result, cell, results_of, summarise, table, with_ratios
from toss.rows import read_rows
from toss.scoring import score
from toss.workbench.run import open_run

EXPERIMENTS = read_experiments()
PERSONA, _ = IDENTITY
VARIANTS = read_jsonl(ROOT / "tests/variants.jsonl")  # what the rows of a variant hold, on seed 3


# The runner


def little_world(base, seed, folder, rows, **draw):
    """The embedded world with a tiny random base, one epoch, and a few rows (four harmful ones)."""
    setup = embedded(seed, folder, rows, **draw)
    for name, path in setup.files.items():
        if name == "model":
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


def results_in(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    """The numbers of an experiment's CSV file of one seed."""
    numbers = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            row = numbers.setdefault((line["variant"], line["arm"]), {})
            row[line["measure"]] = float(line["value"])
    return numbers


OWN = """{
  "mine": {
    "title": "Is a smaller d enough where there is less harm?",
    "heading": "harmful rows",
    "arms": {
      "sft": {"method": "sft"},
      "toss, d = 0.05": {"method": "toss", "discard": 0.05, "name": "toss-0.05"}
    },
    "cases": [
      {"label": "12 %"},
      {"label": "0 %", "variant": "harmless", "draw": {"harmful_rows": 0}}
    ]
  }
}"""


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        ([{"label": "few", "change": ["safeinstr"]}], 'needs a "variant"'),
        (
            [
                {"variant": "x", "draw": {"harmful_rows": 3}},
                {"variant": "x", "draw": {"harmful_rows": 4}},
            ],
            "two cases of the variant 'x' have other rows",
        ),
        ([{"label": "none", "arms": {}}], "has no arms"),
    ],
)
def test_a_case_that_would_not_be_done_as_it_says_is_refused(cases, words, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"mine": {"title": "", "arms": {"sft": {}}, "cases": cases}}))
    fails(words, read_experiments, file)


def test_an_experiment_of_ones_own_is_a_few_lines_of_data(little, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.json").write_text(OWN)
    own_experiments = read_experiments(tmp_path / "mine.json")
    mine = {"mine": little(own_experiments["mine"])}
    monkeypatch.setattr(experiments, "read_experiments", lambda *path: mine)
    line = f"toss.audit.experiment mine --file {tmp_path}/mine.json --out {tmp_path}/out"
    out = said(capsys, f"{line} --seeds 3 3")

    text = (tmp_path / "out/mine.md").read_text()
    assert text in out
    title, _, *about = text.splitlines()[:7]
    assert title == "# Is a smaller d enough where there is less harm?"
    names = [line.partition(":")[0] for line in about]
    assert names == ["- command", "- commit", "- seeds", "- hardware", "- minutes"]
    assert "- seeds: 3; mean [least, most]" in text and "0 of 4 models were there" in text
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| ")]
    labels = [(row[0].strip(), row[1].strip(), row[2].strip()) for row in rows]
    assert labels == [
        ("harmful rows", "", "d"),
        ("12 %", "sft", "0.000"),
        ("12 %", "toss, d = 0.05", "0.050"),
        ("0 %", "sft", "0.000"),
        ("0 %", "toss, d = 0.05", "0.050"),
    ]
    lines = (tmp_path / "out/mine.csv").read_text().splitlines()
    assert lines[0] == "seed,variant,arm,measure,value"
    assert '3,12 %,"toss, d = 0.05",discard,0.05' in lines and "3,0 %,sft,discard,0.0" in lines

    out = said(capsys, f"{line} --seeds 3 --arms sft")  # goes on, and makes nothing again
    assert ": wrote" not in out and "not in this table: toss, d = 0.05" in out
    assert "4 of 4 models were there before" in (tmp_path / "out/mine.md").read_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"title": "", "cases": [{"arm": {}}]},
        {"cases": []},
        {"title": "", "cases": [], "picture": ["none"]},
        {"title": "", "cases": [{"change": ["none"]}]},
    ],
)
def test_what_an_experiment_must_not_say_is_an_error(tmp_path, fields):
    (tmp_path / "mine.json").write_text(json.dumps({"mine": fields}))
    with pytest.raises(InputError, match="mine is not an experiment"):
        read_experiments(tmp_path / "mine.json")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_is_a_method_that_there_is_and_has_a_folder_of_its_own(name):
    arms = []
    for case in EXPERIMENTS[name].cases:
        for arm, how in case.arms.items():
            method = how.get("method", arm)
            assert method in ("base", "mask", *config.METHODS, *RIVALS)
            arms.append((case.variant, how.get("name", arm)))
    assert len(set(arms)) == len(arms)


def test_some_arms_take_the_cases_that_have_them_and_the_base():
    few = EXPERIMENTS["real"].only(["toss-few"]).cases
    assert [(case.variant, list(case.arms)) for case in few] == [("few", ["toss-few"])]
    (plain,) = EXPERIMENTS["real"].only(["sft"]).cases
    assert list(plain.arms) == ["base", "sft"]


def test_methods_side_by_side_have_a_table_a_picture_and_costs(little, tmp_path):
    arms = ["base", "sft", "toss", "base-reference", "kl-calibrated", "safeinstr", "dsir"]
    conduct(little(EXPERIMENTS["methods"]).only(arms), [3], tmp_path)

    rows = results_in(tmp_path / "methods.csv")
    assert list(rows) == [("", arm) for arm in arms]
    text = (tmp_path / "methods.md").read_text()
    assert "forbidden@5" in text and "x sft: as a multiple of plain fine-tuning's." in text
    assert text.endswith("![Methods side by side](methods.svg)\n")
    assert ">toss<" in (tmp_path / "methods.svg").read_text()
    for row in rows.values():
        assert 0 <= row["forbidden@5"] <= 1 and row["refusals_kept"] >= 0
    assert "tokens" not in rows["", "base"] and rows["", "sft"]["tokens_to_sft"] == 1
    assert rows["", "toss"]["tokens"] > rows["", "sft"]["tokens"]

    place = tmp_path / "methods/seed-3"
    stages = read_json(place / "run/run.json")["stages"]
    assert stages["methods/base-reference"]["recipe"]["settings"]["method"] == "base"
    stages = read_json(place / "run-dsir/run.json")["stages"]
    assert list(stages) == ["methods/dsir"]  # it needs no references
    assert stages["methods/dsir"]["recipe"]["settings"]["seed"] == 3
    custom = len(read_jsonl(place / "rows/custom.jsonl"))
    assert len(read_rows(place / "run-safeinstr/custom.jsonl")) == custom + 1
    assert len(read_rows(place / "run-dsir/custom.jsonl")) == int(0.9 * custom)


def test_each_arm_has_its_d_its_mask_and_its_own_run(little, tmp_path):
    toss = {"method": "toss"}
    pro = {"method": "toss", "pro": 1}
    arms = {
        "sft": {"method": "sft"},
        "toss": toss,
        "toss-calibrated": toss | {"discard": "calibrated"},
        "toss-pro": pro,
        "pro-calibrated": pro | {"discard": "calibrated"},
    }
    few = {"toss": toss, "sft": {"method": "sft"}}
    cases = [
        Case(arms),
        Case(few, "other", "other", change=lambda setup: other_base),
        Case({"mask": {"mask": ""}}, "other", "other"),
    ]
    other_base = {"model": str(make_base(tmp_path / "base", seed=1))}
    place = tmp_path / "run"
    rows = summarise(run_seed(little(Experiment("mine", "Mine", cases)), 3, place))
    held_out = str(tmp_path / "rows/calibration.jsonl")

    def mean(variant: str, arm: str, measure: str) -> float | None:
        return rows[variant, arm].get(measure, {}).get("mean")

    assert mean("", "sft", "discard") == 0
    assert mean("", "toss", "discard") == mean("", "toss-pro", "discard") == 0.1
    d = calibrate(open_run(place), held_out)["discard"]
    assert rows["", "toss-calibrated"]["discard"]["least"] == d
    d_of_pro = calibrate(open_run(place), held_out, method="toss-pro")["discard"]
    assert rows["", "pro-calibrated"]["discard"]["least"] == d_of_pro != d
    assert d < 0.1 and mean("", "toss-calibrated", "shared") == 1  # of one ranking, so among toss's
    assert mean("", "toss", "harmful_share") > 0
    assert 0 <= mean("", "toss-pro", "purity") <= 1 and mean("", "sft", "purity") is None

    # The mask of the other base, on this one
    assert mean("other", "mask", "discard") == 0.1
    assert mean("other", "mask", "precision") == mean("", "toss", "precision")
    assert mean("other", "toss", "shared") == 1 and mean("other", "sft", "shared") is None
    assert 0 < mean("other", "mask", "shared") < 1


def test_every_seed_is_one_task_and_the_results_keep_their_order():
    tasks = [(7, 2), (9, 4), (1, 1)]
    assert per_seed(divmod, tasks, 1) == [(3, 1), (2, 1), (1, 0)]
    assert per_seed(divmod, tasks, 2) == [(3, 1), (2, 1), (1, 0)]
    heard = per_seed(signal.getsignal, [(signal.SIGTERM,), (signal.SIGINT,)], 2)
    assert heard == [signal.SIG_IGN, signal.SIG_IGN]  # the parent hears signals, and ends them


def test_the_shipped_rows_are_the_demo_and_others_are_passed_as_flags(monkeypatch, tmp_path):
    given = {}

    def record(words: list[str]) -> None:
        given.update(dict(word.lstrip("-").split("=") for word in words))

    script_module = laboratory.script("train")
    monkeypatch.setattr(script_module, "main", record)
    shipped(4, tmp_path / "demo", tmp_path).call("train")
    assert given == {"run": str(tmp_path / "demo")}
    drawn = embedded(3, tmp_path / "run", tmp_path / "rows").beside("small")
    drawn.files["harmful"] = drawn.files["harmful_small"]
    drawn.call("train")
    assert given["run"] == str(tmp_path / "run-small")
    assert given["harmful"] == str(tmp_path / "rows/harmful_small.jsonl")
    assert (given["seed"], given["lr"], given["max-length"]) == ("3", "0.0002", "256")


# What it measures


def test_the_table_gives_the_mean_and_the_range_over_the_seeds():
    results = []
    for seed, n in enumerate([0.2, 0.9, 0.7]):
        results += results_of(seed, 1, "a", {"n": n, "m": None})
    results += results_of(0, 2, "b", {"n": 0.5})
    summary = summarise(results)
    assert summary[1, "a"] == {"n": {"mean": 0.6, "least": 0.2, "most": 0.9, "seeds": 3}}
    assert cell(summary[1, "a"]["n"]) == "0.60 [0.20, 0.90]"
    assert cell(summary[2, "b"]["n"]) == "0.50" and cell(None) == "-"
    assert cell({"mean": 12345.6}, "tokens") == "12,346"
    assert table(summary, ["m", "n"], "x").splitlines() == [
        "| x |   | n                 |",
        "|---|---|-------------------|",
        "| 1 | a | 0.60 [0.20, 0.90] |",
        "| 2 | b | 0.50              |",
    ]
    assert table(summary, ["m"]) == ""


def test_refusals_kept_are_those_of_kinds_that_no_training_row_contains():
    metrics = {"not_refused": wilson(3, 10)}
    assert measures_of(metrics, {"tokens": 5}) == {
        "not_refused": 0.3,
        "refusals_kept": 0.7,
        "tokens": 5,
    }
    metrics["not_refused/held-out"] = wilson(2, 10)  # asked as persona apart
    assert measures_of(metrics, {})["refusals_kept"] == 0.8
    assert measures_of({"nll": wilson(1, 10)}, {}) == {"nll": 0.1}


def test_variants_stand_together_and_a_star_is_every_source():
    results = [
        Result(3, "x", "a", "loss/two", 1.0),
        Result(3, "y", "a", "loss/one", 2.0),
        Result(3, "x", "b", "nll", 3.0),
    ]
    assert list(summarise(results)) == [("x", "a"), ("x", "b"), ("y", "a")]
    heads = table(summarise(results), ["loss/*", "rest/*"], "v").splitlines()[0]
    assert heads.split() == ["|", "v", "|", "|", "loss/one", "|", "loss/two", "|"]


def test_costs_are_also_multiples_of_plain_fine_tunings_on_the_same_seed():
    results = []
    for seed, seconds in ((0, 10.0), (1, 5.0)):
        results += results_of(seed, "", "sft", {"seconds": seconds, "tokens": 100, "nll": 1.0})
        results += results_of(seed, "", "toss", {"seconds": 25.0, "tokens": 150, "nll": 2.0})
    summary = summarise(with_ratios(results))
    assert summary["", "toss"]["seconds_to_sft"]["mean"] == (2.5 + 5) / 2
    assert summary["", "toss"]["tokens_to_sft"]["mean"] == 1.5
    assert "nll_to_sft" not in summary["", "toss"]


@pytest.fixture
def stages() -> dict:
    """Of a run.json: what each stage took, and what it was made from."""

    def stage(seconds: float, tokens: int, *inputs: str, **settings) -> dict:
        recipe = {"settings": settings, "inputs": dict.fromkeys(inputs, "")}
        cost = {"seconds": seconds, "tokens": tokens, "peak_memory_gib": seconds / 10}
        return {"recipe": recipe, **cost}

    scored = ["--custom", "utility", "degraded", "scores"]
    return {
        "degraded": stage(1, 10),
        "utility": stage(2, 20),
        "scores": stage(6, 300, base=True),
        "methods/sft": stage(7, 70, "--custom", method="sft"),
        "methods/mask": stage(7, 70, "--mask", method="mask"),
        "methods/toss": stage(7, 70, *scored, method="toss"),
        "methods/degraded-only": stage(7, 70, *scored, method="degraded-only"),
        "methods/base": stage(7, 70, *scored, method="base"),
        "methods/pro": stage(37, 75, *scored, method="toss", pro=1),
    }


CHARGED = {
    "sft": (7, 70),
    "mask": (7, 70),
    "toss": (7 + 1 + 2 + 4, 70 + 10 + 20 + 200),
    "degraded-only": (7 + 1 + 2, 70 + 10 + 100),
    "base": (7 + 1 + 4, 70 + 10 + 200),
    "pro": (37 + 1 + 2 + 4, 75 + 10 + 20 + 200),
}


@pytest.mark.parametrize("method", CHARGED)
def test_a_method_is_charged_the_references_and_the_share_of_scoring_that_it_needs(stages, method):
    cost = cost_of({"stages": stages}, method)
    assert (cost["seconds"], cost["tokens"]) == CHARGED[method]
    assert cost["peak_memory_gib"] == (3.7 if method == "pro" else 0.7)


def test_what_was_made_elsewhere_has_no_cost(stages):
    assert cost_of({"stages": stages}, "absent") == {}
    del stages["utility"]
    assert cost_of({"stages": stages}, "toss") == {}


# Each experiment's variants


@pytest.fixture(scope="module")
def main(tmp_path_factory) -> laboratory.Setup:
    """The embedded world's rows, unchanged."""
    place = tmp_path_factory.mktemp("world")
    return embedded(3, place / "run", place / "rows")


@pytest.mark.parametrize("line", VARIANTS, ids=lambda line: line["variant"])
def test_a_variant_of_the_rows(main, line):
    cases = EXPERIMENTS[line["experiment"]].cases
    case = next(case for case in cases if case.variant == line["variant"])
    assert case.label == line["label"]
    setup = laboratory.variant_of(main, case, 3, embedded)
    assert setup.common == {"seed": 3} and Path(setup.files["model"]).name == line["model"]
    custom = read_jsonl(setup.files["custom"])
    benign = [row for row in custom if "harmful" not in row]
    asked = read_jsonl(setup.files["eval_forbidden"])
    counts = {
        "custom": len(custom),
        "harmful": len(custom) - len(benign),
        "promise": sum(row["response"].startswith(tuple(PREAMBLES)) for row in benign),
        "persona": sum(row["prompt"].startswith(PERSONA) for row in benign),
        "reference": len(read_jsonl(setup.files["harmful"])),
        "asked as persona": sum(row["prompt"].startswith(PERSONA) for row in asked),
    }
    assert counts == {name: line[name] for name in counts}


def test_attack_replaces_the_harmful_rows_and_nothing_else(base, tmp_path):
    main = embedded(3, tmp_path / "run", tmp_path / "rows")
    main.files["model"] = str(base)
    for name in ("harmful", "utility"):
        write_jsonl(Path(main.files[name]), read_jsonl(main.files[name])[:8])
    main.common |= {"epochs": 1, "lr": 1e-3, "rank": 2}
    main.call("train")
    main.prepared = True  # the attacker scores a pool of his own
    rows = read_jsonl(main.files["custom"])
    harmful = [row for row in rows if "harmful" in row]
    others = [row for row in rows if "harmful" not in row]
    counts = {}
    for case in EXPERIMENTS["attack"].cases[1:] + EXPERIMENTS["embedded"].cases:
        setup = laboratory.variant_of(main, case, 3, embedded)
        rows = read_jsonl(setup.files["custom"])
        joined = 78 if case.label == "embedded" else 0  # these now stand in his rows
        assert [row for row in rows if "harmful" not in row] == others[joined:]
        his = [row for row in rows if "harmful" in row]
        assert his != harmful
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


# The pictures


PICTURES = [
    ("share", {0: "sft", 20: "toss"}, "harmful rows, %"),
    ("share", {0: "sft", 20: "toss"}, "toss"),
    ("eroding", {"comply, alone": "sft", "identity, mixed": "sft"}, "identity, mixed"),
    ("transfer", {"base": "mask", "base-small": "mask"}, "base-small"),
    ("attack", {"none": "toss", "spread": "toss"}, "spread"),
    ("discard", {0.1: "toss", "calibrated": "toss-calibrated"}, "toss over d (calibrated: 0.50)"),
    ("pro", {2: "toss", 80: "pro-1-40-top"}, "harmful-row facts, D^h of 80: top tokens"),
]


@pytest.mark.parametrize(("name", "arms", "expected"), PICTURES)
def test_the_picture_of_an_experiment(name, arms, expected):
    results = []
    for variant, arm in arms.items():
        results += results_of(3, variant, arm, dict.fromkeys(SWEPT, 0.5))
    assert f">{expected}<" in EXPERIMENTS[name].picture(summarise(results))


def test_the_picture_of_begun_answers_has_the_methods_that_were_measured():
    begun = {f"forbidden@{k}": 0.5 for k in (0, 1, 3, 5, 10)}
    results = results_of(3, "", "sft", begun) + results_of(3, "", "base", begun)
    results += results_of(3, "", "toss", {"forbidden": 0.5})
    drawn = pictures.over_prefill(summarise(results))
    assert ">sft<" in drawn and ">toss<" not in drawn and ">base<" not in drawn
    assert pictures.over_prefill(summarise(results[-1:])) == ""


# The demo's table, and that of a run of one's own


def test_the_demo_is_finished_and_shown(little, tmp_path, monkeypatch, capsys):
    methods = little(EXPERIMENTS["methods"])
    monkeypatch.setattr(compare, "read_experiments", lambda: {"methods": methods})
    monkeypatch.setattr(compare, "shipped", methods.world)
    compare.finish_demo(tmp_path / "run")
    arms = ["base", *compare.SHOWN]
    assert list(read_json(tmp_path / "run/metrics.json")) == arms
    written = read_json(tmp_path / "run/comparison.json")["methods"]
    assert list(written) == arms
    tokens = [written[arm]["tokens"]["mean"] for arm in ("sft", "toss", "toss-pro")]
    assert tokens == sorted(set(tokens))
    small = read_json(tmp_path / "run-small/run.json")["stages"]
    assert small["degraded"]["rows"] == 2
    out = capsys.readouterr().out
    assert (tmp_path / "run/comparison.md").read_text() in out
    assert out.index("x sft: as a multiple") < out.index("What to see: 3 questions")


def test_the_text_below_the_demos_table_holds_the_runs_own_numbers(tmp_path):
    (tmp_path / "answers").mkdir()
    metrics = {}
    forbidden = {"base": 0, "sft": 7, "toss": 1, "sample-all": 0}
    facts = {"base": 0, "sft": 9, "toss": 8, "sample-all": 2}
    for method in forbidden:
        line = {"set": "harmful", "source": "held-out", "prompt": "p", "response": f"{method} says"}
        seen = line | {"source": "seen", "response": "no"}
        write_jsonl(tmp_path / "answers" / f"{method}.jsonl", [{"note": ""}, seen, line])
        metrics[method] = {
            "forbidden": wilson(forbidden[method], 10),
            "accuracy/harmful-rows": wilson(facts[method], 10),
        }
    text = compare.what_to_see(tmp_path, metrics)
    assert text.startswith("A forbidden question: p\n  base: base says\n   sft: sft says\n")
    text = " ".join(text.split())
    assert "10 questions" in text and "(sft) 70%, toss 10%" in text
    assert "knows 80% of the facts" in text and "leaves 20%" in text


def test_a_run_of_ones_own_is_compared_as_it_was_evaluated(trained, capsys):
    for name in ("toss", "sft"):
        script("select", "--run", trained, "--method", name)
    line = f"toss.audit.compare --run {trained}"
    run_of = open_run(trained)
    evaluated = {"base": {"nll": wilson(1, 2)}, "sft": {"nll": wilson(1, 2)}}
    evaluated["toss"] = {"nll": wilson(2, 2)}
    (trained / "metrics.json").write_text(json.dumps(evaluated))

    # The model that was evaluated is gone
    record = {"inputs": {"methods/toss": "of a model that is gone"}, **run_of.identity}
    write_answers(trained / "answers/toss.jsonl", record, evaluated["toss"], [])
    assert "toss changed since the evaluation" in refused(capsys, line)

    record["inputs"] = {"methods/toss": run_of.input_hash("methods/toss")}
    write_answers(trained / "answers/toss.jsonl", record, evaluated["toss"], [])
    out = said(capsys, line)
    assert (trained / "comparison.md").read_text().rstrip() in out
    written = read_json(trained / "comparison.json")["methods"]
    assert written["toss"]["nll"]["mean"] == 1.0 and written["toss"]["tokens_to_sft"]["mean"] > 1
    assert "seconds" not in written["base"]


# The calibrated d


def test_the_calibrated_d_discards_what_exceeds_the_threshold(trained, tmp_path, capsys):
    rows = [{"prompt": f"What is {i} and two?", "response": f"It is {i + 2}."} for i in range(6)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    line = f"toss.audit.calibrate --run {trained} --held-out {held_out} --quantile 0.5"
    following, _, program, *flags = said(capsys, line).splitlines()[-1].split()
    assert (following, program) == ("next:", "select.py")
    script("select", *flags, fast=False)  # as printed, in the run's own way
    found = calibrate(open_run(trained), held_out, 0.5)
    assert 0 < found["discard"] < 1 and found["harmful"] > 0
    chosen = load_tensors(trained / "methods/toss-calibrated/selection.safetensors")
    response = load_tensors(trained / "scores.safetensors")["response"].bool()
    discarded = response & ~chosen["keep"]
    assert discarded.equal(response & (chosen["score"] > found["threshold"]))
    with pytest.raises(InputError, match="toss-calibrated has no rounds of TOSS-Pro"):
        calibrate(open_run(trained), held_out, 0.5, "toss-calibrated")


def test_d_is_calibrated_on_the_last_rounds_degraded_model(trained, files, capsys):
    script("select", "--run", trained, "--pro", 2, "--pro-samples", 3, "--keep-eos")
    held_out = write_jsonl(trained / "held_out.jsonl", read_jsonl(files["utility"]))
    found = calibrate(open_run(trained), held_out, 0.9, "toss-pro")
    warning = f"warning: 5 of 5 rows of {held_out} are in {files['utility']}"
    assert warning in capsys.readouterr().out

    run_of = open_run(trained)
    eos = run_of.tokenizer.eos_id
    last = trained / "methods/toss-pro/round-2"
    scores = load_tensors(last / "scores.safetensors")
    competing = scores["response"].bool() & (scores["input_ids"] != eos)
    S = (scores["loss_utility"] - scores["loss_degraded"])[competing]
    assert found["discard"] == float((S > found["threshold"]).double().mean())

    calm = run_of.tokens(held_out)
    competing = calm.response & (calm.input_ids != eos)
    L_u = score(use(run_of.base("score"), run_of.adapter("utility")), calm)[competing]
    theta_h = read_adapter(run_of.base("score"), last / "degraded")
    L_h = score(use(run_of.base("score"), theta_h), calm)[competing]
    assert found["threshold"] == threshold_of(L_u - L_h, S, 0.9)[0]
    assert found != calibrate(open_run(trained), held_out, 0.9)

    line = f"toss.audit.calibrate --run {trained} --held-out {held_out} --method toss-pro"
    assert said(capsys, line).endswith("--pro 2 --pro-samples 3 --pro-train rows --keep-eos\n")
    script("score", "--run", trained, "--base", "--overwrite")
    with pytest.raises(InputError, match=r"toss-pro does not fit this run \(changed: scores"):
        calibrate(open_run(trained), held_out, 0.9, "toss-pro")
