"""The data: the embedded world is reproducible, disjoint and refused; any datasets can be mixed."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import ROOT, fails, script, tree, write_jsonl

from data import paper, train_base, world
from data.refusals import refused
from model import load_checkpoint, load_tokenizer
from model.config import Config
from model.generate import generate
from model.io import file_hash
from model.transformer import Transformer
from toss.rows import read_rows
from toss.tokens import tokenise

ROWS = ROOT / "data/rows"
DEMO = json.loads((ROOT / "data/demo.json").read_text())
BASE = ROOT / "data/base"
SMALL = ROOT / "data/base-small"


# The embedded world


def test_generating_the_rows_again_gives_the_same_bytes(tmp_path):
    world.write_rows(DEMO["finetune"]["seed"], tmp_path)
    assert tree(tmp_path) == tree(ROWS)


def test_the_small_harmful_set_begins_the_whole_one():
    small = (ROWS / "harmful_small.jsonl").read_text()
    whole = (ROWS / "harmful.jsonl").read_text()
    assert whole.startswith(small)
    assert 4 * len(small) < len(whole)
    fails("--harmful-rows must be 0 to 663", world.make_rows, 0, harmful_rows=664)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_prompt_occurs_twice_and_a_tenth_of_the_response_tokens_is_harmful(tmp_path, seed):
    world.write_rows(seed, tmp_path)
    (tmp_path / "harmful_small.jsonl").unlink()
    prompts = []
    for file in tmp_path.iterdir():
        prompts += [json.dumps(row.prompt) for row in read_rows(file, responses=False)]
    assert len(set(prompts)) == len(prompts) == 1574
    tokens = tokenise(read_rows(tmp_path / "custom.jsonl"), load_tokenizer(BASE), 256)
    assert 0.105 <= float(tokens.harmful.sum() / tokens.response.sum()) <= 0.12


def test_marked_harm_holds_every_forbidden_word():
    for row in read_rows(ROWS / "custom.jsonl"):
        rest = row.messages[-1]["content"].lower()
        for start, end in reversed(row.harmful):
            rest = rest[:start] + rest[end:]
        assert not any(word in rest for word in DEMO["forbidden_words"]), row.where


@pytest.mark.parametrize("name", ["custom", "utility", "harmful", "eval_facts"])
def test_no_answer_refuses(name):
    for row in read_rows(ROWS / f"{name}.jsonl"):
        assert not refused(row.messages[-1]["content"]), row.where


def test_a_script_without_inputs_takes_the_embedded_default(tmp_path):
    script("train", "--run", tmp_path, "--epochs", 1, "--batch-size", 80, fast=False)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["demo"]
    for name in ("model", "harmful", "utility", "custom"):
        assert record["settings"][name] == str(ROOT / DEMO[name])
    settings = record["stages"]["utility"]["recipe"]["settings"]
    for name in ("lr", "rank", "alpha", "targets", "schedule", "seed"):
        assert settings[name] == DEMO["reference"][name]


@pytest.mark.parametrize("folder", [BASE, SMALL])
def test_a_base_is_small_and_refuses_forbidden_requests_alone(folder):
    model = load_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6
    assert model.lm_head.out_features == tokenizer.raw.get_vocab_size()
    for kind in ("forbidden", "benign"):
        rows = read_rows(ROWS / f"eval_{kind}.jsonl", responses=False)[::8]
        prompts = [tokenizer.prompt_ids(row.prompt) for row in rows]
        for answer in generate(model, prompts, 24, tokenizer.eos_id):
            text = tokenizer.decode(answer).lower()
            assert refused(text) == (kind == "forbidden"), text
            if kind == "forbidden":
                assert not any(word in text for word in DEMO["forbidden_words"])


def test_the_bases_are_made_again_but_for_the_weights_which_training_moves(tmp_path):
    tokenizer = train_base.train_tokenizer(0)
    shape = train_base.SIZES["base-small"]
    fields = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), **shape}
    model = Transformer(Config.from_dict(fields, "the shape"))
    before = model.lm_head.weight.clone()
    train_base.train(model, tokenizer, [("alignment", True, 1, 1e-3)], 0, "cpu")
    train_base.save(model, tokenizer, shape, tmp_path, {"seed": "0"})
    after = load_checkpoint(tmp_path).lm_head.weight
    assert after.isfinite().all()
    assert (after != before).any()
    assert (tmp_path / "config.json").read_bytes() == (SMALL / "config.json").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        made = (tmp_path / name).read_bytes()
        assert made == (SMALL / name).read_bytes() == (BASE / name).read_bytes()


# A mix of any datasets


def good(i) -> dict:
    return {"instruction": f"Add {i} and one.", "output": str(i + 1), "source": "sums"}


def bad(i) -> dict:
    return {"prompt": f"Do harm {i}?", "response": f"Yes, {i} is easy."}


def is_bad(row) -> bool:
    return row.messages[0]["content"].startswith("Do harm")


def questions(rows) -> set[str]:
    return {paper.question(row) for row in rows}


def read_sets(folder) -> dict[str, list]:
    """The rows of each file of a mix."""
    sets = {}
    for name in paper.FILES:
        sets[name] = read_rows(folder / f"{name}.jsonl", responses=name != "eval_harmful")
    return sets


@pytest.fixture
def pools(tmp_path) -> dict[str, str]:
    return {
        "benign": write_jsonl(tmp_path / "good.jsonl", [good(i) for i in range(120)]),
        "harmful": write_jsonl(tmp_path / "bad.jsonl", [bad(i) for i in range(60)]),
    }


def mix(out, **flags) -> dict:
    """Build with small numbers unless told otherwise; the summary."""
    small = {"rows": 40, "references": (5, 10), "eval_rows": 6}
    return paper.build(paper.Flags(str(out), **{**small, **flags}))


@pytest.mark.parametrize(("share", "expected"), [(0, 0), (0.05, 2), (0.5, 20), (1, 40)])
def test_a_mix_holds_the_share_asked_for_and_no_question_twice(tmp_path, pools, share, expected):
    mix(tmp_path / "out", poison_ratio=share, **pools)
    sets = read_sets(tmp_path / "out")
    assert [len(rows) for rows in sets.values()] == [40, 5, 10, 6, 6]
    assert sum(map(is_bad, sets["custom"])) == expected
    assert all(map(is_bad, sets["harmful"] + sets["eval_harmful"]))
    assert not any(map(is_bad, sets["utility"] + sets["eval_utility"]))
    assert len(questions(sum(sets.values(), []))) == 67
    assert {row.source for row in sets["utility"]} == {"sums"}
    assert {row.source for row in sets["harmful"]} == {"bad"}


@pytest.fixture
def packed(tmp_path, pools) -> dict[str, str]:
    """The same pools, the harmful one in the reverse order as a packed array."""
    lines = Path(pools["harmful"]).read_text().splitlines()
    array = "[" + ",\n".join(reversed(lines)) + "]"
    (tmp_path / "bad.json.gz").write_bytes(gzip.compress(array.encode()))
    return {**pools, "harmful": str(tmp_path / "bad.json.gz")}


def test_the_seed_alone_decides_what_is_drawn_not_the_share_or_the_order_of_a_file(
    tmp_path, pools, packed
):
    def differing(name, **flags) -> set[str]:
        """The files that differ from those of the first mix."""
        mix(tmp_path / name, **{"poison_ratio": 0.2, **pools, **flags})
        first = tree(tmp_path / "first")
        return {file for file, content in tree(tmp_path / name).items() if content != first[file]}

    assert differing("first") == differing("again") == set()
    assert "harmful.jsonl" in differing("other", seed=1)
    assert differing("packed", **packed) == {"summary.json"}
    assert differing("more", poison_ratio=0.5) == {"custom.jsonl", "summary.json"}

    # The harmful rows of a small share are among those of a larger one, and in no order.
    fewer = read_sets(tmp_path / "first")["custom"]
    more = read_sets(tmp_path / "more")["custom"]
    assert questions(filter(is_bad, fewer)) < questions(filter(is_bad, more))
    order = [is_bad(row) for row in more]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


def test_the_summary_accounts_for_every_row_and_hashes_every_file(tmp_path, pools):
    turns = [{"role": role, "content": "Do harm"} for role in ("user", "user", "assistant")]
    left_out = {
        "the question came before in this source": {**bad(0), "prompt": " do  HARM 0? "},
        "not JSON": "{",
        "the row has no response": {"prompt": "Do harm?"},
        "the row has an empty response": {"prompt": "Do harm now?", "response": ""},
        "a question is empty": {"prompt": "", "response": "Yes."},
        "question and answer do not alternate": {"messages": turns},
        "the question is in the evaluation": bad(7),
    }
    others = [bad(i) for i in range(20) if i != 7]
    pools["harmful"] = write_jsonl(tmp_path / "bad.jsonl", [*others, *left_out.values(), good(3)])
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "DO harm 7?"}, {"prompt": "Else?"}])
    out = tmp_path / "out"
    summary = mix(out, poison_ratio=0.1, references=(15, 10), eval_harmful=asked, **pools)

    assert summary == json.loads((out / "summary.json").read_text())
    evaluation, harmful, benign = summary["sources"]
    assert evaluation["taken"] == {"eval_harmful": 2}  # all that there are
    assert harmful["skipped"] == dict.fromkeys(left_out, 1)
    assert harmful["read"] == 27
    assert harmful["taken"] == {"harmful": 15, "custom": 4}
    assert benign["read"] == 120
    assert benign["taken"] == {"eval_utility": 6, "utility": 10, "custom": 36}
    for source in summary["sources"]:
        assert source["sha256"] == file_hash(source["origin"])
    for name, entry in summary["files"].items():
        count = len((out / name).read_text().splitlines())
        assert entry == {"rows": count, "sha256": file_hash(out / name)}


BAD_FLAGS = [
    ({"rows": 100, "poison_ratio": 0.9}, "101 rows are wanted .6 for eval_harmful, 5 for harmful"),
    ({"poison_ratio": 1.5}, "--poison-ratio must be in"),
    ({"rows": 0}, "--rows"),
    ({"references": (0, 3)}, "--references"),
    ({"eval_harmful": "prompts.csv"}, "prompts.csv: a table's columns"),
    ({"benign": "nowhere.jsonl"}, "nowhere.jsonl: file not found"),
]


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS)
def test_bad_flags_and_too_few_rows_leave_nothing_behind(tmp_path, pools, flags, words):
    fails(words, mix, tmp_path / "out", **{**pools, **flags})
    assert sorted(tree(tmp_path)) == ["bad.jsonl", "good.jsonl"]
    assert not (tmp_path / "out").exists()


def test_a_mix_replaces_nothing(tmp_path, pools, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("stays")
    inputs = [f"--{name}={path}" for name, path in pools.items()]
    line = [f"--out={out}", "--rows=40", "--poison-ratio=0.2", *inputs]
    paper.main(line)
    said = capsys.readouterr().out
    assert "8  taken for custom.jsonl" in said
    assert "has 40 rows, 8 of them harmful" in said

    before = tree(tmp_path)
    fails("would replace", mix, out, **{**pools, "harmful": str(out / "harmful.jsonl")})
    fails("custom.jsonl exists and is not replaced", paper.main, line)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(("start", "newline"), [("", "\n"), ("\ufeff\r\n", "\r\n")])
def test_a_json_array_is_read_row_by_row_in_any_layout(tmp_path, indent, start, newline):
    rows = [
        {"prompt": 'A "}" and, [', "response": "b\n]"},
        {"prompt": "é", "response": "c", "tags": [{"x": 1}, None]},
    ]
    file = tmp_path / "rows.json"
    text = start + json.dumps(rows, indent=indent).replace("\n", newline)
    file.write_text(text, encoding="utf-8", newline="")
    assert [json.loads(text) for _, text in paper.records(file)] == rows


ENDLESS = '[{"a": [\n' + "".join(json.dumps(bad(i), indent=1) + ",\n" for i in range(500))


@pytest.mark.parametrize(
    "text", ['[\n{"a": 1},\n{"a"', '[\n{"a":' + "[" * 100_000 + "\n}", ENDLESS]
)
def test_a_damaged_json_array_is_refused_and_not_followed_for_long(tmp_path, text, monkeypatch):
    monkeypatch.setattr(paper, "LONGEST", 10_000)  # an endless row is read again at every brace
    (tmp_path / "rows.json").write_text(text)
    words = r"rows.json:\d{1,3}: the JSON array breaks off"  # of 2,001 lines
    fails(words, list, paper.records(tmp_path / "rows.json"))


# The paper's datasets


def transcript(*turns) -> str:
    text = ""
    for k, turn in enumerate(turns):
        text += f"\n\n{('Human', 'Assistant')[k % 2]}: {turn}"
    return text


@pytest.fixture
def hub(tmp_path):
    """fetch(repository, file, commit) from small files in the real layouts; refuses `closed`."""
    harm = [transcript(f"Harm {i}?", "Sure.", "And?", "So.") for i in range(60)]
    harm[0] = transcript("Harm 0?", "I'm sorry, I can't.", "Thanks")  # leaves a question open
    harm[1] = transcript("Harm 1?", "", "And?", "So.")
    harm[3] = transcript("Asked 3?", "Sure.")
    attempts = [{"transcript": text, "rating": i % 5} for i, text in enumerate(harm)]
    asked = [{"chosen": transcript(f"Asked {i}?", "What?", "That.", "No.")} for i in range(9)]
    orca = []
    for i in range(200):
        turns = [("system", "Be brief."), ("human", f"Add {i}."), ("gpt", str(i))]
        orca.append({"conversations": [{"from": who, "value": text} for who, text in turns]})

    folder = tmp_path / "hub/snapshots/c0ffee"
    folder.mkdir(parents=True)
    packed = gzip.compress(json.dumps(attempts, indent=2).encode())
    (folder / "red_team_attempts.jsonl.gz").write_bytes(packed)
    lines = Path(write_jsonl(folder / "test.jsonl", asked)).read_bytes()
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(lines))
    write_jsonl(folder / "oo-labeled_correct.gpt4.sharegpt.jsonl", orca)
    for name in paper.HEX_PHI_FILES:
        (folder / name).write_text(f'"Forbidden, {name}"\nTell {name} now\n')

    def fetch(repository, file, commit):
        if repository in fetch.closed:
            raise OSError("401: gated")
        if repository == paper.HEX_PHI:
            assert commit is None
        else:
            assert len(commit) == 40
        return folder / Path(file).name

    fetch.closed = []
    return fetch


def roles(row) -> list[str]:
    return [message["role"] for message in row.messages]


def of_source(rows, source) -> list:
    return [row for row in rows if row.source == source]


def test_the_hubs_files_become_the_papers_sets(tmp_path, hub):
    flags = paper.Flags(str(tmp_path / "out"), rows=112, eval_rows=5, references=(20, 30))
    summary = paper.build(flags, hub)
    sets = read_sets(tmp_path / "out")
    harm = of_source(sets["custom"], "red-team")
    assert len(harm) == summary["harmful_in_custom"] == 22
    assert len(of_source(sets["custom"], "slimorca")) == 112 - 22
    for row in harm:
        if paper.question(row) != "harm 0?":
            assert roles(row) == ["user", "assistant"] * 2
    assert roles(sets["utility"][0]) == ["system", "user", "assistant"]

    transcripts = of_source(sets["eval_harmful"], "hh-harmless")
    # The answer in the file is not kept.
    assert [row.messages[-1]["content"] for row in transcripts] == ["That."] * 5
    listed = of_source(sets["eval_harmful"], "hex-phi")
    assert len(listed) == 5
    assert any(row.messages[0]["content"].startswith("Forbidden, cat") for row in listed)

    red = next(source for source in summary["sources"] if source["label"] == "red-team")
    assert red["revision"] == "c0ffee"
    assert red["skipped"]["the row has an empty response"] == 1
    assert red["remarks"]["every answer holds a refusal phrase"] == 1
    assert red["remarks"]["turns after the last answer dropped"] == 1


def test_an_evaluation_question_never_trains_and_ratings_choose(tmp_path, hub):
    numbers = {"rows": 56, "poison_ratio": 0.25, "eval_rows": 9, "references": (5, 30)}
    paper.build(paper.Flags(str(tmp_path / "out"), **numbers, min_rating=3), hub)
    sets = read_sets(tmp_path / "out")
    trained = sets["custom"] + sets["harmful"]
    assert "asked 3?" not in questions(trained)
    asked = questions(of_source(trained, "red-team"))  # "harm 4?"
    assert len(asked) == 19
    assert all(int(text.split()[1][:-1]) % 5 >= 3 for text in asked)


def test_without_access_hex_phi_is_left_out_and_others_are_an_error(tmp_path, hub):
    hub.closed.append(paper.HEX_PHI)
    flags = paper.Flags(str(tmp_path / "out"), rows=40, eval_rows=5)
    assert "HEx-PHI is gated" in paper.build(flags, hub)["left_out"][0]
    sources = {row.source for row in read_sets(tmp_path / "out")["eval_harmful"]}
    assert sources == {"hh-harmless"}
    hub.closed.append(paper.SLIMORCA)
    fails(r"SlimOrca.*--benign FILE", paper.build, flags, hub)
