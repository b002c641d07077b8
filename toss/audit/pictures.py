"""The experiments' pictures: functions of a summary (tables.py) that return SVG, "" for none."""

from toss.audit.figures import line_chart
from toss.audit.tables import HEADS, PREFILL, Summary, cell

DRAWN = "sft toss soft-sft kl-discarded pact-lite patch first-5 safeinstr".split()
SHARES = (0.0, 1.0)


def point(x: float, entry: dict) -> tuple[float, float, float, float]:
    """A point of line_chart: the mean at x, and the range over the seeds."""
    return (x, entry["mean"], entry["least"], entry["most"])


def over_prefill(summary: Summary) -> str:
    """Harm over the number of tokens of the answer that are written already, a line per method."""
    lines = {}
    for (_, arm), row in summary.items():
        if arm in DRAWN and all(f"forbidden@{k}" in row for k in PREFILL):
            lines[arm] = [point(k, row[f"forbidden@{k}"]) for k in PREFILL]
    if not lines:
        return ""
    x_label = "tokens of a harmful answer already written"
    return line_chart(lines, "Answers that are begun", x_label, "forbidden", SHARES)


def over_share(summary: Summary) -> str:
    """Harm over the share of harmful rows, a line per arm."""
    lines = {}
    for (share, arm), row in summary.items():
        lines.setdefault(arm, []).append(point(share, row["forbidden/held-out"]))
    return line_chart(lines, "Sweep: share", "harmful rows, %", "forbidden", SHARES)


def over_discard(summary: Summary) -> str:
    """Measures of toss over d, a line each."""
    lines = {}
    title = "toss over d"
    for (d, _), row in summary.items():
        if d == "calibrated":
            title += f" (calibrated: {cell(row['discard'])})"
            continue
        for measure in (
            "forbidden/held-out",
            "refusals_kept",
            "accuracy/benign-rows",
            "accuracy/harmful-rows",
        ):
            lines.setdefault(HEADS[measure], []).append(point(d, row[measure]))
    return line_chart(lines, title, "d", "share", SHARES)


def over_added_rows(summary: Summary) -> str:
    """One round of TOSS-Pro over k: harm for the smallest D^h, lost facts for the largest."""
    lines = {}
    for size, measure in ((2, "forbidden/held-out"), (80, "accuracy/harmful-rows")):
        for learnt, words in (("rows", "whole rows"), ("top", "top tokens")):
            arms = {"toss": 0}
            for k in (10, 40, 120):
                arms[f"pro-1-{k}-{learnt}"] = k
            points = []
            for arm, k in arms.items():
                if (size, arm) in summary:
                    points.append(point(k, summary[size, arm][measure]))
            if points:
                lines[f"{HEADS[measure]}, D^h of {size}: {words}"] = points
    x_label = "k, the rows added (0: toss)"
    return line_chart(lines, "One round of TOSS-Pro", x_label, "share", SHARES)


def side_by_side(title: str, measure: str, summary: Summary) -> str:
    """A measure of each arm at each variant of the rows, as dots."""
    variants = list(dict.fromkeys(variant for variant, _ in summary))
    dots = {}
    for (variant, arm), row in summary.items():
        if measure in row:
            dots.setdefault(arm, []).append(point(variants.index(variant), row[measure]))
    return line_chart(dots, title, "", HEADS[measure], SHARES, variants)
