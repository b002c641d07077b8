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


def calibrate(run, held_out: str, quantile: float = QUANTILE, method: str = "toss") -> dict:
    """The threshold and d for a Run, and what is needed to judge them.

    method: "toss" for the run's own references, or the name of a method with TOSS-Pro's rounds for
    the degraded model of the last one. Returns threshold (nats), discard (d), ranked (custom
    tokens), held_out (tokens), above (those above the threshold), and harmful (share of ranked).
    """
    from model.peft import read_adapter
    from toss.selection import competing_tokens
    from toss.workbench.files import read_scores
    from toss.workbench.results import read_record

    (tokens, losses), others = run.scored(), {}
    folder = run.path(f"methods/{method}")
    known = read_record(folder).get("settings", {}) if folder.exists() else {}
    eos = run.tokenizer.eos_id if known.get("keep_eos") else None
    if method != "toss":
        run.check(f"methods/{method}")
        if not (rounds := known.get("pro")):
            raise InputError(f"{folder} has no rounds of TOSS-Pro")
        last = folder / f"round-{rounds}"
        losses = read_scores(last / "scores.safetensors", tokens.name)[1]
        others["degraded"] = read_adapter(run.base("score"), last / "degraded")
    calm = run.tokens(held_out)
    loss = losses_under(run, calm, **others)
    ranked = competing_tokens(tokens, eos)
    S = (losses["utility"] - losses["degraded"])[ranked]
    calm_S = (loss["utility"] - loss["degraded"])[competing_tokens(calm, eos)]
    threshold, d = threshold_of(calm_S, S, quantile)
    counts = {"ranked": len(S), "held_out": len(calm_S), "above": int((calm_S > threshold).sum())}
    harmful = float(tokens.harmful[ranked].double().mean())
    return {"threshold": threshold, "discard": d, **counts, "harmful": harmful}


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.calibrate", __doc__)
    flags.add_run_flags(parser, dtype=False)  # the dtype is that of the run's scores
    flag, text = parser.add_argument, "utility rows that no reference was trained on, JSONL"
    flag("--held-out", required=True, metavar="FILE", help=text)
    kind, text = flags.number(float, lambda q: 0 < q < 1, "a share in (0, 1)"), "of the held-out S"
    flag("--quantile", type=kind, default=QUANTILE, metavar="Q", help=text)
    text = "toss: the run's own references; else a method with TOSS-Pro's rounds: its last theta^h"
    flag("--method", type=flags.method, default="toss", metavar="NAME", help=text)
    args = parser.parse_args(argv)
    from toss.workbench.results import read_record

    run = run_of(args)
    found = calibrate(run, args.held_out, args.quantile, args.method)
    truth = "; {harmful:.4f} of all are harmful by ground truth" if found["harmful"] else ""
    words = "{threshold:.4f} nats is the {quantile} quantile of S on held-out rows\n{above} of "
    words += "{held_out} held-out tokens are above it\n{discard:.4f} of {ranked} custom tokens are "
    print(f"{words}above it{truth}\n".format(quantile=args.quantile, **found))
    known = read_record(Path(args.run) / "methods" / args.method).get("settings", {})
    choice = {"discard": f"{found['discard']:.6f}", "name": f"{args.method}-calibrated"}
    choice |= {name: known[name] for name in ("pro", "pro_samples", "pro_train") if name in known}
    choice = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in choice.items())
    choice += " --keep-eos" * known.get("keep_eos", False)
    print(f"{sys.executable} select.py --run {args.run} {choice}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
