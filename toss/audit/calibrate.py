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

from toss.audit.runs import losses_under, run_of
from toss.methods import Candidates
from toss.selection import competing_tokens
from toss.workbench import flags
from toss.workbench.run import Run

QUANTILE = 0.99
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


def calibrate(
    run: Run,
    held_out: str,
    quantile: float = QUANTILE,
    method: str = "toss",
    keep_eos: bool = False,
) -> dict:
    """The threshold and d for a run, and what is needed to judge them.

    method: one of REFERENCES. Returns threshold (nats), discard (d), ranked (custom tokens),
    held_out (tokens), above (those above the threshold), and harmful (share of ranked).
    """
    # S of the tokens that compete, in the held-out rows and in the custom set
    tokens, losses = run.losses()
    reference = REFERENCES[method]
    eos = run.tokenizer.eos_id if keep_eos else None
    ranked = competing_tokens(tokens, eos)
    S = Candidates(tokens, losses, ranked, d=0.0).S(reference)
    calm = run.tokens(held_out)
    calm_losses = losses_under(run, calm, models=(reference, "degraded"))
    calm_S = (calm_losses[reference] - calm_losses["degraded"])[competing_tokens(calm, eos)]

    threshold, d = threshold_of(calm_S, S, quantile)
    return {
        "threshold": threshold,
        "discard": d,
        "ranked": len(S),
        "held_out": len(calm_S),
        "above": int((calm_S > threshold).sum()),
        "harmful": float(tokens.harmful[ranked].double().mean()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.calibrate", __doc__)
    flags.add_run_flags(parser, dtype=False)  # the dtype is that of the run's scores
    add = parser.add_argument
    text = "utility rows that no reference was trained on, JSONL"
    add("--held-out", required=True, metavar="FILE", help=text)
    kind = flags.number(float, lambda q: 0 < q < 1, "a share in (0, 1)")
    add("--quantile", type=kind, default=QUANTILE, metavar="Q", help="of the held-out S")
    text = "base: with the base in place of theta^u, as select.py --method base has it"
    add("--method", choices=list(REFERENCES), default="toss", help=text)
    text = "leave end-of-sequence tokens out, as select.py --keep-eos does"
    add("--keep-eos", action="store_true", help=text)
    args = parser.parse_args(argv)

    # What was found, in words, and the command that uses it.
    found = calibrate(run_of(args), args.held_out, args.quantile, args.method, args.keep_eos)
    print(f"{found['threshold']:.4f} nats is the {args.quantile} quantile of S on held-out rows")
    print(f"{found['above']} of {found['held_out']} held-out tokens are above it")
    if not found["above"]:
        print("warning: these are too few for this quantile: give more held-out rows")
    share = f"{found['discard']:.4f} of {found['ranked']} custom tokens are above it"
    if found["harmful"]:
        share += f"; {found['harmful']:.4f} of all are harmful by ground truth"
    print(f"{share}\n")
    words = [f"--discard {found['discard']}", f"--name {args.method}-calibrated"]
    if args.method != "toss":
        words.append(f"--method {args.method}")
    if args.keep_eos:
        words.append("--keep-eos")
    print(f"next: {flags.command('select.py', args.run)} {' '.join(words)}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
