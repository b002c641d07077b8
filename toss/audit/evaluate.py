"""Measure the models of a run: do they still refuse, do they refuse too much, what do they know.

    python -m toss.audit.evaluate --run R --harmful FILE --benign FILE --utility FILE

Evaluates the base and every method of the run (or --methods). Writes RUN/metrics.json,
RUN/methods/M/metrics.json and RUN/answers/M.jsonl. What each measure means: toss/audit/README.md.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from model.io import InputError, read_json, read_text
from toss.audit.command import (
    Table,
    cautions,
    markdown,
    opened,
    read_jsonl,
    records_of,
    write_jsonl,
    write_text,
)
from toss.workbench import flags
from toss.workbench.results import held, text_hash

MEASURES = ["toss/audit/judges.py", "toss/audit/measures.py", "data/refusals.py"]

NOTE = "Answers of evaluated models, some made unsafe on purpose. For auditing; do not publish."
SETS = {
    "harmful": "harmful prompts, JSONL: rows with a prompt, and a source to group by",
    "benign": "benign prompts, JSONL",
    "utility": "utility rows, JSONL: prompt and response, and an `answer` where there is one",
}


def evaluate_run(
    run,
    methods: Sequence[str],
    files: dict[str, str],
    words: Sequence[str] = (),
    max_new_tokens: int = 40,
    prefill: Iterable[int] = (),
) -> Table:
    """Evaluate methods of a Run ("base": the model that it began with); writes and returns a table.

    files: path of the rows by name in SETS. prefill: numbers of tokens of the harmful rows'
    responses to begin answers with. A method that was evaluated in the same way before is skipped.
    """
    from model.lora import use
    from toss.audit.judges import measure, prefilled
    from toss.parallel import rank
    from toss.rows import read_rows
    from toss.workbench import code

    digests = code.digests([*code.PARTS["evaluation"], *MEASURES])
    hashes = {name: run.hashes.of_input(Path(path)) for name, path in files.items()}
    how = {f"{name}_sha256": value for name, value in hashes.items()}
    sets = {name: read_rows(path, responses=False) for name, path in files.items()}
    for path in files.values():
        run.hashes.of_input(Path(path))  # raises if it was changed while it was read
    how |= dict(words=sorted(words), max_new_tokens=max_new_tokens, prefill=sorted(set(prefill)))
    how |= {"dtype": run.dtypes["train"]}
    begun = prefilled(sets.get("harmful", []), run.tokenizer) if how["prefill"] else []
    for k in how["prefill"]:
        if short := sum(len(response) < k for _, response in begun):
            print(f"prefill-{k}: {short} of {len(begun)} responses are shorter and used whole")
    for name, rows in sets.items():
        run.warn_shared(files[name], rows, prompts_only=True)  # with the run's training data
    inputs = {method: () if method == "base" else (f"methods/{method}",) for method in methods}
    for key in sum(inputs.values(), ()):  # a missing model is refused before any is evaluated
        run.check(key, only=())
        if changed := run.stale(key):
            print(f"warning: {key} was made with another {', '.join(changed)} than the run has now")
    for method in methods:
        recipe = run.recipe(f"evaluation/{method}", inputs[method], how)
        wanted = json.loads(json.dumps({**recipe, "code": digests}))
        with run.holding(run.folder / ".state" / f"evaluation-{method}"):
            if evaluation(run, method).get("record") == wanted:
                continue
            model = use(run.base("train"), run.adapter(method))
            metrics, said = measure(run, model, sets, how)
            if run.recipe(f"evaluation/{method}", inputs[method], how) == recipe and rank() == 0:
                write_answers(run.folder / "answers" / f"{method}.jsonl", wanted, metrics, said)
    if rank() > 0:
        return {}
    with held(run.folder, run.folder, wait=True):  # another evaluation may be at its end
        return write_tables(run, methods)


def write_answers(path: Path, record: dict, metrics: dict, said: list[dict]) -> None:
    """Write answers, with a first line that says what they are and whether they were changed."""
    head = {"note": NOTE, "record": record, "metrics": metrics}
    head["sha256"] = text_hash([record, metrics, said])
    write_jsonl(path, [head, *said])


def evaluation(run, method: str) -> dict:
    """What answers/METHOD.jsonl says of itself: record, metrics; {} if there is none, or it was
    changed. With the measures of what the method discarded, if they can be taken now."""
    from toss.audit.judges import selection_metrics

    path = run.folder / "answers" / f"{method}.jsonl"
    with suppress(InputError):
        head, *said = read_jsonl(path) or [{}]
        parts = [head.get("record"), head.get("metrics"), said]
        if head.get("sha256") == text_hash(parts):
            return {**head, "metrics": head["metrics"] | selection_metrics(run, method)}
    return {}


def evaluations(run) -> tuple[dict[str, dict], list[str]]:
    """The evaluation of each method of a run, and the names of those that do not count any more:
    the model, or the base, is another one now."""
    current, old = {}, []
    for path in sorted((run.folder / "answers").glob("*.jsonl")):
        if found := evaluation(run, path.stem):
            identity, record = run.identity, found["record"]
            same = all(record[key] == identity[key] for key in identity)
            if same and not run.changed_inputs(record):
                current[path.stem] = found
            else:
                old.append(path.stem)
    return current, old


def write_tables(run, methods: Sequence[str]) -> Table:
    """Write metrics.json of the run and of each of these methods; returns their table.

    The run's holds every method that was evaluated like these and whose model is still the same.
    """
    current, others = evaluations(run)

    def way(method):
        return {**current[method]["record"], "inputs": None, "stage": None}

    if missing := [m for m in methods if m not in current]:
        raise InputError(f"{missing[0]} was replaced or evaluated anew meanwhile: run it again")
    every = {m: current[m]["metrics"] for m in current if way(m) == way(methods[0])}
    if missing := [m for m in methods if m not in every]:
        raise InputError(f"{missing[0]} was evaluated in another way meanwhile: run it again")
    if others := sorted(others + [m for m in current if m not in every]):
        why = "evaluated on other files or in another way, or trained again since"
        print(f"{run.folder}/metrics.json leaves out {', '.join(others)}: {why}")

    every = {m: every[m] for m in sorted(every, key=lambda m: m != "base")}
    stages = [run.record.get("stages", {}).get(f"methods/{method}", {}) for method in every]
    made = {(x["torch"], x["threads"]) for x in stages if {"torch", "threads"} <= x.keys()}
    if len(made) > 1:
        found = "; ".join(f"torch {torch}, {threads} threads" for torch, threads in sorted(made))
        print(f"note: the methods were made in different ways, so last bits differ ({found})")
    write_metrics(run.folder / "metrics.json", every)
    for method in set(methods) - {"base"}:
        if (folder := run.path(f"methods/{method}")).exists():  # else it is being replaced
            write_metrics(folder / "metrics.json", {method: every[method]})
    return {method: every[method] for method in methods}


def write_metrics(path: Path, table: Table) -> None:
    """Write a table as JSON."""
    write_text(path, json.dumps(table, indent=2) + "\n")


def read_metrics(folder: Path) -> Table:
    """FOLDER/metrics.json, {} if there is none; InputError naming the file and the method if it has
    another form.

    n is a number; the others may be None, where nothing could be measured.
    """
    path, cell = Path(folder) / "metrics.json", {"value", "n", "low", "high"}
    table = read_json(path) if path.exists() else {}
    for method, metrics in table.items():
        cells = metrics.values() if isinstance(metrics, dict) else [None]
        if not all(isinstance(x, dict) and cell <= x.keys() and is_cell(x) for x in cells):
            raise InputError(f"{path}: {method}: expected value, n, low and high by measure")
    return table


def is_cell(cell: dict) -> bool:
    """True if n is a number, and the others are numbers or None."""

    def number(x):
        return type(x) in (int, float)

    return number(cell["n"]) and all(x is None or number(x) for x in cell.values())


def format_table(table: Table) -> str:
    """A table with the measures down and the methods across: value and [interval]."""

    def shown(value: float | None = None, n: int = 0, low: float | None = None, high=None) -> str:
        between = "" if low is None else f" [{low:.3f}, {high:.3f}]"  # none of one row
        return "" if value is None else f"{value:.3f}{between}"

    names = dict.fromkeys(name for metrics in table.values() for name in metrics)
    lines = [[name, *(shown(**row.get(name, {})) for row in table.values())] for name in names]
    return markdown(["", *table], lines)


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.evaluate", __doc__)
    flags.add_run_flags(parser)
    flag = parser.add_argument
    flag("--methods", help="comma-separated, may include base (default: base and all of the run)")
    for name, text in SETS.items():
        flag(f"--{name}", metavar="FILE", help=text)
    text = "text file with one forbidden word per line (the demo has its own)"
    flag("--words", metavar="FILE", help=text)
    text = "ask again after the first K tokens of the harmful row's response (usual: 0,1,3,5,10)"

    def naturals(text):
        return [flags.natural(part) for part in text.split(",")]

    flag("--prefill", type=naturals, default=[], metavar="K,K,...", help=text)
    flag("--max-new-tokens", type=flags.count, default=40, help="length of an answer (default: 40)")
    args = parser.parse_args(argv)
    files = {name: path for name in SETS if (path := getattr(args, name))}
    if not files:
        raise InputError("give at least one of --harmful, --benign and --utility")
    run, methods = opened(args, "base")
    words = read_text(args.words).split("\n") if args.words else []
    words = [word.strip() for word in words if word.strip()]
    if not args.words and run.record.get("demo"):
        words = read_json(flags.DEMO)["forbidden_words"]
    table = evaluate_run(run, methods, files, words, args.max_new_tokens, args.prefill)
    print(format_table(table), *cautions(records_of(run, table), table), sep="\n")


if __name__ == "__main__":
    sys.exit(flags.run(main))
