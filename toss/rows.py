"""Datasets as lists of conversations: JSONL in any of the usual forms."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.io import InputError, json_lines

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}
SURROGATE = re.compile("[\ud800-\udfff]")  # one of the two that make a character in UTF-16
FORMS = "messages; prompt and response; prompt and completion (TRL); instruction, input and output "
FORMS += "(Alpaca); conversations (ShareGPT); chosen or transcript (Anthropic HH)"

Turn = tuple[str, Any]  # role and text, as they stand in the file


@dataclass
class Row:
    """One conversation. Every assistant turn is a response y_i, all before it its prompt x_i."""

    messages: list[dict[str, str]]
    where: str = ""  # file:line, for errors
    harmful: list[list[int]] = field(default_factory=list)  # [start, end) in the response
    source: str = ""  # what evaluation, and the counts of discards, group by
    answer: str | None = None  # evaluation rows: what a right answer contains

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The conversation up to the last response."""
        if self.messages[-1]["role"] == "assistant":
            return self.messages[:-1]
        return self.messages

    @property
    def has_empty_response(self) -> bool:
        """True if one of the responses is blank; see tokens.tokenise."""
        replies = [turn["content"] for turn in self.messages if turn["role"] == "assistant"]
        return not all(reply.strip() for reply in replies)


def read_rows(source: str | Path | Iterable[dict], responses: bool = True) -> list[Row]:
    """Read a JSONL file (plain or .gz), or dictionaries of the same forms; blank lines are skipped.

    With `responses`, each row needs a response, and turns after the last one are dropped; without,
    it may be a prompt only (evaluation). Raises InputError naming file and line.
    """
    if not isinstance(source, str | Path):
        return [row_of(raw, f"row {i} (from 0)", responses) for i, raw in enumerate(source)]
    rows = [row_of(raw, where, responses) for where, raw in json_lines(source)]
    if not rows:
        raise InputError(f"{source}: the file has no rows")
    return rows


def evenly(items: Sequence, n: int) -> list:
    """n of the items, spread evenly from the first to the last; all if there are no more than n.

    >>> evenly([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 3, 6]
    """
    if len(items) <= n:
        return list(items)
    return [items[i * (len(items) - 1) // max(n - 1, 1)] for i in range(n)]


def row_of(raw: dict, where: str, responses: bool) -> Row:
    """One JSON object as a Row; see read_rows."""
    try:
        present = {key: value for key, value in raw.items() if value is not None}
        messages = messages_of(present, responses)
        row = Row(messages, where, harmful_spans(present, messages))
        # Evaluation groups and judges by these. In rows to train on a value of another kind is not
        # ours, and is left out.
        for key in ("source", "answer"):
            if key in present:
                text = note(present[key])
                if text is None and not responses:
                    raise InputError("`source` and `answer` must be whole texts or numbers")
                if text is not None:
                    setattr(row, key, text)
        return row
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{where}: malformed ({type(error).__name__}: {error})") from None


def messages_of(raw: dict, responses: bool) -> list[dict[str, str]]:
    """The conversation of a row, checked. Raises InputError."""
    messages = [checked_message(role, text) for role, text in conversation(raw, responses)]
    # A row with a prompt alone has a known form; that it lacks a response is said below.
    only_a_prompt = responses and ("prompt" in raw or "instruction" in raw)
    if not messages and not only_a_prompt:
        raise InputError(f"no turns in any of the known forms ({FORMS}), but {list(raw)}")

    replies = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if responses:
        if not replies:
            raise InputError(f"the row has no response (its fields: {', '.join(raw)[:60]})")
        messages = messages[: replies[-1] + 1]
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant" or "user" not in roles:
        raise InputError("the row has no prompt before its first response")
    return messages


def harmful_spans(raw: dict, messages: list[dict[str, str]]) -> list[list[int]]:
    """The optional ground truth, [start, end) characters of a row's one response."""
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    length = len(replies[0]) if len(replies) == 1 else 0
    spans = raw.get("harmful", [])
    if not isinstance(spans, list) or not all(is_span(span, length) for span in spans):
        wanted = "a list of [start, end) character spans of the one response"
        raise InputError(f"`harmful` must be {wanted}, not {json.dumps(spans)[:60]}")
    return spans


def is_span(value: Any, length: int) -> bool:
    """True for [start, end] within a text of that length."""
    if not isinstance(value, list) or [type(place) for place in value] != [int, int]:
        return False  # a truth value is no number here
    return 0 <= value[0] < value[1] <= length


def note(value: Any) -> str | None:
    """A `source` or `answer` as text; None if it is of another kind, or no whole text."""
    if type(value) not in (str, int, float) or SURROGATE.search(str(value)):
        return None
    return str(value)


def checked_message(role: str, text: str | list) -> dict[str, str]:
    """One message. text: a string, or a list of {"type": "text", "text": ...} parts."""
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"unknown role {role!r} (known: {', '.join(ROLES)})")
    if isinstance(text, list) and text:
        text = text_of_parts(role, text)
    if not isinstance(text, str):
        raise InputError(f"the text of {role!r} is not a string but {json.dumps(text)[:60]}")
    if SURROGATE.search(text):
        raise InputError(f"the text of {role!r} contains an unpaired surrogate")
    return {"role": ROLES[role], "content": text}


def text_of_parts(role: str, parts: list) -> str:
    """The text of a message whose content is a list of parts."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise InputError(f"{role!r} has a part that is not a text: {json.dumps(part)[:60]}")
        texts.append(part["text"])
    return "".join(texts)


# The forms


def conversation(raw: dict, responses: bool) -> list[Turn]:
    """(role, text) of each turn, by the first form that fits; empty where none does."""
    if "messages" in raw:
        return [role_and_text(turn) for turn in raw["messages"]]
    if "prompt" in raw and "response" in raw:
        return [("user", raw["prompt"]), ("assistant", raw["response"])]
    if "prompt" in raw and "completion" in raw:
        return turns_of("user", raw["prompt"]) + turns_of("assistant", raw["completion"])
    if "instruction" in raw and ("output" in raw or not responses):
        return alpaca(raw)
    if "conversations" in raw:
        return [role_and_text(turn) for turn in raw["conversations"]]
    transcript = raw.get("chosen", raw.get("transcript"))
    if isinstance(transcript, str):
        return anthropic(transcript, least=2 if responses else 1)
    if "prompt" in raw and not responses:
        return turns_of("user", raw["prompt"])
    return []


def turns_of(role: str, value: Any) -> list[Turn]:
    """TRL's prompt or completion: a text of this role, or a list of messages."""
    is_list = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    if is_list and all("role" in turn for turn in value):
        return [role_and_text(turn) for turn in value]
    return [(role, value)]


def role_and_text(turn: dict) -> Turn:
    """role and content, or ShareGPT's from and value; some files mix the names of both."""
    present = {key: value for key, value in turn.items() if value is not None}
    role = present.get("role", present.get("from"))
    text = present.get("content", present.get("value"))
    return role, text


def alpaca(raw: dict) -> list[Turn]:
    """instruction, input and output."""
    text = raw["instruction"]
    if raw.get("input"):
        text = text + "\n\n" + raw["input"]
    turns = [("user", text)]
    if "output" in raw:
        turns.append(("assistant", raw["output"]))
    return turns


def anthropic(transcript: str, least: int) -> list[Turn]:
    """Turns that begin with Human: and Assistant:. least: turns that are kept, even if empty."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", transcript.lstrip())
    turns = [(role.lower(), text.strip()) for role, text in zip(parts[1::2], parts[2::2])]
    if turns and parts[0].strip():
        turns.insert(0, ("system", parts[0].strip()))
    while len(turns) > least and turns[-1] == ("assistant", ""):
        turns.pop()  # a transcript that breaks off after "Assistant:"
    return turns
