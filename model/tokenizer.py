"""Text to token ids: the checkpoint's `tokenizer.json`, and its chat template (or the paper's human form).

A conversation becomes segments that alternate between prompt and response. Each is encoded by itself and the ids are
joined, so the first response token never merges with the prompt's last space, and training, scoring and generation
see the same prompt ids. A space that separates the two belongs to the response, whose first token is then the one that
the model would write.
"""

import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding
from tokenizers import Tokenizer as RawTokenizer

from model.checkpoint import resolve
from model.errors import InputError
from model.files import file_hash, read_json, read_text

Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}, ...]
Spans = list[tuple[int, int]]


class Tokenizer:
    """What the rest of the project needs of a tokenizer; made by load_tokenizer.

    special: the special tokens by name, `eos_token` among them. template: the jinja source of the chat template, or None
    for the human form, `Human: {}\\nAssistant:`. date: what a template that asks for the day is told; afterwards None
    where the template does not ask.
    """

    def __init__(self, raw: RawTokenizer, file_sha256: str, special: dict[str, str], template: str | None, where: str,
                 date: datetime.date):
        self.raw, self.file_sha256, self.special, self.template, self.where = raw, file_sha256, special, template, where
        self.compiled = None if template is None else compile_template(template, where)
        self.date = date if template is not None and asks_for_the_date(template) else None
        if "eos_token" not in special:
            raise InputError(f"{where}: tokenizer_config.json names no eos_token")
        self.eos = special["eos_token"]
        self.eos_id = raw.token_to_id(self.eos)
        if self.eos_id is None:
            raise InputError(f"{where}: the eos_token {self.eos!r} is not in tokenizer.json")
        # Metaspace tokenizers (Llama-2) put the word's space themselves; byte-level ones take it from the text.
        start = raw.encode("a", add_special_tokens=False).tokens
        self.adds_space = bool(start) and start[0].startswith("▁")
        self.newline = self.encode("\n")
        # As transformers does: a special token is one token in any text, though tokenizer.json may have it as a mere word.
        known = {token.content for token in raw.get_added_tokens_decoder().values()}
        raw.add_special_tokens([text for text in special.values() if text not in known and raw.token_to_id(text) is not None])
        self.space, self.turn_end = self.around_responses()

    def fingerprint(self) -> str:
        """sha256 of all that decides the ids of a text: the vocabulary and its rules, the template, the special tokens.

        And the date, where the template asks for it.
        """
        parts = (self.file_sha256, self.template or "human", *map(str, sorted(self.special.items())))
        parts += (self.date.isoformat(),) if self.date else ()
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text, with no special token added around it."""
        return self.raw.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.raw.decode(list(ids), skip_special_tokens=True)

    def render(self, messages: Messages, generate: bool) -> str:
        """The chat template's text; with `generate` it ends where the next response begins."""
        try:
            return self.compiled.render(messages=messages, add_generation_prompt=generate, tools=None, documents=None,
                                        strftime_now=self.strftime_now, **self.special)
        except Exception as error:  # a template is a program: besides jinja's own errors it can raise nearly anything
            raise InputError(f"{self.where}: the chat template refuses this conversation ({error})") from None

    def strftime_now(self, form: str) -> str:
        """The clock that templates are given: it stands at the beginning of the date, so that ids do not change with the day."""
        return datetime.datetime.combine(self.date, datetime.time()).strftime(form)

    def around_responses(self) -> tuple[str, str]:
        """What separates a prompt from the response and belongs to the latter, and the special token that ends a turn.

        The first is the white space that the template puts there, and in the human form the one behind "Assistant:". A
        tokenizer that puts a word's space itself needs no other. The second should be the EOS, which the caller adds.
        """
        space, end = " ", self.eos
        if self.compiled is not None:
            asked = [{"role": "user", "content": "a"}]
            try:
                prompt, whole = self.render(asked, True), self.render([*asked, {"role": "assistant", "content": "b"}], False)
            except InputError:  # a template for conversations of another kind
                return "", self.eos
            rest = whole[len(prompt):] if whole.startswith(prompt) else ""
            space, _, after = rest.partition("b")
            space = "" if space.strip() else space
            tokens = [token.content for token in self.raw.get_added_tokens_decoder().values() if token.special]
            end = next((token for token in tokens if after.lstrip().startswith(token)), self.eos)
        return space.removeprefix(" ") if self.adds_space else space, end

    def segments(self, messages: Messages) -> list[tuple[str, bool]]:
        """A conversation as pieces of text, each with whether it is a response: prompt, response, prompt, response...

        A conversation that ends with a user's message ends with a prompt. Every response is followed by eos_id, which
        the caller adds; the prompt after it leaves the template's own out.
        """
        return self.human_segments(messages) if self.compiled is None else self.template_segments(messages)

    def human_segments(self, messages: Messages) -> list[tuple[str, bool]]:
        """The paper's form. The prompt ends at "Assistant:"; the space that separates belongs to the response."""
        pieces, prompt = [], ""
        for message in messages:
            if message["role"] == "assistant":
                pieces += [(prompt + "Assistant:", False), (self.space + message["content"], True)]
                prompt = "\n"
            else:
                prompt += ("Human: " if message["role"] == "user" else "") + message["content"] + "\n"
        return pieces if messages[-1]["role"] == "assistant" else [*pieces, (prompt + "Assistant:", False)]

    def template_segments(self, messages: Messages) -> list[tuple[str, bool]]:
        """The chat template's form: what it renders up to each response, less what was there before."""
        pieces, before, response = [], "", ""
        for turn in [k for k, message in enumerate(messages) if message["role"] == "assistant"] + [len(messages)]:
            if turn == len(messages) and messages[-1]["role"] == "assistant":
                break
            text = self.render(messages[:turn], generate=True)
            rest = text[len(before):].lstrip() if pieces else text
            if not text.startswith(before) or not rest.startswith(response.strip()):
                raise InputError(f"{self.where}: the chat template rewrites earlier turns once there are {turn} messages (it "
                                 "moves the system message, or leaves out a part of an earlier response), so this row cannot "
                                 "be cut into prompts and responses: put the system message into the first user's text and "
                                 "leave thinking out, or give one row a turn")
            rest = rest[len(response.strip()):]
            if pieces and rest.lstrip().startswith(self.turn_end):  # the caller adds the response's EOS itself
                rest = rest.lstrip()[len(self.turn_end):]
            pieces.append((rest, False))
            if turn < len(messages):
                before, response = text, messages[turn]["content"]
                pieces.append(((self.space if response == response.lstrip() else "") + response, True))
        return pieces

    def leading_ids(self) -> list[int]:
        """What goes before the first segment: the BOS of the tokenizer's post-processor, unless a template writes it."""
        if self.compiled is not None:
            return []
        return (ids := self.raw.encode("a").ids)[: ids.index(self.encode("a")[0])]

    def encode_segments(self, rows: list[list[tuple[str, bool]]]) -> list[list[tuple[list[int], Callable[[], Spans]]]]:
        """Ids of each piece of several conversations, and a function that gives its tokens' characters, [start, end) each.

        With tokenizers that put a word's space themselves, what stands before a text matters: a prompt after a response is
        encoded behind the EOS before it, and a response after a newline behind a newline. All rows go to the tokenizer's
        threads together.
        """
        behind = []  # what each piece is encoded behind: a text, and its ids
        for row in rows:
            for k, (_, is_response) in enumerate(row):
                after_newline = self.adds_space and is_response and k and row[k - 1][0].endswith("\n")
                behind.append(("\n", self.newline) if after_newline else (self.eos, [self.eos_id]) if k and not is_response
                              else ("", []))
        pieces = [text for row in rows for text, _ in row]
        encodings = self.raw.encode_batch([lead + text for (lead, _), text in zip(behind, pieces)], add_special_tokens=False)
        encoded = iter([self.cut_off(*piece) for piece in zip(encodings, behind, pieces)])
        return [[next(encoded) for _ in row] for row in rows]

    def cut_off(self, encoding: Encoding, behind: tuple[str, list[int]], text: str) -> tuple[list[int], Callable[[], Spans]]:
        """A piece's ids and spans from its encoding behind another text, or from its own where the two have merged."""
        (lead, ids), found = behind, encoding.ids
        start = found.index(ids[-1]) + 1 if ids and ids[-1] in found else len(ids)
        if found[start - len(ids) : start] != ids:
            encoding, lead, start = self.raw.encode(text, add_special_tokens=False), "", 0
        found = encoding.ids
        return found[start:], lambda: [(a - len(lead), b - len(lead)) for a, b in encoding.offsets[start:]]

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the assistant's next response begins."""
        ids, segments = self.leading_ids(), self.segments(messages)
        for (_, is_response), (piece, _) in zip(segments, self.encode_segments([segments])[0]):
            ids += piece + [self.eos_id] * is_response
        return ids


def special_tokens(folder: Path, config: dict) -> dict[str, str]:
    """The special tokens by name, as transformers hands them to a template.

    From tokenizer_config.json, a text or an object with `content` each, with those named in extra_special_tokens. Where that
    is of the old kind (without added_tokens_decoder), special_tokens_map.json has the last word, and else none, except for
    an EOS that is named nowhere else: without one nothing works.
    """
    file = folder / "special_tokens_map.json"
    table = read_json(file) if file.exists() else {}
    table = {"eos_token": table.get("eos_token"), **config} if "added_tokens_decoder" in config else {**config, **table}
    named = {key: value for key, value in table.items() if key.endswith("_token")}
    extra = table.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def chat_template(folder: Path, config: dict) -> str | None:
    """The source of the checkpoint's chat template, None where it has none.

    In transformers' order: chat_template.jinja with additional_chat_templates/ beside it; tokenizer_config.json, one text
    or several with names; last the chat_template.json of older processors. Of several, the one named "default".
    """
    file, legacy = folder / "chat_template.jinja", folder / "chat_template.json"
    found = {"default": read_text(file)} if file.exists() else {}
    found |= {file.stem: read_text(file) for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    found = found or config.get("chat_template") or (read_json(legacy).get("chat_template") if legacy.exists() else None)
    try:
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
        if isinstance(found, dict) and found and "default" not in found:
            raise InputError(f"{folder}: of the chat templates {', '.join(sorted(found))} none is named default: put the one to "
                             "use into chat_template.jinja, or use --template human")
        source = found.get("default") if isinstance(found, dict) else found
    except (KeyError, TypeError):
        source = False
    if source is not None and not isinstance(source, str):
        raise InputError(f"{folder}: the chat template is not a text, or a list of texts with names")
    return source or None


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what an assistant says; the text in it is written as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def sandbox() -> ImmutableSandboxedEnvironment:
    """Where chat templates are compiled and rendered, with what transformers gives them there."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=[GenerationTag, "jinja2.ext.loopcontrols"])
    made.globals["raise_exception"] = raise_exception
    made.filters["tojson"] = tojson  # jinja's own writes <, > and & as escapes for HTML
    return made


def compile_template(source: str, where: str) -> jinja2.Template:
    """A chat template, ready to render in a sandbox: it comes with the checkpoint, from whoever made that."""
    try:
        return sandbox().from_string(source)
    except jinja2.TemplateError as error:
        raise InputError(f"{where}: the chat template is not valid jinja ({error})") from None


def asks_for_the_date(source: str) -> bool:
    """Does a template mention the clock?"""
    return "strftime_now" in jinja2.meta.find_undeclared_variables(sandbox().parse(source))


def load_tokenizer(path: str | Path, template: str | None = None, date: str | None = None,
                   revision: str | None = None) -> Tokenizer:
    """Read a checkpoint folder's (or hub id's) tokenizer.

    template: None for the checkpoint's own chat template where it has one, else the human form; "human" for the
    human form in any case; "chat" insists on a chat template. date: YYYY-MM-DD, what a template is told that asks for
    the day (default: today). revision: a hub id's branch, tag or commit.
    """
    folder = resolve(path, revision, weights=False)
    if template not in (None, "human", "chat"):
        raise InputError(f"the template {template!r} is unknown: choose human or chat")
    try:
        day = datetime.date.today() if date is None else datetime.datetime.strptime(date, "%Y-%m-%d").date()
    except ValueError:
        raise InputError(f"the date {date!r} is not one of the form YYYY-MM-DD") from None
    file = folder / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{file}: there is no such file; transformers writes it from a slow tokenizer's files: "
                         "AutoTokenizer.from_pretrained(...).save_pretrained(...)")
    config = read_json(folder / "tokenizer_config.json")
    try:
        raw = RawTokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{file}: cannot be read as a tokenizer ({error})") from None
    raw.no_truncation()
    raw.no_padding()
    source = None if template == "human" else chat_template(folder, config)
    if template == "chat" and source is None:
        raise InputError(f"{folder}: the checkpoint has no chat template; use --template human")
    return Tokenizer(raw, file_hash(file), special_tokens(folder, config), source, str(folder), day)
