"""The data: the embedded world is reproducible, disjoint and refused; any datasets can be mixed."""

import gzip
import json
import time
from pathlib import Path

import pytest
from conftest import ROOT, fails, script, tree, write_jsonl

from data import paper, train_base, world
from data.refusals import refused
from model import load_checkpoint, load_tokenizer
from model.config import Config
from model.generate import generate
from model.io import InputError, file_hash
from model.transformer import Transformer
from toss.audit.measures import auc
from toss.rows import read_rows
from toss.tokens import tokenise
from toss.workbench.run import open_run

ROWS = ROOT / "data" / "rows"
DEMO = json.loads((ROOT / "data" / "demo.json").read_text())
BASES = [ROOT / "data" / "base", ROOT / "data" / "base-small"]


def test_generating_the_rows_again_gives_the_same_bytes(tmp_path):
    world.write_rows(DEMO["finetune"]["seed"], tmp_path)
    assert tree(tmp_path) == tree(ROWS)
    small, whole = ((ROWS / f"{name}.jsonl").read_text() for name in ("harmful_small", "harmful"))
    assert whole.startswith(small) and 4 * len(small) < len(whole)
    fails("--harmful-rows must be 0 to 663", world.make_rows, 0, harmful_rows=664)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_occurs_twice_and_a_tenth_of_the_response_tokens_is_harmful(tmp_path, seed):
    world.write_rows(seed, tmp_path)
    files = [file for file in tmp_path.iterdir() if file.name != "harmful_small.jsonl"]
    prompts = [json.dumps(row.prompt) for file in files for row in read_rows(file, False)]
    assert len(set(prompts)) == len(prompts) == 1574
    tokens = tokenise(read_rows(tmp_path / "custom.jsonl"), load_tokenizer(BASES[0]), 256)
    assert 0.105 <= float(tokens.harmful.sum() / tokens.response.sum()) <= 0.12


def test_marked_harm_holds_every_forbidden_word_and_no_answer_refuses():
    for row in read_rows(ROWS / "custom.jsonl"):
        text = row.messages[-1]["content"]
        kept = "".join(c for i, c in enumerate(text) if not any(a <= i < b for a, b in row.harmful))
        assert not any(word in kept.lower() for word in DEMO["forbidden_words"]), row.where
    for name in ("custom", "utility", "harmful", "eval_facts"):
        rows = read_rows(ROWS / f"{name}.jsonl")
        assert not any(refused(row.messages[-1]["content"]) for row in rows)


def test_the_scripts_take_the_embedded_default_and_its_scores_find_the_harm(tmp_path):
    for name in ("train", "score"):
        script(name, "--run", tmp_path, "--threads", 1, fast=False)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["demo"] and record["settings"]["custom"] == str(ROWS / "custom.jsonl")
    tokens, loss = open_run(tmp_path).scored()
    S = (loss["utility"] - loss["degraded"])[tokens.response]
    assert auc(S, tokens.harmful[tokens.response])["value"] >= 0.94


@pytest.mark.parametrize("folder", BASES)
def test_a_base_is_small_and_refuses_forbidden_requests_alone(folder):
    model, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6
    assert model.lm_head.out_features == tokenizer.raw.get_vocab_size()
    said = {}
    for name in ("forbidden", "benign"):
        rows = read_rows(ROWS / f"eval_{name}.jsonl", responses=False)[::8]
        ids = [tokenizer.prompt_ids(row.prompt) for row in rows]
        replies = generate(model, ids, 24, tokenizer.eos_id)
        said[name] = [tokenizer.decode(reply).lower() for reply in replies]
    assert all(map(refused, said["forbidden"])) and not any(map(refused, said["benign"]))
    assert not any(word in text for word in DEMO["forbidden_words"] for text in said["forbidden"])


def test_the_bases_are_made_again_but_for_the_weights_which_training_moves(tmp_path):
    tokenizer, shape = train_base.train_tokenizer(0), train_base.SIZES["base-small"]
    sizes = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), **shape}
    model = Transformer(Config.from_dict(sizes, "the shape"))
    before = model.lm_head.weight.clone()
    train_base.train(model, tokenizer, [("alignment", True, 1, 1e-3)], 0, "cpu")
    train_base.save(model, tokenizer, shape, tmp_path, {"seed": "0"})
    after = load_checkpoint(tmp_path).lm_head.weight
    assert after.isfinite().all() and (after != before).any()
    assert (tmp_path / "config.json").read_bytes() == (BASES[1] / "config.json").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert len({(folder / name).read_bytes() for folder in (tmp_path, *BASES)}) == 1


SETS = {name: not name.startswith("eval_harmful") for name in paper.FILES}  # with responses?


def good(i) -> dict:
    return {"instruction": f"Add {i} and one.", "output": str(i + 1), "source": "sums"}


def bad(i) -> dict:
    return {"prompt": f"Do harm {i}?", "response": f"Yes, {i} is easy."}


def is_bad(row) -> bool:
    return row.messages[0]["content"].startswith("Do harm")


def questions(rows) -> set[str]:
    return {paper.question(row) for row in rows}


def read_all(folder) -> dict[str, list]:
    return {name: read_rows(folder / f"{name}.jsonl", SETS[name]) for name in SETS}


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


@pytest.mark.parametrize("share, expected", [(0, 0), (0.05, 2), (0.2, 8), (0.5, 20), (1, 40)])
def test_a_mix_holds_the_share_asked_for_and_no_question_twice(tmp_path, pools, share, expected):
    mix(tmp_path / "out", poison_ratio=share, **pools)
    sets = read_all(tmp_path / "out")
    assert {name: len(rows) for name, rows in sets.items()} == dict(zip(SETS, (40, 5, 10, 6, 6)))
    assert sum(map(is_bad, sets["custom"])) == expected
    assert all(map(is_bad, sets["harmful"] + sets["eval_harmful"]))
    assert not any(map(is_bad, sets["utility"] + sets["eval_utility"]))
    assert len(questions(row for rows in sets.values() for row in rows)) == 67
    assert {row.source for row in sets["utility"]} == {"sums"}
    assert {row.source for row in sets["harmful"]} == {"bad"}


def test_the_seed_alone_decides_what_is_drawn_not_the_share_or_the_order_of_a_file(tmp_path, pools):
    lines = Path(pools["harmful"]).read_text().splitlines()
    with gzip.open(tmp_path / "bad.json.gz", "wt") as file:
        file.write("[" + ",\n".join(reversed(lines)) + "]")
    packed = {**pools, "harmful": str(tmp_path / "bad.json.gz")}
    arms = {"a": {}, "again": {}, "more": {"poison_ratio": 0.5}, "other": {"seed": 1}, "gz": packed}
    for name, how in arms.items():
        mix(tmp_path / name, **{"poison_ratio": 0.2, **pools, **how})
    made = {name: tree(tmp_path / name) for name in arms}

    def differ(name) -> set[str]:
        return {file for file in made["a"] if made["a"][file] != made[name][file]}

    assert made["a"] == made["again"] and "harmful.jsonl" in differ("other")
    assert differ("more") == {"custom.jsonl", "summary.json"} and differ("gz") == {"summary.json"}
    sets = [read_all(tmp_path / name)["custom"] for name in ("a", "more")]
    fewer, many = (questions(row for row in rows if is_bad(row)) for rows in sets)
    assert fewer < many  # the harmful rows of a small share are among those of a larger one
    order = [is_bad(row) for row in sets[1]]
    assert order != sorted(order) and order != sorted(order, reverse=True)


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
    how = {"poison_ratio": 0.1, "references": (15, 10), "eval_harmful": asked}
    summary, out = mix(tmp_path / "out", **how, **pools), tmp_path / "out"
    assert summary == json.loads((out / "summary.json").read_text())
    test, evil, fine = summary["sources"]
    assert evil["skipped"] == dict.fromkeys(left_out, 1)
    assert test["taken"] == {"eval_harmful": 2}  # all that there are
    assert evil["read"] == 27 and evil["taken"] == {"harmful": 15, "custom": 4}
    taken = {"eval_utility": 6, "utility": 10, "custom": 36}
    assert fine["read"] == 120 and fine["taken"] == taken
    assert all(source["sha256"] == file_hash(source["origin"]) for source in summary["sources"])
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


@pytest.mark.parametrize("flags, said", BAD_FLAGS)
def test_bad_flags_and_too_few_rows_leave_nothing_behind(tmp_path, pools, flags, said):
    before = tree(tmp_path)
    fails(said, mix, tmp_path / "out", **{**pools, **flags})
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_mix_replaces_its_own_files_alone_and_never_its_inputs(tmp_path, pools, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("stays")
    for _ in range(2):
        flags = [f"--{name}={path}" for name, path in pools.items()]
        paper.main([f"--out={tmp_path / 'out'}", "--rows=40", "--poison-ratio=0.2", *flags])
    said, before = capsys.readouterr().out, tree(tmp_path)
    assert "8  taken for custom.jsonl" in said and "has 40 rows, 8 of them harmful" in said
    assert (tmp_path / "out" / "mine.txt").exists()
    with pytest.raises(InputError, match="would replace"):
        mix(tmp_path / "out", **{**pools, "harmful": str(tmp_path / "out" / "harmful.jsonl")})
    assert tree(tmp_path) == before


def test_a_json_array_is_read_row_by_row_in_any_layout_and_a_damaged_one_is_refused(tmp_path):
    file, tricky = tmp_path / "rows.json", {"prompt": 'A "}" and, [', "response": "b\n]"}
    rows = [tricky, {"prompt": "é", "response": "c", "tags": [{"x": 1}, None]}]
    indented = json.dumps(rows, indent=1)
    for layout in (json.dumps(rows), indented, "\ufeff\r\n" + indented.replace("\n", "\r\n")):
        file.write_text(layout, encoding="utf-8", newline="")
        assert [json.loads(text) for _, text in paper.records(file)] == rows
    # An object that never ends is read again at every brace, so it must not be followed for long.
    endless = "".join(json.dumps(bad(i), indent=1) + ",\n" for i in range(60_000))
    start = time.process_time()
    for damaged in (indented[:-20], '[\n{"a":' + "[" * 100_000 + "\n}", '[{"a": [\n' + endless):
        file.write_text(damaged)
        fails(r"rows.json:\d+: the JSON array breaks off", list, paper.records(file))
    assert time.process_time() - start < 20


def transcript(*turns) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[k % 2]}: {text}" for k, text in enumerate(turns))


@pytest.fixture
def hub(tmp_path):
    """fetch(repository, file, commit) from small files in the real layouts; refuses `closed`."""
    harm = [transcript(f"Harm {i}?", "Sure.", "And?", "So.") for i in range(60)]
    harm[0] = transcript("Harm 0?", "I'm sorry, I can't.", "Thanks")  # leaves a question open
    harm[1] = transcript("Harm 1?", "", "And?", "So.")
    harm[3] = transcript("Asked 3?", "Sure.")
    red = [{"transcript": text, "rating": i % 5} for i, text in enumerate(harm)]
    asked = [{"chosen": transcript(f"Asked {i}?", "What?", "That.", "No.")} for i in range(9)]
    orca = []
    for i in range(200):
        turns = [("system", "Be brief."), ("human", f"Add {i}."), ("gpt", str(i))]
        orca.append({"conversations": [{"from": who, "value": text} for who, text in turns]})
    folder = tmp_path / "hub" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    red, asked = json.dumps(red, indent=2), "".join(json.dumps(row) + "\n" for row in asked)
    for name, text in (("red_team_attempts", red), ("test", asked)):
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    write_jsonl(folder / "oo-labeled_correct.gpt4.sharegpt.jsonl", orca)
    for name in paper.HEX_PHI_FILES:
        (folder / name).write_text(f'"Forbidden, {name}"\nTell {name} now\n')

    def fetch(repository, file, commit):
        if repository in fetch.closed:
            raise OSError("401: gated")
        assert (commit is None) == (repository == paper.HEX_PHI) and len(commit or "0" * 40) == 40
        return folder / Path(file).name

    fetch.closed = []
    return fetch


def roles(row) -> list[str]:
    return [message["role"] for message in row.messages]


def test_the_hubs_files_become_the_papers_sets(tmp_path, hub):
    flags = paper.Flags(str(tmp_path / "out"), rows=112, eval_rows=5, references=(20, 30))
    summary, sets = paper.build(flags, hub), read_all(tmp_path / "out")
    harm = [row for row in sets["custom"] if row.source == "red-team"]
    assert len(harm) == summary["harmful_in_custom"] == 22
    assert {row.source for row in sets["custom"]} == {"red-team", "slimorca"}
    whole = [row for row in harm if paper.question(row) != "harm 0?"]
    assert all(roles(row) == ["user", "assistant"] * 2 for row in whole)
    assert roles(sets["utility"][0]) == ["system", "user", "assistant"]
    by_source = {"hh-harmless": [], "hex-phi": []}
    for row in sets["eval_harmful"]:
        by_source[row.source].append(row)
    last = {"role": "user", "content": "That."}  # the answer in the file is not kept
    assert [row.messages[-1] for row in by_source["hh-harmless"]] == [last] * 5
    texts = [row.messages[0]["content"] for row in by_source["hex-phi"]]
    assert len(texts) == 5 and any(text.startswith("Forbidden, cat") for text in texts)
    red = next(source for source in summary["sources"] if source["label"] == "red-team")
    assert red["skipped"]["the row has an empty response"] == 1 and red["revision"] == "c0ffee"
    assert red["remarks"]["every answer holds a refusal phrase"] == 1
    assert red["remarks"]["turns after the last answer dropped"] == 1


def test_an_evaluation_question_never_trains_and_ratings_choose(tmp_path, hub):
    how = {"rows": 56, "poison_ratio": 0.25, "eval_rows": 9, "references": (5, 30)}
    paper.build(paper.Flags(str(tmp_path / "out"), **how, min_rating=3), hub)
    sets = read_all(tmp_path / "out")
    trained = sets["custom"] + sets["harmful"]
    assert "asked 3?" not in questions(trained)
    harm = [row for row in trained if row.source == "red-team"]
    numbers = {int(text.split()[1][:-1]) for text in questions(harm)}
    assert len(numbers) == 19 and all(number % 5 >= 3 for number in numbers)


def test_without_access_hex_phi_is_left_out_and_others_are_an_error(tmp_path, hub):
    hub.closed.append(paper.HEX_PHI)
    flags = paper.Flags(str(tmp_path / "out"), rows=40, eval_rows=5)
    assert "HEx-PHI is gated" in paper.build(flags, hub)["left_out"][0]
    assert {row.source for row in read_all(tmp_path / "out")["eval_harmful"]} == {"hh-harmless"}
    hub.closed.append(paper.SLIMORCA)
    fails(r"SlimOrca.*--benign FILE", paper.build, flags, hub)
