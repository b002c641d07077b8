"""The rows of a run that its page shows token by token, and what the masks discard."""

from itertools import groupby

from toss.audit.command import evenly
from toss.audit.discards import per_row
from toss.audit.figures import histogram
from toss.audit.tokens import Mask
from toss.files import lost_rows

ROWS = 24
ROOM, TOKEN, MASKED = 1_500_000, 160, 45  # bytes: of all tokens; of one; and of each mask over it


def chosen_rows(mask: Mask, n: int = ROWS) -> dict[str, list[int]]:
    """The rows to show, by why: n / 4 of each group in order, spread evenly; then any others."""
    marks = (mask.tokens.response, mask.tokens.harmful, ~mask.keep)
    response, harm, gone = (per_row(mask.tokens, marked) for marked in marks)
    most = gone.argsort(descending=True, stable=True)[: n // 4]
    rows = lambda marked: marked.nonzero()[:, 0]
    groups = {
        f"most tokens discarded by {mask.label}": most[gone[most] > 0],
        "harm by ground truth": rows(harm > 0),
        f"discarded in part by {mask.label}": rows((gone > 0) & (gone < response)),
        f"nothing discarded by {mask.label}, no harm marked": rows(
            (response > 0) & (gone + harm == 0)
        ),
        "other rows": rows(response > 0),
    }
    chosen: dict[str, list[int]] = {}
    for why, members in groups.items():
        taken = set().union(*chosen.values())
        left = [row for row in members.tolist() if row not in taken]
        chosen[why] = evenly(left, n - len(taken) if why == "other rows" else n // 4)
    return {why: members for why, members in chosen.items() if members}


def token_part(masks: list[Mask]) -> dict:
    """What the page shows of the masks; its rows are chosen by what the first one did."""
    groups, S, rows = chosen_rows(masks[0]), masks[0].S[masks[0].tokens.response], []
    for why, row in ((why, row) for why, members in groups.items() for row in members):
        views = list(zip(*(mask.row(row) for mask in masks)))  # of each token, by mask
        turns = [list(turn) for _, turn in groupby(views, key=lambda view: view[0].response)]
        count = sum(view[0].response for view in views)
        rows.append({"row": row, "why": why, "turns": turns, "count": count})
    by_S = [mask for mask in masks if mask.method in ("toss", "toss-pro")]
    return {
        "groups": groups,
        "rows": rows,
        "most": ROOM // (TOKEN + MASKED * len(masks)) // ROWS,  # response tokens shown per row
        "limit": max(0.5, float(S.abs().quantile(0.98))),  # nats at full colour
        "discards": [discards(mask) for mask in masks],
        "charts": [spread(mask) for mask in by_S or masks[:1]],
    }


def discards(mask: Mask) -> dict:
    """What a mask discards, in counts."""
    gone, harm = ~mask.keep, mask.tokens.harmful
    counts = {"gone": gone, "harm": harm, "found": gone & harm, "ranked": mask.order > 0}
    whole = lost_rows(mask.tokens, mask.keep)
    return {
        **{name: int(flags.sum()) for name, flags in counts.items()},
        **{"method": mask.label, "how": mask.method, "threshold": mask.threshold, "whole": whole},
        "some": int((per_row(mask.tokens, gone) > 0).sum()) - whole,
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
