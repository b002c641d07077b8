"""Stage 3 of TOSS: discard the riskiest tokens and fine-tune the base on the rest.

Ranks all response tokens of the custom set together by S = L^u - L^h, drops the top share d from
the loss (they stay in the input), and trains a LoRA adapter from the base. With --pro T it first
refines the degraded model over T rounds.

    python select.py
    python select.py --run runs/mine --discard 0.1 [--pro 1 --pro-samples 40] [--merge]
    python select.py --run runs/plain --method sft --model M --custom custom.jsonl
    python select.py --run runs/other --model M2 --custom custom.jsonl --mask SELECTION
    python select.py --run runs/mine --mask-only

SELECTION is a selection.safetensors, also of another run. Writes RUN/methods/NAME: the mask in
selection.safetensors and the adapter in model/; NAME is the method, toss-pro with --pro, or --name.
With --mask-only there is no adapter; --mask with another --name trains from such a mask.
"""

import sys

if __name__ == "select":
    # Nothing of TOSS: skip this block. This file hides the standard library's `select` from every
    # program that runs in this folder: subprocess and asyncio import it. They get the real module,
    # found on the rest of the path, where no copy of this file is.
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from os.path import exists, join

    _rest = [path for path in sys.path if not exists(join(path, "select.py"))]
    _spec = PathFinder.find_spec("select", _rest)
    sys.modules["select"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["select"])
else:
    import torch

    from model.io import InputError
    from toss.config import TrainConfig
    from toss.methods import METHODS, Candidates
    from toss.selection import competing_tokens, riskiest_rows, select_tokens
    from toss.workbench import flags
    from toss.workbench.files import Round, Selection
    from toss.workbench.run import Run


def main(argv=None):
    """Parse the command line, select tokens, and fine-tune on the others. Raises InputError."""
    args = arguments(argv)
    run = Run(args)
    config = TrainConfig.of(args)
    if args.pro and not args.pro_samples:  # the paper names no k: 6 % of the rows
        args.pro_samples = max(1, round(0.06 * run.scored()[0].rows))
    reference_config = run.reference_config() if args.pro else None  # how theta^h was trained

    def choose_tokens():
        # D^cus as it was scored, the losses L of its tokens, and the places of those that compete.
        D_cus, L = run.scored(needed=needs_losses(args))
        ranked = competing_tokens(D_cus, run.tokenizer.eos_id if args.keep_eos else None)

        # TOSS-Pro: the riskiest rows of D^cus join D^h, and theta^h is trained anew.
        added = []
        rounds = []
        for t in range(args.pro):
            S = L["utility"] - L["degraded"]
            riskiest = riskiest_rows(S[ranked], D_cus.row_of(ranked), added, args.pro_samples)
            added += [row for row, _ in riskiest]

            # theta^h is trained on D^h and all rows added so far, and scores D^cus again.
            D = run.tokens(args.harmful) + D_cus.take(added)
            name = f"{args.name}-round-{t + 1}"
            theta_h = run.train(name, D, D.response.float(), reference_config)
            L["degraded"] = run.score(f"{name}-scores", theta_h, D_cus)
            # For the record: each new row, and the place of the token that brought it in.
            new_rows = [(row, int(ranked[i])) for row, i in riskiest]
            losses = dict(L)  # L changes in the next round
            rounds.append(Round(added=new_rows, S=S, degraded=theta_h, losses=losses))

        # The loss mask: which response tokens are learnt. A discarded one stays in the input.
        keep = D_cus.response.clone()
        if args.method == "toss":
            S = L["utility"] - L["degraded"]  # high: theta^h expects the token, theta^u does not
            keep[ranked] = select_tokens(S[ranked], args.discard)  # one ranking; the top d go
        elif args.method == "mask":
            keep, S = run.mask(args.mask, D_cus)
        else:
            candidates = Candidates(D_cus, L, ranked, args.discard, args.seed)
            keep[ranked], scores = METHODS[args.method].choose(candidates)
            S = None
            if scores is not None:
                S = torch.zeros(len(keep)).index_put((ranked,), scores.float())

        return Selection(D_cus, keep, S, rounds)

    def finetune():
        selection = choose_tokens()
        if args.mask_only:
            return selection, None
        w = selection.keep.float()
        theta = run.train(args.name, selection.tokens, w, config)
        return selection, theta

    settings = settings_of(args)
    if args.pro:
        settings["reference"] = reference_config.recipe()
    if not args.mask_only:
        settings |= config.recipe()
    stage = f"methods/{args.name}"
    if args.mask_only and run.has_model(stage) and not args.overwrite:
        what = f"{run.path(stage)} holds a model, and beside it the mask if it was trained here"
        raise InputError(f"{what}: give another --name, or --overwrite to have a mask alone")
    run.make(stage, finetune, inputs_of(args), settings)
    if args.merge:
        run.merge(stage)
    evaluate = flags.command("-m toss.audit.evaluate", run.folder)
    print(f"next: {evaluate} [--harmful FILE] [--benign FILE] [--utility FILE]")


def arguments(argv):
    """The command line, with what it inherits. Raises InputError for flags that contradict."""
    parser = flags.script_parser(
        "select.py", __doc__, custom="custom set D^cus", harmful="D^h, for --pro"
    )
    add = parser.add_argument_group("selection").add_argument
    add("--method", choices=METHODS, default="toss", help="which tokens to discard")
    text = "use the mask in this selection.safetensors, also of another run"
    add("--mask", metavar="FILE", help=text)
    text = "folder in RUN/methods (default: the method, or toss-pro)"
    add("--name", type=flags.method, help=text)
    text = "d, share of tokens to discard"
    add("--discard", type=flags.share, default=0.1, metavar="D", help=text)
    add("--keep-eos", action="store_true", help="leave end-of-sequence tokens out of the ranking")
    add("--pro", type=flags.natural, default=0, metavar="T", help="TOSS-Pro: rounds of refinement")
    text = "TOSS-Pro: rows added per round (default: 6 %% of the custom rows)"
    add("--pro-samples", type=flags.count, metavar="K", help=text)
    add("--mask-only", action="store_true", help="write the mask, and do not train")
    text = "also write the merged checkpoint, in the dtype of the base's files"
    add("--merge", action="store_true", help=text)
    flags.add_training_flags(parser)
    args = flags.parse(parser, argv)

    # Flags that contradict each other.
    choosing = {"method", "discard", "keep_eos", "pro", "pro_samples"} & args.typed
    if args.mask and choosing:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in sorted(choosing))
        raise InputError(f"--mask says which tokens go, so it cannot be combined with {names}")
    if args.pro and args.method != "toss":
        raise InputError("--pro is an option of --method toss")
    if not args.pro and "pro_samples" in args.typed:
        raise InputError("--pro-samples needs --pro T")
    if "discard" in args.typed and not METHODS[args.method].uses_d:
        raise InputError(f"--discard decides nothing for --method {args.method}: leave it out")
    if args.mask_only and args.merge:
        raise InputError("--mask-only trains nothing that --merge could merge")
    if args.shard and args.merge:
        advice = "first run this without --merge, then with it but without --shard and torchrun"
        raise InputError(f"--merge needs the base whole in one process: {advice}")

    # The method of a mask, and the name that follows from the method.
    if args.mask:
        args.method = "mask"
    if args.name is None:
        default = {"base": "base-reference"}.get(args.method, args.method)
        args.name = "toss-pro" if args.pro else default
    return args


def needs_losses(args):
    """True if the method ranks by losses. Another run's mask and plain fine-tuning do not."""
    return args.method != "mask" and len(METHODS[args.method].losses) > 0


def inputs_of(args):
    """What a method is made from: files by their flags, and earlier results."""
    inputs = ["--custom"]
    if needs_losses(args):
        inputs += ["utility", "degraded", "scores"]
    if args.pro:
        inputs.append("--harmful")
    if args.mask:
        inputs.append("--mask")
    return inputs


def settings_of(args):
    """The settings that decide the mask, and whether it is all that is made."""
    settings = {"method": args.method, "seed": args.seed}
    if args.mask_only:
        settings["mask_only"] = True
    if args.method not in ("sft", "mask"):
        settings["keep_eos"] = args.keep_eos
        if METHODS[args.method].uses_d:
            settings["discard"] = args.discard
    if args.pro:
        settings |= {"pro": args.pro, "pro_samples": args.pro_samples}
    return settings


if __name__ == "__main__":
    sys.exit(flags.run(main, flags.GOES_ON))
