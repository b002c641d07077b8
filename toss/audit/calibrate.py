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
from toss import cli

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
    tokens), held_out (tokens), above (those above the threshold), and harmful_share (or None).
    """
    from model.peft import read_adapter
    from toss.files import read_scores
    from toss.scoring import score

    tokens, losses = run.scored()
    models = {name: run.adapter(name) for name in ("utility", "degraded")}
    if method != "toss":
        folder = run.path(f"methods/{method}")
        rounds = sorted(folder.glob("round-*"), key=lambda path: int(path.name.split("-")[1]))
        if not rounds:
            raise InputError(f"{folder} has no rounds of TOSS-Pro")
        if changed := ", ".join(run.stale(f"methods/{method}")):
            raise InputError(f"{folder}: {changed} changed since: run select.py --overwrite again")
        _, losses = read_scores(rounds[-1] / "scores.safetensors", tokens.name)
        models["degraded"] = read_adapter(run.base("score"), rounds[-1] / "degraded")
    calm, loss = run.tokens(held_out), {}
    for name, adapter in models.items():
        model = run.base("score", adapter)
        loss[name] = score(model, calm, run.args.batch_tokens, on_batch=run.log(name))
    S = (losses["utility"] - losses["degraded"])[tokens.response]
    calm_S = (loss["utility"] - loss["degraded"])[calm.response]
    threshold, d = threshold_of(calm_S, S, quantile)
    share = round(float(tokens.harmful[tokens.response].double().mean()), 4)
    return {
        "threshold": threshold,
        "discard": d,
        "ranked": len(S),
        "held_out": len(calm_S),
        "above": int((calm_S > threshold).sum()),
        "harmful_share": share if tokens.harmful.any() else None,
    }


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("python -m toss.audit.calibrate", __doc__)
    cli.add_run_flags(parser, dtype=False)  # the dtype is that of the run's scores
    flag, text = parser.add_argument, "utility rows that no reference was trained on, JSONL"
    flag("--held-out", required=True, metavar="FILE", help=text)
    kind = cli.number(float, lambda q: 0 < q < 1, "a share in (0, 1)")
    flag(
        "--quantile",
        type=kind,
        default=QUANTILE,
        metavar="Q",
        help="quantile of the held-out scores",
    )
    text = "method with TOSS-Pro's rounds, whose last degraded model is used (default: toss)"
    flag("--method", default="toss", metavar="NAME", help=text)
    args = cli.parse(parser, argv)
    from toss.files import record_of
    from toss.run import Run

    found = calibrate(Run(args), args.held_out, args.quantile, args.method)
    share = found["harmful_share"]
    truth = f"; {share:.4f} of all are harmful by ground truth" if share else ""
    print(f"{found['threshold']:.4f} nats is the {args.quantile} quantile of S on held-out rows")
    print(f"{found['above']} of {found['held_out']} held-out tokens are above it")
    print(f"{found['discard']:.4f} of {found['ranked']} custom tokens are above it{truth}")
    flags, known = f"--discard {found['discard']:.6f} --name {args.method}-calibrated", {}
    if args.method != "toss":
        known = record_of(Path(args.run) / "methods" / args.method)["settings"]
    for name in ("pro", "pro_samples", "pro_train"):
        flags += f" --{name.replace('_', '-')} {known[name]}" if name in known else ""
    print(f"\n{sys.executable} select.py --run {args.run} {flags}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
