"""What run.json reports of the stages of a run, checked: anybody may have edited the file."""

from model.io import InputError

NUMBERS = ("seconds", "tokens", "rows", "peak_memory_gib", "threads")


def stages_of(run) -> dict[str, dict]:
    """{stage: {"recipe", "seconds", "tokens", ...}}, as toss.workbench writes it.

    Any of them may be missing. Raises InputError naming the file for a value of another type.
    """
    section = run.runfile.section
    for stage in section("stages"):
        section("stages", stage, "recipe", "settings")
        section("stages", stage, "recipe", "inputs")
        check(run, stage, section("stages", stage))
    return section("stages")


def check(run, where: str, cost: dict) -> None:
    """Raise InputError unless a cost is of numbers, and its version of torch a text."""
    for name in NUMBERS:
        if type(cost.get(name, 0)) not in (int, float):
            raise InputError(f"{run.runfile.file}: {where}: {name} is not a number")
    if type(cost.get("torch", "")) is not str:
        raise InputError(f"{run.runfile.file}: {where}: torch is not a text")
