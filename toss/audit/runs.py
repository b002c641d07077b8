"""What the audit reads of a run: its models, records and costs; and the methods' words."""

import json
from argparse import Namespace
from collections.abc import Iterable
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
KNOWN = ("base", "sft", "toss", "toss-pro")  # folders that tables and the page show first


def by_importance(names: Iterable[str]) -> list[str]:
    """The best known models first, then the methods in the order of the registry, then others by
    name."""
    names = sorted(names)
    order = [*KNOWN, *METHODS, *names]
    return sorted(names, key=order.index)


def meaning(record: Record) -> str:
    """What a method is, in words."""
    settings = record["settings"]
    kind = settings.get("method", "")
    words = METHODS[kind].about if kind in METHODS else f"the method {kind}"
    if settings.get("pro"):
        words += f", theta^h refined over {settings['pro']} rounds"
    if "discard" in settings:
        words += f"; d = {settings['discard']:g}"
    return words


# Models and records


def run_of(args: Namespace) -> Run:
    """The Run that a command's flags name, with its device flags."""
    options = {name: getattr(args, name, None) for name in DEVICE}
    return open_run(args.run, **options)


def methods_of(run: Run) -> list[str]:
    """The methods that have a model, in alphabetical order."""
    models = run.folder.glob("methods/[!.]*/model")
    return sorted(model.parent.name for model in models)


def record_of(run: Run, method: str) -> Record:
    """The record of a method's model, whose settings also say how its mask was chosen; {} if it
    has none."""
    record = read_record(run.path(f"methods/{method}/model"))
    selection = run.path(f"methods/{method}/selection")
    if record and selection.exists():
        chosen = read_record(selection)["settings"]
        record["settings"] = chosen | record["settings"]
    return record


def records_of(run: Run, methods: Iterable[str]) -> dict[str, Record]:
    """The record of each of these methods, without those that have none."""
    records = {}
    for method in methods:
        record = record_of(run, method)
        if record:
            records[method] = record
    return records


def costs_of(run: Run) -> dict[str, dict]:
    """What each result has cost: its last line in log/costs.jsonl."""
    lines = read_log(run.folder / "log" / "costs.jsonl")
    return {line["stage"]: line for line in lines}


def cost_of(run: Run, name: str) -> dict[str, float]:
    """What a method costs, starting from the base: seconds, tokens trained or scored, peak memory.

    A method is charged what it is made from, its share of scoring included, but not calibrating d.
    A mask from another run is charged its fine-tuning alone. {} for the base, and where the cost of
    a part is not known.
    """
    costs = costs_of(run)
    kind = record_of(run, name).get("settings", {}).get("method")
    method = METHODS.get(kind, METHODS["toss"])  # a rival needs both
    cost = {"seconds": 0.0, "tokens": 0.0, "peak_memory_gib": 0.0}
    parts = [f"methods/{name}/model"]
    for part in parts:  # it grows by what each is made from
        if part not in costs:
            return {}
        share = 1.0
        if part == "scores":
            passes = [key for key in load_tensors(run.path(part)) if key.startswith("loss_")]
            share = len(method.losses) / len(passes)
        line = costs[part]
        cost["seconds"] += line["seconds"] * share
        cost["tokens"] += line["tokens"] * share
        cost["peak_memory_gib"] = max(cost["peak_memory_gib"], line["peak_memory_gib"])
        for source in read_record(run.path(part)).get("inputs", {}):
            if source in REFERENCES and source not in method.losses:
                continue
            if run.path(source).exists() and source not in parts:  # no file of rows
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
    if not path.is_file():
        return []
    return [row.source for row in read_rows(path)]


def S_under(run: Run, tokens: Tokens, dtype: str = "score", reference: str = "utility") -> Tensor:
    """L^u - L^h of tokens under the models of a run, float32 [N].

    dtype: see Run.base. reference: whose losses come first, "utility" or "base".
    """
    losses = []
    for name in (reference, "degraded"):
        model = use(run.base(dtype), run.adapter(name))
        watch = Progress(f"{name}, {run.loaded}")
        losses.append(score(model, tokens, run.batch_tokens, watch))
    return losses[0] - losses[1]


# Files


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [item for _, item in json_lines(Path(path))]


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, and the folders that it is in."""
    with whole(path) as file:
        file.write_text(text, encoding="utf-8")


def write_jsonl(path: str | Path, items: Iterable[dict]) -> str:
    """Write a JSONL file; returns its path."""
    lines = []
    for item in items:
        line = json.dumps(item, ensure_ascii=False)
        lines.append(f"{line}\n")
    write_text(path, "".join(lines))
    return str(path)
