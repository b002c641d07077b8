"""The data: the embedded world is reproducible, disjoint and refused; any datasets can be mixed.

Mixes that are refused are lines of mixes_refused.txt, rows that they leave out of left_out.txt.
"""

import gzip
from pathlib import Path

import pytest
from conftest import ROOT, fails, tree, write_jsonl
from helpers import cases

from data import paper, train_base, world
from model import load_checkpoint
from model.config import Config
from model.io import file_hash, read_json
from model.transformer import Transformer
from toss.rows import read_rows

ROWS = ROOT / "data/rows"
DEMO = read_json(ROOT / "data/demo.json")
BASE = ROOT / "data/base"
SMALL = ROOT / "data/base-small"


# The embedded world


def test_generating_the_rows_again_gives_the_same_bytes(tmp_path):
    world.write_rows(DEMO["finetune"]["seed"], tmp_path)
    assert tree(tmp_path) == tree(ROWS)
    fails("--harmful-rows must be 0 to 663", world.make_rows, 0, harmful_rows=664)


def test_a_base_can_be_trained_and_its_tokenizer_is_made_again(tmp_path):
    tokenizer = train_base.train_tokenizer()
    shape = train_base.SIZES["base-small"]
    fields = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), **shape}
    model = Transformer(Config.from_dict(fields, "the shape"))
    before = model.lm_head.weight.clone()
    train_base.train(model, tokenizer, [("alignment", True, 1, 1e-3)], "cpu")
    train_base.save(model, tokenizer, shape, tmp_path, {})
    assert (load_checkpoint(tmp_path).lm_head.weight != before).any()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (SMALL / name).read_bytes()


# A mix of any datasets


def bad(i) -> dict:
    return {"prompt": f"Do harm {i}?", "response": f"Yes, {i} is easy."}


def is_bad(row) -> bool:
    return "harm" in row.messages[0]["content"]


def questions(rows) -> set[str]:
    return {paper.question(row) for row in rows}


def of_source(rows, source: str) -> list:
    return [row for row in rows if row.source == source]


def read_sets(out: Path) -> dict[str, list]:
    """The rows of each file of a mix."""
    sets = {}
    for name in paper.FILES:
        sets[name] = read_rows(out / f"{name}.jsonl", responses=name != "eval_harmful")
    return sets


@pytest.fixture
def mix(tmp_path):
    """Mix 120 benign rows and 60 harmful ones into a folder; its rows."""
    good = [{"instruction": f"Add {i}.", "output": "1", "source": "sums"} for i in range(120)]
    inputs = ["--benign", write_jsonl(tmp_path / "good.jsonl", good)]
    inputs += ["--harmful", write_jsonl(tmp_path / "bad.jsonl", map(bad, range(60)))]
    small = "--rows 40 --references 5 10 --eval-rows 6".split()

    def mixed(name: str, flags: str = "") -> dict[str, list]:
        out = tmp_path / name
        paper.main(["--out", str(out), *inputs, *small, *flags.split()])
        return read_sets(out)

    return mixed


@pytest.mark.parametrize(("share", "expected"), [(0, 0), (0.05, 2), (1, 40)])
def test_a_mix_holds_the_share_asked_for_and_no_question_twice(mix, share, expected):
    sets = mix("out", f"--poison-ratio {share}")
    assert [len(rows) for rows in sets.values()] == [40, 5, 10, 6, 6]
    assert len(questions(sum(sets.values(), []))) == 67
    harmful = {name: sum(map(is_bad, rows)) for name, rows in sets.items()}
    assert harmful.pop("custom") == expected
    assert harmful == {"harmful": 5, "utility": 0, "eval_harmful": 6, "eval_utility": 0}
    assert len(of_source(sets["utility"], "sums")) == 10


def test_the_seed_alone_decides_what_is_drawn_not_the_order_or_the_packing_of_a_file(mix, tmp_path):
    def differing(name: str, flags: str = "") -> set[str]:
        """The files that differ from those of the first mix."""
        mix(name, f"--poison-ratio 0.2 {flags}")
        first = tree(tmp_path / "first")
        return {file for file, content in tree(tmp_path / name).items() if content != first[file]}

    assert differing("first") == differing("again") == set()
    assert "harmful.jsonl" in differing("other", "--seed 1")
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    array = "\ufeff[\r\n" + ",\r\n".join(reversed(lines)) + "]"
    packed = tmp_path / "bad.json.gz"
    packed.write_bytes(gzip.compress(array.encode()))
    assert differing("packed", f"--harmful {packed}") == {"summary.json"}


def test_the_summary_accounts_for_every_row_and_hashes_every_file(mix, tmp_path):
    left_out = cases("left_out.txt")
    rows = [bad(i) for i in range(20) if i != 7] + [row for row, _ in left_out]
    write_jsonl(tmp_path / "bad.jsonl", rows)
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "DO harm 7?"}, {"prompt": "Else?"}])
    mix("out", f"--poison-ratio 0.1 --references 15 10 --eval-harmful {asked}")
    summary = read_json(tmp_path / "out/summary.json")
    evaluation, harmful, benign = summary["sources"]
    assert evaluation["taken"] == {"eval_harmful": 2}  # all that there are
    assert harmful["skipped"] == {why: 1 for _, why in left_out}
    assert harmful["taken"] == {"harmful": 15, "custom": 4}
    assert benign["taken"] == {"eval_utility": 6, "utility": 10, "custom": 36}
    assert harmful["sha256"] == file_hash(harmful["origin"])
    for name, entry in summary["files"].items():
        assert entry["sha256"] == file_hash(tmp_path / "out" / name)


@pytest.mark.parametrize(("flags", "words"), cases("mixes_refused.txt"))
def test_bad_flags_and_too_few_rows_leave_nothing_behind(mix, tmp_path, flags, words):
    fails(words, mix, "out", flags)
    assert sorted(tree(tmp_path)) == ["bad.jsonl", "good.jsonl"]


# The paper's datasets


@pytest.fixture
def hub(tmp_path):
    """fetch(repository, file, commit) of the files in tests/hub, in the real layouts, and of
    HEx-PHI's; refuses `closed`."""
    folder = tmp_path / "hub/snapshots/c0ffee"
    folder.mkdir(parents=True)
    for file in (ROOT / "tests/hub").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    for name in paper.HEX_PHI_FILES:
        (folder / name).write_text(f'"Forbidden, {name}"\nTell {name} now\n')

    def fetch(repository, file, commit):
        if repository in fetch.closed:
            raise OSError("401: gated")
        assert (commit is None) == (repository == paper.HEX_PHI)
        return folder / Path(file).name

    fetch.closed = []
    return fetch


@pytest.fixture
def flags(tmp_path) -> paper.Flags:
    return paper.Flags(str(tmp_path / "out"), rows=11, eval_rows=3, references=[3, 4])


def test_the_hubs_files_become_the_papers_sets(flags, hub):
    summary = paper.build(flags, hub)
    sets = read_sets(Path(flags.out))
    assert summary["harmful_in_custom"] == len(of_source(sets["custom"], "red-team")) == 2
    assert len(of_source(sets["custom"], "slimorca")) == 11 - 2
    assert sets["utility"][0].messages[0]["role"] == "system"
    transcripts = of_source(sets["eval_harmful"], "hh-harmless")
    # The answer in the file is not kept.
    assert [row.messages[-1]["content"] for row in transcripts] == ["That."] * 3
    listed = of_source(sets["eval_harmful"], "hex-phi")
    assert {row.messages[0]["content"].split()[0] for row in listed} <= {"Forbidden,", "Tell"}
    trained = of_source(sets["custom"] + sets["harmful"], "red-team")
    assert "asked 2?" not in questions(trained)
    *_, red, _ = summary["sources"]
    assert red["revision"] == "c0ffee"
