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

Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}, ...]
Segment = tuple[str, bool]  # text, and whether it is a response
LEFT_OUT = "the chat template leaves a message's text out of the prompt"
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
    # The first place that has any: files, the tokenizer's configuration, the processor's.
    templates = {}
    main = folder / "chat_template.jinja"
    for file in [main, *folder.glob("additional_chat_templates/*.jinja")]:
        if file.exists():
            name = "default" if file == main else file.stem
            templates[name] = read_text(file)
    if not templates:
        templates = config.get("chat_template")
    processor = folder / "chat_template.json"
    if not templates and processor.exists():
        templates = read_json(processor).get("chat_template")

    # One text, or several by name.
    message = f"{folder}: the chat template is not a text, or a list of named texts"
    with as_input_error(message, KeyError, TypeError):
        if isinstance(templates, list):
            templates = {entry["name"]: entry["template"] for entry in templates}
        if not isinstance(templates, dict):
            source = templates
        elif not templates or "default" in templates:
            source = templates.get("default")
        else:
            raise InputError(
                f"{folder}: the chat templates {', '.join(sorted(templates))} include no default: "
                "put the one to use into chat_template.jinja, or use --template human"
            )
        if source and not isinstance(source, str):
            raise TypeError(f"it is a {type(source).__name__}")
    return source or None


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` around what an assistant says; changes nothing."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def raise_exception(message: str) -> None:
    """For templates, to refuse a conversation."""
    raise jinja2.TemplateError(message)


def sandbox() -> ImmutableSandboxedEnvironment:
    """An environment with transformers' settings, extensions and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = raise_exception
    # Jinja's own tojson writes <, > and & as HTML escapes.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment


class Template:
    """A chat template, compiled in a sandbox, since it is a program from the checkpoint's maker.

    special: the special tokens by name. date: the day for a template that asks for the date;
    None afterwards if it does not ask. where: names the checkpoint in errors. options: variables
    that the template has besides, such as enable_thinking.
    """

    def __init__(
        self, source: str, special: dict[str, str], date: datetime.date, where: str, options: dict
    ):
        environment = sandbox()
        message = f"{where}: the chat template is not valid jinja"
        with as_input_error(message):
            source.encode()  # fails on an unpaired surrogate
            self.compiled = environment.from_string(source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        free = variables - {"messages", "add_generation_prompt", "strftime_now", *special}
        unknown = options.keys() - free
        if unknown:
            known = ", ".join(sorted(free)) or "none"
            problem = f"the chat template has no {min(unknown)} to set (it has {known})"
            raise InputError(f"{where}: {problem}")
        self.where = where
        self.variables = {**options, **special}
        self.date = date if "strftime_now" in variables else None
        # The clock of the templates stands still, so that ids do not change during the day.
        self.clock = datetime.datetime.combine(date, datetime.time())

    def render(self, messages: Messages, generate: bool) -> str:
        """The conversation's text; with `generate` it ends where the next response begins."""
        variables = {
            "tools": None,
            "documents": None,
            **self.variables,
            "messages": messages,
            "add_generation_prompt": generate,
            "strftime_now": self.clock.strftime,
        }
        message = f"{self.where}: the chat template refuses this conversation"
        with as_input_error(message):
            text = self.compiled.render(variables)
            text.encode()  # fails on an unpaired surrogate
        return text


def left_out(messages: Messages, segments: list[Segment]) -> bool:
    """True if the text of a message, outer blanks aside, is not in the prompt that it belongs to.

    segments: (text, is_response) in turn; a response is its own. A system message may stand
    anywhere in its prompt, all else in order.
    """
    prompts = [text for text, is_response in segments if not is_response]
    turn = 0
    position = 0  # in the turn's prompt, behind the last user message
    for message in messages:
        if turn == len(prompts):
            break  # there may be fewer segments than messages
        text = message["content"].strip()
        if message["role"] == "assistant":
            turn += 1
            position = 0
        elif message["role"] == "user":
            start = prompts[turn].find(text, position)
            if start < 0:
                return True
            position = start + len(text)
        elif text not in prompts[turn]:
            return True
    return False
