"""What was dropped? By each method; or in one row, token by token.

    python -m toss.audit.show --run R
    python -m toss.audit.show --run R --row 12 [--method toss-pro]

The first counts what each method discarded, by source of the row, and how much of it others
discarded too. Sources are read from the custom file, where it is there.

Rows count from 0. Marks: [-discarded-], *harmful by ground truth*, · a space, ⏎ a line break, ◌ a
part of a character (the next token shows it). No weights are read.
"""

import sys
from itertools import groupby

from toss.audit.characters import harmless, visible
from toss.audit.runs import sources_of
from toss.audit.tables import markdown
from toss.audit.tokens import Mask, Token, discard_tables, load_mask, load_masks
from toss.workbench import flags
from toss.workbench.run import Run, open_run


def show_discards(run: Run) -> None:
    """Print what each method of a run discarded, in counts and shares."""
    masks, lacking = load_masks(run, *run.losses())
    for line in lacking:
        print(f"left out: {line}")
    tables = discard_tables(masks, sources_of(run))
    text = "\n\n".join(markdown(*table) for table in tables)
    print(text or "No method of the run discards a token.")


def show_row(mask: Mask, row: int) -> None:
    """Print one row under a mask."""
    tokens = mask.row(row)
    response = [token for token in tokens if token.response]
    discarded = sum(token.discarded for token in response)
    harmful = sum(token.harmful for token in response)
    count = f"{discarded} of {len(response)} response tokens discarded"
    count += f", {harmful} harmful by ground truth"
    print(f"row {row} of 0 to {mask.tokens.rows - 1}, {mask.name}: {count}")
    print(f"\n{running_text(tokens)}\n\n{number_table(response)}\n")
    print("S = L^u - L^h = utility (L^u - L^0) + safety (L^0 - L^h), in nats")
    print(f"order: among the {mask.order.max()} ranked tokens")


def running_text(tokens: list[Token]) -> str:
    """Prompts and responses in order; marks stand around neighbours that share them."""
    turns = []
    for response, turn in groupby(tokens, key=lambda token: token.response):
        if not response:
            turns.append(harmless("".join(token.text for token in turn)).rstrip("\n"))
            continue
        text = ""
        for harmful, marked in groupby(turn, key=lambda token: token.harmful):
            star = "*" if harmful else ""
            text += star
            for discarded, alike in groupby(marked, key=lambda token: token.discarded):
                words = "".join(visible(token.text) for token in alike)
                text += f"[-{words}-]" if discarded else words
            text += star
        turns.append(text)
    return "\n\n".join(turns)


def number_table(tokens: list[Token]) -> str:
    """The numbers of response tokens, one line each; with L^0, also the two parts of S."""
    lines = []
    for token in tokens:
        line = {"position": token.position, "token": visible(token.text)}
        line["L^u"] = f"{token.utility:6.3f}"
        line["L^h"] = f"{token.degraded:6.3f}"
        line["S"] = f"{token.S:+7.3f}"
        if token.base is not None:
            line["L^0"] = f"{token.base:6.3f}"
            line["utility"] = f"{token.utility - token.base:+7.3f}"
            line["safety"] = f"{token.base - token.degraded:+7.3f}"
        line["order"] = token.order or "-"
        line["mark"] = "discarded" if token.discarded else "kept"
        if token.harmful:
            line["mark"] += ", harmful"
        lines.append(line)
    return markdown(list(line), [list(line.values()) for line in lines])


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.show", __doc__)
    flag = parser.add_argument
    flag("--run", required=True, help="folder of the run")
    flag("--row", type=int, help="row of the custom set, from 0")
    text = "whose mask, for --row: a folder under RUN/methods (default: toss)"
    flag("--method", help=text)
    args = parser.parse_args(argv)
    if args.row is None and args.method:
        parser.error("--method is of a row: give --row")
    run = open_run(args.run)
    if args.row is None:
        show_discards(run)
        return
    mask = load_mask(run, args.method or "toss", *run.losses())
    show_row(mask, args.row)


if __name__ == "__main__":
    sys.exit(flags.run(main))
