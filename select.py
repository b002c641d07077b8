"""Stage 3 of TOSS: discard the riskiest tokens and fine-tune the base on the rest.

Ranks all response tokens of the custom set together by S = L^u - L^h, drops the top share d from
the loss (they stay in the input), and trains a LoRA adapter from the base. With --pro T it first
refines the degraded model over T rounds.

    python select.py
    python select.py --run runs/mine --discard 0.1 [--pro 1 --pro-samples 40] [--merge]
    python select.py --run runs/plain --method sft --model M --custom custom.jsonl
    python select.py --run runs/other --model M2 --custom custom.jsonl --mask SELECTION

SELECTION is a selection.safetensors of another run. Writes RUN/methods/NAME: the mask in
selection.safetensors and the adapter in model/; NAME is the method, toss-pro with --pro, or --name.
"""

import sys

if __name__ == "select":
    # This file hides the standard library's `select` from every program that runs in this folder:
    # subprocess and asyncio import it. They get the real module, found on the rest of the path.
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from os.path import dirname, realpath

    _rest = [path for path in sys.path if realpath(path or ".") != dirname(realpath(__file__))]
    _spec = PathFinder.find_spec("select", _rest)
    sys.modules["select"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["select"])
else:
    from toss import cli
    from toss.config import METHODS, UNSCORED, TrainConfig


def arguments(argv):
    """The command line, with what it inherits. Raises InputError."""
    parser = cli.parser("select.py", __doc__, custom="custom set D^cus", harmful="D^h, for --pro")
    add = parser.add_argument
    add("--method", choices=METHODS, default="toss", help="which tokens to discard")
    add("--mask", metavar="FILE", help="use the mask of another run (its selection.safetensors)")
    add("--name", type=cli.method, help="folder in RUN/methods (default: the method, or toss-pro)")
    add("--discard", type=cli.share, default=0.1, metavar="D", help="d, share of tokens to discard")
    add("--keep-eos", action="store_true", help="leave end-of-sequence tokens out of the ranking")
    add("--pro", type=cli.natural, default=0, metavar="T", help="TOSS-Pro: rounds of refinement")
    text = "TOSS-Pro: rows added per round (default: 6 %% of the custom rows)"
    add("--pro-samples", type=cli.count, metavar="K", help=text)
    text = "TOSS-Pro: train on added rows whole (the paper), or only on their top d"
    add("--pro-train", choices=["rows", "top"], default="rows", help=text)
    add("--merge", action="store_true", help="also write the merged checkpoint")
    cli.add_training_flags(parser)
    return cli.check_method(cli.parse(parser, argv))


def main(argv=None):
    """Parse the command line, select tokens, and fine-tune on the others. Raises InputError."""
    args = arguments(argv)

    import torch  # after parsing: it takes a while

    from toss.methods import Candidates, choose
    from toss.run import Run
    from toss.scoring import score
    from toss.selection import competing_tokens, riskiest_rows, select_tokens
    from toss.training import train

    run, config = Run(args), TrainConfig.of(args)
    if args.pro and not args.pro_samples:  # the paper names no k: 6 % of the rows
        args.pro_samples = max(1, round(0.06 * run.scored()[0].rows))

    def finetune():
        D_cus, L = run.scored(needed=args.method not in UNSCORED)  # the very ids that were scored
        ranked = competing_tokens(D_cus, run.tokenizer.eos_id if args.keep_eos else None)

        added = []  # TOSS-Pro: the riskiest rows of D^cus join D^h, and theta^h starts anew
        for t in range(args.pro):
            S, name = L["utility"] - L["degraded"], f"{args.name}-round-{t + 1}"
            found = riskiest_rows(S[ranked], D_cus.row_of(ranked), skip=added, k=args.pro_samples)
            added += [row for row, _ in found]
            w_cus = D_cus.response.float()  # theta^h learns the added rows whole,
            if args.pro_train == "top":  # or only their riskiest tokens (not the paper's)
                risky = ranked[~select_tokens(S[ranked], args.discard)]
                w_cus = torch.zeros_like(w_cus).index_fill(0, risky, 1)
            D_h = run.tokens(args.harmful)
            w_h = torch.cat((D_h.response.float(), w_cus[D_cus.places(added)]))
            D_h, config_h, log = D_h + D_cus.take(added), run.reference_config(), run.log(name)
            theta_h = train(run.base("train"), D_h, w_h, config_h, start=log.resume, on_step=log)
            log = run.log(f"{name}-scores")
            how = args.batch_tokens, log, log.resume
            L["degraded"] = score(run.base("score", theta_h), D_cus, *how)
            brought = [(row, int(ranked[i]), float(S[ranked[i]])) for row, i in found]
            run.save_round(t + 1, brought, theta_h, L)

        keep = torch.ones_like(D_cus.response)
        if args.method == "toss":
            S = L["utility"] - L["degraded"]  # high: theta^h expects the token, theta^u does not
            keep[ranked] = select_tokens(S[ranked], args.discard)  # one ranking; the top d go
        elif args.method == "mask":
            keep, S = run.mask(D_cus)
        else:
            keep, S = choose(args.method, Candidates(D_cus, L, ranked, args.discard, args.seed))
        w, log = keep.float(), run.log(args.name)  # a discarded token stays in the input
        theta = train(run.base("train"), D_cus, w, config, start=log.resume, on_step=log)
        return D_cus, {"keep": keep, "score": S}, theta

    run.once(f"methods/{args.name}", finetune, **cli.choice(args, config))
    if args.merge:
        run.merge(f"methods/{args.name}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
