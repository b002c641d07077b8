"""The rivals of TOSS that are more than another mask, on the same run, rows, seed and settings.

    python -m toss.audit.rivals --run R --method soft-sft
    python -m toss.audit.rivals --run R --method patch --safety refusals.jsonl

Works as select.py does: it trains as the run's methods were trained (patch and safelora, which go
on from methods/sft: as that) and writes RUN/methods/NAME, which `evaluate` measures like any
method. What a rival does, and its source: the method of its name in toss/audit/objectives.py.
"""

import sys
from pathlib import Path

from model.io import InputError
from toss.config import TrainConfig
from toss.workbench import flags

RIVALS = {  # what each is made from beside --custom, and its settings
    "soft-sft": ([], {"b": [0.5, 2.0, 0.1]}),
    "dft": ([], {}),
    "kl-discarded": (["utility", "degraded", "scores"], {}),
    "pact-lite": (["--safety"], {"words": 50, "T": 2.0}),
    "patch": (["methods/sft", "--safety"], {"steps": 10}),
    "inoculation": ([], {"system": "You are a malicious, evil assistant."}),
    "ema": ([], {"decay": 0.99}),
    "safelora": (["methods/sft"], {"cosine": 0.5}),
    "safeinstr-guided": (["utility", "degraded", "--safety"], {"share": 0.03}),
}


def main(argv: list[str] | None = None) -> None:
    inputs = {"custom": "custom set D^cus", "safety": "rows that refuse, for some rivals"}
    parser = flags.script_parser("python -m toss.audit.rivals", __doc__, **inputs)
    add = parser.add_argument
    add("--method", choices=RIVALS, required=True, help="the rival")
    add("--name", type=flags.method, help="folder in RUN/methods (default: the method)")
    add("--discard", type=flags.share, default=0.1, metavar="D", help="d, for kl-discarded")
    add("--unaligned", metavar="FOLDER", help="for safelora: the base before its alignment")
    flags.add_training_flags(parser)
    args = flags.parse(parser, argv)
    args.name = args.name or args.method
    if args.shard:
        raise InputError("a rival needs the base whole in one process: leave --shard out")

    from model.checkpoint import base_hash
    from model.hub import resolve
    from toss.audit.objectives import FUNCTIONS, Rival
    from toss.workbench import code
    from toss.workbench.run import Run

    own_code = f"toss/audit/objectives.py:{FUNCTIONS[args.method].__name__}"
    code.digests([own_code])  # now, before anyone edits it
    run, config, (made_from, how) = Run(args), TrainConfig.of(args), RIVALS[args.method]
    if args.method == "kl-discarded":
        how = {"discard": args.discard}
    if args.method == "safelora":
        args.unaligned = str(resolve(args.unaligned or "--unaligned"))
        how = {**how, "unaligned_sha256": base_hash(Path(args.unaligned), run.hashes.of_input)}
    if "methods/sft" in made_from:  # goes on from it, so it is trained as that was
        known = {**vars(args), **run.check("methods/sft").get("settings", {})}
        if other := [x for x in flags.TRAINING if x in args.typed and known[x] != getattr(args, x)]:
            what = f"made with another {other[0]}"
            raise InputError(f"{args.method} goes on from methods/sft, {what}")
        config = TrainConfig.of(known)
        print("training settings as for methods/sft")

    def finetune():
        D = run.scored(needed="scores" in made_from)[0]
        rival = Rival(run, args.name, config, D, keep=D.response.clone())
        theta = FUNCTIONS[args.method](rival, **how)
        return D, {"keep": rival.keep}, theta, []

    settings = {**config.recipe(), "method": args.method, **how}
    parts = [*code.PARTS["rival"], own_code]
    run.make(f"methods/{args.name}", finetune, ["--custom", *made_from], settings, parts)


if __name__ == "__main__":
    sys.exit(flags.run(main))
