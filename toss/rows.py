"""Datasets as lists of conversations: JSONL in any of the usual forms."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from model.io import InputError, json_lines

ROLES = dict.fromkeys(("system", "developer"), "system") | dict.fromkeys(("user", "human"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")
HALF = re.compile("[\ud800-\udfff]")  # one of the two that make a character in UTF-16
FORMS = "messages; prompt and response; instruction, input and output (Alpaca); "
FORMS += "conversations (ShareGPT); chosen or transcript (Anthropic HH)"


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
        return self.messages[: -1 if self.messages[-1]["role"] == "assistant" else None]


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


def row_of(raw: dict, where: str, responses: bool = True) -> Row:
    """One JSON object as a Row; see read_rows."""
    try:
        raw = {key: x for key, x in raw.items() if x is not None}  # as if it were absent
        messages = [turn(*pair) for pair in conversation(raw, responses)]
        replies = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if not messages and not (responses and {"prompt", "instruction"} & raw.keys()):
            raise InputError(f"no turns in any of the known forms ({FORMS}), but {list(raw)}")
        if responses and not replies:
            raise InputError("the row has no response")
        messages = messages[: replies[-1] + 1] if responses else messages
        if messages[0]["role"] == "assistant" or all(m["role"] != "user" for m in messages):
            raise InputError("the row has no prompt before its first response")
        if not all(messages[k]["content"].strip() for k in replies):
            raise InputError("the row has an empty response")
        end = len(messages[replies[0]]["content"]) if len(replies) == 1 else 0
        spans = raw.get("harmful", [])
        if not all(type(a) is type(b) is int and 0 <= a < b <= end for a, b in spans):
            raise InputError("`harmful` must list [start, end) character spans of the one response")
        notes = {key: raw[key] for key in ("source", "answer") if key in raw}
        plain = {key: str(x) for key, x in notes.items() if type(x) in (str, int, float)}
        if not responses and (len(plain) < len(notes) or HALF.search("".join(plain.values()))):
            raise InputError("`source` and `answer` must be whole texts or numbers")
        return Row(messages, where, spans, plain.get("source", ""), plain.get("answer"))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{where}: malformed ({type(error).__name__}: {error})") from None


def turn(role: str, text: str | list) -> dict[str, str]:
    """One message. text: a string, or a list of {"type": "text", "text": ...} parts."""
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"unknown role {role!r} (known: {', '.join(ROLES)})")
    if isinstance(text, list) and text:
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str):
        raise InputError(f"the text of {role!r} is not a string but {json.dumps(text)[:60]}")
    if HALF.search(text):
        raise InputError(f"the text of {role!r} holds half a character")
    return {"role": ROLES[role], "content": text}


def conversation(raw: dict, responses: bool) -> list[tuple[str, str]]:
    """(role, text) of each turn, by the first form that fits; empty where none does."""
    if "messages" in raw:
        return [role_and_text(m) for m in raw["messages"]]
    if "prompt" in raw and "response" in raw:
        return [("user", raw["prompt"]), ("assistant", raw["response"])]
    if "instruction" in raw and ("output" in raw or not responses):
        text = raw["instruction"] + ("\n\n" + raw["input"] if raw.get("input") else "")
        return [("user", text)] + ([("assistant", raw["output"])] if "output" in raw else [])
    if "conversations" in raw:
        return [role_and_text(m) for m in raw["conversations"]]
    transcript = raw.get("chosen", raw.get("transcript"))
    if isinstance(transcript, str):
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", transcript.lstrip())
        turns = [(role.lower(), text.strip()) for role, text in zip(parts[1::2], parts[2::2])]
        if turns and parts[0].strip():
            turns.insert(0, ("system", parts[0].strip()))
        while len(turns) > (2 if responses else 1) and turns[-1] == ("assistant", ""):
            turns.pop()  # a transcript that breaks off after "Assistant:"
        return turns
    return [("user", raw["prompt"])] if "prompt" in raw and not responses else []


def role_and_text(message: dict) -> tuple[str, str]:
    """role and content, or ShareGPT's from and value; some files mix the names of both."""
    there = {key: x for key, x in message.items() if x is not None}
    own = {"role": there.get("from"), "content": there.get("value"), **there}
    return own["role"], own["content"]
