"""Which tokens the masks of a run discard: where in the response, of which type and source."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from model.tokenizer import Tokenizer
from toss.audit.measures import found_harm
from toss.audit.tokens import Mask
from toss.rows import read_rows
from toss.run import Run
from toss.tokens import Tokens

# name -> its first response position
POSITIONS = {"0": 0, "1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32+": 32}
TYPES = ("word", "number", "punctuation", "whitespace", "end of sequence", "other special")
SOURCES = 20  # the commonest are counted apart


def response_positions(tokens: Tokens) -> Tensor:
    """j of every response token, from 0 in its row: int64 [N], without meaning at other tokens."""
    count = tokens.response.long().cumsum(0)
    earlier = torch.cat((torch.zeros(1, dtype=torch.int64), count))[tokens.offsets[:-1]]
    return count - 1 - earlier[tokens.row_of(torch.arange(len(count)))]


def per_row(tokens: Tokens, marked: Tensor) -> Tensor:
    """How many marked tokens each row has: int64 [rows]. marked: bool [N]."""
    return tokens.row_of(marked.nonzero()[:, 0]).bincount(minlength=tokens.rows)


def token_type(token: int, tokenizer: Tokenizer) -> str:
    """One of TYPES, by the token's text: a word has a letter or a part of a character in it."""
    text = tokenizer.raw.decode([token], skip_special_tokens=False)
    if token == tokenizer.eos_id:
        return "end of sequence"
    if text and not tokenizer.decode([token]):
        return "other special"
    if not text.strip():
        return "whitespace"
    if any(c.isalpha() or c == "\ufffd" for c in text):
        return "word"
    return "number" if any(c.isnumeric() for c in text) else "punctuation"


def sources_of(run: Run) -> list[str]:
    """The source of each scored row, from the custom file; none if the file is gone.

    Call run.scored() before: it refuses a file with other rows than those that were scored.
    """
    path = run.source("--custom")
    return [row.source for row in read_rows(path)] if path.is_file() else []


def kinds_of(
    tokens: Tokens, tokenizer: Tokenizer, sources: Sequence[str]
) -> dict[str, tuple[Sequence[str], Tensor]]:
    """By what response tokens differ: the names, and the index of each token's, int64 [n]."""
    places = tokens.response.nonzero()[:, 0]
    starts = torch.tensor(list(POSITIONS.values()))
    position = torch.bucketize(response_positions(tokens)[places], starts, right=True) - 1
    ids, inverse = tokens.input_ids[places].unique(return_inverse=True)
    types = [TYPES.index(token_type(token, tokenizer)) for token in ids.tolist()]
    kinds = {"position": (list(POSITIONS), position), "type": (TYPES, torch.tensor(types)[inverse])}
    if any(sources):
        names = [source for source, _ in Counter(sources).most_common(SOURCES)]
        index = {source: k for k, source in enumerate(names)}  # the others have the index after
        of_row = torch.tensor([index.get(source, len(names)) for source in sources])
        names = [*(source or "(none)" for source in names), "(others)"]
        kinds = {"source": (names, of_row[tokens.row_of(places)]), **kinds}
    return kinds


def discard_tables(
    masks: Sequence[Mask], tokenizer: Tokenizer, sources: Sequence[str] = ()
) -> list[tuple[list[str], list[list[str]]]]:
    """Headers and lines: what the masks discard, and how much of it others discard too.

    A column for each mask that discards anything; without any, no tables. sources: see sources_of.
    """
    gone = {mask.label: ~mask.keep for mask in masks if not mask.keep.all()}
    if not gone:
        return []
    tokens = masks[0].tokens
    response, size = tokens.response, per_row(tokens, tokens.response)
    kinds, lines = kinds_of(tokens, tokenizer, sources), {}
    for flags in gone.values():
        lost, of_row = flags[response], per_row(tokens, flags)[size > 0]
        cells = {"response tokens": counted(int(lost.sum()), len(lost))}
        for kind, (names, which) in kinds.items():
            counts = (k.bincount(minlength=len(names)).tolist() for k in (which[lost], which))
            told = [(name, part, all) for name, part, all in zip(names, *counts) if all]
            cells |= {f"{kind}: {name}": counted(part, all) for name, part, all in told}
        whole = of_row == size[size > 0]
        fates = {"none": of_row == 0, "some": (of_row > 0) & ~whole, "all": whole}
        for fate, rows in fates.items():
            cells[f"rows that lost {fate}"] = counted(int(rows.sum()), len(rows))
        if tokens.harmful.any():
            found = found_harm(lost, tokens.harmful[response])
            cells |= {name: f"{cell['value']:.3f}" for name, cell in found.items()}
        for name, cell in cells.items():
            lines.setdefault(name, [name]).append(cell)
    shared = lambda a, b: f"{int((a & b).sum()) / int(a.sum()):.3f}"
    overlap = [
        [f"of {name}'s discards", *(shared(own, other) for other in gone.values())]
        for name, own in gone.items()
    ]
    shares = [(["shared with", *gone], overlap)] if len(gone) > 1 else []
    return [(["discarded", *gone], [*lines.values()]), *shares]


def counted(part: int, whole: int) -> str:
    """A share, and the counts that it comes from."""
    return f"{part / whole:.3f} ({part:,} of {whole:,})"
