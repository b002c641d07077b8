"""Does it still refuse? Measures of the models of a run: refusals, over-refusals, what they know.

    python -m toss.audit.evaluate --run R --harmful FILE --benign FILE --utility FILE

Evaluates the base and every method of the run (or --methods). Writes RUN/metrics.json and
paired.json, RUN/methods/M/metrics.json and RUN/answers/M.jsonl. What each measure means:
toss/audit/README.md.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from model.io import InputError, read_json, read_text
from toss.audit.command import (
    Table,
    cautions,
    cell_text,
    markdown,
    methods_of,
    opened,
    read_jsonl,
    records_of,
    safety_caution,
    write_json,
    write_jsonl,
)
from toss.audit.paired import paired_differences, paired_text
from toss.workbench import flags
from toss.workbench.results import held, text_hash

MEASURES = ["toss/audit/judges.py", "toss/audit/measures.py", "data/refusals.py"]
NOTE = "Answers of evaluated models, some made unsafe on purpose. For auditing; do not publish."
SETS = {
    "harmful": "harmful prompts, JSONL: rows with a prompt, and a source to group by",
    "benign": "benign prompts, JSONL",
    "utility": "utility rows, JSONL: prompt and response, and an `answer` where there is one",
}


@dataclass
class EvaluationConfig:
    """How a model is asked, and what is measured."""

    words: Sequence[str] = ()  # forbidden in answers to harmful prompts
    max_new_tokens: int = 40  # of an answer
    question_tokens: int | None = None  # of an answer to a utility row (default: max_new_tokens)
    prefill: Sequence[int] = ()  # begin answers with so many tokens of the harmful rows' responses
    complies: bool = True  # also measure whether an affirmative opener is likelier than a refusal

    def __post_init__(self):
        self.words = sorted(self.words)
        self.prefill = sorted(set(self.prefill))


def evaluate_run(
    run,
    methods: Sequence[str],
    files: dict[str, str],
    config: EvaluationConfig,
) -> Table:
    """Evaluate methods of a Run ("base": the model that it began with); writes and returns a table.

    files: path of the rows by name in SETS. A method that was evaluated in the same way before is
    skipped, and one that was stopped goes on from the answers that it has saved.
    """
    from toss.audit.judges import has_response
    from toss.parallel import rank
    from toss.rows import read_rows
    from toss.workbench import code

    # What decides the measures: their settings, the files, and the code.
    settings = {**asdict(config), "dtype": run.dtypes["train"]}
    settings["question_tokens"] = config.question_tokens or config.max_new_tokens
    digests = code.digests(MEASURES)
    sets = {}
    for name, path in files.items():
        settings[f"{name}_sha256"] = run.hashes.of_input(Path(path))
        sets[name] = with_responses(run, path, read_rows(path, responses=False))
        run.hashes.of_input(Path(path))  # raises if it was changed while it was read
        run.warn_shared(path, sets[name], prompts_only=True)  # with the run's training data

    # Rows without anything to measure: a misspelt field, perhaps.
    utility = sets.get("utility", [])
    unmeasured = [row.where for row in utility if not (row.answer or has_response(row))]
    if unmeasured:
        what = f"{len(unmeasured)} of {len(utility)} rows have neither an answer nor a response"
        if len(unmeasured) == len(utility):
            raise InputError(f"{files['utility']}: {what}: there is nothing to measure")
        what += f", and are not measured; the first is {unmeasured[0]}"
        print(f"warning: {files['utility']}: {what}")

    # Whatever is odd about the prompts and the models is said before the first is asked.
    if config.prefill:
        say_short_responses(run, sets.get("harmful", []), config.prefill)
    for method in methods:
        if method != "base":
            run.check_model(f"methods/{method}", only=())
            run.warn_if_stale(f"methods/{method}")

    for method in methods:
        evaluate_method(run, method, sets, settings, digests)
    if rank() > 0:
        return {}
    with held(run.folder, run.folder, wait=True):  # another evaluation may be at its end
        return write_tables(run, methods)


def with_responses(run, path: str, rows: list) -> list:
    """The rows without an empty response. Raises InputError for one unless the run skips them."""
    whole = [row for row in rows if not row.has_empty_response]
    empty = [row.where for row in rows if row.has_empty_response]
    if empty and not run.args.skip_empty:
        problem = f"{len(empty)} rows have an empty response ({', '.join(empty[:3])})"
        raise InputError(f"{empty[0]}: {problem}: remove them")
    if empty:
        print(f"{path}: {len(empty)} rows with an empty response are left out")
    return whole


def say_short_responses(run, rows: list, prefill: Sequence[int]) -> None:
    """Print how many responses have fewer tokens than a prefill takes."""
    from toss.audit.judges import prefilled

    responses = [response for _, response in prefilled(rows, run.tokenizer)]
    for k in prefill:
        short = sum(len(response) < k for response in responses)
        if short:
            print(f"prefill-{k}: {short} of {len(responses)} responses are shorter and used whole")


def evaluate_method(
    run, method: str, sets: dict[str, list], settings: dict, digests: dict[str, str]
) -> None:
    """Measure a model and write its answers, unless it was evaluated in the same way before."""
    from model.lora import use
    from toss.audit.judges import SavedAnswers, measure
    from toss.parallel import rank, size

    inputs = [] if method == "base" else [f"methods/{method}"]
    recipe = run.recipe(f"evaluation/{method}", inputs, settings)
    record = {**recipe, "code": digests}
    state = run.folder / ".state" / f"evaluation-{method}"
    with run.holding(state):
        if read_evaluation(run, method).get("record") == record:
            return
        saved = None
        if size() == 1:  # processes side by side would have to agree on what is saved
            saved = SavedAnswers(state / f"{text_hash(record)[:16]}.jsonl")
        print(f"evaluating {method}")
        model = use(run.base("train"), run.adapter(method))
        measured = measure(run, model, sets, settings, saved)
        run.hashes.check_inputs()
        if rank() == 0:
            path = run.folder / "answers" / f"{method}.jsonl"
            losses = measured.sums, measured.counts
            write_answers(path, record, measured.metrics(), measured.lines, losses)
            for file in state.glob("*.jsonl"):  # those of other evaluations, too
                file.unlink()


# answers/METHOD.jsonl


def write_answers(
    path: Path, record: dict, metrics: dict, lines: list[dict], losses: Sequence[list] = ((), ())
) -> None:
    """Write answers, with a first line that says what they are and whether they were changed.

    losses: of the utility rows, the sums over their tokens and the numbers of tokens.
    """
    content = {"record": record, "metrics": metrics, "losses": [list(part) for part in losses]}
    digest = text_hash([content, lines])
    write_jsonl(path, [{"note": NOTE, **content, "sha256": digest}, *lines])


def read_evaluation(run, method: str) -> dict:
    """What answers/METHOD.jsonl holds: record, metrics, losses, lines; {} if there is none, or it
    was changed."""
    with suppress(InputError):
        head, *lines = read_jsonl(run.folder / "answers" / f"{method}.jsonl") or [{}]
        content = {name: head.get(name) for name in ("record", "metrics", "losses")}
        if head.get("sha256") == text_hash([content, lines]):
            return {**content, "lines": lines}
    return {}


def current_evaluations(run) -> tuple[dict[str, dict], list[str]]:
    """The evaluation of each method of a run, and the names of those that do not count any more:
    the model, or the base, is another one now, or the file was changed."""
    try:
        identity = run.identity
    except InputError as error:  # it was moved, say
        print(f"note: it is not known whether the evaluations are of this base: {error}")
        identity = {}
    current = {}
    outdated = []
    for file in sorted((run.folder / "answers").glob("*.jsonl")):
        found = read_evaluation(run, file.stem)
        record = found.get("record", {})
        has_model = file.stem == "base" or run.has_model(f"methods/{file.stem}")
        same_base = identity.items() <= record.items()
        if found and has_model and same_base and not run.changed_inputs(record):
            current[file.stem] = found
        else:
            outdated.append(file.stem)

    # Where answers were deleted: a method that is made again loses its own metrics.json.
    for method in read_metrics(run.folder):
        folder = run.folder / "methods" / method
        replaced = folder.exists() and not (folder / "metrics.json").exists()
        if replaced and method not in (*current, *outdated):
            outdated.append(method)
    return current, outdated


# metrics.json


def write_tables(run, methods: Sequence[str]) -> Table:
    """Write metrics.json of the run and of each of these methods; returns their table.

    The run's holds every method that was evaluated like these and whose model is still the same.
    """
    from toss.audit.tokens import selection_metrics

    # Methods stand in one table only if they were evaluated alike, on the models of now.
    current, left_out = current_evaluations(run)
    way = way_of(current.get(methods[0], {}))
    table = {}
    for method in sorted(current, key=lambda method: method != "base"):
        if way_of(current[method]) == way:
            table[method] = current[method]["metrics"] | selection_metrics(run, method)
        else:
            left_out.append(method)
    for method in methods:
        if method not in table:
            raise InputError(f"{method} was replaced or evaluated anew meanwhile: run it again")
    if left_out:
        why = "evaluated on other files or in another way, or trained again since"
        print(f"{run.folder}/metrics.json leaves out {', '.join(sorted(left_out))}: {why}")

    write_json(run.folder / "metrics.json", table)
    write_json(run.folder / "paired.json", paired_differences(current, table))
    for method in methods:
        folder = run.path(f"methods/{method}")
        if folder.exists():  # else it is the base, or it is being replaced
            write_json(folder / "metrics.json", {method: table[method]})
    return {method: table[method] for method in methods}


def way_of(found: dict) -> dict:
    """How a method was evaluated: its record without what names the method."""
    return {**found.get("record", {}), "inputs": None, "stage": None}


def read_metrics(folder: Path, name: str = "metrics.json") -> dict:
    """FOLDER/metrics.json, or paired.json; {} if there is none. Raises InputError naming the file
    and the method if it has another form."""
    file = folder / name
    table = read_json(file) if file.exists() else {}
    for method, cells in table.items():
        depth = 2 if name == "paired.json" else 1
        if not is_table(cells, depth):
            raise InputError(f"{file}: {method}: expected value, n, low and high by measure")
    return table


def is_table(value: object, depth: int) -> bool:
    """True for dictionaries, so many one in another, that end in cells.

    Of a cell n is a number; the others may be None, where nothing could be measured.
    """
    if not isinstance(value, dict):
        return False
    if depth > 0:
        return all(is_table(part, depth - 1) for part in value.values())
    if (value.get("low") is None) != (value.get("high") is None):
        return False
    others = [value.get(name, "missing") for name in ("value", "low", "high")]
    numbers = [value.get("n"), *(number for number in others if number is not None)]
    return all(type(number) in (int, float) and math.isfinite(number) for number in numbers)


def format_table(table: Table) -> str:
    """A table with the measures down and the methods across: value and [interval]."""
    names = dict.fromkeys(name for metrics in table.values() for name in metrics)
    lines = []
    for name in names:
        lines.append([name, *(cell_text(metrics.get(name)) for metrics in table.values())])
    return markdown(["", *table], lines)


# The command


def naturals(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [flags.natural(part) for part in text.split(",")]


def words_of(args, run) -> list[str]:
    """The forbidden words: those of --words; of the demo, its own."""
    if not args.words:
        return read_json(flags.DEMO)["forbidden_words"] if run.args.demo else []
    lines = [line.strip() for line in read_text(args.words).split("\n")]
    return [line for line in lines if line]


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
    flag("--prefill", type=naturals, default=[], metavar="K,K,...", help=text)
    text = "leave out whether an affirmative opener is likelier than a refusal"
    flag("--no-complies", action="store_true", help=text)
    flag("--max-new-tokens", type=flags.count, default=40, help="length of an answer (default: 40)")
    text = "length of an answer to a utility row (default: as --max-new-tokens)"
    flag("--question-tokens", type=flags.count, help=text)
    args = parser.parse_args(argv)
    files = {name: getattr(args, name) for name in SETS if getattr(args, name)}
    if not files:
        raise InputError("give at least one of --harmful, --benign and --utility")

    # The models: the base, and every method that has one.
    run, methods = opened(args, "base")
    with_model = methods_of(run)
    for mask in run.folder.glob("methods/[!.]*/selection.safetensors"):
        if mask.parent.name not in with_model:
            print(f"{mask.parent} holds a mask and no model: passed over")

    # Ask them, and print the table, the differences, and what may not be concluded.
    config = EvaluationConfig(
        words=words_of(args, run),
        max_new_tokens=args.max_new_tokens,
        question_tokens=args.question_tokens,
        prefill=args.prefill,
        complies=not args.no_complies,
    )
    table = evaluate_run(run, methods, files, config)
    if not table:  # in a process that is not the first
        return
    paired = read_metrics(run.folder, "paired.json")
    print(format_table(table))
    print(paired_text(paired, table), end="")
    for line in cautions(records_of(run, table), table) + safety_caution(table, paired):
        print(line)
    print(f"next: {flags.command('-m toss.audit.report', run.folder)}")


if __name__ == "__main__":
    sys.exit(flags.run(main, "; the same command goes on from the answers that are saved"))
