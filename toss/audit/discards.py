"""What was dropped? The discards of each mask, counted by kind of token and of row."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from model.tokenizer import Tokenizer
from toss.audit.tokens import Mask, count_by_row
from toss.tokens import Tokens

# name -> its first response position
POSITIONS = {"0": 0, "1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32+": 32}
TYPES = ["word", "number", "punctuation", "whitespace", "end of sequence", "other special"]
SOURCES = 20  # the commonest are counted apart


def discard_tables(
    masks: Sequence[Mask], tokenizer: Tokenizer, sources: Sequence[str] = ()
) -> list[tuple]:
    """What the masks discard: of all response tokens, of those of each kind, and how many rows with
    a response lost none, some and all of them; and how much of it others discard too.

    A table is a header and lines, with a column for each mask that discards anything; without any,
    no tables. sources: see runs.sources_of.
    """
    masks = [mask for mask in masks if mask.discarded.any()]
    if not masks:
        return []
    tokens = masks[0].tokens
    labels = [mask.label for mask in masks]
    discarded = [mask.discarded[tokens.response] for mask in masks]
    lines = [["response tokens", *map(counted, discarded)]]
    for kind, (names, index) in kinds_of(tokens, tokenizer, sources).items():
        for k, name in enumerate(names):
            if (index == k).any():
                cells = [counted(flags[index == k]) for flags in discarded]
                lines.append([f"{kind}: {name}", *cells])

    # By row: how many of its response tokens each mask discards.
    size = count_by_row(tokens, tokens.response)[tokens.filled]
    lost = [count_by_row(tokens, mask.discarded)[tokens.filled] for mask in masks]
    lines.append(["rows that lost none", *(counted(n == 0) for n in lost)])
    lines.append(["rows that lost some", *(counted((n > 0) & (n < size)) for n in lost)])
    lines.append(["rows that lost all", *(counted(n == size) for n in lost)])
    tables = [(["discarded", *labels], lines)]
    if len(masks) > 1:
        tables.append((["shared with", *labels], [shared(mask, masks) for mask in masks]))
    return tables


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


# By what response tokens differ


def kinds_of(tokens: Tokens, tokenizer: Tokenizer, sources: Sequence[str]) -> dict[str, tuple]:
    """Source of the row (where the rows have any), position in the response, type of the text: of
    each kind the names, and the index of each response token's, int64 [n]."""
    places = tokens.response.nonzero()[:, 0]
    kinds = {}
    # The most frequent sources; the others are one kind.
    if any(sources):
        titles = [source or "(none)" for source in sources]
        names = [title for title, _ in Counter(titles).most_common(SOURCES)]
        of_row = []
        for title in titles:
            of_row.append(names.index(title) if title in names else len(names))
        of_token = torch.tensor(of_row)[tokens.row_of(places)]
        kinds["source"] = ([*names, "(others)"], of_token)

    # Ranges of positions, each known by where it starts.
    starts = torch.tensor(list(POSITIONS.values()))
    position = torch.bucketize(tokens.positions()[places], starts, right=True) - 1
    kinds["position"] = (list(POSITIONS), position)

    # A type belongs to a token of the vocabulary: each is looked at once.
    ids, inverse = tokens.input_ids[places].unique(return_inverse=True)
    types = [TYPES.index(token_type(token_id, tokenizer)) for token_id in ids.tolist()]
    kinds["type"] = (TYPES, torch.tensor(types)[inverse])
    return kinds


def token_type(token_id: int, tokenizer: Tokenizer) -> str:
    """One of TYPES, by the token's text: a word has a letter or a part of a character in it."""
    text = tokenizer.raw.decode([token_id], skip_special_tokens=False)
    if token_id == tokenizer.eos_id:
        return "end of sequence"
    if text and not tokenizer.decode([token_id]):
        return "other special"
    if not text.strip():
        return "whitespace"
    if any(character.isalpha() or character == "\ufffd" for character in text):
        return "word"
    if any(character.isnumeric() for character in text):
        return "number"
    return "punctuation"
