"""The embedded default's closing table: every way of fine-tuning on the same rows, side by side.

    python -m toss.audit.compare                                  finish runs/demo and print its table
    python -m toss.audit.compare --seeds 1000 1001 1002 --jobs 2  new data and trainings by seed; medians over them

Runs what is missing: the methods of TABLE on the run, and toss and toss-pro again on a second run, RUN-small, whose
harmful reference set is too small to work alone. What is there already is skipped, so a broken run can go on.
"""

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from model.errors import InputError, reported
from model.files import read_json
from toss.audit.evaluate import evaluate_run, write_metrics
from toss.pipeline import finetune, score_custom, train_references
from toss.run import Run
from toss.settings import DEMO, ROOT, Settings, demo_values

TABLE = ("base", "sft", "random", "sample", "sample-all", "toss")
SMALL = ("toss", "toss-pro")
COLUMNS = {  # metric -> heading; refusals kept = 1 - not_refused
    "forbidden": "forbidden", "refusals_kept": "refusals kept", "over_refusal": "over-refusal",
    "accuracy/benign-rows": "benign facts", "accuracy/harmful-rows": "harmful-row facts",
    "precision": "precision", "recall": "recall", "auc": "AUC",
}  # fmt: skip


def row_files() -> dict[str, str]:
    """The default's files of rows, by the names that data/demo.json gives them."""
    return {name: str(ROOT / path) for name, path in read_json(DEMO).items() if str(path).endswith(".jsonl")}


def settings_of(script: str, folder: Path, files: dict[str, str], **more) -> Settings:
    """The default's settings for one script on other rows and another folder."""
    return Settings(**{**demo_values(script), **files, "run": str(folder), "demo": True, "script": script, **more}).check()


def complete(folder: Path, files: dict[str, str], **more) -> dict[str, dict]:
    """Make whatever is missing of one comparison in `folder` and `folder`-small, evaluate it, return the table.

    files: paths of the rows by the names that data/demo.json gives them. more: seed, threads.
    """
    small = folder.with_name(folder.name + "-small")
    inputs = {name: files[name] for name in ("harmful", "utility", "custom")}
    demo, table = read_json(DEMO), {}
    for place, chosen, methods in ((folder, inputs, TABLE), (small, {**inputs, "harmful": files["harmful_small"]}, SMALL)):
        train_references(settings_of("train", place, chosen, **more))
        score_custom(settings_of("score", place, chosen, **more))
        for method in methods:
            if method != "base":
                finetune(settings_of("select", place, chosen, method=method, **more))
        sets = {"harmful": files["eval_forbidden"], "benign": files["eval_benign"], "utility": files["eval_facts"]}
        run = Run(settings_of("select", place, chosen, **more))
        metrics = evaluate_run(run, list(methods), sets, demo["forbidden_words"], demo.get("max_new_tokens", 40))
        table |= {method if place == folder else f"{method}-small": values for method, values in metrics.items()}
    write_metrics(folder / "metrics.json", table)
    return table


def one_seed(seed: int, folder: Path, threads: int | None) -> dict[str, dict]:
    """Draw the rows of one seed and compare on them."""
    from data.world import write_rows

    place = folder / f"seed-{seed}"
    write_rows(seed, place / "rows")
    files = {name: str(place / "rows" / Path(path).name) for name, path in row_files().items()}
    return complete(place / "run", files, seed=seed, **({"threads": threads} if threads else {}))


def value(metrics: dict, name: str) -> float | None:
    """A metric's value; `refusals_kept` is one less `not_refused`."""
    if name == "refusals_kept":
        return None if (v := value(metrics, "not_refused")) is None else round(1 - v, 4)
    return metrics[name]["value"] if name in metrics else None


def print_table(tables: list[dict[str, dict]]) -> None:
    """Methods down, measures across; medians, with the range where there are several tables."""
    lines = [["", *COLUMNS.values()]]
    for method in tables[0]:
        lines.append([method])
        for name in COLUMNS:
            values = [v for table in tables if (v := value(table[method], name)) is not None]
            spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
            lines[-1].append(f"{statistics.median(values):.2f}{spread}" if values else "-")
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *cells in lines:
        print("  ".join([f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:]))]))


def side_by_side(folder: Path, table: dict[str, dict]) -> None:
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


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder (default: runs/demo, with --seeds runs/compare)")
    parser.add_argument("--seeds", type=int, nargs="+", help="draw the rows and train anew for each of these seeds")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, one CPU thread each when more than 1 (default: 1)")
    args = parser.parse_args(argv)
    return reported(lambda: compare(args.run, args.seeds, args.jobs))


def compare(folder: Path | None, seeds: list[int] | None, jobs: int) -> None:
    """Make and print the table of the shipped rows, or the medians over seeds."""
    if seeds is None:
        folder = folder or Path("runs/demo")
        if (folder / "run.json").exists() and not read_json(folder / "run.json").get("demo"):
            raise InputError(f"{folder} was begun with inputs of its own; the comparison is of the embedded default")
        tables = [complete(folder, row_files())]
        print(f"\n{folder}, one seed; d = {read_json(DEMO)['discard']}\n")
    else:
        folder = folder or Path("runs/compare")
        if jobs > 1:
            os.environ["OMP_NUM_THREADS"] = "1"  # two pools that spin for each other's cores are ten times slower
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                tables = list(pool.map(one_seed, seeds, [folder] * len(seeds), [1] * len(seeds)))
        else:
            tables = [one_seed(seed, folder, None) for seed in seeds]
        print(f"\n{folder}, median [least, most] over the seeds {', '.join(map(str, seeds))}\n")
    print_table(tables)
    print("\n-small: a harmful reference set of a few rows, too small to work alone."
          "\nbenign facts, harmful-row facts: taught in benign rows, and in harmful rows alone."
          "\nprecision, recall, AUC: of the discarded tokens, against the truth.")
    if seeds is None:
        side_by_side(folder, tables[0])
    print(f"\nwritten: {folder}/{'metrics.json' if seeds is None else 'seed-*/run/metrics.json'}")


if __name__ == "__main__":
    sys.exit(main())
