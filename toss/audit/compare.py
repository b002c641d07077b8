"""The table of some runs: what each method does, and what it costs.

    python -m toss.audit.compare runs/mine
    python -m toss.audit.compare runs/demo runs/demo-small --out runs/demo/comparison
    python -m toss.audit.compare runs/share/seed-*/run

Shows what `evaluate` found of the models of now. Runs whose folders have the same name are seeds of
one line: mean [least, most]; other names, as `demo-small` above, are a column. Below it, of the
first run: what may be concluded; and of a run alone the differences on the same prompts. What each
measure means: toss/audit/README.md. Writes PREFIX.md, PREFIX.csv (a line per seed, line and
measure) and, of the measures of --draw, PREFIX.svg.
"""

import sys
from pathlib import Path

from model.io import InputError
from toss.audit.evaluate import Evaluated, evaluated
from toss.audit.figures import picture_of
from toss.audit.measures import Cell, Table
from toss.audit.runs import demo_words, numbers_of, records_of, write_text
from toss.audit.tables import COSTS, csv_text, difference_tables, grid, markdown, over_seeds
from toss.audit.verdict import cautions, verdict
from toss.workbench import flags
from toss.workbench.run import Run, open_run

FIRST = """forbidden refusals_kept coherent complies over_refusal accuracy/* final_number/* nll
    precision recall auc""".split()


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
        for name, number in numbers_of(run, method).items():
            row[name] = Cell(number, 1)
        table[run.folder.resolve().name, method] = row
    return table


def with_ratios(table: Table) -> Table:
    """The same, and each cost also as a multiple of that of sft, of this run or of the first."""
    first = {}
    for (_, method), row in table.items():
        if method == "sft" and not first:
            first = row
    for (name, _), row in table.items():
        plain = table.get((name, "sft"), first)
        for cost in ("seconds", "tokens"):
            if cost in row and cost in plain:
                ratio = row[cost].value / max(plain[cost].value, 1e-9)
                row[f"{cost}_to_sft"] = Cell(ratio, 1)
    return table


def as_csv(seeds: dict[Path, Table]) -> str:
    """A line per number, with a head."""
    lines = []
    for folder, table in seeds.items():
        for line, row in table.items():
            for measure, cell in row.items():
                lines.append((folder.name, *line, measure, *cell))
    return csv_text(("seed", "run", "method", "measure", *Cell._fields), lines)


def conclusions(run: Run, found: Evaluated) -> str:
    """The verdict of a run, if there is one, and what forbids comparisons."""
    lines = cautions(records_of(run, found.table), found)
    said = verdict(found, bool(demo_words(run)))
    if said:
        lines += said[0]
    return "\n".join(lines)


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

    # A table per seed: of the runs that are in one folder.
    seeds = {}
    texts = []
    for folder in args.runs:
        run = open_run(folder)
        found = evaluated(run)
        seeds.setdefault(run.folder.resolve().parent, {}).update(table_of(run, found))
        if folder == args.runs[0]:
            texts.append(conclusions(run, found))
            if len(args.runs) == 1:
                texts.append("On the same prompts; * = the 95 % interval excludes 0")
                texts += [markdown(*table) for table in difference_tables(found.paired)]
    table = over_seeds(with_ratios(numbers) for numbers in seeds.values())

    several = len({name for name, _ in table}) > 1
    tables = []
    for columns in (args.columns, ["forbidden@*"], ["not_refused@*"], COSTS):
        header, lines = grid(table, columns, ["run", ""] if several else [""])
        if lines:
            tables.append(markdown(header, lines))
    text = "\n\n".join([*tables, *texts]).strip()
    print(f"\n{', '.join(map(str, args.runs))}: seeds: {len(seeds)}\n\n{text}\n")
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
