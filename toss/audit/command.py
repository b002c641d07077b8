"""What several commands of the audit share. No torch, so that --help comes at once."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.io import InputError, json_lines, whole_file
from toss.workbench.flags import TRAINING

DEVICE = ("device", "dtype", "threads", "batch_tokens", "shard")  # flags of a Run
Table = dict[str, dict[str, dict]]  # {method: {measure: {"value", "n", "low", "high"}}}


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [item for _, item in json_lines(Path(path))]


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, and the folders that it is in."""
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def write_jsonl(path: str | Path, items: Iterable[dict]) -> str:
    """Write a JSONL file; returns its path."""
    write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return str(path)


def methods_of(run) -> list[str]:
    """Names of a Run's methods that have a model, in alphabetical order."""
    return sorted(path.parent.name for path in (run.folder / "methods").glob("[!.]*/model"))


def run_of(args, *but: str):
    """The Run that a command's flags name, with its device flags but these."""
    from toss.workbench.run import open_run

    how = {name: getattr(args, name, None) for name in DEVICE if name not in but}
    return open_run(args.run, **how)


def opened(args, *first: str) -> tuple:
    """The Run that a command's flags name, and the methods: those of --methods, else `first` and
    all of the run."""
    run = run_of(args)
    return run, args.methods.split(",") if args.methods else [*first, *methods_of(run)]


def losses_under(run, tokens, dtype: str = "score", **others) -> dict:
    """The losses of tokens under both references, {"utility", "degraded"}: float32 [N] each.

    dtype: see Run.base. others: adapters that stand for a reference.
    """
    from model.lora import use
    from toss.scoring import score

    found = {}
    for name in ("utility", "degraded"):
        theta = others.get(name) or run.adapter(name)
        model = use(run.base(dtype), theta)
        progress = run.progress(f"{name}, {run.loaded}")
        found[name] = score(model, tokens, run.batch_tokens, on_batch=progress.report)
    return found


def answers_of(path: Path) -> list[dict[str, str]]:
    """The lines of answers/METHOD.jsonl less its note; InputError if one has another form."""
    lines = [(where, line) for where, line in json_lines(path) if "note" not in line]
    for where, line in lines:
        if not all(
            isinstance(line.get(key), str) for key in ("set", "source", "prompt", "response")
        ):
            raise InputError(f"{where}: expected the strings set, source, prompt and response")
    return [line for _, line in lines]


def measured(table: Table) -> Table:
    """The cells that have a value and an interval."""

    def whole(row):
        return {name: cell for name, cell in row.items() if None not in cell.values()}

    return {method: whole(row) for method, row in table.items()}


def safety(table: Table) -> tuple[str, dict[str, dict], bool] | None:
    """The measure that tells how unsafe models are, its cell for each, and whether plain
    fine-tuning (sft) clearly lost safety: its 95 % interval lies above the base's.

    The measure is `forbidden` where base and sft have it, else `not_refused`; None without either.
    """
    for name in ("forbidden", "not_refused"):
        cells = {m: row[name] for m, row in measured(table).items() if name in row}
        if {"base", "sft"} <= cells.keys():
            return name, cells, apart(cells["sft"], cells["base"]) > 0
    return None


def apart(a: dict, b: dict) -> int:
    """1 if the 95 % interval of a lies above b's, -1 if below, 0 if they overlap."""
    return (a["low"] > b["high"]) - (a["high"] < b["low"])


def records_of(run, methods: Iterable[str]) -> dict[str, dict]:
    """The record of each of these methods, without those that have none."""
    from toss.workbench.results import read_record

    found = {method: read_record(run.folder / "methods" / method) for method in methods}
    return {method: record for method, record in found.items() if record}


def cautions(records: dict[str, dict], table: Table) -> list[str]:
    """What forbids conclusions from a table of metrics, a sentence each: methods that were trained
    otherwise than plain fine-tuning, or by other code, and a plain fine-tuning that did no harm.

    records: see records_of.
    """
    made = {m: records.get(m, {}).get("settings", {}) for m in table}
    how = {m: {key: made[m].get(key) for key in (*TRAINING, "dtype")} for m in table if made[m]}
    first, said = "sft" if "sft" in how else next(iter(how), ""), []
    for m in (m for m in table if m not in how and m != "base"):
        said.append(f"note: {m} was made elsewhere; how it was trained is not known here")
    for m in how:
        pairs = {key: (value, how[first][key]) for key, value in how[m].items()}
        if differs := [f"{key} {a}, not {b}" for key, (a, b) in pairs.items() if a != b]:
            what = f"{m} was trained otherwise than {first} ({', '.join(differs)})"
            said.append(f"warning: {what}: this is no comparison of the two methods")
    codes = {m: records[m].get("code", {}) for m in how}
    for m in how:
        shared = codes[m].keys() & codes[first].keys()
        if changed := sorted(part for part in shared if codes[m][part] != codes[first][part]):
            what = f"{m} was made by other code than {first} (different: {', '.join(changed)})"
            said.append(f"warning: {what}: this is no comparison of the two methods")
    name, cells, lost = safety(table) or ("", {}, True)
    if not lost:
        values = f"{name} {cells['sft']['value']:.2f}, base {cells['base']['value']:.2f}"
        said.append(
            f"warning: plain fine-tuning (sft) did not clearly lose the base's safety ({values}), "
            "so nothing can be concluded about what protects it"
        )
    return said


def markdown(header: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns also line up in a terminal.

    >>> print(markdown(["", "toss"], [["not_refused", 0.25], ["nll", 1]]))
    |             | toss |
    |-------------|------|
    | not_refused | 0.25 |
    | nll         | 1    |
    """
    rows = [[str(item) for item in row] for row in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    return "\n".join([text[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *text[1:]])


def evenly(items: Sequence, n: int) -> list:
    """n of the items, spread evenly from the first to the last; all if there are no more than n.

    >>> evenly([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 3, 6]
    """
    if len(items) <= n:
        return list(items)
    return [items[i * (len(items) - 1) // max(n - 1, 1)] for i in range(n)]
