"""Chat templates in the forms of well-known families, where checkpoints keep them, and the date that some ask for."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, write_jsonl
from test_tokenizer import GOLDENS, assistant, reconfigure, user, with_template

from model import InputError, load_tokenizer
from model import generate as talk
from model.files import read_json
from toss.audit.tokens import load_scored
from toss.dataset import tokenise
from toss.rows import read_rows

GOLDEN = json.loads((GOLDENS / "templates/golden.json").read_text(encoding="utf-8"))
MOVES_THE_SYSTEM_TEXT = ("mistral", "system and turns")
REAL = os.environ.get("TOSS_REAL_CHECKPOINT")
# Mistral's first form, Llama-3.2's date and Qwen3's thinking, as far as they matter for cutting a row.
MISTRAL_1 = ("{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
             "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{{ bos_token }}{% for m in messages %}"
             "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}{% else %}"
             "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}")  # fmt: skip
DATED = ("{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '26 Jul 2024' %}"
         "{% endif %}{{ 'Today: ' + day }}"
         "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")  # fmt: skip
THINKING = ("{% for m in messages %}{% set text = m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') %}"
            "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A copy of the ChatML tokenizer that a test may change."""
    return Path(shutil.copytree(GOLDENS / "tokenizer-chatml", tmp_path / "tokenizer"))


def family(folder, name, tokenizer):
    """A folder with one of the two tokenizers and a family's template and special tokens."""
    folder.mkdir()
    shutil.copyfile(GOLDENS / f"templates/{tokenizer}.json", folder / "tokenizer.json")
    shutil.copyfile(GOLDENS / f"templates/{name}.jinja", folder / "chat_template.jinja")
    (folder / "tokenizer_config.json").write_text(json.dumps(GOLDEN["special"][name]))
    return load_tokenizer(folder)


def conversation(case):
    return [{"role": m["role"], "content": m["content"] * m.get("times", 1)} for m in GOLDEN["messages"][case]]


@pytest.mark.parametrize("tokenizer", ["byte-level", "metaspace"])
@pytest.mark.parametrize("name", GOLDEN["special"])
def test_prompts_of_the_families_are_those_of_apply_chat_template(tmp_path, name, tokenizer):
    loaded = family(tmp_path / "t", name, tokenizer)
    cases = [p for p in GOLDEN["prompts"] if (p["tokenizer"], p["family"]) == (tokenizer, name)]
    assert len(cases) == len(GOLDEN["messages"]) == 13
    for prompt in cases:
        messages, want = conversation(prompt["case"]), prompt["ids"]
        if (name, prompt["case"]) == MOVES_THE_SYSTEM_TEXT:
            with pytest.raises(InputError, match="once there are 4 messages.*system message into the first user's text"):
                loaded.prompt_ids(messages)
        elif isinstance(want, str):
            assert hashlib.sha256(json.dumps(loaded.prompt_ids(messages)).encode()).hexdigest() == want
        elif not any(m["role"] == "assistant" for m in messages):
            assert loaded.prompt_ids(messages) == want, prompt["case"]
        else:
            assert_prompts_are(want, loaded, messages)


def assert_prompts_are(want, tokenizer, messages):
    """Every prompt of the row is transformers', to the id; its responses say the same, and each ends in one EOS."""
    segments, place = tokenizer.segments(messages), 0
    encoded = tokenizer.encode_segments([segments])[0]
    for (text, is_response), (ids, _) in zip(segments, encoded):
        if is_response:
            end = want.index(tokenizer.eos_id, place)
            assert tokenizer.decode(want[place:end]).strip() == text.strip()
            if text.lstrip() == text or text[:1] == tokenizer.space:  # else the template may have trimmed it
                assert ids[:1] == want[place : place + 1], text
            place = end + 1
        else:
            assert want[place : place + len(ids)] == ids
            place += len(ids)
    assert place == len(want)
    parts = [ids + [tokenizer.eos_id] * is_response for (_, is_response), (ids, _) in zip(segments, encoded)]
    assert tokenizer.prompt_ids(messages) == sum(parts, [])


def test_a_response_behind_a_newline_keeps_its_ground_truth(tmp_path):
    """Metaspace tokenizers put a space before any text but one behind a newline: the response's first token has none here."""
    tokenizer = family(tmp_path / "t", "chatml", "metaspace")
    row = {"prompt": "Bread?", "response": "Yes, easy. Also, bake.", "harmful": [[0, 3], [11, 15]]}
    tokens = tokenise(read_rows(write_jsonl(tmp_path / "rows.jsonl", [row])), tokenizer, 512, "rows")
    response = tokens.input_ids[tokens.response].tolist()
    assert tokenizer.raw.id_to_token(response[0])[0] == "Y" and tokenizer.encode("Yes")[0] != response[0]
    marked = [tokenizer.raw.id_to_token(int(t)) for t in tokens.input_ids[tokens.harmful]]
    assert "".join(marked).replace("▁", "") == "YesAlso"


def test_a_turns_end_that_is_not_the_eos_is_taken_out_and_said(tmp_path):
    tokenizer = family(tmp_path / "t", "chatml", "byte-level")
    config = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    assert tokenizer.turn_end == tokenizer.eos == "<|im_end|>"
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}))
    other = load_tokenizer(tmp_path / "t")
    assert (other.eos, other.turn_end) == ("</s>", "<|im_end|>")
    row = [user("a"), assistant("b"), user("c")]
    text = lambda loaded: "".join(text + loaded.eos * is_response for text, is_response in loaded.segments(row))  # noqa: E731
    assert text(other) == text(tokenizer).replace("b<|im_end|>", "b</s>")


@pytest.mark.parametrize("source", [MISTRAL_1, DATED, THINKING])
def test_ordinary_rows_of_several_turns_are_cut(folder, source):
    tokenizer = with_template(folder, source)
    system = {"role": "system", "content": "Be kind."}
    messages = [system, user("Hi."), assistant("Yes?"), user("Bake."), assistant(" No. "), user("Why?")]
    segments = tokenizer.segments(messages)
    first = " Yes?" if source == MISTRAL_1 else "Yes?"  # Mistral's template puts a space between prompt and response
    assert [text for text, is_response in segments if is_response] == [first, " No. "]
    for turn in (2, 4):
        assert tokenizer.segments(messages[:turn]) == segments[: turn - 1]  # a row's beginning is the shorter row
    text = "".join(text + tokenizer.eos * is_response for text, is_response in segments)
    whole = tokenizer.render(messages, generate=True)
    assert "".join(text.split()) == "".join(whole.split())


def test_thinking_that_the_template_drops_from_earlier_turns_is_refused(folder):
    tokenizer = with_template(folder, THINKING)
    messages = [user("Hi."), assistant("<think>\nhm\n</think>\n\nYes?"), user("Bake."), assistant("No.")]
    assert tokenizer.segments(messages[:2])[1] == (messages[1]["content"], True)
    with pytest.raises(InputError, match="once there are 3 messages.*leave thinking out, or give one row a turn"):
        tokenizer.segments(messages)


@pytest.mark.parametrize("place", ["chat_template.json", "additional", "config over legacy", "files over config"])
def test_templates_are_read_in_transformers_order(folder, place):
    source, other = (folder / "chat_template.jinja").read_text(), "not this one"
    want = load_tokenizer(folder).prompt_ids([user("Hi")])
    if place == "additional":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text(other)
    elif place == "chat_template.json":
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    elif place == "config over legacy":
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": other}))
        reconfigure(folder, chat_template=source)
    else:
        reconfigure(folder, chat_template=[{"name": "default", "template": other}])
    assert load_tokenizer(folder).prompt_ids([user("Hi")]) == want


def test_several_templates_without_a_default_are_refused_but_for_the_human_form(folder):
    (folder / "chat_template.jinja").unlink()
    reconfigure(folder, chat_template=[{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}])
    with pytest.raises(InputError, match="rag, tool_use.*--template human"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, "human").template is None
    reconfigure(folder, chat_template=[{"name": "rag"}])
    with pytest.raises(InputError, match="not a text"):
        load_tokenizer(folder)


@pytest.mark.parametrize(("source", "text"), [
    ("{{ {'a': '<b> & é'} | tojson }}", '{"a": "<b> & é"}'),
    ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!", "a!"),
    ("{% for m in messages %}{% continue %}{{ m.content }}{% endfor %}.", "."),
])  # fmt: skip
def test_filters_and_tags_are_those_of_transformers(folder, source, text):
    assert with_template(folder, source).segments([user("a")]) == [(text, False)]


@pytest.mark.parametrize(("decoder", "table", "bos"), [
    (False, {"bos_token": {"content": "<|im_start|>", "lstrip": False}}, "<|im_start|>"),  # as transformers: the map wins
    (False, {"pad_token": "</s>"}, "<s>"),
    (True, {"bos_token": "<|im_start|>", "pad_token": "</s>"}, "<s>"),  # not read beside a newer tokenizer_config.json
])  # fmt: skip
def test_special_tokens_may_come_from_special_tokens_map(folder, decoder, table, bos):
    reconfigure(folder, **({"added_tokens_decoder": {}} if decoder else {}), extra_special_tokens={"image_token": "<im>"})
    (folder / "special_tokens_map.json").write_text(json.dumps(table))
    tokenizer = with_template(folder, "{{ bos_token }}-{{ pad_token }}-{{ image_token }}-{{ eos_token }}")
    assert tokenizer.segments([user("a")])[0][0] == f"{bos}-{'' if decoder else table.get('pad_token', '')}-<im>-<|im_end|>"


def test_an_eos_named_only_in_special_tokens_map_is_found(folder):
    want = load_tokenizer(folder).eos_id
    reconfigure(folder, added_tokens_decoder={})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert load_tokenizer(folder).eos_id == want


def test_a_special_token_that_tokenizer_json_has_as_a_mere_word_is_one_token(folder):
    state = json.loads((folder / "tokenizer.json").read_text())
    word = max(state["model"]["vocab"].items(), key=lambda item: item[1])  # the last merge: never met in this text
    reconfigure(folder, eos_token=word[0])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(f"Hi{word[0]}!")[-2] == tokenizer.eos_id == word[1]


def test_the_date_is_a_setting_where_the_template_asks_for_it(folder):
    tokenizer = with_template(folder, DATED)
    dated = load_tokenizer(folder, date="2025-03-09")
    assert dated.segments([user("a")])[0][0].startswith("Today: 09 Mar 2025<|im_start|>user")
    assert str(dated.date) == "2025-03-09" and tokenizer.date is not None
    assert dated.fingerprint() == load_tokenizer(folder, date="2025-03-09").fingerprint()
    assert dated.fingerprint() != load_tokenizer(folder, date="2025-03-10").fingerprint()
    timed = with_template(folder, "{{ strftime_now('%H:%M:%S') }}")
    assert timed.segments([user("a")]) == [("00:00:00", False)]


def test_the_date_is_nothing_where_the_template_does_not_ask(folder):
    plain = load_tokenizer(folder)
    assert plain.date is None and plain.fingerprint() == load_tokenizer(folder, date="2025-03-09").fingerprint()
    with_template(folder, DATED)
    assert load_tokenizer(folder, "human", "2025-03-09").date is None
    for wrong in ("9 March 2025", "2025-02-30", ""):
        with pytest.raises(InputError, match="YYYY-MM-DD"):
            load_tokenizer(folder, date=wrong)


def test_a_run_keeps_the_date_that_it_was_begun_with(tmp_path, base, files, scripts, capsys):
    dated, run = Path(shutil.copytree(base, tmp_path / "dated")), tmp_path / "run"
    with_template(dated, DATED)
    begin = ["--run", run, "--model", dated, "--harmful", files["harmful"], "--utility", files["utility"]]
    assert scripts["train"](*begin, "--date", "2020-01-02") == 0
    assert scripts["score"]("--run", run, "--custom", files["custom"], "--date", "2020-01-03") == 1
    assert "begun with --date 2020-01-02, not 2020-01-03" in capsys.readouterr().err
    assert scripts["score"]("--run", run, "--custom", files["custom"]) == 0
    assert "date = 2020-01-02" in capsys.readouterr().out
    scored = load_scored(run)  # as the audit reads it
    assert "Today: 02 Jan 2020" in scored.tokenizer.raw.decode(scored.tokens.input_ids[:40].tolist())
    assert scripts["train"](*begin) == 0
    assert capsys.readouterr().out.count("skipped") == 2


def test_talking_to_a_checkpoint_takes_the_date(tmp_path, base, monkeypatch, capsys):
    dated, seen = Path(shutil.copytree(base, tmp_path / "dated")), []
    tokenizer = with_template(dated, DATED)
    monkeypatch.setattr(talk, "generate", lambda model, prompts, *_: seen.extend(prompts) or [[]])
    assert talk.main(["--model", str(dated), "--date", "2020-01-02", "--prompt", "Hi", "--device", "cpu"]) == 0
    assert "Today: 02 Jan 2020" in tokenizer.raw.decode(seen[0])
    assert talk.main(["--model", str(dated), "--date", "2 Jan", "--prompt", "Hi"]) == 1
    assert "YYYY-MM-DD" in capsys.readouterr().err


def test_a_run_whose_template_asks_for_no_date_records_none(tmp_path, base, files, scripts, capsys):
    run = tmp_path / "run"
    assert scripts["train"]("--run", run, "--model", base, "--harmful", files["harmful"], "--utility", files["utility"],
                            "--date", "2020-01-02") == 0  # fmt: skip
    assert scripts["score"]("--run", run, "--custom", files["custom"], "--date", "2020-01-03") == 0
    assert read_json(run / "run.json")["settings"]["date"] is None and "date" not in capsys.readouterr().out


NAMED = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ additional_special_tokens }}"
ADDED = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize("config", [
    {}, {"added_tokens_decoder": {"3": ADDED}}, {"bos_token": None}, {"bos_token": {"__type": "AddedToken", **ADDED}},
    {"extra_special_tokens": {"image_token": "<s>"}}, {"image_token": "<s>"}, {"additional_special_tokens": ["<s>"]},
])  # fmt: skip
@pytest.mark.parametrize("table", [None, {"bos_token": "<|im_start|>"}, {"eos_token": ADDED, "pad_token": "<s>"}])
def test_special_tokens_reach_the_template_as_in_transformers(folder, config, table):
    transformers = pytest.importorskip("transformers")
    reconfigure(folder, **config)
    if table is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(table))
    ours = with_template(folder, NAMED).segments([user("a")])[0][0]
    assert ours == transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template([user("a")], tokenize=False)


@pytest.mark.parametrize("inline", [None, "config", {"default": "table"}, [{"name": "default", "template": "list"}],
                                    [{"name": "rag", "template": "rag"}]])  # fmt: skip
@pytest.mark.parametrize("files", [[], ["chat_template"], ["additional_chat_templates/tool_use"],
                                   ["chat_template", "additional_chat_templates/default"]])  # fmt: skip
def test_the_template_found_is_the_one_of_transformers(folder, inline, files):
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    reconfigure(folder, **({"chat_template": inline} if inline else {}))
    for name in files:
        (folder / f"{name}.jinja").write_text(name)
    try:
        ours = load_tokenizer(folder, "chat").segments([user("a")])[0][0]
    except InputError:
        ours = None
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template([user("a")], tokenize=False)
    except ValueError:
        theirs = None
    assert ours == theirs


@pytest.mark.skipif(not REAL, reason="TOSS_REAL_CHECKPOINT names no checkpoint folder")
def test_a_real_checkpoints_prompts_are_transformers():
    """To the id, on 300 of the project's rows of one turn, and on those joined into conversations of three turns."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(REAL), transformers.AutoTokenizer.from_pretrained(REAL)
    rows = [row.messages for row in read_rows(ROOT / "data/rows/custom.jsonl")[:300]]
    rows += [rows[i] + rows[i + 1] + rows[i + 2][:1] for i in range(0, len(rows), 3)]
    assert len(rows) == 400
    for row in rows:
        messages = row[:-1] if row[-1]["role"] == "assistant" else row
        want = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert ours.prompt_ids(messages) == want
