"""What half precision does to the scores: S = L^u - L^h is a difference of two close losses.

    python -m toss.audit.noise --run R [--rows 64] [--dtype bfloat16]

Scores rows, spread evenly over the custom set, in float32 and compares with the run's own scores,
or with those in another --dtype. Prints the rounding noise of S, the standard deviation of S beside
it, and how many of the tokens that float32 discards are discarded in both.
"""

import sys

from toss.audit.command import evenly, losses_under, run_of
from toss.workbench import flags


def noise(run, rows: int = 64, d: float = 0.1, dtype: str = "auto") -> dict:
    """Compare S of so many rows with S in float32. dtype: "auto" for a Run's own scores."""
    from toss.selection import select_tokens

    tokens, losses = run.scored()
    sample = evenly([i for i, length in enumerate(tokens.lengths) if length], rows)
    part, own = tokens.take(sample), run.dtypes["score"]
    there = {name: loss[tokens.places(sample)] for name, loss in losses.items()}
    there = there if dtype == "auto" else losses_under(run, part, dtype)
    both = (there, losses_under(run, part, "float32"))
    ours, true = ((loss["utility"] - loss["degraded"])[part.response] for loss in both)
    gone, same = ~select_tokens(true, d), ~select_tokens(ours, d)
    return {
        "dtype": own if dtype == "auto" else dtype,
        "rows": len(sample),
        "noise": float((ours - true).square().mean().sqrt()),
        "deviation": float(true.std()),
        "same": float((gone & same).sum() / gone.sum()) if gone.any() else 1.0,
    }


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.noise", __doc__)
    flags.add_run_flags(parser)
    add = parser.add_argument
    add("--rows", type=flags.count, default=64, metavar="N", help="rows to score (default: 64)")
    add("--discard", type=flags.share, default=0.1, metavar="D", help="share d (default: 0.1)")
    args = parser.parse_args(argv)
    run = run_of(args, "dtype")
    found = noise(run, args.rows, args.discard, args.dtype)
    print(
        "rounding noise of S under {dtype}: {noise:.4f} nats rms on {rows} rows, beside a standard "
        "deviation of {deviation:.3f};\n{same:.1%} of float32's discards at d = {d} are also "
        "discarded".format(d=args.discard, **found)
    )


if __name__ == "__main__":
    sys.exit(flags.run(main))
