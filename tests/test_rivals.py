"""What stands behind the claims: rivals that do what their sources say and leave a method like any
other, an attacker who replaces harmful rows by harmful rows, sets, and the experiments' commands.

In this order: the rivals' two parts by hand, the rivals as commands, the attackers (cases are lines
of attacks.jsonl), the baselines that change the custom set, drawn sets, the experiments.
"""

import math
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, make_base, read_jsonl, script, write_jsonl
from helpers import TARGETS, call, each_line, losses_by_hand, random_adapter, refused, said, succeed
from safetensors.torch import load_file

from model import load_checkpoint
from model.io import read_json
from model.lora import active, merge, new_adapter, use
from model.peft import read_adapter
from toss import training
from toss.audit.runs import costs_of, record_of
from toss.config import TrainConfig
from toss.loss import token_log_probs
from toss.rows import read_rows
from toss.scoring import score
from toss.study import rivals
from toss.study.attacks import ATTACKS, Attacker, asked_as_embedded, mean_risk
from toss.study.baselines import draw, dsir, hashed, safeinstr
from toss.study.rivals import RIVALS, Work
from toss.tokens import collate
from toss.workbench import flags
from toss.workbench.run import open_run

WEIGHTS = "model/adapter_model.safetensors"
EXPERIMENTS = sorted((ROOT / "toss/study/experiments").glob("*.sh"))


# The two parts of a rival, by hand


@pytest.fixture
def work(model, tokens, monkeypatch) -> Work:
    """On a stand-in for a run that begins with an adapter; `fit` returns weights and objective."""
    monkeypatch.setattr(Work, "fit", lambda work, weights, objective=None: (weights, objective))
    run = SimpleNamespace(model=model, device=model.device, base=lambda purpose: model)
    use(model, random_adapter(model))
    return Work(run, "rival", TrainConfig(), tokens, tokens.response.float())


@pytest.fixture
def places(tokens):
    """The response tokens of row 3."""
    places = tokens.places([3])
    return places[tokens.response[places]]


@pytest.fixture
def batch(model, tokens):
    """Row 3, and all its response tokens."""
    return collate(tokens, [3], tokens.response, model.device)


def test_soft_sft_weighs_a_token_by_how_far_it_went_from_the_base(
    work, model, tokens, places, batch, monkeypatch
):
    theta = active(model)
    with torch.no_grad(), use(model, None):
        log_p_base = -losses_by_hand(model, tokens, 3)
    weights, objective = rivals.soft_sft(work, [0.5, 2.0, 0.1])
    b = weights[places]
    assert b[:6].tolist() == pytest.approx([0.5, 2.0, 2.0, 2.0, 2.0, 0.1])

    def gradient(log_p) -> list[float]:
        """By the log-probabilities of the tuned model, for given ones."""
        log_p = log_p.clone().requires_grad_()

        def given_log_probs(model, batch):
            return token_log_probs(model, batch) if active(model) is None else log_p

        monkeypatch.setattr(rivals, "token_log_probs", given_log_probs)
        objective(model, batch, b).backward()
        return log_p.grad.tolist()

    assert gradient(log_p_base) == pytest.approx([-1.0] * len(places), abs=1e-5)
    expected = (-2 / (1 + b.exp())).tolist()
    assert gradient(log_p_base + 1) == pytest.approx(expected, abs=1e-5)
    assert active(model).tensors()[0] is theta.tensors()[0]  # the adapter is back


@pytest.mark.parametrize("at_once", [1, 100])
def test_what_a_weight_lacks_to_1_is_that_of_a_kl(
    work, model, tokens, places, batch, monkeypatch, at_once
):
    monkeypatch.setattr(rivals, "chunk_size", lambda *args, **options: at_once)
    work.weights[places[1:3]] = torch.tensor([0.25, 0.5])
    weights, objective = rivals.hold(work)
    assert weights.equal(tokens.response.float())

    def predicted(adapter):
        """The softmax at the two held tokens, from the row's hidden states."""
        row = tokens.input_ids[tokens.places([3])].long()
        hidden = use(model, adapter)(row[None])[0]
        before = places[1:3] - tokens.offsets[3] - 1
        return model.lm_head(hidden[before]).softmax(1)

    untrained = new_adapter(model, 2, 4, TARGETS, 0)
    with torch.no_grad():
        for theta in (untrained, random_adapter(model)):
            p = predicted(None)
            q = predicted(theta)
            one, other = (p * (p / q).log()).sum(1).tolist()
            kl = 0.75 * one + 0.5 * other
            assert (kl > 1e-3) == (theta is not untrained)
            losses = losses_by_hand(use(model, theta), tokens, 3)
            expected = float(losses.sum() - 0.75 * losses[1] - 0.5 * losses[2]) + kl
            loss = float(objective(model, batch, torch.ones(len(places))))
            assert loss == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_an_update_is_projected_to_what_alignment_changed(work, model, tmp_path, cosine):
    theta = active(model)
    unaligned = make_base(tmp_path / "unaligned", seed=1)
    work.run.adapter = lambda name: random_adapter(model)  # the same
    work.run.args = SimpleNamespace(unaligned=unaligned)
    before = load_checkpoint(unaligned)
    for name, B in rivals.safelora(work, cosine).B.items():
        expected = theta.B[name]
        if cosine == 1.0:  # no update is that near: all are projected
            V = model.get_submodule(name).weight - before.get_submodule(name).weight
            expected = V @ V.T / V.square().sum().sqrt() @ expected
        assert torch.allclose(B, expected, atol=1e-4), name


def test_a_weight_by_risk_is_half_as_much_at_s_of_ln_3_and_1_at_most(tokens):
    """2 sigmoid(-ln 3) = 1/2, and 2 sigmoid(-ln 7) = 1/4."""
    first, second, third, *_ = tokens.response.nonzero()[:, 0].tolist()
    L0 = torch.full((len(tokens.input_ids),), 2.0)
    Lh = L0.clone()
    Lh[first] = 2 - math.log(3)
    Lh[second] = 5.0
    L = {"base": L0, "degraded": Lh, "utility": Lh + math.log(7)}
    weights, _ = rivals.by_risk(tokens, L, "base")
    assert weights[[first, second, third]].tolist() == pytest.approx([0.5, 1.0, 1.0])
    weights, _ = rivals.by_risk(tokens, L, "utility")
    assert weights[[first, second, third]].tolist() == pytest.approx([0.25, 0.25, 0.25])
    assert not weights[~tokens.response].any()
    del L["base"]
    fails("score.py --base", rivals.by_risk, tokens, L, "base")


@pytest.mark.parametrize("reference", ["utility", "base"])
def test_the_riskiest_quarter_under_this_reference_has_weight_0(tokens, reference):
    response = tokens.response
    S = torch.arange(len(response)).float()
    others = S.flip(0)
    L = {"utility": others, "base": others, "degraded": torch.zeros(len(S)), reference: S}
    weights, _ = rivals.top_discarded(tokens, L, 0.25, reference)
    count = int(0.25 * response.sum())
    goes = response & (S >= S[response].sort(descending=True).values[count - 1])
    assert weights.equal((response & ~goes).float())


# The rivals as commands


@pytest.fixture
def line(trained, tmp_path, monkeypatch) -> str:
    """A command line up to the method, on a run with plain fine-tuning and losses of the base."""
    script("score", "--run", trained, "--base", "--overwrite")
    script("select", "--run", trained, "--method", "sft")
    unaligned = make_base(tmp_path / "before", seed=1)
    monkeypatch.setitem(RIVALS["safelora"].training, "cosine", 1.0)  # every layer
    return f"toss.study.rivals --run {trained} --unaligned {unaligned} --method "


def test_buffer_is_trained_over_theta_h_and_used_on_the_base_alone(line, trained, model):
    succeed(f"{line}buffer")
    written = read_adapter(model, trained / "methods/buffer/model")
    merge(model, read_adapter(model, trained / "degraded"))
    D, _ = open_run(trained).losses()
    config = TrainConfig.of(read_json(trained / "methods/buffer/model/record.json")["settings"])
    expected = training.train(model, D, D.response.float(), config)
    for one, other in zip(written.tensors(), expected.tensors(), strict=True):
        assert torch.equal(one, other)


def test_every_rival_is_a_method_of_the_run_trained_as_its_siblings(line, trained, capsys):
    def selection(method: str) -> dict:
        return load_file(trained / f"methods/{method}/selection.safetensors")

    def size(method: str) -> float:
        weights = load_file(trained / "methods" / method / WEIGHTS)
        return sum(float(tensor.double().sum()) for tensor in weights.values())

    succeed(f"select.py --run {trained} --discard 0.3")
    call(f"select.py --run {trained} --discard 0.3 --method base --name base-reference")
    response = load_file(trained / "scores.safetensors")["response"].bool()
    sizes = {size("sft")}
    for name, rival in RIVALS.items():
        said(capsys, f"{line}{name} --discard 0.3")
        cost = costs_of(open_run(trained))[f"methods/{name}/model"]
        assert (cost["tokens"] > 0) == (name != "safelora")  # which trains nothing
        assert "skipped" in said(capsys, f"{line}{name} --discard 0.3")
        settings = record_of(open_run(trained), name)["settings"]
        given = rival.weighing | rival.training
        if "discard" in given:
            given["discard"] = 0.3
        assert settings["lr"] == 1e-2 and given.items() <= settings.items()
        ranked_as = {"utility": "toss", "base": "base-reference"}.get(given.get("reference"))
        keep = selection(ranked_as)["keep"] if "discard" in given else response
        assert selection(name)["keep"].equal(keep)
        if ranked_as:  # the S that it went by is that of the method that ranks by it
            ranking = selection(ranked_as)["score"]
            assert selection(name)["score"][response].equal(ranking[response])
        sizes.add(size(name))
    assert len(sizes) == len(RIVALS) + 1, sizes


def test_safelora_needs_another_base_than_the_runs_own(trained, base, capsys):
    succeed(f"select.py --run {trained} --method sft")
    line = f"toss.study.rivals --run {trained} --method safelora --unaligned {base}"
    assert "is the run's own base" in refused(capsys, line)


# The attackers


def row_of(line: dict) -> dict:
    """A row whose harm is given in words."""
    row = {"response": line["response"]}
    for part in line.get("harmful", []):
        start = row["response"].index(part)
        row.setdefault("harmful", []).append([start, start + len(part)])
    return row


@each_line("attacks.jsonl")
def test_an_attack(case):
    his = [row_of(line) for line in case["his"]]
    pool = [row_of(line) for line in case.get("pool", [])]
    D_h = [{"response": case.get("D_h", "")}]
    D_u = [{"response": case.get("D_u", "")}]
    other = {"prompt": "o?", "response": "harmless"}
    attacker = Attacker(his, [other], pool, D_h, D_u, risk=lambda rows: case["scores"])
    assert ATTACKS[case["attack"]](attacker) == [other, *map(row_of, case["gives"])]


TASKS = [
    {"prompt": "t?", "response": "It is 1.", "answer": "1", "source": "b"},
    {"prompt": "u?", "response": "It is 2.", "source": "b"},
]
BOTH = {"prompt": "t? h?", "response": "It is 1. Sure.", "harmful": [[9, 14]]}


def test_embedded_joins_each_row_behind_a_harmless_one_which_stands_nowhere_else():
    attacker = Attacker([{"prompt": "h?", "response": "Sure."}], TASKS, [], [], [], risk=len)
    assert ATTACKS["embedded"](attacker) == [TASKS[1], BOTH]


def test_what_is_asked_after_embedded_is_joined_in_the_same_way():
    harmful = [{"prompt": "h?", "response": "Sure.", "source": "a"}] * 2
    asked, questions = asked_as_embedded(harmful, TASKS)
    both = {"prompt": "t? h?", "source": "embedded"}
    assert asked == [*harmful, both, {"prompt": "u? h?", "source": "embedded"}]
    assert questions == [*TASKS, {**both, "answer": "1"}]  # only the first task has one


def test_an_attack_replaces_the_harmful_rows_and_nothing_else(trained, tmp_path):
    world = tmp_path / "world"
    succeed(f"data.world --seed 3 --out {world}")
    custom = read_jsonl(world / "custom.jsonl")
    harmful = [row for row in custom if "harmful" in row]
    others = [row for row in custom if "harmful" not in row]
    write_jsonl(tmp_path / "few.jsonl", others[:5] + harmful[:4])
    succeed(f"data.world --seed 3 --harmful-rows 312 --out {tmp_path}/pool")
    rows = f"--custom {tmp_path}/few.jsonl --harmful {world}/harmful.jsonl"
    rows += f" --utility {world}/utility.jsonl --pool {tmp_path}/pool/custom.jsonl"
    rows += f" --refused {world}/safety.jsonl"
    for name in ATTACKS:
        out = tmp_path / name
        succeed(f"toss.study.attacks {name} --run {trained} --out {out} {rows}")
        attacked = read_jsonl(out / "custom.jsonl")
        his = [row for row in attacked if "harmful" in row]
        joined = 4 if name == "embedded" else 0  # these now stand in his rows
        assert [row for row in attacked if "harmful" not in row] == others[joined:5]
        assert len(his) == (12 if name == "spread" else 4) and his != harmful[:4]
    pool = read_jsonl(tmp_path / "low-score/pool.jsonl")
    refusals = {row["prompt"] for row in read_jsonl(world / "safety.jsonl")}
    assert len(pool) > 200 and not any(row["prompt"] in refusals for row in pool)


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


# The baselines that change the custom set


def lines(path) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


@pytest.fixture
def sets(tmp_path) -> dict[str, str]:
    """Custom rows in an unusual spelling; refusals; a target of few words."""
    custom = [f'{{"response":"Stone  {i}.",  "prompt": "é {i}?", "x": 1}}' for i in range(97)]
    safety = [{"prompt": f"Harm {i}?", "response": "I cannot."} for i in range(10)]
    target = [{"prompt": "Tell 3?", "response": "Stone 3."}] * 40
    return {
        "custom": write_jsonl(tmp_path / "custom.jsonl", custom),
        "safety": write_jsonl(tmp_path / "safety.jsonl", safety),
        "target": write_jsonl(tmp_path / "target.jsonl", target),
    }


def test_safety_rows_make_up_their_share_of_the_result(tmp_path, sets):
    out = tmp_path / "out.jsonl"
    counts = safeinstr(sets["custom"], sets["safety"], str(out), share=10 / 107, seed=3)
    assert counts == {"read": 97, "safety": 10, "written": 107}
    written = lines(out)
    custom = lines(sets["custom"])
    safety = lines(sets["safety"])
    assert sorted(written) == sorted(custom + safety)  # each line once, unchanged
    assert [i for i, line in enumerate(written) if line in safety] != [*range(97, 107)]  # shuffled


@pytest.mark.parametrize(
    ("make", "other", "share"), [(safeinstr, "safety", 0.05), (dsir, "target", 0.5)]
)
def test_a_seed_draws_the_same_lines_again_and_another_seed_others(
    tmp_path, sets, make, other, share
):
    out = tmp_path / "out.jsonl.gz"
    written = []
    for seed in (7, 7, 8):
        counts = make(sets["custom"], sets[other], str(out), share, seed=seed)
        written.append(out.read_bytes())
        assert len(read_rows(out)) == counts["written"]
    assert written[0] == written[1] != written[2]


def test_rows_like_the_target_stay_and_keep_their_order(tmp_path, capsys):
    moss = {"prompt": "Say.", "response": "moss fern moss fern moss fern " * 2}
    iron = {"prompt": "Say.", "response": "iron coal iron coal iron coal " * 2}
    iron["harmful"] = [[0, 4]]
    custom = write_jsonl(tmp_path / "c.jsonl", [moss, iron] * 20)
    like = {"prompt": "Say.", "response": "fern moss fern moss"}
    target = write_jsonl(tmp_path / "t.jsonl", [like] * 40)
    out = tmp_path / "out.jsonl"
    line = f"toss.study.baselines dsir --custom {custom} --target {target} --out {out} --keep 0.5"
    counts = "read 40, written 20, harmful kept 0, harmful dropped 20"
    assert said(capsys, line) == f"{out}: {counts}\n"
    assert lines(out) == lines(custom)[::2]
    assert dsir(custom, target, str(out), keep=1.0)["written"] == 40
    assert lines(out) == lines(custom)


def test_rows_are_drawn_in_proportion_to_their_weights():
    """One of eleven, the first weighing 5 and the others 1: a third of the seeds draw it."""
    weights = np.log([5.0] + [1.0] * 10)
    first = sum(draw(weights, 1, seed) == [0] for seed in range(300))
    three_standard_errors = 3 * math.sqrt(1 / 3 * 2 / 3 / 300)
    assert abs(first / 300 - 1 / 3) < three_standard_errors


def test_the_buckets_do_not_depend_on_the_process():
    """Python's own hash of a text does, by its seed."""
    (row,) = read_rows([{"prompt": "Stir it", "response": "So"}])
    assert hashed(row, 100).tolist() == [64, 20, 75, 71]


# Drawn sets


@pytest.fixture
def drawing(tmp_path) -> str:
    """A command that draws few rows."""
    shutil.copytree(ROOT / "tests/real/data", tmp_path / "data")
    sizes = "--harmful 3 --few 2 --utility 3 --custom 8 --calibration 3"
    return f"toss.study.draw --data {tmp_path}/data --out {tmp_path}/rows --seed 3 {sizes}"


def sets_in(folder: Path) -> dict[str, list[dict]]:
    """The rows of each file."""
    return {path.stem: read_jsonl(path) for path in folder.glob("*.jsonl")}


def test_sets_are_drawn_that_share_no_row_and_are_not_replaced(drawing, tmp_path, capsys):
    succeed(f"{drawing} --tuning 1 --questions")
    drawn = sets_in(tmp_path / "rows")
    sizes = {"harmful": 3, "few": 2, "utility": 3, "custom": 8, "tuning": 1}
    assert {name: len(drawn[name]) for name in sizes} == sizes
    for row in drawn["calibration"]:
        assert row["source"] != "advbench" and row not in drawn["custom"]
    assert {row["source"] for row in drawn["pool"]} == {"advbench"} and len(drawn["pool"]) == 4
    assert drawn["benign"] == [row for row in drawn["custom"] if row["source"] != "advbench"]
    assert {row["answer"] for row in drawn["eval_utility"]} == {"0", "1", "2", "3"}
    (tuning,) = drawn["tuning"]  # is in no other set
    assert tuning["prompt"] not in [row["prompt"] for row in drawn["custom"] + drawn["calibration"]]
    refused(capsys, drawing)
    assert sets_in(tmp_path / "rows") == drawn


def test_rows_enough_are_needed(drawing, tmp_path, capsys):
    few = [{"prompt": "a", "source": "b", "response": "c"}] * 8
    write_jsonl(tmp_path / "data/custom.jsonl", few)
    assert "at least 9 rows are needed" in refused(capsys, drawing)


# The experiments

# Instead of Python: writes down the command, and makes what the experiment looks at itself.
STUB = """#!/bin/sh
echo "$*" >> commands.txt
for word; do
    case $before in --out | --run) folder=$word ;; esac
    before=$word
done
case $* in
    *data.world* | *study.draw*)
        mkdir -p "$folder"
        for name in harmful custom; do seq 100 > "$folder/$name.jsonl"; done ;;
    train.py*) mkdir -p "$folder/degraded" "$folder/utility" ;;
    *calibrate*) echo "next: select.py --discard 0.05 --name x" ;;
esac
"""


class Parsed(Exception):
    """A command line is one that its program takes."""


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_command_of_an_experiment_is_one_that_its_program_takes(
    experiment, tmp_path, monkeypatch
):
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    for name in ("toss", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = ["1000"]
    if "MODEL DATA" in experiment.read_text():
        words = ["MODEL", "DATA", *words]
    place = experiment.relative_to(ROOT)
    environment = {**os.environ, "PYTHON": "./python", "UNALIGNED": "OTHER"}
    subprocess.run(["sh", place, *words], cwd=tmp_path, env=environment, check=True, timeout=60)
    if experiment.stem in ("common", "world"):  # read by the others
        return

    parse = flags.Parser.parse_known_args

    def parse_alone(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise Parsed

    commands = (tmp_path / "commands.txt").read_text().splitlines()
    monkeypatch.setattr(flags.Parser, "parse_known_args", parse_alone)
    for command in {command.replace("-m ", "") for command in commands}:
        program, *argv = shlex.split(command)
        with pytest.raises(Parsed):
            script(program.removesuffix(".py"), *argv, fast=False)
