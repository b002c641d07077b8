"""Text becomes the ids that transformers makes of it: plain, in chat templates, in the human form.

Golden files hold transformers' ids. tests/templates/ holds what else is tried, a line each: where a
template is found (places.jsonl), which special tokens it is given (special_tokens.jsonl), what it
renders (rendered.jsonl), templates that fail (failing.txt). What is refused of a tokenizer stands
in broken_tokenizers.jsonl.
"""

import datetime
import hashlib
import json
import shutil
from importlib import import_module
from importlib.util import find_spec

import pytest
from agreement import GOLDENS, REAL
from conftest import ROOT, edit_json, fails, read_jsonl, sources
from helpers import call, refused, set_fields, spoil, talk

from model import load_tokenizer
from model.io import read_json
from toss.rows import read_rows
from toss.tokens import tokenise

CONFIG = "tokenizer_config.json"
JINJA = "chat_template.jinja"
TEMPLATES = ROOT / "tests/templates"
# Mistral's first form, Llama-3.2's date and Qwen3's thinking, as far as they matter for the cuts.
MISTRAL_1 = (TEMPLATES / "mistral-1.jinja").read_text()
DATED = (TEMPLATES / "dated.jinja").read_text()
THINKING = (TEMPLATES / "thinking.jinja").read_text()


def golden(name):
    return read_json(GOLDENS / f"{name}/golden.json")


@pytest.fixture
def folder(tmp_path):
    """A copy of the ChatML tokenizer that a test may change."""
    return shutil.copytree(GOLDENS / "tokenizer-chatml", tmp_path / "tokenizer")


def with_template(folder, template, **options):
    (folder / JINJA).write_text(template)
    return load_tokenizer(folder, **options)


def prompt_of(tokenizer, *texts):
    """The text of a conversation's first prompt."""
    return tokenizer.segments(talk(*texts))[0][0]


# Ids


@pytest.mark.parametrize("name", ["chatml", "bos", "metaspace"])
def test_plain_text_gives_transformers_ids(name):
    tokenizer = load_tokenizer(GOLDENS / f"tokenizer-{name}")
    expected = golden(f"tokenizer-{name}")
    assert tokenizer.eos_id == expected["eos_id"]
    for case in expected["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        # Metaspace's alphabet lacks some letters; special tokens are left out of the text.
        if name != "metaspace" and "<" not in case["text"]:
            assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("name", ["chatml", "bos", "metaspace"])
def test_the_human_form_gives_transformers_ids_with_a_bos_once(name):
    tokenizer = load_tokenizer(GOLDENS / f"tokenizer-{name}", template="human")
    for case in golden(f"tokenizer-{name}")["human"]:
        messages = talk(case["prompt"], case["response"])
        assert tokenizer.prompt_ids(messages[:1]) == case["ids"]
        # The first token of a response is the whole text's.
        text, is_response = tokenizer.segments(messages)[1]
        assert is_response
        assert case["ids"] + tokenizer.encode(text) == case["whole"]


def test_the_human_form_is_used_where_there_is_no_chat_template(folder):
    expected = load_tokenizer(folder, "human").prompt_ids(talk("Hi"))
    (folder / JINJA).unlink()
    without = load_tokenizer(folder)
    assert without.template is None
    assert without.prompt_ids(talk("Hi")) == expected == without.encode("Human: Hi\nAssistant:")
    # Of several templates, none is the default.
    set_fields(folder / CONFIG, {"chat_template": [{"name": "rag", "template": "a"}]})
    assert load_tokenizer(folder, "human").prompt_ids(talk("Hi")) == expected


def test_in_the_human_form_a_responses_own_blanks_stand_behind_the_space(folder):
    tokenizer = load_tokenizer(folder, "human")
    assert tokenizer.segments(talk("a", " b"))[1] == ("  b", True)
    assert tokenizer.segments(talk("a", "\nb"))[1] == (" \nb", True)


@pytest.mark.parametrize(("name", "equal"), [("chatml", 9), ("bos", 8), ("metaspace", 3)])
def test_chat_prompts_are_those_of_apply_chat_template(name, equal):
    tokenizer = load_tokenizer(GOLDENS / f"tokenizer-{name}")
    cases = golden(f"tokenizer-{name}")["chat"]
    identical = [same_prompts(case["ids"], tokenizer, case["messages"]) for case in cases]
    assert sum(identical) == equal
    assert tokenizer.leading_ids() == []  # a template writes the BOS itself


def same_prompts(expected, tokenizer, messages):
    """True if the ids are transformers'. Otherwise its template changed an earlier response.

    Even then each prompt is transformers' own, and each response says the same and ends in one EOS.
    """
    if tokenizer.prompt_ids(messages) == expected:
        return True
    segments = tokenizer.segments(messages)
    place = 0
    for (text, is_response), (ids, _) in zip(segments, tokenizer.encode_segments([segments])[0]):
        if not is_response:
            end = place + len(ids)
            assert ids == expected[place:end]
            place = end
            continue
        end = expected.index(tokenizer.eos_id, place)
        theirs = expected[place:end]
        assert tokenizer.decode(theirs).strip() == tokenizer.decode(ids).strip()
        if text.lstrip() == text or text[:1] == tokenizer.space:  # else it may be trimmed
            assert ids[:1] == expected[place : place + 1], text
        place = end + 1
    assert place == len(expected)
    return False


FAMILIES = ["llama-2", "llama-3", "chatml", "mistral"]


def family(folder, name, tokenizer):
    """A tokenizer with a family's template and special tokens."""
    shutil.copyfile(GOLDENS / f"templates/{tokenizer}.json", folder / "tokenizer.json")
    shutil.copyfile(GOLDENS / f"templates/{name}.jinja", folder / JINJA)
    (folder / CONFIG).write_text(json.dumps(golden("templates")["special"][name]))
    return load_tokenizer(folder)


@pytest.mark.parametrize("tokenizer", ["byte-level", "metaspace"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_the_families_are_those_of_apply_chat_template(tmp_path, name, tokenizer):
    ours = family(tmp_path, name, tokenizer)
    table = golden("templates")
    count = 0
    for case in table["prompts"]:
        if case["family"] != name or case["tokenizer"] != tokenizer:
            continue
        count += 1
        messages = table["messages"][case["case"]]
        for message in messages:
            message["content"] *= message.pop("times", 1)
        expected = case["ids"]
        if name == "mistral" and case["case"] == "system and turns":
            fails("once there are 4 messages.*system message", ours.prompt_ids, messages)
        elif isinstance(expected, str):  # of a long prompt
            ids = json.dumps(ours.prompt_ids(messages)).encode()
            assert hashlib.sha256(ids).hexdigest() == expected
        else:
            several = any(message["role"] == "assistant" for message in messages)
            assert same_prompts(expected, ours, messages) or several
    assert count == len(table["messages"]) == 13


# Conversations of several turns


@pytest.mark.parametrize("template", ["human", "chat"])
@pytest.mark.parametrize("name", ["chatml", "bos"])
def test_a_longer_conversation_goes_on_from_a_shorter_one(name, template):
    """prompt + response + EOS is what the next turn's prompt begins with, in both forms."""
    tokenizer = load_tokenizer(GOLDENS / f"tokenizer-{name}", template)
    messages = talk("Can you help?", "Yes.", "Why?", "No.", "And?")
    segments = tokenizer.segments(messages)
    assert [is_response for _, is_response in segments] == [False, True, False, True, False]
    for turn in (1, 3):
        assert tokenizer.segments(messages[: turn + 1]) == segments[: turn + 1]
        begun = tokenizer.prompt_ids(messages[:turn])
        begun += [*tokenizer.encode(segments[turn][0]), tokenizer.eos_id]
        longer = tokenizer.prompt_ids(messages[: turn + 2])
        assert longer[: len(begun)] == begun
    if name == "chatml" and template == "chat":  # the template's own EOS is not doubled
        assert longer.count(tokenizer.eos_id) == 6  # system, and five turns


@pytest.mark.parametrize("source", [MISTRAL_1, DATED, THINKING])
def test_ordinary_rows_of_several_turns_are_cut(folder, source):
    tokenizer = with_template(folder, source)
    messages = talk("Hi.", "Yes?", "Bake.", " No. ", "Why?", system="Be kind.")
    segments = tokenizer.segments(messages)
    # Mistral's template puts a space between prompt and response: it belongs to the response.
    first = " Yes?" if source == MISTRAL_1 else "Yes?"
    assert [text for text, is_response in segments if is_response] == [first, " No. "]
    for turn in (2, 4):
        assert tokenizer.segments(messages[:turn]) == segments[: turn - 1]
    joined = "".join(text + tokenizer.eos * is_response for text, is_response in segments)
    whole = tokenizer.chat.render(messages, generate=True)
    assert "".join(joined.split()) == "".join(whole.split())


def test_a_turns_end_that_is_not_the_eos_is_taken_out(tmp_path):
    tokenizer = family(tmp_path, "chatml", "byte-level")
    assert tokenizer.eos == tokenizer.turn_end == "<|im_end|>"
    segments = tokenizer.segments(talk("a", "b", "c"))
    edit_json(tmp_path / CONFIG, eos_token="</s>")
    other = load_tokenizer(tmp_path)
    assert (other.eos, other.turn_end) == ("</s>", "<|im_end|>")
    assert other.segments(talk("a", "b", "c")) == segments  # whose caller adds the EOS


def test_every_token_of_a_response_knows_its_characters(tmp_path):
    """Metaspace tokenizers put a space before any text, except after a newline."""
    tokenizer = family(tmp_path, "chatml", "metaspace")
    segments = tokenizer.segments(talk("Bread?", "Yes, easy. Also, bake."))
    text, _ = segments[1]
    ids, spans = tokenizer.encode_segments([segments])[0][1]
    assert ids[0] != tokenizer.encode("Yes")[0]
    tokens = [tokenizer.raw.id_to_token(id).replace("▁", " ") for id in ids]
    assert [text[start:end] for start, end in spans] == tokens
    assert "".join(tokens) == text


LEAVES_OUT = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"


def test_messages_that_a_template_leaves_out_are_counted_over_the_whole_file(folder):
    tokenizer = with_template(folder, LEAVES_OUT)
    whole = talk("a", " b ")
    incomplete = talk("a", "b", system="S")
    conversations = [whole, incomplete, whole, incomplete, talk(" a", "b", "c", "d")]
    rows = read_rows([{"messages": messages} for messages in conversations])
    fails(r"row 1 .*leaves a message's text .*first of 2 rows", tokenise, rows, tokenizer, 99)
    assert tokenise([rows[0], rows[2], rows[4]], tokenizer, 99).rows == 3


def test_a_message_said_twice_must_be_in_the_prompt_twice(folder):
    turns = [{"role": "user", "content": text} for text in ("Why?", "Why?", "Now.")]
    assert with_template(folder, LEAVES_OUT).prompt_ids(turns)
    once = with_template(folder, "{{ messages[0].content }}{{ messages[2].content }}")
    fails("leaves a message's text", once.prompt_ids, turns)


# What is found in a checkpoint


def in_transformers(folder, expected):
    """The text of transformers' own template, None where it finds none; else what is expected."""
    if not find_spec("transformers"):
        return expected
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(folder)
    try:
        return tokenizer.apply_chat_template(talk("a"), tokenize=False)
    except ValueError:
        return None


@pytest.mark.parametrize("case", read_jsonl(TEMPLATES / "places.jsonl"), ids=str)
def test_a_template_is_found_where_transformers_finds_it(case, folder):
    (folder / JINJA).unlink()
    (folder / "additional_chat_templates").mkdir()
    for name, content in case["files"].items():
        if name == CONFIG:
            set_fields(folder / name, content)
        else:
            (folder / name).write_text(content)
    expected = case["template"]
    if expected is None:
        fails("--template human", load_tokenizer, folder)
    else:
        assert load_tokenizer(folder, "chat").template == expected
    assert in_transformers(folder, expected) == expected or "older" in case


@pytest.mark.parametrize("case", read_jsonl(TEMPLATES / "special_tokens.jsonl"), ids=str)
def test_special_tokens_are_found_where_transformers_finds_them(case, folder):
    set_fields(folder / CONFIG, case["config"])
    if case["map"]:
        (folder / "special_tokens_map.json").write_text(json.dumps(case["map"]))
    names = "{{ bos_token }}-{{ pad_token }}-{{ image_token }}-{{ eos_token }}"
    tokenizer = with_template(folder, names)
    expected = case["bos-pad-image-eos"]
    assert prompt_of(tokenizer, "a") == expected
    assert in_transformers(folder, expected) == expected
    assert tokenizer.raw.id_to_token(tokenizer.eos_id) == "<|im_end|>"


@pytest.mark.parametrize("newer", [{}, {"added_tokens_decoder": {}}])
def test_an_eos_that_only_the_map_names_is_found(folder, newer):
    set_fields(folder / CONFIG, {"eos_token": "absent", **newer})
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(folder).eos == "</s>"


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
    def fingerprint(**options):
        return load_tokenizer(folder, **options).fingerprint()

    different = [fingerprint(), fingerprint(template="human")]
    assert different[0] == load_tokenizer(GOLDENS / "tokenizer-chatml").fingerprint()
    edit_json(folder / CONFIG, bos_token="<|im_start|>")
    different.append(fingerprint())
    assert fingerprint(date="2025-03-09") == different[-1]  # the template asks for no date
    (folder / JINJA).write_text(DATED)
    different += [fingerprint(date="2025-03-09"), fingerprint(date="2025-03-10")]
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    different.append(fingerprint(date="2025-03-10"))
    (folder / JINJA).write_text("{{ brief }}")
    for value in (True, False):
        different.append(fingerprint(template_kwargs={"brief": value}))
    assert len(set(different)) == len(different)


# Rendering


@pytest.mark.parametrize("case", read_jsonl(TEMPLATES / "rendered.jsonl"), ids=str)
def test_templates_find_what_transformers_gives_them(folder, case):
    tokenizer = with_template(folder, case["template"], date="2025-03-09")
    assert prompt_of(tokenizer, "a") == case["prompt of the message a"]


@pytest.mark.parametrize("source", (TEMPLATES / "failing.txt").read_text().splitlines())
def test_a_template_that_fails_or_leaves_its_sandbox_is_an_input_error(folder, source, hurried):
    messages = talk("a")
    fails("template", with_template(folder, source).prompt_ids, messages)
    assert messages == talk("a")


# What is refused


@pytest.mark.parametrize("case", read_jsonl(ROOT / "tests/broken_tokenizers.jsonl"), ids=str)
def test_a_broken_tokenizer_is_refused_by_name(folder, case):
    spoil(folder, case)

    def load_and_encode():
        tokenizer = load_tokenizer(folder)
        tokenizer.encode_segments([tokenizer.segments(talk("a"))])

    fails(case["error"], load_and_encode)


def test_a_template_that_nests_too_deeply_is_refused(folder):
    source = "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"
    fails("not valid jinja", with_template, folder, source)


def test_a_template_that_is_no_text_is_refused(folder):
    (folder / JINJA).unlink()
    set_fields(folder / CONFIG, {"chat_template": [{"name": "rag"}]})
    fails("not a text", load_tokenizer, folder)
    set_fields(folder / CONFIG, {"chat_template": "absent"})
    fails("no chat template", load_tokenizer, folder, template="chat")
    fails("alpaca", load_tokenizer, folder, template="alpaca")


@pytest.mark.parametrize("date", ["9 March 2025", "2025-02-30", ""])
def test_a_date_of_another_form_is_refused(folder, date):
    fails("YYYY-MM-DD", with_template, folder, DATED, date=date)


def test_conversations_that_a_template_cannot_cut_are_refused(folder):
    tokenizer = load_tokenizer(folder)
    fails("unknown role: robot", tokenizer.segments, [{"role": "robot", "content": "a"}])
    counting = "{{ messages | length }}{{ messages[-1].content }}{{ eos_token }}"
    tokenizer = with_template(folder, counting)
    fails("rewrites earlier turns", tokenizer.segments, talk("a", "b", "c", "d"))
    assert len(tokenizer.segments(talk("a", "b"))) == 2  # a row of one turn can be cut
    tokenizer = with_template(folder, THINKING)
    thought = talk("Hi.", "<think>\nhm\n</think>\n\nYes?", "Bake.", "No.")
    fails("once there are 3 messages.*leave thinking out", tokenizer.segments, thought)


# Commands


def test_a_date_is_kept_by_the_run(base, files, tmp_path, capsys):
    dated = shutil.copytree(base, tmp_path / "dated")
    tokenizer = with_template(dated, DATED, date="2020-01-02")
    assert tokenizer.date == datetime.date(2020, 1, 2)
    assert "02 Jan 2020" in prompt_of(tokenizer, "a")
    for model, date in ((dated, "2020-01-02"), (base, None)):  # asked for, or not
        run = tmp_path / f"run-{date}"
        assert call(f"train.py --run {run} {sources(files, model)} --date 2020-01-02") == 0
        assert read_json(run / "run.json")["settings"]["date"] == date
    score = f"score.py --run {tmp_path}/run-2020-01-02 --custom {files['custom']}"
    error = refused(capsys, f"{score} --date 2020-01-03")
    assert "2020-01-02" in error and "2020-01-03" in error
    assert call(score) == 0


def test_the_command_takes_a_date_and_refuses_input_that_is_no_text(
    base, tmp_path, capsys, monkeypatch
):
    dated = shutil.copytree(base, tmp_path / "dated")
    with_template(dated, DATED)
    line = f"model.generate --model {dated} --device cpu --max-new-tokens 4 --date 2020-01-02"
    assert call(f"{line} --prompt Hi") == 0
    (tmp_path / "typed").write_bytes(b"\xff\n")
    monkeypatch.setattr("sys.stdin", open(tmp_path / "typed", encoding="utf-8"))
    assert "standard input is not UTF-8" in refused(capsys, line)


@pytest.mark.skipif(not REAL, reason="TOSS_REAL_CHECKPOINT names no checkpoint folder")
def test_a_real_checkpoints_prompts_are_transformers():
    """On 300 of the project's rows of one turn, and on those joined into rows of three turns."""
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(REAL)
    real = transformers.AutoTokenizer.from_pretrained(REAL)
    rows = read_jsonl(ROOT / "data/rows/custom.jsonl")[:300]
    conversations = [talk(row["prompt"]) for row in rows]
    for a, b, c in zip(rows[::3], rows[1::3], rows[2::3]):
        turns = [a["prompt"], a["response"], b["prompt"], b["response"], c["prompt"]]
        conversations.append(talk(*turns))
    settings = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
    for messages in conversations:
        assert ours.prompt_ids(messages) == real.apply_chat_template(messages, **settings)
