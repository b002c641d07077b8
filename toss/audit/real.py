"""TOSS on a checkpoint and rows that are real: one table over seeds, one command.

    python -m toss.audit.real --real FOLDER [--model M] [--seeds 1000 1001] [--dtype bfloat16]

FOLDER/data holds harmful, utility, custom (60, 80 and some 400 rows at least), eval_harmful,
eval_benign and eval_utility.jsonl. The last four have a `source`; custom rows of source --harm are
the harmful ones. A seed draws the rows and the trainings: D^h 60, D^u 80, D^cus 240 rows, rate
5e-4, three epochs, 16 rows per step. d is calibrated on harmless custom rows that are in no set.
Evaluated are at most 100 prompts or answers of every source, the same for all seeds. Arms: sft,
random, toss at d = 0.1 and at the calibrated d; benign-rows, sft without the harmful rows, which
nobody can have; toss-few and toss-pro-few, with ten rows in D^h. Writes OUT/real.md and real.json.
Finished work is skipped: the same command goes on where it was broken off.
"""

import json
import random
import sys
from argparse import Namespace
from pathlib import Path

from model.atomic import atomic_file
from model.io import InputError, json_lines
from toss import cli
from toss.audit.experiment import per_seed, save, script, spread, table, value

TRAINING = ["--lr=5e-4", "--epochs=3", "--batch-size=16"]
SIZES = {"harmful": 60, "few": 10, "utility": 80, "custom": 240, "calibration": 100}
NUMBERS = "discard complies not_refused@3 over_refusal nll".split()


def draw(args: Namespace, seed: int, place: Path) -> dict[str, str]:
    """Write the rows of a seed below `place`; returns their paths by name."""

    def read(name: str, least: int = 0) -> list[dict]:
        file = args.real / "data" / f"{name}.jsonl"
        rows = [row for _, row in json_lines(file)]
        grouped = name in ("harmful", "utility") or all("source" in row for row in rows)
        if len(rows) < least or not grouped:
            raise InputError(f"{file}: at least {least} rows are needed, with a `source` each")
        return rows

    chosen = random.Random(seed)
    custom = chosen.sample(rows := read("custom", SIZES["custom"] + 1), len(rows))
    rest = [row for row in custom[SIZES["custom"] :] if row["source"] != args.harm]
    sets = {"custom": custom[: SIZES["custom"]], "calibration": rest[: SIZES["calibration"]]}
    sets["benign"] = [row for row in sets["custom"] if row["source"] != args.harm]
    for name, source in (("harmful", "harmful"), ("few", "harmful"), ("utility", "utility")):
        sets[name] = chosen.sample(read(source, SIZES[name]), SIZES[name])
    same = random.Random(0)
    for name in ("eval_harmful", "eval_benign", "eval_utility"):
        rows = read(name)
        groups = (
            [r for r in rows if r["source"] == s] for s in dict.fromkeys(r["source"] for r in rows)
        )
        sets[name] = [row for group in groups for row in same.sample(group, min(100, len(group)))]
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        with atomic_file(place / f"{name}.jsonl") as file:
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {name: str(place / f"{name}.jsonl") for name in sets}


def one_seed(args: Namespace, seed: int) -> dict[str, dict]:
    """Run what is missing of a seed; the metrics of every arm, and its d."""
    from toss.audit.calibrate import calibrate
    from toss.audit.evaluate import evaluate_run
    from toss.run import open_run

    place = args.out.absolute() / f"seed-{seed}"
    files = draw(args, seed, place / "rows")
    device = {name: getattr(args, name) for name in cli.DEVICE}
    flags = [f"--{n.replace('_', '-')}={x}" for n, x in device.items() if type(x) in (str, int)]
    flags += [f"--{n.replace('_', '-')}" for n, x in device.items() if x is True]
    sets = {name: files[f"eval_{name}"] for name in ("harmful", "benign", "utility")}
    found: dict[str, dict] = {}

    def run(name: str, arms: dict[str, list[str]], *measured: str, harmful: str = "") -> None:
        """References and scores if there is a harmful set, then each arm, in one run."""
        folder, custom = place / name, files["benign" if name == "benign" else "custom"]
        begin = [f"--run={folder}", f"--model={args.model}", *flags]
        trained = [*TRAINING, f"--seed={seed}"]
        if harmful:
            inputs = f"--harmful={harmful}", f"--utility={files['utility']}"
            script("train").main([*begin, *inputs, *trained])
            scored = [flag for flag in begin if not flag.startswith("--dtype")]  # float32, float16
            script("score").main([*scored, f"--custom={custom}", "--base"])
        for arm, how in arms.items():
            if "calibrated" in how:
                scored = open_run(folder, device=args.device, threads=args.threads)
                how = [f"--discard={calibrate(scored, files['calibration'])['discard']:.6f}"]
            script("select").main([*begin, f"--custom={custom}", *trained, *how, f"--name={arm}"])
        opened = open_run(folder, **device)
        metrics = evaluate_run(opened, [*measured, *arms], sets, prefill=(3,))
        for arm in metrics:
            stage = opened.record["stages"].get(f"methods/{arm}", {}).get("recipe", {})
            d = stage.get("settings", {}).get("discard", 0.0)
            found[arm] = {**metrics[arm], "discard": {"value": d}}

    # What matters most comes first: the command may be stopped at any time.
    arms = {"sft": ["--method=sft"], "toss": [], "toss-calibrated": ["calibrated"]}
    run("main", arms, "base", harmful=files["harmful"])
    pro = ["--pro=1", "--pro-samples=40"]
    run("few", {"toss-few": [], "toss-pro-few": pro}, harmful=files["few"])
    run("benign", {"benign-rows": ["--method=sft"]})
    run("main", {"random": ["--method=random"]})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("python -m toss.audit.real", __doc__)
    flag = parser.add_argument
    flag("--real", type=Path, required=True, metavar="FOLDER", help="holds data/, see above")
    flag("--model", help="aligned base: a folder or hub id (default: FOLDER/smollm2-aligned)")
    flag("--harm", default="advbench", help="`source` of the harmful custom rows")
    flag("--seeds", type=cli.natural, nargs="+", default=[1000, 1001], help="(default: 1000 1001)")
    flag("--out", type=Path, default=Path("runs/real"), help="folder (default: runs/real)")
    flag("--jobs", type=cli.count, default=1, help="seeds at a time")
    cli.add_device_flags(parser)
    args = parser.parse_args(argv)
    args.model = args.model or str(args.real.absolute() / "smollm2-aligned")
    found = []
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
    save(args.out / "real", text, {"seeds": args.seeds, "model": args.model, "arms": result})


if __name__ == "__main__":
    sys.exit(cli.run(main))
