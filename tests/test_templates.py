"""Text becomes the ids that transformers makes of it: plain, in templates, in the human form."""

import datetime
import hashlib
import json
import re
import shutil
import signal
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from agreement import GOLDENS, REAL
from conftest import ROOT, damage, edit_json, fails, sources
from helpers import call, refused, talk

from model import InputError, load_tokenizer
from model.io import read_json, time_limit
from toss.rows import read_rows
from toss.tokens import tokenise

CONFIG, JINJA, TABLE = "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"


# Mistral's first form, Llama-3.2's date and Qwen3's thinking, as far as they matter for the cuts.
def read(name):
    return (ROOT / f"tests/templates/{name}.jinja").read_text(encoding="utf-8")


MISTRAL_1, DATED, THINKING = map(read, ("mistral-1", "dated", "thinking"))


def golden(name):
    return read_json(GOLDENS / f"{name}/golden.json")


def first_text(tokenizer):
    return tokenizer.segments(talk("a"))[0][0]


@pytest.fixture
def folder(tmp_path):
    """A copy of the ChatML tokenizer that a test may change."""
    return Path(shutil.copytree(GOLDENS / "tokenizer-chatml", tmp_path / "tokenizer"))


def with_template(folder, template, **more):
    (folder / JINJA).write_text(template)
    return load_tokenizer(folder, **more)


@pytest.mark.parametrize("name", ["chatml", "bos", "metaspace"])
def test_plain_text_and_the_human_form_give_transformers_ids(name):
    tokenizer, want = load_tokenizer(GOLDENS / f"tokenizer-{name}"), golden(f"tokenizer-{name}")
    assert tokenizer.eos_id == want["eos_id"]
    for case in want["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        # Metaspace's alphabet lacks some letters; special tokens are left out of the text.
        if name != "metaspace" and "<" not in case["text"]:
            assert tokenizer.decode(case["ids"]) == case["text"]
    human = load_tokenizer(GOLDENS / f"tokenizer-{name}", template="human")
    for case in want["human"]:  # with a BOS once; the first token of a response is the whole text's
        messages = talk(case["prompt"], case["response"])
        assert human.prompt_ids(messages[:1]) == case["ids"]
        text, is_response = human.segments(messages)[1]
        assert is_response and case["ids"] + human.encode(text) == case["whole"]


def test_the_human_form_is_used_where_there_is_no_chat_template(folder):
    damage(folder, {JINJA: None})
    none = load_tokenizer(folder)
    damage(folder, named(rag="a", tool_use="b"))  # of which none is the default
    human = load_tokenizer(folder, template="human")
    want = none.encode("Human: Hi\nAssistant:")
    assert none.prompt_ids(talk("Hi")) == human.prompt_ids(talk("Hi")) == want
    assert none.template is human.template is None


def family(folder, name, tokenizer):
    """A tokenizer with a family's template and special tokens."""
    shutil.copyfile(GOLDENS / f"templates/{tokenizer}.json", folder / "tokenizer.json")
    shutil.copyfile(GOLDENS / f"templates/{name}.jinja", folder / JINJA)
    (folder / CONFIG).write_text(json.dumps(golden("templates")["special"][name]))
    return load_tokenizer(folder)


def prompts_are_equal(want, tokenizer, messages):
    """True if the ids are transformers'. Otherwise its template changed an earlier response.

    Even then each prompt is transformers' own, and each response says the same and ends in one EOS.
    """
    if tokenizer.prompt_ids(messages) == want:
        return True
    segments, place = tokenizer.segments(messages), 0
    for (text, is_response), (ids, _) in zip(segments, tokenizer.encode_segments([segments])[0]):
        end = want.index(tokenizer.eos_id, place) if is_response else place + len(ids)
        if is_response:
            assert tokenizer.decode(want[place:end]).strip() == tokenizer.decode(ids).strip()
            if text.lstrip() == text or text[:1] == tokenizer.space:  # else it may be trimmed
                assert ids[:1] == want[place : place + 1], text
        else:
            assert ids == want[place:end]
        place = end + is_response
    assert place == len(want)
    return False


@pytest.mark.parametrize(("name", "equal"), [("chatml", 9), ("bos", 8), ("metaspace", 3)])
def test_chat_prompts_are_those_of_apply_chat_template(name, equal):
    tokenizer, want = load_tokenizer(GOLDENS / f"tokenizer-{name}"), golden(f"tokenizer-{name}")
    found = [prompts_are_equal(case["ids"], tokenizer, case["messages"]) for case in want["chat"]]
    assert sum(found) == equal
    assert tokenizer.leading_ids() == []  # a template writes the BOS itself


@pytest.mark.parametrize("tokenizer", ["byte-level", "metaspace"])
@pytest.mark.parametrize("name", ["llama-2", "llama-3", "chatml", "mistral"])
def test_prompts_of_the_families_are_those_of_apply_chat_template(tmp_path, name, tokenizer):
    loaded, table = family(tmp_path, name, tokenizer), golden("templates")
    cases = [x for x in table["prompts"] if (x["tokenizer"], x["family"]) == (tokenizer, name)]
    assert len(cases) == len(table["messages"]) == 13
    for case in cases:
        rows, want = table["messages"][case["case"]], case["ids"]
        messages = [m | {"content": m["content"] * m.pop("times", 1)} for m in rows]
        if (name, case["case"]) == ("mistral", "system and turns"):
            fails("once there are 4 messages.*system message", loaded.prompt_ids, messages)
        elif isinstance(want, str):
            ids = json.dumps(loaded.prompt_ids(messages)).encode()
            assert hashlib.sha256(ids).hexdigest() == want
        else:
            several = any(message["role"] == "assistant" for message in messages)
            assert prompts_are_equal(want, loaded, messages) or several


@pytest.mark.parametrize("template", ["human", "chat"])
@pytest.mark.parametrize("name", ["chatml", "bos"])
def test_a_longer_conversation_goes_on_from_a_shorter_one(name, template):
    """prompt + response + EOS is what the next turn's prompt begins with, in both forms."""
    tokenizer = load_tokenizer(GOLDENS / f"tokenizer-{name}", template)
    messages = talk("Can you help?", "Yes.", "Why?", "No.", "And?")
    pieces = tokenizer.segments(messages)
    assert [is_response for _, is_response in pieces] == [False, True, False, True, False]
    for turn in (1, 3):
        before, after = (tokenizer.prompt_ids(messages[:end]) for end in (turn, turn + 2))
        response = [*tokenizer.encode(pieces[turn][0]), tokenizer.eos_id]
        assert after[: len(before) + len(response)] == before + response
        assert tokenizer.segments(messages[: turn + 1]) == pieces[: turn + 1]
    if name == "chatml" and template == "chat":  # the template's own EOS is not doubled
        assert after.count(tokenizer.eos_id) == 6  # system, and five turns


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
    text = "".join(text + tokenizer.eos * is_response for text, is_response in segments)
    assert "".join(text.split()) == "".join(tokenizer.chat.render(messages, True).split())


def test_a_turns_end_that_is_not_the_eos_is_taken_out_and_said(tmp_path):
    tokenizer, row = family(tmp_path, "chatml", "byte-level"), talk("a", "b", "c")
    edit_json(tmp_path / CONFIG, eos_token="</s>")
    other = load_tokenizer(tmp_path)
    assert (tokenizer.eos, tokenizer.turn_end) == ("<|im_end|>", "<|im_end|>")
    assert (other.eos, other.turn_end) == ("</s>", "<|im_end|>")
    said, changed = ("".join(t + x.eos * r for t, r in x.segments(row)) for x in (tokenizer, other))
    assert changed == said.replace("b<|im_end|>", "b</s>")


def test_every_token_of_a_response_knows_its_characters(tmp_path):
    """Metaspace tokenizers put a space before any text, except after a newline."""
    tokenizer = family(tmp_path, "chatml", "metaspace")
    segments = tokenizer.segments(talk("Bread?", "Yes, easy. Also, bake."))
    (text, is_response), (ids, spans) = segments[1], tokenizer.encode_segments([segments])[0][1]
    assert is_response and ids[0] != tokenizer.encode("Yes")[0]
    tokens = [tokenizer.raw.id_to_token(id).replace("▁", " ") for id in ids]
    assert [text[start:end] for start, end in spans] == tokens and "".join(tokens) == text


MAIN, OTHER = "{{ messages[0].content }}", "not this one"
TOOL, EXTRA = (f"additional_chat_templates/{name}.jinja" for name in ("tool_use", "default"))


def inline(template):
    return {CONFIG: {"chat_template": template}}


def named(**texts):
    return inline([{"name": name, "template": texts[name]} for name in texts])


def legacy(template):
    return {"chat_template.json": json.dumps({"chat_template": template})}


LEGACY = [legacy(MAIN), legacy(OTHER) | inline(MAIN)]  # of older processors
FOUND = [
    inline(MAIN),
    inline({"default": MAIN}),
    named(tool_use=OTHER, default=MAIN),
    {JINJA: MAIN} | inline(OTHER),
    {JINJA: MAIN} | named(default=OTHER, rag=OTHER),
    {JINJA: MAIN, TOOL: OTHER},
    {JINJA: OTHER, EXTRA: MAIN},
    {EXTRA: MAIN} | inline(OTHER),
]
NOT_FOUND = [named(rag=OTHER), {TOOL: OTHER} | inline(OTHER)]  # none is named default


def theirs(folder):
    """The text of transformers' own template; None where it finds none, "skipped" without it."""
    if not find_spec("transformers"):
        return "skipped"
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(folder)
    try:
        return tokenizer.apply_chat_template(talk("a"), tokenize=False)
    except ValueError:
        return None


@pytest.mark.parametrize("files", [*FOUND, *NOT_FOUND, *LEGACY])
def test_a_template_is_found_as_in_transformers(folder, files):
    (folder / TOOL).parent.mkdir()
    damage(folder, {JINJA: None} | files)
    if files in NOT_FOUND:
        fails("--template human", load_tokenizer, folder)
        assert theirs(folder) in (None, "skipped")
    else:
        assert load_tokenizer(folder, "chat").template == MAIN
        assert theirs(folder) in ("a", "skipped") or files in LEGACY


ADDED = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
END = ADDED | {"content": "<|im_end|>"}
NEWER = {"added_tokens_decoder": {"3": ADDED | {"content": "</s>"}}}
MAP = {"bos_token": "<|im_start|>", "pad_token": "</s>"}
SPECIAL = [
    ({}, {}, "<s>---<|im_end|>"),
    ({"bos_token": None}, {}, "---<|im_end|>"),
    ({"eos_token": {"__type": "AddedToken"} | END}, {}, "<s>---<|im_end|>"),
    ({"extra_special_tokens": {"image_token": "<s>"}}, {}, "<s>--<s>-<|im_end|>"),
    ({"image_token": "<s>"}, {}, "<s>--<s>-<|im_end|>"),
    ({}, MAP, "<|im_start|>-</s>--<|im_end|>"),  # the map wins over an older config
    ({}, {"pad_token": END}, "<s>-<|im_end|>--<|im_end|>"),
    (NEWER, MAP, "<s>---<|im_end|>"),
]
NAMES = "-".join(f"{{{{ {name}_token }}}}" for name in ("bos", "pad", "image", "eos"))


@pytest.mark.parametrize(("config", "table", "want"), SPECIAL)
def test_special_tokens_are_found_as_in_transformers(folder, config, table, want):
    damage(folder, {CONFIG: config, JINJA: NAMES} | ({TABLE: json.dumps(table)} if table else {}))
    tokenizer = load_tokenizer(folder)
    assert first_text(tokenizer) == want and theirs(folder) in (want, "skipped")
    assert tokenizer.raw.id_to_token(tokenizer.eos_id) == "<|im_end|>"
    # An EOS that only the map names is found in any case: without one nothing works.
    damage(folder, {CONFIG: {"eos_token": ...}, TABLE: json.dumps({"eos_token": "</s>"})})
    assert load_tokenizer(folder).eos == "</s>"


def test_truncation_and_padding_are_ignored_and_a_special_word_is_one_token(folder):
    raw = load_tokenizer(folder).raw
    word, word_id = max(raw.get_vocab().items(), key=lambda item: item[1])
    want = raw.encode("The quick brown fox").ids
    raw.enable_truncation(2)
    raw.enable_padding(length=64)
    raw.save(str(folder / "tokenizer.json"))
    edit_json(folder / CONFIG, eos_token=word)  # tokenizer.json has it as a mere word
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("The quick brown fox") == want
    assert tokenizer.encode(f"Hi{word}!")[-2] == tokenizer.eos_id == word_id


def test_the_fingerprint_covers_vocabulary_template_special_tokens_and_date(folder):
    found = [load_tokenizer(GOLDENS / "tokenizer-chatml"), load_tokenizer(folder)]
    assert len({x.fingerprint() for x in found}) == 1
    found.append(load_tokenizer(folder, "human"))
    edit_json(folder / CONFIG, bos_token="<|im_start|>")
    found.append(load_tokenizer(folder, date="2025-03-09"))
    assert found[-1].date is None
    assert found[-1].fingerprint() == load_tokenizer(folder).fingerprint()
    found += [with_template(folder, DATED, date=f"2025-03-{day}") for day in ("09", "10")]
    assert load_tokenizer(folder, date="2025-03-10").fingerprint() == found[-1].fingerprint()
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    found.append(load_tokenizer(folder, date="2025-03-10"))
    assert len({x.fingerprint() for x in found}) == 6


GIVEN = [
    ("{% if tools is none and documents is none %}none{% endif %}", "none"),
    ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}a{% endfor %}", "a"),
    ("{% for m in messages %}{% continue %}{{ m.content }}{% endfor %}.", "."),
    ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "a!"),
    ("{{ eos_token }}{{ missing_token }}", "<|im_end|>"),
    ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),  # trim_blocks and lstrip_blocks
    ("{% set n = namespace(x=0) %}{% if true %}{% set n.x = 1 %}{% endif %}{{ n.x }}", "1"),
    ("{{ {'a': '<b> & é'} | tojson }}", '{"a": "<b> & é"}'),
    ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
    ("{{ strftime_now('%d.%m. %H:%M:%S') }}", "09.03. 00:00:00"),
]


@pytest.mark.parametrize(("source", "text"), GIVEN)
def test_templates_find_what_transformers_gives_them(folder, source, text):
    assert first_text(with_template(folder, source, date="2025-03-09")) == text


FAILING = (ROOT / "tests/failing.txt").read_text().splitlines()  # a template each


@pytest.mark.parametrize("source", FAILING)
def test_a_template_that_fails_or_leaves_its_sandbox_is_an_input_error(folder, source, hurried):
    tokenizer, messages = with_template(folder, source), talk("a")
    fails("template", tokenizer.prompt_ids, messages)
    assert messages == talk("a")


THOUGHT = talk("Hi.", "<think>\nhm\n</think>\n\nYes?", "Bake.", "No.")
COUNTED = "{{ messages | length }}{{ messages[-1].content }}{{ eos_token }}"


def model(**given):
    return {"tokenizer.json": {"model": given, "pre_tokenizer": None}}


LARGE, PANIC = {"a": 2**31, "\n": 0}, {"type": "FixedLength", "length": 0}
REFUSED = [
    ("tokenizer.json", {"tokenizer.json": "{"}, {}),
    ("tokenizer.json.*save_pretrained", {"tokenizer.json": None}, {}),
    *((CONFIG, {CONFIG: change}, {}) for change in ("{", None)),
    *(("eos_token", {CONFIG: {"eos_token": value}}, {}) for value in (..., None)),
    ("<nowhere>", {CONFIG: {"eos_token": "<nowhere>"}}, {}),
    ("jinja", {JINJA: "{% for %}"}, {}),
    ("jinja", {JINJA: "{% for i in [1] %}" * 30 + "{% endfor %}" * 30}, {}),
    ("jinja", {JINJA: "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"}, {}),
    ("tokenizer.json.*dropout", model(type="BPE", vocab={}, merges=[], dropout=0.5), {}),
    ("tokenizer.json.*UNK", model(type="WordLevel", vocab={"b": 0}, unk_token="<unk>"), {}),
    ("tokenizer.json.*int32", model(type="WordLevel", vocab=LARGE, unk_token="a"), {}),
    ("tokenizer.json.*non-zero", {"tokenizer.json": {"pre_tokenizer": PANIC}}, {}),
    (CONFIG, {CONFIG: {"bos_token": "\ud800"}}, {}),
    ("rag, tool_use.*--template human", {JINJA: None} | named(tool_use="a", rag="b"), {}),
    ("not a text", {JINJA: None} | inline([{"name": "rag"}]), {}),
    ("alpaca", {}, {"template": "alpaca"}),
    ("no chat template", {JINJA: None}, {"template": "chat"}),
    *(("YYYY-MM-DD", {JINJA: DATED}, {"date": x}) for x in ("9 March 2025", "2025-02-30", "")),
    ("unknown role: robot", {}, {"row": [{"role": "robot", "content": "a"}]}),
    ("rewrites earlier turns", {JINJA: COUNTED}, {"row": talk("a", "b", "c", "d")}),
    ("once there are 3 messages.*leave thinking out", {JINJA: THINKING}, {"row": THOUGHT}),
]


@pytest.mark.parametrize(("words", "changes", "given"), REFUSED)
def test_what_a_tokenizer_or_its_template_cannot_do_is_said(folder, words, changes, given):
    damage(folder, changes)
    options = {key: value for key, value in given.items() if key != "row"}
    fails(words, lambda: load_tokenizer(folder, **options).segments(given.get("row")))
    if "row" in given:  # a row of one turn can be cut
        assert len(load_tokenizer(folder).segments(talk("a", "b"))) == 2


def test_messages_that_a_template_leaves_out_are_counted_over_the_whole_file(folder):
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = with_template(folder, source)
    kept, row = talk("a", " b "), talk("a", "b", system="S")
    talks = (kept, row, kept, row, talk(" a", "b", "c", "d"))
    rows = read_rows([{"messages": messages} for messages in talks])
    fails(r"row 1 .*leaves a message's text .*first of 2 rows", tokenise, rows, tokenizer, 99)
    assert tokenise([rows[0], rows[2], rows[4]], tokenizer, 99).rows == 3


def test_a_time_limit_ends_what_takes_too_long_and_leaves_the_alarm_as_it_was():
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(InputError, match="counting takes more than 0.1 seconds"):
        with time_limit("counting", seconds=0.1):
            while True:
                pass
    with time_limit("nothing", seconds=0.1):
        pass
    time.sleep(0.2)  # an alarm that was still set would end the process
    assert signal.getsignal(signal.SIGALRM) == handler


def test_a_date_is_kept_by_the_run_and_taken_by_the_command(
    base, files, tmp_path, capsys, monkeypatch
):
    dated, run = Path(shutil.copytree(base, tmp_path / "dated")), tmp_path / "run"
    tokenizer = with_template(dated, DATED, date="2020-01-02")
    assert tokenizer.date == datetime.date(2020, 1, 2) and "02 Jan 2020" in first_text(tokenizer)
    for folder, model, date in ((run, dated, "2020-01-02"), (tmp_path / "plain", base, None)):
        assert call(f"train.py --run {folder} {sources(files, model)} --date 2020-01-02") == 0
        assert read_json(folder / "run.json")["settings"]["date"] == date  # asked for, or not
    line = f"score.py --run {run} --custom {files['custom']}"
    assert re.search("2020-01-02.*2020-01-03", refused(capsys, f"{line} --date 2020-01-03"))
    assert call(line) == 0
    line = f"model.generate --model {dated} --prompt Hi --device cpu --max-new-tokens 4"
    assert call(f"{line} --date 2020-01-02") == 0
    (typed := tmp_path / "typed").write_bytes(b"\xff\n")
    monkeypatch.setattr("sys.stdin", open(typed, encoding="utf-8"))
    assert "standard input is not UTF-8" in refused(capsys, line.replace("--prompt Hi", ""))


@pytest.mark.skipif(not REAL, reason="TOSS_REAL_CHECKPOINT names no checkpoint folder")
def test_a_real_checkpoints_prompts_are_transformers():
    """On 300 of the project's rows of one turn, and on those joined into rows of three turns."""
    transformers = pytest.importorskip("transformers")
    ours, real = load_tokenizer(REAL), transformers.AutoTokenizer.from_pretrained(REAL)
    lines = (ROOT / "data/rows/custom.jsonl").read_text().splitlines()[:300]
    rows = [(row["prompt"], row["response"]) for row in map(json.loads, lines)]
    threes = zip(rows[::3], rows[1::3], rows[2::3])
    for texts in [(prompt,) for prompt, _ in rows] + [(*a, *b, c[0]) for a, b, c in threes]:
        settings = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
        messages = talk(*texts)
        assert ours.prompt_ids(messages) == real.apply_chat_template(messages, **settings)
