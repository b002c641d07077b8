"""Chat templates: found in a checkpoint, compiled in a sandbox, rendered as transformers does."""

import datetime
import json
from functools import partial
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.io import InputError, as_input_error, read_json, read_text
from model.limits import limited

Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}, ...]
LEFT_OUT = "the chat template leaves a message's text out of the prompt"
MOST = 10**5  # characters that a template may add, besides nine times what a conversation has
# The paper's form as a template, for checkpoints without one. The prompt ends at "Assistant:"; the
# space after it belongs to the response.
HUMAN = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
    "{% else %}{{ ('Human: ' if m.role == 'user' else '') + m.content }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def find_template(folder: Path, config: dict) -> str | None:
    """The source of a checkpoint's chat template, None if it has none.

    In transformers' order: chat_template.jinja with additional_chat_templates/ beside it; the
    tokenizer_config.json, one text or several with names; then the chat_template.json of older
    processors. Of several, the one named "default".
    """
    main, legacy = folder / "chat_template.jinja", folder / "chat_template.json"
    files = [main, *sorted(folder.glob("additional_chat_templates/*.jinja"))]
    found = {"default" if f == main else f.stem: read_text(f) for f in files if f.exists()}
    found = found or config.get("chat_template")
    if not found and legacy.exists():
        found = read_json(legacy).get("chat_template")
    said = f"{folder}: the chat template is not a text, or a list of named texts"
    with as_input_error(said, KeyError, TypeError):
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
        if isinstance(found, dict) and found and "default" not in found:
            raise InputError(
                f"{folder}: the chat templates {', '.join(sorted(found))} include no default: put "
                "the one to use into chat_template.jinja, or use --template human"
            )
        source = found.get("default") if isinstance(found, dict) else found
        if not isinstance(source or "", str):
            raise TypeError(f"it is a {type(source).__name__}")
    return source or None


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` around what an assistant says; changes nothing."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Template:
    """A chat template, compiled in a sandbox, since it is a program from the checkpoint's maker.

    special: the special tokens by name. date: the day for a template that asks for the date;
    None afterwards if it does not ask. where: names the checkpoint in errors. more: variables that
    the template has besides, such as enable_thinking.
    """

    def __init__(
        self, source: str, special: dict[str, str], date: datetime.date, where: str, more: dict
    ):

        def raise_exception(message: str) -> None:  # for templates, to refuse a conversation
            raise jinja2.TemplateError(message)

        tags = [GenerationTag, "jinja2.ext.loopcontrols"]
        form = {"trim_blocks": True, "lstrip_blocks": True}  # as transformers has it
        environment = ImmutableSandboxedEnvironment(**form, extensions=tags)
        environment.globals["raise_exception"] = raise_exception
        # Jinja's own tojson writes <, > and & as HTML escapes.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        said = f"{where}: the chat template is not valid jinja"
        with limited(f"{where}: compiling the chat template", said=said):  # computes its constants
            source.encode()  # fails on half a character
            self.compiled = environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        if strange := more.keys() - names:
            had = ", ".join(sorted(names))
            raise InputError(f"{where}: the chat template has no {min(strange)} (it has {had})")
        self.given, self.where = {**more, **special}, where
        self.date = date if "strftime_now" in names else None
        # The clock of the templates stands still, so that ids do not change during the day.
        self.clock = datetime.datetime.combine(date, datetime.time())

    def render(self, messages: Messages, generate: bool) -> str:
        """The conversation's text; with `generate` it ends where the next response begins."""
        given = {**self.given, "tools": None, "documents": None, "messages": messages}
        given |= {"add_generation_prompt": generate, "strftime_now": self.clock.strftime}
        said = f"{self.where}: the chat template refuses this conversation"
        with limited(f"{self.where}: rendering the chat template", said=said):
            text = self.compiled.render(given)
            text.encode()  # fails on half a character
        if len(text) > MOST + 10 * sum(len(message["content"]) for message in messages):
            raise InputError(f"{self.where}: the template makes {len(text)} characters of this")
        return text


def left_out(messages: Messages, segments: list[tuple[str, bool]]) -> bool:
    """True if the text of a message, outer blanks aside, is not in the prompt that it belongs to.

    segments: (text, is_response) in turn; a response is its own. A system message may stand
    anywhere in its prompt, all else in order.
    """
    prompts = (text for text, is_response in segments if not is_response)
    prompt, place = next(prompts), 0
    for message in messages:
        text, is_user = message["content"].strip(), message["role"] == "user"
        if message["role"] == "assistant":
            prompt, place = next(prompts, None), 0
        elif prompt is not None:  # there may be fewer segments
            if (found := prompt.find(text, place * is_user)) < 0:
                return True
            place = found + len(text) if is_user else place
    return False
