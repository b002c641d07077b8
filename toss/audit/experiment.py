"""Does the claim hold? Experiments over seeds, which draw the rows and all trainings.

    python -m toss.audit.experiment methods [--seeds 1000 1001] [--jobs 2]
    python -m toss.audit.experiment real --real FOLDER --dtype bfloat16
    python -m toss.audit.experiment chat --real FOLDER --model FOLDER/qwen --dtype bfloat16

    methods    every method, rival and baseline on the same rows; answers that are begun; cost
    attack     harmful rows by an attacker who knows TOSS (attacks.py), against several defences
    embedded   harm behind a harmless task in one row, asked so, too
    recipe     forms of TOSS under each attack: reference, choice, discarded tokens left out or held
    share      custom rows with 0 to 50 % harm, at d = 0.1 and at the calibrated d
    discard    d from 0.02 to 0.4, and the calibrated d
    pro        TOSS-Pro over T, k and the size of D^h; added rows learnt whole or in part
    eroding    harmless rows that promise to comply or obey, alone or mixed with harm
    transfer   masks exchanged between data/base and data/base-small
    real       a checkpoint and rows of yours: rivals, and attacks
    chat       the same, and questions whose answers end with a number

Writes OUT/NAME.csv (a line per seed, variant, arm and measure), NAME.md (mean [least, most]) and,
of some, NAME.svg; the runs are in OUT/NAME. Finished work is skipped: the same command goes on
where it was broken off. With --arms the files hold those arms alone. An experiment of your own is a
few lines in a file like toss/audit/experiments.json, for --file.

real, chat: FOLDER/data holds harmful, utility, custom (400 rows or more), eval_harmful, eval_benign
and eval_utility.jsonl: rows with a prompt, a source and, the first three, a response. How many of
them a seed draws for each set, and how all models are trained: "rows" and "training" in
experiments.json. d is calibrated on harmless custom rows that are in no set. The rows that are
evaluated are the same for all seeds. The arms run in the order of their weight: stop it when you
like.

real: with responses in eval_harmful, answers that begin with three tokens of them are measured too.
toss-few and toss-pro-few have ten rows in D^h; benign-rows is sft without the harmful rows, which
nobody can have; under an attack, answers may be longer (100 tokens, else 40).

chat: the last 50 harmless rows of custom.jsonl are in no set: `training` was chosen on them. The
utility rows are GSM8K questions, say, whose responses end with a number behind ####; the model's
own answer may have 256 tokens.
"""

import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from model.io import InputError, as_input_error
from toss.audit.command import DEVICE, markdown, write_text
from toss.audit.laboratory import Experiment, per_seed, run_seed
from toss.audit.paired import paired_tables
from toss.audit.tables import as_csv, hardware, summarise, tables, written
from toss.workbench import flags

OUT = Path("runs/experiments")
MODELS = "methods/*/model"


def conduct(
    experiment: Experiment,
    seeds: list[int],
    out: Path = OUT,
    jobs: int = 1,
    command: str = "from Python",
    **common,
) -> None:
    """Run what is missing of an experiment; print its tables, and write them with their numbers.

    jobs: seeds at a time, in processes of their own. command: for the record. common: flags for all
    scripts. Writes OUT/NAME.csv, NAME.md and, if there is a picture, NAME.svg.
    """
    from toss.workbench.runfile import git_commit

    # Run what is missing, and count how much of it was there: the minutes are of the rest.
    runs = Path(out) / experiment.name
    seeds = list(dict.fromkeys(seeds))
    start = time.monotonic()
    existing = len(list(runs.rglob(MODELS)))
    results = []
    folders = {seed: runs / f"seed-{seed}" / "run" for seed in seeds}
    tasks = [(experiment, seed, folder, common) for seed, folder in folders.items()]
    for part in per_seed(run_seed, tasks, jobs):
        results += part
    minutes = (time.monotonic() - start) / 60
    models = len(list(runs.rglob(MODELS)))

    # The page: how it was made, the tables over all seeds, and each seed's differences.
    summary = summarise(results)
    text = tables(summary, experiment.tables, experiment.heading, experiment.legend)
    numbers = " ".join(str(seed) for seed in seeds)
    threads = common.get("threads") or (1 if jobs > 1 else None)
    about = [
        f"# {experiment.title}",
        "",
        f"- command: {command}",
        f"- commit: {git_commit()}",
        f"- seeds: {numbers}; mean [least, most]",
        f"- hardware: {hardware(common.get('device', 'auto'), threads)}",
        f"- minutes: {minutes:.1f}; {existing} of {models} models were there before",
    ]
    for seed, folder in folders.items():
        text += differences(experiment, folder, seed)
    page = "\n".join(about) + f"\n\n{text}\n"
    print(f"\n{page}")

    # Written beside the numbers and, if there is one, the picture.
    write_text(f"{runs}.csv", as_csv(results))
    drawing = experiment.picture(summary) if experiment.picture else ""
    if drawing:
        write_text(f"{runs}.svg", drawing)
        page += f"\n![{experiment.title}]({experiment.name}.svg)\n"
    write_text(f"{runs}.md", page)
    written(runs)


def differences(experiment: Experiment, folder: Path, seed: int) -> str:
    """The differences to sft and to the base on the same prompts, of one seed, as Markdown.

    folder: of the run of the unchanged rows.
    """
    from toss.audit.evaluate import read_metrics

    text = ""
    for case in experiment.cases:
        run = case.run(folder)
        names = [flags_of_arm.get("name", arm) for arm, flags_of_arm in case.arms.items()]
        wanted = {}
        for name, cells in read_metrics(run, "paired.json").items():
            measures = [measure for measure in experiment.paired if measure in cells]
            wanted[name] = {measure: cells[measure] for measure in measures}
        for header, lines in paired_tables(wanted, names).values():
            about = f"Seed {seed}, {run.name}, on the same prompts:"
            text += f"\n\n{about}\n\n{markdown(header, lines)}"
    return text


def command_line() -> flags.Parser:
    parser = flags.Parser("python -m toss.audit.experiment", __doc__)
    add = parser.add_argument
    add("name", metavar="NAME", help="see above, or one of --file")
    add("--file", metavar="FILE", help="experiments of your own, JSON")
    text = "each draws rows and trains (default: 1000 1001)"
    add("--seeds", type=flags.natural, nargs="+", default=[1000, 1001], help=text)
    add("--out", type=Path, default=OUT, help=f"folder (default: {OUT})")
    add("--jobs", type=flags.count, default=1, help="seeds at a time")
    add("--arms", metavar="A;B;...", help="some of them, separated by ; (default: all)")
    add = parser.add_argument_group("for `real` and `chat`").add_argument
    add("--real", type=Path, metavar="FOLDER", help="holds data/, see above")
    add("--model", help="aligned base: a folder or hub id (default: FOLDER/smollm2-aligned)")
    text = "the base before alignment, without which safelora is left out"
    add("--unaligned", metavar="M", help=text)
    add("--harm", default="advbench", help="`source` of the harmful custom rows")
    flags.add_device_flags(parser)
    return parser


def chosen_arms(experiment: Experiment, text: str) -> Experiment:
    """The experiment with some arms only. text: their names, separated by ;"""
    from toss.audit.experiments import check_cases

    arms = experiment.arms()
    chosen = [arm.strip() for arm in text.split(";")]
    for arm in chosen:
        if arm not in arms:
            raise InputError(f"--arms: there is no {arm!r}; the arms are {'; '.join(arms)}")
    experiment = experiment.only(chosen)
    with as_input_error("--arms"):
        check_cases(experiment.cases)
    return experiment


def main(argv: list[str] | None = None) -> None:
    parser = command_line()
    args = parser.parse_args(argv)

    from toss.audit.checkpoint import checkpoint
    from toss.audit.experiments import read_experiments

    # The experiment by its name, and whether it needs a checkpoint.
    experiments = read_experiments()
    if args.file:
        experiments |= read_experiments(Path(args.file))
    if args.name not in experiments:
        names = ", ".join(experiments)
        raise InputError(f"there is no experiment {args.name!r}; there are {names}")
    experiment = experiments[args.name]
    every_arm = experiment.arms()
    if experiment.rows and not args.real:
        raise InputError(f"{args.name} needs --real FOLDER")
    if not experiment.rows and (args.real or args.model or args.unaligned):
        reason = "draws the world's rows, and starts from data/base"
        raise InputError(f"{args.name} {reason}: leave --real, --model and --unaligned out")

    # On a checkpoint the rows are drawn from its files. What lacks an input is left out.
    if args.real:
        world = partial(checkpoint, args, experiment.rows, experiment.training)
        experiment = replace(experiment, world=world)
        if not args.unaligned:
            experiment = experiment.only([arm for arm in every_arm if arm != "safelora"])
    if args.arms:
        experiment = chosen_arms(experiment, args.arms)

    # Run it. The page says with which command; all scripts are given the device's flags.
    words = shlex.join(sys.argv[1:] if argv is None else argv)
    command = f"`.venv/bin/python -m toss.audit.experiment {words}`"
    typed = parser.typed(argv)
    common = {name: typed[name] for name in DEVICE if name in typed}
    conduct(experiment, args.seeds, args.out, args.jobs, command, **common)
    missing = [arm for arm in every_arm if arm not in ("base", *experiment.arms())]
    if missing:
        print(f"not in this table: {'; '.join(missing)}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
