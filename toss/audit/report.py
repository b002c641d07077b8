"""What was dropped? The reader's view of a run: RUN/report.html, which opens from disk and fetches
nothing.

    python -m toss.audit.report --run R

Shows what the run's files hold: a verdict, the measures with their intervals, what was discarded,
rows token by token with scores and masks, the distribution of S, and the diagnosis. A part whose
input is missing, or is of a model that was replaced since, is one line that says what would make
it. No weights are read.
"""

import csv
import re
import sys
from itertools import groupby
from pathlib import Path

import torch

from model.io import InputError, read_text
from toss.audit.characters import visible
from toss.audit.diagnose import COLUMNS
from toss.audit.evaluate import Evaluated, evaluated
from toss.audit.figures import TEMPLATES, histogram, line_chart
from toss.audit.runs import (
    demo_words,
    meaning,
    records_of,
    sources_of,
    write_text,
)
from toss.audit.tables import HEADS, difference_tables, measures_met
from toss.audit.tokens import Mask, count_by_row, discard_tables, load_masks
from toss.audit.verdict import cautions, verdict
from toss.workbench import flags
from toss.workbench.records import read_record
from toss.workbench.run import Run, open_run

TEMPLATES.filters["visible"] = visible
ROWS = 24  # shown token by token
LONGEST = 150  # response tokens shown of a row


def page(run: Run) -> tuple[str, list[str], int]:
    """The page, the lines about what it lacks, and how many rows it shows."""
    found = evaluated(run)
    tokens, shown, lacking = parts_of_tokens(run)
    # Each is what the template shows, or a line that says why it is missing.
    parts = {"measures": measures(run, found), "diagnosis": diagnosis(run)}
    lacking += [part for part in parts.values() if isinstance(part, str)]
    text = TEMPLATES.get_template("report.html.jinja").render(
        parts,
        run=run,
        is_demo=demo_words(run),
        show=flags.command("-m toss.audit.show", run.folder),
        tokens=tokens,
        shown=shown,
        lacking=lacking,
    )
    return text, lacking, len(shown["rows"]) if shown else 0


def run_line(program: str, run: Run) -> str:
    return f"run {flags.command(program, run.folder)}"


# What the files say of the models


def measures(run: Run, found: Evaluated) -> dict | str:
    """The measures, by method; the verdict, the differences, and the methods in words."""
    evaluate = run_line("-m toss.audit.evaluate", run)
    if not found.table:
        return f"No measures: {evaluate} first."
    records = records_of(run, found.table)
    names = measures_met(found.table)
    # Of one source, or after the first tokens of a harmful answer: these are folded away.
    parts = [name for name in names if re.split("[/@]", name)[0] in set(names) - {name}]
    return {
        "table": found.table,
        "names": [name for name in names if name not in parts],
        "parts": parts,
        "said": verdict(found) or [f"No verdict: {evaluate} with base, sft and toss."],
        "differences": difference_tables(found.paired),
        "meanings": {method: meaning(record) for method, record in records.items()},
        "cautions": cautions(records, found),
        "heads": HEADS,
    }


def diagnosis(run: Run) -> list[str] | str:
    """KL by response position: a chart per measure and group of rows, with a line per model."""
    path = run.folder / "diagnosis" / "kl.csv"
    if not path.exists() or run.changed_inputs(read_record(path.parent)):
        again = run_line("-m toss.audit.diagnose", run)
        return f"No diagnosis of the models of now: {again} first."
    charts = {}  # title -> model -> points
    lines = list(csv.DictReader(read_text(path).splitlines()))
    for column in COLUMNS:
        for line in lines:
            curves = charts.setdefault(f"{column}: {line['rows']}", {})
            points = curves.setdefault(line["model"], [])
            points.append((int(line["position"]), float(line[column])))
    return [line_chart(charts[title], title, "response position j", "nats") for title in charts]


# What the masks say of the tokens


def parts_of_tokens(run: Run) -> tuple:
    """The scored tokens, what the page shows of their masks, and lines about what is missing.

    The first two are None without.
    """
    try:
        tokens, losses = run.losses()
    except InputError as error:
        return None, None, [str(error)]
    masks, lacking = load_masks(run, tokens, losses)
    if not masks:
        line = f"No mask to show: {run_line('select.py', run)} first."
        return tokens, None, [*lacking, line]
    return tokens, token_part(run, masks), lacking


def token_part(run: Run, masks: list[Mask]) -> dict:
    """What the page shows of the masks; its rows are those of which the first one took most."""
    first = masks[0]
    tokens = first.tokens
    sources = sources_of(run)
    lost = count_by_row(tokens, first.discarded) / count_by_row(tokens, tokens.response)
    chosen = lost.nan_to_num(-1).argsort(descending=True, stable=True)  # a skipped row has none
    rows = []
    for row in chosen[: min(ROWS, len(tokens.filled))].tolist():
        views = list(zip(*(mask.row(row) for mask in masks)))  # a token under every mask
        turns = [list(turn) for _, turn in groupby(views, key=lambda view: view[0].response)]
        rows.append({"row": row, "source": sources[row] if sources else "", "turns": turns})
    return {
        "rows": rows,
        "masks": masks,
        "limit": float(first.S.abs().max()) / 2,  # |S| from which colours are full
        "most": LONGEST,
        "charts": [spread(mask) for mask in masks if mask is first or mask.name == "toss-pro"],
        "discards": discard_tables(masks, sources),
    }


def spread(mask: Mask) -> str:
    """The distribution of S, harmful tokens against others where the rows say which are, as SVG."""
    response = mask.tokens.response
    harmful = mask.tokens.harmful
    groups = {"response tokens": mask.S[response]}
    if harmful.any():
        groups = {
            "other response tokens": mask.S[response & ~harmful],
            "harmful by ground truth": mask.S[harmful],
        }
    ranked = mask.order > 0
    by_S = torch.equal(mask.score[ranked], mask.S[ranked])
    title = f"S of the response tokens, as scored for {mask.name}"
    return histogram(groups, title, "S = L^u - L^h, nats", mask.threshold if by_S else None)


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.report", __doc__)
    parser.add_argument("--run", required=True, help="folder of the run")
    args = parser.parse_args(argv)
    text, lacking, count = page(open_run(args.run))
    out = Path(args.run) / "report.html"
    write_text(out, text)
    for line in lacking:
        print(f"left out: {line}")
    print(f"written: {out}, {count} rows token by token")
    print(f"next: open {out.absolute().as_uri()} in a browser")


if __name__ == "__main__":
    sys.exit(flags.run(main))
