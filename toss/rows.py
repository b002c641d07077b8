"""Reading datasets: one JSON object a line, in any of the usual forms, as a list of conversations."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import InputError
from model.files import json_object

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant"}
FORMS = ("messages; prompt and response; instruction, input and output (Alpaca); conversations (ShareGPT); "
         "chosen or transcript (Anthropic HH)")


@dataclass
class Row:
    """One conversation. Every assistant turn is a response y_i; what stands before it is its prompt x_i."""

    messages: list[dict[str, str]]
    where: str  # file:line, for errors
    harmful: list[list[int]] = field(default_factory=list)  # ground truth: [start, end) characters of the response
    source: str = ""  # evaluation rows: what to group by
    answer: str | None = None  # evaluation rows: what a right answer must hold

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The conversation up to the last response."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages


def read_rows(path: str | Path, responses: bool = True) -> list[Row]:
    """Read a JSONL file (plain or .gz); blank lines are passed over.

    With `responses`, a row without one, or with an empty one, is an error, and turns after the last response are
    dropped; without, rows may be prompts only (evaluation). Every error names file and line; an empty file is one.
    """
    rows = []
    for where, line in lines_of(path):
        if not rows and line.lstrip().startswith("["):
            raise InputError(f"{where}: the file is one JSON array, and one object a line is read; "
                             f"`jq -c '.[]' {path} > rows.jsonl` makes such a file")
        rows.append(row_of(json_object(line, where), where, responses))
    if not rows:
        raise InputError(f"{path}: the file holds no rows")
    return rows


def lines_of(path: str | Path) -> Iterator[tuple[str, str]]:
    """(file:line, text) of each line that is not blank, of a plain file or a .gz; a byte order mark is passed over."""
    path, number = Path(path), 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield f"{path}:{number}", text
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: cannot be read as text ({error}); save the file as UTF-8") from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: the packed file is cut off or damaged here ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None


def row_of(raw: dict, where: str, responses: bool = True) -> Row:
    """One JSON object as a Row; see read_rows."""
    messages = [turn(role, text, where) for role, text in conversation(raw, where, responses)]
    replies = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if responses:
        if not replies:
            raise InputError(f"{where}: the row has no response")
        messages = messages[: replies[-1] + 1]
    if messages[0]["role"] == "assistant" or not any(m["role"] == "user" for m in messages):
        raise InputError(f"{where}: the row has no prompt before its first response")
    for k in replies:
        if not messages[k]["content"].strip():
            raise InputError(f"{where}: the row has an empty response")
    spans = raw.get("harmful") or []
    if spans:
        text = messages[replies[0]]["content"] if len(replies) == 1 else ""
        if not isinstance(spans, list) or not all(
                isinstance(s, list) and len(s) == 2 and all(isinstance(n, int) for n in s) and 0 <= s[0] < s[1] <= len(text)
                for s in spans):
            raise InputError(f"{where}: `harmful` must list [start, end) character spans inside the row's one response")
    return Row(messages, where, spans, str(raw.get("source") or ""),
               None if raw.get("answer") is None else str(raw["answer"]))


def turn(role: str, text: str | list, where: str) -> dict[str, str]:
    """One message, its role in our spelling. text: a string, or a list of {"type": "text", "text": ...} parts."""
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: the role {role!r} is unknown (there are {', '.join(ROLES)}); leave such rows out")
    if isinstance(text, list) and text and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in text):
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str):
        raise InputError(f"{where}: the text of a turn of {role!r} is not a string but {json.dumps(text)[:60]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the text of a turn of {role!r} holds half a character ({error.reason})") from None
    return {"role": ROLES[role], "content": text}


def conversation(raw: dict, where: str, responses: bool) -> list[tuple[str, str]]:
    """(role, text) of every turn, by the first form that fits."""
    try:
        if raw.get("messages") is not None:
            return [said(m) for m in raw["messages"]] or missing(where)
        if "prompt" in raw and "response" in raw:
            return [("user", raw["prompt"]), ("assistant", raw["response"])]
        if "instruction" in raw and ("output" in raw or not responses):
            text = raw["instruction"] + ("\n\n" + raw["input"] if raw.get("input") else "")
            return [("user", text)] + ([("assistant", raw["output"])] if "output" in raw else [])
        if "conversations" in raw:
            return [said(m) for m in raw["conversations"]] or missing(where)
        transcript = raw.get("chosen", raw.get("transcript"))
        if isinstance(transcript, str):
            parts = re.split(r"(?:^|\n\n)(Human|Assistant):", transcript.lstrip())
            turns = [(role.lower(), text.strip()) for role, text in zip(parts[1::2], parts[2::2])]
            if turns and parts[0].strip():
                turns.insert(0, ("system", parts[0].strip()))
            while turns and turns[-1] == ("assistant", "") and len(turns) > (2 if responses else 1):
                turns.pop()  # a transcript that breaks off after "Assistant:"
            return turns or missing(where)
        if "prompt" in raw and not responses:
            return [("user", raw["prompt"])]
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: the row is malformed ({type(error).__name__}: {error})") from None
    if "prompt" in raw or "instruction" in raw:
        raise InputError(f"{where}: the row has no response")
    return missing(where)


def said(message: dict) -> tuple[str, str]:
    """(role, text) of one turn: role and content, or ShareGPT's from and value; files mix the names of both."""
    return (message["from" if "from" in message and "role" not in message else "role"],
            message["value" if "value" in message and "content" not in message else "content"])


def missing(where: str) -> list:
    """The row fits no form: always raises."""
    raise InputError(f"{where}: the row fits none of the known forms ({FORMS})")


def overlap(rows: list[Row], others: list[Row], prompts_only: bool = False) -> int:
    """How many of `rows` occur in `others` too, word for word (by the prompt alone where asked)."""

    def key(row: Row) -> str:
        return json.dumps(row.prompt if prompts_only else row.messages)

    known = {key(row) for row in others}
    return sum(key(row) in known for row in rows)
