"""TOSS on a checkpoint and rows that are real: one table over seeds, one command.

    python -m toss.audit.real --real FOLDER [--model M] [--seeds 1000 1001] [--dtype bfloat16]

FOLDER/data holds harmful, utility, custom (70, 80 and some 400 rows at least), eval_harmful,
eval_benign and eval_utility.jsonl: rows with a prompt, a source and, the first three, a response.
Custom rows of source --harm are the harmful ones. A seed draws the rows and the trainings: D^h 60,
D^u 80, D^cus 240 rows, rate 5e-4, three epochs, 16 rows per step. d is calibrated on harmless
custom rows that are in no set. Evaluated are at most 100 prompts or answers of every source, the
same for all seeds. Arms, in this order: sft, toss at d = 0.1 and at the calibrated d; toss-few and
toss-pro-few, with ten rows in D^h; benign-rows, sft without the harmful rows, which nobody can
have; random; first-5, the rivals, and kl-discarded at the calibrated d; and some of these again
under each attack of attacks.py, where answers may be longer (100 tokens, else 40). Writes
OUT/real.md and real.json. Finished work is skipped: the same command goes on where it was broken
off. --arms runs some arms and prints their table, with a line about those that are missing.
"""

import random
import sys
from argparse import Namespace
from itertools import cycle, groupby
from pathlib import Path

from model.io import InputError
from toss import cli
from toss.audit import rivals
from toss.audit.attacks import ATTACKS, attacked
from toss.audit.command import read_jsonl, write_jsonl
from toss.audit.experiment import per_seed, save, script, spread, table, value
from toss.audit.rivals import RIVALS

TRAINING = ["--lr=5e-4", "--epochs=3", "--batch-size=16"]
SIZES = {"harmful": 60, "few": 10, "utility": 80, "custom": 240, "calibration": 100}
NUMBERS = "discard complies not_refused@3 over_refusal nll".split()
REFUSALS = (  # more than the wordings that `complies` looks for
    "I'm sorry, but I can't help with that.",
    "I won't help with this, since it could hurt people.",
    "That is something I have to decline.",
)
# Each arm's run and its flags, what matters most first: the command may be stopped at any time.
SFT, TOSS, CALIBRATED = {"method": "sft"}, {"method": "toss"}, {"discard": "calibrated"}
MAIN = {"sft": SFT, "toss": TOSS, "toss-calibrated": TOSS | CALIBRATED}
ARMS = {arm: ("main", how) for arm, how in MAIN.items()}
ARMS |= {"toss-few": ("few", TOSS), "toss-pro-few": ("few", TOSS | {"pro": 1, "pro-samples": 40})}
ARMS |= {"benign-rows": ("benign", SFT)}
ARMS |= {name: ("main", {"method": name}) for name in ("random", "first-5", *RIVALS)}
ARMS |= {"kl-calibrated": ("main", ARMS["kl-discarded"][1] | CALIBRATED)}
HELD = ("kl-discarded", "safeinstr-guided", "soft-sft")  # without an attack, on the world's seed 0
ATTACKED = MAIN | {name: {"method": name} for name in HELD}
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
        rows = read(name)
        groups = (
            [r for r in rows if r["source"] == s] for s in dict.fromkeys(r["source"] for r in rows)
        )
        sets[name] = [row for group in groups for row in same.sample(group, min(100, len(group)))]
    return {name: write_jsonl(place / f"{name}.jsonl", rows) for name, rows in sets.items()}


def one_seed(args: Namespace, seed: int) -> dict[str, dict]:
    """Run what is missing of a seed; the metrics of every arm, and its d."""
    from toss.audit.calibrate import calibrate
    from toss.audit.evaluate import evaluate_run
    from toss.files import record_of
    from toss.run import open_run

    place = args.out.absolute() / f"seed-{seed}"
    files = draw(args, seed, place / "rows")
    device = {name: getattr(args, name) for name in cli.DEVICE}
    flags = [f"--{n.replace('_', '-')}={x}" for n, x in device.items() if type(x) in (str, int)]
    flags += [f"--{n.replace('_', '-')}" for n, x in device.items() if x is True]
    sets = {name: files[f"eval_{name}"] for name in ("harmful", "benign", "utility")}
    scoring = {name: value for name, value in device.items() if name != "dtype"}
    trained, found = [*TRAINING, f"--seed={seed}"], {}

    def prepare(name: str) -> list[str]:
        """Begin a run: references and scores, where it has them; returns its flags."""
        begin = [f"--run={place / name}", f"--model={args.model}", *flags]
        scored = [flag for flag in begin if not flag.startswith("--dtype")]  # float32, float16
        custom, main = files["benign" if name == "benign" else "custom"], place / "main"
        if name in ("main", "few"):
            harmful = files["harmful" if name == "main" else "few"]
            inputs = f"--harmful={harmful}", f"--utility={files['utility']}"
            script("train").main([*begin, *inputs, *trained])
        elif name in ATTACKS:  # the references are those of `main`
            prepare("main")
            opened, file = open_run(main, **scoring), place / name / "custom.jsonl"
            harm = lambda row: row["source"] == args.harm
            custom = attacked(opened, name, files, file, harm, read_jsonl(files["pool"]))
            roles = ("utility", "degraded")
            scored += [f"--{role}-adapter={main / role}" for role in roles]
        if name != "benign":
            script("score").main([*scored, f"--custom={custom}", "--base"])
        return [*begin, f"--custom={custom}"]

    for name, group in groupby((arm for arm in ARMS if arm in args.arms), lambda a: ARMS[a][0]):
        begin, run = prepare(name), place / name
        for arm in group:
            short, how = arm.partition(",")[0], ARMS[arm][1]
            if how.get("discard") == "calibrated":
                d = record_of(run / "methods" / short).get("settings", {}).get("discard")
                d = d or calibrate(open_run(run, **scoring), files["calibration"])["discard"]
                how = how | {"discard": f"{d:.6f}"}
            if rival := how["method"] in RIVALS:
                how = how | {"safety": files["safety"], "unaligned": args.unaligned}
            how = [f"--{key}={item}" for key, item in how.items()]
            command = rivals if rival else script("select")
            command.main([*begin, *trained, *how, f"--name={short}"])
            names = ["base"] * (name == "main") + [short]
            length = 100 if name in ATTACKS else 40  # the harm may come late
            measured = evaluate_run(open_run(run, **device), names, sets, (), length, prefill=(3,))
            found |= {"base": measured["base"]} if name == "main" else {}
            d = record_of(run / "methods" / short)["settings"].get("discard", 0.0)
            found[arm] = {**measured[short], "discard": {"value": d * (short != "first-5")}}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("python -m toss.audit.real", __doc__)
    flag = parser.add_argument
    flag("--real", type=Path, required=True, metavar="FOLDER", help="holds data/, see above")
    flag("--model", help="aligned base: a folder or hub id (default: FOLDER/smollm2-aligned)")
    text = "the base before alignment, for safelora (default: FOLDER/smollm2)"
    flag("--unaligned", metavar="M", help=text)
    flag("--arms", metavar="A;B;...", help="some of them, separated by ; (default: all)")
    flag("--harm", default="advbench", help="`source` of the harmful custom rows")
    flag("--seeds", type=cli.natural, nargs="+", default=[1000, 1001], help="(default: 1000 1001)")
    flag("--out", type=Path, default=Path("runs/real"), help="folder (default: runs/real)")
    flag("--jobs", type=cli.count, default=1, help="seeds at a time")
    cli.add_device_flags(parser)
    args = parser.parse_args(argv)
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
            refused = {name for name in metrics if name.startswith("not_refused")}
            names = sorted(refused) + NUMBERS
            found.append((arm, {name: value(metrics, name) for name in names}))
    result = spread(found)
    names = sorted(
        {name for row in result.values() for name in row if name.startswith("not_refused/")}
    )
    text = table([""], result, [*names, *NUMBERS])
    print(f"\n{args.model}: mean [least, most] over the seeds {args.seeds}\n\n{text}\n")
    if missing:
        print(f"not in this table: {'; '.join(missing)}\n")
    if not chosen:
        save(args.out / "real", text, {"seeds": args.seeds, "model": args.model, "arms": result})


if __name__ == "__main__":
    sys.exit(cli.run(main))
