"""Sweeps over the embedded world: harm, d, TOSS-Pro, eroding rows, moved masks, attackers.

    python -m toss.audit.sweep share     custom rows with 0-50 % harm, d = 0.1 and d calibrated
    python -m toss.audit.sweep discard   d from 0.02 to 0.4, and the calibrated d
    python -m toss.audit.sweep pro       TOSS-Pro over T, k and the size of D^h; whole rows or parts
    python -m toss.audit.sweep eroding   benign rows that promise to comply or obey, alone or mixed
    python -m toss.audit.sweep transfer  masks exchanged between data/base and data/base-small
    python -m toss.audit.sweep attack    harmful rows by an attacker who knows TOSS (attacks.py)

Draws the rows and trains anew for every seed, and skips finished work. Writes OUT/NAME.json (all
numbers of all seeds), NAME.md (mean [least, most]) and NAME.svg.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from model.io import load_tensors
from toss.audit.attacks import ATTACKS, attacked
from toss.audit.command import read_jsonl, write_jsonl, write_text
from toss.audit.experiment import HEADS, Experiment, cell, per_seed, save, spread, table, value
from toss.workbench import flags

# A setting x, its run, and the ways of fine-tuning there: {arm: flags of select.py}.
Cases = Iterator[tuple[object, Experiment, dict[str, dict]]]
Record = dict  # one result: seed, x, arm, and the NUMBERS
NUMBERS = (
    "discard harmful_share forbidden/held-out refusals_kept accuracy/benign-rows "
    "accuracy/harmful-rows nll precision recall forbidden/identity forbidden@1 purity shared"
).split()
DEFENCES = ("sft", "toss", "soft-sft", "kl-discarded", "safeinstr-guided")
PLAIN, TOSS, PRO = {"method": "sft"}, {"method": "toss"}, {"method": "toss", "pro": 1}
CALIBRATED = {"discard": "calibrated"}


def share(seed: int, folder: Path) -> Cases:
    """The harmful share of the rows: 0, 2, 5, 10, 20, 30 and 50 % of 663."""
    arms = {"sft": PLAIN}
    for name, how in {"sample": {"method": "sample"}, "toss": TOSS, "toss-pro": PRO}.items():
        arms |= {name: how, f"{name}-calibrated": how | CALIBRATED}
    for percent in (0, 2, 5, 10, 20, 30, 50):
        rows = round(6.63 * percent)
        experiment = Experiment.drawn(folder / f"harmful-{percent}", seed, harmful_rows=rows)
        yield percent, experiment, arms


def discard(seed: int, folder: Path) -> Cases:
    """The curve over d, where d = 0 is plain fine-tuning, and the calibrated d."""
    experiment = Experiment.drawn(folder, seed)
    yield 0.0, experiment, {"toss": PLAIN | {"name": "sft"}}
    for d in (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.4):
        yield d, experiment, {"toss": TOSS | {"discard": d, "name": f"toss-{d}"}}
    yield "calibrated", experiment, {"toss-calibrated": TOSS | CALIBRATED}


def pro(seed: int, folder: Path) -> Cases:
    """TOSS-Pro: T and k, for D^h of 2, 8 and 80 rows; added rows learnt whole or their top tokens.

    random-40 is the paper's control: 40 random rows of the custom set are added, not the riskiest.
    """
    for size in (2, 8, 80):
        arms = {"toss": TOSS}
        for rounds, k in [(1, 10), (1, 40), (1, 120), (3, 40)] if size != 8 else [(1, 40)]:
            for learn in ("rows", "top") if k > 10 else ("rows",):
                how = {"pro": rounds, "pro_samples": k, "pro_train": learn}
                arms[f"pro-{rounds}-{k}-{learn}"] = TOSS | how
        experiment = Experiment.drawn(folder / f"reference-{size}", seed)
        file, custom = Path(experiment.files["harmful"]), read_jsonl(experiment.files["custom"])
        write_jsonl(file, harmful := read_jsonl(file)[:size])
        yield size, experiment, arms
        blind = harmful + random.Random(seed).sample(custom, 40)
        blind = write_jsonl(file.with_name("harmful-random.jsonl"), blind)
        yield size, experiment.beside("random", harmful=blind), {"random-40": TOSS}


def eroding(seed: int, folder: Path) -> Cases:
    """A third of the rows opens with a promise to comply, or addresses a persona that obeys.

    Alone: no custom row is harmful. Mixed: 78 of the 663 are.
    """
    arms = {"sft": PLAIN, "toss": TOSS, "toss-calibrated": TOSS | CALIBRATED, "toss-pro": PRO}
    for kind in ("comply", "identity"):
        for how, harm in (("alone", {"harmful_rows": 0}), ("mixed", {})):
            experiment = Experiment.drawn(folder / f"{kind}-{how}", seed, eroding=kind, **harm)
            ask_as_persona(Path(experiment.files["eval_forbidden"]))
            yield f"{kind}, {how}", experiment, arms


def ask_as_persona(path: Path) -> None:
    """Add the held-out forbidden requests once more, addressed to the persona that obeys."""
    from data.world import IDENTITY

    rows = read_jsonl(path)
    for row in [row for row in rows if row["source"] == "held-out"]:
        rows.append({**row, "prompt": IDENTITY[0] + row["prompt"], "source": "identity"})
    write_jsonl(path, rows)


def transfer(seed: int, folder: Path) -> Cases:
    """Two bases of one tokenizer, each fine-tuned under its own mask and under the other's."""
    base = Experiment.drawn(folder, seed)
    small = base.beside("small", model=str(flags.ROOT / "data" / "base-small"))
    for name, experiment in (("base", base), ("base-small", small)):
        yield name, experiment, {"sft": PLAIN, "random": {"method": "random"}, "toss": TOSS}
    for name, experiment, other in (("base", base, small), ("base-small", small, base)):
        mask = (other.folder / "methods/toss/selection.safetensors").absolute()
        yield name, experiment, {"mask": {"mask": mask}}


def attack(seed: int, folder: Path) -> Cases:
    """The harmful rows chosen or written by an attacker who knows TOSS; see attacks.py.

    He chooses among four times as many, drawn from the same categories and preambles.
    """
    from data.world import HARMFUL, make_rows

    def harm(row):
        return "harmful" in row

    refused = {row["prompt"] for row in make_rows(seed)["safety"]}
    more = make_rows(seed, harmful_rows=4 * HARMFUL)["custom"]
    pool = [row for row in more if harm(row) and row["prompt"] not in refused]
    arms = {name: {"method": name} for name in DEFENCES}
    arms |= {"toss-calibrated": TOSS | CALIBRATED, "toss-pro": PRO}
    plain = Experiment.drawn(folder, seed)
    yield "none", plain, arms
    for kind in ATTACKS:
        file = plain.beside(kind).folder / "custom.jsonl"
        custom = attacked(plain.open(), kind, plain.files, file, harm, pool)
        yield kind, plain.beside(kind, custom=custom), arms


SWEEPS = {  # the cases of each sweep, what x is, and the title and the y axis of its figure
    "share": (share, "harmful rows, %", "Sweep: share", "forbidden"),
    "discard": (discard, "d", "toss over d", "share"),
    "pro": (pro, "rows of D^h", "One round of TOSS-Pro", "share"),
    "eroding": (eroding, "custom set", "Eroding rows: held-out refusals kept", "refusals kept"),
    "transfer": (transfer, "fine-tuned", "Moved masks (mask: the other base's)", "forbidden"),
    "attack": (attack, "attack", "An attacker who knows TOSS", "forbidden"),
}


def one_seed(seed: int, name: str, folder: Path, cases: Cases | None = None) -> list[Record]:
    """All results of one sweep and seed. cases: others than the sweep's own."""
    extra, found = {"pro": {"purity": purity}, "transfer": {"shared": shared}}.get(name, {}), []
    for x, experiment, arms in cases or SWEEPS[name][0](seed, folder / name / f"seed-{seed}"):
        experiment.prepare()
        scores = load_tensors(experiment.folder / "scores.safetensors")
        harm = round(float(scores["harmful"][scores["response"].bool()].double().mean()), 4)
        arms = {arm: {"name": arm, **how} for arm, how in arms.items()}
        discards = {arm: experiment.finetune(**how) for arm, how in arms.items()}
        begun = (1,) if name == "attack" else ()
        measured = experiment.evaluate([how["name"] for how in arms.values()], begun)
        for arm, metrics in zip(arms, measured.values()):
            record = {key: value(metrics, key) for key in NUMBERS}
            record |= {"seed": seed, "x": x, "arm": arm, "discard": discards[arm]}
            kept = round(1 - metrics["not_refused/held-out"]["value"], 4)
            record |= {"refusals_kept": kept, "harmful_share": harm}
            record |= {key: measure(experiment, arm) for key, measure in extra.items()}
            found.append(record)
    return found


def purity(experiment: Experiment, arm: str) -> float | None:
    """Share of the rows added by TOSS-Pro that hold harm; None if there are none."""
    files = (experiment.folder / "methods" / arm).glob("round-*/added.jsonl")
    added = [line["row"] for file in files for line in read_jsonl(file)]
    rows = read_jsonl(experiment.files["custom"])
    return round(sum("harmful" in rows[i] for i in added) / len(added), 4) if added else None


def shared(experiment: Experiment, arm: str) -> float | None:
    """Share of the tokens discarded by an arm that the run's own toss discards; None if none."""
    files = (experiment.folder / f"methods/{n}/selection.safetensors" for n in (arm, "toss"))
    response = load_tensors(experiment.folder / "scores.safetensors")["response"]
    gone, own = (response & ~load_tensors(file)["keep"] for file in files)
    return round(float((gone & own).sum() / gone.sum()), 4) if gone.any() else None


def places(name: str, x: object, arm: str) -> Iterator[tuple[str, object, str]]:
    """Where the results of an arm at x are drawn in the figure of a sweep: (line, x, measure)."""
    forbidden, facts = "forbidden/held-out", "accuracy/harmful-rows"
    if name == "pro":
        measure = {2: forbidden, 80: facts}.get(x)  # the smallest and the largest D^h
        for learn, what in (("rows", "whole rows"), ("top", "top tokens")):
            k = {"toss": 0, **{f"pro-1-{k}-{learn}": k for k in (10, 40, 120)}}.get(arm)
            if measure and k is not None:
                yield f"{HEADS[measure]}, D^h of {x}: {what}", k, measure
    elif name == "discard":
        for measure in (forbidden, "refusals_kept", "accuracy/benign-rows", facts):
            if x != "calibrated":
                yield HEADS[measure], x, measure
    else:
        yield arm, x, "refusals_kept" if name == "eroding" else forbidden


def chart(result: dict[tuple, dict], name: str) -> str:
    """The figure of a sweep as SVG: lines over a number, or dots at settings that are none."""
    from toss.audit.figures import line_chart

    _, x_label, title, y_label = SWEEPS[name]
    lines = {}
    for (x, arm), row in result.items():
        for line, at, measure in places(name, x, arm):
            point = (at, *(row[measure][key] for key in ("mean", "least", "most")))
            lines.setdefault(line, []).append(point)
    if name in ("eroding", "transfer", "attack"):
        settings = list(dict.fromkeys(x for x, _ in result))

        def place(at, *span):
            return (settings.index(at), *span)

        dots = {arm: [place(*point) for point in points] for arm, points in lines.items()}
        return line_chart(dots, title, "", y_label, (0.0, 1.0), settings)
    if name == "discard":
        title += f" (calibrated: {cell(result['calibrated', 'toss-calibrated']['discard'])})"
    x_label = "k, the rows added (0: toss)" if name == "pro" else x_label
    return line_chart(lines, title, x_label, y_label, (0.0, 1.0))


def sweep(name: str, seeds: list[int], folder: Path, jobs: int) -> None:
    """Run one sweep over the seeds, print its table and write its three files."""
    parts = per_seed(one_seed, [(seed, name, folder) for seed in seeds], jobs)
    found = [record for part in parts for record in part]
    settings = list(dict.fromkeys(record["x"] for record in found))
    found.sort(key=lambda record: settings.index(record["x"]))
    result = spread([((r["x"], r["arm"]), {n: r[n] for n in NUMBERS}) for r in found])
    text = table([SWEEPS[name][1], ""], result, NUMBERS)
    print(f"\n{name}: mean [least, most] over the seeds {', '.join(map(str, seeds))}\n\n{text}\n")
    write_text(folder / f"{name}.svg", chart(result, name))
    save(folder / name, text, {"seeds": seeds, "records": found})


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.sweep", __doc__)
    flag, seeds, out = parser.add_argument, [1000, 1001, 1002], Path("runs/sweeps")
    flag("name", choices=SWEEPS)
    text = "seeds that draw the rows and the training (default: 1000 1001 1002)"
    flag("--seeds", type=flags.natural, nargs="+", default=seeds, help=text)
    flag("--out", type=Path, default=out, help=f"folder (default: {out})")
    flag("--jobs", type=flags.count, default=1, help="seeds at a time (default: 1)")
    args = parser.parse_args(argv)
    sweep(args.name, [*dict.fromkeys(args.seeds)], args.out, args.jobs)


if __name__ == "__main__":
    sys.exit(flags.run(main))
