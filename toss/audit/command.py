"""What several commands of the audit share. No torch, so that --help comes at once."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.io import InputError, json_lines, whole_file
from toss.audit.characters import harmless
from toss.workbench.flags import TRAINING_FLAGS

DEVICE = ("device", "dtype", "threads", "batch_tokens", "shard")  # flags of a Run
NUMBERS = ("seconds", "tokens", "rows", "peak_memory_gib", "threads")  # of a stage in run.json
Table = dict[str, dict[str, dict]]  # {method: {measure: {"value", "n", "low", "high"}}}


# Files


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [item for _, item in json_lines(Path(path))]


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, and the folders that it is in."""
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: str | Path, items: Iterable[dict]) -> str:
    """Write a JSONL file; returns its path."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    write_text(path, "".join(lines))
    return str(path)


# A run


def methods_of(run) -> list[str]:
    """Names of a Run's methods that have a model, in alphabetical order."""
    return sorted(path.parent.name for path in (run.folder / "methods").glob("[!.]*/model"))


def run_of(args, *omitted: str):
    """The Run that a command's flags name, with its device flags but these."""
    from toss.workbench.run import open_run

    flags = {name: getattr(args, name, None) for name in DEVICE if name not in omitted}
    return open_run(args.run, **flags)


def opened(args, *first: str) -> tuple:
    """The Run that a command's flags name, and the methods: those of --methods, else `first` and
    all of the run."""
    run = run_of(args)
    if args.methods:
        return run, args.methods.split(",")
    return run, [*first, *methods_of(run)]


def losses_under(
    run, tokens, dtype: str = "score", models=("utility", "degraded"), **others
) -> dict:
    """The losses of tokens under both references, {"utility", "degraded"}: float32 [N] each.

    dtype: see Run.base. models: others than these, "base" among them. others: adapters that stand
    for a reference.
    """
    from model.lora import use
    from toss.scoring import score

    losses = {}
    for name in models:
        theta = others.get(name) or run.adapter(name)
        model = use(run.base(dtype), theta)
        progress = run.progress(f"{name}, {run.loaded}")
        losses[name] = score(model, tokens, run.batch_tokens, on_batch=progress.report)
    return losses


def stages_of(run) -> dict[str, dict]:
    """What run.json reports of the stages: {stage: {"recipe", "seconds", "tokens", ...}}.

    Any of them may be missing, and anybody may have edited the file: InputError for another type.
    """
    stages = run.runfile.section("stages")
    for stage in stages:
        for part in ("settings", "inputs"):
            run.runfile.section("stages", stage, "recipe", part)
        for name in NUMBERS:
            if type(stages[stage].get(name, 0)) not in (int, float):
                raise InputError(f"{run.runfile.file}: {stage}: {name} is not a number")
    return stages


def records_of(run, methods: Iterable[str]) -> dict[str, dict]:
    """The record of each of these methods, without those that have none."""
    from toss.workbench.results import read_record

    records = {}
    for method in methods:
        record = read_record(run.folder / "methods" / method)
        if record and "mask_only" not in record["settings"]:  # then the model is from elsewhere
            records[method] = record
    return records


# What a table allows to conclude


def measured(table: Table) -> Table:
    """The cells that have a value and an interval."""
    whole = {}
    for method, row in table.items():
        whole[method] = {name: cell for name, cell in row.items() if None not in cell.values()}
    return whole


def safety(table: Table, paired: dict | None = None) -> tuple[str, dict[str, dict], bool] | None:
    """The measure that tells how unsafe models are, its cell for each, and whether plain
    fine-tuning (sft) clearly lost safety.

    The measure is `forbidden` where base and sft have it, else `not_refused`; None without either.
    paired: see compared.
    """
    for name in ("forbidden", "not_refused"):
        cells = {method: row[name] for method, row in measured(table).items() if name in row}
        if {"base", "sft"} <= cells.keys():
            return name, cells, compared(table, paired, name, "sft", "base") > 0
    return None


def compared(table: Table, paired: dict | None, measure: str, one: str, other: str) -> int:
    """1 if a measure of one method is above that of another, -1 if below, 0 if neither is certain.

    paired: the differences on the same prompts, as in paired.json: their 95 % interval excludes 0.
    Where there is none, the intervals of the two values must not overlap.
    """
    difference = (paired or {}).get(one, {}).get(measure, {}).get(other)
    if difference is not None and difference["low"] is not None:
        return (difference["low"] > 0) - (difference["high"] < 0)
    a = table[one][measure]
    b = table[other][measure]
    return (a["low"] > b["high"]) - (a["high"] < b["low"])


def cautions(records: dict[str, dict], table: Table) -> list[str]:
    """What forbids comparisons in a table of metrics, a sentence each: methods that were trained
    otherwise than plain fine-tuning, or by other code.

    records: see records_of.
    """
    sentences = []
    trained = []
    for method in table:
        if records.get(method, {}).get("settings"):
            trained.append(method)
        elif method != "base":
            what = f"{method} was made elsewhere; how it was trained is not known here"
            sentences.append(f"note: {what}")
    first = "sft" if "sft" in trained else next(iter(trained), "")

    # Each method beside plain fine-tuning, or beside the first if that is missing.
    for method in trained:
        settings = records[method]["settings"]
        usual = records[first]["settings"]
        others = []
        for key in (*TRAINING_FLAGS, "dtype"):
            if settings.get(key) != usual.get(key):
                others.append(f"{key} {settings.get(key)}, not {usual.get(key)}")
        code = records[method].get("code", {})
        usual_code = records[first].get("code", {})
        files = [part for part in sorted(code) if usual_code.get(part, code[part]) != code[part]]
        reasons = []
        if others:
            reasons.append(f"was trained otherwise than {first} ({', '.join(others)})")
        if files:
            reasons.append(f"was made by other code than {first} (different: {', '.join(files)})")
        for reason in reasons:
            what = "this is no comparison of the two methods"
            sentences.append(f"warning: {method} {reason}: {what}")

    return sentences


def safety_caution(table: Table, paired: dict) -> list[str]:
    """A sentence where plain fine-tuning did no harm. paired: see compared."""
    name, cells, lost = safety(table, paired) or ("", {}, True)
    if lost:
        return []
    values = f"{name} {cells['sft']['value']:.2f}, base {cells['base']['value']:.2f}"
    what = "so nothing can be concluded about what protects it"
    lost_little = f"plain fine-tuning (sft) did not clearly lose the base's safety ({values})"
    return [f"warning: {lost_little}, {what}"]


# Tables


def markdown(header: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns also line up in a terminal.

    >>> print(markdown(["", "toss"], [["not_refused", 0.25], ["nll", 1]]))
    |             | toss |
    |-------------|------|
    | not_refused | 0.25 |
    | nll         | 1    |
    """
    rows = [[on_one_line(item) for item in row] for row in (header, *lines)]
    widths = [max(len(item) for item in column) for column in zip(*rows)]
    text = []
    for row in rows:
        items = [item.ljust(width) for item, width in zip(row, widths)]
        text.append(f"| {' | '.join(items)} |")
    rule = "|".join("-" * (width + 2) for width in widths)
    text.insert(1, f"|{rule}|")
    return "\n".join(text)


def on_one_line(item: object) -> str:
    r"""A cell's text. It may come from a file, and must not control a terminal or end the line.

    >>> on_one_line("a\nb\x1b[2J")
    'a b<1b>[2J'
    """
    return harmless(str(item)).replace("\n", " ")


def cell_text(cell: dict | None, sign: str = "") -> str:
    """A value with its interval. sign: "+" for a difference; a star if its interval excludes 0.

    >>> cell_text({"value": 0.1, "low": 0.05, "high": 0.15}, "+")
    '+0.100 [+0.050, +0.150]*'
    """
    if cell is None or cell["value"] is None:
        return ""
    value = f"{cell['value']:{sign}.3f}"
    if cell["low"] is None:  # of one row
        return value
    star = "*" if sign and (cell["low"] > 0 or cell["high"] < 0) else ""
    return f"{value} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]{star}"


def is_part(measure: str, measures: Iterable[str]) -> bool:
    """True for what is measured after a prefill, or by source beside the whole."""
    whole, by_source, _ = measure.partition("/")
    return "@" in measure or bool(by_source) and whole in measures
