"""Does it still refuse? Differences of two models on the same prompts: RUN/paired.json.

Two models answer the same prompts, so a difference is known better than either value: intervals of
the values that overlap do not say that the models are alike.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from model.io import InputError, read_json
from toss.audit.command import markdown, write_json

AGAINST = ("sft", "base")
OF_USE = ("accuracy", "final_number")
Paired = dict[str, dict[str, dict[str, dict]]]  # {method: {measure: {other: difference}}}


def paired_differences(evaluations: dict[str, dict], methods: Iterable[str]) -> Paired:
    """The difference of each measure of each method to sft and to the base, a cell each.

    evaluations: by method, see evaluate.evaluation. Only what was asked of both is compared. The
    sources of the intervals: measures.paired_share and measures.mean_loss.
    """
    import torch

    from toss.audit.measures import by_measure, paired_loss, paired_share

    outcomes = {}
    for method in methods:
        lines = [line for line in evaluations[method]["lines"] if "outcomes" in line]
        outcomes[method] = by_measure(lines)

    differences: Paired = {}
    for method in methods:
        cells = differences.setdefault(method, {})
        for other in AGAINST:
            if other == method or other not in outcomes:
                continue
            for measure, answers in outcomes[method].items():
                others = outcomes[other].get(measure, {})
                if answers and answers.keys() == others.keys():
                    cells.setdefault(measure, {})[other] = paired_share(answers, others)
            sums, counts = evaluations[method]["losses"]
            other_sums, other_counts = evaluations[other]["losses"]
            if counts and counts == other_counts:
                tensors = [torch.tensor(values).double() for values in (sums, other_sums, counts)]
                cells.setdefault("nll", {})[other] = paired_loss(*tensors)
    return differences


def write_paired(folder: Path, differences: Paired) -> None:
    """Write FOLDER/paired.json."""
    write_json(folder / "paired.json", differences)


def read_paired(folder: Path) -> Paired:
    """FOLDER/paired.json, {} if there is none. Raises InputError if it has another form."""
    file = folder / "paired.json"
    if not file.exists():
        return {}
    differences = read_json(file)
    try:
        for cells in differences.values():
            for others in cells.values():
                for cell in others.values():
                    if cell.keys() != {"value", "n", "low", "high"}:
                        raise TypeError("a difference has other keys")
    except (AttributeError, TypeError) as error:
        raise InputError(f"{file}: not as toss.audit.evaluate writes it ({error})") from None
    return differences


def paired_table(
    differences: Paired, methods: Iterable[str], other: str, wanted: Sequence[str] = ()
) -> str:
    """The differences of methods to another one as Markdown; "" if there are none.

    A star marks an interval without 0. wanted: measures; without it all but those after a prefill
    and those by source, of which only OF_USE are shown.
    """
    shown = [method for method in methods if differences.get(method)]
    measures = {}
    for method in shown:
        for measure, others in differences[method].items():
            kind, _, source = measure.partition("/")
            common = "@" not in measure and (not source or kind in OF_USE)
            chosen = measure in wanted if wanted else common
            if other in others and chosen:
                measures.setdefault(measure, {})[method] = others[other]
    columns = [method for method in shown if any(method in row for row in measures.values())]
    lines = []
    for measure, row in measures.items():
        lines.append([measure, *(difference_text(row.get(method)) for method in columns)])
    return markdown([f"minus {other}", *columns], lines) if lines else ""


def difference_text(cell: dict | None) -> str:
    """A difference with its interval; a star if that excludes 0."""
    if cell is None or cell["value"] is None:
        return "-"
    value = f"{cell['value']:+.3f}"
    if cell["low"] is None:
        return value
    star = "*" if cell["low"] > 0 or cell["high"] < 0 else ""
    return f"{value} [{cell['low']:+.3f}, {cell['high']:+.3f}]{star}"
