"""What half precision does to the scores: S = L^u - L^h is a difference of two close losses.

    python -m toss.audit.noise --run R [--rows 64] [--dtype bfloat16]

Scores rows, spread evenly over the custom set, in float32 and compares with the run's own scores,
or with those in another --dtype. Prints the rounding noise of S, the standard deviation of S beside
it, and how many of the tokens that float32 discards are discarded in both.
"""

import sys

from torch import Tensor

from toss.audit.runs import S_under, run_of
from toss.rows import evenly
from toss.selection import select_tokens
from toss.workbench import flags
from toss.workbench.run import Run


def noise(run: Run, rows: int = 64, d: float = 0.1, dtype: str = "auto") -> dict:
    """Compare S of so many rows with S in float32. dtype: "auto" for a Run's own scores.

    Returns the dtype, the rows, the noise (root mean square, in nats), the deviation of S (in
    nats), and the share of float32's discards that are the same.
    """
    tokens, losses = run.losses()
    sample = evenly(tokens.filled, rows)
    part = tokens.take(sample)
    if dtype == "auto":
        dtype = run.dtypes["score"]
        S = (losses["utility"] - losses["degraded"])[tokens.places(sample)]
    else:
        S = S_under(run, part, dtype)
    scores = S[part.response]
    exact = S_under(run, part, "float32")[part.response]
    return {
        "dtype": dtype,
        "rows": len(sample),
        "noise": float((scores - exact).square().mean().sqrt()),
        "deviation": float(exact.std()),
        "same": share_of_discards(scores, exact, d),
    }


def share_of_discards(scores: Tensor, exact: Tensor, d: float) -> float:
    """The share of the discards by `exact` that are discards by `scores` too; 1 if there are none.

    >>> import torch
    >>> exact = torch.tensor([9.0, 8.0, 1.0, 2.0])
    >>> share_of_discards(torch.tensor([9.0, 1.0, 8.0, 2.0]), exact, d=0.5)
    0.5
    """
    discards = ~select_tokens(exact, d)
    if not discards.any():
        return 1.0
    shared = discards & ~select_tokens(scores, d)
    return float(shared.sum() / discards.sum())


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.noise", __doc__)
    flags.add_run_flags(parser)
    add = parser.add_argument
    add("--rows", type=flags.count, default=64, metavar="N", help="rows to score (default: 64)")
    add("--discard", type=flags.share, default=0.1, metavar="D", help="share d (default: 0.1)")
    args = parser.parse_args(argv)
    found = noise(run_of(args), args.rows, args.discard, args.dtype)
    print(
        f"rounding noise of S under {found['dtype']}: {found['noise']:.4f} nats rms on "
        f"{found['rows']} rows, beside a standard deviation of {found['deviation']:.3f};\n"
        f"{found['same']:.1%} of float32's discards at d = {args.discard} are also discarded"
    )


if __name__ == "__main__":
    sys.exit(flags.run(main))
