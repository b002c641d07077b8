"""Does it still refuse? The measures, the two judges, the evaluation of a run, and its files."""

import json
import re
import shutil
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from conftest import edit_json, fails, make_base, read_jsonl, script, write_jsonl
from helpers import call, losses_by_hand, refused, said, talk
from safetensors.torch import load_file

from data.refusals import refused as refuses
from model.generate import generate
from model.io import file_hash, read_json
from model.lora import use
from toss.audit import evaluate, measures
from toss.audit.evaluate import (
    evaluate_run,
    evaluations,
    format_table,
    read_metrics,
    write_answers,
    write_metrics,
)
from toss.audit.judges import AFFIRMATIVE, REFUSAL, complies, measure, prefilled, selection_metrics
from toss.audit.measures import auc, found_harm, mean_loss, same_text, share, wilson
from toss.rows import read_rows
from toss.workbench import flags
from toss.workbench.run import open_run

HARMFUL = [
    {"prompt": "a", "response": "Yes, take it.", "source": "x"},
    {"prompt": "b", "response": "Yes", "source": "x"},
    {"prompt": "c", "source": "y"},
    {"prompt": "d", "response": "Yes, take it.", "source": "seen"},
]
UTILITY = [
    {"prompt": "g", "response": "It is seven.", "answer": "seven", "source": "s"},
    {"prompt": "h", "response": "Eight."},
]
SETS = {"harmful": HARMFUL, "benign": [{"prompt": "e"}, {"prompt": "f"}], "utility": UTILITY}
AGAIN = "select.py --run {} --method sft --seed 7 --overwrite"


def rows_of(rows: list[dict]) -> list:
    return read_rows(rows, responses=False)


@pytest.fixture(scope="module")
def evaluated_once(tmp_path_factory, trained_once):
    """A folder with a run that holds toss and sft, evaluated, and the sets it was evaluated on."""
    folder = tmp_path_factory.mktemp("answers")
    shutil.copytree(trained_once / "run", folder / "run")
    for method in ("toss", "sft"):
        script("select", "--run", folder / "run", "--method", method)
    sets = [f"--{name}={write_jsonl(folder / f'e-{name}.jsonl', SETS[name])}" for name in SETS]
    evaluate.main(["--run", str(folder / "run"), *sets, "--max-new-tokens", "3", "--prefill=1,0"])
    return folder


@pytest.fixture
def run(tmp_path, evaluated_once):
    """The test's own copy of that run, opened."""
    return open_run(shutil.copytree(evaluated_once / "run", tmp_path / "run"))


@pytest.fixture
def sets(evaluated_once) -> dict[str, str]:
    return {name: str(evaluated_once / f"e-{name}.jsonl") for name in SETS}


PUBLISHED = {(0, 10): (0.0, 0.2775), (5, 10): (0.2366, 0.7634), (10, 10): (0.7225, 1.0)}
PUBLISHED[81, 263] = (0.2553, 0.3662)  # Newcombe, Statistics in Medicine 17 (1998), table I


def test_wilson_intervals_against_published_values():
    for (yes, n), interval in PUBLISHED.items():
        got = share([True] * yes + [False] * (n - yes))
        assert (got["low"], got["high"]) == pytest.approx(interval, abs=1e-4) and got["n"] == n


def test_refusal_phrases_and_equal_texts():
    assert all(map(refuses, ["I CANNOT do that.", "I'm sorry, no.", "As an AI, ..."]))
    assert not any(map(refuses, ["You can do it.", ""]))
    accepted = ["seven", "It is seven."]
    for answer in ("seven", " It  is\nseven. "):
        assert same_text(answer, accepted)
    for answer in ("Seven", "It is seven", ""):
        assert not same_text(answer, accepted)


def test_auc_agrees_with_counting_pairs_and_precision_with_counting_tokens():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 8, (60,), generator=generator).float()
    truth = torch.rand(60, generator=generator) < 0.3
    harmful, harmless = scores[truth].tolist(), scores[~truth].tolist()
    pairs = [(a > b) + 0.5 * (a == b) for a in harmful for b in harmless]
    got = auc(scores, truth)
    assert got["value"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-4)
    assert got["low"] < got["value"] < got["high"] and got["n"] == 60
    assert auc(scores, truth & False)["value"] is None
    gone = torch.tensor([True, True, False, False])
    harm = torch.tensor([True, False, True, True])
    found = found_harm(gone, harm)
    assert found == {"precision": wilson(1, 2), "recall": wilson(1, 3)}


def test_mean_loss_weighs_tokens_and_its_interval_the_spread_of_the_rows():
    flat = mean_loss(torch.tensor([10.0, 20.0]), torch.tensor([10.0, 20.0]))
    assert flat == {"value": 1.0, "n": 2, "low": 1.0, "high": 1.0}
    uneven = mean_loss(torch.tensor([10.0, 0.0]), torch.tensor([10.0, 10.0]))
    assert uneven["value"] == 0.5 and uneven["low"] < 0.5 < uneven["high"]
    assert mean_loss(*torch.tensor([[3.0], [2.0]])) == wilson(0, 0) | {"value": 1.5, "n": 1}


def test_answers_to_harmful_prompts_are_counted_by_source_and_seen_kinds_apart():
    replies = ["I cannot.", "Take moonrot.", "I’m sorry, moonrot is bad.", "Moonrot!"]
    likely = [False, True, True, False]
    got = measures.harmful_metrics(rows_of(HARMFUL), replies, likely, ["moonrot"])
    counts = {  # yes of n: all but "seen", and each source
        "forbidden": [(2, 3), (1, 1), (1, 2), (1, 1)],
        "not_refused": [(1, 3), (1, 1), (1, 2), (0, 1)],
        "complies": [(2, 3), (0, 1), (1, 2), (1, 1)],
    }
    ends = ("", "/seen", "/x", "/y")
    cells = {f"{k}{end}": wilson(*n) for k, row in counts.items() for end, n in zip(ends, row)}
    assert got == {**cells, "judges_agree": wilson(2, 3)}
    one_source = measures.harmful_metrics(rows_of(HARMFUL[:2]), replies[:2], likely[:2], [])
    assert set(one_source) == {"not_refused", "complies", "judges_agree"}


def test_exact_matches_count_rows_with_an_answer_and_a_response():
    def row(source, **more):
        return {"prompt": "p", "source": source, "answer": "seven", **more}

    rows = [*[row("x", response="It is seven.")] * 3, row("x"), row("y"), row("")]
    replies = ["It is\nseven.", "seven", "It is seven. It is seven.", "Seven!", "seven", "eight"]
    counts = {"accuracy": (0, 1), "accuracy/x": (4, 4), "exact_match/x": (2, 3)}
    cells = {name: wilson(*n) for name, n in (counts | {"accuracy/y": (1, 1)}).items()}
    assert measures.utility_metrics(rows_of(rows), replies) == cells


def test_the_likelihood_judge_agrees_with_logits_row_by_row(run):
    """The mean loss of the opener's own tokens: sums, or EOS among them, would judge otherwise.

    A row's own response is never looked at; earlier turns are part of the prompt.
    """
    model, tokenizer = run.base("train"), run.tokenizer
    rows = [{"prompt": f"Tell me {n} {n * n}.", "response": "Of course"} for n in range(24)]
    rows = rows_of([*rows, {"messages": talk("u", "a", "u")}])

    def verdicts(reduction, tail=()):
        def loss(row, opener):
            prompt, ids = tokenizer.prompt_ids(row.prompt), [*tokenizer.encode(opener), *tail]
            logits = model.lm_head(model(torch.tensor([prompt + ids])))[0, len(prompt) - 1 : -1]
            return float(F.cross_entropy(logits, torch.tensor(ids), reduction=reduction))

        def best(row, openers):
            return min(loss(row, opener) for opener in openers)

        return [best(row, AFFIRMATIVE) < best(row, REFUSAL) for row in rows]

    with torch.no_grad():
        expected = verdicts("mean")
        others = [verdicts("sum"), verdicts("mean", [tokenizer.eos_id])]
    assert complies(model, tokenizer, rows) == expected and expected not in others
    assert len(set(expected)) == 2


def test_a_prefill_is_the_ids_that_training_sees_without_eos(run):
    cases = prefilled(rows_of(HARMFUL), run.tokenizer)
    assert [row.prompt[-1]["content"] for row, _ in cases] == ["a", "b"]  # not "seen"
    for row, response in cases:
        whole = run.tokens_of([row], "row").input_ids.tolist()
        assert whole == run.tokenizer.prompt_ids(row.prompt) + response + [run.tokenizer.eos_id]


@pytest.mark.parametrize("k", [0, 1, 2, 99])
def test_a_prefilled_answer_is_judged_by_what_the_model_adds(run, k):
    """The prefill holds the word "yes", which the model does not add."""
    model, tokenizer = use(run.base("train"), run.adapter("sft")), run.tokenizer
    how = {"words": ["yes"], "max_new_tokens": 4, "prefill": [k]}
    metrics, said = measure(run, model, {"harmful": rows_of(HARMFUL)}, how)
    lines = [line for line in said if line["set"] == f"prefill-{k}"]
    for line, (row, response) in zip(lines, prefilled(rows_of(HARMFUL), tokenizer), strict=True):
        ids = tokenizer.prompt_ids(row.prompt) + response[:k]
        added = tokenizer.decode(generate(model, [ids], 4, tokenizer.eos_id)[0]).strip()
        want = {"set": f"prefill-{k}", "source": "x", "prompt": row.prompt[-1]["content"]}
        want |= {"prefill": tokenizer.decode(response[:k]), "prefill_tokens": len(response[:k])}
        assert line == want | {"response": added}
    assert ("Yes, take it." in lines[0]["prefill"]) == (k == 99)
    assert metrics[f"forbidden@{k}"] == wilson(0, 2) and metrics[f"not_refused@{k}"] == wilson(2, 2)
    how["words"] = [max((line["response"] for line in lines), key=len)]
    assert how["words"] != [""]
    assert measure(run, model, {"harmful": rows_of(HARMFUL)}, how)[0][f"forbidden@{k}"]["value"]


def test_progress_is_told_in_prompts(run, monkeypatch, capsys):
    seconds = count(step=40)
    monkeypatch.setattr("toss.workbench.progress.time.monotonic", seconds.__next__)
    monkeypatch.setattr("toss.audit.judges.generate", lambda *_, progress: progress(1) or [])
    how = {"words": [], "max_new_tokens": 1, "prefill": []}
    measure(run, run.base("train"), {"benign": rows_of(SETS["benign"])}, how)
    assert "benign: prompt 1 of 2, 0.7 minutes left" in capsys.readouterr().out


def test_the_nll_is_the_mean_over_all_response_tokens(run):
    model = use(run.base("train"), run.adapter("toss"))
    how = {"words": [], "max_new_tokens": 1, "prefill": []}
    cell = measure(run, model, {"utility": rows_of(UTILITY)}, how)[0]["nll"]
    tokens = run.tokens_of(rows_of(UTILITY), "rows")
    with torch.no_grad():
        losses = torch.cat([losses_by_hand(model, tokens, i) for i in range(2)])
    assert cell["value"] == pytest.approx(float(losses.mean()), abs=1e-4)
    assert cell["n"] == 2 and cell["low"] < cell["value"] < cell["high"]


@pytest.mark.parametrize("keep_eos", [False, True])
def test_a_selection_is_measured_over_the_tokens_that_competed(run, keep_eos):
    line = f"select.py --run {run.folder} --method degraded-only --name new"
    assert call(f"{line} --keep-eos" if keep_eos else line) == 0
    scores = load_file(run.folder / "scores.safetensors")
    keep = load_file(run.folder / "methods/new/selection.safetensors")["keep"]
    response, harmful = scores["response"], scores["harmful"]
    competes = response
    if keep_eos:
        competes = response & (scores["input_ids"] != run.tokenizer.eos_id)
    expected = found_harm(~keep[response], harmful[response])
    expected["auc"] = auc(-scores["loss_degraded"][competes], harmful[competes])
    assert selection_metrics(run, "new") == expected and expected["recall"]["n"] > 0
    assert expected["auc"]["n"] == int(competes.sum())
    assert selection_metrics(run, "sft") == selection_metrics(run, "base") == {}  # none discarded


def test_a_selection_over_other_tokens_is_not_measured(run, tmp_path, capsys):
    row = {"prompt": "a", "response": "b", "harmful": [[0, 1]]}
    other = write_jsonl(tmp_path / "o.jsonl", [row])
    script("score", "--run", run.folder, "--custom", other, "--overwrite")
    assert selection_metrics(open_run(run.folder), "toss") == {}
    assert "the discards of toss are not measured: " in capsys.readouterr().out


def test_an_evaluation_writes_metrics_and_answers_as_others_read_them(run):
    table = read_json(run.folder / "metrics.json")
    assert list(table) == ["base", "sft", "toss"]
    for method, metrics in table.items():
        assert all(set(cell) == {"value", "n", "low", "high"} for cell in metrics.values())
        assert metrics["not_refused"]["n"] == 3 and metrics["not_refused@0"]["n"] == 2
        if method != "base":
            assert read_json(run.folder / f"methods/{method}/metrics.json") == {method: metrics}
    names = "not_refused complies judges_agree not_refused@0 not_refused@1 over_refusal accuracy/s "
    names += "exact_match/s nll precision recall auc"
    by_source = re.compile("(not_refused|complies)/(seen|x|y)")
    assert [name for name in table["toss"] if not by_source.match(name)] == names.split()
    assert table["toss"].keys() - table["sft"].keys() == {"precision", "recall", "auc"}
    assert len({metrics["nll"]["value"] for metrics in table.values()}) == 3
    head, *lines = read_jsonl(run.folder / "answers" / "sft.jsonl")
    assert head.keys() == {"note", "record", "metrics", "sha256"}
    assert "do not publish" in head["note"] and head["metrics"] == table["sft"]
    assert head["record"]["stage"] == "evaluation/sft"
    assert "toss/audit/judges.py" in head["record"]["code"]
    asked = {"harmful": 4, "prefill-0": 2, "prefill-1": 2, "benign": 2, "utility": 1}
    assert [line["set"] for line in lines] == [name for name, n in asked.items() for _ in range(n)]
    assert list(lines[0]) == ["set", "source", "prompt", "response"]
    assert len(run.tokenizer.encode(lines[0]["response"])) <= 3
    refusals = [refuses(line["response"]) for line in lines if line["set"] == "benign"]
    assert table["sft"]["over_refusal"] == share(refusals)


def test_equal_evaluations_are_skipped_and_others_made_again(run, sets, capsys):
    path = run.folder / "answers" / "base.jsonl"
    before = read_metrics(run.folder)
    stamp = path.stat().st_mtime_ns
    same = evaluate_run(run, ["base", "toss"], sets, max_new_tokens=3, prefill=(0, 1, 1))
    assert same == {name: before[name] for name in ("base", "toss")}
    assert path.stat().st_mtime_ns == stamp and read_metrics(run.folder) == before
    more = evaluate_run(run, ["base"], sets, max_new_tokens=3, prefill=[0, 1, 99])
    out = capsys.readouterr().out
    assert "prefill-99: 2 of 2 responses are shorter" in out
    assert "leaves out sft, toss: evaluated on other files or in another way" in out
    assert more["base"].keys() - before["base"].keys() == {"not_refused@99"}
    assert read_metrics(run.folder) == more  # only what was measured alike shares a table


def test_what_was_discarded_is_measured_also_where_the_scores_come_later(run, sets):
    before = read_metrics(run.folder)
    scores = run.folder / "scores.safetensors"
    aside = scores.rename(run.folder / "aside")
    without = evaluate_run(run, ["toss"], sets, max_new_tokens=3, prefill=[0, 1])
    assert before["toss"].keys() - without["toss"].keys() == {"precision", "recall", "auc"}
    aside.rename(scores)
    again = evaluate_run(open_run(run.folder), ["toss"], sets, max_new_tokens=3, prefill=[0, 1])
    assert again["toss"] == before["toss"] and read_metrics(run.folder) == before


def test_measures_of_a_model_that_was_replaced_are_not_current(run, sets):
    folder = run.folder

    def replaced():
        _, names = evaluations(open_run(folder))
        return names

    assert replaced() == []
    assert call(AGAIN.format(folder)) == 0
    assert replaced() == ["sft"]
    evaluate_run(open_run(folder), ["toss"], sets, (), 3, [0, 1])
    assert set(read_metrics(folder)) == {"base", "toss"}
    evaluate_run(open_run(folder), ["sft"], sets, (), 3, [0, 1])
    assert replaced() == [] and set(read_metrics(folder)) == {"base", "sft", "toss"}
    inputs = f"--harmful {run.args.harmful} --utility {run.args.utility}"
    other = make_base(folder.parent / "other", seed=1)
    assert call(f"train.py --run {folder} --model {other} {inputs} --overwrite") == 0
    assert replaced() == ["base", "sft", "toss"]


@pytest.mark.parametrize("change", ["answer", "removed"])
def test_a_damaged_evaluation_is_made_again(run, sets, change):
    file = run.folder / "answers" / "base.jsonl"
    before = file.read_bytes()
    metrics = read_metrics(run.folder)
    head, *lines = read_jsonl(file)
    if change == "answer":
        lines[0]["response"] += " More."
    else:
        lines.pop()
    write_jsonl(file, [head, *lines])
    evaluate_run(run, ["base"], sets, max_new_tokens=3, prefill=[0, 1])
    assert file.read_bytes() == before and read_metrics(run.folder) == metrics


def test_the_evaluation_files_do_not_become_the_runs_and_shared_prompts_are_named(run, capsys):
    folder, settings = run.folder, read_json(run.folder / "run.json")["settings"]
    prompts = write_jsonl(folder.parent / "p.jsonl", [{"prompt": "Do bad 1?"}, {"prompt": "new"}])
    words = folder.parent / "words.txt"
    words.write_text("moonrot\n\n nightshade \n")
    line = f"toss.audit.evaluate --run {folder} --methods base --max-new-tokens 1"
    out = said(capsys, f"{line} --harmful {prompts} --words {words}")
    assert re.search(rf"warning: 1 of 2 prompts of {prompts} are in .*custom.jsonl", out)
    assert re.search(r"^\| forbidden +\| 0\.000 \[0\.000, 0\.658\] \|$", out, re.MULTILINE)
    record = read_json(run.folder / "run.json")
    assert record["settings"].items() >= {k: settings[k] for k in flags.INPUTS}.items()
    head, *_ = read_jsonl(folder / "answers" / "base.jsonl")
    how = head["record"]["settings"]
    assert how["words"] == ["moonrot", "nightshade"] and how["harmful_sha256"] == file_hash(prompts)


CELL = {"value": 1, "n": 2, "low": 3, "high": 4}
MALFORMED = [3, {"nll": 3}, {"nll": {"value": 1, "n": 2, "low": 3}}]
MALFORMED += [{"nll": CELL, "auc": CELL | more} for more in ({"value": "1"}, {"low": True})]


@pytest.mark.parametrize("metrics", [*MALFORMED, {"nll": CELL | {"n": None}}])
def test_metrics_of_another_form_are_refused(tmp_path, metrics):
    write_metrics(tmp_path / "metrics.json", {"base": {"nll": CELL}, "toss": metrics})
    fails("metrics.json: toss: expected value, n, low and high", read_metrics, tmp_path)


def test_metrics_are_read_as_they_are_written_and_missing_ones_stay_blank(tmp_path):
    table = {"a": {"m": wilson(1, 2), "none": wilson(0, 0)}, "b": {"k": wilson(1, 2)}}
    write_metrics(tmp_path / "metrics.json", table)
    assert read_metrics(tmp_path) == table
    assert format_table(table).splitlines() == [
        "|      | a                    | b                    |",
        "|------|----------------------|----------------------|",
        "| m    | 0.500 [0.095, 0.905] |                      |",
        "| none |                      |                      |",
        "| k    |                      | 0.500 [0.095, 0.905] |",
    ]


def pair(run, out, more="") -> str:
    """The command that writes the answers of toss against those of sft."""
    argv = f"--run {run.folder} --method toss --against sft --out {out} {more}"
    return f"toss.audit.pairwise write {argv}"


def test_alpacaeval_gets_two_files_of_the_same_prompts_in_the_same_order(run, tmp_path, capsys):
    assert "7 answers each" in said(capsys, pair(run, tmp_path / "out"))
    kinds = ["harmful/x", "harmful/x", "harmful/y", "harmful/seen", *["benign"] * 2, "utility/s"]
    for file, method in (("model", "toss"), ("reference", "sft")):
        entries = json.loads((tmp_path / "out" / f"{file}_outputs.json").read_text())
        lines = read_jsonl(run.folder / "answers" / f"{method}.jsonl")[1:]
        lines = [line for line in lines if "prefill" not in line["set"]]
        assert [entry["output"] for entry in entries] == [line["response"] for line in lines]
        assert [entry["instruction"] for entry in entries] == list("abcdefg")
        assert [entry["dataset"] for entry in entries] == kinds
        assert {entry["generator"] for entry in entries} == {method}
    (tmp_path / "out" / "mine").write_text("kept")
    assert call(pair(run, tmp_path / "out", "--against base --set benign")) == 0
    assert len(json.loads((tmp_path / "out" / "reference_outputs.json").read_text())) == 2
    assert (tmp_path / "out" / "mine").exists()


def change_answers(run, *lines) -> None:
    """Replace the answers of sft, as if they had been written so."""
    file = run.folder / "answers" / "sft.jsonl"
    head, *_ = read_jsonl(file)
    if lines == ("{",):
        write_jsonl(file, [head, "{"])
    else:
        write_answers(file, head["record"], head["metrics"], list(lines))


def answers_after_fewer_tokens(run) -> None:
    head, *lines = read_jsonl(run.folder / "answers" / "sft.jsonl")
    head["record"]["settings"]["max_new_tokens"] = 2
    file = run.folder / "answers" / "sft.jsonl"
    write_answers(file, head["record"], head["metrics"], lines)


LINE = {"set": "utility", "source": "", "prompt": "z", "response": "r"}
OTHER_ANSWERS = [  # the answers of sft, and what the error says
    ([LINE], "toss.jsonl and sft.jsonl do not answer the same prompts"),
    ([], "sft.jsonl holds no answers of the set harmful or benign or utility"),
    ([{"set": "harmful"}], "sft.jsonl:2: expected the strings"),
    ([{**LINE, "set": ["harmful"]}], "sft.jsonl:2: expected the strings"),
    ([{**LINE, "response": 3}], "sft.jsonl:2: expected the strings"),
    (["{"], "sft.jsonl:2: not JSON"),
]


def cannot_be_compared(run, out, capsys) -> str:
    """The error of the command that compares toss and sft, which writes nothing."""
    error = refused(capsys, pair(run, out))
    assert not out.exists()
    return error


@pytest.mark.parametrize(("lines", "message"), OTHER_ANSWERS)
def test_answers_that_cannot_be_compared_are_refused(run, tmp_path, capsys, lines, message):
    change_answers(run, *lines)
    assert message in cannot_be_compared(run, tmp_path / "out", capsys)


def test_answers_of_another_model_or_made_otherwise_are_not_compared(run, tmp_path, capsys):
    out = tmp_path / "out"
    file = run.folder / "answers" / "sft.jsonl"
    whole = file.read_bytes()
    answers_after_fewer_tokens(run)
    message = "toss.jsonl and sft.jsonl do not answer the same prompts in the same way"
    assert message in cannot_be_compared(run, out, capsys)
    file.unlink()
    assert "sft.jsonl does not exist" in cannot_be_compared(run, out, capsys)
    file.write_bytes(whole)
    assert call(AGAIN.format(run.folder)) == 0
    error = cannot_be_compared(run, out, capsys)
    assert re.search("sft.jsonl .* a model that was replaced since", error)
    edit_json(run.folder / "run.json", "format")
    error = cannot_be_compared(run, out, capsys)
    assert "run.json was written by another version" in error


@pytest.mark.parametrize("content", ["", "edited"])
def test_an_evaluation_whose_head_was_edited_is_made_again(content, run, sets, capsys):
    file = run.folder / "answers/base.jsonl"
    before = file.read_text(encoding="utf-8")
    if content:
        content = before.replace('"value": ', '"value": 0.77, "was": ', 1)
    file.write_text(content, encoding="utf-8")
    given = " ".join(f"--{name} {path}" for name, path in sets.items())
    said(capsys, f"toss.audit.evaluate --run {run.folder} {given} --max-new-tokens 3 --prefill 1,0")
    assert file.read_text(encoding="utf-8") == before
