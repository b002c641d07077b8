"""Stage 2 of TOSS: the loss of every response token of the custom set under both references.

    python score.py
    python score.py --run runs/mine --custom custom.jsonl

Writes RUN/scores.safetensors: the token ids, row offsets and response flags of all rows, and the
losses L^u and L^h. The score of a token is S = L^u - L^h: high where the degraded model expects the
token and the utility model does not. Its noise: python -m toss.audit.noise. Next: select.py.

References that were made elsewhere are scored, too: put the PEFT folders into RUN/degraded and
RUN/utility, and give --model and --custom.
"""

import sys

from toss.workbench import flags
from toss.workbench.files import Losses
from toss.workbench.run import Run


def main(argv=None):
    """Parse the command line, then score. Raises InputError."""
    parser = flags.script_parser("score.py", __doc__, custom="custom set D^cus")
    parser.add_argument("--base", action="store_true", help="also score under the base (loss_base)")
    args = flags.parse(parser, argv)

    run = Run(args)

    def score_all():
        D_cus = run.tokens(args.custom)
        L = {}
        for name in ("utility", "degraded", *(["base"] if args.base else [])):
            L[name] = run.score(f"scores-{name}", name, D_cus)  # adapters are never merged
        return Losses(D_cus, L)

    def add_base():
        D_cus, L = run.losses("scores")
        L["base"] = run.score("scores-base", "base", D_cus)
        return Losses(D_cus, L)

    inputs = ["--custom", "utility", "degraded"]  # a file, by its flag, and earlier results
    run.make("scores", score_all, inputs, settings={})
    if args.base and "base" not in run.losses("scores")[1]:  # they were made without it
        run.make("scores", add_base, inputs, settings={}, again=True)
    print(f"next: {flags.command('select.py', run.folder)}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
