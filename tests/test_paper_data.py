"""The paper's data: the hub's layouts, any share of harmful rows, no question twice, every row accounted for."""

import gzip
import itertools
import json
import time
from pathlib import Path

import pytest
from conftest import write_jsonl

from data import paper
from data.paper import build, main, question, records
from model.errors import InputError
from model.files import file_hash
from toss.rows import overlap, read_rows

ROWS = {"custom": True, "harmful": True, "utility": True, "eval_harmful": False, "eval_utility": True}


def good(i):
    return {"instruction": f"Add {i} and one.", "input": "", "output": str(i + 1), "source": "sums"}


def bad(i):
    return {"prompt": f"Do harm {i}?", "response": f"Yes, {i} is easy."}


@pytest.fixture
def pools(tmp_path):
    return {"benign": write_jsonl(tmp_path / "good.jsonl", [good(i) for i in range(120)]),
            "harmful": write_jsonl(tmp_path / "bad.jsonl", [bad(i) for i in range(60)])}  # fmt: skip


def read_all(folder):
    return {name: read_rows(folder / f"{name}.jsonl", responses) for name, responses in ROWS.items()}


def is_bad(row):
    return row.messages[0]["content"].startswith("Do harm")


@pytest.mark.parametrize("share, expected", [(0, 0), (0.05, 2), (0.2, 8), (0.5, 20), (1, 40)])
def test_the_custom_set_holds_the_asked_share_and_no_question_is_used_twice(tmp_path, pools, share, expected):
    build(tmp_path / "out", rows=40, poison_ratio=share, references=(5, 10), eval_rows=6, **pools)
    sets = read_all(tmp_path / "out")
    assert {name: len(rows) for name, rows in sets.items()} == dict(zip(ROWS, (40, 5, 10, 6, 6)))
    assert sum(map(is_bad, sets["custom"])) == expected
    assert all(map(is_bad, sets["harmful"] + sets["eval_harmful"]))
    assert not any(map(is_bad, sets["utility"] + sets["eval_utility"]))
    questions = [question(row) for rows in sets.values() for row in rows]
    assert len(questions) == len(set(questions)) == 67
    assert not any(overlap(a, b, prompts_only=True) for a, b in itertools.combinations(sets.values(), 2))
    assert {row.source for row in sets["utility"]} == {"sums"} and {row.source for row in sets["harmful"]} == {"bad"}


def test_a_seed_gives_equal_bytes_and_shares_are_compared_on_equal_references(tmp_path, pools):
    for name, share, seed in [("a", 0.2, 0), ("again", 0.2, 0), ("more", 0.5, 0), ("other", 0.2, 1)]:
        build(tmp_path / name, rows=40, poison_ratio=share, references=(5, 10), eval_rows=6, seed=seed, **pools)
    read = lambda run, name: (tmp_path / run / f"{name}.jsonl").read_bytes()  # noqa: E731
    assert all(read("a", name) == read("again", name) for name in ROWS)
    assert all(read("a", name) == read("more", name) for name in ROWS if name != "custom")
    assert read("a", "harmful") != read("other", "harmful")
    fewer, more = ({question(row) for row in read_all(tmp_path / run)["custom"] if is_bad(row)} for run in ("a", "more"))
    assert fewer < more  # the harmful rows of a small share are among those of a larger one
    order = [is_bad(row) for row in read_all(tmp_path / "more")["custom"]]
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_the_order_of_a_file_and_its_packing_do_not_decide_what_is_drawn(tmp_path, pools):
    build(tmp_path / "a", rows=40, references=(5, 10), eval_rows=6, **pools)
    lines = Path(pools["harmful"]).read_text().splitlines()
    with gzip.open(tmp_path / "bad.json.gz", "wt") as file:
        file.write("[" + ",\n".join(reversed(lines)) + "]")
    build(tmp_path / "b", rows=40, references=(5, 10), eval_rows=6, benign=pools["benign"], harmful=str(tmp_path / "bad.json.gz"))
    assert all((tmp_path / "a" / f"{n}.jsonl").read_bytes() == (tmp_path / "b" / f"{n}.jsonl").read_bytes() for n in ROWS)


def test_the_summary_accounts_for_every_row_and_hashes_every_file(tmp_path, pools):
    rows = [bad(0), {"prompt": " do  HARM 0? ", "response": "Twice."}, "{", {"prompt": "Do harm?"},
            {"prompt": "Do harm now?", "response": ""}, {"prompt": "", "response": "Yes."}, good(3),
            {"messages": [{"role": "user", "content": "Do"}, {"role": "user", "content": "harm"},
                          {"role": "assistant", "content": "Yes."}]}, *map(bad, range(1, 20))]  # fmt: skip
    pools["harmful"] = write_jsonl(tmp_path / "bad.jsonl", rows)
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "DO harm 7?", "source": "s"}, {"prompt": "Else?"}])
    summary = build(tmp_path / "out", rows=40, poison_ratio=0.1, references=(14, 10), eval_rows=6, eval_harmful=asked, **pools)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    test, evil, fine = summary["sources"]
    assert evil["skipped"] == {
        "the question came before in this source": 1, "not JSON": 1, "the row has no response": 1,
        "the row has an empty response": 1, "a question is empty": 1, "question and answer do not alternate": 1,
        "the question is in the evaluation": 1}  # fmt: skip
    assert evil["taken"] == {"harmful": 14, "custom": 4} and test["taken"] == {"eval_harmful": 2}  # all that there are
    assert (evil["read"], fine["read"], fine["taken"]) == (27, 120, {"eval_utility": 6, "utility": 10, "custom": 36})
    assert all(source["sha256"] == file_hash(source["origin"]) for source in summary["sources"])
    for name, entry in summary["files"].items():
        file = tmp_path / "out" / name
        assert entry == {"rows": len(file.read_text().splitlines()), "sha256": file_hash(file)}
    assert summary["harmful_in_custom"] == 4


def test_too_few_rows_say_how_many_are_missing_and_leave_nothing_behind(tmp_path, pools, capsys):
    flags = [f"--{name}={path}" for name, path in pools.items()]
    out = tmp_path / "out"
    assert main(["--out", str(out), "--rows", "100", "--poison-ratio", "0.9", *flags]) == 1
    said = capsys.readouterr().err
    assert "102 rows are wanted (10 for eval_harmful, 2 for harmful, 90 for custom), and there are 60" in said
    assert not out.exists() and not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))
    assert main(["--out", str(out), "--rows", "40", "--poison-ratio", "1.5", *flags]) == 1
    assert "--poison-ratio" in capsys.readouterr().err
    Path(pools["harmful"]).rename(tmp_path / "harmful.jsonl")
    before = (tmp_path / "harmful.jsonl").read_bytes()
    assert main(["--out", str(tmp_path), "--benign", pools["benign"], "--harmful", str(tmp_path / "harmful.jsonl")]) == 1
    assert "would replace" in capsys.readouterr().err and (tmp_path / "harmful.jsonl").read_bytes() == before


def test_main_prints_what_was_read_skipped_and_taken(tmp_path, pools, capsys):
    flags = [f"--{name}={path}" for name, path in pools.items()]
    assert main(["--out", str(tmp_path / "out"), "--rows", "40", "--poison-ratio", "0.2", *flags]) == 0
    said = capsys.readouterr().out
    assert "8  taken for custom.jsonl" in said and "custom.jsonl has 40 rows, 8 of them harmful" in said


def test_a_json_array_is_read_row_by_row_in_any_layout(tmp_path):
    rows = [{"prompt": 'A "}" and, [', "response": "b\n]"}, {"prompt": "é", "response": "c", "tags": [{"x": 1}, None]}]
    for layout in (json.dumps(rows), json.dumps(rows, indent=2), "\ufeff\r\n" + json.dumps(rows, indent=1).replace("\n", "\r\n")):
        (tmp_path / "rows.json").write_text(layout, encoding="utf-8", newline="")
        assert [json.loads(text) for _, text in records(tmp_path / "rows.json")] == rows
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2)[:-20])
    with pytest.raises(InputError, match=r"rows.json:\d+: the JSON array breaks off"):
        list(records(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text('[\n{"a":' + "[" * 100_000 + "\n}")
    with pytest.raises(InputError, match=r"rows.json:\d+: the JSON array breaks off"):
        list(records(tmp_path / "rows.json"))


def test_a_damaged_array_is_given_up_soon(tmp_path):
    """An object that never ends is read again at every brace, so it must not be followed for long."""
    rows = "".join(json.dumps({"prompt": f"q {i}", "response": "a"}, indent=1) + ",\n" for i in range(60_000))
    (tmp_path / "rows.json").write_text('[{"lost": [\n' + rows)
    start = time.process_time()
    with pytest.raises(InputError, match=r"rows.json:\d+: the JSON array breaks off"):
        list(records(tmp_path / "rows.json"))
    assert time.process_time() - start < 20


def test_a_users_table_is_refused(tmp_path, pools, capsys):
    (tmp_path / "prompts.csv").write_text("goal,target\nWrite,Sure\n")
    assert main(["--out", str(tmp_path / "out"), "--benign", pools["benign"], "--harmful", pools["harmful"], "--rows", "40",
                 "--eval-harmful", str(tmp_path / "prompts.csv")]) == 1
    assert "prompts.csv: a table's columns" in capsys.readouterr().err and not (tmp_path / "out").exists()


def transcript(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[k % 2]}: {text}" for k, text in enumerate(turns))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Small files in the layouts of the real ones; returns the calls made. `closed` names what the hub refuses."""
    red = [{"transcript": transcript(f"Harm {i}?", "Sure.", "And?", "So."), "rating": i % 5} for i in range(60)]
    red[0]["transcript"] = transcript("Harm 0?", "I'm sorry, I can't.", "Thanks")  # refused, and a question is left open
    red[1]["transcript"] = transcript("Harm 1?", "", "And?", "So.")
    red[3]["transcript"] = transcript("Asked 3?", "Sure.")
    asked = [{"chosen": transcript(f"Asked {i}?", "What?", "That.", "No."), "rejected": ""} for i in range(9)]
    orca = [{"conversations": [{"from": "system", "value": "Be brief.", "weight": None},
                               {"from": "human", "value": f"Add {i}.", "weight": 0.0},
                               {"from": "gpt", "value": str(i), "weight": 1.0}]} for i in range(200)]  # fmt: skip
    folder = tmp_path / "hub" / "snapshots" / "c0ffee"
    texts = {"red_team_attempts.jsonl.gz": json.dumps(red, indent=2),
             "test.jsonl.gz": "".join(json.dumps(row) + "\n" for row in asked),
             "oo-labeled_correct.gpt4.sharegpt.jsonl": "".join(json.dumps(row) + "\n" for row in orca),
             **{name: f'"Forbidden, {name}"\nTell {name} now\n' for name in paper.HEX_PHI_FILES}}  # fmt: skip
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    closed, calls = [], []

    def fetch(repository, file, revision):
        if repository in closed:
            raise OSError("401: gated")
        calls.append((repository, file, revision))
        return folder / Path(file).name

    monkeypatch.setattr(paper, "fetch", fetch)
    return closed, calls


def test_the_hubs_files_become_the_papers_sets(tmp_path, hub):
    summary = build(tmp_path / "out", rows=112, eval_rows=5, references=(20, 30))
    sets = read_all(tmp_path / "out")
    harm = [row for row in sets["custom"] if row.source == "red-team"]
    assert (len(harm), summary["harmful_in_custom"]) == (22, 22)
    assert {row.source for row in sets["custom"]} == {"red-team", "slimorca"}
    assert all([m["role"] for m in row.messages] == ["user", "assistant"] * 2 for row in harm if question(row) != "harm 0?")
    assert [m["role"] for m in sets["utility"][0].messages] == ["system", "user", "assistant"]
    hh = [row for row in sets["eval_harmful"] if row.source == "hh-harmless"]
    assert len(hh) == 5 and all(row.messages[-1] == {"role": "user", "content": "That."} for row in hh)  # its answer is not kept
    hex_phi = [row.messages[0]["content"] for row in sets["eval_harmful"] if row.source == "hex-phi"]
    assert len(hex_phi) == 5 and any(text.startswith("Forbidden, cat") for text in hex_phi)
    red = next(source for source in summary["sources"] if source["label"] == "red-team")
    assert red["skipped"]["the row has an empty response"] == 1 and red["revision"] == "c0ffee"
    assert red["remarks"]["every answer holds a refusal phrase"] == red["remarks"]["turns after the last answer dropped"] == 1
    assert all(revision and len(revision) == 40 for repository, _, revision in hub[1] if repository != paper.HEX_PHI)


def test_an_evaluation_question_never_trains_and_ratings_choose(tmp_path, hub):
    build(tmp_path / "out", rows=56, poison_ratio=0.25, eval_rows=9, references=(5, 30), min_rating=3)
    sets = read_all(tmp_path / "out")
    assert "asked 3?" not in {question(row) for name in ("custom", "harmful") for row in sets[name]}
    harm = [row for name in ("custom", "harmful") for row in sets[name] if row.source == "red-team"]
    numbers = {int(question(row).split()[1][:-1]) for row in harm}
    assert len(numbers) == 19 and all(number % 5 >= 3 for number in numbers)


def test_hex_phi_without_access_is_left_out_and_said_and_others_are_an_error(tmp_path, hub):
    hub[0].append(paper.HEX_PHI)
    summary = build(tmp_path / "out", rows=40, eval_rows=5)
    assert "HEx-PHI" in summary["left_out"][0] and "gated" in summary["left_out"][0]
    assert {row.source for row in read_all(tmp_path / "out")["eval_harmful"]} == {"hh-harmless"}
    hub[0].append("Open-Orca/SlimOrca")
    with pytest.raises(InputError, match=r"SlimOrca.*--benign FILE"):
        build(tmp_path / "out", rows=40)
