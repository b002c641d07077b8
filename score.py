"""Stage 2 of TOSS: the loss of every response token of the custom set under both references.

    python score.py
    python score.py --run runs/mine --custom custom.jsonl
    python score.py --run R --model M --custom F --degraded-adapter A --utility-adapter B

Writes RUN/scores.safetensors: the token ids, row offsets and response flags of all rows, and the
losses L^u and L^h. The score of a token is S = L^u - L^h: high where the degraded model expects the
token and the utility model does not. Its noise: python -m toss.audit.noise. Next: select.py.
"""

import sys

from toss import cli


def main(argv=None):
    """Parse the command line, then score. Raises InputError."""
    parser = cli.parser("score.py", __doc__, custom="custom set D^cus")
    parser.add_argument("--base", action="store_true", help="also score under the base (loss_base)")
    cli.add_reference_flags(parser)
    args = cli.parse(parser, argv)

    from toss.run import Run
    from toss.scoring import score

    run = Run(args)
    run.adopt_references()

    def losses():
        D_cus = run.tokens(args.custom)
        thetas = {"utility": run.adapter("utility"), "degraded": run.adapter("degraded")}
        thetas |= {"base": None} if args.base else {}
        L = {}
        for name, theta in thetas.items():  # adapters are swapped on the one base, never merged
            model, log = run.base("score", theta), run.log(f"scores-{name}")
            L[name] = score(model, D_cus, args.batch_tokens, log, log.resume)
        return D_cus, L

    inputs = ["--custom", "utility", "degraded"]
    run.once("scores", losses, inputs=inputs, settings={"base": args.base})


if __name__ == "__main__":
    sys.exit(cli.run(main))
