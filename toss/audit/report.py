"""What was dropped? The reader's view of a run: RUN/report.html, which opens from disk and fetches
nothing.

    python -m toss.audit.report --run R [--out FILE]

Shows what the run's files hold: a verdict, the measures with their intervals, answers side by side
(demo only), what was discarded, rows token by token with scores and masks, the distribution of S,
the diagnosis, TOSS-Pro's rounds, settings and hashes. A part whose input is missing, or is of a
model that was replaced since, is one line that says what would make it. No weights are read.
"""

import csv
import sys
from pathlib import Path

from jinja2 import UndefinedError

from data.refusals import refused
from model.io import InputError, as_input_error, read_json, read_text
from toss.audit.characters import visible
from toss.audit.command import (
    cautions,
    is_part,
    measured,
    methods_of,
    read_jsonl,
    records_of,
    stages_of,
    write_text,
)
from toss.audit.evaluate import SETS, current_evaluations, read_metrics
from toss.audit.figures import TEMPLATES, line_chart
from toss.audit.paired import paired_tables
from toss.audit.verdict import HEADS, MANY, ORDER, meaning, place, verdict
from toss.rows import evenly
from toss.workbench import flags

TEMPLATES.filters["visible"] = visible
TEMPLATES.tests["refusal"] = refused
CHARTS = {  # column of kl.csv -> title
    "kl_base": "KL(base || tuned)",
    "toward_degraded": "KL(base || degraded) - KL(tuned || degraded)",
    "toward_utility": "KL(base || utility) - KL(tuned || utility)",
}


def page(run) -> tuple[str, list[str], int]:
    """The page, the lines about what it lacks, and how many rows it shows."""
    # What was found for a model that the run does not hold any more is left out, with a line.
    current, replaced = current_evaluations(run)
    methods = methods_of(run)
    moved = [key.removeprefix("methods/") for key in run.stale("diagnosis")]
    lacking = [left_out(run, "evaluate", name) for name in replaced]
    lacking += [left_out(run, "diagnose", name) for name in moved if name in methods]

    # The parts: each is what the template shows, or a line that says why it is missing.
    tokens, shown, lines = parts_of_tokens(run)
    lacking += lines
    parts = {
        "measures": measures(run, replaced),
        "answers": side_by_side(run, current),
        "diagnosis": diagnosis(run, moved),
        "rounds": rounds(run),
    }

    # Anybody may have edited the files behind the parts: the template may meet other types.
    template = TEMPLATES.get_template("report.html.jinja")
    message = f"{run.folder}: a file is not as the audit writes it"
    with as_input_error(message, UndefinedError, TypeError):
        text = template.render(
            parts,
            run=run,
            show=flags.command("-m toss.audit.show", run.folder),
            stages=stages_of(run),
            tokens=tokens,
            shown=shown,
            lacking=lacking,
        )
    absent = [part for part in parts.values() if isinstance(part, str)]
    return text, lacking + absent, len(shown["rows"]) if shown else 0


def left_out(run, command: str, name: str) -> str:
    again = f"Run {flags.command(f'-m toss.audit.{command}', run.folder)} again."
    found = f"What toss.audit.{command} found for {name} is left out"
    return f"{found}: it was changed, or the run holds another model now. {again}"


def parts_of_tokens(run) -> tuple:
    """The scored tokens, what the page shows of their masks, and lines about what is missing.

    The first two are None without.
    """
    from toss.audit.examples import token_part
    from toss.audit.tokens import load_masks

    try:
        tokens, losses = run.scored()
        masks, lacking = load_masks(run, tokens, losses)
        if masks:
            return tokens, token_part(run, masks), lacking
    except InputError as error:
        return None, None, [str(error)]
    line = f"No mask to show: run {flags.command('select.py', run.folder)} first."
    return tokens, None, [*lacking, line]


# Each further part of the page is what the template shows, or a line (str) that says why it is
# missing. replaced: the methods whose model is another one than what was evaluated or diagnosed.


def measures(run, replaced: list[str]) -> dict | str:
    """metrics.json, without the replaced; which measures to show, in order; and the verdict."""
    evaluate = f"run {flags.command('-m toss.audit.evaluate', run.folder)}"
    metrics = measured(read_metrics(run.folder))
    table = {name: metrics[name] for name in sorted(metrics, key=place) if name not in replaced}
    if not table:
        return f"No measures: {evaluate} first."
    demo = run.args.demo
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    parts = [name for name in names if is_part(name, names)]
    folded = [method for method in table if method not in ORDER] if len(table) > MANY else []
    paired = read_metrics(run.folder, "paired.json")
    for cells in paired.values():  # a difference to a replaced model is none to the present one
        for others in cells.values():
            for name in replaced:
                others.pop(name, None)
    records = records_of(run, table)
    no_verdict = ([f"No verdict: {evaluate} with base, sft and toss."], [])
    return {
        "table": table,
        "names": [name for name in names if name not in parts],
        "parts": parts,
        "folded": folded,
        "verdict": verdict(table, paired, demo) or no_verdict,
        "differences": paired_tables(paired, [name for name in table if name not in folded]),
        "meanings": {method: meaning(method, records.get(method, {})) for method in table},
        "cautions": cautions(records, table),
        "heads": HEADS,
    }


def side_by_side(run, current: dict[str, dict]) -> dict | str:
    """A few prompts of the demo, with the answers of the best-known models (ORDER)."""
    if not run.args.demo:
        folder = run.folder / "answers"
        return f"Answers of real models, some made unsafe on purpose, stay in {folder}."
    answers = {}  # by method, and by set, source and prompt
    for method in ORDER:
        if method in current:
            replies = answers[method] = {}
            for line in current[method]["lines"]:
                replies[line["set"], line["source"], line["prompt"]] = line["response"]
    asked = [key for key in next(iter(answers.values()), ()) if key[0] in SETS]
    if not asked:
        return f"No answers: run {flags.command('-m toss.audit.evaluate', run.folder)} first."

    # Three forbidden prompts of kinds that no training row holds, a benign one, a fact per source.
    held_out = [key for key in asked if key[0] == "harmful" and key[1] != "seen"]
    benign = [key for key in asked if key[0] == "benign"]
    facts = {}  # by source
    for key in asked:
        if key[0] == "utility":
            facts.setdefault(key[1], key)
    texts = {}
    for key in [*evenly(held_out, 3), *benign[:1], *facts.values()]:
        texts[key] = {method: replies.get(key) for method, replies in answers.items()}
    return {"texts": texts, "n": len(asked), "words": read_json(flags.DEMO)["forbidden_words"]}


def diagnosis(run, replaced: list[str]) -> list[list[str]] | str:
    """KL by response position: for each measure one chart per kind of rows, one line per model."""
    path = run.folder / "diagnosis" / "kl.csv"
    if not path.exists() or not set(replaced) <= set(methods_of(run)):
        diagnose = flags.command("-m toss.audit.diagnose", run.folder)
        return f"No diagnosis with the references of now: run {diagnose} first."
    charts = []
    with as_input_error(f"{path}: not as toss.audit.diagnose writes it"):
        lines = list(csv.DictReader(read_text(path).splitlines()))
        lines.sort(key=lambda line: place(line["model"]))
        for column, title in CHARTS.items():
            groups = {}  # rows -> model -> points
            for line in lines:
                if line["model"] not in replaced:
                    curves = groups.setdefault(line["rows"], {})
                    point = (int(line["position"]), float(line[column]))
                    curves.setdefault(line["model"], []).append(point)
            of_groups = []
            for rows, curves in groups.items():
                title_of_rows = f"{title}: {rows} rows"
                of_groups.append(line_chart(curves, title_of_rows, "response position j", "nats"))
            charts.append(of_groups)
    return charts


def rounds(run) -> list[dict] | str:
    """The rows that each round of TOSS-Pro added to the harmful reference set."""
    from toss.audit.tokens import INPUTS

    found = []
    for file in run.folder.glob("methods/[!.]*/round-[0-9]*/added.jsonl"):
        method = file.parts[-3]
        t = file.parent.name.removeprefix("round-")
        if not t.isdecimal():  # it is somebody's copy
            continue
        try:
            run.check(f"methods/{method}", INPUTS)
        except InputError:  # of other rows or references, as its mask, which has a line
            continue
        found.append({"method": method, "t": int(t), "added": read_jsonl(file)})
    found.sort(key=lambda entry: (entry["method"], entry["t"]))
    pro = flags.command("select.py", run.folder, pro=1)
    return found or f"No rounds of TOSS-Pro on these rows and references: run {pro} first."


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.report", __doc__)
    parser.add_argument("--run", required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    args = parser.parse_args(argv)
    from toss.workbench.run import open_run

    run = open_run(args.run)
    text, lacking, count = page(run)
    out = args.out or Path(args.run) / "report.html"
    write_text(out, text)
    for line in lacking:
        print(f"left out: {line}")
    print(f"written: {out}, {out.stat().st_size / 1000:.0f} kB, {count} rows token by token")
    print(f"next: open {out.absolute().as_uri()} in a browser")


if __name__ == "__main__":
    sys.exit(flags.run(main))
