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
from tokenizers import Encoding
from tokenizers import Tokenizer as RawTokenizer

from model.hub import resolve
from model.io import InputError, as_input_error, file_hash, read_json
from model.template import HUMAN, LEFT_OUT, Messages, Segment, Template, find_template, left_out

Spans = list[tuple[int, int]]  # [start, end) characters of each token


class Tokenizer:
    """A tokenizer with its prompt form; made by load_tokenizer.

    special: the special tokens by name, `eos_token` among them. template: the source of the chat
    template; None for the human form, `Human: {}\\nAssistant:`. date: the day that a template may
    ask for; as an attribute None if it does not ask. where: the folder. options: see Template.
    """

    def __init__(
        self,
        raw: RawTokenizer,
        special: dict[str, str],
        template: str | None,
        date: datetime.date,
        where: Path,
        options: dict,
    ):
        self.raw = raw
        self.special = special
        self.template = template
        self.where = where
        self.options = options
        self.file_sha256 = file_hash(where / "tokenizer.json")
        self.chat = Template(template or HUMAN, special, date, str(where), options)
        self.date = self.chat.date

        self.eos = special.get("eos_token", "")
        self.eos_id = raw.token_to_id(self.eos)
        if self.eos_id is None:
            raise InputError(
                f"{where}: the eos_token {self.eos!r} of tokenizer_config.json is not in "
                "tokenizer.json"
            )
        # Metaspace tokenizers (Llama-2) add a word's space; byte-level ones take it from the text.
        tokens = raw.encode("a", add_special_tokens=False).tokens
        self.adds_space = bool(tokens) and tokens[0].startswith("▁")
        self.newline_ids = self.encode("\n")

        # As in transformers, a special token is one token in any text, even if tokenizer.json has
        # it as a mere word.
        registered = {token.content for token in raw.get_added_tokens_decoder().values()}
        for text in special.values():
            if text not in registered and raw.token_to_id(text) is not None:
                raw.add_special_tokens([text])

        highest = max([*raw.get_vocab().values(), *self.leading_ids()])
        if highest >= 2**31:
            raise InputError(f"{where}: tokenizer.json has the id {highest}, beyond int32")
        self.space, self.turn_end = self.around_response()

    def fingerprint(self) -> str:
        """sha256 of what decides a text's ids: tokenizer.json, template and what it is given."""
        parts = [self.file_sha256, self.template or "human"]
        parts += [str(item) for item in sorted(self.special.items())]
        if self.date is not None:
            parts.append(self.date.isoformat())
        parts += [str(item) for item in sorted(self.options.items())]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with no special token added around it."""
        return self.raw.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.raw.decode(list(ids), skip_special_tokens=True)

    # From conversations to segments

    def around_response(self) -> tuple[str, str]:
        """The space that the template puts before a response, and the special token after it.

        A tokenizer that adds a word's space itself needs no other. The token should be the EOS.
        """
        question = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": "b"}
        try:
            prompt = self.chat.render([question], generate=True)
            text = self.chat.render([question, answer], generate=False)
        except InputError:  # a template for conversations of another kind
            return "", self.eos
        if not text.startswith(prompt):
            return "", self.eos

        space, _, after = text[len(prompt) :].partition("b")
        if space.strip():
            space = ""
        if self.adds_space:
            space = space.removeprefix(" ")
        for token in self.raw.get_added_tokens_decoder().values():
            if token.special and after.lstrip().startswith(token.content):
                return space, token.content
        return space, self.eos

    def segments(self, messages: Messages, max_responses: int | None = None) -> list[Segment]:
        """A conversation as (text, is_response): prompt, response, ... (at most so many responses).

        A prompt is what the template renders up to a response, less what came before. If the
        conversation ends with a user's message, the last segment is a prompt. The caller adds
        eos_id after each response; the prompt that follows leaves the template's own out.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if messages[-1]["role"] != "assistant":
            turns.append(len(messages))
        segments = []
        previous = ""  # what was rendered up to the response before
        response = ""  # that response without outer blanks, which a template may trim
        for turn in turns[:max_responses]:
            rendered = self.chat.render(messages[:turn], generate=True)
            prompt = rendered
            if segments:
                # Behind what came before stand the response, the token that ends its turn (left
                # out, since the caller adds the EOS), and this prompt.
                new_text = rendered[len(previous) :].lstrip()
                if not rendered.startswith(previous) or not new_text.startswith(response):
                    raise InputError(
                        f"{self.where}: the chat template rewrites earlier turns once there are "
                        f"{turn} messages: give one row per turn, or put the system message into "
                        "the first user's text, remove thinking from earlier responses, and do not "
                        "set enable_thinking to false"
                    )
                prompt = new_text.removeprefix(response)
                if prompt.lstrip().startswith(self.turn_end):
                    prompt = prompt.lstrip().removeprefix(self.turn_end)
            segments.append((prompt, False))
            if turn < len(messages):
                previous = rendered
                response = messages[turn]["content"].strip()
                segments.append((self.spaced(messages[turn]["content"]), True))
        return segments

    def spaced(self, response: str) -> str:
        """A response behind the space that separates it from its prompt.

        A chat template may trim a response that begins with a blank; the human form does not.
        """
        if self.template is not None and response != response.lstrip():
            return response
        return self.space + response

    # From segments to ids

    def leading_ids(self) -> list[int]:
        """Ids before the first segment: the tokenizer's BOS, unless a template writes it."""
        if self.template is not None:
            return []
        ids = self.raw.encode("a").ids
        return ids[: ids.index(self.encode("a")[0])]

    def encode_segments(self, rows: list[list[Segment]]) -> list[list[tuple[list[int], Spans]]]:
        """For each segment of each row its ids, and each token's [start, end) in the text.

        All rows go to the tokenizer's threads together.
        """
        texts = []
        contexts = []
        for row in rows:
            for i, (text, _) in enumerate(row):
                texts.append(text)
                contexts.append(self.context(row, i))
        joined = [context + text for (context, _), text in zip(contexts, texts)]
        with as_input_error(f"{self.where}/tokenizer.json: cannot encode this text"):
            encodings = self.raw.encode_batch(joined, add_special_tokens=False)
            pieces = list(map(self.without_context, encodings, contexts, texts))
        encoded = []
        start = 0
        for row in rows:
            encoded.append(pieces[start : start + len(row)])
            start += len(row)
        return encoded

    def context(self, row: list[Segment], i: int) -> tuple[str, list[int]]:
        """The text behind which segment i of a row is encoded, and its ids.

        It matters to tokenizers that add a word's space: a prompt after a response is encoded
        behind the EOS, and a response after a newline behind a newline.
        """
        if i == 0:
            return "", []
        _, is_response = row[i]
        if not is_response:
            return self.eos, [self.eos_id]
        prompt, _ = row[i - 1]
        if self.adds_space and prompt.endswith("\n"):
            return "\n", self.newline_ids
        return "", []

    def without_context(
        self, encoding: Encoding, context: tuple[str, list[int]], text: str
    ) -> tuple[list[int], Spans]:
        """Ids and spans of a text encoded behind a context; encoded alone where the two merged."""
        context_text, context_ids = context
        shift = len(context_text)
        # The tokenizer may have put a space before the context, so look for the context's end.
        start = len(context_ids)
        if context_ids and context_ids[-1] in encoding.ids:
            start = encoding.ids.index(context_ids[-1]) + 1
        if encoding.ids[start - len(context_ids) : start] != context_ids:
            encoding = self.raw.encode(text, add_special_tokens=False)
            shift = 0
            start = 0
        spans = [(first - shift, last - shift) for first, last in encoding.offsets[start:]]
        return encoding.ids[start:], spans

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the assistant's next response begins."""
        segments = self.segments(messages)
        if left_out(messages, segments):
            raise InputError(f"{self.where}: {LEFT_OUT}")
        ids = self.leading_ids()
        for (_, is_response), (piece, _) in zip(segments, self.encode_segments([segments])[0]):
            ids += piece
            if is_response:
                ids.append(self.eos_id)
        return ids


def overlaps(spans: Spans, marks: Spans) -> list[bool]:
    """Which spans overlap a mark: more marks begin before their end than end by their start."""
    mark_starts, mark_ends = np.sort(np.array(marks).T)
    starts, ends = np.array(spans).reshape(-1, 2).T
    started = np.searchsorted(mark_starts, ends)
    finished = np.searchsorted(mark_ends, starts, side="right")
    return (started > finished).tolist()


def special_tokens(folder: Path, config: dict) -> dict[str, str]:
    """The special tokens by name, as transformers gives them to a template.

    From tokenizer_config.json, a text or an object with `content` each, extra_special_tokens
    included. If that is of the old kind (without added_tokens_decoder), special_tokens_map.json has
    the last word; otherwise the map only supplies a missing EOS, without which nothing works.
    """
    file = folder / "special_tokens_map.json"
    table = read_json(file) if file.exists() else {}
    if "added_tokens_decoder" in config:
        table = {"eos_token": table.get("eos_token"), **config}
    else:
        table = {**config, **table}
    named = {name: token for name, token in table.items() if name.endswith("_token")}
    extra = table.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra

    texts = {}
    for name, token in named.items():
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[name] = text
    return texts


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
    # The prompt form: the chat template, or the human form where there is none.
    config = read_json(folder / "tokenizer_config.json")
    source = None if template == "human" else find_template(folder, config)
    if template == "chat" and source is None:
        raise InputError(f"{folder}: the checkpoint has no chat template; use --template human")

    with as_input_error(f"{folder}: tokenizer.json or tokenizer_config.json cannot be used"):
        raw = RawTokenizer.from_file(str(file))
        if getattr(raw.model, "dropout", None):
            raise InputError(f"{file}: its dropout draws tokens by chance: set it to null")
        # Cutting rows is our work, see --max-length, and rows are not padded.
        raw.no_truncation()
        raw.no_padding()
        special = special_tokens(folder, config)
        return Tokenizer(raw, special, source, day, folder, template_kwargs or {})
