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
    from model.io import InputError
    from toss.config import TrainConfig
    from toss.methods import METHODS, Candidates, choose
    from toss.selection import competing_tokens, riskiest_rows, select_tokens
    from toss.workbench import flags
    from toss.workbench.files import Losses, Mask
    from toss.workbench.run import Run


def main(argv=None):
    """Parse the command line, select tokens, and fine-tune on the others. Raises InputError."""
    args = arguments(argv)
    run = Run(args)
    config = TrainConfig.of(args)
    here = f"methods/{args.name}"
    scores = "scores"

    run.expect(f"{here}/selection", settings_of(args))

    # TOSS-Pro: theta^h is refined, round by round.
    added = []
    for t in range(1, args.pro + 1):
        scores, added = refine(run, args, t, scores, added)

    # What the mask is made from: a method says which losses it needs.
    needed = METHODS[args.method].losses
    inputs = ["--custom"]
    if needed:
        inputs.append(scores)
    if "base" in needed:
        inputs.append("loss_base")
    if args.mask:
        inputs.append("--mask")

    # The loss mask: which response tokens are learnt. A discarded one stays in the input.
    def choose_tokens():
        D_cus, L = run.losses(scores) if needed else (run.tokens(args.custom), {})
        if args.mask:
            return run.mask("--mask", D_cus)
        ranked = competing_tokens(D_cus, run.tokenizer.eos_id if args.keep_eos else None)
        keep = D_cus.response.clone()
        if args.method == "toss":
            S = L["utility"] - L["degraded"]  # high: theta^h expects the token, theta^u does not
            keep[ranked] = select_tokens(S[ranked], args.discard)  # one ranking; the top d go
            return Mask(D_cus, keep, S)
        keep, score = choose(args.method, Candidates(D_cus, L, ranked, args.discard, args.seed))
        return Mask(D_cus, keep, score)

    run.make(f"{here}/selection", choose_tokens, inputs, settings_of(args))

    # Fine-tuning of the base on what is kept.
    def finetune():
        D_cus = run.tokens(args.custom)
        w = run.mask(f"{here}/selection", D_cus).weights()
        return run.train(args.name, D_cus, w, config)

    if not args.mask_only:
        run.make(f"{here}/model", finetune, ["--custom", f"{here}/selection"], config.recipe())
    if args.merge:
        run.merge(f"{here}/model")
    evaluate = flags.command("-m toss.audit.evaluate", run.folder)
    print(f"next: {evaluate} [--harmful FILE] [--benign FILE] [--utility FILE]")


def refine(run, args, t, scores, added):
    """Round t of TOSS-Pro: the rows with the riskiest tokens join D^h, and theta^h is trained anew.

    scores: those to go by. added: the rows of earlier rounds, [row, place of the token that brought
    it in]. Returns the scores under the new theta^h, and the rows with those of this round.
    """
    reference = run.reference_config()  # how theta^h was trained
    D_cus, L = run.losses(scores)
    ranked = competing_tokens(D_cus, run.tokenizer.eos_id if args.keep_eos else None)
    S = (L["utility"] - L["degraded"])[ranked]
    k = args.pro_samples or max(1, round(0.06 * D_cus.rows))  # the paper names no k
    riskiest = riskiest_rows(S, D_cus.row_of(ranked), [row for row, _ in added], k)
    added = added + [[row, int(ranked[i])] for row, i in riskiest]
    print(f"TOSS-Pro round {t}: {len(riskiest)} rows join D^h")
    if not riskiest:
        raise InputError("no row is left that could join D^h: lower --pro or --pro-samples")

    def retrain():
        D = run.tokens(args.harmful) + D_cus.take([row for row, _ in added])
        return run.train(f"{args.name}-round-{t}", D, D.response.float(), reference)

    def rescore():
        L_h = run.score(f"{args.name}-round-{t}-scores", theta_h, D_cus)
        return Losses(D_cus, {**L, "degraded": L_h})  # L^u as it was

    folder = f"methods/{args.name}/round-{t}"
    theta_h = f"{folder}/degraded"
    settings = {**reference.recipe(), "keep_eos": args.keep_eos, "pro_samples": k}
    inputs = ["--harmful", "--custom", scores]
    record = run.make(theta_h, retrain, inputs, settings, facts={"added": added})
    run.make(f"{folder}/scores", rescore, ["--custom", scores, theta_h], settings={})
    return f"{folder}/scores", record["added"]  # of a round that is there, what it was trained on


def settings_of(args):
    """The settings that decide the mask."""
    settings = {"method": args.method}
    if args.method not in ("sft", "mask"):
        settings["keep_eos"] = args.keep_eos
        if METHODS[args.method].uses_d:
            settings["discard"] = args.discard
        if args.method == "toss":
            settings["pro"] = args.pro
        else:
            settings["seed"] = args.seed
    return settings


def arguments(argv):
    """The command line, with what it inherits. Raises InputError for flags that contradict."""
    parser = flags.script_parser(
        "select.py", __doc__, custom="custom set D^cus", harmful="D^h, for --pro"
    )
    flags.add_selection_flags(parser)
    flags.add_training_flags(parser)
    args = flags.parse(parser, argv)

    # Flags that contradict each other.
    chosen = args.typed & {"method", "discard", "keep_eos", "pro", "pro_samples"}
    no_d = "discard" in args.typed and not METHODS[args.method].uses_d
    for wrong, message in (
        (
            args.mask and chosen,
            f"--mask says which tokens go: leave out {', '.join(sorted(chosen))}",
        ),
        (args.pro and args.method != "toss", "--pro is an option of --method toss"),
        ("pro_samples" in args.typed and not args.pro, "--pro-samples needs --pro T"),
        (no_d, f"--discard decides nothing for --method {args.method}: leave it out"),
        (args.mask_only and args.merge, "--mask-only trains nothing that --merge could merge"),
        (args.shard and args.merge, "--merge needs the base whole: run it again without --shard"),
    ):
        if wrong:
            raise InputError(message)

    # The method of a mask, and the name that follows from the method.
    if args.mask:
        args.method = "mask"
    if args.name is None:
        args.name = {"base": "base-reference"}.get(args.method, args.method)
        if args.pro:
            args.name = "toss-pro"
    return args


if __name__ == "__main__":
    sys.exit(flags.run(main))
