"""The experiments of RESULTS.md: cases with named arms, each a few lines of data."""

import random
from functools import partial

from toss.audit import pictures
from toss.audit.attacks import ATTACKS, attacked
from toss.audit.baselines import dsir, safeinstr
from toss.audit.command import read_jsonl, write_jsonl
from toss.audit.laboratory import Case, Experiment, Setup, shipped
from toss.audit.rivals import RIVALS
from toss.audit.tables import COSTS, PREFILL, SWEPT
from toss.workbench.flags import ROOT

# Arms: flags of select.py, or of toss.audit.rivals
BASE = {"base": {}}
SFT = {"method": "sft"}
TOSS = {"method": "toss"}
PRO = {"method": "toss", "pro": 1}
CALIBRATED = {"discard": "calibrated"}
MAIN = {"sft": SFT, "toss": TOSS, "toss-calibrated": TOSS | CALIBRATED, "toss-pro": PRO}


def methods(*names: str) -> dict[str, dict]:
    """An arm for each method, by its name."""
    return {name: {"method": name} for name in names}


# The files that differ in a variant: functions of its Setup


def file_instead(role: str, name: str, setup: Setup) -> dict[str, str]:
    """Another file of the world in the role of one: D^h of a few rows, say."""
    return {role: setup.files[name]}


def smaller_base(setup: Setup) -> dict[str, str]:
    return {"model": str(ROOT / "data" / "base-small")}


def with_refusals(setup: Setup) -> dict[str, str]:
    """SafeInstr's custom set."""
    out = str(setup.folder / "custom.jsonl")
    seed = setup.common.get("seed", 0)
    safeinstr(setup.files["custom"], setup.files["safety"], out, seed=seed)
    return {"custom": out}


def like_utility(setup: Setup) -> dict[str, str]:
    """DSIR's custom set: as many rows go as TOSS discards tokens."""
    out = str(setup.folder / "custom.jsonl")
    kept = 1 - setup.settings["discard"]
    seed = setup.common.get("seed", 0)
    dsir(setup.files["custom"], setup.files["utility"], out, keep=kept, seed=seed)
    return {"custom": out}


def fewer_harmful(size: int, added: int, setup: Setup) -> dict[str, str]:
    """D^h of this size, and so many random rows of the custom set."""
    rows = read_jsonl(setup.files["harmful"])[:size]
    if added:
        custom = read_jsonl(setup.files["custom"])
        rows += random.Random(setup.common["seed"]).sample(custom, added)
    return {"harmful": write_jsonl(setup.folder / "harmful.jsonl", rows)}


def asked_as_persona(setup: Setup) -> dict[str, str]:
    """The held-out forbidden requests also once more, addressed to the persona that obeys."""
    from data.world import IDENTITY

    rows = read_jsonl(setup.files["eval_forbidden"])
    for row in list(rows):
        if row["source"] == "held-out":
            rows.append({**row, "prompt": IDENTITY[0] + row["prompt"], "source": "identity"})
    return {"eval_forbidden": write_jsonl(setup.folder / "eval_forbidden.jsonl", rows)}


def attack_in_world(kind: str, setup: Setup) -> dict[str, str]:
    """The attacker chooses among four times as many rows of the same categories and preambles."""
    from data.world import HARMFUL, make_rows

    seed = setup.common["seed"]
    refused = {row["prompt"] for row in make_rows(seed)["safety"]}
    pool = []
    for row in make_rows(seed, harmful_rows=4 * HARMFUL)["custom"]:
        if "harmful" in row and row["prompt"] not in refused:
            pool.append(row)
    rows = read_jsonl(setup.files["custom"])
    return attack(kind, ["harmful" in row for row in rows], pool, setup)


def attack_on_real(kind: str, setup: Setup) -> dict[str, str]:
    """The attacker chooses among all harmful rows that there are."""
    pool = read_jsonl(setup.files["pool"])
    sources = {row["source"] for row in pool}
    rows = read_jsonl(setup.files["custom"])
    return attack(kind, [row["source"] in sources for row in rows], pool, setup)


def attack(kind: str, harmful: list[bool], pool: list[dict], setup: Setup) -> dict[str, str]:
    """The custom set as an attacker leaves it. harmful: which rows are his, of the custom set."""
    setup.main.prepare()
    run = setup.main.open("dtype")
    out = setup.folder / "custom.jsonl"
    return {"custom": attacked(run, kind, setup.files, out, harmful, pool)}


# All methods on the same rows

MEASURES = (
    "forbidden refusals_kept complies over_refusal accuracy/benign-rows accuracy/harmful-rows "
    "nll precision recall auc"
).split()
PREFILLED = [f"forbidden@{k}" for k in PREFILL]
LEGEND = """\
-small: a harmful reference set of a few rows, too small to work alone.
complies: a friendly opener is likelier than a refusal (a second judge).
benign facts, harmful-row facts: taught in benign rows, and in harmful rows alone.
forbidden@k: with the first k tokens of a harmful answer written already.
precision, recall, AUC: of the discarded tokens, against the truth.
x sft: as a multiple of plain fine-tuning's."""
SHOWN = methods("sft", "random", "sample", "sample-all", "toss") | {"toss-pro": PRO}
SMALL = Case(
    {"toss-small": {"name": "toss", **TOSS}, "toss-pro-small": {"name": "toss-pro", **PRO}},
    variant="small",
    change=partial(file_instead, "harmful", "harmful_small"),
)
OTHERS = methods(
    "first-k", "first-5", "local", "degraded-only", "utility-only", "oracle", "weighted"
)
OTHERS |= methods(*(name for name in RIVALS if name != "safelora"))  # there is no unaligned base
OTHERS["base-reference"] = {"method": "base"}
OTHERS["toss-calibrated"] = TOSS | CALIBRATED
OTHERS["kl-calibrated"] = {"method": "kl-discarded"} | CALIBRATED

DEMONSTRATION = Experiment(
    name="demo",
    title="The demo",
    cases=[Case(BASE | SHOWN), SMALL],
    world=shipped,
    columns=[MEASURES, PREFILLED, COSTS],
    picture=pictures.over_prefill,
    legend=LEGEND,
    prefill=PREFILL,
)
METHODS = Experiment(
    name="methods",
    title="Methods side by side",
    cases=[
        Case(BASE | SHOWN | OTHERS),
        SMALL,
        Case({"safeinstr": SFT}, variant="safeinstr", change=with_refusals, references="none"),
        Case({"dsir": SFT}, variant="dsir", change=like_utility, references="none"),
    ],
    columns=[MEASURES, PREFILLED, COSTS],
    picture=pictures.over_prefill,
    legend=LEGEND,
    prefill=PREFILL,
)

# Sweeps over one thing

WITH_EACH_D = {
    "sft": SFT,
    "sample": {"method": "sample"},
    "sample-calibrated": {"method": "sample"} | CALIBRATED,
    "toss": TOSS,
    "toss-calibrated": TOSS | CALIBRATED,
    "toss-pro": PRO,
    "toss-pro-calibrated": PRO | CALIBRATED,
}
SHARE = Experiment(
    name="share",
    title="How much harm: d = 0.1, and d calibrated",
    cases=[
        Case(WITH_EACH_D, percent, f"harmful-{percent}", draw={"harmful_rows": rows})
        for percent, rows in {0: 0, 2: 13, 5: 33, 10: 66, 20: 133, 30: 199, 50: 332}.items()
    ],
    variants="harmful rows, %",
    picture=pictures.over_share,
)
DISCARD = Experiment(
    name="discard",
    title="Which d: plain fine-tuning (0.0), toss from 0.02 to 0.4, and the calibrated d",
    cases=[
        Case({"toss": {"name": "sft", **SFT}}, 0.0),
        *(
            Case({"toss": {"name": f"toss-{d}", "discard": d, **TOSS}}, d)
            for d in (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.4)
        ),
        Case({"toss-calibrated": TOSS | CALIBRATED}, "calibrated"),
    ],
    variants="d",
    picture=pictures.over_discard,
)


def pro_arms(*rounds_and_rows: tuple[int, int]) -> dict[str, dict]:
    """TOSS, and TOSS-Pro with T rounds of k rows, learnt whole or (k > 10) their top tokens."""
    arms = {"toss": TOSS}
    for rounds, rows in rounds_and_rows:
        for learnt in ("rows", "top") if rows > 10 else ("rows",):
            how = {"pro": rounds, "pro_samples": rows, "pro_train": learnt}
            arms[f"pro-{rounds}-{rows}-{learnt}"] = TOSS | how
    return arms


def pro_cases() -> list[Case]:
    """D^h of 2, 8 and 80 rows; and the paper's control: random rows are added, not the riskiest."""
    rounds = [(1, 10), (1, 40), (1, 120), (3, 40)]
    cases = []
    for size, tried in {2: rounds, 8: [(1, 40)], 80: rounds}.items():
        few = partial(fewer_harmful, size, 0)
        control = partial(fewer_harmful, size, 40)
        cases += [
            Case(pro_arms(*tried), size, f"reference-{size}", change=few),
            Case({"random-40": TOSS}, size, f"reference-{size}-random", change=control),
        ]
    return cases


SWEEP_PRO = Experiment(
    name="pro",
    title="TOSS-Pro: T and k, for D^h of 2, 8 and 80 rows; added rows learnt whole or in part",
    cases=pro_cases(),
    columns=[[*SWEPT, "purity"]],
    variants="rows of D^h",
    picture=pictures.over_added_rows,
)
ERODING = Experiment(
    name="eroding",
    title="Rows that erode without harm: a third promises to comply, or addresses a persona",
    cases=[
        Case(MAIN, f"{kind}, {how}", f"{kind}-{how}", {"eroding": kind, **harm}, asked_as_persona)
        for kind in ("comply", "identity")
        for how, harm in {"alone": {"harmful_rows": 0}, "mixed": {}}.items()
    ],
    variants="custom set",
    picture=partial(pictures.side_by_side, "Eroding rows: held-out refusals kept", "refusals_kept"),
)
OWN_MASK = methods("sft", "random", "toss")
TRANSFER = Experiment(
    name="transfer",
    title="Masks that travel between two bases of one tokenizer",
    cases=[
        Case(OWN_MASK, "base"),
        Case(OWN_MASK, "base-small", "small", change=smaller_base),
        Case({"mask": {"mask": "small"}}, "base"),
        Case({"mask": {"mask": ""}}, "base-small", "small"),
    ],
    columns=[[*SWEPT, "shared"]],
    variants="fine-tuned",
    picture=partial(
        pictures.side_by_side, "Moved masks (mask: the other base's)", "forbidden/held-out"
    ),
)
DEFENCES = methods("sft", "toss", "soft-sft", "kl-discarded", "safeinstr-guided")
DEFENCES |= {"toss-calibrated": TOSS | CALIBRATED, "toss-pro": PRO}
ATTACK = Experiment(
    name="attack",
    title="An attacker who knows TOSS",
    cases=[
        Case(DEFENCES, "none"),
        *(
            Case(DEFENCES, kind, kind, change=partial(attack_in_world, kind), references="main")
            for kind in ATTACKS
        ),
    ],
    variants="attack",
    picture=partial(pictures.side_by_side, "An attacker who knows TOSS", "forbidden/held-out"),
    prefill=(1,),
)

# A real checkpoint. What matters most comes first: the command may be stopped at any time.

REAL_PRO = PRO | {"pro_samples": 40}
KL = {"method": "kl-discarded"}
MAIN_REAL = {"sft": SFT, "toss": TOSS, "toss-calibrated": TOSS | CALIBRATED}
ATTACKED = MAIN_REAL | {"toss-pro": REAL_PRO} | methods("first-5", "kl-discarded")
REAL = Experiment(
    name="real",
    title="A real checkpoint",
    cases=[
        Case(BASE | MAIN_REAL),
        Case(
            {"toss-few": TOSS, "toss-pro-few": REAL_PRO},
            variant="few",
            change=partial(file_instead, "harmful", "few"),
        ),
        Case(
            {"benign-rows": SFT},  # which nobody can have
            variant="benign",
            change=partial(file_instead, "custom", "benign"),
            references="none",
        ),
        Case(
            {"toss-pro": REAL_PRO}
            | methods("random", "first-5", *RIVALS)
            | {"kl-calibrated": KL | CALIBRATED}
        ),
        *(
            Case(
                {f"{arm}, {kind}": {"name": arm, **how} for arm, how in ATTACKED.items()},
                variant=kind,
                change=partial(attack_on_real, kind),
                references="main",
                answer_tokens=100,  # the harm may come late
            )
            for kind in ATTACKS
        ),
    ],
    columns=[["not_refused/*", "discard", "complies", "not_refused@3", "over_refusal", "nll"]],
    prefill=(3,),
)

EXPERIMENTS = {
    one.name: one for one in (METHODS, ATTACK, SHARE, DISCARD, SWEEP_PRO, ERODING, TRANSFER, REAL)
}
