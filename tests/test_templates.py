"""Text becomes the ids that transformers makes of it: plain, in chat templates, in the human form.

Golden files hold transformers' ids. tests/templates/ holds what else is tried, a line each: where a
template is found (places.jsonl), which special tokens it is given (special_tokens.jsonl), what it
renders (rendered.jsonl), templates that fail (failing.txt), conversations that cannot be cut
(refused.jsonl). What is refused of a tokenizer stands in broken_tokenizers.jsonl.
"""

import hashlib
import json
import shutil

import pytest
from agreement import GOLDENS, REAL
from conftest import ROOT, edit_json, fails, read_jsonl
from helpers import each_line, spoil, talk

from model import load_tokenizer
from model.io import read_json
from toss.rows import read_rows
from toss.tokens import tokenise

CONFIG = "tokenizer_config.json"
JINJA = "chat_template.jinja"
TEMPLATES = ROOT / "tests/templates"
DATED = (TEMPLATES / "dated.jinja").read_text()


def golden(name):
    return read_json(GOLDENS / f"{name}/golden.json")


@pytest.fixture
def folder(tmp_path):
    """A copy of the ChatML tokenizer that a test may change."""
    return shutil.copytree(GOLDENS / "tokenizer-chatml", tmp_path / "tokenizer")


def with_template(folder, source, **options):
    (folder / JINJA).write_text(source)
    return load_tokenizer(folder, **options)


def prompt_of(tokenizer, text):
    """The prompt of a message as a text."""
    return tokenizer.segments(talk(text))[0][0]


# Ids


@pytest.mark.parametrize("name", ["chatml", "bos", "metaspace"])
def test_plain_text_and_the_human_form_give_transformers_ids(name):
    tokenizer = load_tokenizer(GOLDENS / f"tokenizer-{name}", template="human")
    expected = golden(f"tokenizer-{name}")
    assert tokenizer.eos_id == expected["eos_id"]
    for case in expected["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
    for case in expected["human"]:
        prompt, (response, _) = tokenizer.segments(talk(case["prompt"], case["response"]))
        assert tokenizer.prompt_ids(talk(case["prompt"])) == case["ids"]  # with a BOS once
        # The first token of a response is the whole text's.
        assert case["ids"] + tokenizer.encode(response) == case["whole"]


def test_the_human_form_is_used_where_there_is_no_chat_template(folder):
    expected = load_tokenizer(folder, "human").prompt_ids(talk("Hi"))
    (folder / JINJA).unlink()
    without = load_tokenizer(folder)
    assert without.prompt_ids(talk("Hi")) == expected == without.encode("Human: Hi\nAssistant:")
    fails("no chat template", load_tokenizer, folder, template="chat")


def text_of(tokenizer, ids):
    """The text of ids with special tokens, but without blanks, some of which are unknown."""
    text = tokenizer.raw.decode(ids, skip_special_tokens=False)
    return "".join(text.replace("<unk>", "").split())


def same_prompts(expected, tokenizer, messages):
    """True if the ids are transformers'. Otherwise only blanks differ, which its template trims."""
    ids = tokenizer.prompt_ids(messages)
    if isinstance(expected, str):  # of a long prompt
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest() == expected
    assert text_of(tokenizer, ids) == text_of(tokenizer, expected)
    first, _ = tokenizer.encode_segments([tokenizer.segments(messages)])[0][0]
    assert ids[: len(first)] == expected[: len(first)]  # the first prompt is, to the id
    return ids == expected


@pytest.mark.parametrize(("name", "equal"), [("chatml", 9), ("bos", 8), ("metaspace", 3)])
def test_chat_prompts_are_those_of_apply_chat_template(name, equal):
    tokenizer = load_tokenizer(GOLDENS / f"tokenizer-{name}")
    cases = golden(f"tokenizer-{name}")["chat"]
    assert sum(same_prompts(case["ids"], tokenizer, case["messages"]) for case in cases) == equal
    assert tokenizer.leading_ids() == []  # a template writes the BOS itself


def family(folder, name, tokenizer):
    """A tokenizer with a family's template and special tokens."""
    shutil.copyfile(GOLDENS / f"templates/{tokenizer}.json", folder / "tokenizer.json")
    shutil.copyfile(GOLDENS / f"templates/{name}.jinja", folder / JINJA)
    (folder / CONFIG).write_text(json.dumps(golden("templates")["special"][name]))
    return load_tokenizer(folder)


@pytest.mark.parametrize("tokenizer", ["byte-level", "metaspace"])
@pytest.mark.parametrize("name", ["llama-2", "llama-3", "chatml", "mistral"])
def test_prompts_of_the_families_are_those_of_apply_chat_template(tmp_path, name, tokenizer):
    ours = family(tmp_path, name, tokenizer)
    table = golden("templates")
    different = []
    tried = []
    for case in table["prompts"]:
        if case["family"] != name or case["tokenizer"] != tokenizer:
            continue
        tried.append(case["case"])
        messages = table["messages"][case["case"]]
        for message in messages:
            message["content"] *= message.pop("times", 1)
        if name == "mistral" and case["case"] == "system and turns":
            fails("once there are 4 messages.*system message", ours.prompt_ids, messages)
        elif not same_prompts(case["ids"], ours, messages):
            different.append(case["case"])
    assert tried == [*table["messages"]] and len(tried) == 13
    # Llama-2's template puts a space before the EOS of a response.
    assert different == (["turns", "system and turns"] if name == "llama-2" else [])


# Conversations of several turns


CUT = [
    ("mistral-1.jinja", [" Yes?", " No. "]),  # the template's space belongs to the response
    ("thinking.jinja", ["Yes?", " No. "]),
    (None, [" Yes?", "  No. "]),  # the human form
]


@pytest.mark.parametrize(("file", "expected"), CUT)
def test_rows_of_several_turns_are_cut_into_segments(file, expected, folder):
    tokenizer = load_tokenizer(folder, "human")
    if file:
        tokenizer = with_template(folder, (TEMPLATES / file).read_text())
    messages = talk("Hi.", "Yes?", "Bake.", " No. ", "Why?", system="Be kind.")
    segments = tokenizer.segments(messages)
    assert [text for text, is_response in segments if is_response] == expected
    for turn in (2, 4):  # a longer conversation goes on from a shorter one
        assert tokenizer.segments(messages[:turn]) == segments[: turn - 1]
    whole = tokenizer.chat.render(messages, generate=True)
    assert text_of(tokenizer, tokenizer.prompt_ids(messages)) == "".join(whole.split())


def test_a_turns_end_that_is_not_the_eos_is_taken_out(tmp_path):
    tokenizer = family(tmp_path, "chatml", "byte-level")
    segments = tokenizer.segments(talk("a", "b", "c"))
    edit_json(tmp_path / CONFIG, eos_token="</s>")
    other = load_tokenizer(tmp_path)
    assert (other.eos, other.turn_end) == ("</s>", "<|im_end|>")
    assert other.segments(talk("a", "b", "c")) == segments  # whose caller adds the EOS


LEAVES_OUT = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"


def test_messages_that_a_template_leaves_out_are_counted_over_the_whole_file(folder):
    tokenizer = with_template(folder, LEAVES_OUT)
    whole = [*talk("Why?"), *talk("Why?", " b ", "c", "d")]  # said twice, and there twice
    incomplete = talk("a", "b", system="S")
    rows = read_rows([{"messages": messages} for messages in (whole, incomplete, incomplete)])
    fails(r"row 1 .*leaves a message's text .*first of 2 rows", tokenise, rows, tokenizer, 99)
    assert tokenise(rows[:1], tokenizer, 99).rows == 1


# What is found in a checkpoint


@each_line("templates/places.jsonl")
def test_a_template_is_found_where_transformers_finds_it(case, folder):
    (folder / JINJA).unlink()
    (folder / "additional_chat_templates").mkdir()
    for name, content in case["files"].items():
        if name == CONFIG:
            edit_json(folder / name, **content)
        else:
            (folder / name).write_text(content)
    if "error" in case:
        fails(case["error"], load_tokenizer, folder)
    else:
        assert load_tokenizer(folder).template == case["template"]


@each_line("templates/special_tokens.jsonl")
def test_special_tokens_are_found_where_transformers_finds_them(case, folder):
    edit_json(folder / CONFIG, **case["config"])
    if case["map"]:
        (folder / "special_tokens_map.json").write_text(json.dumps(case["map"]))
    names = "{{ bos_token }}-{{ pad_token }}-{{ image_token }}-{{ eos_token }}"
    assert prompt_of(with_template(folder, names), "a") == case["bos-pad-image-eos"]


def test_truncation_and_padding_are_ignored(folder):
    raw = load_tokenizer(folder).raw
    expected = raw.encode("The quick brown fox").ids
    raw.enable_truncation(2)
    raw.enable_padding(length=64)
    raw.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("The quick brown fox") == expected


def test_a_special_token_that_is_a_mere_word_in_tokenizer_json_is_one_token(folder):
    vocabulary = load_tokenizer(folder).raw.get_vocab()
    word = max(vocabulary, key=vocabulary.get)
    edit_json(folder / CONFIG, eos_token=word)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(f"Hi{word}!")[-2] == tokenizer.eos_id == vocabulary[word]


def test_the_fingerprint_covers_all_that_decides_a_texts_ids(folder):
    different = [load_tokenizer(folder), load_tokenizer(folder, "human")]
    edit_json(folder / CONFIG, bos_token="<|im_start|>")
    different.append(load_tokenizer(folder))
    for date in ("2025-03-09", "2025-03-10"):
        different.append(with_template(folder, DATED, date=date))
    for brief in (True, False):
        different.append(with_template(folder, "{{ brief }}", template_kwargs={"brief": brief}))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    for date in ("2025-03-09", "2025-03-10"):  # for which this template does not ask
        last = load_tokenizer(folder, date=date, template_kwargs={"brief": False})
    fingerprints = {tokenizer.fingerprint() for tokenizer in [*different, last]}
    assert len(fingerprints) == 8


# Rendering


@each_line("templates/rendered.jsonl")
def test_templates_find_what_transformers_gives_them(folder, case):
    tokenizer = with_template(folder, case["template"], date="2025-03-09")
    assert prompt_of(tokenizer, "a") == case["prompt of the message a"]


@pytest.mark.parametrize("source", (TEMPLATES / "failing.txt").read_text().splitlines())
def test_a_template_that_fails_or_leaves_its_sandbox_is_an_input_error(folder, source):
    messages = talk("a")
    fails("template", with_template(folder, source).prompt_ids, messages)
    assert messages == talk("a")


# What is refused


@each_line("broken_tokenizers.jsonl")
def test_a_broken_tokenizer_is_refused_by_name(folder, case):
    spoil(folder, case)

    def load_and_encode():
        load_tokenizer(folder).prompt_ids(talk("a"))

    fails(case["error"], load_and_encode)


@each_line("templates/refused.jsonl")
def test_a_conversation_that_a_template_cannot_cut_is_refused(folder, case):
    source = (TEMPLATES / case["template"]).read_text()
    tokenizer = with_template(folder, source, template_kwargs=case.get("options"))
    fails(case["error"], tokenizer.prompt_ids, case["messages"])


# Commands


@pytest.mark.skipif(not REAL, reason="TOSS_REAL_CHECKPOINT names no checkpoint folder")
def test_a_real_checkpoints_prompts_are_transformers():
    """On 300 of the project's rows of one turn, and on those joined into rows of three turns."""
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(REAL)
    theirs = transformers.AutoTokenizer.from_pretrained(REAL)
    texts = []
    for row in read_jsonl(ROOT / "data/rows/custom.jsonl")[:300]:
        texts += [row["prompt"], row["response"]]
    conversations = [talk(prompt) for prompt in texts[::2]]
    conversations += [talk(*texts[i : i + 5]) for i in range(0, 600, 6)]
    settings = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
    for messages in conversations:
        assert ours.prompt_ids(messages) == theirs.apply_chat_template(messages, **settings)
