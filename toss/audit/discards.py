"""What was dropped? The discards of each mask, counted by kind of token and of row."""

import sys
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from toss.audit.tokens import Mask, count_by_row
from toss.tokens import Tokens

# name -> its first response position, and the first behind it
POSITIONS = {
    "0": (0, 1),
    "1": (1, 2),
    "2-3": (2, 4),
    "4-7": (4, 8),
    "8-15": (8, 16),
    "16-31": (16, 32),
    "32+": (32, sys.maxsize),
}
SOURCES = 20  # the commonest are counted


def discard_tables(masks: Sequence[Mask], sources: Sequence[str] = ()) -> list[tuple]:
    """What the masks discard: of all response tokens, of those of each kind, and how many rows with
    a response lost none and all of them; and how much of it others discard, too.

    A table is a header and lines, with a column for each mask that discards anything; without any,
    no tables. sources: see runs.sources_of.
    """
    masks = [mask for mask in masks if mask.discarded.any()]
    if not masks:
        return []
    tokens = masks[0].tokens
    labels = [mask.label for mask in masks]
    lines = []
    for kind, places in kinds_of(tokens, sources).items():
        if len(places) > 0:
            cells = [counted(mask.discarded[places]) for mask in masks]
            lines.append([kind, *cells])
    size = count_by_row(tokens, tokens.response)[tokens.filled]
    lost_none = ["rows that lost none"]
    lost_all = ["rows that lost all"]
    for mask in masks:
        lost = count_by_row(tokens, mask.discarded)[tokens.filled]
        lost_none.append(counted(lost == 0))
        lost_all.append(counted(lost == size))
    lines += [lost_none, lost_all]
    tables = [(["discarded", *labels], lines)]
    if len(masks) > 1:
        tables.append((["shared with", *labels], [shared(mask, masks) for mask in masks]))
    return tables


def kinds_of(tokens: Tokens, sources: Sequence[str]) -> dict[str, Tensor]:
    """The places of all response tokens, of those of each source of rows (where the rows have any),
    and of each position in the response: int64 [n] each."""
    places = tokens.response.nonzero()[:, 0]
    kinds = {"response tokens": places}
    if any(sources):
        row = tokens.row_of(places)
        for source, _ in Counter(sources).most_common(SOURCES):
            is_of_source = torch.tensor([one == source for one in sources])
            kinds[f"source: {source or '(none)'}"] = places[is_of_source[row]]
    position = tokens.positions()[places]
    for name, (first, behind) in POSITIONS.items():
        kinds[f"position: {name}"] = places[(position >= first) & (position < behind)]
    return kinds


def shared(mask: Mask, others: Sequence[Mask]) -> list[str]:
    """A line: the share of a mask's discards that each mask discards, too."""
    line = [f"of {mask.label}'s discards"]
    for other in others:
        both = int((mask.discarded & other.discarded).sum())
        line.append(f"{both / int(mask.discarded.sum()):.3f}")
    return line


def counted(flags: Tensor) -> str:
    """The share of flags that are set, and the counts that it comes from."""
    part = int(flags.sum())
    whole = len(flags)
    return f"{part / whole:.3f} ({part:,} of {whole:,})"
