"""The paper's own metric, a win rate judged from outside: answers in the form of AlpacaEval.

    python -m toss.audit.pairwise write --run R --method toss --against sft --set harmful --out DIR
    alpaca_eval --model_outputs DIR/model_outputs.json \\
        --reference_outputs DIR/reference_outputs.json ...

AlpacaEval (github.com/tatsu-lab/alpaca_eval) asks a judge such as GPT-4 which of two answers is
better, and prints the win rate of --method over --against. Of a prompt of several turns the files
hold only the last.
"""

import json
import sys
from pathlib import Path

from model.io import InputError
from toss.audit.command import answers_of, cautions, records_of, write_text
from toss.audit.evaluate import SETS, evaluation, evaluations
from toss.workbench import flags


def write(folder: str | Path, method: str, against: str, out: Path, only: str | None = None) -> int:
    """Write out/model_outputs.json and out/reference_outputs.json; returns the answers in each.

    only: one of SETS (default: all of them); answers after a prefill are left out. Raises
    InputError if the two methods did not answer the same prompts in the same order and way, or if
    a model or the base was replaced since.
    """
    from toss.workbench.run import open_run

    run = open_run(folder)
    said = [read_answers(run, name, [only] if only else [*SETS]) for name in (method, against)]
    ours, theirs = ([(a["dataset"], a["instruction"]) for a in answers] for answers in said)

    def settings(name):
        return evaluation(run, name)["record"]["settings"]

    def way(name):
        return [settings(name).get(key) for key in ("max_new_tokens", "dtype")]

    if ours != theirs or way(method) != way(against):
        pair = f"{run.folder / 'answers'}: {method}.jsonl and {against}.jsonl"
        how = "on the same files, with the same --max-new-tokens and --dtype"
        raise InputError(
            f"{pair} do not answer the same prompts in the same way: evaluate both {how}"
        )
    for kind, answers in zip(("model", "reference"), said):
        text = json.dumps(answers, indent=2, ensure_ascii=False) + "\n"
        write_text(Path(out) / f"{kind}_outputs.json", text)
    pair = (method, against)
    for line in cautions(records_of(run, pair), dict.fromkeys(pair, {})):
        print(line)
    return len(ours)


def read_answers(run, method: str, sets: list[str]) -> list[dict]:
    """A method's answers to these sets in AlpacaEval's form; InputError if outdated or none."""
    path, again = run.folder / "answers" / f"{method}.jsonl", "run python -m toss.audit.evaluate"
    lines = answers_of(path) if path.exists() else []
    if not evaluation(run, method):
        raise InputError(f"{path} does not exist, or no record of it: {again} first")
    if method in evaluations(run)[1]:
        raise InputError(f"{path} holds answers of a model that was replaced since: {again} again")
    answers = []
    for line in lines:
        if line["set"] in sets:
            dataset = line["set"] + f"/{line['source']}" * bool(line["source"])
            answer = {"instruction": line["prompt"], "output": line["response"]}
            answers.append({**answer, "generator": method, "dataset": dataset})
    if not answers:
        raise InputError(f"{path} holds no answers of the set {' or '.join(sets)}")
    return answers


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.pairwise", __doc__)
    flag = parser.add_argument
    flag("command", choices=["write"], help="write the two files")
    flag("--run", required=True, help="folder of the run, evaluated")
    flag("--method", required=True, help="the method whose wins are counted")
    flag("--against", required=True, help="the reference that it is compared with")
    flag("--set", choices=SETS, help="which answers (default: all)")
    flag("--out", required=True, metavar="DIR", help="folder for the two files")
    args = parser.parse_args(argv)
    count = write(args.run, args.method, args.against, args.out, args.set)
    print(f"{args.out}: {count} answers each in model_outputs.json and reference_outputs.json")
    print("Some may be unsafe: they are for judging, not for publishing.")


if __name__ == "__main__":
    sys.exit(flags.run(main))
