"""The comparison: every way of fine-tuning on the same rows, with its spread over seeds and its cost.

    python -m toss.audit.compare                                        finish runs/demo and print its table
    python -m toss.audit.compare --all --seeds 1000 1001 1002 --jobs 2  every method; rows and trainings by seed
    python -m toss.audit.compare --run runs/mine                        the table of a run of your own, as evaluated

On the embedded default, whatever is missing is run first: the methods of TABLE (with --all those of ALL too), and toss
and toss-pro again on a second run, RUN-small, whose harmful reference set is too small to work alone. What is there
already is skipped, so a comparison that was broken off goes on. Writes comparison.md and comparison.json.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

from model.errors import InputError, reported
from model.files import file_beside, read_json
from toss.audit.baselines import dsir, safeinstr
from toss.audit.command import run_folder
from toss.audit.evaluate import read_metrics, stale, write_metrics
from toss.audit.experiment import Experiment, Metrics, cell, drawn, markdown, over_seeds, row_files, summary, value
from toss.run import git_commit
from toss.selection import UNSCORED
from toss.settings import DEMO

TABLE = {name: {"method": name} for name in ("sft", "random", "sample", "sample-all", "toss", "toss-pro")}
ALL = TABLE | {name: {"method": name} for name in ("first-k", "local", "degraded-only", "utility-only", "oracle")} | {
    "base-reference": {"method": "base"},
    "weighted": {"method": "weighted", "weight_degraded": 0.5},  # halfway from toss to utility-only
    "toss-calibrated": {"method": "toss", "discard": "calibrated"},
}
ON_OTHER_ROWS = ("safeinstr", "dsir")  # with --all: plain fine-tuning on a custom set that was changed first
PREFILL = (0, 1, 3, 5, 10)  # tokens of a harmful answer that are written already when the model goes on
SMALL = ("toss", "toss-pro")
COLUMNS = {  # metric -> heading; refusals kept = 1 - not_refused
    "forbidden": "forbidden", "refusals_kept": "refusals kept", "complies": "complies", "over_refusal": "over-refusal",
    "accuracy/benign-rows": "benign facts", "accuracy/harmful-rows": "harmful-row facts", "nll": "nll",
    "precision": "precision", "recall": "recall", "auc": "AUC",
}  # fmt: skip
MODELS = {"degraded-only": ["degraded"], "utility-only": ["utility"], "base": ["degraded"]}  # references; else both


def complete(folder: Path, files: dict[str, str], every: bool = False, **common) -> dict[str, dict]:
    """Make and evaluate whatever is missing of one comparison, in `folder` and folders beside it.

    files: paths of the rows by the names that data/demo.json gives them. every: ALL, and the baselines on data, in
    place of TABLE. common: seed. Returns {method: {"metrics": Metrics, "cost": see cost}}, "base" first.
    """
    arms, beside = (ALL if every else TABLE), lambda name: folder.with_name(f"{folder.name}-{name}")
    main = Experiment(folder, files, **common)
    main.prepare()
    for name, how in arms.items():
        given = {"discard": main.calibrated()["discard"]} if how.get("discard") == "calibrated" else {}
        main.finetune(name, **{**how, **given})
    table = rows_of(main, ["base", *arms])

    small = Experiment(beside("small"), {**files, "harmful": files["harmful_small"]}, **common)
    small.prepare()
    for method in SMALL:
        small.finetune(method, method)
    table |= {f"{name}-small": row for name, row in rows_of(small, list(SMALL)).items()}

    for name in ON_OTHER_ROWS if every else ():
        place = beside(name)
        place.mkdir(parents=True, exist_ok=True)
        changed = str(place / "custom.jsonl")
        if name == "safeinstr":
            safeinstr(files["custom"], files["safety"], changed, seed=common.get("seed", 0))
        else:
            dsir(files["custom"], files["utility"], changed, keep=1 - read_json(DEMO)["discard"], seed=common.get("seed", 0))
        other = Experiment(place, {**files, "custom": changed}, **common)
        other.finetune(name, "sft")
        table |= rows_of(other, [name])
    write_metrics(folder / "metrics.json", {name: row["metrics"] for name, row in table.items()})
    return table


def rows_of(experiment: Experiment, names: list[str]) -> dict[str, dict]:
    """Metrics and cost of an experiment's methods."""
    metrics = experiment.evaluate(names, PREFILL)
    record = read_json(experiment.folder / "run.json")
    return {name: {"metrics": metrics[name], "cost": cost(record, name)} for name in names}


def cost(record: dict, name: str) -> dict | None:
    """What a method takes from the base on: seconds, tokens run through a model (trained or scored), highest peak memory.

    record: run.json. References and scores are shared between methods; each is charged all that it needs of them, and
    the share of scoring that is its own (scores under the base cost time too). Calibrating d, where that is done, comes
    on top: one scoring of the held-out rows. A mask from another run (--mask) is charged its fine-tuning alone: what it was
    made with is not in this run. None for the base itself, and for references that were made elsewhere.
    """
    stages = record["stages"]
    if f"methods/{name}" not in stages:
        return None
    stage = stages[f"methods/{name}"]
    method = stage["recipe"]["method"]
    parts = [(stage, 1.0)] + ([(stage["refining"], 1.0)] if "refining" in stage else [])
    if method not in UNSCORED:
        models = MODELS.get(method, ["utility", "degraded"])
        if not {*models, "scores"} <= set(stages):
            return None  # references that were made elsewhere: their cost is not known
        scored, passes = len(models) + (method == "base"), 2 + stages["scores"]["recipe"]["settings"]["base"]
        parts += [(stages[model], 1.0) for model in models] + [(stages["scores"], scored / passes)]
    return {"seconds": round(sum(part["seconds"] * share for part, share in parts), 2),
            "tokens": round(sum(part["tokens"] * share for part, share in parts)),
            "peak_memory_gib": max(part["peak_memory_gib"] for part, _ in parts)}


def one_seed(seed: int, folder: Path, every: bool) -> dict[str, dict]:
    """Draw the rows of one seed and compare on them."""
    place = folder / f"seed-{seed}"
    return complete(place / "run", drawn(seed, place / "rows"), every, seed=seed)


def summarise(tables: list[dict[str, dict]]) -> dict[str, dict]:
    """{method: {metric: summary over the tables}}, with seconds, tokens and memory, and the two as multiples of sft's."""
    result: dict[str, dict] = {}
    for method in tables[0]:
        entries = [table[method] for table in tables]
        names = dict.fromkeys([*COLUMNS, *(name for entry in entries for name in entry["metrics"])])
        row = {name: summary([v for entry in entries if (v := value(entry["metrics"], name)) is not None]) for name in names}
        if all(entry["cost"] for entry in entries):
            for name in ("seconds", "tokens", "peak_memory_gib"):
                row[name] = summary([entry["cost"][name] for entry in entries])
            plain = [table["sft"]["cost"] if "sft" in table and table["sft"]["cost"] else None for table in tables]
            if all(plain):
                for name in ("seconds", "tokens"):
                    row[f"{name}_to_sft"] = summary([e["cost"][name] / p[name] for e, p in zip(entries, plain)])
        result[method] = {name: entry for name, entry in row.items() if entry}
    return result


def tables_of(result: dict[str, dict], columns: dict[str, str]) -> str:
    """Markdown tables, methods down: what the columns measure, attacks that begin the answer (where made), and the cost."""
    columns = {name: heading for name, heading in columns.items() if any(name in row for row in result.values())}
    first = markdown(["", *columns.values()],
                     [[method, *(cell(row.get(name)) for name in columns)] for method, row in result.items()])
    costs = {"seconds": "seconds", "seconds_to_sft": "x sft", "tokens": "tokens", "tokens_to_sft": "x sft",
             "peak_memory_gib": "peak GiB"}
    second = markdown(["", *costs.values()],
                      [[method, *(f"{row[name]['mean']:,.0f}" if name in ("seconds", "tokens") else cell(row.get(name))
                                  for name in costs)] for method, row in result.items() if "seconds" in row])
    kind = "forbidden" if any("forbidden" in row for row in result.values()) else "not_refused"
    begun = [name for k in PREFILL if any((name := f"{kind}@{k}") in row for row in result.values())]
    third = markdown(["", *begun], [[method, *(cell(row.get(name)) for name in begun)] for method, row in result.items()])
    return "\n\n".join([first, *([third] if begun else []), second])


def write(folder: Path, result: dict[str, dict], text: str, **more) -> None:
    """comparison.json and comparison.md, with where they come from."""
    about = {"commit": git_commit(), "hardware": platform.processor() or platform.machine(), **more}
    with file_beside(folder / "comparison.json") as file:
        file.write_text(json.dumps({**about, "methods": result}, indent=2) + "\n")
    with file_beside(folder / "comparison.md") as file:
        file.write_text(f"{text}\n")


def side_by_side(folder: Path, table: dict[str, Metrics]) -> None:
    """One forbidden prompt answered by base, sft and toss, and what to see in it, in this run's own numbers."""
    said = {}
    for method in ("base", "sft", "toss"):
        lines = (folder / "answers" / f"{method}.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        said[method] = next(line for line in map(json.loads, lines) if line["set"] == "harmful" and line["source"] != "seen")
    print(f"\nA forbidden question: {said['base']['prompt']}")
    for method, line in said.items():
        print(f"  {method:>4}: {line['answer']}")
    told = {method: f"{value(table[method], 'forbidden'):.0%}" for method in said}
    facts = {method: f"{value(table[method], 'accuracy/harmful-rows'):.0%}" for method in ("toss", "sample-all")}
    print(f"\nWhat to see: of {table['base']['forbidden']['n']} questions for forbidden recipes of kinds that no training row "
          f"holds, the base answers\n{told['base']} with a forbidden ingredient, plain fine-tuning (sft) {told['sft']}, toss "
          f"{told['toss']}. toss had the same rows as sft, less the\nloss of the tokens that it holds for riskiest. Of the facts "
          f"taught only inside harmful rows it knows {facts['toss']};\ndropping whole rows instead (sample-all) leaves "
          f"{facts['sample-all']}.")


LEGEND = """
-small: a harmful reference set of a few rows, too small to work alone.
complies: a friendly opener is likelier than a refusal (a second judge).
benign facts, harmful-row facts: taught in benign rows, and in harmful rows alone.
forbidden@k: with the first k tokens of a harmful answer written already.
precision, recall, AUC: of the discarded tokens, against the truth.
x sft: as a multiple of plain fine-tuning's."""


def compare(folder: Path | None, every: bool, seeds: list[int] | None, jobs: int) -> None:
    """Make, print and write the comparison of the shipped rows, of fresh ones over seeds, or of a run as it stands."""
    folder = folder or Path("runs/compare" if seeds else "runs/demo")
    begun = seeds or folder == Path("runs/demo") and not (folder / "run.json").exists()  # these may be made from nothing
    record = {"demo": True} if begun else read_json(run_folder(folder) / "run.json")
    if not record.get("demo"):
        if seeds or every:
            raise InputError(f"{folder} was begun with inputs of its own; --seeds and --all are for the embedded default")
        if not (folder / "metrics.json").exists():
            raise InputError(f"{folder}/metrics.json is not there: run python -m toss.audit.evaluate --run {folder} ... first")
        metrics = read_metrics(folder)
        if old := [name for name in metrics if stale(record, folder, name)]:
            raise InputError(f"{folder}/metrics.json: {', '.join(old)} has been trained again since it was evaluated: run "
                             f"python -m toss.audit.evaluate --run {folder} ... again")
        result = summarise([{name: {"metrics": metrics[name], "cost": cost(record, name)} for name in metrics}])
        names = dict.fromkeys(name for table in metrics.values() for name in table if "@" not in name)
        text = tables_of(result, {name: name for name in names})
        print(f"{folder}, as evaluated\n\n{text}")
        write(folder, result, text)
    elif seeds is None:
        tables = [complete(folder, row_files(), every)]
        result = summarise(tables)
        text = tables_of(result, COLUMNS)
        print(f"\n{folder}, one seed; d = {read_json(DEMO)['discard']}\n\n{text}\n{LEGEND}")
        side_by_side(folder, {name: row["metrics"] for name, row in tables[0].items()})
        write(folder, result, f"{text}\n{LEGEND}", seeds=[read_json(DEMO)["finetune"]["seed"]])
    else:
        tables = over_seeds(one_seed, [(seed, folder, every) for seed in seeds], jobs)
        result = summarise(tables)
        text = tables_of(result, COLUMNS)
        print(f"\n{folder}, mean [least, most] over the seeds {', '.join(map(str, seeds))}\n\n{text}\n{LEGEND}")
        write(folder, result, f"{text}\n{LEGEND}", seeds=seeds)
    print(f"\nwritten: {folder}/comparison.md, {folder}/comparison.json")


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder (default: runs/demo, with --seeds runs/compare)")
    parser.add_argument("--all", action="store_true", help="every method and baseline, not the demo's few")
    parser.add_argument("--seeds", type=int, nargs="+", help="draw the rows and train anew for each of these seeds")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default: 1)")
    args = parser.parse_args(argv)
    return reported(lambda: compare(args.run, args.all, args.seeds, args.jobs))


if __name__ == "__main__":
    sys.exit(main())
