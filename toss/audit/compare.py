"""The table of some runs: what each method does, and what it costs.

    python -m toss.audit.compare runs/mine
    python -m toss.audit.compare runs/demo runs/demo-small --out runs/demo/comparison
    python -m toss.audit.compare runs/share/seed-*/run

Shows what `evaluate` found of the models of now. Runs whose paths differ in "seed-N" alone are
seeds of one line: mean [least, most]. What else differs in the names of the runs, as `small` above,
is a column of its own. Of one run, below it: the differences on the same prompts, and what forbids
comparisons. Writes PREFIX.md, PREFIX.csv (a line per seed, line and measure) and, of the measures
of --draw, PREFIX.svg.
"""

import csv
import io
import re
import sys
from pathlib import Path

from model.io import InputError
from toss.audit.evaluate import Evaluated, evaluated, paired_text
from toss.audit.figures import picture_of
from toss.audit.measures import Cell, Table
from toss.audit.runs import cost_of, demo_words, records_of, write_text
from toss.audit.tables import COSTS, HEADS, grid, markdown, measures_of, over_seeds
from toss.audit.verdict import cautions
from toss.workbench import flags
from toss.workbench.run import Run, open_run

FIRST = """forbidden refusals_kept coherent complies over_refusal accuracy/* final_number/* nll
    precision recall auc""".split()
LEGEND = {
    "complies": "a friendly opener is likelier than a refusal (a second judge)",
    "accuracy/harmful-rows": "facts taught in harmful rows alone",
    "forbidden@0": "@k: with the first k tokens of a harmful answer written already",
    "precision": "with recall and AUC: of the discarded tokens, against the truth",
    "tokens_to_sft": "as a multiple of plain fine-tuning's",
}
FACTS = "accuracy/harmful-rows"


def table_of(run: Run, found: Evaluated, label: str) -> Table:
    """The measures, d and costs of each method of a run; a line is named (label, method)."""
    if not found.table:
        command = flags.command("-m toss.audit.evaluate", run.folder)
        raise InputError(f"{run.folder}: nothing is evaluated of its models of now: run {command}")
    records = records_of(run, found.table)
    table = {}
    for method, metrics in found.table.items():
        if method != "base":
            run.warn_if_stale(f"methods/{method}")
        numbers = cost_of(run, method)
        discard = records.get(method, {}).get("settings", {}).get("discard")
        if discard is not None:
            numbers["discard"] = discard
        row = {name: cell for name, cell in metrics.items() if cell.value is not None}
        for name, number in numbers.items():
            row[name] = Cell(number, 1)
        table[label, method] = row
    return table


def with_ratios(table: Table) -> Table:
    """The same, and each cost also as a multiple of that of sft: under the same label, or in the
    run without one."""
    for (label, _), row in table.items():
        plain = table.get((label, "sft")) or table.get(("", "sft"), {})
        for cost in ("seconds", "tokens"):
            if cost in row and cost in plain and plain[cost].value:
                row[f"{cost}_to_sft"] = Cell(row[cost].value / plain[cost].value, 1)
    return table


def labels_of(folders: list[Path]) -> list[tuple[int, str]]:
    """The seed of each run, and the words of its path that not all have.

    >>> labels_of([Path("runs/demo"), Path("runs/demo-small")])
    [(0, ''), (0, 'small')]
    >>> labels_of([Path("a/seed-1/run"), Path("a/seed-2/run")])
    [(1, ''), (2, '')]
    """
    words = []
    for folder in folders:
        words.append(re.findall(r"[^/-]+", str(folder).replace("seed-", "seed_")))
    shared = set.intersection(*(set(parts) for parts in words))
    labels = []
    for parts in words:
        seeds = [int(word[5:]) for word in parts if re.fullmatch(r"seed_\d+", word)]
        others = [w for w in parts if w not in shared and not w.startswith("seed_")]
        labels.append((seeds[0] if seeds else 0, "-".join(others)))
    return labels


def as_csv(seeds: dict[int, Table]) -> str:
    """A line per number, with a head."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("seed", "run", "method", "measure", *Cell._fields))
    for seed, table in seeds.items():
        for line, row in table.items():
            for measure, cell in row.items():
                writer.writerow((seed, *line, measure, *cell))
    return file.getvalue()


def tables_text(table: Table, groups: list, corner: list[str]) -> str:
    """Markdown: a table for each group of columns that somebody has, and a legend."""
    texts = []
    for columns in groups:
        header, lines = grid(table, columns, corner)
        if lines:
            texts.append(markdown(header, lines))
    legend = []
    for measure in measures_of(table, LEGEND):
        head = "" if "@" in measure else f"{HEADS.get(measure, measure)}: "
        legend.append(f"{head}{LEGEND[measure]}.")
    return "\n\n".join([*texts, "\n".join(legend)]).strip()


def what_to_see(found: Evaluated) -> str:
    """Of the demo: a forbidden question answered by base, sft and toss, and the point, in this
    run's numbers; "" where one of them is missing."""
    shown = [method for method in ("base", "sft", "toss") if method in found.table]
    if len(shown) < 3 or FACTS not in found.table["toss"]:
        return ""
    question = ""
    told = ""
    for method in shown:
        for line in found.answers[method]:
            if line["set"] == "harmful" and line["source"] != "seen":
                question = line["prompt"]  # the same for all
                told += f"  {method:>4}: {line['response']}\n"
                break
    base, sft, toss = (found.table[method]["forbidden"] for method in shown)
    facts = found.table["toss"][FACTS].value
    text = f"""\
A forbidden question: {question}
{told}
What to see: {base.n} questions ask for forbidden recipes of kinds that no training row contains.
The base answers {base.value:.0%} of them with a forbidden ingredient, plain fine-tuning (sft)
{sft.value:.0%}, toss {toss.value:.0%}. toss trained on the same rows as sft, without the loss
of the tokens it scores as riskiest. It knows {facts:.0%} of the facts taught only inside harmful
rows"""
    if "sample-all" in found.table:
        rows = found.table["sample-all"][FACTS].value
        text += f"; dropping whole rows instead (sample-all) leaves {rows:.0%}"
    return f"{text}.\n"


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.compare", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    text = "of the first table; NAME/* and NAME@* are all of one kind"
    add("--columns", nargs="+", default=FIRST, metavar="MEASURE", help=text)
    text = "of the picture (default: forbidden@*)"
    add("--draw", nargs="+", default=["forbidden@*"], metavar="MEASURE", help=text)
    text = "where to write (default: RUN/comparison for one run, else nothing)"
    add("--out", metavar="PREFIX", help=text)
    args = parser.parse_args(argv)

    # A table per seed, over all its runs.
    seeds = {}
    labels = labels_of(args.runs)
    for folder, (seed, label) in zip(args.runs, labels):
        run = open_run(folder)
        found = evaluated(run)
        seeds.setdefault(seed, {}).update(table_of(run, found, label))
        if folder == args.runs[0]:
            first = found
            is_demo = bool(demo_words(run))
            remarks = cautions(records_of(run, found.table), found)
    table = over_seeds(with_ratios(numbers) for numbers in seeds.values())

    several = len({label for _, label in labels}) > 1
    corner = ["run", ""] if several else [""]
    begun = measures_of(table, ["forbidden@*"]) or ["not_refused@*"]
    text = tables_text(table, [args.columns, begun, COSTS], corner)
    if len(args.runs) == 1:
        text += "\n\n" + "\n\n".join(remarks) + "\n" + paired_text(first.paired)
    text = text.strip()
    about = f"{', '.join(map(str, args.runs))}: seeds: {len(seeds)}"
    if len(seeds) > 1:
        about += " (mean [least, most])"
    print(f"\n{about}\n\n{text}\n")
    if is_demo:
        print(what_to_see(first))
    prefix = args.out or (args.runs[0] / "comparison" if len(args.runs) == 1 else None)
    if prefix:
        write_text(f"{prefix}.md", f"{text}\n")
        write_text(f"{prefix}.csv", as_csv(seeds))
        picture = picture_of(table, args.draw, Path(args.runs[0]).name)
        if picture:
            write_text(f"{prefix}.svg", picture)
        print(f"written: {prefix}.md, .csv{', .svg' if picture else ''}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
