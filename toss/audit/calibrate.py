"""Choose d from held-out utility rows instead of fixing it.

    python -m toss.audit.calibrate --run R --held-out rows.jsonl [--quantile 0.99] [--method NAME]

Scores rows that are known to hold nothing to discard and that no reference was trained on. The
threshold is the quantile q of their S. d is the share of the custom set's tokens above it, for
select.py --discard. So d grows with the harm in the custom set. The paper fixes d = 0.1 instead.

If harmless tokens of the custom set score like the held-out ones, 1 - q of them are discarded. If
they are harder, more are: 2-3 % at q = 0.99 on the embedded world without any harm. The threshold
rests on the few held-out tokens above it. After TOSS-Pro, tokens of the added rows score higher
than others, because theta^h was trained on them.
"""

import math
import sys
from pathlib import Path

from model.io import InputError
from toss.audit.command import losses_under, run_of
from toss.workbench import flags

QUANTILE = 0.99
OWN = ("toss", "base")  # methods that go by the run's own references


def threshold_of(held_out, custom, quantile: float) -> tuple[float, float]:
    """The quantile of the held-out scores, and the share d of the custom scores above it.

    Both are float [n] tensors. The quantile is the lowest held-out score that at least that share
    of them does not exceed.

    >>> from torch import tensor
    >>> threshold_of(tensor([1.0, 2.0, 3.0, 4.0]), tensor([0.0, 3.5, 3.0, 9.0]), 0.75)
    (3.0, 0.5)
    """
    threshold = float(held_out.kthvalue(math.ceil(quantile * len(held_out) - 1e-9)).values)
    return threshold, float((custom > threshold).double().mean())


def calibrate(
    run,
    held_out: str,
    quantile: float = QUANTILE,
    method: str = "toss",
    keep_eos: bool = False,
) -> dict:
    """The threshold and d for a Run, and what is needed to judge them.

    method: "toss" for the run's own references; "base" for S with the base in place of theta^u; or
    the name of a method with TOSS-Pro's rounds, for the degraded model of the last one and for its
    keep_eos. Returns threshold (nats), discard (d), ranked (custom tokens), held_out (tokens),
    above (those above the threshold), and harmful (share of ranked).
    """
    from model.peft import read_adapter
    from toss.methods import Candidates
    from toss.selection import competing_tokens
    from toss.workbench.files import read_scores

    for flag in ("--harmful", "--utility", "--custom"):
        if run.source(flag).resolve() == Path(held_out).resolve():
            problem = f"these are the run's own rows ({flag})"
            raise InputError(f"{held_out}: {problem}: give harmless rows that are in no set of it")
    tokens, L = run.scored()
    reference = "base" if method == "base" else "utility"  # whose losses come first in S
    others = {}
    if method not in OWN:  # the last round's losses and degraded model
        settings = run.check(f"methods/{method}").get("settings", {})
        folder = run.path(f"methods/{method}")
        if not settings.get("pro"):
            advice = "for a method without them, --method is toss or base"
            raise InputError(f"{folder} has no rounds of TOSS-Pro: {advice}")
        keep_eos = settings["keep_eos"]
        last = folder / f"round-{settings['pro']}"
        L = read_scores(last / "scores.safetensors", tokens.name)[1]
        others["degraded"] = read_adapter(run.base("score"), last / "degraded")

    # S of the tokens that compete, in the held-out rows and in the custom set
    eos = run.tokenizer.eos_id if keep_eos else None
    ranked = competing_tokens(tokens, eos)
    S = Candidates(tokens, L, ranked, d=0.0).S(reference)
    D = run.tokens(held_out)
    held_out_L = losses_under(run, D, models=(reference, "degraded"), **others)
    held_out_S = (held_out_L[reference] - held_out_L["degraded"])[competing_tokens(D, eos)]

    threshold, d = threshold_of(held_out_S, S, quantile)
    return {
        "threshold": threshold,
        "discard": d,
        "ranked": len(S),
        "held_out": len(held_out_S),
        "above": int((held_out_S > threshold).sum()),
        "harmful": float(tokens.harmful[ranked].double().mean()),
    }


def method_or_base(text: str) -> str:
    """For argparse: a method's name, or "base"."""
    return text if text == "base" else flags.method(text)


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.calibrate", __doc__)
    flags.add_run_flags(parser, dtype=False)  # the dtype is that of the run's scores
    add = parser.add_argument
    text = "utility rows that no reference was trained on, JSONL"
    add("--held-out", required=True, metavar="FILE", help=text)
    kind = flags.number(float, lambda q: 0 < q < 1, "a share in (0, 1)")
    add("--quantile", type=kind, default=QUANTILE, metavar="Q", help="of the held-out S")
    text = "toss: the run's own references; base: the base in place of theta^u, as select.py has it"
    text += "; else a method with TOSS-Pro's rounds: its last theta^h"
    add("--method", type=method_or_base, default="toss", metavar="NAME", help=text)
    text = "leave end-of-sequence tokens out, as select.py --keep-eos does"
    add("--keep-eos", action="store_true", help=text)
    args = parser.parse_args(argv)
    if args.keep_eos and args.method not in OWN:
        parser.error("--keep-eos: a method with rounds has its own setting")
    from toss.workbench.results import read_record

    # What was found, in words.
    result = calibrate(run_of(args), args.held_out, args.quantile, args.method, args.keep_eos)
    above = f"{result['above']} of {result['held_out']} held-out tokens are above it"
    share = f"{result['discard']:.4f} of {result['ranked']} custom tokens are above it"
    if result["harmful"]:
        share += f"; {result['harmful']:.4f} of all are harmful by ground truth"
    print(f"{result['threshold']:.4f} nats is the {args.quantile} quantile of S on held-out rows")
    print(above)
    if not result["above"]:
        print("warning: these are too few for this quantile: give more held-out rows")
    print(f"{share}\n")

    # The command that uses it: TOSS-Pro's with the settings of its rounds.
    settings = {"keep_eos": args.keep_eos}
    if args.method not in OWN:
        settings = read_record(Path(args.run) / "methods" / args.method)["settings"]
    words = [f"--discard {result['discard']}", f"--name {args.method}-calibrated"]
    if args.method == "base":
        words.append("--method base")
    for name in ("pro", "pro_samples"):
        if name in settings:
            words.append(f"--{name.replace('_', '-')} {settings[name]}")
    if settings["keep_eos"]:
        words.append("--keep-eos")
    print(f"next: {flags.command('select.py', args.run)} {' '.join(words)}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
