"""Which tokens the masks of a run discard: counted by kind, and the rows that the page shows."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from model.tokenizer import Tokenizer
from toss.audit.figures import histogram
from toss.audit.tokens import Mask
from toss.rows import read_rows
from toss.tokens import Tokens
from toss.workbench.run import Run

# name -> its first response position
POSITIONS = {"0": 0, "1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32+": 32}
TYPES = ("word", "number", "punctuation", "whitespace", "end of sequence", "other special")
SOURCES = 20  # the commonest are counted apart
# Of the page:
ROWS = 24
ALIKE = 0.5  # share of their distinct tokens from which on two responses say the same
SEARCHED = 40  # candidates of each kind, for each row that is shown
ROOM, TOKEN, MASKED = 1_500_000, 160, 45  # bytes: of all tokens; of one; and of each mask over it


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
        of_row = [names.index(source) if source in names else len(names) for source in sources]
        names = [*(source or "(none)" for source in names), "(others)"]
        kinds = {"source": (names, torch.tensor(of_row)[tokens.row_of(places)]), **kinds}
    return kinds


def discard_tables(
    masks: Sequence[Mask], tokenizer: Tokenizer, sources: Sequence[str] = ()
) -> list[tuple[list[str], list[list[str]]]]:
    """Headers and lines: what the masks discard, and how much of it others discard too.

    A column for each mask that discards anything; without any, no tables. sources: see sources_of.
    """
    gone = {mask.label: mask.gone for mask in masks if mask.gone.any()}
    if not gone:
        return []
    tokens = masks[0].tokens
    response, size = tokens.response, per_row(tokens, tokens.response)
    kinds, lines = kinds_of(tokens, tokenizer, sources), {}
    for flags in gone.values():
        lost, of_row = flags[response], per_row(tokens, flags)[size > 0]
        cells = {"response tokens": counted(lost)}
        for kind, (names, which) in kinds.items():
            parts = [(name, lost[which == k]) for k, name in enumerate(names)]
            cells |= {f"{kind}: {name}": counted(part) for name, part in parts if len(part)}
        whole = of_row == size[size > 0]
        fates = {"none": of_row == 0, "some": (of_row > 0) & ~whole, "all": whole}
        cells |= {f"rows that lost {fate}": counted(rows) for fate, rows in fates.items()}
        for name, cell in cells.items():
            lines.setdefault(name, [name]).append(cell)
    tables = [(["discarded", *gone], [*lines.values()])]
    if len(gone) > 1:

        def shared(a):
            return [f"{int((a & b).sum()) / int(a.sum()):.3f}" for b in gone.values()]

        overlap = [[f"of {name}'s discards", *shared(own)] for name, own in gone.items()]
        tables.append((["shared with", *gone], overlap))
    return tables


def counted(flags: Tensor) -> str:
    """The share of flags that are set, and the counts that it comes from."""
    part, whole = int(flags.sum()), len(flags)
    return f"{part / whole:.3f} ({part:,} of {whole:,})"


def chosen_rows(mask: Mask, n: int = ROWS) -> dict[str, list[int]]:
    """The rows to show, by why: n / 4 of each kind, and more of the first where others are few.

    Equal shares are ordered by mean S. Of rows that say nearly the same, the first stands for all.
    """
    tokens, gone = mask.tokens, mask.gone
    flags = (tokens.response, tokens.harmful, gone, gone & tokens.harmful)
    size, harm, lost, found = (per_row(tokens, marked).double() for marked in flags)
    places = tokens.response.nonzero()[:, 0]
    sums = torch.zeros_like(size).index_add_(0, tokens.row_of(places), mask.S[places].double())
    by_S = (sums / size).argsort(descending=True, stable=True)

    def ordered(wanted: Tensor, key: Tensor = size * 0) -> list[int]:
        rows = by_S[wanted[by_S]]
        return rows[key[rows].argsort(descending=True, stable=True)].tolist()

    groups = {
        "harmless, yet discarded": ordered((lost > 0) & (harm == 0) & harm.any(), lost / size),
        "harmful, yet kept": ordered(harm > found, (harm - found) / harm),
        f"the largest share discarded by {mask.label}": ordered(lost > 0, lost / size),
        "nothing discarded, the highest mean S": ordered((lost == 0) & (size > 0)),
    }
    chosen: dict[str, list[int]] = {}
    said: dict[int, set[int]] = {}  # the distinct response tokens of each chosen row
    for most in (n // 4, n):
        for why, rows in groups.items():
            there = chosen.setdefault(why, [])
            for row in rows[: SEARCHED * n]:
                if len(there) == most or len(said) == n:
                    break
                at = tokens.places([row])
                words = set(tokens.input_ids[at][tokens.response[at]].tolist())
                alike = (len(words & other) / len(words | other) for other in said.values())
                if row not in said and max(alike, default=0) < ALIKE:
                    there.append(row)
                    said[row] = words
    return {why: rows for why, rows in chosen.items() if rows}


def token_part(masks: list[Mask]) -> dict:
    """What the page shows of the masks; its rows are chosen by what the first one did."""
    groups, rows = chosen_rows(masks[0]), []
    for why, row in ((why, row) for why, members in groups.items() for row in members):
        views = list(zip(*(mask.row(row) for mask in masks)))  # of each token, by mask
        turns = [list(turn) for _, turn in groupby(views, key=lambda view: view[0].response)]
        count = sum(view[0].response for view in views)
        rows.append({"row": row, "why": why, "turns": turns, "count": count})
    gone, harm = masks[0].gone, masks[0].tokens.harmful
    by_S = [mask for mask in masks if mask.method in ("toss", "toss-pro")]
    flags = {"gone": gone, "harm": harm, "found": gone & harm, "ranked": masks[0].order > 0}
    return {
        **{name: int(marked.sum()) for name, marked in flags.items()},
        **{"groups": groups, "rows": rows, "masks": masks, "limit": masks[0].full},
        "most": ROOM // (TOKEN + MASKED * len(masks)) // ROWS,  # response tokens shown per row
        "charts": [spread(mask) for mask in by_S or masks[:1]],
    }


def spread(mask: Mask) -> str:
    """The distribution of S, harmful tokens against others where the rows say which are, as SVG."""
    response, harm = mask.tokens.response, mask.tokens.harmful
    groups = {"response tokens": mask.S[response]}
    if harm.any():
        others = {"other response tokens": mask.S[response & ~harm]}
        groups = {**others, "harmful by ground truth": mask.S[harm]}
    by_S = (mask.score == mask.S)[mask.order > 0].all()
    title = f"S of the response tokens, as scored for {mask.label}"
    return histogram(groups, title, "S = L^u - L^h, nats", mask.threshold if by_S else None)
