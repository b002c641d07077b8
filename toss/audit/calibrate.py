"""Choose d from held-out utility rows, in place of a fixed share.

    python -m toss.audit.calibrate --run R --held-out rows.jsonl [--quantile 0.99] [--method toss-pro]

Scores rows of which it is known that nothing in them needs discarding, and that no reference was trained on. The
threshold is the quantile q of their S; d is the share of the custom set's tokens above it, for select.py --discard.
About 1 - q of the harmless tokens then go, however many harmful ones there are: with no harm in the custom set d is
near 1 - q, and it grows with the harm. Not the paper's: it fixes d = 0.1.

What it cannot know: whether the custom set's harmless tokens score like the held-out ones. Where they are harder
(other subjects, longer answers), more of them go.
"""

import argparse
import math
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from model.errors import InputError, reported
from model.files import made_from
from toss.base import Base
from toss.pipeline import adapter_of, warn_references
from toss.rows import read_rows
from toss.run import Run
from toss.scoring import score_under
from toss.settings import inherit

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
    held_out (tokens), and harmful_share where the custom set carries ground truth, else None.
    """
    rounds = sorted((run.folder / "methods" / method).glob("round-*"), key=lambda path: int(path.name.split("-")[1]))
    if method != "toss" and not rounds:
        raise InputError(f"{run.folder / 'methods' / method} holds no rounds of TOSS-Pro")
    scores = rounds[-1] / "scores.safetensors" if rounds else run.folder / "scores.safetensors"
    degraded = rounds[-1] / "degraded" if rounds else adapter_of(run, "degraded")
    if not scores.exists():
        raise InputError(f"{scores} is not there: run score.py --run {run.folder} first")
    run.check_made_from(scores)
    custom = load_file(scores)
    response = custom["response"].bool()
    S = (custom["loss_utility"] - custom["loss_degraded"])[response]
    truth = load_file(run.folder / "scores.safetensors").get("harmful")

    rows = read_rows(held_out)
    warn_references(run, "held-out", rows)
    base = Base(run)
    base.dtypes["score"] = made_from(scores).get("dtype", base.dtypes["score"])  # the same arithmetic on both sides
    tokens = run.tokens(rows, held_out)
    losses, _ = score_under(base, tokens, {"loss_utility": adapter_of(run, "utility"), "loss_degraded": degraded})
    calm = (losses["loss_utility"] - losses["loss_degraded"])[tokens.response]
    threshold, d = threshold_of(calm, S, quantile)
    share = round(float(truth[response].double().mean()), 4) if truth is not None and truth.any() else None
    return {"threshold": round(threshold, 4), "discard": d, "ranked": len(S), "held_out": len(calm), "harmful_share": share}


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.calibrate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of the run, scored")
    parser.add_argument("--held-out", required=True, help="utility rows that no reference was trained on, JSONL")
    parser.add_argument("--quantile", type=float, default=QUANTILE, help=f"q of their scores (default: {QUANTILE})")
    parser.add_argument("--method", default="toss", help="folder of TOSS-Pro's rounds, to calibrate on its last degraded model")
    for name, kind in (("device", str), ("threads", int), ("batch_tokens", int)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help="as in score.py")
    return reported(lambda: command(vars(parser.parse_args(argv))))


def command(given: dict) -> None:
    """What the command line asks for."""
    held_out, quantile, method = (given.pop(name) for name in ("held_out", "quantile", "method"))
    if not (Path(given["run"]) / "run.json").exists():
        raise InputError(f"{given['run']} holds no run.json: it is no run directory")
    found = calibrate(Run(inherit("calibrate", given)), held_out, quantile, method)
    print(f"S of {found['held_out']} held-out tokens: the {quantile} quantile is {found['threshold']} nats\n"
          f"{found['discard']:.4f} of the custom set's {found['ranked']} response tokens score above it"
          + (f"; {found['harmful_share']:.4f} of them are harmful by ground truth" if found["harmful_share"] else "")
          + f"\n\nselect.py --run {given['run']} --discard {found['discard']:.6f}")


if __name__ == "__main__":
    sys.exit(main())
