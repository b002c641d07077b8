"""Choose d from held-out utility rows, in place of a fixed share.

    python -m toss.audit.calibrate --run R --held-out rows.jsonl [--quantile 0.99] [--method toss-pro]

Scores rows of which it is known that nothing in them needs discarding, and that no reference was trained on. The
threshold is the quantile q of their S; d is the share of the custom set's tokens above it, for select.py --discard.
So d grows with the harm that there is. Not the paper's: it fixes d = 0.1.

What it cannot know: whether the custom set's harmless tokens score like the held-out ones. If they did, 1 - q of them
would go; where they are harder, more do: 2-3 % at q = 0.99 on the embedded world without any harm. The threshold rests
on the few held-out tokens above it. After TOSS-Pro the tokens of added rows score higher than others, since theta^h was
trained on them.
"""

import argparse
import math
import sys

from safetensors.torch import load_file
from torch import Tensor

from model.errors import InputError, reported
from model.files import made_from
from toss.audit.command import open_run, run_flags
from toss.base import Base
from toss.pipeline import adapter_of, scored_tokens, warn_references
from toss.rows import read_rows
from toss.run import Run
from toss.scoring import score_under

QUANTILE = 0.99


def threshold_of(held_out: Tensor, custom: Tensor, quantile: float) -> tuple[float, float]:
    """The quantile of the held-out scores, and the share d of the custom scores above it. Both float [n].

    The quantile is the lowest held-out score that at least that share of them does not exceed.

    >>> import torch
    >>> threshold_of(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 3.5, 3.0, 9.0]), 0.75)
    (3.0, 0.5)
    """
    if not 0 < quantile < 1:
        raise InputError(f"--quantile must lie between 0 and 1, not {quantile}")
    threshold = float(held_out.kthvalue(math.ceil(quantile * len(held_out) - 1e-9)).values)
    return threshold, float((custom > threshold).double().mean())


def calibrate(run: Run, held_out: str, quantile: float = QUANTILE, method: str = "toss") -> dict:
    """The threshold and d for a run, with what is needed to judge them.

    method: toss for the run's own references; the name of a folder under methods/ with TOSS-Pro's rounds for the
    degraded model of its last round. Returns threshold (nats), discard (d), ranked (tokens of the custom set),
    held_out (tokens), above (those of them above the threshold: how few decide), and harmful_share where the custom
    set carries ground truth, else None.
    """
    tokens, losses, sources = scored_tokens(run, needed=True)
    degraded, header = adapter_of(run, "degraded"), made_from(run.folder / "scores.safetensors")
    if method != "toss":
        rounds = sorted((run.folder / "methods" / method).glob("round-*"), key=lambda path: int(path.name.split("-")[1]))
        if not rounds:
            raise InputError(f"{run.folder / 'methods' / method} holds no rounds of TOSS-Pro")
        degraded, scores = rounds[-1] / "degraded", rounds[-1] / "scores.safetensors"
        made_of = made_from(run.folder / "methods" / method / "selection.safetensors")
        if any(made_of.get(name) != sources[name] for name in ("custom_sha256", "utility_sha256", "degraded_sha256")):
            raise InputError(f"{run.folder / 'methods' / method} was refined from other references or rows than the run has now: "
                             "run select.py again with --overwrite")
        losses, header = load_file(scores), made_from(scores)
    S = (losses["loss_utility"] - losses["loss_degraded"])[tokens.response]

    rows = read_rows(held_out)
    warn_references(run, "held-out", rows)
    base = Base(run)
    base.dtypes["score"] = header.get("dtype", base.dtypes["score"])  # the same arithmetic on both sides
    calm = run.tokens(rows, held_out)
    scored, _ = score_under(base, calm, {"loss_utility": adapter_of(run, "utility"), "loss_degraded": degraded})
    calm_S = (scored["loss_utility"] - scored["loss_degraded"])[calm.response]
    threshold, d = threshold_of(calm_S, S, quantile)
    share = round(float(tokens.harmful[tokens.response].double().mean()), 4) if tokens.harmful.any() else None
    return {"threshold": threshold, "discard": d, "ranked": len(S), "held_out": len(calm_S),
            "above": int((calm_S > threshold).sum()), "harmful_share": share}


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.calibrate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    run_flags(parser, dtype=False)  # that of the run's scores
    parser.add_argument("--held-out", required=True, help="utility rows that no reference was trained on, JSONL")
    parser.add_argument("--quantile", type=float, default=QUANTILE, help=f"q of their scores (default: {QUANTILE})")
    parser.add_argument("--method", default="toss", help="folder of TOSS-Pro's rounds, to calibrate on its last degraded model")
    return reported(lambda: command(vars(parser.parse_args(argv))))


def command(given: dict) -> None:
    """What the command line asks for."""
    held_out, quantile, method = (given.pop(name) for name in ("held_out", "quantile", "method"))
    found = calibrate(open_run(given), held_out, quantile, method)
    print(f"S of {found['held_out']} held-out tokens: the {quantile} quantile is {found['threshold']:.4f} nats, "
          f"{found['above']} lie above\n"
          f"{found['discard']:.4f} of the custom set's {found['ranked']} response tokens score above it"
          + (f"; {found['harmful_share']:.4f} of them are harmful by ground truth" if found["harmful_share"] else "")
          + f"\n\nselect.py --run {given['run']} --discard {found['discard']:.6f}")


if __name__ == "__main__":
    sys.exit(main())
