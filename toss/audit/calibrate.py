"""Choose d from held-out utility rows instead of fixing it.

    python -m toss.audit.calibrate --run R --held-out rows.jsonl [--quantile 0.99] [--method base]

Scores rows that are known to hold nothing to discard and that no reference was trained on. The
threshold is the quantile q of their S. d is the share of the custom set's tokens above it, for
select.py --discard. So d grows with the harm in the custom set. The paper fixes d = 0.1 instead.

If harmless tokens of the custom set score like the held-out ones, 1 - q of them are discarded. If
they are harder, more are: 2-3 % at q = 0.99 on the embedded world without any harm. The threshold
rests on the few held-out tokens above it.
"""

import math
import sys

from torch import Tensor

from toss.audit.runs import S_under, run_of
from toss.methods import Candidates
from toss.selection import competing_tokens
from toss.workbench import flags
from toss.workbench.run import Run

REFERENCES = {"toss": "utility", "base": "base"}  # by method, whose losses come first in S


def threshold_of(held_out: Tensor, custom: Tensor, quantile: float) -> tuple[float, float]:
    """The quantile of the held-out scores, and the share d of the custom scores above it.

    held_out, custom: float [n]. The quantile is the lowest held-out score that at least that share
    of them does not exceed.

    >>> from torch import tensor
    >>> threshold_of(tensor([1.0, 2.0, 3.0, 4.0]), tensor([0.0, 3.5, 3.0, 9.0]), 0.75)
    (3.0, 0.5)
    """
    place = math.ceil(quantile * len(held_out) - 1e-9)
    threshold = float(held_out.kthvalue(place).values)
    is_above = custom > threshold
    return threshold, float(is_above.double().mean())


def calibrate(run: Run, held_out: str, quantile: float = 0.99, method: str = "toss") -> dict:
    """The threshold and d for a run, and what is needed to judge them.

    method: one of REFERENCES. Returns threshold (nats), discard (d), ranked (custom tokens),
    held_out (tokens), and above (those above the threshold).
    """
    # S of the tokens that compete, in the held-out rows and in the custom set
    tokens, losses = run.losses()
    reference = REFERENCES[method]
    S = Candidates(tokens, losses, competing_tokens(tokens), d=0.0).S(reference)
    calm = run.tokens(held_out)
    calm_S = S_under(run, calm, reference=reference)[calm.response]

    threshold, d = threshold_of(calm_S, S, quantile)
    return {
        "threshold": threshold,
        "discard": d,
        "ranked": len(S),
        "held_out": len(calm_S),
        "above": int((calm_S > threshold).sum()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.calibrate", __doc__)
    flags.add_run_flags(parser, dtype=False)  # the dtype is that of the run's scores
    add = parser.add_argument
    text = "utility rows that no reference was trained on, JSONL"
    add("--held-out", required=True, metavar="FILE", help=text)
    kind = flags.number(float, lambda q: 0 < q < 1, "a share in (0, 1)")
    add("--quantile", type=kind, default=0.99, metavar="Q", help="of the held-out S")
    text = "base: with the base in place of theta^u, as select.py --method base has it"
    add("--method", choices=list(REFERENCES), default="toss", help=text)
    args = parser.parse_args(argv)

    # What was found, in words, and the command that uses it.
    found = calibrate(run_of(args), args.held_out, args.quantile, args.method)
    print(f"{found['threshold']:.4f} nats is the {args.quantile} quantile of S on held-out rows")
    print(f"{found['above']} of {found['held_out']} held-out tokens are above it")
    if not found["above"]:
        print("warning: these are too few for this quantile: give more held-out rows")
    print(f"{found['discard']:.4f} of {found['ranked']} custom tokens are above it\n")
    select = flags.command("select.py", args.run, method=args.method, discard=found["discard"])
    print(f"next: {select} --name {args.method}-calibrated")


if __name__ == "__main__":
    sys.exit(flags.run(main))
