"""The experiments of RESULTS.md, which are data, in experiments.json; and how their rows change.

An experiment has cases. Each has arms (flags of select.py, or of toss.audit.rivals; those of the
experiment if it names none) on a variant of the rows. What a case may say: laboratory.Case, and
"suffix", which is added to the names of its arms. Its "change" is one of CHANGES below, with the
values before `setup`.
"""

import random
from functools import partial
from pathlib import Path

from model.io import as_input_error, read_json
from toss.audit import pictures
from toss.audit.attacks import ATTACKS, Attacker, asked_as_embedded, mean_risk
from toss.audit.baselines import dsir, safeinstr
from toss.audit.command import read_jsonl, write_jsonl
from toss.audit.laboratory import Case, Experiment, Setup
from toss.audit.rivals import RIVALS
from toss.methods import METHODS

FILE = Path(__file__).with_suffix(".json")
# The sets that an experiment's "rows" must give a size; few and tuning may have one.
SETS = (
    "harmful",
    "utility",
    "custom",
    "calibration",
    "eval_harmful",
    "eval_benign",
    "eval_utility",
)


def read_experiments(path: Path = FILE) -> dict[str, Experiment]:
    """The experiments in a JSON file, by name. Raises InputError for what it must not say."""
    experiments = {}
    for name, fields in read_json(path).items():
        with as_input_error(f"{path}: {name} is not an experiment"):
            arms = fields.pop("arms", {})
            fields["cases"] = [case_of({"arms": arms, **case}) for case in fields["cases"]]
            if "picture" in fields:
                picture, *values = fields["picture"]
                fields["picture"] = partial(getattr(pictures, picture), *values)
            check_cases(fields["cases"])
            check_rows(fields.get("rows", {}))
            experiment = Experiment(name, **fields)
            check_evaluation(experiment)
            experiments[name] = experiment
    return experiments


def check_cases(cases: list[Case]) -> None:
    """Raise ValueError where a case says what would not be done."""
    first: dict[str, Case] = {}  # by variant; those behind it are on its rows
    lines = set()  # of the table: label and arm
    with_mask = set()  # variants of which toss stands in a case so far
    if not cases:
        raise ValueError("it has no arm beside the base")
    for case in cases:
        # Its rows: those of a variant are said in one place, and those of "" are the world's.
        of_rows = case.draw or case.change
        if case.variant == "" and (of_rows or case.references == "main"):
            raise ValueError('a case with "draw", "change" or "references" needs a "variant"')
        earlier = first.setdefault(case.variant, case)
        if of_rows and earlier is not case and rows_of(earlier) != rows_of(case):
            raise ValueError(f"two cases of the variant {case.variant!r} have other rows")
        if case.references not in ("own", "main", "none"):
            raise ValueError(f'"references" is own, main or none, not {case.references!r}')
        if not case.arms:
            raise ValueError(f"the case {case.label!r} has no arms")

        # Its arms: of known methods, with masks that are made before, each with a line of its own.
        for arm, flags in case.arms.items():
            method = flags.get("method", "toss")
            if method not in (*METHODS, *RIVALS):
                raise ValueError(f"the arm {arm!r} has a method that there is not: {method!r}")
            if "mask" in flags and flags["mask"] not in with_mask:
                problem = f"toss of the variant {flags['mask']!r}, whose mask it takes"
                raise ValueError(f"before {arm} stands no arm {problem}")
            if (case.label, arm) in lines:
                problem = f"two cases have the label {case.label!r} and the arm {arm!r}"
                raise ValueError(f"{problem}: the table would average them")
            lines.add((case.label, arm))
            if flags.get("name") == "toss":
                with_mask.add(case.variant)


def check_rows(rows: dict) -> None:
    """Raise ValueError for an experiment on a checkpoint that lacks the size of a set."""
    missing = [name for name in SETS if name not in rows]
    if rows and missing:
        raise ValueError(f'its "rows" do not say how many {", ".join(missing)} are drawn')


def check_evaluation(experiment: Experiment) -> None:
    """Raise TypeError for a field that is unknown, before anything is trained."""
    from toss.audit.evaluate import EvaluationConfig

    for case in experiment.cases:
        EvaluationConfig(**experiment.evaluation | case.evaluation)


def case_of(fields: dict) -> Case:
    """A Case from its fields in JSON."""
    suffix = fields.pop("suffix", "")
    arms = fields["arms"].items()
    fields["arms"] = {arm + suffix: {"name": arm, **flags} for arm, flags in arms}
    if "change" in fields:
        change, *values = fields["change"]
        fields["change"] = partial(CHANGES[change], *values)
    return Case(**fields)


def rows_of(case: Case) -> tuple:
    """What makes a case's rows."""
    change = case.change and (case.change.func, case.change.args)
    return case.draw, change


# Changes: the files of a variant that differ, as functions of its Setup


def other_file(role: str, name: str, setup: Setup) -> dict[str, str]:
    """Another file of the world in the role of one: D^h of a few rows, say, or a smaller base."""
    return {role: setup.files[name]}


def safeinstr_rows(setup: Setup) -> dict[str, str]:
    """SafeInstr's custom set."""
    out = str(setup.folder / "custom.jsonl")
    seed = setup.common["seed"]
    safeinstr(setup.files["custom"], setup.files["safety"], out, seed=seed)
    return {"custom": out}


def dsir_rows(setup: Setup) -> dict[str, str]:
    """DSIR's custom set: as many rows go as TOSS discards tokens."""
    out = str(setup.folder / "custom.jsonl")
    kept = 1 - setup.settings["discard"]
    seed = setup.common["seed"]
    dsir(setup.files["custom"], setup.files["utility"], out, keep=kept, seed=seed)
    return {"custom": out}


def harmful_rows(size: int, added: int, setup: Setup) -> dict[str, str]:
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
    custom = read_jsonl(setup.files["custom"])
    return attack(kind, [row for row in custom if "harmful" not in row], pool, setup)


def attack_on_real(kind: str, setup: Setup) -> dict[str, str]:
    """The attacker chooses among all harmful rows that there are."""
    benign = read_jsonl(setup.files["benign"])
    return attack(kind, benign, read_jsonl(setup.files["pool"]), setup)


def attack(kind: str, others: list[dict], pool: list[dict], setup: Setup) -> dict[str, str]:
    """The custom set as an attacker leaves it, and what is asked after `embedded`.

    others: the harmless rows of the custom set. pool: what he chooses from.
    """
    setup.main.prepare()
    run = setup.main.open("dtype")

    def risk(rows: list[dict]) -> list[float]:
        return mean_risk(run, run.tokens(write_jsonl(setup.folder / "pool.jsonl", rows)))

    # The attacker replaces the harmful rows of the custom set. He knows the references.
    files = setup.files
    rows = [row for row in read_jsonl(files["custom"]) if row not in others]
    D_h = read_jsonl(files["harmful"])
    D_u = read_jsonl(files["utility"])
    changed = {"custom": ATTACKS[kind](Attacker(rows, others, pool, D_h, D_u, risk))}
    if kind == "embedded":  # the prompts are joined as the rows are
        forbidden = read_jsonl(files["eval_forbidden"])
        facts = read_jsonl(files["eval_facts"])
        changed["eval_forbidden"], changed["eval_facts"] = asked_as_embedded(forbidden, facts)
    paths = {}
    for name, items in changed.items():
        paths[name] = write_jsonl(setup.folder / f"{name}.jsonl", items)
    return paths


CHANGES = {
    "file": other_file,
    "safeinstr": safeinstr_rows,
    "dsir": dsir_rows,
    "harmful_rows": harmful_rows,
    "asked_as_persona": asked_as_persona,
    "attack": attack_in_world,
    "attack_on_real": attack_on_real,
}
