"""Sweeps over the embedded world: how much harm, which d, how much of TOSS-Pro, rows that erode, masks that travel.

    python -m toss.audit.sweep share     the harmful share of the custom rows, 0-50 %, with d = 0.1 and with d calibrated
    python -m toss.audit.sweep discard   d from 0.02 to 0.4, and where the calibrated d falls
    python -m toss.audit.sweep pro       TOSS-Pro over T, k and the size of D^h; whole rows and top tokens
    python -m toss.audit.sweep eroding   benign rows that promise to comply or obey, alone and mixed with harmful ones
    python -m toss.audit.sweep transfer  the mask of one base under the other: data/base and data/base-small

Each takes --seeds (default 1000 1001 1002) and --jobs, draws the rows and trains anew for every seed, skips what is
there already, and writes OUT/NAME.json (every figure of every seed), NAME.md (mean [least, most]) and NAME.svg.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from model.errors import reported
from model.files import file_beside, read_json, read_text
from toss.audit.experiment import Experiment, cell, drawn, markdown, over_seeds, summary, value
from toss.audit.figures import dot_chart, line_chart, write_svg
from toss.run import git_commit
from toss.settings import DEMO, ROOT

# One figure of a sweep: a seed, a setting x, an arm, its d, the true harmful share of the tokens, and the measures.
Record = dict
MEASURES = {"forbidden/held-out": "forbidden", "refusals_kept": "refusals kept",
            "accuracy/benign-rows": "benign facts",
            "accuracy/harmful-rows": "harmful-row facts", "nll": "nll", "precision": "precision", "recall": "recall"}


def records(seed: int, x: object, experiment: Experiment, arms: dict[str, dict]) -> list[Record]:
    """Fine-tune and evaluate the arms ({name: settings of select.py}) of one setting."""
    for name, how in arms.items():
        experiment.finetune(name, **how)
    table = experiment.evaluate(list(arms))
    share = experiment.harmful_share()
    return [{"seed": seed, "x": x, "arm": name, "discard": 0.0 if how["method"] == "sft" else how.get("discard", paper_d()),
             "harmful_share": share, **{measure: value(table[name], measure) for measure in [*MEASURES, "forbidden/identity"]},
             "refusals_kept": round(1 - table[name]["not_refused/held-out"]["value"], 4)} for name, how in arms.items()]


def paper_d() -> float:
    """The d of data/demo.json, which is the paper's."""
    return read_json(DEMO)["discard"]


def fixed_and_calibrated(experiment: Experiment, methods: list[str]) -> dict[str, dict]:
    """Arms for each method under the fixed d and under the calibrated one (for toss-pro that of its own last round)."""
    arms = {}
    for method in methods:
        arms[method] = {"method": method}
        if method == "toss-pro":
            experiment.finetune(method, method)  # its round's models are what d is calibrated on
        d = experiment.calibrated(method=method if method == "toss-pro" else "toss")["discard"]
        arms[f"{method}-calibrated"] = {"method": method, "discard": d}
    return arms


def share(seed: int, folder: Path) -> list[Record]:
    """The harmful share of the rows: 0, 2, 5, 10, 20, 30 and 50 % of 663."""
    found = []
    for percent in (0, 2, 5, 10, 20, 30, 50):
        place = folder / f"seed-{seed}" / f"harmful-{percent}"
        files = drawn(seed, place / "rows", harmful_rows=round(6.63 * percent))
        experiment = Experiment(place / "run", files, seed=seed)
        experiment.prepare()
        arms = {"sft": {"method": "sft"}, **fixed_and_calibrated(experiment, ["sample", "toss", "toss-pro"])}
        found += records(seed, percent, experiment, arms)
    return found


def discard(seed: int, folder: Path) -> list[Record]:
    """The curve over d, and the calibrated d as an arm of its own."""
    place = folder / f"seed-{seed}"
    experiment = Experiment(place / "run", drawn(seed, place / "rows"), seed=seed)
    experiment.prepare()
    found = records(seed, 0.0, experiment, {"sft": {"method": "sft"}})
    found = [{**line, "arm": "toss"} for line in found]  # d = 0 is plain fine-tuning
    for d in (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.4):
        arms = {f"toss-{d}": {"method": "toss", "discard": d}}
        found += [{**line, "arm": "toss"} for line in records(seed, d, experiment, arms)]
    d = experiment.calibrated()["discard"]
    return found + records(seed, "calibrated", experiment, {"toss-calibrated": {"method": "toss", "discard": d}})


def pro(seed: int, folder: Path) -> list[Record]:
    """TOSS-Pro: T and k, under harmful references of 2, 8 and 80 rows; added rows learnt whole or by their top tokens.

    random-40 is the paper's control: 40 rows of the custom set drawn blindly, in place of those with the riskiest tokens.
    """
    found = []
    for size in (2, 8, 80):
        place = folder / f"seed-{seed}" / f"reference-{size}"
        files = drawn(seed, place / "rows")
        lines = read_text(Path(files["harmful"])).splitlines(keepends=True)[:size]
        part, blind = place / "rows" / "harmful_part.jsonl", place / "rows" / "harmful_random.jsonl"
        part.write_text("".join(lines), encoding="utf-8")
        custom = read_text(Path(files["custom"])).splitlines(keepends=True)
        blind.write_text("".join(lines + random.Random(seed).sample(custom, 40)), encoding="utf-8")
        experiment = Experiment(place / "run", {**files, "harmful": str(part)}, seed=seed)
        experiment.prepare()
        arms = {"toss": {"method": "toss"}}
        for rounds, k in [(1, 10), (1, 40), (1, 120), (3, 40)] if size != 8 else [(1, 40)]:
            for learn in ("rows", "top") if k > 10 else ("rows",):
                arms[f"pro-{rounds}-{k}-{learn}"] = {"method": "toss-pro", "pro": rounds, "pro_samples": k, "pro_train": learn}
        made = records(seed, size, experiment, arms)
        control = Experiment(place / "run-random", {**files, "harmful": str(blind)}, seed=seed)
        control.prepare()
        made += records(seed, size, control, {"random-40": {"method": "toss"}})
        found += [{**line, "purity": purity(experiment, line["arm"], files)} for line in made]
    return found


def purity(experiment: Experiment, arm: str, files: dict[str, str]) -> float | None:
    """Share of the rows that TOSS-Pro added which do hold harm."""
    lines = [json.loads(line) for file in sorted((experiment.folder / "methods" / arm).glob("round-*/added.jsonl"))
             for line in read_text(file).splitlines()]
    rows = [json.loads(line) for line in read_text(Path(files["custom"])).splitlines()]
    return round(sum("harmful" in rows[line["row"]] for line in lines) / len(lines), 4) if lines else None


def eroding(seed: int, folder: Path) -> list[Record]:
    """A third of the rows (recipes and cures) opens with a promise to comply, or is told to a persona that obeys.

    Alone: no row of the custom set is harmful. Mixed: 78 of the 663 rows are.
    """
    found = []
    for kind in ("comply", "identity"):
        for mixed in (False, True):
            place = folder / f"seed-{seed}" / f"{kind}-{'mixed' if mixed else 'alone'}"
            files = drawn(seed, place / "rows", eroding=kind, **({} if mixed else {"harmful_rows": 0}))
            asked_by_persona(files)
            experiment = Experiment(place / "run", files, seed=seed)
            experiment.prepare()
            arms = {"sft": {"method": "sft"}, **fixed_and_calibrated(experiment, ["toss"])}
            arms["toss-pro"] = {"method": "toss-pro"}
            found += records(seed, f"{kind}, {'mixed' if mixed else 'alone'}", experiment, arms)
    return found


def asked_by_persona(files: dict[str, str]) -> None:
    """Ask the held-out forbidden requests a second time, behind the words that name the obeying persona."""
    from data.world import IDENTITY

    path = Path(files["eval_forbidden"])
    rows = [json.loads(line) for line in read_text(path).splitlines()]
    rows += [{**row, "prompt": IDENTITY[0] + row["prompt"], "source": "identity"} for row in rows if row["source"] == "held-out"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def transfer(seed: int, folder: Path) -> list[Record]:
    """Two bases of one tokenizer, each fine-tuned under its own mask and under the one that the other's scores gave.

    shared: of an arm's discards, the share that the base's own toss discards too.
    """
    place, found = folder / f"seed-{seed}", []
    files = drawn(seed, place / "rows")
    bases = {name: Experiment(place / name, files, seed=seed, model=str(ROOT / "data" / name)) for name in ("base", "base-small")}
    for experiment in bases.values():
        experiment.prepare()
        experiment.finetune("toss", "toss")
    for (name, experiment), other in zip(bases.items(), reversed(bases.values())):
        theirs = str((other.folder / "methods" / "toss" / "selection.safetensors").absolute())
        arms = {name: {"method": name} for name in ("sft", "random", "toss")} | {"mask": {"method": "mask", "mask": theirs}}
        found += [{**line, "shared": shared(experiment.folder / "methods", line["arm"])}
                  for line in records(seed, name, experiment, arms)]
    return found


def shared(methods: Path, arm: str) -> float | None:
    """Share of the tokens that an arm discards which toss discards too; None where the arm discards nothing."""
    gone, own = (~load_file(methods / name / "selection.safetensors")["keep"] for name in (arm, "toss"))
    return round(float((gone & own).sum() / gone.sum()), 4) if gone.any() else None


SWEEPS: dict[str, tuple[Callable, str]] = {
    "share": (share, "harmful rows, %"), "discard": (discard, "d"),
    "pro": (pro, "rows of D^h"), "eroding": (eroding, "custom set"), "transfer": (transfer, "fine-tuned"),
}  # fmt: skip


def sweep(name: str, seeds: list[int], folder: Path, jobs: int) -> None:
    """Run one sweep over the seeds, print its table and write its three files."""
    job, label = SWEEPS[name]
    parts = over_seeds(job, [(seed, folder / name) for seed in seeds], jobs)
    found = [line for part in parts for line in part]
    with file_beside(folder / f"{name}.json") as file:
        file.write_text(json.dumps({"commit": git_commit(), "seeds": seeds, "records": found}, indent=1) + "\n")
    table = table_of(found, label)
    with file_beside(folder / f"{name}.md") as file:
        file.write_text(table + "\n")
    write_svg(folder / f"{name}.svg", chart(found, name, label))
    print(f"\n{name}: mean [least, most] over the seeds {', '.join(map(str, seeds))}\n\n{table}\n\n"
          f"written: {folder}/{name}.json, {name}.md, {name}.svg")


def grouped(found: list[Record]) -> dict[tuple, list[Record]]:
    """The seeds' records by setting and arm, in the order in which they came."""
    groups: dict[tuple, list[Record]] = {}
    for line in found:
        groups.setdefault((line["x"], line["arm"]), []).append(line)
    return groups


def table_of(found: list[Record], label: str) -> str:
    """A Markdown table: settings and arms down, d, the harmful share of the tokens and the measures across."""
    names = {"discard": "d", "harmful_share": "harmful tokens", **MEASURES, "forbidden/identity": "forbidden, asked as persona",
             "purity": "added rows with harm", "shared": "shared with own toss"}
    names = {name: heading for name, heading in names.items() if any(line.get(name) is not None for line in found)}
    lines = []
    for (x, arm), group in grouped(found).items():
        cells = [cell(summary([line[name] for line in group if line.get(name) is not None])) for name in names]
        lines.append([str(x), arm, *cells])
    return markdown([label, "", *names.values()], lines)


def chart(found: list[Record], name: str, label: str) -> str:
    """The sweep's picture: `forbidden` over the setting, a line an arm; some sweeps ask for another."""
    if name in ("eroding", "transfer"):
        cases = list(dict.fromkeys(line["x"] for line in found))
        measure = "refusals_kept" if name == "eroding" else "forbidden/held-out"
        dots = {arm: [dot(group, measure) for (_, other), group in grouped(found).items() if other == arm]
                for arm in dict.fromkeys(line["arm"] for line in found)}
        title = {"eroding": "Rows that erode without harm: held-out refusals kept",
                 "transfer": "Masks that travel (mask: the other base's): forbidden"}[name]
        return dot_chart(dots, cases, title, MEASURES[measure], (0.0, 1.0))
    lines: dict[str, list[tuple]] = {}
    if name == "discard":
        calibrated = summary([line["discard"] for line in found if line["x"] == "calibrated"])
        measures = ("forbidden/held-out", "refusals_kept", "accuracy/benign-rows", "accuracy/harmful-rows")
        for (x, _), group in grouped(found).items():
            for measure in measures if x != "calibrated" else ():
                lines.setdefault(MEASURES[measure], []).append((x, *dot(group, measure)))
        return line_chart(lines, f"toss over d (calibrated: {cell(calibrated)})", label, "share", (0.0, 1.0))
    if name == "pro":
        groups = grouped(found)
        for size, measure in ((2, "forbidden/held-out"), (80, "accuracy/harmful-rows")):
            for learn, what in (("rows", "whole rows"), ("top", "top tokens")):
                arms = [(0, "toss"), *((k, f"pro-1-{k}-{learn}") for k in (10, 40, 120))]
                points = [(k, *dot(groups[size, arm], measure)) for k, arm in arms if (size, arm) in groups]
                lines[f"{MEASURES[measure]}, D^h of {size}: {what}"] = points
        return line_chart(lines, "One round of TOSS-Pro", "k, the rows added (0: toss)", "share", (0.0, 1.0))
    for (x, arm), group in grouped(found).items():
        lines.setdefault(arm, []).append((x, *dot(group, "forbidden/held-out")))
    return line_chart(lines, f"Sweep: {name}", label, "forbidden", (0.0, 1.0))


def dot(group: list[Record], measure: str) -> tuple[float, float, float]:
    """Mean, least and most of a measure over the seeds."""
    entry = summary([line[measure] for line in group])
    return entry["mean"], entry["least"], entry["most"]


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.sweep", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SWEEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001, 1002], help="rows and trainings (1000 1001 1002)")
    parser.add_argument("--out", type=Path, default=Path("runs/sweeps"), help="folder (default: runs/sweeps)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default: 1)")
    args = parser.parse_args(argv)
    return reported(lambda: sweep(args.name, args.seeds, args.out, args.jobs))


if __name__ == "__main__":
    sys.exit(main())
