"""Text to token ids: the checkpoint's `tokenizer.json` and its chat template, or the human form.

A conversation becomes segments that alternate between prompt and response. Each is encoded by
itself and the ids are joined, so the first response token never merges with the end of the prompt,
and training, scoring and generation see the same prompt ids. A space between the two belongs to the
response, whose first token is then the one that the model would write.
"""

import datetime
import hashlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as RawTokenizer

from model.hub import resolve
from model.io import InputError, as_input_error, file_hash, read_json
from model.template import HUMAN, LEFT_OUT, Messages, Template, find_template, left_out

Segment = tuple[str, bool]  # text, and whether it is a response
Spans = list[tuple[int, int]]  # [start, end) characters of each token


class Tokenizer:
    """A tokenizer with its prompt form; made by load_tokenizer.

    special: the special tokens by name, `eos_token` among them. template: the source of the chat
    template; None for the human form, `Human: {}\\nAssistant:`. date: the day that a template may
    ask for; as an attribute None if it does not ask. where: the folder. more: see Template.
    """

    def __init__(self, raw: RawTokenizer, special: dict, template: str | None, date, where, more):
        self.raw, self.special, self.template, self.where = raw, special, template, where
        self.file_sha256, self.more = file_hash(where / "tokenizer.json"), more
        self.chat = Template(template or HUMAN, special, date, str(where), more)
        self.date = self.chat.date
        self.eos = special.get("eos_token", "")
        self.eos_id = raw.token_to_id(self.eos)
        if self.eos_id is None:
            what = f"the eos_token {self.eos!r} of tokenizer_config.json"
            raise InputError(f"{where}: {what} is not in tokenizer.json")
        # Metaspace tokenizers (Llama-2) add a word's space; byte-level ones take it from the text.
        first = raw.encode("a", add_special_tokens=False).tokens[:1]
        self.adds_space = bool(first) and first[0].startswith("▁")
        self.newline = self.encode("\n")
        # As in transformers, a special token is one token in any text, even if tokenizer.json has
        # it as a mere word.
        known = {token.content for token in raw.get_added_tokens_decoder().values()}
        words = [text for text in special.values() if text not in known]
        raw.add_special_tokens([text for text in words if raw.token_to_id(text) is not None])
        if (highest := max([*raw.get_vocab().values(), *self.leading_ids()])) >= 2**31:
            raise InputError(f"{where}: tokenizer.json has the id {highest}, beyond int32")
        self.space, self.turn_end = self.around_response()

    def fingerprint(self) -> str:
        """sha256 of what decides a text's ids: tokenizer.json, template and what it is given."""
        parts = [self.file_sha256, self.template or "human"]
        parts += [str(item) for item in sorted(self.special.items())]
        parts += [self.date.isoformat()] if self.date else []
        parts += [str(item) for item in sorted(self.more.items())]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with no special token added around it."""
        return self.raw.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.raw.decode(list(ids), skip_special_tokens=True)

    def around_response(self) -> tuple[str, str]:
        """The space that the template puts before a response, and the special token after it.

        A tokenizer that adds a word's space itself needs no other. The token should be the EOS.
        """
        asked = [{"role": "user", "content": "a"}]
        answered = [*asked, {"role": "assistant", "content": "b"}]
        try:
            prompt, whole = self.chat.render(asked, True), self.chat.render(answered, False)
        except InputError:  # a template for conversations of another kind
            return "", self.eos
        rest = whole[len(prompt) :] if whole.startswith(prompt) else ""
        space, _, after = rest.partition("b")
        space = "" if space.strip() else space
        added = self.raw.get_added_tokens_decoder().values()
        ends = [x.content for x in added if x.special and after.lstrip().startswith(x.content)]
        return space.removeprefix(" ") if self.adds_space else space, [*ends, self.eos][0]

    def segments(self, messages: Messages, most: int | None = None) -> list[Segment]:
        """A conversation as (text, is_response): prompt, response, ... (`most` responses).

        A prompt is what the template renders up to a response, less what came before. If the
        conversation ends with a user's message, the last segment is a prompt. The caller adds
        eos_id after each response; the prompt that follows leaves the template's own out.
        """
        pieces, before, response = [], "", ""
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if messages[-1]["role"] != "assistant":
            turns.append(len(messages))
        for turn in turns[:most]:
            text = self.chat.render(messages[:turn], generate=True)
            rest = text[len(before) :].lstrip() if pieces else text
            if not text.startswith(before) or not rest.startswith(response.strip()):
                raise InputError(
                    f"{self.where}: the chat template rewrites earlier turns once there are {turn} "
                    "messages: put the system message into the first user's text and leave "
                    "thinking out, or give one row per turn"
                )
            rest = rest[len(response.strip()) :]
            if pieces and rest.lstrip().startswith(self.turn_end):  # the caller adds the EOS
                rest = rest.lstrip()[len(self.turn_end) :]
            pieces.append((rest, False))
            if turn < len(messages):
                before, response = text, messages[turn]["content"]
                # A chat template may trim the response; the human form does not.
                trimmed = self.template is not None and response != response.lstrip()
                pieces.append((response if trimmed else self.space + response, True))
        return pieces

    def leading_ids(self) -> list[int]:
        """Ids before the first segment: the tokenizer's BOS, unless a template writes it."""
        if self.template is not None:
            return []
        ids = self.raw.encode("a").ids
        return ids[: ids.index(self.encode("a")[0])]

    def encode_segments(self, rows: list[list[Segment]]) -> list[list[tuple[list[int], Spans]]]:
        """For each segment of each row its ids, and each token's [start, end) in the text.

        For tokenizers that add a word's space, what stands before a text matters: a prompt after a
        response is encoded behind the EOS, and a response after a newline behind a newline. All
        rows go to the tokenizer's threads together.
        """
        eos, newline, nothing = (self.eos, [self.eos_id]), ("\n", self.newline), ("", [])
        leads = []
        for row in rows:
            for k, (_, is_response) in enumerate(row):
                after_newline = k and self.adds_space and row[k - 1][0].endswith("\n")
                lead = (newline if after_newline else nothing) if is_response else eos
                leads.append(lead if k else nothing)
        texts = [text for row in rows for text, _ in row]
        behind = [before + text for (before, _), text in zip(leads, texts)]
        with as_input_error(f"{self.where}/tokenizer.json: cannot encode this text"):
            encodings = self.raw.encode_batch(behind, add_special_tokens=False)
            pieces = map(self.cut, encodings, leads, texts)
            return [[next(pieces) for _ in row] for row in rows]

    def cut(self, encoding, lead: tuple[str, list[int]], text: str) -> tuple[list[int], Spans]:
        """Ids and spans of a text encoded behind `lead`; encoded alone where the two merged."""
        (before, ids), found = lead, encoding.ids
        start = found.index(ids[-1]) + 1 if ids and ids[-1] in found else len(ids)
        if found[start - len(ids) : start] != ids:
            encoding, before, start = self.raw.encode(text, add_special_tokens=False), "", 0
        spans = [(a - len(before), b - len(before)) for a, b in encoding.offsets[start:]]
        return encoding.ids[start:], spans

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the assistant's next response begins."""
        ids, segments = self.leading_ids(), self.segments(messages)
        if left_out(messages, segments):
            raise InputError(f"{self.where}: {LEFT_OUT}")
        for (_, is_response), (piece, _) in zip(segments, self.encode_segments([segments])[0]):
            ids += [*piece, self.eos_id] if is_response else piece
        return ids


def overlaps(spans: Spans, marks: Spans) -> list[bool]:
    """Which spans overlap a mark: more marks begin before their end than end by their start."""
    (starts, ends), (first, last) = np.sort(np.array(marks).T), np.array(spans).reshape(-1, 2).T
    return (np.searchsorted(starts, last) > np.searchsorted(ends, first, "right")).tolist()


def special_tokens(folder: Path, config: dict) -> dict[str, str]:
    """The special tokens by name, as transformers gives them to a template.

    From tokenizer_config.json, a text or an object with `content` each, extra_special_tokens
    included. If that is of the old kind (without added_tokens_decoder), special_tokens_map.json has
    the last word; otherwise the map only supplies a missing EOS, without which nothing works.
    """
    file = folder / "special_tokens_map.json"
    table, newer = read_json(file) if file.exists() else {}, "added_tokens_decoder" in config
    table = {"eos_token": table.get("eos_token"), **config} if newer else {**config, **table}
    named = {key: value for key, value in table.items() if key.endswith("_token")}
    extra = table.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    texts = {key: x.get("content") if isinstance(x, dict) else x for key, x in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def load_tokenizer(
    path: str | Path,
    template: str | None = None,
    date: str | None = None,
    revision: str | None = None,
    template_kwargs: dict | None = None,
) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder or hub id (at `revision`).

    template: "human" for the human form, "chat" to insist on the checkpoint's chat template, None
    for the chat template if there is one, else the human form. date: YYYY-MM-DD, for a template
    that asks for the day (default: today). template_kwargs: for the chat template, such as
    {"enable_thinking": False}. Raises InputError.
    """
    folder = resolve(path, revision, weights=False)
    if template not in (None, "human", "chat"):
        raise InputError(f"the template {template!r} is unknown: choose human or chat")
    with as_input_error(f"the date {date!r} does not have the form YYYY-MM-DD", ValueError):
        day = datetime.date.today() if date is None else datetime.date.fromisoformat(date)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; AutoTokenizer.from_pretrained(...).save_pretrained() makes it"
        )
    config = read_json(folder / "tokenizer_config.json")
    source = None if template == "human" else find_template(folder, config)
    if template == "chat" and source is None:
        raise InputError(f"{folder}: the checkpoint has no chat template; use --template human")
    with as_input_error(f"{folder}: tokenizer.json or tokenizer_config.json cannot be used"):
        raw = RawTokenizer.from_file(str(file))
        if getattr(raw.model, "dropout", None):
            raise InputError(f"{file}: its dropout draws tokens by chance: set it to null")
        raw.no_truncation()
        raw.no_padding()
        special, more = special_tokens(folder, config), template_kwargs or {}
        return Tokenizer(raw, special, source, day, folder, more)
