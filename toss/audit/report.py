"""What was dropped? The reader's view of a run: RUN/report.html, which opens from disk and fetches
nothing.

    python -m toss.audit.report --run R [--out FILE]

Shows what the run's files hold: a verdict, the measures with their intervals, answers side by side
(demo only), what was discarded, rows token by token with scores and masks, the distribution of S,
the diagnosis, settings and hashes. A part whose input is missing, or is of a
model that was replaced since, is one line that says what would make it. No weights are read.
"""

import csv
import sys
from itertools import groupby
from pathlib import Path

import torch
from jinja2 import UndefinedError

from data.refusals import refused
from model.io import InputError, as_input_error, read_text
from toss.audit.characters import visible
from toss.audit.diagnose import COLUMNS
from toss.audit.discards import discard_tables
from toss.audit.evaluate import Evaluated, evaluated
from toss.audit.figures import TEMPLATES, histogram, line_chart
from toss.audit.runs import (
    KNOWN,
    costs_of,
    demo_words,
    meaning,
    records_of,
    results_of,
    sources_of,
    write_text,
)
from toss.audit.tables import HEADS, difference_tables, is_part
from toss.audit.tokens import Mask, count_by_row, load_masks
from toss.audit.verdict import cautions, verdict
from toss.rows import evenly
from toss.workbench import flags
from toss.workbench.records import read_record
from toss.workbench.run import Run, open_run

TEMPLATES.filters["visible"] = visible
TEMPLATES.tests["refusal"] = refused
ROWS = 24  # shown token by token
UNEXPECTED = (UndefinedError, TypeError)
ROOM, TOKEN, MASKED = 1_500_000, 160, 45  # bytes: of all tokens; of one; and of each mask over it


def page(run: Run) -> tuple[str, list[str], int]:
    """The page, the lines about what it lacks, and how many rows it shows."""
    found = evaluated(run)
    lacking = []
    if found.left_out:
        again = run_line("-m toss.audit.evaluate", run)
        names = ", ".join(sorted(found.left_out))
        lacking.append(f"What was evaluated of {names} is left out, see evaluate: {again} again.")

    # The parts: each is what the template shows, or a line that says why it is missing.
    tokens, shown, lines = parts_of_tokens(run)
    lacking += lines
    parts = {
        "measures": measures(run, found),
        "answers": side_by_side(run, found),
        "diagnosis": diagnosis(run),
    }

    # Anybody may have edited the files behind the parts: the template may meet other types.
    template = TEMPLATES.get_template("report.html.jinja")
    with as_input_error(f"{run.folder}: a file is not as the audit writes it", *UNEXPECTED):
        text = template.render(
            parts,
            run=run,
            show=flags.command("-m toss.audit.show", run.folder),
            results=results_of(run),
            costs=costs_of(run),
            tokens=tokens,
            shown=shown,
            lacking=lacking,
        )
    absent = [part for part in parts.values() if isinstance(part, str)]
    return text, lacking + absent, len(shown["rows"]) if shown else 0


def run_line(program: str, run: Run, **values) -> str:
    return f"run {flags.command(program, run.folder, **values)}"


# What the files say of the models


def measures(run: Run, found: Evaluated) -> dict | str:
    """The measures, by method; the verdict, the differences, and the methods in words."""
    evaluate = run_line("-m toss.audit.evaluate", run)
    if not found.table:
        return f"No measures: {evaluate} first."
    names = list(dict.fromkeys(name for row in found.table.values() for name in row))
    records = records_of(run, found.table)
    no_verdict = ([f"No verdict: {evaluate} with base, sft and toss."], [])
    return {
        "table": found.table,
        "names": [name for name in names if not is_part(name, names)],
        "parts": [name for name in names if is_part(name, names)],
        "verdict": verdict(found, bool(demo_words(run))) or no_verdict,
        "differences": difference_tables(found.paired),
        "meanings": {method: meaning(method, records.get(method, {})) for method in found.table},
        "cautions": cautions(records, found),
        "heads": HEADS,
    }


def side_by_side(run: Run, found: Evaluated) -> dict | str:
    """A few prompts of the demo, with the answers of the best-known models."""
    words = demo_words(run)
    if not words:
        folder = run.folder / "answers"
        return f"Answers of real models, some made unsafe on purpose, stay in {folder}."
    texts = {}  # (set, source, prompt) -> method -> response
    for method in KNOWN:
        for line in found.answers.get(method, []):
            key = (line["set"], line["source"], line["prompt"])
            texts.setdefault(key, {})[method] = line["response"]

    # Three forbidden prompts of kinds that no training row holds, a benign one, two questions.
    chosen = []
    for kind, count in {"harmful": 3, "benign": 1, "utility": 2}.items():
        of_kind = [key for key in texts if key[0] == kind and key[1] != "seen"]
        chosen += evenly(of_kind, count)
    if not chosen:
        return f"No answers: {run_line('-m toss.audit.evaluate', run)} first."
    return {"texts": {key: texts[key] for key in chosen}, "n": len(texts), "words": words}


def diagnosis(run: Run) -> list[str] | str:
    """KL by response position: a chart per measure and group of rows, with a line per model."""
    path = run.folder / "diagnosis" / "kl.csv"
    if not path.exists() or run.changed_inputs(read_record(path.parent)):
        again = run_line("-m toss.audit.diagnose", run)
        return f"No diagnosis of the models of now: {again} first."
    charts = {}  # (measure, rows) -> model -> points
    with as_input_error(f"{path}: not as toss.audit.diagnose writes it"):
        lines = list(csv.DictReader(read_text(path).splitlines()))
        for column in COLUMNS:
            for line in lines:
                curves = charts.setdefault((column, line["rows"]), {})
                points = curves.setdefault(line["model"], [])
                points.append((int(line["position"]), float(line[column])))
    drawn = []
    for (column, rows), curves in charts.items():
        drawn.append(line_chart(curves, f"{column}: {rows}", "response position j", "nats"))
    return drawn


# What the masks say of the tokens


def parts_of_tokens(run: Run) -> tuple:
    """The scored tokens, what the page shows of their masks, and lines about what is missing.

    The first two are None without.
    """
    try:
        tokens, losses = run.losses()
        masks, lacking = load_masks(run, tokens, losses)
        if masks:
            return tokens, token_part(run, masks), lacking
    except InputError as error:
        return None, None, [str(error)]
    line = f"No mask to show: {run_line('select.py', run)} first."
    return tokens, None, [*lacking, line]


def token_part(run: Run, masks: list[Mask]) -> dict:
    """What the page shows of the masks; its rows are chosen by what the first one did."""
    first = masks[0]
    sources = sources_of(run)
    groups = chosen_rows(first)
    rows = []
    for why, members in groups.items():
        for row in members:
            # A view is a token under every mask.
            views = list(zip(*(mask.row(row) for mask in masks)))
            turns = [list(turn) for _, turn in groupby(views, key=lambda view: view[0].response)]
            source = sources[row] if sources else ""
            rows.append({"row": row, "why": why, "source": source, "turns": turns})
    by_S = [mask for mask in masks if mask.method in ("toss", "toss-pro")]
    return {
        "groups": groups,
        "rows": rows,
        "masks": masks,
        "limit": first.full_colour,
        "most": ROOM // (TOKEN + MASKED * len(masks)) // ROWS,  # response tokens shown per row
        "charts": [spread(mask) for mask in by_S or masks[:1]],
        "discards": discard_tables(masks, sources),
    }


def chosen_rows(mask: Mask) -> dict[str, list[int]]:
    """The rows to show, by why: at most ROWS / 4 of each kind, the best first, each row where it
    is met first."""
    tokens = mask.tokens
    size = count_by_row(tokens, tokens.response)
    harm = count_by_row(tokens, tokens.harmful)
    lost = count_by_row(tokens, mask.discarded)
    missed = harm - count_by_row(tokens, mask.discarded & tokens.harmful)
    mean_S = count_by_row(tokens, tokens.response, mask.S.double()) / size
    is_harmless = (harm == 0) & tokens.harmful.any()  # without ground truth none is known to be
    kinds = {
        "harmless, yet discarded": ((lost > 0) & is_harmless, lost / size),
        "harmful, yet kept": (missed > 0, missed / harm),
        f"the largest share discarded by {mask.label}": (lost > 0, lost / size),
        "nothing discarded, the highest mean S": ((lost == 0) & (size > 0), mean_S),
    }
    chosen = {}
    taken = set()
    for why, (wanted, key) in kinds.items():
        rows = wanted.nonzero()[:, 0]
        order = key[rows].argsort(descending=True, stable=True)
        fresh = [row for row in rows[order].tolist() if row not in taken][: ROWS // 4]
        taken.update(fresh)
        if fresh:
            chosen[why] = fresh
    return chosen


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
    title = f"S of the response tokens, as scored for {mask.label}"
    threshold = mask.threshold if by_S else None
    return histogram(groups, title, "S = L^u - L^h, nats", threshold)


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.report", __doc__)
    parser.add_argument("--run", required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    args = parser.parse_args(argv)
    text, lacking, count = page(open_run(args.run))
    out = args.out or Path(args.run) / "report.html"
    write_text(out, text)
    for line in lacking:
        print(f"left out: {line}")
    print(f"written: {out}, {out.stat().st_size / 1000:.0f} kB, {count} rows token by token")
    print(f"next: open {out.absolute().as_uri()} in a browser")


if __name__ == "__main__":
    sys.exit(flags.run(main))
