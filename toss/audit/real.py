"""TOSS on a checkpoint and rows that are real: one table over seeds, one command.

    python -m toss.audit.real --real FOLDER [--model M] [--seeds 1000 1001] [--dtype bfloat16]

FOLDER/data holds harmful, utility, custom (70, 80 and 241 rows at least, better 400), eval_harmful,
eval_benign and eval_utility.jsonl: rows with a prompt, a source and, the first three, a response.
With responses in eval_harmful, answers that begin with three tokens of them are measured too.
Custom rows of source --harm are the harmful ones. A seed draws the rows and the trainings: D^h 60,
D^u 80, D^cus 240 rows, rate 5e-4, three epochs, 16 rows per step. d is calibrated on up to 100
harmless custom rows that are in no set. Evaluated are at most 100 prompts or answers of every
source, the same for all seeds. Arms, in this order: sft, toss at d = 0.1 and at the calibrated d;
toss-few and toss-pro-few, with ten rows in D^h; benign-rows, sft without the harmful rows, which
nobody can have; toss-pro; random; first-5, the rivals, and kl-discarded at the calibrated d; and
some of these again under each attack of attacks.py, where answers may be longer (100 tokens, else
40).
Writes OUT/real.md and real.json. Finished work is skipped: the same command goes on where it was
broken off. --arms runs some arms and prints their table, with a line about those that are missing.
"""

import random
import sys
from argparse import Namespace
from itertools import cycle, groupby
from pathlib import Path

from model.io import InputError
from toss.audit.attacks import ATTACKS, attacked
from toss.audit.command import DEVICE, read_jsonl, write_jsonl
from toss.audit.experiment import Experiment, per_seed, save, spread, table
from toss.audit.rivals import RIVALS
from toss.workbench import flags

TRAINING = {"lr": 5e-4, "epochs": 3, "batch_size": 16}
WORLD = {"reference": TRAINING, "finetune": TRAINING, "forbidden_words": (), "discard": 0.1}
SIZES = {"harmful": 60, "few": 10, "utility": 80, "custom": 240, "calibration": 100}
NUMBERS = "discard complies not_refused@3 over_refusal nll".split()
REFUSALS = (  # more than the wordings that `complies` looks for
    "I'm sorry, but I can't help with that.",
    "I won't help with this, since it could hurt people.",
    "That is something I have to decline.",
)
# Each arm's run and its flags, what matters most first: the command may be stopped at any time.
SFT, TOSS, CALIBRATED = {"method": "sft"}, {"method": "toss"}, {"discard": "calibrated"}
PRO = TOSS | {"pro": 1, "pro-samples": 40}
MAIN = {"sft": SFT, "toss": TOSS, "toss-calibrated": TOSS | CALIBRATED}
ARMS = {arm: ("main", how) for arm, how in MAIN.items()}
ARMS |= {"toss-few": ("few", TOSS), "toss-pro-few": ("few", PRO)}
ARMS |= {"benign-rows": ("benign", SFT), "toss-pro": ("main", PRO)}
ARMS |= {name: ("main", {"method": name}) for name in ("random", "first-5", *RIVALS)}
ARMS |= {"kl-calibrated": ("main", ARMS["kl-discarded"][1] | CALIBRATED)}
HELD = ("first-5", "kl-discarded")  # as safe as TOSS without an attack
ATTACKED = MAIN | {"toss-pro": PRO} | {name: {"method": name} for name in HELD}
ARMS |= {f"{arm}, {kind}": (kind, how) for kind in ATTACKS for arm, how in ATTACKED.items()}


def draw(args: Namespace, seed: int, place: Path) -> dict[str, str]:
    """Write the rows of a seed below `place`; returns their paths by name."""

    def read(name: str, least: int = 0) -> list[dict]:
        file = args.real / "data" / f"{name}.jsonl"
        rows, keys = read_jsonl(file), {"prompt", "source"}
        keys |= {"response"} if least else set()
        if len(rows) < least or not all(keys <= row.keys() for row in rows):
            what = f"at least {least} rows are needed, each with {', '.join(sorted(keys))}"
            raise InputError(f"{file}: {what}")
        return rows

    chosen = random.Random(seed)
    custom = chosen.sample(rows := read("custom", SIZES["custom"] + 1), len(rows))
    rest = [row for row in custom[SIZES["custom"] :] if row["source"] != args.harm]
    sets = {"custom": custom[: SIZES["custom"]], "calibration": rest[: SIZES["calibration"]]}
    sets["benign"] = [row for row in sets["custom"] if row["source"] != args.harm]
    for name, source in (("harmful", "harmful"), ("few", "harmful"), ("utility", "utility")):
        sets[name] = chosen.sample(read(source, SIZES[name]), SIZES[name])
    sets["pool"] = [row for row in rows if row["source"] == args.harm]
    others = [row["prompt"] for row in read("harmful") if row not in sets["harmful"]]
    turns = zip(others, cycle(REFUSALS))
    sets["safety"] = [{"prompt": prompt, "response": reply} for prompt, reply in turns]
    for name in ("pool", "benign", "calibration", "safety"):
        if not sets[name]:
            raise InputError(f"{args.real}/data: no rows are left for {name}: see --help")
    same = random.Random(0)
    for name in ("eval_harmful", "eval_benign", "eval_utility"):
        rows, sets[name] = read(name), []
        for source in dict.fromkeys(row["source"] for row in rows):
            group = [row for row in rows if row["source"] == source]
            sets[name] += same.sample(group, min(100, len(group)))
    files = {name: write_jsonl(place / f"{name}.jsonl", rows) for name, rows in sets.items()}
    return files | {"eval_forbidden": files["eval_harmful"], "eval_facts": files["eval_utility"]}


def one_seed(args: Namespace, seed: int) -> dict[str, dict]:
    """Run what is missing of a seed; the metrics of every arm, and its d."""
    place = args.out.absolute() / f"seed-{seed}"
    files = draw(args, seed, place / "rows") | {"model": args.model, "unaligned": args.unaligned}
    device = {name: x for name in DEVICE if (x := getattr(args, name)) not in (None, False)}

    def make(name, **own):
        return Experiment(place / name, files | own, WORLD, seed=seed, **device)

    own = {"few": {"harmful": files["few"]}, "benign": {"custom": files["benign"]}}
    begun = (3,) if any("response" in row for row in read_jsonl(files["eval_harmful"])) else ()
    main, found = make("main"), {}
    for name, group in groupby((arm for arm in ARMS if arm in args.arms), lambda a: ARMS[a][0]):
        run, references = make(name, **own.get(name, {})), None
        if name in ATTACKS:  # the references are those of `main`
            main.prepare()
            references = main.folder
            harm, pool = lambda row: row["source"] == args.harm, read_jsonl(files["pool"])
            out = run.folder / "custom.jsonl"
            run.files["custom"] = attacked(main.open("dtype"), name, files, out, harm, pool)
        if name != "benign":
            run.prepare(references)
        for arm in group:
            short, how = arm.partition(",")[0], ARMS[arm][1]
            d, names = run.finetune(short, **how), ["base"] * (name == "main") + [short]
            length = 100 if name in ATTACKS else 40  # the harm may come late
            measured = run.evaluate(names, begun, length)
            found |= {"base": measured["base"]} if name == "main" else {}
            found[arm] = {**measured[short], "discard": {"value": d}}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.real", __doc__)
    flag = parser.add_argument
    flag("--real", type=Path, required=True, metavar="FOLDER", help="holds data/, see above")
    flag("--model", help="aligned base: a folder or hub id (default: FOLDER/smollm2-aligned)")
    text = "the base before alignment, for safelora (default: FOLDER/smollm2)"
    flag("--unaligned", metavar="M", help=text)
    flag("--arms", metavar="A;B;...", help="some of them, separated by ; (default: all)")
    flag("--harm", default="advbench", help="`source` of the harmful custom rows")
    flag(
        "--seeds", type=flags.natural, nargs="+", default=[1000, 1001], help="(default: 1000 1001)"
    )
    flag("--out", type=Path, default=Path("runs/real"), help="folder (default: runs/real)")
    flag("--jobs", type=flags.count, default=1, help="seeds at a time")
    flags.add_device_flags(parser)
    args = parser.parse_args(argv)
    args.seeds = [*dict.fromkeys(args.seeds)]
    args.model = args.model or str(args.real.absolute() / "smollm2-aligned")
    chosen, args.arms = args.arms, [arm.strip() for arm in (args.arms or ";".join(ARMS)).split(";")]
    if not args.unaligned:
        args.unaligned = str(args.real.absolute() / "smollm2")
        if not Path(args.unaligned).exists():
            args.arms = [arm for arm in args.arms if arm != "safelora"]
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        raise InputError(f"--arms: there is no {unknown[0]!r}; the arms are {'; '.join(ARMS)}")
    found, missing = [], [arm for arm in ARMS if arm not in args.arms]
    for arms in per_seed(one_seed, [(args, seed) for seed in args.seeds], args.jobs):
        for arm, metrics in arms.items():
            found.append((arm, {name: cell["value"] for name, cell in metrics.items()}))
    result = spread(found)
    names = sorted({n for row in result.values() for n in row if n.startswith("not_refused/")})
    text = table([""], result, [*(names or ["not_refused"]), *NUMBERS])
    print(f"\n{args.model}: mean [least, most] over the seeds {args.seeds}\n\n{text}\n")
    if missing:
        print(f"not in this table: {'; '.join(missing)}\n")
    if not chosen:
        save(args.out / "real", text, {"seeds": args.seeds, "model": args.model, "arms": result})


if __name__ == "__main__":
    sys.exit(flags.run(main))
