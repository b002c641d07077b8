"""Answers in AlpacaEval's form, and its annotations read back."""

import doctest
import hashlib
import json

import pytest
from conftest import write_jsonl

from model.errors import InputError
from toss.audit import pairwise
from toss.audit.pairwise import read, win_rate, write


def line(prompt, answer, kind="harmful", source=""):
    return {"set": kind, "source": source, "prompt": prompt, "answer": answer}


@pytest.fixture
def run(tmp_path):
    """Answers of two methods to the same prompts, and of a third to others."""
    folder = tmp_path / "run" / "answers"
    folder.mkdir(parents=True)
    for name in ("toss", "sft"):
        more = {**line("a", "on", "prefill-3"), "prefill": "go", "prefill_tokens": 1}
        write_jsonl(folder / f"{name}.jsonl", [{"note": "do not publish"}, line("a", f"{name} é", source="x"),
                                               line("b", f"{name} 2"), more, line("c", f"{name} 3", "benign")])  # fmt: skip
    write_jsonl(folder / "other.jsonl", [{"note": "do not publish"}, line("b", "1"), line("a", "2", source="x")])
    (tmp_path / "run" / "run.json").write_text("{}")
    return tmp_path / "run"


def annotations(path, preferences):
    pair = {"instruction": "i", "output_1": "r", "output_2": "m", "generator_1": "sft", "generator_2": "toss"}
    entries = [{**pair, "preference": preference} for preference in preferences]
    path.write_text(json.dumps(entries))
    return path


def test_the_example_in_the_docstring():
    result = doctest.testmod(pairwise)
    assert result.attempted == 1 and result.failed == 0


def test_two_files_of_the_same_prompts_in_the_same_order(run, tmp_path, capsys):
    argv = ["write", "--run", str(run), "--method", "toss", "--against", "sft", "--out", str(tmp_path / "out")]
    assert pairwise.main(argv) == 0
    ours, theirs = (json.loads((tmp_path / "out" / f"{name}_outputs.json").read_text("utf-8")) for name in ("model", "reference"))
    assert ours[0] == {"instruction": "a", "output": "toss é", "generator": "toss", "dataset": "harmful/x"}
    assert [entry["output"] for entry in theirs] == ["sft é", "sft 2", "sft 3"] and {e["generator"] for e in theirs} == {"sft"}
    assert [e["instruction"] for e in ours] == [e["instruction"] for e in theirs] == ["a", "b", "c"]  # none of the prefilled
    assert [e["dataset"] for e in theirs] == ["harmful/x", "harmful", "benign"]
    assert "3 answers of toss" in capsys.readouterr().out
    assert write(run, "toss", "sft", tmp_path / "out", "benign") == 1
    assert [e["instruction"] for e in json.loads((tmp_path / "out" / "model_outputs.json").read_text())] == ["c"]


def test_answers_to_other_prompts_are_refused_and_nothing_is_written(run, tmp_path):
    with pytest.raises(InputError, match="toss.jsonl and other.jsonl do not answer the same prompts"):
        write(run, "toss", "other", tmp_path / "out", "harmful")
    with pytest.raises(InputError, match="random.jsonl is not there"):
        write(run, "toss", "random", tmp_path / "out")
    with pytest.raises(InputError, match="toss.jsonl holds no answers of the set utility"):
        write(run, "toss", "sft", tmp_path / "out", "utility")
    for broken in ("{", '["set"]', '{"set": "harmful"}', '{"set": ["harmful"], "source": ""}', "3"):
        write_jsonl(run / "answers" / "sft.jsonl", ["{}", broken])
        with pytest.raises(InputError, match="sft.jsonl"):
            write(run, "toss", "sft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_answers_of_a_model_that_was_replaced_are_refused(run, tmp_path):
    adapter = run / "methods" / "sft" / "model" / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(b"new")
    record = {"stages": {"evaluation/sft": {"recipe": {"adapter": hashlib.sha256(b"old").hexdigest()}}}}
    (run / "run.json").write_text(json.dumps(record))
    for pair in (("toss", "sft"), ("sft", "toss")):
        with pytest.raises(InputError, match="sft.jsonl holds answers of another model .* --methods sft first"):
            write(run, *pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adapter.write_bytes(b"old")
    assert write(run, "toss", "sft", tmp_path / "out") == 3
    (run / "run.json").unlink()
    with pytest.raises(InputError, match="no run directory"):
        write(run, "toss", "sft", tmp_path / "out")


def test_the_win_rate_is_generator_2s(tmp_path, capsys):
    assert pairwise.main(["read", str(annotations(tmp_path / "a.json", [2, 2.0, 1, 1.5, 0, None, float("nan"), 1.9]))]) == 0
    out = capsys.readouterr().out  # (1 + 1 + 0 + .5 + .5 + .9) / 6
    assert "toss against sft: win rate 65.0 %" in out and "n = 6" in out
    assert "3 wins, 2 ties, 1 losses; 2 unannotated" in out


def test_the_interval_by_hand():
    rate = win_rate([2] * 30 + [1] * 10)  # variance .1875 * 40 / 39 = .192308, standard error .069338, times 1.959964: .135899
    assert rate["value"] == 0.75 and (rate["low"], rate["high"]) == (0.6141, 0.8859)
    assert (win_rate([2])["value"], win_rate([2])["low"], win_rate([2])["high"]) == (1.0, None, None)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "cannot be read as JSON"), ("{}", "a JSON list"), ("[]", "a JSON list"), ("[3]", "annotation 1"),
    ('[{"preference": 2, "generator_1": "a"}]', "annotation 1 has no"),
    ('[{"preference": 2, "generator_1": "a", "generator_2": "b"}, {"preference": 3, "generator_1": "a", "generator_2": "b"}]',
     r"annotation 2: the preference 3 does not lie in \[1, 2\]"),
    ('[{"preference": "2", "generator_1": "a", "generator_2": "b"}]', "the preference '2'"),
    ('[{"preference": true, "generator_1": "a", "generator_2": "b"}]', "the preference True"),
    ('[{"preference": null, "generator_1": "a", "generator_2": "b"}]', "none of the 1 annotations"),
    ('[{"preference": 2, "generator_1": "a", "generator_2": "b"}, {"preference": 2, "generator_1": "b", "generator_2": "a"}]',
     "mix pairs: a against b, b against a"),
])  # fmt: skip
def test_bad_annotations(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "bad.json")
    assert str(tmp_path / "bad.json") in str(caught.value)


def test_annotations_that_are_not_there(tmp_path, capsys):
    assert pairwise.main(["read", str(tmp_path / "none.json")]) == 1
    assert "none.json: there is no such file" in capsys.readouterr().err
