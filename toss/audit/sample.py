"""The rows of a run that its page shows token by token, and what the masks discard."""

from itertools import groupby

import torch
from torch import Tensor

from toss.audit.discards import per_row
from toss.audit.figures import histogram
from toss.audit.tokens import Mask

ROWS = 24
ALIKE = 0.5  # share of their distinct tokens from which on two responses say the same
SEARCHED = 40  # candidates of each kind, for each row that is shown
ROOM, TOKEN, MASKED = 1_500_000, 160, 45  # bytes: of all tokens; of one; and of each mask over it


def chosen_rows(mask: Mask, n: int = ROWS) -> dict[str, list[int]]:
    """The rows to show, by why: n / 4 of each kind, and more of the first where others are few.

    Equal shares are ordered by mean S. Of rows that say nearly the same, the first stands for all.
    """
    tokens, gone = mask.tokens, ~mask.keep
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
    gone, harm = ~masks[0].keep, masks[0].tokens.harmful
    by_S = [mask for mask in masks if mask.method in ("toss", "toss-pro")]
    flags = {"gone": gone, "harm": harm, "found": gone & harm, "ranked": masks[0].order > 0}
    return {
        **{name: int(marked.sum()) for name, marked in flags.items()},
        "groups": groups,
        "rows": rows,
        "masks": masks,
        "most": ROOM // (TOKEN + MASKED * len(masks)) // ROWS,  # response tokens shown per row
        "limit": masks[0].full,
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
