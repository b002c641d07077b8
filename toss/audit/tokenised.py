"""What was dropped? In a file that is tokenised already: which tokens are in the loss of training.

For files of any trainer: JSONL with `input_ids`, and one of LOSSES for each token. Trainers shift
them by themselves, so the entry of a token says whether that token is learnt.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from model.hub import resolve
from model.io import InputError, json_lines
from model.tokenizer import Tokenizer, load_tokenizer
from toss.audit.characters import harmless, visible
from toss.audit.tokens import token_texts

LOSSES = ("labels", "assistant_masks", "loss_mask", "weights")  # the first that a row has counts
IGNORED = -100  # a label that has no loss


@dataclass
class TokenisedRow:
    """A row of a tokenised file."""

    input_ids: list[int]
    in_loss: list[bool]  # of each token


def read_tokenised(path: Path) -> list[TokenisedRow]:
    """The rows of a tokenised file. Raises InputError naming file and line."""
    rows = []
    for where, entry in json_lines(path):
        # Its ids, and whichever field says what is in the loss.
        ids = entry.get("input_ids")
        whole = isinstance(ids, list) and all(type(x) is int and 0 <= x < 2**31 for x in ids)
        if not whole or not ids:
            raise InputError(f"{where}: `input_ids` must be a list of token ids, and not empty")
        names = [name for name in LOSSES if name in entry]
        if not names:
            raise InputError(f"{where}: none of {', '.join(LOSSES)} says what is in the loss")
        values = entry[names[0]]
        if not isinstance(values, list) or len(values) != len(ids):
            raise InputError(f"{where}: `{names[0]}` must be a list as long as `input_ids`")
        if names[0] == "labels":
            in_loss = [label != IGNORED for label in values]
        else:
            in_loss = [bool(value) for value in values]
        rows.append(TokenisedRow(ids, in_loss))
    if not rows:
        raise InputError(f"{path}: the file has no rows")
    return rows


def summary(rows: list[TokenisedRow], tokenizer: Tokenizer) -> list[str]:
    """What is worth knowing of a whole file, a line each."""
    ends = {tokenizer.eos_id, tokenizer.raw.token_to_id(tokenizer.turn_end)}
    longest = max(len(row.input_ids) for row in rows)
    # Rows of each kind that is worth a look.
    counts = dict.fromkeys(("untrained", "no end", "longest", "first"), 0)
    for row in rows:
        trained = [token for token, in_loss in zip(row.input_ids, row.in_loss) if in_loss]
        counts["untrained"] += not trained
        counts["no end"] += bool(trained) and not ends.intersection(trained)
        counts["longest"] += len(row.input_ids) == longest
        counts["first"] += row.in_loss[0]
    tokens = sum(len(row.input_ids) for row in rows)
    in_loss = sum(sum(row.in_loss) for row in rows)
    return [
        f"{len(rows)} rows, {tokens} tokens, {in_loss} in the loss ({in_loss / tokens:.1%})",
        f"{counts['untrained']} rows without a token in the loss",
        f"{counts['no end']} rows whose end of turn ({tokenizer.turn_end}) is not in the loss: "
        "a model may learn from them not to stop",
        f"{counts['longest']} rows at the longest length, {longest} tokens: were they cut?",
        f"{counts['first']} rows whose first token is in the loss, which nothing predicts",
    ]


def marked_text(row: TokenisedRow, tokenizer: Tokenizer) -> str:
    """The text of a row, with {+ +} around neighbours that are in the loss."""
    texts = token_texts(tokenizer.raw, row.input_ids)
    parts = []
    for in_loss, tokens in groupby(zip(texts, row.in_loss), key=lambda token: token[1]):
        words = [text for text, _ in tokens]
        if in_loss:
            parts.append("{+" + "".join(visible(word) for word in words) + "+}")
        else:
            parts.append(harmless("".join(words)))
    return "".join(parts)


def show_tokenised(path: Path, model: str, number: int | None) -> None:
    """Print what of a tokenised file is in the loss: of all of it, and of one row."""
    tokenizer = load_tokenizer(resolve(model, weights=False))
    rows = read_tokenised(path)
    print(path)
    for line in summary(rows, tokenizer):
        print(f"  {line}")
    if number is None:
        return
    if not 0 <= number < len(rows):
        raise InputError(f"{path} has no row {number}: the rows are 0 to {len(rows) - 1}")
    row = rows[number]
    count = f"{sum(row.in_loss)} of {len(row.in_loss)} tokens in the loss"
    print(f"\nrow {number}: {count}\n\n{marked_text(row, tokenizer)}")
