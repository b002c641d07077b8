"""The paper's own metric, a win rate judged from outside: answers out to AlpacaEval, its annotations back in.

    python -m toss.audit.pairwise write --run R --method toss --against sft --set harmful --out DIR
    alpaca_eval --model_outputs DIR/model_outputs.json --reference_outputs DIR/reference_outputs.json ...
    python -m toss.audit.pairwise read annotations.json

AlpacaEval (github.com/tatsu-lab/alpaca_eval, not installed here) asks a judge such as GPT-4 which of two answers is
better and writes annotations.json. There `preference` is 1 where output_1 is better, 2 where output_2 is, 1.5 (in
older files 0) for a tie, between these from a weighted judge, null where the judge's reply was not understood. The
reference is always output_1, so the win rate, the mean of preference - 1, is that of generator_2: of --method.
The interval is a normal approximation, 1.96 standard errors of that mean as AlpacaEval reports them; with few
annotations, or nearly all alike, it is too narrow. Of a prompt of several turns the files hold the last one alone.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

from model.errors import InputError, reported
from model.files import read_json, read_text, written_beside
from toss.audit.command import json_lines, run_folder
from toss.audit.evaluate import stale

SETS = ("harmful", "benign", "utility")


def write(run: Path, method: str, against: str, out: Path, only: str | None = None) -> int:
    """Write out/model_outputs.json and out/reference_outputs.json; returns the number of answers in each.

    only: one of SETS (default: all of them); prefilled answers are no answers to their prompt and stay out. Raises
    InputError where the two methods were not asked the same prompts in the same order, and for answers of a model that
    was replaced since.
    """
    record, sets = read_json(run_folder(run) / "run.json"), SETS if only is None else (only,)
    for name in (method, against):
        if stale(record, run, name):
            raise InputError(f"{run / 'answers' / name}.jsonl holds answers of another model than {run / 'methods' / name} now: "
                             f"run python -m toss.audit.evaluate --run {run} --methods {name} first, with its files of prompts")
    said = {name: read_answers(run / "answers" / f"{name}.jsonl", sets) for name in (method, against)}
    asked = {name: [(line["set"], line["source"], line["prompt"]) for line in lines] for name, lines in said.items()}
    if asked[method] != asked[against]:
        raise InputError(f"{run / 'answers'}: {method}.jsonl and {against}.jsonl do not answer the same prompts; evaluate both "
                         "on the same files first")
    with written_beside(out.absolute()) as folder:  # absolute: "." has no name to write beside
        for file, name in (("model_outputs.json", method), ("reference_outputs.json", against)):
            entries = [{"instruction": line["prompt"], "output": line["answer"], "generator": name,
                        "dataset": "/".join(part for part in (line["set"], line["source"]) if part)} for line in said[name]]
            (folder / file).write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(said[method])


def read_answers(path: Path, sets: tuple[str, ...]) -> list[dict]:
    """The answers of RUN/answers/M.jsonl that belong to one of the sets; an InputError where there is none."""
    if not path.exists():
        raise InputError(f"{path} is not there: run python -m toss.audit.evaluate first")
    lines = []
    for where, line in json_lines(path):
        if line.get("set") in sets:
            if not all(isinstance(line.get(name), str) for name in ("source", "prompt", "answer")):
                raise InputError(f"{where}: source, prompt and answer were expected, as the evaluation writes them")
            lines.append(line)
    if not lines:
        raise InputError(f"{path} holds no answers of the set {' or '.join(sets)}")
    return lines


def read(path: Path) -> dict:
    """AlpacaEval's annotations as {"generator", "against"} and win_rate's figures; every InputError names the entry."""
    try:
        entries = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, InputError) else InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: a JSON list of annotations was expected")
    preferences, pairs = [], set()
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not {"preference", "generator_1", "generator_2"} <= set(entry):
            raise InputError(f"{path}: annotation {number} has no preference, generator_1 or generator_2")
        value = entry["preference"]
        if isinstance(value, float) and math.isnan(value):
            value = None
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)
                                  or not (value == 0 or 1 <= value <= 2)):
            raise InputError(f"{path}: annotation {number}: the preference {value!r} does not lie in [1, 2]")
        preferences.append(1.5 if value == 0 else value)
        pairs.add((str(entry["generator_2"]), str(entry["generator_1"])))
    if len(pairs) > 1:
        raise InputError(f"{path}: the annotations mix pairs: {', '.join(sorted(f'{a} against {b}' for a, b in pairs))}")
    generator, against = pairs.pop()
    if all(preference is None for preference in preferences):
        raise InputError(f"{path}: none of the {len(entries)} annotations has a preference")
    return {"generator": generator, "against": against, **win_rate(preferences)}


def win_rate(preferences: list[float | None]) -> dict:
    """The mean of preference - 1 over those given, its interval (none for a single one), and the counts.

    >>> win_rate([2, 2, 1.5, 1, None])
    {'value': 0.625, 'n': 4, 'low': 0.1559, 'high': 1.0, 'wins': 2, 'ties': 1, 'losses': 1, 'unannotated': 1}
    """
    given = [preference - 1 for preference in preferences if preference is not None]
    mean = statistics.fmean(given)
    half = 1.959964 * statistics.stdev(given) / math.sqrt(len(given)) if len(given) > 1 else None
    low, high = (None, None) if half is None else (round(max(mean - half, 0.0), 4), round(min(mean + half, 1.0), 4))
    return {"value": round(mean, 4), "n": len(given), "low": low, "high": high, "wins": sum(p > 0.5 for p in given),
            "ties": sum(p == 0.5 for p in given), "losses": sum(p < 0.5 for p in given),
            "unannotated": len(preferences) - len(given)}


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.pairwise", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("write", help="write two files of answers for AlpacaEval")
    out.add_argument("--run", type=Path, required=True, help="folder of the run, evaluated")
    out.add_argument("--method", required=True, help="whose wins are counted")
    out.add_argument("--against", required=True, help="the reference it is compared with")
    out.add_argument("--set", choices=SETS, help="which answers (default: all)")
    out.add_argument("--out", type=Path, required=True, help="folder for the two files")
    back = commands.add_parser("read", help="print the win rate that annotations.json holds")
    back.add_argument("annotations", type=Path, help="AlpacaEval's annotations.json")
    args = parser.parse_args(argv)
    return reported(lambda: command(args))


def command(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    if args.command == "write":
        count = write(args.run, args.method, args.against, args.out, args.set)
        print(f"{args.out}: {count} answers of {args.method} (model_outputs.json) and of {args.against} "
              "(reference_outputs.json); some may be unsafe: for judging, not for publishing")
        return
    rate = read(args.annotations)
    interval = "none from one" if rate["low"] is None else f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
    print(f"{rate['generator']} against {rate['against']}: win rate {100 * rate['value']:.1f} %, 95 % interval {interval}, "
          f"n = {rate['n']}: {rate['wins']} wins, {rate['ties']} ties, {rate['losses']} losses; "
          f"{rate['unannotated']} unannotated")


if __name__ == "__main__":
    sys.exit(main())
