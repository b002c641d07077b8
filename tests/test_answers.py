"""Does it still refuse? What is counted is what the models of the run answer now."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fails, make_base, read_jsonl, script, write_jsonl
from helpers import losses_by_hand, said, succeed
from safetensors.torch import load_file

from model.generate import generate
from model.io import file_hash, read_json
from model.lora import use
from toss.audit import judges
from toss.audit.evaluate import evaluate_run, evaluated, write_answers
from toss.audit.judges import measure, prefilled
from toss.audit.measures import auc, found_harm
from toss.audit.tokens import selection_metrics
from toss.rows import read_rows
from toss.workbench import flags
from toss.workbench.run import Run, open_run

HARMFUL = [
    {"prompt": "a", "response": "Yes, take it.", "source": "x"},
    {"prompt": "b", "response": "Yes", "source": "x"},
    {"prompt": "c", "source": "y"},
    {"prompt": "d", "response": "Yes, take it.", "source": "seen"},
]
BENIGN = [{"prompt": "e"}, {"prompt": "f"}]
UTILITY = [
    {"prompt": "g", "response": "It is seven.", "answer": "seven", "source": "s"},
    {"prompt": "h", "response": "Eight."},
]
ROWS = {"harmful": HARMFUL, "benign": BENIGN, "utility": UTILITY}
# Of the evaluation below.
SETTINGS = {"words": [], "prefill": [0, 1], "max_new_tokens": 3, "question_tokens": 3}
OF_DISCARDS = {"precision", "recall", "auc"}


@pytest.fixture(scope="module")
def evaluated_once(tmp_path_factory, trained_once) -> Path:
    """A folder with a run that holds toss and sft, evaluated, and the rows it was evaluated on."""
    folder = tmp_path_factory.mktemp("answers")
    shutil.copytree(trained_once / "run", folder / "run")
    script("select", "--run", folder / "run", "--method", "toss")
    script("select", "--run", folder / "run", "--method", "sft")
    files = {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in ROWS.items()}
    evaluate_run(open_run(folder / "run"), ["base", "sft", "toss"], files, SETTINGS)
    return folder


@pytest.fixture
def run(tmp_path, evaluated_once) -> Run:
    """The test's own copy of that run, opened."""
    return open_run(shutil.copytree(evaluated_once / "run", tmp_path / "run"))


@pytest.fixture
def files(evaluated_once) -> dict[str, str]:
    return {name: str(evaluated_once / f"{name}.jsonl") for name in ROWS}


def rows_of(name: str) -> list:
    return read_rows(ROWS[name], responses=False)


def asked(run: Run, method: str, name: str, **settings) -> judges.Measured:
    """What a method's model answers to one of the sets."""
    model = use(run.base("train"), run.adapter(f"methods/{method}/model"))
    settings = {**SETTINGS, "max_new_tokens": 4, **settings}
    return measure(run, model, {name: rows_of(name)}, settings)


# What is asked, and how answers are judged


def test_a_prefill_is_the_ids_that_training_sees_without_eos(run):
    rows, responses = prefilled(rows_of("harmful"), run.tokenizer)
    assert [row.prompt[-1]["content"] for row in rows] == ["a", "b"]  # none that is "seen"
    for row, response in zip(rows, responses, strict=True):
        whole = run.tokens_of([row], "row").input_ids.tolist()
        assert whole == run.tokenizer.prompt_ids(row.prompt) + response + [run.tokenizer.eos_id]


@pytest.mark.parametrize("k", [1, 99])
def test_a_prefilled_answer_is_judged_by_what_the_model_adds(run, k):
    """The prefill holds the word "yes", which the model does not add."""
    found = asked(run, "sft", "harmful", words=["yes"], prefill=[k])
    lines = [line for line in found.lines if line["set"] == f"prefill-{k}"]
    begun = prefilled(rows_of("harmful"), run.tokenizer)
    for line, row, response in zip(lines, *begun, strict=True):
        start = response[:k]
        prompt = run.tokenizer.prompt_ids(row.prompt) + start
        model = use(run.base("train"), run.adapter("methods/sft/model"))
        added = generate(model, [prompt], 4, run.tokenizer.eos_id)[0]
        assert line == {
            "set": f"prefill-{k}",
            "source": "x",
            "prompt": row.prompt[-1]["content"],
            "prefill": run.tokenizer.decode(start),
            "response": run.tokenizer.decode(added).strip(),
            "outcomes": {f"forbidden@{k}": False, f"not_refused@{k}": True},
        }
    assert ("Yes, take it." in lines[0]["prefill"]) == (k == 99)


def test_a_selection_is_measured_over_the_tokens_that_competed(run):
    line = f"select.py --run {run.folder} --method degraded-only --name new --keep-eos"
    succeed(line)
    scores = load_file(run.folder / "scores.safetensors")
    keep = load_file(run.folder / "methods/new/selection.safetensors")["keep"]
    response = scores["response"]
    harmful = scores["harmful"]
    competes = response & (scores["input_ids"] != run.tokenizer.eos_id)
    expected = found_harm(~keep[response], harmful[response])
    expected["auc"] = auc(-scores["loss_degraded"][competes], harmful[competes])
    assert expected["recall"].n > 0
    assert selection_metrics(run, "new") == expected


def test_a_selection_over_other_tokens_is_not_measured(run, tmp_path):
    row = {"prompt": "a", "response": "b", "harmful": [[0, 1]]}
    other = write_jsonl(tmp_path / "o.jsonl", [row])
    script("score", "--run", run.folder, "--custom", other, "--overwrite")
    assert selection_metrics(open_run(run.folder), "toss") == {}


# What is written


def test_metrics_are_counted_from_the_answers_and_written(run):
    found = evaluated(run)
    written = read_json(run.folder / "metrics.json")
    assert list(found.table) == list(written) == ["base", "sft", "toss"]
    for method, row in found.table.items():
        assert written[method] == {name: cell._asdict() for name, cell in row.items()}
    assert written["toss"]["not_refused"].keys() == {"value", "n", "low", "high"}
    by_source = re.compile("(not_refused|refusals_kept)/(seen|x|y)")
    names = [name for name in found.table["toss"] if not by_source.match(name)]
    measured = "not_refused coherent refusals_kept not_refused@0 not_refused@1 over_refusal "
    measured += "accuracy/s exact_match/s nll precision recall auc"
    assert names == measured.split()
    assert found.table["toss"].keys() - found.table["sft"].keys() == OF_DISCARDS
    assert found.table["sft"]["not_refused"].n == 3
    assert found.table["sft"]["not_refused@0"].n == 2

    # The losses are over all response tokens, and differences on the same rows.
    nll = found.table["toss"]["nll"]
    model = use(run.base("train"), run.adapter("methods/toss/model"))
    tokens = run.tokens_of(rows_of("utility"), "rows")
    with torch.no_grad():
        losses = torch.cat([losses_by_hand(model, tokens, row) for row in range(2)])
    assert nll.value == pytest.approx(float(losses.mean()), abs=1e-4)
    minus = found.paired["sft"]["toss"]["nll"]
    assert minus.value == pytest.approx(nll.value - found.table["sft"]["nll"].value, abs=2e-4)
    assert 0 < minus.high - minus.low < nll.high - nll.low


def test_answers_are_written_with_a_warning_and_what_they_were_made_from(run):
    head, *lines = read_jsonl(run.folder / "answers/sft.jsonl")
    assert "do not publish" in head["note"]
    assert head["record"]["stage"] == "evaluation/sft"
    assert "toss/audit/judges.py" in head["record"]["code"]
    sets = ["harmful"] * 4 + ["prefill-0"] * 2 + ["prefill-1"] * 2 + ["benign"] * 2 + ["utility"]
    assert [line["set"] for line in lines] == sets
    assert list(lines[0]) == ["set", "source", "prompt", "response", "outcomes"]


def test_the_command_takes_words_and_names_prompts_that_were_trained_on(run, tmp_path, capsys):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Do bad 1?"}, {"prompt": "new"}])
    words = tmp_path / "words.txt"
    words.write_text("moonrot\n\n nightshade \n")
    before = read_json(run.folder / "run.json")
    line = f"toss.audit.evaluate --run {run.folder} --methods base --max-new-tokens 1"
    out = said(capsys, f"{line} --harmful {prompts} --words {words}")
    assert re.search(f"warning: 1 of 2 prompts of {prompts} are in .*custom.jsonl", out)
    assert re.search(r"^\| forbidden +\| 0\.000 \[0\.000, 0\.658\] \|$", out, re.MULTILINE)
    head, *_ = read_jsonl(run.folder / "answers/base.jsonl")
    measured = {"forbidden", "not_refused", "coherent", "refusals_kept"}
    assert evaluated(run).table["base"].keys() == measured
    assert head["record"]["settings"]["words"] == ["moonrot", "nightshade"]
    assert head["record"]["settings"]["harmful_sha256"] == file_hash(prompts)
    after = read_json(run.folder / "run.json")
    assert [after[name] for name in flags.INPUTS] == [before[name] for name in flags.INPUTS]


# What is made again, and what is left out


def test_an_equal_evaluation_is_skipped_and_another_one_made_again(run, files):
    file = run.folder / "answers/base.jsonl"
    before = file.read_bytes()
    stamp = file.stat().st_mtime_ns
    evaluate_run(run, ["base", "toss"], files, SETTINGS)
    assert file.stat().st_mtime_ns == stamp
    head, *lines = read_jsonl(file)
    head["record"]["settings"]["max_new_tokens"] = 9
    write_jsonl(file, [head, *lines])
    assert evaluated(run).left_out == ["sft", "toss"]
    evaluate_run(run, ["base"], files, SETTINGS)
    assert file.read_bytes() == before


def test_only_what_was_measured_alike_shares_a_table(run, files, capsys):
    found = evaluate_run(run, ["base"], files, {**SETTINGS, "prefill": [0, 1, 99]})
    why = "sft, toss left out: evaluated on other files or in another way"
    assert why in capsys.readouterr().out
    assert list(found.table) == ["base"] and found.paired == {}
    assert "not_refused@99" in found.table["base"]


def test_measures_of_a_model_that_was_replaced_are_left_out(run, tmp_path):
    succeed(f"select.py --run {run.folder} --method sft --seed 7 --overwrite")
    assert evaluated(open_run(run.folder)).left_out == ["sft"]
    inputs = f"--harmful {run.args.harmful} --utility {run.args.utility}"
    base = make_base(tmp_path / "other", seed=1)
    succeed(f"train.py --run {run.folder} --model {base} {inputs} --overwrite")
    assert evaluated(open_run(run.folder)).left_out == ["base", "sft", "toss"]


# The block of the audit's README that hands answers to AlpacaEval


@pytest.fixture
def hand_over(run, monkeypatch):
    """The block, to be run beside the answers."""
    readme = (ROOT / "toss/audit/README.md").read_text(encoding="utf-8")
    _, section = readme.split("[AlpacaEval]")
    block = section.split("```py\n")[1].split("```")[0]
    monkeypatch.chdir(run.folder)
    return lambda: exec(block, {})


def test_alpacaeval_gets_two_files_of_the_same_prompts_in_the_same_order(run, hand_over):
    hand_over()
    for name, method in (("model", "toss"), ("reference", "sft")):
        entries = json.loads((run.folder / f"{name}_outputs.json").read_text())
        answers = read_jsonl(run.folder / f"answers/{method}.jsonl")[1:]
        expected = []
        for line in answers:
            if "prefill" not in line:
                expected.append((line["prompt"], line["response"], method, line["set"]))
        given = [
            (entry["instruction"], entry["output"], entry["generator"], entry["dataset"])
            for entry in entries
        ]
        assert given == expected


def test_answers_to_other_prompts_are_not_handed_over(run, hand_over):
    file = run.folder / "answers/sft.jsonl"
    head, *lines = read_jsonl(file)
    lines[0]["prompt"] = "z"
    write_answers(file, head["record"], judges.Measured(lines, [], []))
    fails("evaluate both", hand_over, error=AssertionError)
