"""What the audit reads of a run: its models, records and costs; and the methods' words."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from model.io import json_lines, load_tensors, whole
from model.lora import use
from toss.methods import METHODS
from toss.rows import read_rows
from toss.scoring import score
from toss.tokens import Tokens
from toss.workbench.progress import Progress, read_log
from toss.workbench.records import Record, read_record
from toss.workbench.run import REFERENCES, Run, open_run

DEVICE = ("device", "dtype", "threads", "batch_tokens", "shard")  # flags of a Run
LOSSES = {"loss_utility", "loss_degraded", "loss_base"}  # in the scores
NUMBERS = ("seconds", "tokens", "peak_memory_gib")  # what a stage costs

KNOWN = ("base", "sft", "toss", "toss-pro")  # folders that tables and the page show first
# What is no method of the registry, in words.
OTHERS = {
    "base": "the model before any fine-tuning",
    "toss-pro": "TOSS with a degraded model that was refined over some rounds",
    "mask": "with the mask of another run",
}


def by_importance(names: Iterable[str]) -> list[str]:
    """The best known models first, then the methods in the order of the registry, then others by
    name."""
    names = sorted(names)
    order = list(dict.fromkeys([*KNOWN, *METHODS, *names]))
    return sorted(names, key=order.index)


def meaning(name: str, record: dict) -> str:
    """What a model is, in words, by the name of its folder and its record."""
    settings = record.get("settings", {})
    kind = settings.get("method", "")
    if settings.get("pro"):
        words = OTHERS["toss-pro"]
    elif kind in METHODS:
        words = METHODS[kind].about
    elif kind in OTHERS or name in OTHERS:
        words = OTHERS[kind or name]
    else:
        words = f"the method {kind}" if kind else "made elsewhere"
    if "discard" in settings:
        words += f"; d = {settings['discard']:g}"
    return words


# Models and records


def run_of(args, *omitted: str) -> Run:
    """The Run that a command's flags name, with its device flags but these."""
    options = {name: getattr(args, name, None) for name in DEVICE if name not in omitted}
    return open_run(args.run, **options)


def opened(args, *first: str) -> tuple[Run, list[str]]:
    """The Run that a command's flags name, and the methods: those of --methods, else `first` and
    all of the run."""
    run = run_of(args)
    if args.methods:
        return run, args.methods.split(",")
    return run, [*first, *methods_of(run)]


def methods_of(run: Run, file: str = "model") -> list[str]:
    """The methods that have a model, or another file, in alphabetical order."""
    return sorted(path.parent.name for path in run.folder.glob(f"methods/[!.]*/{file}"))


def record_of(run: Run, method: str) -> Record:
    """The record of a method's model, whose settings also say how its mask was chosen; {} if it
    has none."""
    record = read_record(run.path(f"methods/{method}/model"))
    selection = run.path(f"methods/{method}/selection")
    if record and selection.exists():
        chosen = read_record(selection)["settings"]
        record = {**record, "settings": {**chosen, **record["settings"]}}
    return record


def records_of(run: Run, methods: Iterable[str]) -> dict[str, Record]:
    """The record of each of these methods, without those that have none."""
    records = {}
    for method in methods:
        if method != "base" and record_of(run, method):
            records[method] = record_of(run, method)
    return records


def results_of(run: Run) -> dict[str, Record]:
    """The record of each result of a run, the references and the scores first."""
    names = [*REFERENCES, "scores"]
    for pattern in ("selection.safetensors", "round-*/[!.]*", "model"):
        for path in sorted(run.folder.glob(f"methods/[!.]*/{pattern}")):
            names.append(path.relative_to(run.folder).as_posix().removesuffix(".safetensors"))
    return {name: read_record(run.path(name)) for name in names if run.path(name).exists()}


def costs_of(run: Run) -> dict[str, dict]:
    """What each result has cost: its last line in log/costs.jsonl."""
    return {line["stage"]: line for line in read_log(run.folder / "log" / "costs.jsonl")}


def numbers_of(run: Run, name: str) -> dict[str, float]:
    """What a method costs, and its d where it has one: by measure."""
    numbers = cost_of(run, name)
    settings = records_of(run, [name]).get(name, {}).get("settings", {})
    if "discard" in settings:
        numbers["discard"] = settings["discard"]
    return numbers


def cost_of(run: Run, name: str) -> dict[str, float]:
    """What a method costs, starting from the base: seconds, tokens trained or scored, peak memory.

    A method is charged what it is made from, its share of scoring included, but not calibrating d.
    A mask from another run is charged its fine-tuning alone. {} for the base, and where the cost of
    a part is not known.
    """
    results = results_of(run)
    costs = costs_of(run)
    kind = records_of(run, [name]).get(name, {}).get("settings", {}).get("method")
    method = METHODS.get(kind, METHODS["toss"])  # a rival needs both
    cost = dict.fromkeys(NUMBERS, 0.0)
    parts = [f"methods/{name}/model"]
    for part in parts:  # it grows by what each is made from
        if not set(NUMBERS) <= costs.get(part, {}).keys():
            return {}
        share = 1.0
        if part == "scores":
            scored = len(load_tensors(run.path(part)).keys() & LOSSES)
            share = len(method.losses) / scored
        cost["seconds"] += costs[part]["seconds"] * share
        cost["tokens"] += costs[part]["tokens"] * share
        cost["peak_memory_gib"] = max(cost["peak_memory_gib"], costs[part]["peak_memory_gib"])
        for source in results.get(part, {}).get("inputs", {}):
            unused = source in REFERENCES and source not in method.losses
            if source in results and not unused and source not in parts:
                parts.append(source)
    return cost


def demo_words(run: Run) -> list[str]:
    """The forbidden words of the embedded world, where the run is of its rows."""
    return run.args.settings.get("forbidden_words", [])


def sources_of(run: Run) -> list[str]:
    """The source of each scored row, from the custom file; none if the file is gone.

    Call run.losses() before: it refuses a file with other rows than those that were scored.
    """
    path = run.source("--custom")
    return [row.source for row in read_rows(path)] if path.is_file() else []


def losses_under(
    run: Run,
    tokens: Tokens,
    dtype: str = "score",
    models: Sequence[str] = ("utility", "degraded"),
) -> dict[str, Tensor]:
    """The losses of tokens under models of a run, "base" among them: float32 [N] each.

    dtype: see Run.base.
    """
    losses = {}
    for name in models:
        model = use(run.base(dtype), run.adapter(name))
        losses[name] = score(model, tokens, run.batch_tokens, Progress(f"{name}, {run.loaded}"))
    return losses


# Files


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [item for _, item in json_lines(Path(path))]


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, and the folders that it is in."""
    with whole(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: str | Path, items: Iterable[dict]) -> str:
    """Write a JSONL file; returns its path."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    write_text(path, "".join(lines))
    return str(path)
