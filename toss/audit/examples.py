"""What was dropped? The rows that the page of toss.audit.report shows, and how S is spread."""

from itertools import groupby

import torch
from torch import Tensor

from toss.audit.discards import discard_tables, sources_of
from toss.audit.figures import histogram
from toss.audit.tokens import Mask, count_by_row
from toss.workbench.run import Run

ROWS = 24
ALIKE = 0.5  # share of their distinct tokens from which on two responses say the same
SEARCHED = 40  # candidates of each kind, for each row that is shown
ROOM, TOKEN, MASKED = 1_500_000, 160, 45  # bytes: of all tokens; of one; and of each mask over it


def token_part(run: Run, masks: list[Mask]) -> dict:
    """What the page shows of the masks; its rows are chosen by what the first one did."""
    first = masks[0]
    tokens = first.tokens
    sources = sources_of(run)
    groups = chosen_rows(first)
    rows = []
    for why, members in groups.items():
        for row in members:
            # A view is a token under every mask.
            views = list(zip(*(mask.row(row) for mask in masks)))
            turns = [list(turn) for _, turn in groupby(views, key=lambda view: view[0].response)]
            source = sources[row] if sources else ""
            rows.append({"row": row, "why": why, "source": source, "turns": turns})
    by_S = [mask for mask in masks if mask.method in ("toss", "toss-pro")]
    return {
        "groups": groups,
        "rows": rows,
        "masks": masks,
        "limit": first.full_colour,
        "harmful_rows": set(tokens.row_of(tokens.harmful.nonzero()[:, 0]).tolist()),
        "most": ROOM // (TOKEN + MASKED * len(masks)) // ROWS,  # response tokens shown per row
        "charts": [spread(mask) for mask in by_S or masks[:1]],
        "discards": discard_tables(masks, run.tokenizer, sources),
    }


def chosen_rows(mask: Mask, n: int = ROWS) -> dict[str, list[int]]:
    """The rows to show, by why: n / 4 of each kind, and more of the first where others are few.

    Of rows that say nearly the same, the first stands for all.
    """
    tokens = mask.tokens
    candidates = candidate_rows(mask)
    chosen = {why: [] for why in candidates}
    content = {}  # the distinct response tokens of each chosen row
    for limit in (n // 4, n):
        for why, rows in candidates.items():
            for row in rows[: SEARCHED * n]:
                if len(chosen[why]) == limit or len(content) == n:
                    break
                places = tokens.places([row])
                ids = set(tokens.input_ids[places][tokens.response[places]].tolist())
                alike = [x for x in content.values() if len(ids & x) >= ALIKE * len(ids | x)]
                if row not in content and not alike:
                    chosen[why].append(row)
                    content[row] = ids
    return {why: rows for why, rows in chosen.items() if rows}


def candidate_rows(mask: Mask) -> dict[str, list[int]]:
    """The rows of each kind, the best first. Equal ones are ordered by mean S."""
    tokens = mask.tokens
    discarded = mask.discarded
    size = count_by_row(tokens, tokens.response)
    harm = count_by_row(tokens, tokens.harmful)
    lost = count_by_row(tokens, discarded)
    missed = harm - count_by_row(tokens, discarded & tokens.harmful)

    sums = count_by_row(tokens, tokens.response, mask.S.double())
    by_mean_S = (sums / size).argsort(descending=True, stable=True)

    def ordered(wanted: Tensor, key: Tensor) -> list[int]:
        rows = by_mean_S[wanted[by_mean_S]]
        return rows[key[rows].argsort(descending=True, stable=True)].tolist()

    marked = tokens.harmful.any()  # without ground truth no row is known to be harmless
    return {
        "harmless, yet discarded": ordered((lost > 0) & (harm == 0) & marked, lost / size),
        "harmful, yet kept": ordered(missed > 0, missed / harm),
        f"the largest share discarded by {mask.label}": ordered(lost > 0, lost / size),
        "nothing discarded, the highest mean S": ordered((lost == 0) & (size > 0), size * 0),
    }


def spread(mask: Mask) -> str:
    """The distribution of S, harmful tokens against others where the rows say which are, as SVG."""
    response = mask.tokens.response
    harmful = mask.tokens.harmful
    groups = {"response tokens": mask.S[response]}
    if harmful.any():
        groups = {
            "other response tokens": mask.S[response & ~harmful],
            "harmful by ground truth": mask.S[harmful],
        }
    ranked = mask.order > 0
    by_S = torch.equal(mask.score[ranked], mask.S[ranked])
    title = f"S of the response tokens, as scored for {mask.label}"
    threshold = mask.threshold if by_S else None
    return histogram(groups, title, "S = L^u - L^h, nats", threshold)
