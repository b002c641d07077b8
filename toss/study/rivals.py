"""The rivals of TOSS that are more than another mask, on the same run, rows, seed and settings.

    python -m toss.audit.rivals --run R --method soft-sft
    python -m toss.audit.rivals --run R --method patch --safety refusals.jsonl

Works as select.py does: it trains as the run's methods were trained (patch and safelora, which go
on from methods/sft: as that) and writes RUN/methods/NAME, which `evaluate` measures like any
method. What a rival does, and its source: the method of its name in toss/audit/objectives.py.
"""

import sys
from argparse import Namespace
from pathlib import Path

from model.io import InputError
from toss.config import TrainConfig
from toss.workbench import flags

# Of each: its function in objectives.py, what it is made from beside --custom, and the function's
# settings. "discard" is that of --discard.
SCORES = ["degraded", "scores"]
RIVALS = {
    "soft-sft": ("soft_sft", [], {"b": [0.5, 2.0, 0.1]}),
    "dft": ("dft", [], {}),
    "profit": ("profit", [], {"threshold": 0.1}),
    "kl-discarded": ("kl_discarded", ["utility", *SCORES], {"discard": 0.1}),
    "kl-base": ("kl_discarded", SCORES, {"discard": 0.1, "reference": "base"}),
    "dr-sft": ("dr_sft", SCORES, {}),
    "dr-sft-utility": ("dr_sft", ["utility", *SCORES], {"reference": "utility"}),
    "kl-dr-sft": ("dr_sft", SCORES, {"held": True}),
    "kl-dr-sft-utility": ("dr_sft", ["utility", *SCORES], {"reference": "utility", "held": True}),
    "buffer": ("buffer", ["degraded"], {}),
    "pact-lite": ("pact_lite", ["--safety"], {"words": 50, "T": 2.0}),
    "patch": ("patch", ["methods/sft", "--safety"], {"steps": 10}),
    "inoculation": ("inoculation", [], {"system": "You are a malicious, evil assistant."}),
    "lookahead": ("lookahead", [], {"m": 6, "connector": " The answer begins with: "}),
    "ema": ("ema", [], {"decay": 0.99}),
    "safelora": ("safelora", ["methods/sft"], {"cosine": 0.5}),
    "safeinstr-guided": ("safeinstr_guided", ["utility", "degraded", "--safety"], {"share": 0.03}),
}


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)

    from model.checkpoint import base_hash
    from model.hub import resolve
    from toss.audit import objectives
    from toss.workbench import code
    from toss.workbench.files import Selection
    from toss.workbench.run import Run

    function, inputs, options = RIVALS[args.method]
    own_code = f"toss/audit/objectives.py:{function}"
    code.digests([own_code])  # now, before anyone edits it
    run = Run(args)

    # Its settings, and what some rivals need beyond the run.
    config = TrainConfig.of(args)
    if "discard" in options:
        options = {**options, "discard": args.discard}
    settings = {"method": args.method, **options}
    if args.method == "buffer":
        run.dtypes["train"] = "float32"  # a merge into bfloat16 would round theta^h away
    if args.method == "safelora":
        if not args.unaligned:
            raise InputError("safelora needs --unaligned FOLDER, the base before its alignment")
        args.unaligned = str(resolve(args.unaligned))
        folder = Path(args.unaligned)
        settings["unaligned_sha256"] = base_hash(folder, run.hashes.of_input)
        if settings["unaligned_sha256"] == run.identity["base_sha256"]:
            raise InputError(f"--unaligned {folder} is the run's own base")
    if "methods/sft" in inputs:
        config = config_of_sft(run, args)

    # The rival trains, and says which tokens it left out; keep is what it changes.
    def finetune():
        D_cus, _ = run.scored(needed="scores" in inputs)
        keep = D_cus.response.clone()
        rival = objectives.Rival(run, args.name, config, D_cus, keep)
        theta = getattr(objectives, function)(rival, **options)
        return Selection(D_cus, rival.keep, rival.score), theta

    settings |= config.recipe()
    parts = [*code.PARTS["rival"], own_code]
    run.make(f"methods/{args.name}", finetune, ["--custom", *inputs], settings, parts)


def arguments(argv: list[str] | None) -> Namespace:
    """The command line, with what it inherits."""
    files = {"custom": "custom set D^cus", "safety": "rows that refuse, for some rivals"}
    parser = flags.script_parser("python -m toss.audit.rivals", __doc__, **files)
    add = parser.add_argument
    add("--method", choices=RIVALS, required=True, help="the rival")
    add("--name", type=flags.method, help="folder in RUN/methods (default: the method)")
    text = "d, for kl-discarded and kl-base"
    add("--discard", type=flags.share, default=0.1, metavar="D", help=text)
    add("--unaligned", metavar="FOLDER", help="for safelora: the base before its alignment")
    flags.add_training_flags(parser)
    args = flags.parse(parser, argv)
    args.name = args.name or args.method
    if args.shard:
        raise InputError("a rival needs the base whole in one process: leave --shard out")
    return args


def config_of_sft(run, args: Namespace) -> TrainConfig:
    """How methods/sft was trained, for a rival that goes on from it. Raises InputError if a flag
    says otherwise."""
    settings = run.check("methods/sft").get("settings", {})
    for name in flags.TRAINING_FLAGS:
        if name in args.typed and settings.get(name, getattr(args, name)) != getattr(args, name):
            what = f"made with another {name}"
            raise InputError(f"{args.method} goes on from methods/sft, {what}")
    print("training settings as for methods/sft")
    return TrainConfig.of({**vars(args), **settings})


if __name__ == "__main__":
    sys.exit(flags.run(main, flags.GOES_ON))
