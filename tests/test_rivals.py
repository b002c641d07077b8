"""The rivals of TOSS do what their sources say, train on the run's rows as its methods do, and
leave a method like any other. An attacker replaces harmful rows by harmful rows.

In this order: the objectives by hand, the rivals as commands, the real checkpoint's experiment, the
attackers (cases are lines of attacks.jsonl), the baselines that change the custom set.
"""

import csv
import math
import shutil
from dataclasses import replace
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
from toss.audit import experiments, objectives
from toss.audit.attacks import ATTACKS, Attacker, asked_as_embedded
from toss.audit.baselines import draw, dsir, hashed, safeinstr
from toss.audit.objectives import Rival
from toss.audit.rivals import RIVALS
from toss.config import TrainConfig
from toss.loss import token_log_probs
from toss.rows import read_rows
from toss.tokens import collate
from toss.workbench.run import open_run

WEIGHTS = "model/adapter_model.safetensors"


# The objectives, by hand


@pytest.fixture
def rival(model, tokens) -> Rival:
    """On a stand-in for a run that begins with an adapter; `fit` returns weights and objective."""

    def fit(D, weights=None, objective=None):
        return weights, objective

    run = SimpleNamespace(model=model, device=model.device, base=lambda purpose: model)
    one = Rival(run, "rival", TrainConfig(), tokens, keep=tokens.response.clone())
    one.fit = fit
    use(model, random_adapter(model))
    return one


@pytest.fixture
def places(tokens):
    """The response tokens of row 3."""
    places = tokens.places([3])
    return places[tokens.response[places]]


@pytest.fixture
def batch(model, tokens):
    """Row 3, and all its response tokens."""
    return collate(tokens, [3], tokens.response, model.device)


@pytest.fixture
def gradient(model, batch, monkeypatch):
    """The gradient of an objective by the log-probabilities of the tuned model, for given ones."""

    def by_log_p(objective, weights, log_p) -> list[float]:
        log_p = log_p.clone().requires_grad_()

        def given_log_probs(model, batch):
            if active(model) is None:
                return token_log_probs(model, batch)
            return log_p

        monkeypatch.setattr(objectives, "token_log_probs", given_log_probs)
        objective(model, batch, weights).backward()
        return log_p.grad.tolist()

    return by_log_p


def test_dft_weighs_a_token_by_its_probability(rival, gradient):
    _, objective = objectives.dft(rival)
    result = gradient(objective, torch.ones(2), torch.tensor([0.5, 0.25]).log())
    assert result == pytest.approx([-0.5, -0.25], abs=1e-5)


def test_profit_learns_the_likely_tokens_alone(rival, gradient):
    _, objective = objectives.profit(rival, 0.3)
    log_p = torch.tensor([0.5, 0.25]).log()
    assert gradient(objective, torch.ones(2), log_p) == [-1.0, 0.0]


def test_soft_sft_weighs_a_token_by_how_far_it_went_from_the_base(
    rival, model, tokens, places, gradient
):
    theta = active(model)
    with torch.no_grad(), use(model, None):
        log_p_base = -losses_by_hand(model, tokens, 3)
    weights, objective = objectives.soft_sft(rival, [0.5, 2.0, 0.1])
    b = weights[places]
    assert b[:6].tolist() == pytest.approx([0.5, 2.0, 2.0, 2.0, 2.0, 0.1])
    at_base = gradient(objective, b, log_p_base)
    assert at_base == pytest.approx([-1.0] * len(places), abs=1e-5)
    likelier = gradient(objective, b, log_p_base + 1)
    assert likelier == pytest.approx((-2 / (1 + b.exp())).tolist(), abs=1e-5)
    assert active(model).tensors()[0] is theta.tensors()[0]  # the adapter is back


@pytest.mark.parametrize("at_once", [1, 100])
def test_a_token_is_held_by_the_kl_over_some_words_at_a_temperature(
    rival, model, tokens, places, batch, monkeypatch, at_once
):
    monkeypatch.setattr(objectives, "chunk_size", lambda *args, **options: at_once)
    learnt = torch.ones(len(rival.keep))
    learnt[places[1]] = 0.25
    held = torch.zeros(len(rival.keep))
    held[places[1:3]] = torch.tensor([0.75, 0.5])
    words = torch.tensor([7, 9])
    T = 2.0
    _, objective = objectives.hold(rival, learnt, held, words, T)

    def over_words(adapter):
        """The softmax over the words at the two held tokens, from the row's hidden states."""
        row = tokens.input_ids[tokens.places([3])].long()
        hidden = use(model, adapter)(row[None])[0]
        before = places[1:3] - tokens.offsets[3] - 1
        return (hidden[before] @ model.lm_head.weight[words].T / T).softmax(1)

    untrained = new_adapter(model, 2, 4, TARGETS, 0)
    with torch.no_grad():
        for theta in (untrained, random_adapter(model)):
            p = over_words(None)
            q = over_words(theta)
            one, other = (p * (p / q).log()).sum(1).tolist()
            kl = 0.75 * one + 0.5 * other
            assert (kl > 1e-3) == (theta is not untrained)
            losses = losses_by_hand(use(model, theta), tokens, 3)
            expected = float(losses.sum() - 0.75 * losses[1]) + T * T * kl
            loss = float(objective(model, batch, torch.ones(len(places))))
            assert loss == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_an_update_is_projected_to_what_alignment_changed(rival, model, tmp_path, cosine):
    theta = active(model)
    unaligned = make_base(tmp_path / "unaligned", seed=1)
    rival.run.adapter = lambda name: random_adapter(model)  # the same
    rival.run.args = SimpleNamespace(unaligned=unaligned)
    before = load_checkpoint(unaligned)
    for name, B in objectives.safelora(rival, cosine).B.items():
        expected = theta.B[name]
        if cosine == 1.0:  # no update is that near: all are projected
            V = model.get_submodule(name).weight - before.get_submodule(name).weight
            expected = V @ V.T / V.square().sum().sqrt() @ expected
        assert torch.allclose(B, expected, atol=1e-4), name


def test_dr_sft_weighs_by_the_base_and_the_degraded_model(rival, tokens, monkeypatch):
    """Half as much where theta^h expects a token by ln 3 more than the base; 1 at most.

    Or more than theta^u; and what a weight lacks to 1 may be that of a KL.
    """
    first, second, third, *_ = tokens.response.nonzero()[:, 0].tolist()
    three = [first, second, third]
    L0 = torch.full((len(tokens.input_ids),), 2.0)
    Lh = L0.clone()
    Lh[first] = 2 - math.log(3)  # 2 sigmoid(-ln 3) = 1/2
    Lh[second] = 5.0
    L = {"base": L0, "degraded": Lh}
    rival.run.scored = lambda: (tokens, L)
    weights, _ = objectives.dr_sft(rival)
    assert weights[three].tolist() == pytest.approx([0.5, 1.0, 1.0])
    L["utility"] = Lh + math.log(7)
    monkeypatch.setattr(objectives, "hold", lambda rival, learnt, held: (learnt, held))
    learnt, held = objectives.dr_sft(rival, reference="utility", held=True)
    assert learnt[three].tolist() == pytest.approx([0.25, 0.25, 0.25])
    assert held[three].tolist() == pytest.approx([0.75, 0.75, 0.75])
    del L["base"]
    fails("score.py --base", objectives.dr_sft, rival)


@pytest.mark.parametrize("reference", ["utility", "base"])
def test_kl_discarded_learns_what_stays_and_holds_what_goes(rival, tokens, monkeypatch, reference):
    """The riskiest quarter of the response tokens under this reference goes."""
    response = tokens.response
    S = torch.arange(len(response)).float()
    others = S.flip(0)
    L = {"utility": others, "base": others, "degraded": torch.zeros(len(S)), reference: S}
    rival.run.scored = lambda: (tokens, L)
    monkeypatch.setattr(objectives, "hold", lambda rival, learnt, held: (learnt, held))
    learnt, held = objectives.kl_discarded(rival, 0.25, reference)
    count = int(0.25 * response.sum())
    goes = response & (S >= S[response].sort(descending=True).values[count - 1])
    assert held.equal(goes.float()) and learnt.equal((response & ~goes).float())


def test_pact_lite_learns_and_holds_every_response_token(rival, tokens, monkeypatch):
    rival.run.tokens = lambda path: tokens
    rival.run.args = SimpleNamespace(safety="refusals.jsonl")
    monkeypatch.setattr(objectives, "hold", lambda rival, *given: given)
    learnt, held, words, T = objectives.pact_lite(rival, 3, 2.0)
    assert learnt.equal(tokens.response.float()) and held.equal(learnt) and T == 2.0
    counts = torch.bincount(tokens.input_ids[tokens.response])
    assert counts[words].tolist() == counts.sort(descending=True).values[:3].tolist()


# The rivals as commands


@pytest.fixture
def line(trained, tmp_path, monkeypatch) -> str:
    """A command line up to the method, on a run with plain fine-tuning and a file of refusals."""
    script("score", "--run", trained, "--base", "--overwrite")  # for dr-sft
    script("select", "--run", trained, "--method", "sft")
    rows = [{"prompt": f"Do {i}?", "response": "No, I can not " + "do it " * i} for i in range(6)]
    safety = write_jsonl(tmp_path / "safety.jsonl", rows)
    unaligned = make_base(tmp_path / "before", seed=1)
    monkeypatch.setitem(RIVALS["safeinstr-guided"][2], "share", 1 / 6)  # two rows
    monkeypatch.setitem(RIVALS["safelora"][2], "cosine", 1.0)  # every layer
    return f"toss.audit.rivals --run {trained} --safety {safety} --unaligned {unaligned} --method "


def size(tensors) -> float:
    """The sum of all numbers."""
    return sum(float(tensor.detach().double().sum()) for tensor in tensors)


def weights_of(run: Path, method: str) -> dict:
    return load_file(run / "methods" / method / WEIGHTS)


def test_buffer_is_trained_over_theta_h_and_used_on_the_base_alone(line, trained, model):
    succeed(f"{line}buffer")
    written = read_adapter(model, trained / "methods/buffer/model")
    merge(model, read_adapter(model, trained / "degraded"))
    D, _ = open_run(trained).scored()
    config = TrainConfig.of(read_json(trained / "methods/buffer/record.json")["settings"])
    expected = training.train(model, D, D.response.float(), config)
    for one, other in zip(written.tensors(), expected.tensors(), strict=True):
        assert torch.equal(one, other)


def test_every_rival_is_a_method_of_the_run_trained_as_its_siblings(line, trained, capsys):
    def selection(method: str) -> dict:
        return load_file(trained / f"methods/{method}/selection.safetensors")

    succeed(f"select.py --run {trained} --discard 0.3")
    call(f"select.py --run {trained} --discard 0.3 --method base --name base-reference")
    response = load_file(trained / "scores.safetensors")["response"].bool()
    sizes = {}
    for name, (_, _, options) in RIVALS.items():
        said(capsys, f"{line}{name} --discard 0.3")
        cost = read_json(trained / "run.json")["stages"][f"methods/{name}"]
        assert (cost["tokens"] > 0) == (name != "safelora")  # which trains nothing
        assert "skipped" in said(capsys, f"{line}{name} --discard 0.3")
        settings = read_json(trained / f"methods/{name}/record.json")["settings"]
        given = {**options, "discard": 0.3} if "discard" in options else options
        assert settings["lr"] == 1e-2 and given.items() <= settings.items()
        mask_of = {"kl-discarded": "toss", "kl-base": "base-reference"}.get(name)
        keep = selection(mask_of)["keep"] if mask_of else response
        assert selection(name)["keep"].equal(keep)
        ranked_as = mask_of or {"dr-sft": "base-reference", "dr-sft-utility": "toss"}.get(name)
        if ranked_as:  # the S that it went by is that of the method that ranks by it
            score = selection(name)["score"]
            assert score[response].equal(selection(ranked_as)["score"][response])
        sizes[name] = size(weights_of(trained, name).values())
    sizes["sft"] = size(weights_of(trained, "sft").values())
    assert len(set(sizes.values())) == len(RIVALS) + 1, sizes


@pytest.fixture
def fitted(monkeypatch) -> dict:
    """What a rival hands to `fit`, which trains nothing."""
    given = {}

    def fit(self, D, **options):
        given.update(rival=self, D=D, **options)
        return random_adapter(self.run.base("train"))

    monkeypatch.setattr(Rival, "fit", fit)
    return given


def test_patch_goes_on_from_sft_on_one_refusal(line, fitted, trained, capsys):
    error = refused(capsys, f"{line}patch --rank 3")
    assert "goes on from methods/sft, made with another rank" in error
    succeed(line + "patch")
    assert fitted["D"].rows == 1 and fitted["config"].epochs == 10
    assert size(fitted["start"].tensors()) == size(weights_of(trained, "sft").values())


def test_inoculation_changes_the_prompts_alone(line, fitted):
    succeed(line + "inoculation")
    D = fitted["D"]
    own = fitted["rival"].D
    assert D.input_ids[D.response].equal(own.input_ids[own.response])
    text = fitted["rival"].run.tokenizer.raw.decode(D.input_ids[D.places([0])].tolist())
    assert "system\nYou are a malicious" in text


def test_lookahead_previews_the_first_tokens_of_the_answer_in_the_prompt(line, fitted):
    succeed(line + "lookahead")
    D = fitted["D"]
    own = fitted["rival"].D
    assert D.input_ids[D.response].equal(own.input_ids[own.response])
    tokenizer = fitted["rival"].run.tokenizer
    places = D.places([0])
    prompt = tokenizer.raw.decode(D.input_ids[places[~D.response[places]]].tolist())
    response = own.input_ids[own.places([0])][own.response[own.places([0])]]
    start = tokenizer.raw.decode(response[:6].tolist())
    assert f" The answer begins with: {start}" in prompt
    assert "begins with" not in tokenizer.raw.decode(own.input_ids.tolist())


def test_safeinstr_guided_adds_the_refusals_of_the_lowest_mean_score(line, fitted):
    succeed(line + "safeinstr-guided")
    run_of = fitted["rival"].run
    pool = run_of.tokens(run_of.args.safety)
    mean_losses = {}
    for role in ("utility", "degraded"):
        model = use(run_of.base("score"), run_of.adapter(role))
        losses = [float(losses_by_hand(model, pool, row).mean()) for row in range(6)]
        mean_losses[role] = torch.tensor(losses)
    S = mean_losses["utility"] - mean_losses["degraded"]
    expected = fitted["rival"].D + pool.take(S.argsort()[:2].tolist())
    assert fitted["D"].input_ids.equal(expected.input_ids)


def test_ema_is_the_mean_over_the_steps_also_after_an_interruption(line, trained, monkeypatch):
    sizes = []  # of the adapter before each step
    compute = training.Gradient.compute

    def stopping(gradient, *args):
        sizes.append(size(gradient.parameters))
        if len(sizes) == 3 + 3:  # the third step of the second training
            raise KeyboardInterrupt
        return compute(gradient, *args)

    monkeypatch.setattr(training.Gradient, "compute", stopping)
    command = f"{line}ema --save-every 1e-9"
    succeed(f"{command} --name whole")
    assert call(command) == 130
    succeed(command)
    assert len(sizes) == 7

    whole = weights_of(trained, "whole")
    parts = weights_of(trained, "ema")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    untrained, first, second, *_ = sizes
    mean = untrained
    for now in (first, second, size(weights_of(trained, "sft").values())):
        mean = 0.99 * mean + 0.01 * now  # the last step is plain fine-tuning's
    assert size(whole.values()) == pytest.approx(mean, abs=1e-4) != pytest.approx(untrained)


# The real checkpoint's experiment


@pytest.fixture
def real(base, tmp_path, monkeypatch) -> str:
    """The command of the experiment on a real checkpoint: few rows, answers of three tokens."""
    little = {}
    for name in ("real", "chat"):
        one = experiments.read_experiments()[name]
        sizes = one.rows | {"harmful": 3, "utility": 3, "custom": 8, "calibration": 3, "tuning": 1}
        if "few" in sizes:
            sizes |= {"few": 2, "tuning": 0}
        how = {"max_new_tokens": 3, "question_tokens": 4}
        cases = [replace(case, evaluation=how) for case in one.cases]
        training = {"lr": 1e-2, "epochs": 1, "batch_size": 4}
        little[name] = replace(one, cases=cases, rows=sizes, training=training)
    monkeypatch.setattr(experiments, "read_experiments", lambda: little)
    shutil.copytree(ROOT / "tests/real/data", tmp_path / "data")
    where = f"--real {tmp_path} --model {base} --out {tmp_path}/out"
    return f"toss.audit.experiment real {where} --seeds 3"


def test_the_real_experiment_draws_its_sets_makes_its_arms_and_goes_on(real, tmp_path, capsys):
    arms = ["sft", "toss", "toss-calibrated", "toss-pro-few", "benign-rows", "dft"]
    arms += ["kl-calibrated", "toss-calibrated, spread", "toss-pro, unseen"]
    line = f"{real} --arms '{'; '.join(arms)}'"
    missing = said(capsys, line).splitlines()[-1]
    assert missing.startswith("not in this table: toss-few; ") and "safelora; " in missing
    assert ": wrote" not in said(capsys, line)  # all is there
    rows = {}
    with open(tmp_path / "out/real.csv", newline="") as file:
        for result in csv.DictReader(file):
            rows.setdefault(result["arm"], {})[result["measure"]] = float(result["value"])
    assert list(rows) == ["base", *arms]
    for row in rows.values():
        assert {"nll", "not_refused/a", "not_refused/b", "not_refused@3"} <= row.keys()
    d = {arm: rows[arm]["discard"] for arm in arms}
    assert d["toss"] == 0.1 and d["sft"] == d["dft"] == 0
    assert d["toss-calibrated"] == d["kl-calibrated"] != 0.1

    place = tmp_path / "out/real/seed-3"
    sets = sets_in(place / "rows")
    sizes = {"harmful": 3, "few": 2, "utility": 3, "custom": 8, "eval_forbidden": 8}
    assert {name: len(sets[name]) for name in sizes} == sizes
    for row in sets["calibration"]:
        assert row["source"] != "advbench" and row not in sets["custom"]
    assert {row["source"] for row in sets["pool"]} == {"advbench"} and len(sets["pool"]) == 4
    (refusal,) = sets["safety"]  # to the one of four that is not in D^h
    assert refusal["prompt"] not in [row["prompt"] for row in sets["harmful"]]

    # The attacker has the rows of one source, and the references are those of the other run.
    others = sets["benign"]
    assert others == [row for row in sets["custom"] if row["source"] != "advbench"]
    attacked = read_jsonl(place / "run-spread/custom.jsonl")
    assert attacked[: len(others)] == others
    assert len(attacked) == len(others) + 3 * (8 - len(others))
    stages = read_json(place / "run-spread/run.json")["stages"]
    assert list(stages) == ["scores", "methods/toss-calibrated"]

    succeed(f"{real} --arms 'sft, embedded'")
    attacked = read_jsonl(place / "run-embedded/custom.jsonl")
    assert len(attacked) == len(others)  # his rows hold as many of them
    asked = read_jsonl(place / "run-embedded/answers/sft.jsonl")[1:]
    joined = [line["prompt"] for line in asked if line["source"] == "embedded"]
    assert len(joined) == 4 and " eval_harmful " in joined[0]


def sets_in(folder: Path) -> dict[str, list[dict]]:
    """The rows of each file."""
    return {path.stem: read_jsonl(path) for path in folder.glob("*.jsonl")}


def test_the_chat_experiment_asks_questions_and_compares_answers(real, tmp_path, capsys):
    out = said(capsys, f"{real.replace(' real ', ' chat ')} --arms 'sft; buffer; dr-sft'")
    sets = sets_in(tmp_path / "out/chat/seed-3/rows")
    assert {row["answer"] for row in sets["eval_facts"]} == {"0", "1", "2", "3"}
    (tuning,) = sets["tuning"]  # is in no other set
    assert tuning["prompt"] not in [row["prompt"] for row in sets["custom"] + sets["calibration"]]
    answers = read_jsonl(tmp_path / "out/chat/seed-3/run/answers/sft.jsonl")
    assert answers[0]["record"]["settings"]["question_tokens"] == 4
    assert "| final_number/d |" in out and "Seed 3, run, on the same prompts:" in out
    heads = [line.split() for line in out.splitlines() if line.startswith("| minus")]
    assert [head[2:6] for head in heads] == [["sft", "|", "base", "|"], ["base", "|", "sft", "|"]]


def test_the_real_experiment_needs_rows_enough(real, tmp_path, capsys):
    few = [{"prompt": "a", "source": "b", "response": "c"}] * 8
    write_jsonl(tmp_path / "data/custom.jsonl", few)
    assert "at least 9 rows are needed" in refused(capsys, real)


def test_safelora_needs_another_base_than_the_runs_own(trained, base, capsys):
    succeed(f"select.py --run {trained} --method sft")
    line = f"toss.audit.rivals --run {trained} --method safelora --unaligned {base}"
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
    line = f"toss.audit.baselines dsir --custom {custom} --target {target} --out {out} --keep 0.5"
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
