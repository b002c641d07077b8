"""What run.json reports of the stages of a run, checked: anybody may have edited the file."""

from typing import Any

from model.io import InputError

NUMBERS = ("seconds", "tokens", "rows", "peak_memory_gib", "threads")


def stages_of(run) -> dict[str, dict[str, Any]]:
    """{stage: {"recipe", "seconds", "tokens", ...}}, as toss.workbench writes it.

    Any of them may be missing. Raises InputError naming the file for a value of another type.
    """
    stages = run.runfile.section("stages")
    for stage in stages:
        entry = run.runfile.section("stages", stage)
        for name in ("settings", "inputs"):
            run.runfile.section("stages", stage, "recipe", name)
        parts = run.runfile.section("stages", stage, "parts")
        for part in parts:
            check(run, f"{stage}: {part}", run.runfile.section("stages", stage, "parts", part))
        check(run, stage, entry)
    return stages


def check(run, where: str, cost: dict[str, Any]) -> None:
    """Raise InputError unless a cost is of numbers, and its version of torch a text."""
    for name in NUMBERS:
        if type(cost.get(name, 0)) not in (int, float):
            raise InputError(f"{run.runfile.file}: {where}: {name} is not a number")
    if type(cost.get("torch", "")) is not str:
        raise InputError(f"{run.runfile.file}: {where}: torch is not a text")
