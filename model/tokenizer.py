"""Text to token ids: the checkpoint's `tokenizer.json`, and its chat template (or the paper's human form).

A conversation becomes segments that alternate between prompt and response. Each is encoded by itself and the ids are
joined, so the first response token never merges with the prompt's last space, and training, scoring and generation
see the same prompt ids.
"""

import hashlib
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as RawTokenizer

from model.checkpoint import resolve
from model.errors import InputError
from model.files import file_hash, read_json, read_text

Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}, ...]


class Tokenizer:
    """What the rest of the project needs of a tokenizer; made by load_tokenizer.

    template: the jinja source of the chat template, or None for the human form, `Human: {}\\nAssistant:`.
    """

    def __init__(self, raw: RawTokenizer, file_sha256: str, config: dict, template: str | None, where: str):
        self.raw, self.file_sha256, self.template, self.where = raw, file_sha256, template, where
        self.special = {key: text for key, value in config.items()
                        if key.endswith("_token") and isinstance(text := token_text(value), str)}
        if "eos_token" not in self.special:
            raise InputError(f"{where}: tokenizer_config.json names no eos_token")
        self.eos = self.special["eos_token"]
        self.eos_id = raw.token_to_id(self.eos)
        if self.eos_id is None:
            raise InputError(f"{where}: the eos_token {self.eos!r} is not in tokenizer.json")
        # Metaspace tokenizers (Llama-2) put the word's space themselves; byte-level ones take it from the text.
        start = raw.encode("a", add_special_tokens=False).tokens
        self.adds_space = bool(start) and start[0].startswith("▁")
        self.compiled = None if template is None else compile_template(template, where)

    def fingerprint(self) -> str:
        """sha256 of all that decides the ids of a text: the vocabulary and its rules, the template, the special tokens."""
        parts = (self.file_sha256, self.template or "human", *map(str, sorted(self.special.items())))
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
                                        **self.special)
        except Exception as error:  # a template is a program: besides jinja's own errors it can raise nearly anything
            raise InputError(f"{self.where}: the chat template refuses this conversation ({error})") from None

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
                space = "" if self.adds_space else " "
                pieces += [(prompt + "Assistant:", False), (space + message["content"], True)]
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
                raise InputError(f"{self.where}: the chat template rewrites earlier turns, so a row of several turns "
                                 "cannot be cut into prompts and responses; give one row a turn")
            rest = rest[len(response.strip()):]
            if pieces and rest.lstrip().startswith(self.eos):  # the caller adds the response's EOS itself
                rest = rest.lstrip()[len(self.eos):]
            pieces.append((rest, False))
            if turn < len(messages):
                before, response = text, messages[turn]["content"]
                pieces.append((response, True))
        return pieces

    def leading_ids(self) -> list[int]:
        """What goes before the first segment: the BOS of the tokenizer's post-processor, unless a template writes it."""
        if self.compiled is not None:
            return []
        return (ids := self.raw.encode("a").ids)[: ids.index(self.encode("a")[0])]

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the assistant's next response begins."""
        ids = self.leading_ids()
        for text, is_response in self.segments(messages):
            ids += self.encode(text) + [self.eos_id] * is_response
        return ids


def token_text(value: object) -> object:
    """A special token of tokenizer_config.json, which is a string or an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def compile_template(source: str, where: str) -> jinja2.Template:
    """A chat template, ready to render in a sandbox: it comes with the checkpoint, from whoever made that."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise InputError(f"{where}: the chat template is not valid jinja ({error})") from None


def load_tokenizer(path: str | Path, template: str | None = None) -> Tokenizer:
    """Read a checkpoint folder's (or hub id's) tokenizer.

    template: None for the checkpoint's own chat template where it has one, else the human form; "human" for the
    human form in any case; "chat" insists on a chat template.
    """
    folder = resolve(path)
    if template not in (None, "human", "chat"):
        raise InputError(f"the template {template!r} is unknown: choose human or chat")
    config = read_json(folder / "tokenizer_config.json")
    file = folder / "tokenizer.json"
    try:
        raw = RawTokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{file}: cannot be read as a tokenizer ({error})") from None
    raw.no_truncation()
    raw.no_padding()
    jinja_file = folder / "chat_template.jinja"
    source = read_text(jinja_file) if jinja_file.exists() else config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((t["template"] for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if source is not None and not isinstance(source, str):
        raise InputError(f"{folder}: the chat template is not a text")
    source = source or None
    if template == "chat" and source is None:
        raise InputError(f"{folder}: the checkpoint has no chat template; use --template human")
    return Tokenizer(raw, file_hash(file), config, None if template == "human" else source, str(folder))
