"""The diagnosis against KL computed row by row from whole logits, and against a selection counted by hand."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import write_jsonl

from model import load_checkpoint
from model.lora import active_adapter, add_adapter, set_adapter
from toss.audit import diagnose
from toss.audit.diagnose import COLUMNS, Group, means, movement, stale_models
from toss.audit.discards import discard_statistics, response_positions, token_type
from toss.dataset import Tokens


@pytest.fixture
def model(base):
    """The tiny base with three adapters that do something."""
    model = load_checkpoint(base, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for seed, name in enumerate(("degraded", "utility", "sft")):
        add_adapter(model, name, 2, 4, ["q_proj", "v_proj", *(["lm_head"] if name != "utility" else [])], seed)
        for layer in active_adapter(model).values():
            torch.nn.init.normal_(layer.lora_B[name], std=0.5, generator=generator)
    return model


@pytest.fixture
def tokens():
    """Rows of 3, 9, 0 (skipped) and 6 tokens; the last one has two turns."""
    generator = torch.Generator().manual_seed(1)
    response = torch.tensor([0, 1, 1] + [0, 0, 0, 0, 1, 1, 1, 1, 1] + [0, 0, 1, 0, 1, 1], dtype=torch.bool)
    ids = torch.randint(0, 384, (18,), generator=generator, dtype=torch.int32)
    return Tokens(ids, torch.tensor([0, 3, 12, 12, 18]), response, torch.zeros(18, dtype=torch.bool), "rows.jsonl")


def direct(model, tokens, p_name, q_name):
    """KL(p || q) at every response token, each row by itself, from whole logits in float64."""
    result = torch.zeros(len(tokens.response), dtype=torch.float64)
    with torch.no_grad():
        for start, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist()):
            logs = []
            for name in (p_name, q_name):
                set_adapter(model, name)
                if end > start:
                    logits = model.lm_head(model(tokens.input_ids[None, start:end].long()))[0]
                    logs.append(F.log_softmax(logits.double(), dim=-1))
            if logs:
                result[start + 1 : end] = F.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)[:-1]
    return result * tokens.response


@pytest.mark.parametrize(("budget", "chunk"), [(1, 100), (18, 2), (1000, 100)])
def test_kl_in_padded_batches_and_chunks_is_that_of_whole_logits(model, tokens, budget, chunk, monkeypatch):
    monkeypatch.setattr(diagnose, "LOGITS", diagnose.TENSORS * 384 * chunk)
    got = movement(model, tokens, tokens.response, ["sft", "degraded", "base"], budget)
    for name, column in got.items():
        tuned = None if name == "base" else name
        expected = [direct(model, tokens, None, tuned)]
        for role in ("degraded", "utility"):
            expected.append(direct(model, tokens, None, role) - direct(model, tokens, tuned, role))
        assert torch.allclose(column, torch.stack(expected), atol=1e-5)
    assert got["sft"][0][tokens.response].min() > 1e-3 and (got["sft"][:, ~tokens.response] == 0).all()


def test_the_base_did_not_move_and_the_degraded_model_went_all_the_way(model, tokens):
    got = movement(model, tokens, tokens.response, ["base", "degraded", "utility"], 100)
    assert (got["base"] == 0).all()
    assert torch.equal(got["degraded"][1], got["degraded"][0]) and torch.equal(got["utility"][2], got["utility"][0])


def test_positions_count_response_tokens_over_turns_and_skipped_rows(tokens):
    assert response_positions(tokens)[tokens.response].tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2]


def test_means_by_position_leave_out_what_few_rows_have(tokens):
    values = torch.zeros(3, 18, dtype=torch.float64)
    values[0, tokens.response] = torch.tensor([1.0, 2, 4, 2, 9, 9, 9, 1, 5, 9], dtype=torch.float64)
    lines = means(Group("g", tokens, ""), {"sft": values}, tokens.response, 10)
    assert [(line["position"], line["n"], line["kl_base"]) for line in lines] == [(0, 3, 2.0), (1, 3, 3.0)]
    assert lines[0]["model"] == "sft" and lines[0]["rows"] == "g" and set(COLUMNS) < set(lines[0])


def test_types_of_tokens(tokenizer):
    types = {"a": "word", "7": "number", ".": "punctuation", " ": "whitespace", "\n": "whitespace",
             "<|im_start|>": "other special", tokenizer.eos: "end of sequence", "é": "word"}  # the last one: half a character
    assert {text: token_type(tokenizer.encode(text)[0], tokenizer) for text in types} == types


def test_discards_counted_by_hand(tokenizer):
    a, seven, dot, eos = (*(tokenizer.encode(text)[0] for text in "a7."), tokenizer.eos_id)
    ids = [a, a, seven, dot, eos] + [] + [a, a, a, eos] + [a, a, eos]  # the second row was skipped
    response = torch.tensor([0, 1, 1, 1, 1] + [0, 1, 1, 1] + [0, 1, 1], dtype=torch.bool)
    harmful = torch.tensor([0, 1, 0, 0, 0] + [0, 1, 1, 0] + [0, 0, 0], dtype=torch.bool)
    tokens = Tokens(torch.tensor(ids, dtype=torch.int32), torch.tensor([0, 5, 5, 9, 12]), response, harmful, "rows")
    keep = lambda *gone: torch.ones(12, dtype=torch.bool).index_fill(0, torch.tensor(gone), False)  # noqa: E731
    keeps = {"toss": keep(1, 6, 7, 8), "random": keep(8, 11), "sft": torch.ones(12, dtype=torch.bool)}
    found = discard_statistics(tokens, keeps, tokenizer)
    assert list(found["methods"]) == ["toss", "random"]  # sft discards nothing
    toss = found["methods"]["toss"]
    assert (toss["discarded"], toss["of"], toss["share"]) == (4, 9, 0.4444)
    assert toss["by_position"]["0"] == {"discarded": 2, "of": 3, "share": 0.6667}
    assert toss["by_position"]["1"]["discarded"] == 1 and toss["by_position"]["2-3"] == {"discarded": 1, "of": 3, "share": 0.3333}
    assert toss["by_position"]["32+"] == {"discarded": 0, "of": 0, "share": None}
    assert toss["by_type"]["word"] == {"discarded": 3, "of": 4, "share": 0.75} and toss["by_type"]["number"]["discarded"] == 0
    assert toss["by_type"]["end of sequence"] == {"discarded": 1, "of": 3, "share": 0.3333}
    assert toss["rows"] == {"of": 3, "none": 1, "some": 1, "all": 1, "quartiles": [0.125, 0.25, 0.625]}
    assert (toss["precision"]["value"], toss["recall"]["value"]) == (0.75, 1.0)
    assert found["overlap"] == {"toss": {"toss": 1.0, "random": 0.25}, "random": {"toss": 0.5, "random": 1.0}}
    tokens.harmful[:] = False
    assert "precision" not in discard_statistics(tokens, keeps, tokenizer)["methods"]["toss"]


def test_nothing_is_left_of_a_mask_that_drops_nothing(tokens, tokenizer):
    assert discard_statistics(tokens, {"sft": torch.ones(18, dtype=torch.bool)}, tokenizer) == {"methods": {}, "overlap": {}}


def test_diagnosing_a_run(trained, scripts, capsys):
    scripts["select"]("--run", trained)
    scripts["select"]("--run", trained, "--method", "sft")
    capsys.readouterr()
    flags = ["--run", str(trained), "--device", "cpu", "--positions", "4"]
    assert diagnose.main([*flags, "--max-rows", "6"]) == 0
    printed = capsys.readouterr().out
    assert "benign: 6 of 8 rows without harm" in printed and "mixed: 2 of 2 rows" in printed
    assert "harmful-reference: 5 of 5 rows of harmful.jsonl" in printed and "| share of word " in printed
    with open(trained / "diagnosis/kl.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["model", "rows", "position", "n", "kl_base", "toward_degraded", "toward_utility"]
    assert {line["model"] for line in lines} == {"sft", "toss", "degraded", "utility"}
    assert {line["rows"] for line in lines} == {"benign", "harmful-reference"}  # two mixed rows are too few
    assert {line["position"] for line in lines} == {"0", "1", "2", "3"} and {line["n"] for line in lines} == {"6", "5"}
    degraded = [line for line in lines if line["model"] == "degraded"]
    assert all(line["kl_base"] == line["toward_degraded"] and float(line["kl_base"]) > 0 for line in degraded)
    found = json.loads((trained / "diagnosis/discards.json").read_text())
    selected = json.loads((trained / "run.json").read_text())["stages"]
    assert list(found["methods"]) == ["toss"] and found["methods"]["toss"]["rows"]["of"] == 10 and "diagnosis" in selected
    assert "no data" in (trained / "diagnosis/kl-mixed.svg").read_text()
    assert len(list((trained / "diagnosis").glob("*.svg"))) == 9
    rows = write_jsonl(trained.parent / "mine.jsonl", [{"prompt": "a", "response": f"b {i}"} for i in range(4)])
    assert diagnose.main([*flags, "--rows", rows, "--methods", "sft"]) == 0
    names = {file.name for file in (trained / "diagnosis").iterdir()}  # the old groups are gone
    assert names == {"kl.csv", "discards.json", "kl-mine.svg", "toward-degraded-mine.svg", "toward-utility-mine.svg"}
    assert "No method of the run discards a token." in capsys.readouterr().out


def test_the_diagnosis_of_a_model_that_was_replaced_is_stale(trained, scripts):
    record = lambda: json.loads((trained / "run.json").read_text())  # noqa: E731
    for method in ("toss", "sft"):
        scripts["select"]("--run", trained, "--method", method)
    assert stale_models(record(), trained) == []  # nothing is diagnosed yet
    flags = ["--run", str(trained), "--device", "cpu", "--positions", "1", "--max-rows", "3"]
    assert diagnose.main(flags) == 0 and stale_models(record(), trained) == []
    scripts["select"]("--run", trained, "--method", "sft", "--seed", "7", "--overwrite")
    assert stale_models(record(), trained) == ["sft"]
    (trained / "utility" / "adapter_model.safetensors").write_bytes(b"another")
    assert set(stale_models(record(), trained)) == {"sft", "utility"}


@pytest.mark.parametrize(("spans", "group"), [([], "custom: 4 of 4 rows, without ground truth, of plain.jsonl"),
                                              ([[0, 3]], "harmful: 4 of 4 wholly harmful rows of plain.jsonl")])  # fmt: skip
def test_groups_of_other_custom_sets(spans, group, tmp_path, scripts, trained, capsys):
    rows = [{"prompt": "a", "response": f"b {i}", "harmful": spans} for i in range(4)]
    scripts["score"]("--run", trained, "--custom", write_jsonl(tmp_path / "plain.jsonl", rows), "--overwrite")
    assert diagnose.main(["--run", str(trained), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"\n{group}\n" in printed and ("\nharmful-reference: 5 of 5 rows" in printed) == (not spans)
    assert "benign" not in printed and "mixed" not in printed


def test_a_selection_made_from_other_tokens_is_not_described(trained, scripts, capsys):
    scripts["select"]("--run", trained)
    other = write_jsonl(trained.parent / "other.jsonl", [{"prompt": "a", "response": "b"}] * 3)
    scripts["score"]("--run", trained, "--custom", other, "--overwrite")
    assert diagnose.main(["--run", str(trained), "--device", "cpu"]) == 0
    assert "made from other tokens" in capsys.readouterr().out
    assert json.loads((trained / "diagnosis/discards.json").read_text())["methods"] == {}


def test_what_is_not_there_is_an_error(trained, tmp_path, files, capsys):
    run, error = ["--run", str(trained), "--device", "cpu"], lambda: capsys.readouterr().err
    assert diagnose.main(["--run", str(tmp_path / "typo")]) == 1 and "no run directory" in error()
    assert diagnose.main([*run, "--methods", "sft"]) == 1 and "--method sft first" in error()
    assert diagnose.main([*run, "--max-rows", "2"]) == 1 and "at least 3" in error()
    assert diagnose.main([*run, "--rows", str(tmp_path / "none.jsonl")]) == 1 and "none.jsonl: there is no such file" in error()
    assert diagnose.main([*run, "--rows", files["custom"], files["custom"]]) == 1 and "one name" in error()
    (trained / "utility/adapter_model.safetensors").unlink()
    assert diagnose.main(run) == 1 and "run train.py" in error()
    assert not (trained / "diagnosis").exists()
