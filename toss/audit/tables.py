"""Results of experiments, a line each; their summary over seeds; and the tables that show it."""

import csv
import io
import json
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from toss.audit.command import markdown, write_text

# The heads of the tables' columns, where they are not the names of the measures.
HEADS = {
    "forbidden/held-out": "forbidden",
    "refusals_kept": "refusals kept",
    "over_refusal": "over-refusal",
    "accuracy/benign-rows": "benign facts",
    "accuracy/harmful-rows": "harmful-row facts",
    "auc": "AUC",
    "seconds_to_sft": "x sft",
    "tokens_to_sft": "x sft",
    "peak_memory_gib": "peak GiB",
    "discard": "d",
    "harmful_share": "harmful tokens",
    "forbidden/identity": "forbidden, asked as persona",
    "purity": "added rows with harm",
    "shared": "shared with own toss",
}
PREFILL = (0, 1, 3, 5, 10)  # tokens of a harmful answer that are written already
SWEPT = (
    "discard harmful_share forbidden/held-out refusals_kept accuracy/benign-rows "
    "accuracy/harmful-rows nll precision recall forbidden/identity forbidden@1"
).split()
COSTS = ["seconds", "seconds_to_sft", "tokens", "tokens_to_sft", "peak_memory_gib"]


class Result(NamedTuple):
    """One number: a line of an experiment's CSV file."""

    seed: int
    variant: object  # of the data: a text or a number, "" where all arms have the same
    arm: str
    measure: str
    value: float


# {(variant, arm): {measure: {"mean", "least", "most", "seeds"}}}
Summary = dict[tuple[object, str], dict[str, dict]]


def results_of(seed: int, variant: object, arm: str, measures: dict) -> list[Result]:
    """A Result for each measure that has a value."""
    results = []
    for measure, value in measures.items():
        if value is not None:
            results.append(Result(seed, variant, arm, measure, value))
    return results


def with_ratios(results: list[Result]) -> list[Result]:
    """The results, and each cost as a multiple of that of sft with the same seed and label."""
    plain = {}
    for result in results:
        if result.arm == "sft":
            plain[result.seed, result.variant, result.measure] = result.value
    ratios = []
    for result in results:
        cost = plain.get((result.seed, result.variant, result.measure))
        if f"{result.measure}_to_sft" in COSTS and cost:
            measure = f"{result.measure}_to_sft"
            ratios.append(result._replace(measure=measure, value=result.value / cost))
    return results + ratios


def summarise(results: list[Result]) -> Summary:
    """Mean, least and most of each measure over the seeds; the variants in their first order."""
    values = {}
    for result in results:
        row = values.setdefault((result.variant, result.arm), {})
        row.setdefault(result.measure, []).append(result.value)

    variants = list(dict.fromkeys(variant for variant, _ in values))
    summary = {}
    for key in sorted(values, key=lambda key: variants.index(key[0])):
        summary[key] = {}
        for measure, numbers in values[key].items():
            summary[key][measure] = {
                "mean": round(statistics.fmean(numbers), 4),
                "least": min(numbers),
                "most": max(numbers),
                "seeds": len(numbers),
            }
    return summary


def cell(entry: dict | None, measure: str = "") -> str:
    """A summary as text: the mean, and the range where the seeds differ."""
    if entry is None:
        return "-"
    if measure in ("seconds", "tokens"):
        return f"{entry['mean']:,.0f}"
    digits = 3 if measure in ("nll", "discard") else 2
    mean = f"{entry['mean']:.{digits}f}"
    least = f"{entry['least']:.{digits}f}"
    most = f"{entry['most']:.{digits}f}"
    return mean if least == most else f"{mean} [{least}, {most}]"


def table(summary: Summary, columns: Iterable[str], heading: str = "") -> str:
    """Markdown: a line per variant and arm, without those that have none of the columns.

    columns: measures; NAME/* stands for all that begin so, and for NAME where there are none. Those
    that nobody has are left out. heading: what the variants are; "": there is one.
    """
    measured = {measure for row in summary.values() for measure in row}
    names = []
    for column in columns:
        if column.endswith("/*"):
            several = sorted(name for name in measured if name.startswith(column[:-1]))
            names += several or [column[:-2]]
        else:
            names.append(column)
    names = [name for name in names if name in measured]

    lines = []
    for (variant, arm), row in summary.items():
        labels = [variant, arm] if heading else [arm]
        if row.keys() & set(names):
            lines.append(labels + [cell(row.get(name), name) for name in names])
    corner = [heading, ""] if heading else [""]
    heads = [HEADS.get(name, name) for name in names]
    return markdown(corner + heads, lines) if lines else ""


def tables(
    summary: Summary,
    groups: Iterable[Sequence[str]],
    heading: str = "",
    legend: Sequence[str] = (),
) -> str:
    """A table for each group of columns that somebody has, and a legend."""
    texts = [table(summary, columns, heading) for columns in groups]
    texts.append("\n".join(legend))
    return "\n\n".join(text for text in texts if text)


def as_csv(results: list[Result]) -> str:
    """The results as CSV, with a head."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Result._fields)
    writer.writerows(results)
    return file.getvalue()


def hardware(device: str = "auto", threads: int | None = None) -> str:
    """The name of the GPU that is used, or of the CPU with the number of threads."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if device == "auto" else device)
    about = Path("/proc/cpuinfo")  # Linux
    text = about.read_text(encoding="utf-8") if about.exists() else ""
    # A model's name alone may be no more than "AMD EPYC".
    facts = re.findall(r"^(?:cpu family|model|model name)\s*:.*", text, re.MULTILINE)[:3]
    name = re.sub(r"\s*:", "", ", ".join(facts)) or platform.machine()
    return f"{name}, CPU threads: {threads or torch.get_num_threads()}"


def save(path: Path, text: str, record: dict) -> None:
    """Write PATH.md with the text, and PATH.json with the numbers and where they come from."""
    from toss.workbench.runfile import git_commit

    about = {"commit": git_commit(), "hardware": hardware()}
    write_text(path.with_suffix(".json"), json.dumps({**about, **record}, indent=1) + "\n")
    write_text(path.with_suffix(".md"), f"{text}\n")
    written(path)


def written(path: Path) -> None:
    """Say which files PATH.* there are."""
    files = sorted(str(file) for file in path.parent.glob(f"{path.name}.*"))
    print("written:", ", ".join(files))
