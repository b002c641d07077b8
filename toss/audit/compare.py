"""The table of some runs: what each method does, and what it costs.

    python -m toss.audit.compare runs/mine
    python -m toss.audit.compare runs/demo runs/demo-small --out runs/demo/comparison
    python -m toss.audit.compare runs/share/seed-*/run

Shows what `evaluate` found of the models of now. Runs whose folders have the same name are seeds of
one line: mean [least, most]; other names, as `demo-small` above, are a column. Below it, of the
first run: what may be concluded, and the differences on the same prompts. What each measure means:
toss/audit/README.md. Writes PREFIX.md; PREFIX.csv, a line per seed, method and measure; and where
answers were begun (forbidden@k), PREFIX.svg.
"""

import csv
import io
import sys
from pathlib import Path

from model.io import InputError
from toss.audit.evaluate import Evaluated, evaluated
from toss.audit.figures import line_chart
from toss.audit.measures import Cell, Table
from toss.audit.runs import cost_of, record_of, records_of, write_text
from toss.audit.tables import COSTS, difference_tables, grid, markdown, over_seeds
from toss.audit.verdict import cautions, verdict
from toss.workbench import flags
from toss.workbench.run import Run, open_run

FIRST = """forbidden refusals_kept coherent over_refusal accuracy* final_number* nll precision
    recall auc""".split()


def table_of(run: Run, found: Evaluated) -> Table:
    """The measures, d and costs of each method of a run; a line is named (run, method)."""
    if not found.table:
        command = flags.command("-m toss.audit.evaluate", run.folder)
        raise InputError(f"{run.folder}: nothing is evaluated of its models of now: run {command}")
    table = {}
    for method, metrics in found.table.items():
        if method != "base":
            run.check(f"methods/{method}/model", only=())  # warns where it is stale
        row = {name: cell for name, cell in metrics.items() if cell.value is not None}
        for name, number in cost_of(run, method).items():
            row[name] = Cell(number, 1)
        settings = record_of(run, method).get("settings", {})
        if "discard" in settings:
            row["discard"] = Cell(settings["discard"], 1)
        table[run.folder.resolve().name, method] = row
    return table


def with_ratios(table: Table) -> Table:
    """The same, and each cost also as a multiple of that of sft, of this run or of the first."""
    plain = {run: row for (run, method), row in table.items() if method == "sft"}
    first = next(iter(plain.values()), {})
    for (run, _), row in table.items():
        sft = plain.get(run, first)
        for cost in ("seconds", "tokens"):
            if cost in row and cost in sft:
                ratio = row[cost].value / max(sft[cost].value, 1e-9)
                row[f"{cost}_to_sft"] = Cell(ratio, 1)
    return table


def conclusions(run: Run, found: Evaluated) -> list[str]:
    """What forbids comparisons, the verdict of a run, and the differences of its methods."""
    lines = cautions(records_of(run, found.table), found)
    lines += verdict(found)
    texts = ["\n".join(lines)]
    for header, cells in difference_tables(found.paired):
        texts.append(markdown(header, cells))
    return texts


def as_csv(seeds: dict[Path, Table]) -> str:
    """A line per number, with a head."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["seed", "run", "method", "measure", *Cell._fields])
    for folder, table in seeds.items():
        for line, row in table.items():
            for measure, cell in row.items():
                lines.writerow([folder.name, *line, measure, *cell])
    return text.getvalue()


def picture_of(table: Table) -> str:
    """forbidden@k over k, a line per method, as SVG; "" without."""
    lines = {}
    for (run, method), row in table.items():
        for measure, cell in row.items():
            name, _, begun = measure.partition("@")
            if name == "forbidden" and begun.isdigit():
                lines.setdefault(f"{run}, {method}", []).append((int(begun), cell.value))
    if not lines:
        return ""
    return line_chart(lines, "forbidden", "tokens of a harmful answer it begins with", "share")


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.compare", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    text = "of the first table; NAME* are all of one kind"
    add("--columns", nargs="+", default=FIRST, metavar="MEASURE", help=text)
    text = "where to write (default: comparison in the first run's folder)"
    add("--out", metavar="PREFIX", help=text)
    args = parser.parse_args(argv)

    # A table per seed: of the runs that are in one folder.
    seeds = {}
    texts = []
    for folder in args.runs:
        run = open_run(folder)
        found = evaluated(run)
        seed = seeds.setdefault(run.folder.resolve().parent, {})
        seed.update(table_of(run, found))
        if folder == args.runs[0]:
            texts = [f"{folder}, on the same prompts (* = the 95 % interval excludes 0):"]
            texts += conclusions(run, found)
    table = over_seeds(with_ratios(numbers) for numbers in seeds.values())

    names = {name for name, _ in table}
    corner = ["run", ""] if len(names) > 1 else [""]
    tables = []
    for columns in (args.columns, ["forbidden@*"], ["not_refused@*"], COSTS):
        header, lines = grid(table, columns, corner)
        if lines:
            tables.append(markdown(header, lines))
    text = "\n\n".join([*tables, *texts])
    print(f"\nruns: {len(args.runs)}, seeds: {len(seeds)}\n\n{text}\n")
    prefix = args.out or args.runs[0] / "comparison"
    write_text(f"{prefix}.md", f"{text}\n")
    write_text(f"{prefix}.csv", as_csv(seeds))
    picture = picture_of(table)
    if picture:
        write_text(f"{prefix}.svg", picture)
    print(f"written: {prefix}.md, .csv{', .svg' if picture else ''}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
