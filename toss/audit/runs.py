"""What the audit reads of a run directory: its models, records and costs; and the methods' words.

The only module of the audit that knows run.json.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from model.io import json_lines, read_json, whole_file
from model.lora import use
from toss.methods import METHODS
from toss.rows import read_rows
from toss.scoring import score
from toss.tokens import Tokens
from toss.workbench import flags
from toss.workbench.results import read_record
from toss.workbench.run import Run, open_run

DEVICE = ("device", "dtype", "threads", "batch_tokens", "shard")  # flags of a Run
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


def records_of(run: Run, methods: Iterable[str]) -> dict[str, dict]:
    """The record of each of these methods, without those that have none."""
    records = {}
    for method in methods:
        record = read_record(run.folder / "methods" / method)
        if record and "mask_only" not in record["settings"]:  # then the model is from elsewhere
            records[method] = record
    return records


def stages_of(run: Run) -> dict[str, dict]:
    """What is known of how each result was made: {result: {"recipe", "seconds", "tokens", ...}}."""
    return run.runfile.section("stages")


def about(run: Run) -> dict:
    """What run.json says of the code and the files: "commit", "versions" and "inputs"."""
    content = run.runfile.content
    return {
        "commit": content.get("commit") or "unknown",
        "versions": content.get("versions", {}),
        "inputs": content.get("inputs", {}),
    }


def numbers_of(run: Run, name: str) -> dict[str, float]:
    """What a method costs, and its d where it has one: by measure."""
    numbers = cost_of(run, name)
    record = records_of(run, [name]).get(name, {})
    if "discard" in record.get("settings", {}):
        numbers["discard"] = record["settings"]["discard"]
    return numbers


def cost_of(run: Run, name: str) -> dict[str, float]:
    """What a method costs, starting from the base: seconds, tokens trained or scored, peak memory.

    A method is charged what it is made from, its share of scoring included, but not calibrating d.
    A mask from another run is charged its fine-tuning alone. {} for the base, and where the cost of
    a part is not known.
    """
    stages = stages_of(run)
    stage = stages.get(f"methods/{name}", {})
    recipe = stage.get("recipe", {})
    if not {"settings", "inputs"} <= recipe.keys():
        return {}
    method = METHODS.get(recipe["settings"].get("method"), METHODS["toss"])  # a rival needs both
    parts = [(stage, 1.0)]
    for source in recipe["inputs"]:
        part = stages.get(source, {})
        if source == "scores":
            with_base = part.get("recipe", {}).get("settings", {}).get("base", False)
            parts.append((part, len(method.losses) / (2 + with_base)))
        elif source in method.losses or source.startswith("methods/"):
            parts.append((part, 1.0))
    cost = dict.fromkeys(NUMBERS, 0.0)
    for part, share in parts:
        if not set(NUMBERS) <= part.keys():
            return {}
        cost["seconds"] += part["seconds"] * share
        cost["tokens"] += part["tokens"] * share
        cost["peak_memory_gib"] = max(cost["peak_memory_gib"], part["peak_memory_gib"])
    return cost


def demo_words(run: Run) -> list[str]:
    """The forbidden words of the embedded world, where the run is of its rows."""
    return read_json(flags.DEMO)["forbidden_words"] if run.args.demo else []


def sources_of(run: Run) -> list[str]:
    """The source of each scored row, from the custom file; none if the file is gone.

    Call run.scored() before: it refuses a file with other rows than those that were scored.
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
        progress = run.progress(f"{name}, {run.loaded}")
        losses[name] = score(model, tokens, run.batch_tokens, on_batch=progress.report)
    return losses


# Files


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [item for _, item in json_lines(Path(path))]


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, and the folders that it is in."""
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: str | Path, items: Iterable[dict]) -> str:
    """Write a JSONL file; returns its path."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    write_text(path, "".join(lines))
    return str(path)
