"""Does it still refuse? Measures of the models of a run: refusals, over-refusals, what they know.

    python -m toss.audit.evaluate --run R --harmful FILE --benign FILE --utility FILE

Evaluates the base and every method of the run (or --methods). RUN/answers/M.jsonl holds what a
model answered, and everything else is counted from there: RUN/metrics.json, and the table of all.
What each measure means: toss/audit/README.md.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.io import InputError, file_hash, read_text
from model.lora import use
from toss.audit.judges import Measured, has_response, measure
from toss.audit.measures import Metrics, Table, by_measure, mean_loss, paired_share, wilson
from toss.audit.runs import (
    by_importance,
    demo_words,
    methods_of,
    read_jsonl,
    run_of,
    write_jsonl,
    write_text,
)
from toss.audit.tables import down, markdown
from toss.audit.tokens import selection_metrics
from toss.audit.verdict import AGAINST
from toss.parallel import rank
from toss.rows import Row, read_rows
from toss.workbench import flags
from toss.workbench.records import Record, code_digests
from toss.workbench.run import Run

MEASURES = ["toss/audit/judges.py", "toss/audit/measures.py", "data/refusals.py"]
NOTE = "Answers of evaluated models, some made unsafe on purpose. For auditing; do not publish."
SETS = {
    "harmful": "harmful prompts, JSONL: rows with a prompt, and a source to group by",
    "benign": "benign prompts, JSONL",
    "utility": "utility rows, JSONL: prompt and response, and an `answer` where there is one",
}


@dataclass
class Evaluated:
    """What is counted from the answers of a run's models, those that were asked alike."""

    table: Table  # by method
    paired: dict[str, Table]  # by what is subtracted, see AGAINST: differences of methods
    answers: dict[str, list[dict]]  # by method, the lines of its file
    left_out: list[str]  # asked otherwise, or of another model than the run has now


def evaluate_run(
    run: Run, methods: Sequence[str], files: dict[str, str], settings: dict[str, Any]
) -> Evaluated | None:
    """Evaluate methods of a run ("base": the model that it began with), and write what was found;
    None in a process that is not the first.

    files: path of the rows by name in SETS. settings: "words", forbidden in answers to harmful
    prompts; "prefill", begin answers with so many tokens of the harmful rows' responses;
    "max_new_tokens" of an answer; "question_tokens", the same of an answer to a utility row. A
    method that was evaluated in the same way before is skipped.
    """
    settings = {**settings, "dtype": run.dtypes["train"]}
    sets = {}
    for name, path in files.items():
        settings[f"{name}_sha256"] = file_hash(path)
        sets[name] = measurable(path, name)
        if file_hash(path) != settings[f"{name}_sha256"]:
            raise InputError(f"{path} was changed while the command ran: run it again")
        run.warn_shared(path, sets[name], prompts_only=True)  # with the run's training data

    # Whatever is odd about the models is said before the first is asked.
    for method in methods:
        if method != "base":
            run.check(f"methods/{method}/model", only=())

    for method in methods:
        evaluate_method(run, method, sets, settings)
    if rank() > 0:
        return None
    found = evaluated(run, like=methods[0])
    metrics = {}
    for method, row in found.table.items():
        metrics[method] = {name: cell._asdict() for name, cell in row.items()}
    write_text(run.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return found


def measurable(path: str, kind: str) -> list[Row]:
    """The rows of a file but those with an empty response. Raises InputError for a utility row
    without an answer or a response, a misspelt field perhaps."""
    rows = read_rows(path, responses=False)
    whole = [row for row in rows if not row.has_empty_response]
    if len(whole) < len(rows):
        print(f"{path}: {len(rows) - len(whole)} rows with an empty response are left out")
    for row in whole:
        if kind == "utility" and not row.answer and not has_response(row):
            raise InputError(f"{row.where}: the row has neither an answer nor a response")
    return whole


def evaluate_method(
    run: Run, method: str, sets: dict[str, list[Row]], settings: dict[str, Any]
) -> None:
    """Ask a model and write its answers, unless it was evaluated in the same way before."""
    place = "base" if method == "base" else f"methods/{method}/model"
    inputs = [] if method == "base" else [place]
    record = run.recipe(f"evaluation/{method}", inputs, settings)
    record["code"] = code_digests(*MEASURES)
    file = run.folder / "answers" / f"{method}.jsonl"
    with run.holding(f"evaluation-{method}"):
        if file.exists() and read_answers(file)["record"] == record:
            return
        print(f"evaluating {method}")
        model = use(run.base("train"), run.adapter(place))
        measured = measure(run, model, sets, settings)
        if rank() == 0:
            write_answers(file, record, measured)


# answers/METHOD.jsonl


def write_answers(path: Path, record: Record, measured: Measured) -> None:
    """Write answers, with a first line that says what they are."""
    losses = [measured.sums, measured.counts]
    write_jsonl(path, [{"note": NOTE, "record": record, "losses": losses}, *measured.lines])


def read_answers(path: Path) -> dict:
    """What answers/METHOD.jsonl holds: record, losses (of the utility rows: sums, and numbers of
    tokens) and lines."""
    head, *lines = read_jsonl(path)
    return {**head, "lines": lines}


def evaluated(run: Run, like: str = "base") -> Evaluated:
    """What is counted from the answers of a run's models of now.

    like: the method in whose way all must have been asked; without it, the best known method.
    """
    try:
        identity = run.identity()
    except InputError as error:  # it was moved, say
        print(f"note: it is not known whether the evaluations are of this base: {error}")
        identity = {}

    # Those of the models that the run has now, and that were asked alike.
    current = {}
    left_out = []
    files = {path.stem: path for path in run.folder.glob("answers/*.jsonl")}
    for method in by_importance(files):
        found = read_answers(files[method])
        record = found["record"]
        has_model = method == "base" or run.path(f"methods/{method}/model").exists()
        same_base = identity.items() <= record.items()
        if has_model and same_base and not run.changed_inputs(record):
            current[method] = found
        else:
            left_out.append(method)
    usual = current.get(like) or next(iter(current.values()), None)
    for method in list(current):
        if way_of(current[method]) != way_of(usual):
            del current[method]
            left_out.append(method)
    if left_out:
        why = "evaluated on other files or in another way, or trained again since"
        print(f"note: {run.folder}: {', '.join(sorted(left_out))} left out: {why}")

    table = {}
    for method, found in current.items():
        table[method] = metrics_of(found) | selection_metrics(run, method)
    answers = {method: found["lines"] for method, found in current.items()}
    return Evaluated(table, differences(current), answers, left_out)


def way_of(found: dict) -> dict:
    """How a method was evaluated: its record without what names the method."""
    return {**found["record"], "inputs": None, "stage": None}


def metrics_of(found: dict) -> Metrics:
    """All measures of a model's answers and losses."""
    metrics = {}
    for name, outcomes in by_measure(found["lines"]).items():
        metrics[name] = wilson(sum(outcomes.values()), len(outcomes))
    sums, counts = torch.tensor(found["losses"], dtype=torch.float64)
    if len(counts):
        metrics["nll"] = mean_loss(sums, counts)
    return metrics


def differences(current: dict[str, dict]) -> dict[str, Table]:
    """The difference of each measure of each method to sft and to the base, a table each.

    All were asked alike. Sources of the intervals: measures.paired_share and measures.mean_loss.
    """
    tables = {}
    for other in AGAINST:
        for method, found in current.items():
            if other in current and method != other:
                row = difference(found, current[other])
                tables.setdefault(other, {})[method] = row
    return tables


def difference(found: dict, other: dict) -> Metrics:
    """Of each measure of two methods, the difference on the same prompts."""
    row = {}
    others = by_measure(other["lines"])
    for name, outcomes in by_measure(found["lines"]).items():
        row[name] = paired_share(outcomes, others[name])
    sums, counts = torch.tensor(found["losses"], dtype=torch.float64)
    other_sums, _ = torch.tensor(other["losses"], dtype=torch.float64)
    if len(counts):
        row["nll"] = mean_loss(sums - other_sums, counts)
    return row


# The command


def naturals(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return sorted({flags.natural(part) for part in text.split(",")})


def words_in(path: str) -> list[str]:
    """The lines of a text file that are not empty."""
    lines = [line.strip() for line in read_text(path).split("\n")]
    return [line for line in lines if line]


def arguments() -> flags.Parser:
    parser = flags.Parser("python -m toss.audit.evaluate", __doc__)
    flags.add_run_flags(parser)
    flag = parser.add_argument
    flag("--methods", help="comma-separated, may include base (default: base and all of the run)")
    for name, text in SETS.items():
        flag(f"--{name}", metavar="FILE", help=text)
    text = "text file with one forbidden word per line (the demo has its own)"
    flag("--words", metavar="FILE", help=text)
    text = "ask again after the first K tokens of the harmful row's response (usual: 0,1,3,5,10)"
    flag("--prefill", type=naturals, default=[], metavar="K,K,...", help=text)
    flag("--max-new-tokens", type=flags.count, default=40, help="length of an answer (default: 40)")
    text = "length of an answer to a utility row (default: as --max-new-tokens)"
    flag("--question-tokens", type=flags.count, help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    files = {name: getattr(args, name) for name in SETS if getattr(args, name)}
    if not files:
        raise InputError("give at least one of --harmful, --benign and --utility")
    run = run_of(args)
    methods = args.methods.split(",") if args.methods else ["base", *methods_of(run)]
    words = words_in(args.words) if args.words else demo_words(run)
    settings = {
        "words": sorted(words),
        "prefill": args.prefill,
        "max_new_tokens": args.max_new_tokens,
        "question_tokens": args.question_tokens or args.max_new_tokens,
    }
    found = evaluate_run(run, methods, files, settings)
    if found:
        print(markdown(*down(found.table)))
        compare = flags.command("-m toss.audit.compare")
        print(f"next: {compare} {shlex.quote(str(run.folder))}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
