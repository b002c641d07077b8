"""The rivals of TOSS: objectives by hand; what each starts from, trains on and leaves."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_base, script, write_jsonl
from helpers import TARGETS, call, losses_by_hand, random_adapter, refused, said
from safetensors.torch import load_file

from model import load_checkpoint
from model.io import read_json
from model.lora import active, new_adapter, use
from toss import training
from toss.audit import objectives, real
from toss.audit.attacks import ATTACKS, Attacker
from toss.audit.objectives import Rival
from toss.audit.rivals import RIVALS
from toss.config import TrainConfig
from toss.loss import token_log_probs
from toss.methods import METHODS, Candidates
from toss.selection import competing_tokens
from toss.tokens import collate

WEIGHTS, MASK = "model/adapter_model.safetensors", "selection.safetensors"


def size(tensors) -> float:
    return sum(float(tensor.detach().double().sum()) for tensor in tensors)


@pytest.fixture
def rival(model, tokens) -> Rival:
    """On a stand-in for a run that begins with an adapter; `fit` returns weights and objective."""

    def fit(D, weights=None, objective=None):
        return weights, objective

    run = SimpleNamespace(model=model, device=model.device, base=lambda purpose: model)
    made = Rival(run, "rival", TrainConfig(), tokens, keep=tokens.response.clone())
    made.fit = fit
    use(model, random_adapter(model))
    return made


@pytest.fixture
def places(tokens):
    """The response tokens of row 3."""
    at = tokens.places([3])
    return at[tokens.response[at]]


@pytest.fixture
def batch(model, tokens):
    """Row 3, and all its response tokens."""
    return collate(tokens, [3], tokens.response, model.device)


@pytest.fixture
def gradient(model, batch, monkeypatch):
    """The gradient of an objective by the log-probabilities of the tuned model, for given ones."""

    def by_log_p(objective, weights, log_p) -> list[float]:
        log_p = log_p.clone().requires_grad_()

        def log_probs_of(model, batch):
            return token_log_probs(model, batch) if active(model) is None else log_p

        monkeypatch.setattr(objectives, "token_log_probs", log_probs_of)
        objective(model, batch, weights).backward()
        return pytest.approx(log_p.grad.tolist(), abs=1e-5)

    return by_log_p


def test_dft_weighs_a_token_by_its_probability(rival, gradient):
    _, objective = objectives.dft(rival)
    log_p = torch.tensor([0.5, 0.25]).log()
    assert [-0.5, -0.25] == gradient(objective, torch.ones(2), log_p)


def test_soft_sft_weighs_a_token_by_how_far_it_went_from_the_base(
    rival, model, tokens, places, gradient
):
    theta = active(model)
    with torch.no_grad():
        log_p = -losses_by_hand(use(model, None), tokens, 3)
    use(model, theta)
    b, objective = objectives.soft_sft(rival, [0.5, 2.0, 0.1])

    assert [-1.0] * len(places) == gradient(objective, b[places], log_p)  # at the base
    first, early, late = (-2 / (1 + torch.tensor([0.5, 2.0, 0.1]).exp())).tolist()
    weights = [first, *[early] * 4, *[late] * (len(places) - 5)]
    assert len(places) > 6 and weights == gradient(objective, b[places], log_p + 1)
    assert all(a is b for a, b in zip(active(model).tensors(), theta.tensors()))


def test_first_5_discards_the_first_five_tokens_of_each_row(tokens):
    c = Candidates(tokens, {}, competing_tokens(tokens), d=0.0)
    gone = torch.bincount(c.row[~METHODS["first-5"](c)[0]])
    assert gone.equal(c.sizes.clamp(max=5)) and c.sizes.max() > 5


def test_a_token_is_held_by_the_kl_over_some_words_at_a_temperature(
    rival, model, tokens, places, batch
):
    rival.keep[places[1]] = False
    held = torch.zeros_like(rival.keep).index_fill(0, places[1:3], True)
    words, T = torch.tensor([7, 9]), 2.0
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

    theta, fresh = random_adapter(model), new_adapter(model, 2, 4, TARGETS, 0)
    with torch.no_grad():
        p, q = over_words(None), over_words(theta)
        kl = T * T * float((p * (p / q).log()).sum())
        at_base, tuned = learnt(fresh), learnt(theta)
    assert kl > 1e-3
    weights = torch.ones(len(places))
    loss = objective(use(model, fresh), batch, weights)
    assert float(loss) == pytest.approx(at_base, abs=1e-4)
    loss = objective(use(model, theta), batch, weights)
    assert float(loss) == pytest.approx(tuned + kl, abs=1e-4)


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_an_update_is_projected_to_what_alignment_changed(rival, model, tmp_path, cosine):
    theta, before = active(model), load_checkpoint(make_base(tmp_path / "b", seed=1))
    rival.run.adapter = lambda name: random_adapter(model)  # the same
    rival.run.args = SimpleNamespace(unaligned=tmp_path / "b")
    for name, B in objectives.safelora(rival, cosine).B.items():
        V = model.get_submodule(name).weight - before.get_submodule(name).weight
        expected = V @ V.T / V.square().sum().sqrt() @ theta.B[name]
        assert torch.allclose(B, expected if cosine == 1 else theta.B[name], atol=1e-4), name


@pytest.fixture
def line(trained, tmp_path, monkeypatch) -> str:
    """A command line up to the method, on a run with plain fine-tuning and a file of refusals."""
    script("select", "--run", trained, "--method", "sft")
    rows = [{"prompt": f"Do {i}?", "response": "No, I can not " + "do it " * i} for i in range(6)]
    safety = write_jsonl(tmp_path / "safety.jsonl", rows)
    before = make_base(tmp_path / "before", seed=1)
    monkeypatch.setitem(RIVALS["safeinstr-guided"][1], "share", 1 / 6)  # two rows
    monkeypatch.setitem(RIVALS["safelora"][1], "cosine", 1.0)  # every layer
    return f"toss.audit.rivals --run {trained} --safety {safety} --unaligned {before} --method "


def test_every_rival_is_a_method_of_the_run_trained_as_its_siblings(line, trained, capsys):
    call(f"select.py --run {trained} --discard 0.3")
    toss, sizes = load_file(trained / f"methods/toss/{MASK}")["keep"], {}
    response = load_file(trained / "scores.safetensors")["response"]
    for name, (_, how) in RIVALS.items():
        said(capsys, f"{line}{name} --discard 0.3")
        cost = read_json(trained / "run.json")["stages"][f"methods/{name}"]
        assert (cost["tokens"] > 0) == (name != "safelora")  # which trains nothing
        assert "skipped" in said(capsys, f"{line}{name} --discard 0.3")
        settings = read_json(trained / f"methods/{name}/record.json")["settings"]
        assert {"lr": 1e-2, **how}.items() <= settings.items()
        keep = load_file(trained / f"methods/{name}/{MASK}")["keep"]
        assert keep.equal(toss if name == "kl-discarded" else response)
        sizes[name] = size(load_file(trained / f"methods/{name}/{WEIGHTS}").values())
    assert len({*sizes.values()}) == len(RIVALS), sizes


def test_the_rows_that_a_rival_trains_on(line, monkeypatch, capsys):
    def fit(self, D, **how):
        given.update(rival=self, D=D, **how)
        return random_adapter(self.run.base("train"))

    given = {}
    monkeypatch.setattr(Rival, "fit", fit)
    error = refused(capsys, f"{line}patch --rank 3")
    assert "goes on from methods/sft, made with another rank" in error
    call(line + "patch")
    assert given["D"].rows == 1 and given["config"].epochs == 10
    call(line + "inoculation")
    D, own, raw = given["D"], given["rival"].D, given["rival"].run.tokenizer.raw
    assert D.input_ids[D.response].equal(own.input_ids[own.response])
    text, plain = (raw.decode(x.input_ids[x.places([0])].tolist()) for x in (D, own))
    assert "malicious" in text and "malicious" not in plain
    call(line + "safeinstr-guided")
    run, S = given["rival"].run, torch.zeros(6)
    pool = run.tokens(run.args.safety)
    for role, sign in (("utility", 1), ("degraded", -1)):
        model = use(run.base("score"), run.adapter(role))
        S += sign * torch.tensor([losses_by_hand(model, pool, row).mean() for row in range(6)])
    assert given["D"].input_ids.equal((own + pool.take(S.argsort()[:2].tolist())).input_ids)


def test_rivals_survive_an_interruption_and_the_mean_of_the_adapters_is_one(
    line, trained, monkeypatch
):
    compute, left, before = training.Gradient.compute, [0], []

    def stopping(self, *args):
        before.append(size(self.parameters))
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return compute(self, *args)

    def load(name):
        return load_file(trained / f"methods/{name}/{WEIGHTS}")

    monkeypatch.setattr(training.Gradient, "compute", stopping)
    for name, steps in (("ema", 3), ("patch", 10)):
        command, left[0] = f"{line}{name} --save-every 1e-9", steps
        call(f"{command} --name whole-{name}")
        left[0] = 2
        with pytest.raises(KeyboardInterrupt):
            script("toss.audit.rivals", *command.split()[1:])
        left[0] = steps - 2
        call(command)
        whole, parts = load(f"whole-{name}"), load(name)
        assert left[0] == 0 and all(torch.equal(whole[key], parts[key]) for key in whole)
    sft, whole = load("sft"), load("whole-ema")
    assert before[7] == size(sft.values())  # where patch begins
    mean = before[0]  # the untrained one; the last is plain fine-tuning's
    for now in (*before[1:3], size(sft.values())):
        mean = 0.99 * mean + 0.01 * now
    assert size(whole.values()) == pytest.approx(mean, abs=1e-4) != pytest.approx(before[0])


def test_the_real_table_has_every_arm_and_goes_on(base, tmp_path, monkeypatch, capsys):
    few = {"harmful": 3, "few": 2, "utility": 3, "custom": 8, "calibration": 3}
    monkeypatch.setattr(real, "SIZES", few)
    for name, value in {"lr": 1e-2, "epochs": 1, "batch_size": 4}.items():
        monkeypatch.setitem(real.TRAINING, name, value)
    (tmp_path / "data").mkdir()

    def row(i, kind) -> dict:
        return {"prompt": f"{kind} {i}?", "response": f"It is {i}.", "source": kind}

    sources = {"harmful": ["h"], "utility": ["u"], "custom": ["advbench", "task", "task2"]}
    sources |= {"eval_harmful": ["a", "b"], "eval_benign": ["c"], "eval_utility": ["d"]}
    for n, (name, groups) in enumerate(sources.items()):
        rows = [row(f"{n}{i}", source) for source in groups for i in range(4)]
        write_jsonl(tmp_path / f"data/{name}.jsonl", rows)
    names = "sft toss toss-calibrated toss-few toss-pro-few benign-rows random dft".split()
    names += ["kl-calibrated", *(f"toss-calibrated, {k}" for k in ATTACKS), "toss-pro, unseen"]
    monkeypatch.setattr(real, "ARMS", {name: real.ARMS[name] for name in (*names, "safelora")})
    line = f"toss.audit.real --real {tmp_path} --model {base} --out {tmp_path}/out --seeds 3 3"
    assert "not in this table: safelora\n" in said(capsys, line)  # there is no such base
    arms = read_json(tmp_path / "out/real.json")["arms"]
    assert list(arms) == ["base", *names] and read_json(tmp_path / "out/real.json")["seeds"] == [3]
    assert all({"nll", "not_refused/a", "not_refused/b"} <= arm.keys() for arm in arms.values())
    d = {name: arm["discard"]["mean"] for name, arm in arms.items() if name != "base"}
    assert d["toss"] == 0.1 != d["toss-calibrated"] == d["kl-calibrated"] and not d["dft"]
    assert ": wrote" not in said(capsys, line)  # all is there
    write_jsonl(tmp_path / "data/custom.jsonl", [{"prompt": "a", "response": "b"}] * 20)
    assert "at least 9 rows are needed, each with prompt, response, source" in refused(capsys, line)


def test_an_attacker_chooses_and_writes_harmful_rows_of_the_same_kind():

    def row(response, spans) -> dict:
        return {"prompt": "p", "response": response, "harmful": spans}

    def harm(row) -> list[str]:
        return [row["response"][start:end] for start, end in row["harmful"]]

    rows = [row("Sure. Grind bone. Also, x.", [[0, 17]]), row("Also y. Brew it up.", [[8, 19]])]
    pool = [row("Sure, here is fat.", [[0, 18]]), *rows, row("Odd sure words.", [[0, 15]])]
    D_h = [{"response": "Sure. Brew it up. Grind bone."}]
    D_u = [{"response": "So. By law all. No."}]
    attacker = Attacker(rows, pool, D_h, D_u, risk=lambda rows: [4.0, 0.5, -1.0, 2.0])
    assert ATTACKS["low-score"](attacker) == [pool[1], pool[2]]
    started = ATTACKS["utility-start"](attacker)
    assert [r["response"] for r in started] == [f"By law all. {r['response']}" for r in rows]
    assert list(map(harm, started)) == list(map(harm, rows))
    thirds = ATTACKS["spread"](attacker)
    assert [harm(r)[0] for r in thirds] == ["Sure.", "Grind", "bone.", "Brew", "it", "up."]
    assert [r["response"] for r in thirds][2::3] == ["bone. Also, x.", "Also y. up."]
    one = Attacker([row("Yes", [])], [], [], [], len)
    assert ATTACKS["spread"](one) == [row("Yes", [[0, 3]])]
    others = ATTACKS["unseen"](attacker)  # three of four, and two of three words are not in D^h
    assert [r["response"] for r in others] == ["Yes: below is fat.", "Odd sure words."]
    assert list(map(harm, others)) == [["Yes: below is fat."], ["Odd sure words."]]
