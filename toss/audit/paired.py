"""Does it still refuse? Differences of two models on the same prompts: RUN/paired.json.

Two models answer the same prompts, so a difference is known better than either value: intervals of
the values that overlap do not say that the models are alike.
"""

from collections.abc import Iterable

from toss.audit.command import cell_text, is_part, markdown

AGAINST = ("sft", "base")


def paired_differences(evaluations: dict[str, dict], methods: Iterable[str]) -> dict[str, dict]:
    """The difference of each measure of each method to sft and to the base, a cell each:
    {method: {measure: {other: cell}}}.

    evaluations: by method, see evaluate.read_evaluation. Only what was asked of both is compared.
    The sources of the intervals: measures.paired_share and measures.mean_loss.
    """
    import torch

    from toss.audit.measures import by_measure, paired_loss, paired_share

    outcomes = {method: by_measure(evaluations[method]["lines"]) for method in methods}
    differences = {}
    for method in methods:
        cells = {}
        differences[method] = cells
        for other in AGAINST:
            if other == method or other not in outcomes:
                continue
            # Shares of prompts, then the mean loss: where both models were asked the same.
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


def paired_tables(differences: dict[str, dict], methods: Iterable[str]) -> dict[str, tuple]:
    """Header and lines of a table of the methods' differences to each of AGAINST, if there are any.

    Measures by source beside the whole, and after a prefill, are left out.
    """
    tables = {}
    for other in AGAINST:
        columns = [method for method in methods if method != other and differences.get(method)]
        measures = {}
        for method in columns:
            measures |= differences[method]
        lines = []
        for measure in measures:
            cells = [differences[method].get(measure, {}).get(other) for method in columns]
            if any(cells) and not is_part(measure, measures):
                lines.append([measure, *(cell_text(cell, "+") for cell in cells)])
        if lines:
            tables[other] = ([f"minus {other}", *columns], lines)
    return tables


def paired_text(differences: dict[str, dict], methods: Iterable[str]) -> str:
    """These tables as Markdown."""
    text = ""
    for table in paired_tables(differences, methods).values():
        heading = "On the same prompts; * = the 95 % interval excludes 0"
        text += f"\n{heading}\n\n{markdown(*table)}\n"
    return text
