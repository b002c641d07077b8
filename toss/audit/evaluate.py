"""Measure the models of a run: do they still refuse, do they refuse too much, what do they know.

    python -m toss.audit.evaluate --run R --harmful FILE --benign FILE --utility FILE

Evaluates the base and every method of the run (or --methods). Writes RUN/metrics.json,
RUN/methods/M/metrics.json and RUN/answers/M.jsonl. What each measure means: toss/audit/README.md.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.io import InputError, read_json, read_text
from toss import cli
from toss.audit.command import Table, cautions, markdown, opened, write_jsonl, write_text

JUDGES = 2  # raised when a measure changes, so that what was evaluated before is evaluated again
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
    from toss.audit.judges import measure, prefilled, selection_metrics
    from toss.parallel import rank
    from toss.rows import read_rows

    how = {f"{name}_sha256": run.hash(path) for name, path in files.items()}
    sets = {name: read_rows(path, responses=False) for name, path in files.items()}
    if changed := [path for name, path in files.items() if run.hash(path) != how[f"{name}_sha256"]]:
        raise InputError(f"{changed[0]} was changed while it was read: run the command again")
    how |= dict(words=sorted(words), max_new_tokens=max_new_tokens, prefill=sorted(set(prefill)))
    how |= {"dtype": run.dtypes["train"], "judges": JUDGES}
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
        stage, path = f"evaluation/{method}", run.folder / "answers" / f"{method}.jsonl"
        with run.holding(stage, reads=inputs[method]):
            recipe = run.recipe(inputs[method], how)
            known = run.record["stages"].get(stage, {})
            if path.exists() and known.get("recipe") == recipe:
                if (answers := known.get("answers_sha256")) == run.hash(path):
                    again = known["metrics"] | selection_metrics(run, method)
                    if again != known["metrics"] and rank() == 0:  # scored since
                        run.finish(stage, recipe, metrics=again, answers_sha256=answers)
                    continue
            model = use(run.base("train"), None if method == "base" else run.adapter(method))
            metrics, said = measure(run, model, sets, how)
            metrics |= selection_metrics(run, method)
            if rank() > 0:
                continue
            write_jsonl(path, [{"note": NOTE}, *said])
            run.finish(stage, recipe, metrics=metrics, answers_sha256=run.hash(path))
    if rank() > 0:
        return {}
    with run.holding("metrics", reads=sum(inputs.values(), ()), alone=True):
        return write_tables(run, methods)


def write_tables(run, methods: Sequence[str]) -> Table:
    """Write metrics.json of the run and of each of these methods; returns their table.

    The run's holds every method that was evaluated like these and whose model is still the same.
    """
    stages, every, others = run.record["stages"], {}, []
    how = {**stages[f"evaluation/{methods[0]}"]["recipe"], "inputs": None}
    for stage in stages:
        kind, _, method = stage.partition("/")
        if kind == "evaluation":
            if {**stages[stage]["recipe"], "inputs": None} == how and not run.stale(stage):
                every[method] = stages[stage]["metrics"]
            else:
                others.append(method)
    if others:
        why = "evaluated on other files or in another way, or trained again since"
        print(f"{run.folder}/metrics.json leaves out {', '.join(others)}: {why}")
    stages = [stages.get(f"methods/{method}", {}) for method in every]
    made = {(x["torch"], x["threads"]) for x in stages if {"torch", "threads"} <= x.keys()}
    if len(made) > 1:
        found = "; ".join(f"torch {torch}, {threads} threads" for torch, threads in sorted(made))
        print(f"note: the methods were made in different ways, so last bits differ ({found})")
    write_metrics(run.folder / "metrics.json", every)
    for method in set(methods) - {"base"}:
        if (folder := run.path(f"methods/{method}")).exists():  # not made elsewhere
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
        if not cli.like(metrics, cli.METRICS) or not all(
            cell <= x.keys() for x in metrics.values()
        ):
            raise InputError(f"{path}: {method}: expected value, n, low and high by measure")
    return table


def format_table(table: Table) -> str:
    """A table with the measures down and the methods across: value and [interval]."""

    def shown(value: float | None = None, n: int = 0, low: float | None = None, high=None) -> str:
        between = "" if low is None else f" [{low:.3f}, {high:.3f}]"  # none of one row
        return "" if value is None else f"{value:.3f}{between}"

    names = dict.fromkeys(name for metrics in table.values() for name in metrics)
    lines = [[name, *(shown(**row.get(name, {})) for row in table.values())] for name in names]
    return markdown(["", *table], lines)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("python -m toss.audit.evaluate", __doc__)
    cli.add_run_flags(parser)
    flag = parser.add_argument
    flag("--methods", help="comma-separated, may include base (default: base and all of the run)")
    for name, text in SETS.items():
        flag(f"--{name}", metavar="FILE", help=text)
    cli.add_adapter_flag(parser)
    text = "text file with one forbidden word per line (the demo has its own)"
    flag("--words", metavar="FILE", help=text)
    text = "ask again after the first K tokens of the harmful row's response (usual: 0,1,3,5,10)"
    naturals = lambda text: [cli.natural(part) for part in text.split(",")]
    flag("--prefill", type=naturals, default=[], metavar="K,K,...", help=text)
    flag("--max-new-tokens", type=cli.count, default=40, help="length of an answer (default: 40)")
    args = parser.parse_args(argv)
    files = {name: path for name in SETS if (path := getattr(args, name))}
    if not files:
        raise InputError("give at least one of --harmful, --benign and --utility")
    run, methods = opened(args, "base")
    words = read_text(args.words).split("\n") if args.words else []
    words = [word.strip() for word in words if word.strip()]
    if not args.words and run.record.get("demo"):
        words = read_json(cli.DEMO)["forbidden_words"]
    table = evaluate_run(run, methods, files, words, args.max_new_tokens, args.prefill)
    print(format_table(table), *cautions(run.record["stages"], table), sep="\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
