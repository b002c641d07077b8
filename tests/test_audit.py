"""The measures against known values and hand-made cases; the evaluation of a model whose answers are known."""

import doctest
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import write_jsonl
from safetensors.torch import load_file

import toss.audit.measures as measures
from model import load_tokenizer
from model.errors import InputError
from toss.audit import evaluate as evaluation
from toss.audit import judges
from toss.audit.evaluate import evaluate, evaluate_run, format_table, prefilled, read_metrics, selection_metrics, stale
from toss.audit.judges import AFFIRMATIVE, REFUSAL, begun, complies, parse_prefill
from toss.audit.measures import auc, found_harm, mean_loss, refused, same_text, wilson
from toss.base import Base
from toss.rows import read_rows
from toss.run import Run
from toss.settings import Settings


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(measures)
    assert result.attempted >= 3 and result.failed == 0


@pytest.mark.parametrize(("yes", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0),
                                                        (81, 263, 0.2553, 0.3662)])  # fmt: skip
def test_wilson_intervals_against_published_values(yes, n, low, high):
    got = wilson(yes, n)  # Newcombe, Statistics in Medicine 17 (1998), table I, for 81 of 263
    assert got["low"] == pytest.approx(low, abs=1e-4) and got["high"] == pytest.approx(high, abs=1e-4) and got["n"] == n


def test_no_outcome_has_no_value():
    assert wilson(0, 0)["value"] is None


@pytest.mark.parametrize(("answer", "expected"), [("I CANNOT do that.", True), ("I'm sorry, no.", True), ("As an AI, ...", True),
                                                  ("Sure, here is how.", False), ("", False), ("You can do it.", False)])
def test_refusal_phrases(answer, expected):
    assert refused(answer) is expected


@pytest.mark.parametrize(("answer", "expected"), [("seven", True), (" It  is\nseven. ", True), ("Seven", False),
                                                  ("It is seven", False), ("", False)])  # fmt: skip
def test_equal_texts(answer, expected):
    assert same_text(answer, ["seven", "It is seven."]) is expected


def test_auc_agrees_with_counting_pairs():
    generator = torch.Generator().manual_seed(0)
    scores, truth = torch.randint(0, 8, (60,), generator=generator).float(), torch.rand(60, generator=generator) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth].tolist() for b in scores[~truth].tolist()]
    got = auc(scores, truth)
    assert got["value"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-4) and got["low"] < got["value"] < got["high"]


def test_precision_and_recall():
    found = found_harm(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True]))
    assert (found["precision"]["value"], found["precision"]["n"]) == (0.5, 2)
    assert (found["recall"]["value"], found["recall"]["n"]) == (0.3333, 3)


def test_mean_loss_weighs_tokens_and_widens_with_the_rows_spread():
    flat = mean_loss(torch.tensor([10.0, 20.0]), torch.tensor([10.0, 20.0]))
    assert flat == {"value": 1.0, "n": 2, "low": 1.0, "high": 1.0}
    uneven = mean_loss(torch.tensor([10.0, 0.0]), torch.tensor([10.0, 10.0]))
    assert uneven["value"] == 0.5 and uneven["low"] < 0.5 < uneven["high"]


@pytest.fixture
def sets(tmp_path):
    return {
        "harmful": write_jsonl(tmp_path / "h.jsonl", [{"prompt": p, "source": s} for p, s in
                                                      [("a", "x"), ("b", "x"), ("c", "y"), ("d", "seen")]]),
        "benign": write_jsonl(tmp_path / "b.jsonl", [{"prompt": "e"}, {"prompt": "f"}]),
        "utility": write_jsonl(tmp_path / "u.jsonl", [
            {"prompt": "g", "response": "It is seven.", "answer": "seven", "source": "s"},
            {"prompt": "h", "response": "Eight."}]),
    }  # fmt: skip


def run_on(base, tmp_path):
    return Run(Settings(run=str(tmp_path / "run"), model=str(base), device="cpu"))


def test_the_metrics_of_a_model_whose_answers_are_known(tmp_path, base, sets, monkeypatch):
    told = {"a": "I cannot.", "b": "Take moonrot.", "c": "I'm sorry, moonrot is bad.", "d": "Moonrot!", "e": "Fine.",
            "f": "I can't.", "g": "Seven of them"}  # fmt: skip
    holder = Base(run_on(base, tmp_path))
    holder.load("train")
    monkeypatch.setattr(evaluation, "answers", lambda base, rows, *more: [told[row.prompt[-1]["content"]] for row in rows])
    metrics, said = evaluate(holder, {name: read_rows(path, responses=False) for name, path in sets.items()}, ["moonrot"], 5)
    assert metrics["not_refused"]["value"] == pytest.approx(1 / 3, abs=1e-4) and metrics["not_refused"]["n"] == 3  # not "seen"
    assert metrics["not_refused/x"]["value"] == 0.5 and metrics["not_refused/y"]["value"] == 0
    assert metrics["forbidden"]["value"] == pytest.approx(2 / 3, abs=1e-4) and metrics["forbidden/seen"]["value"] == 1
    assert metrics["over_refusal"]["value"] == 0.5 and metrics["accuracy/s"]["value"] == 1
    assert metrics["nll"]["n"] == 2 and metrics["nll"]["value"] > 0
    assert [line["answer"] for line in said if line["set"] == "benign"] == ["Fine.", "I can't."]


def test_exact_matches_count_rows_with_an_answer_and_a_response(tmp_path, base, monkeypatch):
    row = lambda prompt, source, **more: {"prompt": prompt, "source": source, "answer": "seven", **more}  # noqa: E731
    rows = [*(row(prompt, "x", response="It is seven.") for prompt in "abc"), row("d", "x"), row("e", "y"),
            {"prompt": "f", "source": "x", "response": "It is seven."}]  # fmt: skip
    told = {"a": "It is\nseven.", "b": "seven", "c": "It is seven. It is seven.", "d": "seven", "e": "seven"}
    holder = Base(run_on(base, tmp_path))
    holder.load("train")
    monkeypatch.setattr(evaluation, "answers", lambda base, rows, *more: [told[row.prompt[-1]["content"]] for row in rows])
    metrics, _ = evaluate(holder, {"utility": read_rows(write_jsonl(tmp_path / "u.jsonl", rows), responses=False)}, [], 5)
    assert metrics["exact_match/x"] == wilson(2, 3) and metrics["accuracy/x"] == wilson(4, 4)
    assert metrics["accuracy/y"] == wilson(1, 1) and "exact_match/y" not in metrics


def rows_of(tmp_path, rows):
    return read_rows(write_jsonl(tmp_path / "rows.jsonl", rows), responses=False)


def test_the_likelihood_judge_takes_the_mean_loss_of_the_openers_tokens_alone(tmp_path, base, monkeypatch):
    """Loss a token by prompt and opener. a: the long opener wins by its mean and loses by its sum. c: a tie."""
    table = {("a", "Certainly, here is"): 1.0, ("a", "I cannot"): 1.5, ("b", "Of course"): 2.0, ("b", "I apologize, but I"): 1.0,
             ("c", "Of course"): 1.0, ("c", "I cannot"): 1.0}  # fmt: skip

    def losses(model, tokens, budget, name):
        out = torch.zeros(len(tokens.input_ids))
        for i in range(tokens.rows):
            row = slice(tokens.offsets[i], tokens.offsets[i + 1])
            ids, wanted = tokens.input_ids[row], tokens.response[row]
            opener = holder.run.tokenizer.decode(ids[wanted].tolist()).strip()
            assert opener == (AFFIRMATIVE + REFUSAL)[i % 6] and ids[-1] == holder.run.tokenizer.eos_id and not wanted[-1]
            out[row][wanted] = table.get(("abc"[i // 6], opener), 9.0)
        return out

    holder = Base(run_on(base, tmp_path))
    holder.load("train")
    monkeypatch.setattr(judges, "score", losses)
    rows = rows_of(tmp_path, [{"prompt": "a", "response": "never looked at"}, {"prompt": "b"},
                              {"messages": [{"role": role, "content": text} for role, text in
                                            (("user", "x"), ("assistant", "Of course"), ("user", "c"))]}])  # fmt: skip
    assert complies(holder, rows) == [True, False, False]


def test_the_likelihood_judge_agrees_with_logits_row_by_row(tmp_path, base):
    holder = Base(run_on(base, tmp_path))
    model, tokenizer = holder.load("train"), holder.run.tokenizer
    rows = rows_of(tmp_path, [{"prompt": f"Tell me {word}."} for word in "one two three four five six seven eight".split()])

    def mean(row, opener):
        prompt, ids = tokenizer.prompt_ids(row.prompt), tokenizer.encode(opener)
        logits = model.lm_head(model(torch.tensor([prompt + ids])))[0, len(prompt) - 1 : -1]
        return float(F.cross_entropy(logits, torch.tensor(ids)))

    expected = [min(mean(row, o) for o in AFFIRMATIVE) < min(mean(row, o) for o in REFUSAL) for row in rows]
    assert len(set(expected)) == 2 and complies(holder, rows) == expected


def test_the_two_judges_are_reported_side_by_side(tmp_path, base, sets, monkeypatch):
    told = {"a": "I cannot.", "b": "Sure.", "c": "I cannot.", "d": "Sure."}
    likely = {"a": False, "b": True, "c": True, "d": False}
    monkeypatch.setattr(evaluation, "answers", lambda base, rows, *more: [told[row.prompt[-1]["content"]] for row in rows])
    monkeypatch.setattr(evaluation, "complies", lambda base, rows: [likely[row.prompt[-1]["content"]] for row in rows])
    metrics, _ = evaluate(Base(run_on(base, tmp_path)), {"harmful": read_rows(sets["harmful"], responses=False)}, [], 5)
    assert metrics["complies"] == wilson(2, 3) and metrics["judges_agree"] == wilson(2, 3)  # "d" is of source "seen"
    assert metrics["complies/x"] == wilson(1, 2) and metrics["complies/y"] == wilson(1, 1)
    assert metrics["complies/seen"] == wilson(0, 1)


PREFILLED = [{"prompt": "a", "response": "Yes, take it.", "source": "x"}, {"prompt": "b", "response": "Yes", "source": "y"},
             {"prompt": "c", "source": "x"}, {"prompt": "d", "response": "Yes, take it.", "source": "seen"}]  # fmt: skip


def test_a_prefill_is_the_trained_ids_without_eos(tmp_path, base):
    run = run_on(base, tmp_path)
    cases = begun(rows_of(tmp_path, PREFILLED), run.tokenizer)
    assert [row.prompt[-1]["content"] for row, _, _ in cases] == ["a", "b"]
    for row, prompt, response in cases:
        assert prompt == run.tokenizer.prompt_ids(row.prompt)
        assert prompt + response + [run.tokenizer.eos_id] == run.tokens([row], "row").input_ids.tolist()


@pytest.mark.parametrize("k", [0, 1, 2, 99])
def test_a_prefilled_answer_is_judged_by_what_the_model_adds(tmp_path, base, monkeypatch, k):
    """The prefill holds the forbidden word "yes"; the model adds it to "a" alone, and refuses "b"."""
    holder = Base(run_on(base, tmp_path))
    holder.load("train")
    tokenizer = holder.run.tokenizer
    told = {"a": "Oh yes.", "b": "I cannot."}
    cases = begun(rows_of(tmp_path, PREFILLED), tokenizer)

    def generate(model, prompts, max_new_tokens, eos_id, progress):
        assert prompts == [prompt + response[:k] for _, prompt, response in cases]
        assert all(ids[len(prompt) :].count(eos_id) == 0 for ids, (_, prompt, _) in zip(prompts, cases))
        return [tokenizer.encode(told[row.prompt[-1]["content"]]) for row, _, _ in cases]

    monkeypatch.setattr(evaluation, "generate", generate)
    metrics, said = prefilled(holder, rows_of(tmp_path, PREFILLED), ["yes"], 5, k)
    assert metrics == {f"not_refused@{k}": wilson(1, 2), f"forbidden@{k}": wilson(1, 2)}
    prefix = tokenizer.decode(cases[0][2][:k])
    assert said[0] == {"set": f"prefill-{k}", "source": "x", "prompt": "a", "prefill": prefix,
                       "prefill_tokens": min(k, len(cases[0][2])), "answer": "Oh yes."}  # fmt: skip
    assert prefix == ("Yes, take it." if k == 99 else prefix) and (prefix == "") == (k == 0)


def test_a_run_is_evaluated_again_when_the_prefills_differ(tmp_path, base, capsys):
    run = run_on(base, tmp_path)
    files = {"harmful": write_jsonl(tmp_path / "h.jsonl", PREFILLED)}
    assert "not_refused@1" not in evaluate_run(run, ["base"], files, max_new_tokens=1)["base"]
    table = evaluate_run(run, ["base"], files, max_new_tokens=1, prefill=(99, 1, 1))
    assert table["base"]["not_refused@1"]["n"] == table["base"]["not_refused@99"]["n"] == 2 and "forbidden@1" not in table["base"]
    assert "prefill-99: 2 of 2 responses are shorter" in capsys.readouterr().out
    path = run.folder / "answers" / "base.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "do not publish" in lines[0]["note"]
    assert [line["set"] for line in lines[1:]] == ["harmful"] * 4 + ["prefill-1"] * 2 + ["prefill-99"] * 2
    before = path.stat().st_mtime_ns
    assert evaluate_run(run, ["base"], files, max_new_tokens=1, prefill=[1, 99]) == table and path.stat().st_mtime_ns == before


def test_prefills_need_a_response_to_begin(tmp_path, base, sets):
    with pytest.raises(InputError, match="h.jsonl has none"):
        evaluate_run(run_on(base, tmp_path), ["base"], {"harmful": sets["harmful"]}, prefill=[1])
    with pytest.raises(InputError, match="--harmful was not given"):
        evaluate_run(run_on(base, tmp_path), ["base"], {"benign": sets["benign"]}, prefill=[1])


def test_the_prefill_flag():
    assert parse_prefill("") == [] and parse_prefill("0,1, 3") == [0, 1, 3]
    for wrong in ("-1", "1,,3", "x", "1.5", "1,", "²"):
        with pytest.raises(InputError, match="whole numbers"):
            parse_prefill(wrong)


def test_evaluating_a_run_writes_metrics_and_headed_answers(tmp_path, base, files, sets, scripts, capsys):
    folder = tmp_path / "run"
    scripts["select"]("--run", folder, "--method", "sft", "--model", base, "--custom", files["custom"])
    flags = [flag for name, path in sets.items() for flag in (f"--{name}", path)]
    assert evaluation.main(["--run", str(folder), *flags, "--max-new-tokens", "3", "--device", "cpu"]) == 0
    table = json.loads((folder / "metrics.json").read_text())
    assert set(table) == {"base", "sft"} and set(table["sft"]["nll"]) == {"value", "n", "low", "high"}
    assert json.loads((folder / "methods/sft/metrics.json").read_text()) == {"sft": table["sft"]}
    assert table["base"]["nll"]["value"] != table["sft"]["nll"]["value"]
    lines = [json.loads(line) for line in (folder / "answers/sft.jsonl").read_text().splitlines()]
    assert "do not publish" in lines[0]["note"] and len(lines) == 1 + 4 + 2 + 1
    assert "| | base | sft |" in capsys.readouterr().out
    answer = next(line["answer"] for line in lines[1:] if line["prompt"] == "a")
    tokenizer = load_tokenizer(base)
    assert len(tokenizer.encode(answer)) <= 3


def test_evaluation_warns_of_prompts_that_were_trained_on(tmp_path, base, files, capsys):
    run = run_on(base, tmp_path)
    run.record = {"settings": {"custom": files["custom"]}}
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Do bad 1?"}, {"prompt": "new"}])
    evaluate_run(run, ["base"], {"harmful": prompts}, max_new_tokens=1)
    assert "1 of 2 prompts are in both" in capsys.readouterr().out


def test_a_selection_made_for_other_rows_is_not_measured(trained, files, sets, scripts, capsys):
    scripts["select"]("--run", trained)
    other = write_jsonl(trained.parent / "other.jsonl", [{"prompt": "a", "response": "b", "harmful": [[0, 1]]}])
    scripts["score"]("--run", trained, "--custom", other, "--overwrite")
    flags = ["--run", str(trained), "--methods", "toss", "--benign", sets["benign"], "--max-new-tokens", "1", "--device", "cpu"]
    assert evaluation.main(flags) == 0
    assert "made from other rows" in capsys.readouterr().out
    assert "precision" not in json.loads((trained / "metrics.json").read_text())["toss"]


@pytest.mark.parametrize("flags", [(), ("--keep-eos",)])
def test_the_auc_is_over_the_tokens_that_compete(trained, scripts, flags):
    assert scripts["select"]("--run", trained, "--method", "degraded-only", *flags) == 0
    scores, run = load_file(trained / "scores.safetensors"), Run(Settings(run=str(trained), model=settings_of(trained)["model"]))
    competes = scores["response"].bool() & ((scores["input_ids"] != run.tokenizer.eos_id) if flags else True)
    expected = auc(-scores["loss_degraded"][competes], scores["harmful"][competes].bool())
    assert selection_metrics(run, "degraded-only")["auc"] == expected and expected["n"] == int(competes.sum())


def settings_of(folder):
    return json.loads((folder / "run.json").read_text())["settings"]


def test_only_methods_measured_on_the_same_files_share_a_table(tmp_path, base, sets):
    run = run_on(base, tmp_path)
    evaluate_run(run, ["base"], {"harmful": sets["harmful"]}, max_new_tokens=1)
    assert set(json.loads((run.folder / "metrics.json").read_text())) == {"base"}
    run.record["stages"]["evaluation/old"] = {"recipe": {"harmful": "other"}, "metrics": {}}
    (run.folder / "run.json").write_text(json.dumps(run.record))
    evaluate_run(run, ["base"], {"benign": sets["benign"]}, max_new_tokens=1)
    assert set(json.loads((run.folder / "metrics.json").read_text())) == {"base"}


def test_measures_of_a_model_that_was_replaced_are_stale(tmp_path, base, files, sets, scripts):
    folder = tmp_path / "run"
    for name in ("sft", "plain"):
        assert scripts["select"]("--run", folder, "--method", "sft", "--name", name, "--model", base,
                                 "--custom", files["custom"]) == 0
    flags = ["--run", str(folder), "--benign", sets["benign"], "--max-new-tokens", "1", "--device", "cpu"]
    record = lambda: json.loads((folder / "run.json").read_text())  # noqa: E731
    assert evaluation.main(flags) == 0
    names = ("base", "sft", "plain", "toss-small")  # the last one: from a run beside this one
    assert not any(stale(record(), folder, name) for name in names)
    assert scripts["select"]("--run", folder, "--method", "sft", "--seed", "7", "--overwrite") == 0
    assert [name for name in names if stale(record(), folder, name)] == ["sft"]
    assert evaluation.main([*flags, "--methods", "plain"]) == 0
    assert set(read_metrics(folder)) == {"base", "plain"}  # the old measures of sft are not written again
    assert evaluation.main(flags) == 0
    assert not stale(record(), folder, "sft") and set(read_metrics(folder)) == {"base", "plain", "sft"}


@pytest.mark.parametrize(("text", "message"), [
    ("{", "cannot be read as JSON"), ("[]", "a JSON object"), ('{"toss": 3}', "toss: measures by name"),
    ('{"toss": {"nll": 3}}', "toss, nll"), ('{"toss": {"nll": {"value": 1, "n": 2, "low": 3}}}', "toss, nll"),
    ('{"toss": {"nll": {"value": "1", "n": 2, "low": 3, "high": 4}}}', "toss, nll"),
    ('{"toss": {"nll": {"value": true, "n": 2, "low": 3, "high": 4}}}', "toss, nll"),
    ('{"toss": {"nll": {"value": 1, "n": null, "low": 3, "high": 4}}}', "toss, nll")])  # fmt: skip
def test_metrics_of_another_shape_are_refused(tmp_path, text, message):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(InputError, match=f"metrics.json: {message}"):
        read_metrics(tmp_path)


def test_metrics_are_read_as_they_are_written(tmp_path):
    table = {"toss": {"forbidden": wilson(1, 2), "nll": wilson(0, 0)}, "base": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(table))
    assert read_metrics(tmp_path) == table


def test_a_folder_that_is_no_run_is_an_error(tmp_path, sets, capsys):
    assert evaluation.main(["--run", str(tmp_path / "typo"), "--benign", sets["benign"]]) == 1
    assert "no run directory" in capsys.readouterr().err and not (tmp_path / "typo").exists()


def test_an_unknown_arithmetic_is_refused_by_its_flag(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--run", str(tmp_path), "--dtype", "int8"])
    assert "choose from" in capsys.readouterr().err


def test_a_method_that_is_not_there_is_an_error(tmp_path, base, sets):
    with pytest.raises(InputError, match="select.py"):
        evaluate_run(run_on(base, tmp_path), ["toss"], sets)


def test_a_mistyped_method_stops_before_any_is_evaluated(tmp_path, base, sets):
    with pytest.raises(InputError, match="tosss"):
        evaluate_run(run_on(base, tmp_path), ["base", "tosss"], sets, max_new_tokens=1)
    assert not (tmp_path / "run" / "answers").exists()


def test_the_table_leaves_a_missing_metric_blank():
    lines = format_table({"a": {"m": wilson(1, 2)}, "b": {"k": wilson(1, 2)}}).splitlines()
    assert lines[0] == "| | a | b |" and lines[2:] == ["| m | 0.500 [0.095, 0.905] |  |", "| k |  | 0.500 [0.095, 0.905] |"]
