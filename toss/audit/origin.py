"""What was dropped? First of all: what is this file, what was it made from, does it fit the run?"""

from dataclasses import dataclass, field
from pathlib import Path

from model.checkpoint import base_hash, layout, skeleton
from model.io import InputError, load_tensors, made_from, read_json
from model.peft import CONFIG, WEIGHTS, read_adapter
from toss.audit.characters import harmless
from toss.workbench.files import fingerprint
from toss.workbench.results import RECORD, Hashes, inspect
from toss.workbench.run import Run, open_run

INSIDE = ("run.json", RECORD, "config.json", CONFIG, "model.safetensors", WEIGHTS)  # of a folder
ADAPTER = ("r", "lora_alpha", "use_rslora", "target_modules")  # shown of its configuration
NOT_SHOWN = ("inputs", "warning", "files", "sha256", "code")  # of a record


@dataclass
class Origin:
    """What a path is."""

    title: str
    lines: dict = field(default_factory=dict)  # to print, by label
    record: dict = field(default_factory=dict)  # of what it was made from
    misfits: list[str] = field(default_factory=list)  # labels of what does not fit the run


def show_path(given: Path, folder: str | None) -> int:
    """Print what a path is, what it was made from, and whether it fits; returns the exit status."""
    if not given.exists():
        raise InputError(f"{given}: there is no such file or folder")
    path = given.parent if given.name in INSIDE else given
    # The run to compare with: --run, or the folder around the path that is one.
    around = [place for place in (path, *path.absolute().parents) if (place / "run.json").is_file()]
    if around and around[0] == path:
        if folder and Path(folder).resolve() != path.resolve():
            raise InputError(f"{given} is a run, which is compared with itself: omit --run")
        folder = path
    home = folder or next(iter(around), None)
    # What the path is, and where it differs from what the run holds now.
    run = open_run(home) if home else None
    origin = origin_of(path, run)
    origin.lines |= recorded(origin.record)
    if run:
        identity = run.identity
        changed = misfits(origin.record, run)
        for name in changed:
            present = identity[name] if name in identity else run.input_hash(name)
            origin.lines[name] = f"{origin.lines.get(name)}, but the run has {present}"
        origin.misfits = changed + origin.misfits
    print(harmless(f"{path}: {origin.title}"))
    for name, value in origin.lines.items():
        print(harmless(f"  {name:<20}  {' '.join(str(value).split())}"))
    if origin.misfits:
        print(harmless(f"{given}: does not fit {run.folder}: {', '.join(origin.misfits)}"))
        return 2
    if run:
        print(harmless(f"{given}: fits"))
    return 0


def origin_of(path: Path, run: Run | None) -> Origin:
    """Raises InputError if the path is nothing known or cannot be read."""
    if path.suffix in (".jsonl", ".json"):
        what = "rows are no result of a run"
        raise InputError(f"{path}: {what}; for a tokenised file give --file {path} --model M")
    if (path / "run.json").is_file():
        return origin_of_run(run)
    if (path / WEIGHTS).is_file():
        return origin_of_adapter(path, run)
    if (path / "config.json").is_file():
        model = skeleton(path)
        layout(path, model)  # reads the headers, so that a file that was cut off is noticed
        count = sum(weight.numel() for weight in model.parameters())
        # Only a checkpoint that select.py --merge made has a record.
        record = whole_record(path) or {"base_sha256": base_hash(path)}
        return Origin("a checkpoint", {"parameters": f"{count:,}"}, record)
    record = whole_record(path)
    if not record:
        raise InputError(f"{path}: no run directory, adapter or checkpoint, and no result of a run")
    if "stage" not in record:
        origin = Origin("a mask of another program", record=record)
        if run:
            compare_tokens(origin, run)
        return origin
    return Origin(f"the result of the stage {record['stage']}", record=record)


def compare_tokens(origin: Origin, run: Run) -> None:
    """Note whether a mask is over the token ids of the run's custom set."""
    try:
        tokens, _ = run.scored(needed=False)
    except InputError as error:
        origin.lines["tokens"] = f"not compared: {error}"
        return
    if origin.record.get("tokens_sha256") != fingerprint(tokens):
        origin.lines["tokens"] = "other ids than those of the run's custom set"
        origin.misfits.append("tokens")


def whole_record(path: Path) -> dict:
    """The record of a result, {} if it has none. Raises InputError if the result was changed."""
    if not path.exists():
        return {}
    record, problem = inspect(path, Hashes({}))
    if problem:
        raise InputError(f"{path} is damaged or incomplete ({problem})")
    return record


def origin_of_run(run: Run) -> Origin:
    """A run directory; of each stage, whether it was made from what the run holds now."""
    origin = Origin("a run directory")
    for stage in run.stages():
        origin.lines[stage] = "fits"
        try:
            run.check(stage)
        except InputError as error:
            origin.lines[stage] = str(error)
            origin.misfits.append(stage)
    return origin


def origin_of_adapter(path: Path, run: Run | None) -> Origin:
    """An adapter; in a run it must fit the base's shapes."""
    config = read_json(path / CONFIG)
    lines = {name: config[name] for name in ADAPTER if config.get(name)}
    load_tensors(path / WEIGHTS)  # checks its digest
    record = made_from(path / WEIGHTS)
    origin = Origin(
        "a LoRA adapter" if record else "a LoRA adapter without a record", lines, record
    )
    if run:
        try:
            read_adapter(skeleton(run.checkpoint), path)
        except InputError as error:
            lines["loading"] = f"refused: {error}"
            origin.misfits.append("loading")
    return origin


def recorded(record: dict) -> dict:
    """The lines about a record: what it holds, its settings, and its inputs one by one."""
    lines = {}
    for name, value in record.items():
        if name == "settings":
            value = ", ".join(f"{setting} {given}" for setting, given in value.items())
        if value and name not in NOT_SHOWN:
            lines[name] = value
    return lines | record.get("inputs", {})


def misfits(record: dict, run: Run) -> list[str]:
    """What a record names and the run holds otherwise: inputs, base, prompt form."""
    identity = run.identity
    changed = [name for name in identity if record.get(name, identity[name]) != identity[name]]
    return [*changed, *run.changed_inputs(record)]
