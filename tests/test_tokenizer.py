"""Text to ids as transformers does it: chat templates, the human form, BOS once, and a template kept in its sandbox."""

import json
import shutil
from pathlib import Path

import pytest

from model import InputError, load_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
TOKENIZERS = ["chatml", "bos", "metaspace"]


def golden(name):
    return json.loads((GOLDENS / f"tokenizer-{name}/golden.json").read_text(encoding="utf-8"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def folder(tmp_path):
    """A copy of the ChatML tokenizer that a test may change."""
    return Path(shutil.copytree(GOLDENS / "tokenizer-chatml", tmp_path / "tokenizer"))


def reconfigure(folder, file="tokenizer_config.json", **fields):
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text(encoding="utf-8")) | fields), encoding="utf-8")


def with_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_text_gives_transformers_ids_and_comes_back(name):
    tokenizer, want = load_tokenizer(GOLDENS / f"tokenizer-{name}"), golden(name)
    assert tokenizer.eos_id == want["eos_id"]
    for case in want["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
    if name != "metaspace":  # its alphabet lacks some of these letters
        for case in want["encode"]:
            if "<" not in case["text"]:
                assert tokenizer.decode(case["ids"]) == case["text"]
    assert tokenizer.decode([*tokenizer.encode("Yes, I can."), tokenizer.eos_id]) == "Yes, I can."


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in TOKENIZERS for case in golden(name)["chat"]],
                         ids=lambda value: value if isinstance(value, str) else value["name"])  # fmt: skip
def test_chat_prompts_are_those_of_apply_chat_template(name, case):
    tokenizer = load_tokenizer(GOLDENS / f"tokenizer-{name}")
    if name == "metaspace":  # this template puts a space before the eos of a response; no response of a row has one
        ids, space = case["ids"], tokenizer.raw.token_to_id("▁")
        case = {**case, "ids": [t for t, after in zip(ids, [*ids[1:], None]) if (t, after) != (space, tokenizer.eos_id)]}
    if case["name"] == "spaces" and name != "chatml":
        # These templates trim every message. An earlier response stays as it was given, as training and scoring see it.
        first, response = tokenizer.prompt_ids(case["messages"][:1]), tokenizer.encode(case["messages"][1]["content"])
        assert case["ids"][: len(first)] == first
        rest = case["ids"][case["ids"].index(tokenizer.eos_id, len(first)) :]
        case = {**case, "ids": first + response + rest}
    assert tokenizer.prompt_ids(case["messages"]) == case["ids"]


def test_a_template_that_writes_the_bos_gets_no_second_one():
    tokenizer, want = load_tokenizer(GOLDENS / "tokenizer-bos"), golden("bos")
    assert tokenizer.prompt_ids([user("Hi")])[0] == want["bos_id"]
    assert tokenizer.prompt_ids([user("Hi")]).count(want["bos_id"]) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_human_form_is_the_whole_text_cut_before_the_response(name):
    """With a BOS once where the tokenizer adds one; and the response's first token is the one of the text as a whole."""
    tokenizer = load_tokenizer(GOLDENS / f"tokenizer-{name}", template="human")
    for case in golden(name)["human"]:
        prompt = tokenizer.prompt_ids([user(case["prompt"])])
        assert prompt == case["ids"]
        (text, is_response) = tokenizer.segments([user(case["prompt"]), assistant(case["response"])])[1]
        assert is_response and prompt + tokenizer.encode(text) == case["whole"]


def test_the_human_form_is_used_where_there_is_no_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    forced, none = load_tokenizer(GOLDENS / "tokenizer-chatml", template="human"), load_tokenizer(folder)
    assert none.prompt_ids([user("Hi")]) == forced.prompt_ids([user("Hi")]) == none.encode("Human: Hi\nAssistant:")
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(folder, template="chat")
    with pytest.raises(InputError, match="alpaca"):
        load_tokenizer(folder, template="alpaca")


@pytest.mark.parametrize("template", ["human", "chat"])
@pytest.mark.parametrize("name", ["chatml", "bos"])
def test_a_longer_conversation_goes_on_from_a_shorter_one(name, template):
    """prompt + response + eos is what the next turn's prompt begins with, in both forms."""
    tokenizer = load_tokenizer(GOLDENS / f"tokenizer-{name}", template)
    messages = [user("Can you help?"), assistant("Yes."), user("Why?"), assistant("No."), user("And?")]
    pieces = tokenizer.segments(messages)
    assert [is_response for _, is_response in pieces] == [False, True, False, True, False]
    for turn in (1, 3):
        before, after = tokenizer.prompt_ids(messages[:turn]), tokenizer.prompt_ids(messages[: turn + 2])
        assert after[: len(before)] == before
        response = [*tokenizer.encode(pieces[turn][0]), tokenizer.eos_id]
        assert after[len(before) : len(before) + len(response)] == response
        assert after.count(tokenizer.eos_id) == tokenizer.prompt_ids(messages[: turn + 2]).count(tokenizer.eos_id)
    assert tokenizer.segments(messages[:4]) == pieces[:4]


def test_the_eos_that_a_template_writes_after_a_response_is_not_doubled():
    tokenizer = load_tokenizer(GOLDENS / "tokenizer-chatml")
    text = [tokenizer.raw.id_to_token(i) for i in tokenizer.prompt_ids([user("a"), assistant("b"), user("c")])]
    assert text.count("<|im_end|>") == 4  # system, user, assistant, user


@pytest.mark.parametrize("place", ["inline", "named", "file over inline"])
def test_a_chat_template_is_found_wherever_checkpoints_keep_it(folder, place):
    want = load_tokenizer(folder).prompt_ids([user("Hi")])
    source = (folder / "chat_template.jinja").read_text()
    if place == "file over inline":
        reconfigure(folder, chat_template="not this one")
    else:
        (folder / "chat_template.jinja").unlink()
        named = [{"name": "tool_use", "template": "not this one"}, {"name": "default", "template": source}]
        reconfigure(folder, chat_template=source if place == "inline" else named)
    assert load_tokenizer(folder).prompt_ids([user("Hi")]) == want


def test_special_tokens_may_be_objects(folder):
    want = load_tokenizer(folder).eos_id
    reconfigure(folder, eos_token={"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False})
    assert load_tokenizer(folder).eos_id == want


def test_a_tokenizers_own_truncation_and_padding_are_ignored(folder):
    want = load_tokenizer(folder).encode("The quick brown fox")
    reconfigure(folder, "tokenizer.json",
                truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
                padding={"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                         "pad_token": "<s>"})  # fmt: skip
    assert load_tokenizer(folder).encode("The quick brown fox") == want


@pytest.mark.parametrize(("source", "text"), [
    ("{% if tools is none and documents is none %}none{% endif %}", "none"),  # transformers passes both as None
    ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "a"),
    ("{{ eos_token }}{{ missing_token }}", "<|im_end|>"),
    ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),  # trim_blocks and lstrip_blocks
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
])  # fmt: skip
def test_templates_find_what_transformers_gives_them(folder, source, text):
    tokenizer = with_template(folder, source)
    assert tokenizer.prompt_ids([user("a")]) == tokenizer.encode(text)


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).x.y }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.append(messages) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
    "{{ self.__init__.__globals__ }}",
    "{{ range(1000000000) | list }}",
    "{{ 1 // 0 }}",
    "{{ messages[0]['content'] + 1 }}",
    "{{ nothing.at.all }}",
    "{{ raise_exception('not this way') }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
])  # fmt: skip
def test_a_template_that_fails_or_leaves_its_sandbox_is_an_input_error(folder, source):
    tokenizer = with_template(folder, source)
    messages = [user("a")]
    with pytest.raises(InputError, match="template"):
        tokenizer.prompt_ids(messages)
    assert messages == [user("a")]


def test_a_template_that_is_not_jinja_is_named(folder):
    with pytest.raises(InputError, match="jinja"):
        with_template(folder, "{% for %}")


def test_what_the_template_refuses_is_passed_on_in_its_words():
    with pytest.raises(InputError, match="unknown role: robot"):
        load_tokenizer(GOLDENS / "tokenizer-chatml").prompt_ids([{"role": "robot", "content": "a"}])


def test_a_template_that_rewrites_earlier_turns_is_refused_for_rows_of_several_turns(folder):
    tokenizer = with_template(folder, "{{ messages | length }}{{ messages[-1].content }}{{ eos_token }}")
    assert tokenizer.prompt_ids([user("a")])
    with pytest.raises(InputError, match="turn"):
        tokenizer.segments([user("a"), assistant("b"), user("c"), assistant("d")])


@pytest.mark.parametrize(("fields", "words"), [(dict(eos_token=None), "eos_token"), (dict(eos_token="<nowhere>"), "<nowhere>")])
def test_an_eos_that_is_absent_or_unknown_is_named(folder, fields, words):
    reconfigure(folder, **fields)
    with pytest.raises(InputError, match=words):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_an_absent_or_broken_file_is_named(folder, file):
    (folder / file).write_text("{")
    with pytest.raises(InputError, match=file):
        load_tokenizer(folder)
    (folder / file).unlink()
    with pytest.raises(InputError, match=file):
        load_tokenizer(folder)


def test_the_fingerprint_covers_vocabulary_template_and_special_tokens(folder):
    before = load_tokenizer(folder).fingerprint()
    assert before == load_tokenizer(GOLDENS / "tokenizer-chatml").fingerprint() != load_tokenizer(folder, "human").fingerprint()
    reconfigure(folder, bos_token="<|im_start|>")
    assert load_tokenizer(folder).fingerprint() != before
