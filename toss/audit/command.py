"""What several commands of the audit share. No torch, so that --help comes at once."""

from collections.abc import Sequence


def methods_of(run) -> list[str]:
    """Names of a Run's methods that have a model, in alphabetical order."""
    return sorted(path.parent.name for path in (run.folder / "methods").glob("[!.]*/model"))


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
