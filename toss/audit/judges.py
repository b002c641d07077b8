"""Does it still refuse? The measures that need the model: its answers, and its losses."""

import sys
from dataclasses import dataclass

from data.refusals import refused
from model.generate import generate
from model.io import InputError
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from toss.audit import measures
from toss.audit.tokens import count_by_row
from toss.rows import Row
from toss.scoring import score
from toss.tokens import tokenise
from toss.workbench.progress import Progress
from toss.workbench.run import Run

ANSWER_TOKENS = 16384  # slots per batch


@dataclass
class Measured:
    """What a model answered, and the losses of the utility rows."""

    lines: list[dict]  # of answers/METHOD.jsonl
    sums: list[float]  # the loss of each row with response tokens
    counts: list[int]  # its response tokens


def measure(run: Run, model: Transformer, sets: dict[str, list[Row]], settings: dict) -> Measured:
    """The answers of the model under its active adapter, each with its outcomes, and its losses.

    sets: rows under "harmful", "benign" and "utility", each optional. settings: see
    evaluate.evaluate_run.
    """
    words = settings["words"]
    length = settings["max_new_tokens"]
    harmful = sets.get("harmful", [])
    utility = sets.get("utility", [])
    lines = []

    # Harmful prompts, as they are and with the answer begun: does the model refuse?
    replies = answer_lines(run, model, length, "harmful", harmful)
    for line in replies:
        line["outcomes"] = measures.outcomes_of_reply(line["response"], words)
    lines += replies
    for k in settings["prefill"]:
        rows, responses = prefilled(harmful, run.tokenizer)
        starts = [response[:k] for response in responses]
        replies = answer_lines(run, model, length, f"prefill-{k}", rows, starts)
        for line in replies:
            line["outcomes"] = measures.outcomes_of_prefill(line["response"], k, words)
        lines += replies

    # Harmless prompts: does it refuse them, are its answers right, and what is its loss?
    replies = answer_lines(run, model, length, "benign", sets.get("benign", []))
    for line in replies:
        line["outcomes"] = {"over_refusal": refused(line["response"])}
    lines += replies
    rows = [row for row in utility if row.answer]
    replies = answer_lines(run, model, settings["question_tokens"], "utility", rows)
    for row, line in zip(rows, replies):
        line["outcomes"] = measures.outcomes_of_answer(row, line["response"])
    lines += replies
    rows = [row for row in utility if has_response(row)]
    if not rows:
        return Measured(lines, [], [])
    tokens = tokenise(rows, run.tokenizer, run.args.max_length, "utility rows")
    losses = score(model, tokens, run.args.batch_tokens, Progress("losses"))
    sums = count_by_row(tokens, tokens.response, losses.double())
    counts = count_by_row(tokens, tokens.response)
    filled = tokens.filled
    return Measured(lines, sums[filled].tolist(), counts[filled].tolist())


def has_response(row: Row) -> bool:
    return row.messages[-1]["role"] == "assistant"


def answer_lines(
    run: Run,
    model: Transformer,
    max_new_tokens: int,
    kind: str,
    rows: list[Row],
    starts: list[list[int]] | None = None,
) -> list[dict]:
    """Greedy answers to the rows' prompts, as lines of answers/METHOD.jsonl.

    kind: the set. starts: after a prefill, the ids that each answer begins with.
    """
    if not rows:
        return []
    tokenizer = run.tokenizer
    prompts = [tokenizer.prompt_ids(row.prompt) for row in rows]
    if starts:
        prompts = [prompt + start for prompt, start in zip(prompts, starts)]
    watch = Progress(kind)

    def progress(done: int, _) -> None:
        watch.on_step({"unit": "prompt", "step": done, "steps": len(rows)})

    batch_tokens = run.args.batch_tokens or ANSWER_TOKENS
    replies = generate(model, prompts, max_new_tokens, tokenizer.eos_id, batch_tokens, progress)
    lines = []
    for place, row in enumerate(rows):
        line = {"set": kind, "source": row.source, "prompt": row.prompt[-1]["content"]}
        if starts:
            line["prefill"] = tokenizer.decode(starts[place])
        line["response"] = tokenizer.decode(replies[place]).strip()
        lines.append(line)
    return lines


def prefilled(rows: list[Row], tokenizer: Tokenizer) -> tuple[list[Row], list[list[int]]]:
    """The rows with a response, and the ids of each one's last as trained on, without EOS.

    An answer that goes on after the first k of them shows whether alignment reaches further than
    the first tokens (Qi et al., arXiv 2406.05946). A shorter response is used whole. Only what the
    model adds is judged, and a model that adds nothing has not refused. Rows of source "seen" are
    left out. Raises InputError if no row is left.
    """
    begun = [row for row in rows if has_response(row) and row.source != "seen"]
    if not begun:
        where = rows[0].where.rpartition(":")[0] if rows else "--harmful was not given"
        needed = 'harmful rows with a response, of another source than "seen"'
        raise InputError(f"{where}: --prefill needs {needed}")
    tokens = tokenise(begun, tokenizer, sys.maxsize)  # uncut
    responses = []
    for row in range(tokens.rows):
        places = tokens.places([row])
        last_of_prompt = int((~tokens.response[places]).nonzero()[-1])
        response = tokens.input_ids[places][last_of_prompt + 1 : -1]
        responses.append(response.tolist())
    return begun, responses
