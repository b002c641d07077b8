"""One row of the custom set in the terminal: what each response token scored, and what a method did with it.

    python -m toss.audit.show --run R --row 12 [--method toss-pro] [--no-color]

Needs the run's scores.safetensors and the method's mask; the model's weights are not read. Rows count from 0, as in
TOSS-Pro's added.jsonl. Marks: [-discarded-], *harmful by ground truth*, · a space, ⏎ a line break, ◌ a token that
holds a part of a character (the next one shows it). Colours are used on a terminal, unless NO_COLOR is set: red for
S > 1 and blue for S < -1, in nats; discarded tokens are struck through, harmful ones underlined.
"""

import argparse
import os
import sys
from itertools import groupby

from model.errors import reported
from toss.audit.tokens import Mask, Token, harmless, load_mask, load_scored, row_tokens, visible

DIM, RED, BLUE, STRUCK, UNDERLINED = "2", "31", "34", "9", "4"


def painted(text: str, codes: list[str]) -> str:
    """Text between ANSI codes; bare where there are none."""
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text


def codes_of(token: Token) -> list[str]:
    """The ANSI codes of a response token."""
    tone = [RED] if token.S > 1 else [BLUE] if token.S < -1 else []
    return tone + [STRUCK] * (not token.keep) + [UNDERLINED] * token.harmful


def running_text(tokens: list[Token], color: bool) -> str:
    """Prompts and responses in order, each on lines of its own; marks around neighbours that share them."""
    parts = []
    for response, turn in groupby(tokens, key=lambda token: token.response):
        if not response:
            prompt = harmless("".join(token.text for token in turn))
            parts.append(painted(prompt.rstrip("\n"), [DIM] if color else []))
            continue
        text = ""
        for harmful, marked in groupby(turn, key=lambda token: token.harmful):
            span = ""
            for keep, alike in groupby(marked, key=lambda token: token.keep):
                piece = "".join(painted(visible(token.text), codes_of(token) if color else []) for token in alike)
                span += piece if keep else f"[-{piece}-]"
            text += f"*{span}*" if harmful else span
        parts.append(text)
    return "\n\n".join(parts)


def table(tokens: list[Token], mask: Mask, color: bool) -> str:
    """The numbers of the response tokens, a line each; L^0 and the two parts of S where the run has loss_base."""
    response = [token for token in tokens if token.response]
    base = response[0].loss_base is not None
    own = any(token.rank and token.score != token.S for token in response)  # the method ranks by something else than S
    lines = [["position", "token", "L^u", "L^h", *(["L^0"] if base else []), "S", *(["utility", "safety"] if base else []),
              *(["ranked by"] if own else []), "rank", "mark"]]
    for token in response:
        losses = [token.loss_utility, token.loss_degraded, *([token.loss_base] if base else [])]
        parts = [token.S, *([token.utility_part, token.safety_part] if base else []), *([token.score] if own else [])]
        mark = "kept" if token.keep else "discarded"
        mark += ", harmful" if token.harmful else ""
        lines.append([str(token.position), visible(token.text), *(f"{x:.3f}" for x in losses),
                      *(f"{round(x, 3) + 0.0:+.3f}" for x in parts), str(token.rank or "-"), mark])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for k, line in enumerate(lines):
        cells = [f"{cell:<{width}}" if i in (1, len(line) - 1) else f"{cell:>{width}}"
                 for i, (cell, width) in enumerate(zip(line, widths))]
        cells[1] = painted(cells[1], codes_of(response[k - 1]) if color and k else [])
        text.append("  ".join(cells).rstrip())
    parts = "S = L^u - L^h" + (" = utility (L^u - L^0) + safety (L^0 - L^h)" if base else "")
    return "\n".join([*text, "", f"{parts}, in nats; rank among the {mask.ranked} tokens that compete"])


def show(run: str, row: int, name: str, color: bool) -> None:
    """Print one row of a run, with the mask of methods/NAME."""
    scored = load_scored(run)
    mask = load_mask(scored, name)
    tokens = row_tokens(scored, mask, row)
    if not tokens:
        print(f"row {row} of {run} was skipped: its prompt left no room for a response token")
        return
    response = [token for token in tokens if token.response]
    harm = f", {sum(token.harmful for token in response)} harmful by ground truth" if scored.tokens.harmful.any() else ""
    gone = sum(not token.keep for token in response)
    print(f"row {row} of 0 to {scored.tokens.rows - 1}, {mask.label}: {gone} of {len(response)} response tokens "
          f"discarded{harm}\n\n{running_text(tokens, color)}\n\n{table(tokens, mask, color)}")


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.show", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of the run")
    parser.add_argument("--row", required=True, type=int, help="row of the custom set, from 0")
    parser.add_argument("--method", default="toss", help="whose mask: a folder under RUN/methods (default: toss)")
    parser.add_argument("--no-color", action="store_true", help="marks only")
    args = parser.parse_args(argv)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ and not args.no_color
    return reported(lambda: show(args.run, args.row, args.method, color))


if __name__ == "__main__":
    sys.exit(main())
