"""Stage 2 of TOSS: the loss of every response token of the custom set under both reference models.

    python score.py
    python score.py --run runs/mine --custom custom.jsonl

Writes RUN/scores.safetensors: flat arrays over all rows with the token ids, the row offsets, the response flags, and
the losses L^u and L^h. The score of a token is S = L^u - L^h: high where the degraded model expects the token and the
utility model does not. Model, prompt form and length come from the run. Next: select.py.
"""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    from model.errors import reported
    from toss.parallel import processes
    from toss.pipeline import score_custom
    from toss.settings import parse

    return reported(processes()(lambda: score_custom(parse("score", __doc__, argv))))


if __name__ == "__main__":
    sys.exit(main())
