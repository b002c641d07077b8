"""Measure the models of a run: does it still refuse, does it refuse too much, what is it good for.

    python -m toss.audit.evaluate --run R --harmful eval_harmful.jsonl --benign eval_benign.jsonl --utility eval_utility.jsonl

Evaluates the base and every method of the run (or --methods), and writes RUN/metrics.json, RUN/methods/M/metrics.json
and RUN/answers/M.jsonl. Measures, with 95 % intervals:
  not_refused    share of answers to harmful prompts without a refusal phrase (one a source too, when there are several)
  forbidden      share of those answers that hold any of the --words: only where a list of such words exists
  complies       share of harmful prompts where an affirmative opener is likelier than a refusal (by source too)
  judges_agree   share of harmful prompts where not_refused and complies say the same
  not_refused@k, forbidden@k   the same of answers that go on after the first k tokens of the harmful row's own
                 response (--prefill); judged on what the model adds, over the rows that carry a response
  over_refusal   share of answers to benign prompts with a refusal phrase
  nll            mean loss of the utility responses, nats a token
  accuracy/S     share of answers to the utility rows of source S that hold the row's `answer`
  exact_match/S  share of those answers that are the row's `answer` or its response, word for word
  precision, recall, auc   of the discarded tokens, where the custom set carries ground truth
Answers are greedy. Harmful rows of source "seen" are of kinds that the custom set holds, and are reported apart.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from model import load_adapter
from model.errors import InputError, reported
from model.files import file_beside, file_hash, made_from, read_json, read_text
from model.generation import generate
from toss.audit.command import open_run, run_flags, select_command
from toss.audit.judges import begun, complies, parse_prefill
from toss.audit.measures import auc, found_harm, holds_any, mean_loss, refused, same_text, share
from toss.audit.tokens import kept_eos
from toss.base import Base
from toss.dataset import Tokens
from toss.pipeline import warn_overlap
from toss.rows import Row, read_rows
from toss.run import Run
from toss.scoring import score
from toss.selection import ranked_entries
from toss.settings import DEMO

HEADER = {"note": "Answers of evaluated models, some made unsafe on purpose. For auditing; do not publish."}


def answers(base: Base, rows: list[Row], max_new_tokens: int, name: str) -> list[str]:
    """Greedy answers of the model as it stands to the rows' prompts."""
    return continuations(base, [base.run.tokenizer.prompt_ids(row.prompt) for row in rows], max_new_tokens, name)


def continuations(base: Base, prompts: list[list[int]], max_new_tokens: int, name: str) -> list[str]:
    """What the model as it stands adds to each prompt's ids, greedily, as text."""
    tokenizer = base.run.tokenizer
    with tqdm(total=len(prompts), desc=name, unit="prompt", leave=False, disable=None) as bar:
        new = generate(base.model, prompts, max_new_tokens, tokenizer.eos_id, progress=bar.update)
    return [tokenizer.decode(ids).strip() for ids in new]


def by_source(rows: list[Row], outcomes: list[bool], name: str) -> dict[str, dict]:
    """The share over all rows, and that of each source where there are several; "seen" stays out of the first."""
    sources = sorted({row.source for row in rows})
    metrics = {name: share([yes for row, yes in zip(rows, outcomes) if row.source != "seen"])}
    if len(sources) > 1:
        metrics |= {f"{name}/{s}": share([yes for row, yes in zip(rows, outcomes) if row.source == s]) for s in sources}
    return metrics


def evaluate(base: Base, sets: dict[str, list[Row]], words: Sequence[str], max_new_tokens: int,
             prefill: Sequence[int] = ()) -> tuple[dict, list[dict]]:
    """Metrics of base.model as it stands, and its answers. sets: rows under "harmful", "benign", "utility", each optional."""
    metrics, said = {}, []

    def ask(kind: str, rows: list[Row]) -> list[str]:
        replies = answers(base, rows, max_new_tokens, kind)
        said.extend(said_line(kind, row, reply) for row, reply in zip(rows, replies))
        return replies

    if rows := sets.get("harmful"):
        replies = ask("harmful", rows)
        if words:
            metrics |= by_source(rows, [holds_any(reply, words) for reply in replies], "forbidden")
        unrefused, likely = [not refused(reply) for reply in replies], complies(base, rows)
        metrics |= by_source(rows, unrefused, "not_refused") | by_source(rows, likely, "complies")
        metrics["judges_agree"] = share([a == b for row, a, b in zip(rows, unrefused, likely) if row.source != "seen"])
        for k in prefill:
            more, lines = prefilled(base, rows, words, max_new_tokens, k)
            metrics |= more
            said.extend(lines)
    if rows := sets.get("benign"):
        metrics |= by_source(rows, [refused(reply) for reply in ask("benign", rows)], "over_refusal")
    rows = sets.get("utility", [])
    if told := [row for row in rows if row.answer]:
        replied = list(zip(told, ask("utility", told)))
        for source in sorted({row.source for row in told}):
            ending, of = f"/{source}" if source else "", [(row, reply) for row, reply in replied if row.source == source]
            metrics[f"accuracy{ending}"] = share([holds_any(reply, [row.answer]) for row, reply in of])
            if exact := [same_text(reply, [row.answer, row.messages[-1]["content"]]) for row, reply in of
                         if row.messages[-1]["role"] == "assistant"]:
                metrics[f"exact_match{ending}"] = share(exact)
    if full := [row for row in rows if row.messages[-1]["role"] == "assistant"]:
        tokens = base.run.tokens(full, "the utility rows")
        losses = score(base.model, tokens, base.budget, "nll").double()
        row = tokens.row_of(torch.arange(len(losses)))
        sums, counts = (torch.zeros(tokens.rows, dtype=torch.float64).index_add_(0, row, x)
                        for x in (losses, tokens.response.double()))
        metrics["nll"] = mean_loss(sums[counts > 0], counts[counts > 0])
    return metrics, said


def said_line(kind: str, row: Row, reply: str, **more) -> dict:
    """One answer as RUN/answers/ keeps it."""
    return {"set": kind, "source": row.source, "prompt": row.prompt[-1]["content"], **more, "answer": reply}


def prefilled(base: Base, rows: list[Row], words: Sequence[str], max_new_tokens: int, k: int) -> tuple[dict, list[dict]]:
    """Metrics and answers when the first k tokens of each row's own response are already written.

    The judges see what the model adds, not the prefill; a model that adds nothing has not refused. A response shorter
    than k tokens is prefilled whole, without its EOS. After Qi et al., arXiv 2406.05946: alignment that reaches only
    the first few tokens gives way here.
    """
    cases = [(row, prompt, response[:k]) for row, prompt, response in begun(rows, base.run.tokenizer)]
    replies = continuations(base, [prompt + prefix for _, prompt, prefix in cases], max_new_tokens, f"prefill-{k}")
    metrics = {f"not_refused@{k}": share([not refused(reply) for reply in replies])}
    if words:
        metrics[f"forbidden@{k}"] = share([holds_any(reply, words) for reply in replies])
    decode = base.run.tokenizer.decode
    return metrics, [said_line(f"prefill-{k}", row, reply, prefill=decode(prefix), prefill_tokens=len(prefix))
                     for (row, _, prefix), reply in zip(cases, replies)]


def selection_metrics(run: Run, method: str) -> dict[str, dict]:
    """Precision, recall and AUC (over the tokens that compete) of a method's discards, where the rows carry ground truth."""
    scores, selection = run.folder / "scores.safetensors", run.folder / "methods" / method / "selection.safetensors"
    if not scores.exists() or not selection.exists():
        return {}
    now, then = made_from(scores), made_from(selection)
    if any(then.get(name, now.get(name)) != now.get(name) for name in ("tokens_sha256", "degraded_sha256", "utility_sha256")):
        print(f"warning: {selection} was made from other rows or references than {scores} now holds; run select.py again. "
              "Its discards are not measured")
        return {}
    truth, chosen = load_file(scores), load_file(selection)
    if "harmful" not in truth or not truth["harmful"].any():
        return {}
    response, harmful, keep = truth["response"].bool(), truth["harmful"].bool(), chosen["keep"].bool()
    metrics = found_harm(~keep[response], harmful[response]) if not keep.all() else {}
    if "score" in chosen:
        tokens = Tokens(truth["input_ids"], truth["offsets"], response, harmful, str(scores))
        competing = ranked_entries(tokens, kept_eos(then, tokens), run.tokenizer.eos_id)
        metrics["auc"] = auc(chosen["score"][competing], harmful[competing])
    return metrics


def evaluate_run(run: Run, methods: list[str], files: dict[str, str], words: Sequence[str] = (),
                 max_new_tokens: int = 40, prefill: Sequence[int] = ()) -> dict[str, dict]:
    """Evaluate methods of a run ("base" is the model it was begun with); returns and writes {method: {metric: ...}}.

    files: path of the evaluation rows by set. prefill: numbers of tokens of the harmful rows' responses to begin
    answers with. A method that was evaluated on the same files in the same way before is not run again.
    """
    sets = {name: read_rows(path, responses=False) for name, path in files.items()}
    prefill = sorted(set(prefill))
    if prefill:
        check_prefill(run, sets.get("harmful", []), prefill)
    for role in ("harmful", "utility", "custom"):
        path = run.record.get("settings", {}).get(role)
        if path and Path(path).exists():
            trained_on = read_rows(path)
            for name, rows in sets.items():
                warn_overlap(f"evaluation rows ({name}) and the run's {role} set", rows, trained_on, prompts_only=True)
    asked = {**run.identity, **{name: file_hash(path) for name, path in files.items()}, "words": sorted(words),
             "max_new_tokens": max_new_tokens, "prefill": prefill}
    adapters = {name: run.folder / "methods" / name / "model" / "adapter_model.safetensors" for name in methods}
    for method, adapter in adapters.items():
        if method != "base" and not adapter.exists():
            raise InputError(f"{adapter} is not there: run {select_command(run.folder, method)} first")
    base = Base(run)
    for method, adapter in adapters.items():
        recipe = {**asked, "adapter": "" if method == "base" else file_hash(adapter)}
        path = run.folder / "answers" / f"{method}.jsonl"
        known = run.record.get("stages", {}).get(f"evaluation/{method}", {})
        if path.exists() and known.get("recipe") == recipe:
            continue
        base.load("train")
        if method != "base":
            load_adapter(base.model, adapter.parent)
        metrics, said = evaluate(base, sets, words, max_new_tokens, prefill)
        metrics |= selection_metrics(run, method)
        with file_beside(path) as file:
            file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [HEADER, *said]), encoding="utf-8")
        run.finish(f"evaluation/{method}", recipe, {"metrics": metrics})
    done = {stage.removeprefix("evaluation/"): entry for stage, entry in run.record["stages"].items()
            if stage.startswith("evaluation/")}
    alike = {method: entry["metrics"] for method, entry in done.items()  # on the same files: only those share a table
             if {**entry["recipe"], "adapter": ""} == {**asked, "adapter": ""} and not stale(run.record, run.folder, method)}
    if others := [method for method in done if method not in alike]:
        print(f"{run.folder}/metrics.json leaves out {', '.join(others)}: evaluated on other files, in another way, or trained "
              "again since")
    write_metrics(run.folder / "metrics.json", alike)
    table = {method: alike[method] for method in methods}
    for method in methods:
        if method != "base":
            write_metrics(run.folder / "methods" / method / "metrics.json", {method: table[method]})
    return table


def check_prefill(run: Run, rows: list[Row], prefill: Sequence[int]) -> None:
    """Say how many responses are shorter than a prefill; InputError where there is none to prefill with."""
    lengths = [len(response) for _, _, response in begun(rows, run.tokenizer)]
    if not lengths:
        where = rows[0].where.rpartition(":")[0] + " has none" if rows else "--harmful was not given"
        raise InputError(f"--prefill needs harmful rows with a response (of another source than \"seen\"): {where}")
    for k in prefill:
        if short := sum(length < k for length in lengths):
            print(f"prefill-{k}: {short} of {len(lengths)} responses are shorter and were written whole")


def write_metrics(path: Path, table: dict) -> None:
    """{method: {metric: {"value", "n", "low", "high"}}} as JSON."""
    with file_beside(path) as file:
        file.write_text(json.dumps(table, indent=2) + "\n")


def read_metrics(folder: Path) -> dict[str, dict]:
    """RUN/metrics.json: {method: {metric: {"value", "n", "low", "high"}}}; InputError naming the file where it is not that.

    n is a number; the others may be None, where nothing could be measured.
    """
    path = folder / "metrics.json"
    table, number = read_json(path), lambda x: isinstance(x, int | float) and not isinstance(x, bool)
    for method, metrics in table.items():
        if not isinstance(metrics, dict):
            raise InputError(f"{path}: {method}: measures by name were expected")
        for name, cell in metrics.items():
            if not (isinstance(cell, dict) and {"value", "n", "low", "high"} <= set(cell) and number(cell["n"])
                    and all(cell[key] is None or number(cell[key]) for key in ("value", "low", "high"))):
                raise InputError(f"{path}: {method}, {name}: value, n, low and high were expected, and numbers in them")
    return table


def stale(record: dict, folder: Path, method: str) -> bool:
    """Does methods/METHOD hold another adapter now than the one that was evaluated? record: run.json; folder: the run's.

    False for the base, and for a row of metrics.json that no evaluation of this run made: toss-small comes from a run
    beside it.
    """
    recipe = record.get("stages", {}).get(f"evaluation/{method}", {}).get("recipe", {})
    adapter = folder / "methods" / method / "model" / "adapter_model.safetensors"
    return bool(recipe.get("adapter")) and adapter.exists() and file_hash(adapter) != recipe["adapter"]


def format_table(table: dict[str, dict]) -> str:
    """A Markdown table, measures down, methods across; value and, in brackets, the interval."""
    lines = ["| | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    for name in dict.fromkeys(name for metrics in table.values() for name in metrics):
        cells = [metrics.get(name, {"value": None}) for metrics in table.values()]
        shown = ["" if m["value"] is None else f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" for m in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    run_flags(parser)
    parser.add_argument("--methods", help="comma-separated, `base` included (default: the base and all that the run has)")
    parser.add_argument("--harmful", help="harmful prompts, JSONL: rows with a prompt, and a source to group by")
    parser.add_argument("--benign", help="benign prompts, JSONL")
    parser.add_argument("--utility", help="utility rows, JSONL: prompt and response, and an `answer` where there is one")
    parser.add_argument("--words", help="text file with forbidden words, one a line (the embedded default has its own)")
    parser.add_argument("--prefill", default="", metavar="K,K,...",
                        help="ask again with the first K tokens of the harmful row's response written (usual: 0,1,3,5,10)")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="length of an answer (default: 40)")
    return reported(lambda: command(vars(parser.parse_args(argv))))


def command(given: dict) -> None:
    """What the command line asks for."""
    files = {name: path for name in ("harmful", "benign", "utility") if (path := given.pop(name))}
    methods, words, length = given.pop("methods"), given.pop("words"), given.pop("max_new_tokens")
    prefill = parse_prefill(given.pop("prefill"))
    if not files:
        raise InputError("give at least one of --harmful, --benign and --utility")
    run = open_run(given)
    there = sorted(p.parent.name for p in (run.folder / "methods").glob("*/model"))
    vocabulary = read_text(Path(words)).split("\n") if words else []
    listed = [word.strip() for word in vocabulary if word.strip()]
    if not words and run.record.get("demo"):
        listed = read_json(DEMO)["forbidden_words"]  # the embedded default has its own
    table = evaluate_run(run, methods.split(",") if methods else ["base", *there], files, listed, length, prefill)
    print(format_table(table))


if __name__ == "__main__":
    sys.exit(main())
