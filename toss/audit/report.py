"""The reader's view of a run: RUN/report.html, one file that opens from disk and fetches nothing.

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
from model.io import InputError, read_json, read_text
from toss.audit.command import (
    answers_of,
    cautions,
    evenly,
    measured,
    methods_of,
    read_jsonl,
    records_of,
    write_text,
)
from toss.audit.evaluate import SETS, evaluations, read_metrics
from toss.audit.experiment import HEADS
from toss.audit.figures import TEMPLATES, line_chart
from toss.audit.tokens import load_masks, visible
from toss.audit.verdict import verdict
from toss.workbench import flags

TEMPLATES.filters["visible"] = visible
TEMPLATES.tests["refusal"] = refused
ORDER = ("base", "sft", "toss", "toss-pro")  # methods that come first


def place(method):
    return (*ORDER, method).index(method)


CHARTS = {  # column of kl.csv -> title
    "kl_base": "KL(base || tuned)",
    "toward_degraded": "KL(base || degraded) - KL(tuned || degraded)",
    "toward_utility": "KL(base || utility) - KL(tuned || utility)",
}

# A part of the page is what the template shows, or a line (str) that says why it is missing.


def measures(run, old: list[str]) -> dict | str:
    """metrics.json without the old methods; which measures to show, in order; and the verdict."""
    evaluate = f"run python -m toss.audit.evaluate --run {run.folder}"
    table = measured(read_metrics(run.folder))
    table = {name: table[name] for name in sorted(table, key=place) if name not in old}
    if not table:
        return f"No measures: {evaluate} first."
    demo, records = run.record.get("demo", False), records_of(run, table)
    names = dict.fromkeys(name for row in table.values() for name in row)
    parts = [x for x in names if "@" in x or x.partition("/")[0] in names.keys() - {x}]
    return {
        "table": table,
        "names": [name for name in names if name not in parts],
        "parts": parts,
        "verdict": verdict(table, demo)
        or ([f"No verdict: {evaluate} with base, sft and toss."], []),
        "cautions": [x for x in cautions(records, table) if x.startswith("warning") or not demo],
        "heads": HEADS,
    }


def side_by_side(run, old: list[str]) -> dict | str:
    """A few prompts of the demo, with the answers of every model but the old ones."""
    folder, said = run.folder / "answers", {}
    if not run.record.get("demo"):
        return f"Answers of real models, some made unsafe on purpose, stay in {folder}."
    for method in ORDER:
        if (file := folder / f"{method}.jsonl").exists() and method not in old:
            lines = (line for line in answers_of(file) if line["set"] in SETS)
            said[method] = {(x["set"], x["source"], x["prompt"]): x["response"] for x in lines}
    if not any(said.values()):
        return f"No answers: run python -m toss.audit.evaluate --run {run.folder} first."
    asked = list(next(iter(said.values())))
    held_out = [key for key in asked if key[0] == "harmful" and key[1] != "seen"]
    benign = [key for key in asked if key[0] == "benign"]
    facts = {key[1]: key for key in reversed(asked) if key[0] == "utility"}
    chosen = [*evenly(held_out, 3), *benign[:1], *reversed(facts.values())]
    answers = {key: {name: texts.get(key) for name, texts in said.items()} for key in chosen}
    return {"texts": answers, "n": len(asked), "words": read_json(flags.DEMO)["forbidden_words"]}


def diagnosis(run, old: list[str]) -> list[list[str]] | str:
    """KL by response position: for each measure one chart per kind of rows, one line per model."""
    path, command = run.folder / "diagnosis" / "kl.csv", "python -m toss.audit.diagnose --run"
    if not path.exists() or not set(old) <= set(methods_of(run)):
        return f"No diagnosis with the references of now: run {command} {run.folder} first."
    charts: dict[str, dict] = {column: {} for column in CHARTS}  # rows -> model -> points
    try:
        lines = [x for x in csv.DictReader(read_text(path).splitlines()) if x["model"] not in old]
        for line in sorted(lines, key=lambda line: place(line["model"])):
            for column, groups in charts.items():
                points = groups.setdefault(line["rows"], {}).setdefault(line["model"], [])
                points.append((int(line["position"]), float(line[column])))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not as toss.audit.diagnose writes it ({error!r})") from None

    def drawn(title, curves):
        return line_chart(curves, title, "response position j", "nats")

    return [
        [drawn(f"{CHARTS[column]}: {rows} rows", curves) for rows, curves in groups.items()]
        for column, groups in charts.items()
    ]


def rounds(run, tokens) -> list[dict] | str:
    """What each round of TOSS-Pro added to the harmful reference set."""
    marked = tokens is not None and tokens.harmful.any()
    harm = set(tokens.row_of(tokens.harmful.nonzero()[:, 0]).tolist()) if marked else set()
    found = []
    for path in run.folder.glob("methods/[!.]*/round-[0-9]*/added.jsonl"):
        method, t = path.parts[-3], path.parts[-2].removeprefix("round-")
        if t.isdecimal():  # else it is not the scripts'
            added = read_jsonl(path)
            count = sum(line.get("row") in harm for line in added) if marked else None
            found.append({"method": method, "t": int(t), "added": added, "harm": count})
    found.sort(key=lambda entry: (entry["method"], entry["t"]))
    return found or f"No rounds of TOSS-Pro: run select.py --run {run.folder} --pro 1 first."


def page(run) -> tuple[str, list[str], int]:
    """The page, the lines about what it lacks, and how many rows it shows."""
    from toss.audit.discards import discard_tables, sources_of, token_part

    old = {
        "evaluate": evaluations(run)[1],
        "diagnose": [key.removeprefix("methods/") for key in run.stale("diagnosis")],
    }
    lacking = [
        f"What toss.audit.{command} found for {name} is left out: the run holds another model now. "
        f"Run python -m toss.audit.{command} --run {run.folder} again."
        for command, names in old.items()
        for name in names
        if command == "evaluate" or name in methods_of(run)  # else the part says it
    ]
    tokens, masks = None, []
    try:
        tokens, losses = run.scored()
        masks, broken = load_masks(run, tokens, losses)
        none = [] if masks else [f"No mask to show: run select.py --run {run.folder} first."]
        lacking += broken + none
    except InputError as error:
        lacking.append(str(error))
    parts = {
        "measures": measures(run, old["evaluate"]),
        "answers": side_by_side(run, old["evaluate"]),
        "diagnosis": diagnosis(run, old["diagnose"]),
        "rounds": rounds(run, tokens),
    }
    values = {**parts, "run": run, "tokens": tokens, "lacking": lacking}
    values["shown"] = shown = token_part(masks) if masks else None
    values["sources"] = sources = sources_of(run) if masks else []
    values["discards"] = discard_tables(masks, run.tokenizer, sources)
    try:
        text = TEMPLATES.get_template("report.html.jinja").render(values)
    except UndefinedError as error:
        raise InputError(f"{run.folder}: a file is not as the audit writes it ({error})") from None
    absent = [part for part in parts.values() if isinstance(part, str)]
    return text, lacking + absent, len(shown["rows"]) if shown else 0


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


if __name__ == "__main__":
    sys.exit(flags.run(main))
