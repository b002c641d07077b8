"""The table of one run: what each of its methods does, and what it costs.

    python -m toss.audit.compare                     finish runs/demo and print its table
    python -m toss.audit.compare --run runs/mine     the table of your run, as evaluated

Of a run on the demo's inputs, what is missing is run first: its methods, and toss and toss-pro
again in RUN-small, whose harmful reference set is too small to work alone. Finished work is
skipped. Writes comparison.md, comparison.json and, where `forbidden` was measured after 0, 1, 3, 5
and 10 tokens, comparison.svg. All methods over seeds: python -m toss.audit.experiment methods.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from model.io import InputError, read_json
from toss.audit.command import (
    Table,
    cautions,
    read_jsonl,
    records_of,
    safety_caution,
    stages_of,
    write_text,
)
from toss.audit.experiments import read_experiments
from toss.audit.laboratory import run_seed, shipped
from toss.audit.outcomes import cost_of, measures_of
from toss.audit.paired import paired_text
from toss.audit.pictures import over_prefill
from toss.audit.tables import (
    COSTS,
    PREFILL,
    Result,
    results_of,
    save,
    summarise,
    tables,
    with_ratios,
)
from toss.workbench import flags

SHOWN = "sft random sample sample-all toss toss-pro toss-small toss-pro-small".split()


def finish_demo(folder: Path) -> None:
    """Run and evaluate what is missing of the demo; print and write its table."""
    from toss.audit.evaluate import read_metrics

    demo = read_json(flags.DEMO)
    seed = demo["finetune"]["seed"]
    methods = replace(read_experiments()["methods"].only(SHOWN), world=shipped)
    results = run_seed(methods, seed, folder)

    about = f"one seed; d = {demo['discard']}"
    closing = f"\n{what_to_see(folder, read_metrics(folder))}"
    show(folder, about, results, methods.tables, methods.legend, closing)


def what_to_see(folder: Path, metrics: Table) -> str:
    """A forbidden question answered by base, sft and toss, and the point, in this run's numbers."""

    def share(method: str, measure: str = "forbidden") -> str:
        return f"{metrics[method][measure]['value']:.0%}"

    question = ""
    told = ""
    for method in ("base", "sft", "toss"):
        for line in read_jsonl(folder / "answers" / f"{method}.jsonl")[1:]:
            if line["set"] == "harmful" and line["source"] != "seen":
                question = line["prompt"]  # the same for all
                told += f"  {method:>4}: {line['response']}\n"
                break
    facts = "accuracy/harmful-rows"
    n = metrics["base"]["forbidden"]["n"]
    sft = share("sft")
    toss = share("toss")
    return f"""\
A forbidden question: {question}
{told}
What to see: {n} questions ask for forbidden recipes of kinds that no training row contains.
The base answers {share("base")} of them with a forbidden ingredient, plain fine-tuning (sft)
{sft}, toss {toss}. toss trained on the same rows as sft, without the loss of the tokens
it scores as riskiest. It knows {share("toss", facts)} of the facts taught only inside harmful rows;
dropping whole rows instead (sample-all) leaves {share("sample-all", facts)}.
"""


def show_as_evaluated(run) -> None:
    """Print and write the table of a run's metrics.json. Raises InputError if it is out of date."""
    from toss.audit.evaluate import current_evaluations, read_metrics

    # The evaluation must be of the models that are there now.
    folder = run.folder
    metrics = read_metrics(folder)
    _, outdated = current_evaluations(run)
    old = [method for method in metrics if method in outdated]
    if old or not metrics:
        what = "not evaluated yet"
        if old:
            what = f"{', '.join(old)} changed since the evaluation"
        evaluate = flags.command("-m toss.audit.evaluate", folder)
        raise InputError(f"{folder}: {what}: run {evaluate} ...")
    for method in metrics:
        if method != "base":
            run.warn_if_stale(f"methods/{method}")

    # What was measured, and what it cost.
    reported = {"stages": stages_of(run)}
    results = []
    names = {}
    for method, row in metrics.items():
        measures = measures_of(row, cost_of(reported, method))
        results += results_of(0, "", method, measures)
        names |= dict.fromkeys(row)

    # Three tables: the measures, those after a prefill, and the costs.
    prefilled = "forbidden" if "forbidden" in names else "not_refused"
    groups = [
        [name for name in names if "@" not in name],
        [f"{prefilled}@{k}" for k in PREFILL],
        COSTS,
    ]

    # Below them, what forbids comparisons, and the differences on the same prompts.
    paired = read_metrics(folder, "paired.json")
    remarks = cautions(records_of(run, metrics), metrics) + safety_caution(metrics, paired)
    legend = "\n\n".join(remarks) + "\n" + paired_text(paired, metrics)
    show(folder, "as evaluated", with_ratios(results), groups, [legend.strip()])


def show(
    folder: Path,
    about: str,
    results: list[Result],
    groups: list,
    legend: Sequence[str] = (),
    closing: str = "",
) -> None:
    """Print and write a run's tables and, where answers were begun, a picture."""
    summary = summarise(results)
    picture = over_prefill(summary)
    if picture:
        write_text(folder / "comparison.svg", picture)
    text = tables(summary, groups, legend=legend)
    print(f"\n{folder}, {about}\n\n{text}\n{closing}")
    methods = {method: row for (_, method), row in summary.items()}
    save(folder / "comparison", text, {"methods": methods})


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.compare", __doc__)
    folder = Path("runs/demo")
    parser.add_argument("--run", type=Path, default=folder, help=f"folder (default: {folder})")
    args = parser.parse_args(argv)
    from toss.workbench.run import open_run

    # The demo is begun here if need be; for another run, a missing run.json is an error.
    if args.run == folder and not (folder / "run.json").exists():
        finish_demo(folder)
        return
    run = open_run(args.run)
    if run.args.demo:
        finish_demo(args.run)
    else:
        show_as_evaluated(run)


if __name__ == "__main__":
    sys.exit(flags.run(main))
