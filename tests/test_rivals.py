"""The rivals of TOSS do what their sources say, train on the run's rows as its methods do, and
leave a method like any other. An attacker replaces harmful rows by harmful rows.

In this order: the objectives by hand, the rivals as commands, the real checkpoint's experiment, the
attackers, the baselines that change the custom set.
"""

import csv
import gzip
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fails, make_base, read_jsonl, run, script, write_jsonl
from helpers import TARGETS, call, losses_by_hand, random_adapter, refused, said
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
from toss.methods import METHODS, Candidates
from toss.rows import read_rows
from toss.selection import competing_tokens
from toss.tokens import collate
from toss.workbench.run import open_run

WEIGHTS = "model/adapter_model.safetensors"
MASK = "selection.safetensors"


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

    def by_log_p(objective, weights, log_p):
        log_p = log_p.clone().requires_grad_()

        def given_log_probs(model, batch):
            if active(model) is None:
                return token_log_probs(model, batch)
            return log_p

        monkeypatch.setattr(objectives, "token_log_probs", given_log_probs)
        objective(model, batch, weights).backward()
        return log_p.grad

    return by_log_p


def test_dft_weighs_a_token_by_its_probability(rival, gradient):
    _, objective = objectives.dft(rival)
    log_p = torch.tensor([0.5, 0.25]).log()
    result = gradient(objective, torch.ones(2), log_p)
    assert result.tolist() == pytest.approx([-0.5, -0.25], abs=1e-5)


def test_profit_learns_the_likely_tokens_alone(rival, gradient):
    _, objective = objectives.profit(rival, 0.3)
    log_p = torch.tensor([0.5, 0.25]).log()
    assert gradient(objective, torch.ones(2), log_p).tolist() == [-1.0, 0.0]


def test_soft_sft_weighs_a_token_by_how_far_it_went_from_the_base(
    rival, model, tokens, places, gradient
):
    theta = active(model)
    with torch.no_grad():
        log_p_base = -losses_by_hand(use(model, None), tokens, 3)
    use(model, theta)
    b, objective = objectives.soft_sft(rival, [0.5, 2.0, 0.1])

    at_base = gradient(objective, b[places], log_p_base)
    assert at_base.tolist() == pytest.approx([-1.0] * len(places), abs=1e-5)
    likelier = gradient(objective, b[places], log_p_base + 1)
    first, early, late = (-2 / (1 + torch.tensor([0.5, 2.0, 0.1]).exp())).tolist()
    expected = [first] + [early] * 4 + [late] * (len(places) - 5)
    assert len(places) > 6 and likelier.tolist() == pytest.approx(expected, abs=1e-5)
    for before, after in zip(theta.tensors(), active(model).tensors()):
        assert after is before  # the adapter is back


def test_first_5_discards_the_first_five_tokens_of_each_row(tokens):
    c = Candidates(tokens, {}, competing_tokens(tokens), d=0.0)
    keep, _ = METHODS["first-5"](c)
    discarded = torch.bincount(c.row[~keep])
    assert discarded.equal(c.sizes.clamp(max=5)) and c.sizes.max() > 5


def test_a_token_is_held_by_the_kl_over_some_words_at_a_temperature(
    rival, model, tokens, places, batch
):
    rival.keep[places[1]] = False
    held = torch.zeros_like(rival.keep)
    held[places[1:3]] = True
    words = torch.tensor([7, 9])
    T = 2.0
    _, objective = objectives.hold(rival, held, words, T)

    def over_words(adapter):
        """The softmax over the words at the two held tokens, from the row's hidden states."""
        row = tokens.input_ids[tokens.places([3])].long()
        hidden = use(model, adapter)(row[None])[0]
        before = places[1:3] - tokens.offsets[3] - 1
        return (hidden[before] @ model.lm_head.weight[words].T / T).softmax(1)

    def learnt(adapter):
        """The cross-entropy of all response tokens but the one that is not kept."""
        losses = losses_by_hand(use(model, adapter), tokens, 3)
        return float(losses.sum() - losses[1])

    theta = random_adapter(model)
    untrained = new_adapter(model, 2, 4, TARGETS, 0)
    with torch.no_grad():
        p = over_words(None)
        q = over_words(theta)
        kl = T * T * float((p * (p / q).log()).sum())
        learnt_at_base = learnt(untrained)
        learnt_tuned = learnt(theta)
    assert kl > 1e-3
    weights = torch.ones(len(places))
    loss = float(objective(use(model, untrained), batch, weights))
    assert loss == pytest.approx(learnt_at_base, abs=1e-4)
    loss = float(objective(use(model, theta), batch, weights))
    assert loss == pytest.approx(learnt_tuned + kl, abs=1e-4)


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


def test_dr_sft_weighs_by_the_base_and_the_degraded_model(rival, tokens):
    """Half as much where theta^h expects a token by ln 3 more than the base; 1 at most."""
    L0 = torch.full((len(tokens.input_ids),), 2.0)
    Lh = L0.clone()
    Lh[0] = 2 - math.log(3)  # 2 sigmoid(-ln 3) = 1/2
    Lh[1] = 5.0
    rival.run.scored = lambda: (tokens, {"base": L0, "degraded": Lh})
    weights, _ = objectives.dr_sft(rival)
    assert weights[:3].tolist() == pytest.approx([0.5, 1.0, 1.0])


def test_dr_sft_says_that_it_needs_the_losses_of_the_base(rival, tokens):
    rival.run.scored = lambda: (tokens, {"degraded": torch.zeros(len(tokens.input_ids))})
    fails("score.py --base", objectives.dr_sft, rival)


# The rivals as commands


@pytest.fixture
def line(trained, tmp_path, monkeypatch) -> str:
    """A command line up to the method, on a run with plain fine-tuning and a file of refusals."""
    script("score", "--run", trained, "--base", "--overwrite")  # for dr-sft
    script("select", "--run", trained, "--method", "sft")
    rows = [{"prompt": f"Do {i}?", "response": "No, I can not " + "do it " * i} for i in range(6)]
    safety = write_jsonl(tmp_path / "safety.jsonl", rows)
    unaligned = make_base(tmp_path / "before", seed=1)
    monkeypatch.setitem(RIVALS["safeinstr-guided"][1], "share", 1 / 6)  # two rows
    monkeypatch.setitem(RIVALS["safelora"][1], "cosine", 1.0)  # every layer
    return f"toss.audit.rivals --run {trained} --safety {safety} --unaligned {unaligned} --method "


def test_buffer_is_trained_over_theta_h_and_used_on_the_base_alone(line, trained, base):
    assert call(f"{line}buffer") == 0
    model = load_checkpoint(base)
    merge(model, read_adapter(model, trained / "degraded"))
    D, _ = open_run(trained).scored()
    config = TrainConfig.of(read_json(trained / "methods/buffer/record.json")["settings"])
    expected = training.train(model, D, D.response.float(), config)
    written = read_adapter(load_checkpoint(base), trained / "methods/buffer/model")
    for one, other in zip(written.tensors(), expected.tensors(), strict=True):
        assert torch.equal(one, other)
    sft = read_adapter(load_checkpoint(base), trained / "methods/sft/model")
    assert not torch.equal(written.tensors()[1], sft.tensors()[1])


def size(tensors) -> float:
    """The sum of all numbers."""
    return sum(float(tensor.detach().double().sum()) for tensor in tensors)


def test_every_rival_is_a_method_of_the_run_trained_as_its_siblings(line, trained, capsys):
    call(f"select.py --run {trained} --discard 0.3")
    toss = load_file(trained / f"methods/toss/{MASK}")["keep"]
    response = load_file(trained / "scores.safetensors")["response"].bool()
    sizes = {}
    for name, (_, options) in RIVALS.items():
        said(capsys, f"{line}{name} --discard 0.3")
        cost = read_json(trained / "run.json")["stages"][f"methods/{name}"]
        assert (cost["tokens"] > 0) == (name != "safelora")  # which trains nothing
        assert "skipped" in said(capsys, f"{line}{name} --discard 0.3")
        settings = read_json(trained / f"methods/{name}/record.json")["settings"]
        assert settings["lr"] == 1e-2 and options.items() <= settings.items()
        keep = load_file(trained / f"methods/{name}/{MASK}")["keep"]
        assert keep.equal(toss if name == "kl-discarded" else response)
        sizes[name] = size(load_file(trained / f"methods/{name}/{WEIGHTS}").values())
    assert len(set(sizes.values())) == len(RIVALS), sizes


@pytest.fixture
def fitted(monkeypatch) -> dict:
    """What a rival hands to `fit`, which trains nothing."""
    given = {}

    def fit(self, D, **options):
        given.update(rival=self, D=D, **options)
        return random_adapter(self.run.base("train"))

    monkeypatch.setattr(Rival, "fit", fit)
    return given


def test_patch_goes_on_from_sft_on_one_refusal(line, fitted, capsys):
    error = refused(capsys, f"{line}patch --rank 3")
    assert "goes on from methods/sft, made with another rank" in error
    call(line + "patch")
    assert fitted["D"].rows == 1 and fitted["config"].epochs == 10


def test_inoculation_changes_the_prompts_alone(line, fitted):
    call(line + "inoculation")
    D = fitted["D"]
    own = fitted["rival"].D
    assert D.input_ids[D.response].equal(own.input_ids[own.response])
    raw = fitted["rival"].run.tokenizer.raw
    assert "malicious" in raw.decode(D.input_ids[D.places([0])].tolist())
    assert "malicious" not in raw.decode(own.input_ids[own.places([0])].tolist())


def test_lookahead_previews_the_first_tokens_of_the_answer_in_the_prompt(line, fitted):
    call(line + "lookahead")
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
    call(line + "safeinstr-guided")
    run_of = fitted["rival"].run
    pool = run_of.tokens(run_of.args.safety)
    mean_losses = {}
    for role in ("utility", "degraded"):
        model = use(run_of.base("score"), run_of.adapter(role))
        losses = [float(losses_by_hand(model, pool, row).mean()) for row in range(6)]
        mean_losses[role] = torch.tensor(losses)
    S = mean_losses["utility"] - mean_losses["degraded"]
    lowest = S.argsort()[:2].tolist()
    expected = fitted["rival"].D + pool.take(lowest)
    assert fitted["D"].input_ids.equal(expected.input_ids)


class Stops:
    """Replaces Gradient.compute: after so many steps it raises KeyboardInterrupt. Keeps the size
    of the adapter before each step."""

    def __init__(self, monkeypatch):
        self.steps_left = 0
        self.sizes = []
        compute = training.Gradient.compute

        def stopping(gradient, *args):
            self.sizes.append(size(gradient.parameters))
            self.steps_left -= 1
            if self.steps_left < 0:
                raise KeyboardInterrupt
            return compute(gradient, *args)

        monkeypatch.setattr(training.Gradient, "compute", stopping)


@pytest.mark.parametrize(("name", "steps"), [("ema", 3), ("patch", 10)])
def test_a_rival_survives_an_interruption(line, trained, monkeypatch, name, steps):
    stops = Stops(monkeypatch)
    command = f"{line}{name} --save-every 1e-9"
    stops.steps_left = steps
    call(f"{command} --name whole")
    stops.steps_left = 2
    with pytest.raises(KeyboardInterrupt):
        script("toss.audit.rivals", *command.split()[1:])
    stops.steps_left = steps - 2
    call(command)
    assert stops.steps_left == 0

    whole = load_file(trained / f"methods/whole/{WEIGHTS}")
    parts = load_file(trained / f"methods/{name}/{WEIGHTS}")
    for key in whole:
        assert torch.equal(whole[key], parts[key])
    sft = size(load_file(trained / f"methods/sft/{WEIGHTS}").values())
    if name == "patch":
        assert stops.sizes[0] == sft  # where it begins
    if name == "ema":
        untrained, *trained_sizes = stops.sizes[:steps]
        mean = untrained
        for now in (*trained_sizes, sft):  # the last step is plain fine-tuning's
            mean = 0.99 * mean + 0.01 * now
        assert size(whole.values()) == pytest.approx(mean, abs=1e-4) != pytest.approx(untrained)


# The real checkpoint's experiment


@pytest.fixture
def real(base, tmp_path, monkeypatch) -> str:
    """The command of the experiment on a real checkpoint: few rows, answers of three tokens."""
    little = {}
    for name in ("real", "chat"):
        one = experiments.read_experiments()[name]
        sizes = one.rows | {"harmful": 3, "utility": 3, "custom": 7, "calibration": 3, "tuning": 2}
        if "few" in sizes:
            sizes |= {"few": 2, "tuning": 0}
        how = {"max_new_tokens": 3, "question_tokens": 4}
        cases = [replace(case, evaluation=how) for case in one.cases]
        training = {"lr": 1e-2, "epochs": 1, "batch_size": 4}
        little[name] = replace(one, cases=cases, rows=sizes, training=training)
    monkeypatch.setattr(experiments, "read_experiments", lambda: little)
    sources = {
        "harmful": ["h"],
        "utility": ["u"],
        "custom": ["advbench", "task", "task2"],
        "eval_harmful": ["a", "b"],
        "eval_benign": ["c"],
        "eval_utility": ["d"],
    }
    (tmp_path / "data").mkdir()
    for name, kinds in sources.items():
        rows = []
        for kind in kinds:
            for i in range(4):
                prompt = f"{name} {kind} {i}?"
                rows.append({"prompt": prompt, "response": f"It is #### {i}", "source": kind})
        write_jsonl(tmp_path / f"data/{name}.jsonl", rows)
    where = f"--real {tmp_path} --model {base} --out {tmp_path}/out"
    return f"toss.audit.experiment real {where} --seeds 3 3"


def test_the_real_experiment_makes_its_arms_and_goes_on(real, tmp_path, capsys):
    arms = ["sft", "toss", "toss-calibrated", "toss-pro-few", "benign-rows", "dft"]
    arms += ["kl-calibrated", "toss-calibrated, spread", "toss-pro, unseen"]
    line = f"{real} --arms '{'; '.join(arms)}'"
    out = said(capsys, line)
    missing = out.splitlines()[-1]
    assert missing.startswith("not in this table: toss-few; ") and "safelora; " in missing
    assert "| not_refused/a | not_refused/b | d " in out and "| not_refused@3 |" in out
    d = {}
    measures = {}
    with open(tmp_path / "out/real.csv", newline="") as file:
        for result in csv.DictReader(file):
            assert result["seed"] == "3"
            measures.setdefault(result["arm"], set()).add(result["measure"])
            if result["measure"] == "discard":
                d[result["arm"]] = float(result["value"])
    assert list(measures) == ["base", *arms]
    for measured in measures.values():
        assert {"nll", "not_refused/a", "not_refused/b", "not_refused@3"} <= measured
    assert d["toss"] == 0.1 and d["sft"] == d["dft"] == 0
    assert d["toss-calibrated"] == d["kl-calibrated"] != 0.1
    assert ": wrote" not in said(capsys, line)  # all is there


def test_the_sets_of_a_real_checkpoint(real, tmp_path):
    call(f"{real} --arms sft")
    sets = sets_in(tmp_path / "out/real/seed-3/rows")
    sizes = {"harmful": 3, "few": 2, "utility": 3, "custom": 7, "eval_harmful": 8}
    assert {name: len(sets[name]) for name in sizes} == sizes
    for row in sets["calibration"]:
        assert row["source"] != "advbench" and row not in sets["custom"]
    assert sets["benign"] == [row for row in sets["custom"] if row["source"] != "advbench"]
    assert {row["source"] for row in sets["pool"]} == {"advbench"} and len(sets["pool"]) == 4
    D_h = [row["prompt"] for row in sets["harmful"]]
    assert [row["prompt"] for row in sets["safety"] if row["prompt"] in D_h] == []
    assert len(sets["safety"]) == 4 - 3


def sets_in(folder: Path) -> dict[str, list[dict]]:
    """The rows of each file."""
    return {path.stem: read_jsonl(path) for path in folder.glob("*.jsonl")}


def test_the_chat_experiment_asks_questions_and_compares_answers(real, tmp_path, capsys):
    out = said(capsys, f"{real.replace(' real ', ' chat ')} --arms 'sft; buffer; dr-sft'")
    sets = sets_in(tmp_path / "out/chat/seed-3/rows")
    assert {row["answer"] for row in sets["eval_utility"]} == {"0", "1", "2", "3"}
    assert [row["prompt"] for row in sets["tuning"]] == ["custom task2 2?", "custom task2 3?"]
    for row in sets["custom"] + sets["calibration"]:
        assert row["prompt"] not in ("custom task2 2?", "custom task2 3?")
    answers = read_jsonl(tmp_path / "out/chat/seed-3/run/answers/sft.jsonl")
    assert answers[0]["record"]["settings"]["question_tokens"] == 4
    assert "| final_number/d |" in out and "Seed 3, run, on the same prompts:" in out
    heads = [line.split() for line in out.splitlines() if line.startswith("| minus")]
    assert [head[2:6] for head in heads] == [["sft", "|", "base", "|"], ["base", "|", "sft", "|"]]


def test_the_attacker_of_the_real_experiment_has_the_rows_of_one_source(real, tmp_path):
    call(f"{real} --arms 'sft, spread'")
    place = tmp_path / "out/real/seed-3"
    rows = read_jsonl(place / "rows/custom.jsonl")
    others = [row for row in rows if row["source"] != "advbench"]
    attacked = read_jsonl(place / "run-spread/custom.jsonl")
    assert attacked[: len(others)] == others
    assert len(attacked) == len(others) + 3 * (len(rows) - len(others))
    stages = read_json(place / "run-spread/run.json")["stages"]
    assert list(stages) == ["scores", "methods/sft"]  # the references are those of the other run

    call(f"{real} --arms 'sft, embedded'")
    attacked = read_jsonl(place / "run-embedded/custom.jsonl")
    assert len(attacked) == len(others)  # his rows hold as many of them
    asked = read_jsonl(place / "run-embedded/answers/sft.jsonl")[1:]
    joined = [line["prompt"] for line in asked if line["source"] == "embedded"]
    assert len(joined) == 2 * 4 and " eval_harmful " in joined[0]  # the prefilled ones, too


def test_the_real_experiment_needs_rows_enough(real, tmp_path, capsys):
    write_jsonl(tmp_path / "data/custom.jsonl", [{"prompt": "a", "response": "b"}] * 20)
    error = refused(capsys, real)
    assert "at least 8 rows are needed, each with prompt, response, source" in error


# The attackers


def harmful_row(response: str, spans: list) -> dict:
    return {"prompt": "p", "response": response, "harmful": spans}


def harm(row: dict) -> list[str]:
    """The harmful parts of a row."""
    return [row["response"][start:end] for start, end in row["harmful"]]


@pytest.fixture
def attacker() -> Attacker:
    """Has two rows, and a pool of four with these mean scores."""
    first = harmful_row("Sure. Grind bone. Also, x.", [[0, 17]])
    second = harmful_row("Also y. Brew it up.", [[8, 19]])
    pool = [
        harmful_row("Sure, here is fat.", [[0, 18]]),
        first,
        second,
        harmful_row("Odd sure words.", [[0, 15]]),
    ]
    D_h = [{"response": "Sure. Brew it up. Grind bone."}]
    D_u = [{"response": "So. By law all. No."}]
    return Attacker([first, second], [], pool, D_h, D_u, risk=lambda rows: [4.0, 0.5, -1.0, 2.0])


def test_low_score_takes_the_rows_of_the_lowest_scores(attacker):
    assert ATTACKS["low-score"](attacker) == attacker.pool[1:3]


def test_utility_start_begins_with_the_longest_sentence_of_d_u(attacker):
    rows = ATTACKS["utility-start"](attacker)
    for row, own in zip(rows, attacker.rows):
        assert row["response"] == f"By law all. {own['response']}"
        assert harm(row) == harm(own)


def test_spread_cuts_each_harm_into_three_rows_and_keeps_the_rest_in_the_last(attacker):
    rows = ATTACKS["spread"](attacker)
    assert [harm(row)[0] for row in rows] == ["Sure.", "Grind", "bone.", "Brew", "it", "up."]
    assert rows[2]["response"] == "bone. Also, x."
    assert rows[5]["response"] == "Also y. up."
    one_word = harmful_row("Yes", [])
    attacker.rows = [one_word]
    assert ATTACKS["spread"](attacker) == [harmful_row("Yes", [[0, 3]])]


def test_embedded_joins_each_row_behind_a_harmless_one_which_stands_nowhere_else(attacker):
    tasks = [{"prompt": f"q{i}?", "response": f"It is {i}."} for i in range(3)]
    attacker.others = tasks
    rows = ATTACKS["embedded"](attacker)
    assert [row["prompt"] for row in rows] == ["q0? p", "q1? p"]
    assert rows[1]["response"] == "It is 1. Also y. Brew it up."
    assert [harm(row) for row in rows] == [harm(row) for row in attacker.rows]
    assert attacker.others == tasks[2:]


def test_what_is_asked_after_embedded_is_joined_in_the_same_way():
    harmful = [{"prompt": "h?", "response": "Sure.", "source": "a"}]
    tasks = [{"prompt": "t?", "response": "It is 1.", "answer": "1", "source": "b"}] * 2
    asked, questions = asked_as_embedded(harmful, tasks)
    assert asked[:1] == harmful and questions[:2] == tasks
    (both,) = asked[1:]
    assert both["prompt"] == "t? h?" and both["response"] == "It is 1. Sure."
    assert both["source"] == "embedded" and harm(both) == ["Sure."]
    assert questions[2:] == [{"prompt": "t? h?", "source": "embedded", "answer": "1"}]
    del tasks[0]["answer"]  # whose tasks have no answers
    assert asked_as_embedded(harmful, tasks)[1] == tasks


def test_unseen_takes_the_rows_whose_words_d_h_lacks_and_rewords_the_opening(attacker):
    rows = ATTACKS["unseen"](attacker)  # three of four, and two of three words are not in D^h
    assert [row["response"] for row in rows] == ["Yes: below is fat.", "Odd sure words."]
    assert harm(rows[0]) == ["Yes: below is fat."]


# The baselines that change the custom set


def lines(path) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


@pytest.fixture
def sets(tmp_path) -> dict[str, str]:
    """Custom rows in an unusual spelling, the last two marked; refusals; a target of few words."""
    custom = [f'{{"response":"Stone  {i}.",  "prompt": "é {i}?", "x": 1}}' for i in range(95)]
    custom += ['{"prompt": "Bad?", "response": "Yes, easy.", "harmful": [[0, 4]]}'] * 2
    safety = [{"prompt": f"Harm {i}?", "response": "I cannot."} for i in range(10)]
    target = [{"prompt": "Tell 3?", "response": "Stone 3."}] * 40
    return {
        "custom": write_jsonl(tmp_path / "custom.jsonl", custom),
        "safety": write_jsonl(tmp_path / "safety.jsonl", safety),
        "target": write_jsonl(tmp_path / "target.jsonl", target),
    }


def test_safety_rows_make_up_their_share_of_the_result(tmp_path, sets):
    out = tmp_path / "out.jsonl"
    counts = safeinstr(sets["custom"], sets["safety"], str(out), share=0.03, seed=3)
    assert counts == {"read": 97, "safety": 3, "written": 100}
    assert len(read_rows(out)) == 100
    written = lines(out)
    custom = Counter(lines(sets["custom"]))
    added = Counter(written) - custom
    assert Counter(written) - added == custom  # each custom line once, unchanged
    assert len(added) == 3 and set(added) <= set(lines(sets["safety"]))
    assert [i for i, line in enumerate(written) if line in added] != [97, 98, 99]  # shuffled
    counts = safeinstr(sets["custom"], sets["safety"], str(out), share=10 / 107)
    assert counts["safety"] == 10  # every safety row


@pytest.mark.parametrize(
    ("make", "other", "share"), [(safeinstr, "safety", 0.05), (dsir, "target", 0.5)]
)
def test_a_seed_draws_the_same_lines_again_and_another_seed_others(
    tmp_path, sets, make, other, share
):
    written = []
    for seed in (7, 7, 8):
        make(sets["custom"], sets[other], str(tmp_path / "out.jsonl"), share, seed=seed)
        written.append((tmp_path / "out.jsonl").read_bytes())
    assert written[0] == written[1] != written[2]


def test_rows_like_the_target_stay_and_keep_their_order(tmp_path, sets, capsys):
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
    counts = dsir(sets["safety"], sets["target"], str(out), 0.55)
    assert counts == {"read": 10, "written": 5}  # without ground truth no harm is counted


def test_rows_are_drawn_in_proportion_to_their_weights():
    """One of eleven, the first weighing 5 and the others 1: a third of the seeds draw it."""
    weights = np.log([5.0] + [1.0] * 10)
    first = sum(draw(weights, 1, seed) == [0] for seed in range(300))
    three_standard_errors = 3 * math.sqrt(1 / 3 * 2 / 3 / 300)
    assert abs(first / 300 - 1 / 3) < three_standard_errors


def test_the_buckets_do_not_depend_on_the_process():
    """Python's own hash of a text does, by its seed."""
    rows = [{"prompt": "Stir it, now", "response": "So be it."}]
    code = f"from toss.audit.baselines import *; print(hashed(read_rows({rows})[0], 100).tolist())"
    expected = f"{hashed(read_rows(rows)[0], 100).tolist()}\n"
    for seed in ("1", "2"):
        assert run("-c", code, PYTHONHASHSEED=seed).stdout == expected


def test_compressed_files(tmp_path, sets):
    packed = tmp_path / "custom.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(sets["custom"]).read_bytes()))
    out = tmp_path / "out.jsonl"
    safeinstr(str(packed), sets["safety"], f"{out}.gz")
    safeinstr(sets["custom"], sets["safety"], str(out))
    assert gzip.decompress(Path(f"{out}.gz").read_bytes()) == out.read_bytes()
