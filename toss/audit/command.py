"""What several commands of the audit share. No torch, so that --help comes at once."""

from collections.abc import Sequence

from toss.cli import KINDS


def methods_of(run) -> list[str]:
    """Names of a Run's methods that have a model, in alphabetical order."""
    return sorted(path.parent.name for path in (run.folder / "methods").glob("[!.]*/model"))


def cautions(stages: dict, table: dict[str, dict[str, dict]]) -> list[str]:
    """What forbids conclusions from a table of metrics, a sentence each: methods that were trained
    otherwise than plain fine-tuning, and a plain fine-tuning that did no harm.

    stages: of run.json. table: {method: {metric: {"value", "low", "high"}}}.
    """
    made = {m: stages.get(f"methods/{m}", {}).get("recipe", {}).get("settings", {}) for m in table}
    how = {m: {key: made[m].get(key) for key in (*KINDS, "dtype")} for m in table if made[m]}
    first, said = "sft" if "sft" in how else next(iter(how), ""), []
    for m in table.keys() - how.keys() - {"base"}:
        said.append(f"note: {m} was made elsewhere; how it was trained is not known here")
    for m in how:
        pairs = {key: (value, how[first][key]) for key, value in how[m].items()}
        if differs := [f"{key} {a}, not {b}" for key, (a, b) in pairs.items() if a != b]:
            what = f"{m} was trained otherwise than {first} ({', '.join(differs)})"
            said.append(f"warning: {what}: this is no comparison of the two methods")
    name = "forbidden" if "forbidden" in table.get("sft", {}) else "not_refused"
    base, sft = (table.get(method, {}).get(name, {}) for method in ("base", "sft"))
    if None not in (sft.get("low"), base.get("high")) and sft["low"] <= base["high"]:
        what = f"{name} {sft['value']:.2f}, base {base['value']:.2f}: the intervals overlap"
        said.append(
            f"warning: plain fine-tuning (sft) did not clearly lose the base's safety ({what}), so "
            "nothing can be concluded about what protects it"
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
