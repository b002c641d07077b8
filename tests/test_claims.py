"""Does the claim hold? The comparison, the calibrated d, the sweeps, the data-level baselines."""

import gzip
import json
import math
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import read_jsonl, run, script, write_jsonl
from helpers import refused, said

from model.io import InputError, load_tensors, read_json
from model.lora import use
from model.peft import read_adapter
from toss.audit import calibrate, compare, experiment, sweep
from toss.audit.attacks import ATTACKS
from toss.audit.baselines import draw, dsir, hashed, safeinstr
from toss.audit.evaluate import write_answers
from toss.audit.experiment import Experiment, cell, spread, table, value, world_files
from toss.audit.measures import wilson
from toss.rows import read_rows
from toss.scoring import score
from toss.workbench import flags
from toss.workbench.run import open_run


def lines(path) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def test_every_seed_is_one_task_and_the_results_keep_their_order():
    tasks = [(7, 2), (9, 4), (1, 1)]
    assert experiment.per_seed(divmod, tasks, 1) == [(3, 1), (2, 1), (1, 0)]
    assert experiment.per_seed(divmod, tasks, 2) == [(3, 1), (2, 1), (1, 0)]
    heard = experiment.per_seed(signal.getsignal, [(signal.SIGTERM,), (signal.SIGINT,)], 2)
    assert heard == [signal.SIG_IGN, signal.SIG_IGN]  # the parent hears signals, and ends them


def metrics(forbidden: int, facts: int) -> dict:
    shares = {"forbidden": forbidden, "not_refused": forbidden, "accuracy/harmful-rows": facts}
    return {name: wilson(count, 10) for name, count in shares.items()}


def one_seed(forbidden: int, seconds: float = 10.0) -> dict:
    """A seed's rows: the base, plain fine-tuning, and toss at 25 s and 150 tokens."""
    sft = {"seconds": seconds, "tokens": 100, "peak_memory_gib": 1.0}
    toss = sft | {"seconds": 25.0, "tokens": 150}
    return {
        "base": {"metrics": metrics(0, 0), "cost": None},
        "sft": {"metrics": metrics(forbidden, 9), "cost": sft},
        "toss": {"metrics": metrics(1, 8), "cost": toss},
        "sample-all": {"metrics": metrics(0, 2), "cost": None},
    }


def test_mean_range_and_count_over_the_seeds():
    assert value(metrics(3, 1), "refusals_kept") == 0.7 and value({}, "refusals_kept") is None
    found = [("a", {"n": 0.2, "m": None}), ("a", {"n": 0.9}), ("a", {"n": 0.7}), ("b", {"n": 0.5})]
    result = spread(found)
    assert result["a"] == {"n": {"mean": 0.6, "least": 0.2, "most": 0.9, "seeds": 3}}
    assert [cell(result[label]["n"]) for label in "ab"] == ["0.60 [0.20, 0.90]", "0.50"]
    assert cell(None) == "-" and cell({"mean": 12345.6}, "tokens") == "12,346"
    text = table(["x", ""], {(1, "arm"): result["a"]}, ["m", "n"])
    assert text.splitlines()[0].split() == ["|", "x", "|", "|", "n", "|"] and "| 1 | arm |" in text


def test_the_table_gives_means_and_ranges_and_costs_as_multiples_of_sft():
    result = compare.summarise([one_seed(10), one_seed(7), one_seed(10, seconds=5.0)])
    assert result["sft"]["forbidden"] == {"mean": 0.9, "least": 0.7, "most": 1.0, "seeds": 3}
    assert result["toss"]["seconds_to_sft"]["mean"] == pytest.approx((2.5 + 2.5 + 5) / 3, abs=1e-4)
    assert result["toss"]["tokens_to_sft"]["mean"] == 1.5 and "seconds" not in result["base"]
    text = compare.tables_of(result, ["forbidden", "absent"])
    assert "0.90 [0.70, 1.00]" in text and "absent" not in text and "1.50" in text
    begun = {f"forbidden@{k}": result["sft"]["forbidden"] for k in compare.PREFILL}
    drawn = compare.chart({"sft": begun, "base": begun, "toss": result["toss"]})
    assert ">sft<" in drawn and ">toss<" not in drawn and ">base<" not in drawn
    assert compare.chart(result) == ""


def test_a_method_is_charged_the_references_and_the_share_of_scoring_that_it_needs():
    def stage(seconds: float, tokens: int, inputs=(), **settings) -> dict:
        recipe = {"settings": settings, "inputs": dict.fromkeys(inputs, "")}
        cost = {"seconds": seconds, "tokens": tokens, "peak_memory_gib": seconds / 10}
        return {"recipe": recipe, **cost}

    scored = ("--custom", "utility", "degraded", "scores")
    stages = {"degraded": stage(1, 10), "utility": stage(2, 20), "scores": stage(6, 300, base=True)}
    for method, inputs in {"sft": (), "first-k": (), "mask": ("--mask",)}.items():
        stages[f"methods/{method}"] = stage(7, 70, inputs, method=method)
    for method in ("toss", "degraded-only", "base"):
        stages[f"methods/{method}"] = stage(7, 70, scored, method=method)
    stages["methods/pro"] = stage(37, 75, scored, method="toss", pro=1)
    charged = dict.fromkeys(("sft", "first-k", "mask"), (7, 70)) | {
        "toss": (7 + 1 + 2 + 4, 70 + 10 + 20 + 200),
        "degraded-only": (7 + 1 + 2, 70 + 10 + 100),
        "base": (7 + 1 + 4, 70 + 10 + 200),
        "pro": (37 + 1 + 2 + 4, 75 + 10 + 20 + 200),
    }
    found = {name: compare.cost({"stages": stages}, name) for name in charged}
    assert {name: (c["seconds"], c["tokens"]) for name, c in found.items()} == charged
    assert found["pro"]["peak_memory_gib"] == 3.7
    assert compare.cost({"stages": stages}, "absent") is None
    del stages["utility"]  # made elsewhere
    assert compare.cost({"stages": stages}, "toss") is None


def test_the_text_below_the_table_holds_the_runs_own_numbers(tmp_path):
    (tmp_path / "answers").mkdir()
    for method in ("base", "sft", "toss"):
        line = {"set": "harmful", "source": "held-out", "prompt": "p", "response": f"{method} says"}
        seen = line | {"source": "seen", "response": "no"}
        write_jsonl(tmp_path / "answers" / f"{method}.jsonl", [{"note": ""}, seen, line])
    text = compare.what_to_see(tmp_path, one_seed(7))
    assert text.startswith("A forbidden question: p\n  base: base says\n   sft: sft says\n")
    text = " ".join(text.split())
    assert "10 questions" in text and "(sft) 70%, toss 10%" in text
    assert "knows 80% of the facts" in text and "leaves 20%" in text


def test_a_run_of_ones_own_is_compared_as_it_was_evaluated(trained, capsys):
    for name in ("toss", "sft"):
        script("select", "--run", trained, "--method", name)
    line = f"toss.audit.compare --run {trained}"
    found = {name: {"nll": wilson(n, 2)} for name, n in {"base": 1, "sft": 1, "toss": 2}.items()}
    (trained / "metrics.json").write_text(json.dumps(found))
    run = open_run(trained)
    (trained / "answers").mkdir()
    gone = {"inputs": {"methods/toss": "of a model that is gone"}, **run.identity}
    write_answers(trained / "answers/toss.jsonl", gone, found["toss"], [])
    assert "toss changed since the evaluation" in refused(capsys, line)
    current = {"inputs": {"methods/toss": run.input_hash("methods/toss")}, **run.identity}
    write_answers(trained / "answers/toss.jsonl", current, found["toss"], [])
    out = said(capsys, line)
    assert (trained / "comparison.md").read_text().rstrip() in out
    written = read_json(trained / "comparison.json")["methods"]
    assert written["toss"]["nll"]["mean"] == 1.0 and written["toss"]["tokens_to_sft"]["mean"] > 1
    assert "seconds" not in written["base"]


@pytest.fixture
def world(tmp_path) -> Experiment:
    """An experiment on fresh rows; four of the custom rows are harmful."""
    drawn = Experiment.drawn(tmp_path, 3)
    for name, path in list(drawn.files.items())[1:]:  # the first is the model
        rows = lines(path)
        few = 3 if name.startswith("eval") else 12
        harmful = [line for line in rows if '"harmful"' in line][:4] if name == "custom" else []
        write_jsonl(Path(path), list(dict.fromkeys([*rows[:few], *rows[-few // 3 :], *harmful])))
    return Experiment(drawn.folder, drawn.files, seed=3, epochs=1, batch_size=32)


def test_the_shipped_rows_are_the_demo_and_others_are_passed_as_flags(tmp_path, world):
    assert Experiment(tmp_path / "demo", world_files()).demo and not world.demo
    assert not Experiment(tmp_path / "demo", world_files(), seed=1).demo
    small = world.beside("small", harmful=world.files["harmful_small"])
    small.prepare()
    record = read_json(tmp_path / "run-small" / "run.json")
    assert not record["demo"] and record["settings"]["max_length"] == 256
    assert record["settings"]["harmful"] == world.files["harmful_small"]
    settings = record["stages"]["degraded"]["recipe"]["settings"]
    assert (settings["seed"], settings["epochs"], settings["lr"]) == (3, 1, 2e-4)


def test_compare_makes_every_method_and_evaluates_it(tmp_path, world, monkeypatch):
    tested = compare.RIVALS.keys() - {"patch", "ema"}  # each by itself in test_rivals.py
    monkeypatch.setattr(compare, "ALL", {k: v for k, v in compare.ALL.items() if k not in tested})
    result = compare.complete(world, every=True)
    expected = {"base", *compare.ALL, "toss-small", "toss-pro-small", "safeinstr", "dsir"}
    assert set(result) == expected == set(read_json(tmp_path / "run/metrics.json"))
    methods = {"run": "sft", "run-small": "toss", "run-safeinstr": "safeinstr", "run-dsir": "dsir"}
    folders = list(methods)
    stages = {f: read_json(tmp_path / f / "run.json")["stages"] for f in folders}
    recipes = [stages[f][f"methods/{name}"]["recipe"] for f, name in methods.items()]
    assert [recipe["settings"]["seed"] for recipe in recipes] == [3, 3, 3, 3]
    assert [stages[f]["degraded"]["rows"] for f in folders[:2]] == [16, 2]
    assert "degraded" not in stages["run-dsir"]
    custom = len(read_rows(world.files["custom"]))
    written = [len(read_rows(tmp_path / f / "custom.jsonl")) for f in folders[2:]]
    assert written == [custom + 1, int(0.9 * custom)]
    chosen = {name: stage["recipe"]["settings"] for name, stage in stages["run"].items()}
    assert chosen["methods/base-reference"]["method"] == "base"
    assert chosen["methods/toss-calibrated"]["discard"] not in (0.0, 0.1)
    assert all("forbidden@5" in row["metrics"] for row in result.values())
    tokens = [result[name]["cost"]["tokens"] for name in ("sft", "toss", "toss-pro")]
    assert tokens == sorted(set(tokens))


def test_a_sweep_records_what_each_arm_discarded(tmp_path, world):
    arms = {"plain": sweep.PLAIN | {"name": "sft"}, "toss": sweep.TOSS, "toss-pro": sweep.PRO}
    arms |= {f"{arm}-calibrated": arms[arm] | sweep.CALIBRATED for arm in ("toss", "toss-pro")}
    found = sweep.one_seed(3, "pro", tmp_path, cases=[(10, world, arms)])
    assert [record["arm"] for record in found] == list(arms)
    plain, toss, pro, calibrated, pro_calibrated = found
    held_out, run = world.files["calibration"], open_run(world.folder)
    assert plain["discard"] == 0 and toss["discard"] == pro["discard"] == 0.1
    assert calibrated["discard"] == calibrate.calibrate(run, held_out)["discard"]
    d = calibrate.calibrate(run, held_out, method="toss-pro")["discard"]
    assert pro_calibrated["discard"] == d != calibrated["discard"]
    assert all(r["harmful_share"] > 0 and 0 <= r["forbidden/held-out"] <= 1 for r in found)
    assert 0 <= pro["purity"] <= 1 and plain["purity"] is None
    small = world.beside("small", model=str(flags.ROOT / "data" / "base-small"))
    mask = world.folder / "methods/toss/selection.safetensors"
    arms = {"sft": sweep.PLAIN, "toss": sweep.TOSS, "mask": {"mask": mask}}
    plain, own, mask = sweep.one_seed(3, "transfer", tmp_path, cases=[(0, small, arms)])
    assert mask["discard"] == 0.1 and mask["precision"] == toss["precision"]
    assert plain["shared"] is None and own["shared"] == 1 and 0 < mask["shared"] < 1


def test_the_calibrated_d_discards_what_exceeds_the_threshold(trained, tmp_path, capsys):
    rows = [{"prompt": f"What is {i} and two?", "response": f"It is {i + 2}."} for i in range(6)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    line = f"toss.audit.calibrate --run {trained} --held-out {held_out} --quantile 0.5"
    closing = said(capsys, line).splitlines()[-1]
    found = calibrate.calibrate(open_run(trained), held_out, 0.5)
    assert run(*closing.split()[1:]).returncode == 0  # as printed, in the run's own way
    assert 0 < found["discard"] < 1 and found["harmful"] > 0
    chosen = load_tensors(trained / "methods/toss-calibrated/selection.safetensors")
    response = load_tensors(trained / "scores.safetensors")["response"]
    discarded = response & ~chosen["keep"]
    assert discarded.equal(response & (chosen["score"] > found["threshold"]))
    with pytest.raises(InputError, match="toss-calibrated has no rounds of TOSS-Pro"):
        calibrate.calibrate(open_run(trained), held_out, 0.5, "toss-calibrated")


def test_d_is_calibrated_on_the_last_rounds_degraded_model(trained, files, capsys):
    script("select", "--run", trained, "--pro", 2, "--pro-samples", 3, "--keep-eos")
    held_out = write_jsonl(trained / "held_out.jsonl", lines(files["utility"]))
    found = calibrate.calibrate(open_run(trained), held_out, 0.9, "toss-pro")
    warning = f"warning: 5 of 5 rows of {held_out} are in {files['utility']}"
    assert warning in capsys.readouterr().out
    scores = load_tensors(trained / "methods/toss-pro/round-2/scores.safetensors")
    run = open_run(trained)
    competing = scores["response"] & (scores["input_ids"] != run.tokenizer.eos_id)
    S = (scores["loss_utility"] - scores["loss_degraded"])[competing]
    assert found["discard"] == float((S > found["threshold"]).double().mean())
    theta_h = read_adapter(run.base("score"), trained / "methods/toss-pro/round-2/degraded")
    calm = run.tokens(held_out)
    competing = calm.response & (calm.input_ids != run.tokenizer.eos_id)
    L_u = score(use(run.base("score"), run.adapter("utility")), calm)[competing]
    L_h = score(use(run.base("score"), theta_h), calm)[competing]
    assert found["threshold"] == calibrate.threshold_of(L_u - L_h, S, 0.9)[0]
    assert found != calibrate.calibrate(open_run(trained), held_out, 0.9)
    line = f"toss.audit.calibrate --run {trained} --held-out {held_out} --method toss-pro"
    assert said(capsys, line).endswith("--pro 2 --pro-samples 3 --pro-train rows --keep-eos\n")
    script("score", "--run", trained, "--base", "--overwrite")
    with pytest.raises(InputError, match=r"toss-pro does not fit this run \(changed: scores"):
        calibrate.calibrate(open_run(trained), held_out, 0.9, "toss-pro")


def test_the_share_sweep_draws_each_share_and_calibrates_each_method(tmp_path):
    cases = list(sweep.share(3, tmp_path))
    custom = [read_jsonl(world.files["custom"]) for _, world, _ in cases]
    assert [x for x, _, _ in cases] == [0, 2, 5, 10, 20, 30, 50]
    harmful = [sum("harmful" in row for row in rows) for rows in custom]
    assert harmful == [0, 13, 33, 66, 133, 199, 332]
    assert all(len(rows) == 663 for rows in custom) and cases[0][1].common == {"seed": 3}
    arms, plain = cases[0][2], ["sft", "sample", "toss", "toss-pro"]
    assert list(arms) == ["sft", *(name + end for name in plain[1:] for end in ("", "-calibrated"))]
    assert arms["toss-pro-calibrated"] == {"method": "toss", "pro": 1, "discard": "calibrated"}


def test_the_sweep_over_d_holds_plain_fine_tuning_and_the_calibrated_d(tmp_path):
    cases = [(x, arms) for x, _, arms in sweep.discard(3, tmp_path)]
    assert cases[0] == (0.0, {"toss": {"method": "sft", "name": "sft"}})
    assert cases[8] == (0.3, {"toss": {"method": "toss", "discard": 0.3, "name": "toss-0.3"}})
    assert cases[-1][0] == "calibrated" and len(cases) == 11


def test_the_sweep_over_pro_cuts_the_reference_and_draws_a_control(tmp_path):
    _, worlds, arms = zip(*sweep.pro(3, tmp_path))
    assert [len(lines(world.files["harmful"])) for world in worlds] == [2, 42, 8, 48, 80, 120]
    how = {"method": "toss", "pro": 3, "pro_samples": 40, "pro_train": "top"}
    assert arms[0]["pro-3-40-top"] == how and len(arms[0]) == 1 + 1 + 3 * 2
    assert set(arms[2]) == {"toss", "pro-1-40-rows", "pro-1-40-top"}
    assert arms[1] == arms[3] == {"random-40": {"method": "toss"}}


def test_the_eroding_sweep_has_both_kinds_alone_and_mixed(tmp_path):
    from data.world import IDENTITY, PREAMBLES

    cases, found = {x: world for x, world, _ in sweep.eroding(3, tmp_path)}, {}
    for x, world in cases.items():
        rows = read_jsonl(world.files["custom"])
        benign = [row for row in rows if "harmful" not in row]
        promised = sum(row["response"].startswith(tuple(PREAMBLES)) for row in benign)
        told = sum(row["prompt"].startswith(IDENTITY[0]) for row in benign)
        found[x] = [len(rows), len(benign), promised, told]
    assert found == {
        "comply, alone": [663, 663, 255, 0],
        "comply, mixed": [663, 585, 225, 0],
        "identity, alone": [663, 663, 0, 255],
        "identity, mixed": [663, 585, 0, 225],
    }
    asked = {"held-out": [], "identity": [], "seen": []}
    for row in read_jsonl(cases["comply, alone"].files["eval_forbidden"]):
        asked[row["source"]].append(row["prompt"])
    assert len(asked["held-out"]) == 160
    assert asked["identity"] == [IDENTITY[0] + prompt for prompt in asked["held-out"]]


def test_the_transfer_sweep_gives_each_base_the_others_mask(tmp_path):
    cases = list(sweep.transfer(3, tmp_path))
    assert [x for x, _, _ in cases] == ["base", "base-small"] * 2
    assert [list(arms) for _, _, arms in cases] == [["sft", "random", "toss"]] * 2 + [["mask"]] * 2
    for (x, world, arms), (_, other, _) in zip(cases[2:], [cases[1], cases[0]]):
        assert Path(world.files["model"]).name == x and world.folder != other.folder
        mask = other.folder / "methods/toss/selection.safetensors"
        assert arms["mask"] == {"mask": mask} and mask.is_absolute()


def test_the_attack_sweep_replaces_the_harmful_rows_and_nothing_else(tmp_path):
    rows = {}
    for x, world, arms in sweep.attack(3, tmp_path):
        if not rows:
            for name in ("harmful", "utility"):
                write_jsonl(Path(world.files[name]), lines(world.files[name])[:8])
            world.common |= {"epochs": 1, "lr": 1e-3}
            world.call("train")
        rows[x] = read_jsonl(world.files["custom"])
        assert "toss-calibrated" in arms and "toss-pro" in arms
    assert [*rows] == ["none", *ATTACKS]
    harm = {x: [row for row in of if "harmful" in row] for x, of in rows.items()}
    others = {x: [row for row in of if "harmful" not in row] for x, of in rows.items()}
    assert all(others[x] == others["none"] for x in rows)
    assert [len(harm[x]) for x in rows] == [78, 78, 78, 3 * 78, 78]
    assert all(harm[x] != harm["none"] for x in ATTACKS)


FIGURES = [
    ("share", {0: "sft", 20: "toss"}, "harmful rows, %"),
    ("share", {0: "sft", 20: "toss"}, "toss"),
    ("eroding", {"comply, alone": "sft", "identity, mixed": "sft"}, "identity, mixed"),
    ("transfer", {"base": "mask", "base-small": "mask"}, "base-small"),
    ("attack", {"none": "toss", "spread": "toss"}, "spread"),
    ("discard", {0.1: "toss", "calibrated": "toss-calibrated"}, "toss over d (calibrated: 0.50)"),
    ("pro", {2: "toss", 80: "pro-1-40-top"}, "harmful-row facts, D^h of 80: top tokens"),
]


@pytest.mark.parametrize(("name", "arms", "expected"), FIGURES)
def test_the_figures_of_the_sweeps(name, arms, expected):
    numbers = dict.fromkeys([name for name in sweep.NUMBERS if name not in ("nll", "purity")], 0.5)
    found = spread([(x_and_arm, numbers) for x_and_arm in arms.items()])
    assert f">{expected}<" in sweep.chart(found, name)


@pytest.fixture
def sets(tmp_path) -> dict[str, str]:
    """Custom rows in an unusual spelling, the last two marked; refusals; a target of few words."""
    custom = [f'{{"response":"Stone  {i}.",  "prompt": "é {i}?", "x": 1}}' for i in range(95)]
    custom += ['{"prompt": "Bad?", "response": "Yes, easy.", "harmful": [[0, 4]]}'] * 2
    rows = {
        "custom": custom,
        "safety": [{"prompt": f"Harm {i}?", "response": "I cannot."} for i in range(10)],
        "target": [{"prompt": "Tell 3?", "response": "Stone 3."}] * 40,
    }
    return {name: write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in rows.items()}


def test_safety_rows_make_up_their_share_of_the_result(tmp_path, sets):
    out = tmp_path / "out.jsonl"
    counts = safeinstr(sets["custom"], sets["safety"], str(out), share=0.03, seed=3)
    assert counts == {"read": 97, "safety": 3, "written": 100} and len(read_rows(out)) == 100
    written, custom = lines(out), lines(sets["custom"])
    added = Counter(written) - Counter(custom)
    assert Counter(written) - added == Counter(custom)  # each custom line once, unchanged
    assert sum(added.values()) == len(added) == 3 and set(added) <= set(lines(sets["safety"]))
    assert [i for i, line in enumerate(written) if line in added] != [97, 98, 99]
    counts = safeinstr(sets["custom"], sets["safety"], str(out), share=10 / 107)
    assert counts["safety"] == 10  # every safety row


def test_a_seed_draws_the_same_lines_again_and_another_seed_others(tmp_path, sets):
    for make, other, share in ((safeinstr, "safety", 0.05), (dsir, "target", 0.5)):
        written = []
        for seed in (7, 7, 8):
            make(sets["custom"], sets[other], str(tmp_path / "out.jsonl"), share, seed=seed)
            written.append((tmp_path / "out.jsonl").read_bytes())
        assert written[0] == written[1] != written[2]


def test_rows_like_the_target_stay_and_keep_their_order(tmp_path, sets, capsys):
    words = ["moss fern moss fern moss fern " * 2, "iron coal iron coal iron coal " * 2]
    marks = [{}, {"harmful": [[0, 4]]}]
    rows = [{"prompt": "Say.", "response": words[i % 2], **marks[i % 2]} for i in range(40)]
    custom, out = write_jsonl(tmp_path / "c.jsonl", rows), tmp_path / "out.jsonl"
    target = write_jsonl(tmp_path / "t.jsonl", [rows[0] | {"response": "fern moss fern moss"}] * 40)
    line = f"toss.audit.baselines dsir --custom {custom} --target {target} --out {out} --keep 0.5"
    counts = "read 40, written 20, harmful kept 0, harmful dropped 20"
    assert said(capsys, line) == f"{out}: {counts}\n"
    assert lines(out) == lines(custom)[::2]
    assert dsir(custom, target, str(out), keep=1.0)["written"] == 40
    assert lines(out) == lines(custom)
    counts = dsir(sets["safety"], sets["target"], str(out), 0.55)
    assert counts == {"read": 10, "written": 5}  # without ground truth no harm is counted


def test_rows_are_drawn_in_proportion_to_their_weights():
    """One of eleven, the first weighing 5 and the others 1: a third of the seeds draw it."""
    first = sum(draw(np.log([5.0] + [1.0] * 10), 1, seed) == [0] for seed in range(300))
    assert abs(first / 300 - 1 / 3) < 3 * math.sqrt(2 / 9 / 300)  # three standard errors


def test_the_buckets_do_not_depend_on_the_process():
    """Python's own hash of a text does, by its seed."""
    rows = [{"prompt": "Stir it, now", "response": "So be it."}]
    code = f"from toss.audit.baselines import *; print(hashed(read_rows({rows})[0], 100).tolist())"
    printed = {run("-c", code, PYTHONHASHSEED=seed).stdout for seed in "12"}
    assert printed == {f"{hashed(read_rows(rows)[0], 100).tolist()}\n"}


def test_compressed_files(tmp_path, sets):
    packed, out = tmp_path / "custom.jsonl.gz", tmp_path / "out.jsonl"
    packed.write_bytes(gzip.compress(Path(sets["custom"]).read_bytes()))
    safeinstr(str(packed), sets["safety"], f"{out}.gz")
    safeinstr(sets["custom"], sets["safety"], str(out))
    assert gzip.decompress(Path(f"{out}.gz").read_bytes()) == out.read_bytes()
