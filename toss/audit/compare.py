"""The comparison: every way of fine-tuning on the same rows, its spread over seeds, and its cost.

    python -m toss.audit.compare                             finish runs/demo and print its table
    python -m toss.audit.compare --all --seeds 1000 1001     all methods; rows and trainings by seed
    python -m toss.audit.compare --run runs/mine             the table of your run, as evaluated

On the embedded world, what is missing is run first: the demo's methods (with --all all others too),
and toss and toss-pro again in RUN-small, whose harmful reference set is too small to work alone.
Finished work is skipped. Writes comparison.md, comparison.json and, where answers were begun,
comparison.svg.
"""

import sys
from pathlib import Path

from model.io import InputError, read_json
from toss.audit.baselines import dsir, safeinstr
from toss.audit.command import answers_of, cautions, records_of, write_text
from toss.audit.experiment import Experiment, per_seed, save, spread, table, value, world_files
from toss.audit.rivals import RIVALS
from toss.workbench import flags

SMALL = {"toss": {"method": "toss"}, "toss-pro": {"method": "toss", "pro": 1}}
TABLE = {name: {"method": name} for name in ("sft", "random", "sample", "sample-all")} | SMALL
OTHERS = ["first-k", "first-5", "local", "degraded-only", "utility-only", "oracle", "weighted"]
OTHERS += [name for name in RIVALS if name != "safelora"]  # there is no unaligned base
ALL = TABLE | {name: {"method": name} for name in OTHERS}
ALL["base-reference"] = {"method": "base"}
ALL["toss-calibrated"] = {"method": "toss", "discard": "calibrated"}
ALL["kl-calibrated"] = {"method": "kl-discarded", "discard": "calibrated"}
DRAWN = "sft toss soft-sft kl-discarded pact-lite patch first-5 safeinstr".split()
PREFILL = (0, 1, 3, 5, 10)  # tokens of a harmful answer that are already written
# The models whose losses a method uses; others use those of both references.
MODELS = {"degraded-only": ["degraded"], "utility-only": ["utility"], "base": ["degraded", "base"]}
COLUMNS = (
    "forbidden refusals_kept complies over_refusal accuracy/benign-rows accuracy/harmful-rows "
    "nll precision recall auc"
).split()
COSTS = ("seconds", "seconds_to_sft", "tokens", "tokens_to_sft", "peak_memory_gib")
LEGEND = """

-small: a harmful reference set of a few rows, too small to work alone.
complies: a friendly opener is likelier than a refusal (a second judge).
benign facts, harmful-row facts: taught in benign rows, and in harmful rows alone.
forbidden@k: with the first k tokens of a harmful answer written already.
precision, recall, AUC: of the discarded tokens, against the truth.
x sft: as a multiple of plain fine-tuning's."""
POINT = """\
What to see: {n} questions ask for forbidden recipes of kinds that no training row contains.
The base answers {base:.0%} of them with a forbidden ingredient, plain fine-tuning (sft)
{sft:.0%}, toss {toss:.0%}. toss trained on the same rows as sft, without the loss of the tokens
it scores as riskiest. It knows {toss facts:.0%} of the facts taught only inside harmful rows;
dropping whole rows instead (sample-all) leaves {sample-all facts:.0%}.
"""


def complete(main: Experiment, every: bool = False) -> dict[str, dict]:
    """Run and evaluate what is missing of one comparison, in a run and runs beside it.

    every: ALL and the data-level baselines, not only TABLE. Returns the rows, see rows_of.
    """
    from toss.audit.evaluate import write_metrics

    files, seed = main.files, main.common.get("seed", 0)
    found = rows_of(main, ALL if every else TABLE, "base")
    few = main.beside("small", harmful=files["harmful_small"])
    print(f"\n{few.folder}: TOSS and TOSS-Pro again, with a harmful reference set of a few rows\n")
    found |= {f"{name}-small": row for name, row in rows_of(few, SMALL).items()}
    kept = 1 - read_json(flags.DEMO)["discard"]
    ways = {"safeinstr": (safeinstr, "safety", {}), "dsir": (dsir, "utility", {"keep": kept})}
    for name, (change, other, how) in ways.items() if every else ():
        custom = str(main.beside(name).folder / "custom.jsonl")
        change(files["custom"], files[other], custom, seed=seed, **how)
        found |= rows_of(main.beside(name, custom=custom), {name: {"method": "sft"}})
    write_metrics(main.folder / "metrics.json", {n: row["metrics"] for n, row in found.items()})
    return found


def rows_of(experiment: Experiment, arms: dict[str, dict], *more: str) -> dict[str, dict]:
    """Fine-tune in these ways: {name: {"metrics", "cost"}}, those of the models in `more` first."""
    if "toss" in arms:  # the data-level baselines need no references
        experiment.prepare()
    for name, how in arms.items():
        experiment.finetune(name, **how)
    metrics = experiment.evaluate([*more, *arms], PREFILL)
    record = read_json(experiment.folder / "run.json")
    return {name: {"metrics": metrics[name], "cost": cost(record, name)} for name in metrics}


def cost(record: dict, name: str) -> dict | None:
    """What a method costs, starting from the base: seconds, tokens trained or scored, peak memory.

    record: run.json. A method is charged what it is made from, its share of scoring included, but
    not calibrating d. A mask from another run is charged its fine-tuning alone. None for
    the base, and if the references were made elsewhere, or their costs are lost with a run.json.
    """
    stages = record["stages"]
    if (stage := stages.get(f"methods/{name}")) is None:
        return None
    recipe, references = stage["recipe"], ["utility", "degraded"]
    models = MODELS.get(recipe["settings"].get("method"), references)
    unused = {*references} - {*models}
    used = [key for key in recipe["inputs"] if not key.startswith("--") and key not in unused]
    if not {*used} <= {*stages}:
        return None
    parts = [(stage, 1.0), *((stages[key], 1.0) for key in used if key != "scores")]
    if "scores" in used:
        passes = 2 + stages["scores"]["recipe"]["settings"].get("base", False)
        parts.append((stages["scores"], len(models) / passes))
    if any({"seconds", "tokens", "peak_memory_gib"} - part.keys() for part, _ in parts):
        return None
    return {
        "seconds": round(sum(part["seconds"] * share for part, share in parts), 2),
        "tokens": round(sum(part["tokens"] * share for part, share in parts)),
        "peak_memory_gib": max(part["peak_memory_gib"] for part, _ in parts),
    }


def as_evaluated(folder: Path) -> dict[str, dict]:
    """The rows of a run's metrics.json; InputError if a model was trained again since."""
    from toss.audit.evaluate import evaluations, read_metrics
    from toss.workbench.run import open_run

    run = open_run(folder)
    metrics = read_metrics(folder)
    old = ", ".join(name for name in metrics if name in evaluations(run)[1])
    if old or not metrics:
        what = f"{old} changed since the evaluation" if old else "not evaluated yet"
        raise InputError(f"{folder}: {what}: run python -m toss.audit.evaluate --run {folder} ...")
    return {name: {"metrics": metrics[name], "cost": cost(run.record, name)} for name in metrics}


def summarise(found: list[dict[str, dict]]) -> dict[str, dict]:
    """{method: {measure: summary over the seeds}}, with costs, also as multiples of sft's."""
    numbers = []
    for rows in found:
        plain = rows.get("sft", {}).get("cost") or {}
        for name, row in rows.items():
            costs, metrics = row["cost"] or {}, row["metrics"]
            measures = {key: value(metrics, key) for key in [*COLUMNS, *metrics]}
            ratios = {f"{key}_to_sft": costs[key] / plain[key] for key in plain if costs}
            numbers.append((name, {**measures, **costs, **ratios}))
    return spread(numbers)


def tables_of(result: dict[str, dict], columns: list[str]) -> str:
    """Markdown tables, methods down: the measures, prefilled answers where there are any, costs."""
    kind = "forbidden" if any("forbidden" in row for row in result.values()) else "not_refused"
    begun = [f"{kind}@{k}" for k in PREFILL]
    trained = {method: row for method, row in result.items() if "seconds" in row}
    tables = [table([""], *of) for of in ((result, columns), (result, begun), (trained, COSTS))]
    return "\n\n".join(text for text in tables if text)


def chart(result: dict[str, dict]) -> str:
    """Harm over the tokens of the answer that are written already, as SVG; "" if not measured."""
    from toss.audit.figures import line_chart

    lines = {
        name: [(k, *(row[f"forbidden@{k}"][x] for x in ("mean", "least", "most"))) for k in PREFILL]
        for name, row in result.items()
        if name in DRAWN and all(f"forbidden@{k}" in row for k in PREFILL)
    }
    about = "Answers that are begun", "tokens of a harmful answer already written", "forbidden"
    return line_chart(lines, *about, (0.0, 1.0)) if lines else ""


def what_to_see(folder: Path, found: dict[str, dict]) -> str:
    """A forbidden question answered by base, sft and toss, and the point, in this run's numbers."""
    said, numbers = "", {"n": found["base"]["metrics"]["forbidden"]["n"]}
    for name in ("base", "sft", "toss"):
        lines = answers_of(folder / "answers" / f"{name}.jsonl")
        asked = (line for line in lines if line["set"] == "harmful")
        line = next(line for line in asked if line["source"] != "seen")
        said += f"  {name:>4}: {line['response']}\n"
        numbers[name] = value(found[name]["metrics"], "forbidden")
    for name in ("toss", "sample-all"):
        numbers[f"{name} facts"] = value(found[name]["metrics"], "accuracy/harmful-rows")
    return f"A forbidden question: {line['prompt']}\n{said}\n{POINT.format_map(numbers)}"


def compare(folder: Path, every: bool, seeds: list[int] | None, jobs: int) -> None:
    """Compare on fresh rows over seeds, on the shipped rows, or a run as it was evaluated."""
    from toss.workbench.run import open_run

    # The demo is begun here if need be; for another run, a missing run.json is an error.
    if seeds and (folder / "run.json").exists():
        raise InputError(f"{folder} is a run; --seeds needs a folder for runs of its own")
    begun = seeds or (folder == Path("runs/demo") and not (folder / "run.json").exists())
    own = not (begun or open_run(folder).record.get("demo"))
    columns, legend, closing = COLUMNS, LEGEND, ""
    if own and every:
        raise InputError(f"{folder} was begun with your own inputs; --all needs the embedded world")
    if own:
        found, title = [as_evaluated(folder)], "as evaluated"
        metrics = {name: row["metrics"] for name, row in found[0].items()}
        legend = "\n\n".join(["", *cautions(records_of(open_run(folder), metrics), metrics)])
        names = [name for row in metrics.values() for name in row]
        columns = [name for name in dict.fromkeys(names) if "@" not in name]
    elif seeds:
        tasks = [(Experiment.drawn(folder / f"seed-{seed}", seed), every) for seed in seeds]
        found = per_seed(complete, tasks, jobs)
        title = f"mean [least, most] over the seeds {', '.join(map(str, seeds))}"
    else:
        found, demo = [complete(Experiment(folder, world_files()), every)], read_json(flags.DEMO)
        title, seeds = f"one seed; d = {demo['discard']}", [demo["finetune"]["seed"]]
        closing = f"\n{what_to_see(folder, found[0])}"
    result = summarise(found)
    if drawn := chart(result):
        write_text(folder / "comparison.svg", drawn)
    text = tables_of(result, columns) + legend
    print(f"\n{folder}, {title}\n\n{text}\n{closing}")
    save(folder / "comparison", text, {"seeds": seeds, "methods": result})


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.compare", __doc__)
    flag = parser.add_argument
    flag("--run", type=Path, help="folder (default: runs/demo, with --seeds runs/compare)")
    flag("--all", action="store_true", help="every method and baseline, not only the demo's")
    flag(
        "--seeds", type=flags.natural, nargs="+", help="draw rows and train for each of these seeds"
    )
    flag("--jobs", type=flags.count, default=1, help="seeds at a time (default: 1)")
    args = parser.parse_args(argv)
    folder = args.run or Path("runs/compare" if args.seeds else "runs/demo")
    compare(folder, args.all, args.seeds and [*dict.fromkeys(args.seeds)], args.jobs)


if __name__ == "__main__":
    sys.exit(flags.run(main))
