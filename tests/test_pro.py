"""TOSS-Pro from end to end: its rounds, what each trains on, and what it leaves behind."""

import json

import pytest
import torch
from safetensors.torch import load_file


def test_pro_writes_its_rounds_and_why_each_row_came(trained, files, scripts):
    assert scripts["select"]("--run", trained, "--method", "toss", "--pro", "2", "--pro-samples", "3") == 0
    folder = trained / "methods/toss-pro"
    added = [[json.loads(line) for line in (folder / f"round-{t}/added.jsonl").read_text().splitlines()] for t in (1, 2)]
    assert [len(rows) for rows in added] == [3, 3] and len({row["row"] for rows in added for row in rows}) == 6
    scores = load_file(trained / "scores.safetensors")
    S = torch.where(scores["response"], scores["loss_utility"] - scores["loss_degraded"], -torch.inf)
    assert added[0][0]["row"] == int(torch.searchsorted(scores["offsets"], S.argmax(), right=True)) - 1
    assert added[0][0]["score"] == pytest.approx(float(S.max()), abs=1e-4)
    last = load_file(folder / "round-2/scores.safetensors")
    assert torch.equal(last["loss_utility"], scores["loss_utility"]) and not torch.equal(last["loss_degraded"], scores["loss_degraded"])
    chosen = load_file(folder / "selection.safetensors")["keep"]
    S = (last["loss_utility"] - last["loss_degraded"])[last["response"]]
    assert S[~chosen[last["response"]]].min() >= S[chosen[last["response"]]].max()  # masked by the last round's scores
    assert (folder / "round-2/degraded/adapter_model.safetensors").exists()


def test_pro_trains_on_the_reference_set_and_all_rows_added_so_far_with_the_references_settings(trained, scripts, monkeypatch):
    import toss.refinement

    seen, train = [], toss.refinement.train
    monkeypatch.setattr(toss.refinement, "train", lambda model, data, keep, settings, *rest: (
        seen.append((data, keep, settings)), train(model, data, keep, settings, *rest))[1])
    flags = ("--pro", "2", "--pro-samples", "3", "--lr", "0.5", "--rank", "4")
    assert scripts["select"]("--run", trained, *flags, "--epochs", "1", fast_flags=False) == 0
    added = [[json.loads(line)["row"] for line in (trained / f"methods/toss-pro/round-{t}/added.jsonl").read_text().splitlines()]
             for t in (1, 2)]
    scores = load_file(trained / "scores.safetensors")
    for (data, keep, settings), rows in zip(seen, (added[0], added[0] + added[1])):
        assert data.rows == 5 + len(rows) and keep.all() and (settings.lr, settings.rank) == (1e-2, 2)
        for place, row in enumerate(rows, start=5):
            ours = data.input_ids[data.offsets[place] : data.offsets[place + 1]]
            assert torch.equal(ours, scores["input_ids"][scores["offsets"][row] : scores["offsets"][row + 1]])


def test_pro_may_learn_only_the_top_tokens_of_the_rows_it_adds(trained, scripts, monkeypatch):
    import toss.refinement

    seen, train = [], toss.refinement.train
    monkeypatch.setattr(toss.refinement, "train", lambda model, data, keep, settings, *rest: (
        seen.append(keep), train(model, data, keep, settings, *rest))[1])
    flags = ("--pro", "1", "--pro-samples", "3", "--discard", "0.2", "--keep-eos")
    assert scripts["select"]("--run", trained, "--name", "whole", *flags) == 0
    assert scripts["select"]("--run", trained, "--name", "top", "--pro-train", "top", *flags) == 0
    added = [json.loads(line)["row"] for line in (trained / "methods/top/round-1/added.jsonl").read_text().splitlines()]
    scores = load_file(trained / "scores.safetensors")
    competes = scores["response"].bool()
    competes[scores["offsets"][1:] - 1] = False  # each row's EOS
    S = torch.where(competes, scores["loss_utility"] - scores["loss_degraded"], -torch.inf)
    top = torch.zeros(len(S), dtype=torch.bool)
    top[S.argsort(descending=True, stable=True)[: int(0.2 * int(competes.sum()) + 1e-9)]] = True
    learnt = torch.cat([top[scores["offsets"][row] : scores["offsets"][row + 1]] for row in added])
    assert seen[0].all() and torch.equal(seen[1][-len(learnt) :], learnt) and seen[1][: -len(learnt)].all() and learnt.any()
