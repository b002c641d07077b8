"""What was dropped? `diagnose` says how far the models moved, and toward what, at each position."""

import csv

import torch
import torch.nn.functional as F
from conftest import script, write_jsonl
from helpers import random_adapter, said
from scored_runs import rows_by_hand

from model.lora import use
from toss.audit.diagnose import COLUMNS, divergences, means
from toss.tokens import Tokens
from toss.workbench.records import read_record
from toss.workbench.run import open_run


def kl_by_hand(model, tokens: Tokens, one, other) -> torch.Tensor:
    """KL(one || other) at every response token, row by row, from whole logits in float64."""
    result = torch.zeros(len(tokens.response), dtype=torch.float64)
    for row in (0, 2, 3):  # the other is skipped
        places = tokens.places([row])
        ids = tokens.input_ids[places][None].long()
        log_probs = []
        for adapter in (one, other):
            logits = model.lm_head(use(model, adapter)(ids)[0])
            log_probs.append(F.log_softmax(logits.double(), dim=-1))
        kl = F.kl_div(log_probs[1], log_probs[0], reduction="none", log_target=True).sum(-1)
        result[places[1:]] = kl[:-1].detach()
    return result * tokens.response


def test_kl_in_batches_and_chunks_is_that_of_whole_logits(model, tokenizer):
    tokens = rows_by_hand(tokenizer)
    adapters = {}
    for seed, name in enumerate(("degraded", "utility", "sft")):
        adapters[name] = random_adapter(model, seed)
    logits = (len(adapters) + 4) * model.config.vocab_size * 2  # of two tokens
    moved = divergences(model, adapters, tokens, tokens.response, 10, logits=logits)
    for name, tuned in adapters.items():
        expected = [kl_by_hand(model, tokens, None, tuned)]
        for role in ("degraded", "utility"):
            of_base = kl_by_hand(model, tokens, None, adapters[role])
            expected.append(of_base - kl_by_hand(model, tokens, tuned, adapters[role]))
        assert torch.allclose(moved[name], torch.stack(expected), atol=1e-5)


def test_means_by_position_leave_out_what_few_rows_have(tokenizer):
    tokens = rows_by_hand(tokenizer)
    values = torch.zeros(3, 12, dtype=torch.float64)
    values[0, tokens.response] = torch.tensor([1.0, 2, 9, 9, 4, 2, 9, 1, 5]).double()
    lines = means(tokens, {"sft": values}, tokens.response, 10)
    positions = [(line["position"], line["n"], line["kl_base"]) for line in lines]
    assert positions == [(0, 3, 2.0), (1, 3, 3.0)]


def test_diagnosing_a_run_and_then_one_model_that_was_replaced(trained, capsys):
    script("select", "--run", trained)
    script("select", "--run", trained, "--method", "sft")
    file = trained / "diagnosis/kl.csv"
    command = f"toss.audit.diagnose --run {trained} --positions 4"
    out = said(capsys, f"{command} --max-rows 6")
    assert "custom: 6 of 10 rows" in out
    lines = list(csv.DictReader(file.read_text().splitlines()))
    assert list(lines[0]) == ["model", "rows", "position", "n", *COLUMNS]
    assert {line["model"] for line in lines} == {"sft", "toss", "degraded", "utility"}
    assert {line["rows"] for line in lines} == {"custom"}
    for line in lines:
        if line["model"] == "degraded":  # it went all the way to itself
            assert line["kl_base"] == line["toward_degraded"] > "0"

    script("select", "--run", trained, "--method", "sft", "--seed", "7", "--overwrite")
    record = read_record(trained / "diagnosis")
    assert open_run(trained).changed_inputs(record) == ["methods/sft/model"]
    rows = write_jsonl(trained.parent / "mine.jsonl", [{"prompt": "a", "response": "b"}] * 4)
    said(capsys, f"{command} --rows {rows} --methods sft")
    assert f"\nsft,{rows},0,4," in file.read_text() and "custom" not in file.read_text()
