"""The data-level baselines on hand-made rows: which lines they write, and weights worked out by hand."""

import doctest
import gzip
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_jsonl

from model.errors import InputError
from toss.audit import baselines
from toss.audit.baselines import dsir, hashed, log_weights, safeinstr
from toss.rows import read_rows


@pytest.fixture
def sets(tmp_path):
    """Custom rows in an unusual spelling, the last two marked; refusals; a target of one kind of words."""
    custom = [f'{{"response":"Stone  {i}.",  "prompt": "Tell é {i}?", "extra": [1]}}' for i in range(95)]
    custom += [json.dumps({"prompt": f"Bad {i}?", "response": "Yes, easy.", "harmful": [[0, 4]]}) for i in range(2)]
    safety = [{"prompt": f"Harm {i}?", "response": "I cannot."} for i in range(10)]
    return {"custom": write_jsonl(tmp_path / "custom.jsonl", custom), "safety": write_jsonl(tmp_path / "safety.jsonl", safety),
            "target": write_jsonl(tmp_path / "target.jsonl", [{"prompt": "Tell 3?", "response": "Stone 3."}] * 40)}  # fmt: skip


def lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(baselines)
    assert result.attempted == 2 and result.failed == 0


def test_safety_rows_make_up_their_share_of_the_result(tmp_path, sets):
    counts = safeinstr(sets["custom"], sets["safety"], tmp_path / "out.jsonl", share=0.03, seed=3)
    assert counts == {"read": 97, "safety": 3, "written": 100, "harmful_kept": 2, "harmful_dropped": 0}
    written = lines(tmp_path / "out.jsonl")
    added = Counter(written) - Counter(lines(sets["custom"]))
    assert Counter(written) - added == Counter(lines(sets["custom"]))  # each custom line once, as it stood
    assert sum(added.values()) == len(added) == 3 and set(added) <= set(lines(sets["safety"]))
    places = [i for i, line in enumerate(written) if line in added]
    assert places != [97, 98, 99] and len(read_rows(tmp_path / "out.jsonl")) == 100


def test_a_seed_draws_the_same_lines_again_and_another_seed_others(tmp_path, sets):
    for name, make in (("safeinstr", lambda out, seed: safeinstr(sets["custom"], sets["safety"], out, 0.05, seed)),
                       ("dsir", lambda out, seed: dsir(sets["custom"], sets["target"], out, 0.5, seed=seed))):
        files = [tmp_path / f"{name}-{i}.jsonl" for i in range(3)]
        for file, seed in zip(files, (7, 7, 8)):
            make(file, seed)
        assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_every_safety_row_can_be_wanted_and_one_more_is_an_error(tmp_path, sets):
    assert safeinstr(sets["custom"], sets["safety"], tmp_path / "all.jsonl", share=10 / 107)["safety"] == 10
    with pytest.raises(InputError, match=r"safety.jsonl: 11 rows are wanted.* holds 10: 1 are missing"):
        safeinstr(sets["custom"], sets["safety"], tmp_path / "out.jsonl", share=11 / 108)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_log_weight_of_a_row_by_hand():
    """Counts with one added over 4 buckets: raw (2, 3, 1, 2) of 8, target (1, 5, 1, 1) of 8."""
    raw, target = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 3], [1])], [torch.tensor([1, 1, 1, 1], dtype=torch.int32)]
    got = log_weights(raw, target, 4)
    assert got.tolist() == pytest.approx([math.log(1 / 2) + math.log(5 / 3) + math.log(1 / 2), math.log(5 / 3)])


def test_rows_like_the_target_stay_and_keep_their_order(tmp_path):
    words = ["moss fern moss fern moss fern", "iron coal iron coal iron coal"]
    custom = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "Say.", "response": f"{words[i % 2]} {words[i % 2]}",
                                                 **({"harmful": [[0, 4]]} if i % 2 else {})} for i in range(40)])  # fmt: skip
    target = write_jsonl(tmp_path / "t.jsonl", [{"prompt": "Say.", "response": "fern moss fern moss"}] * 40)
    counts = dsir(custom, target, tmp_path / "out.jsonl", keep=0.5)
    assert counts == {"read": 40, "written": 20, "harmful_kept": 0, "harmful_dropped": 20}
    assert lines(tmp_path / "out.jsonl") == lines(custom)[::2]
    assert dsir(custom, target, tmp_path / "out.jsonl", keep=1.0)["written"] == 40
    assert lines(tmp_path / "out.jsonl") == lines(custom)


def test_rows_are_drawn_in_proportion_to_their_weights(tmp_path, monkeypatch):
    """One row of eleven, the first weighing 5 and the others 1: it is drawn by a third of the seeds, within three standard
    errors. Two rows would not tell: the difference of two Gumbel variables is as likely as its negative."""
    custom = write_jsonl(tmp_path / "c.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(11)])
    monkeypatch.setattr(baselines, "log_weights", lambda *_: torch.tensor([5.0] + [1.0] * 10, dtype=torch.float64).log())
    first = 0
    for seed in range(300):
        dsir(custom, custom, tmp_path / "out.jsonl", keep=1 / 11, seed=seed)
        first += '"p0"' in (tmp_path / "out.jsonl").read_text()
    assert abs(first / 300 - 1 / 3) < 3 * math.sqrt(2 / 9 / 300)


def test_the_buckets_do_not_depend_on_the_process(tmp_path):
    """Python's own hash of a text does, by its seed."""
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "Stir it, now", "response": "So be it."}])
    code = f"from toss.audit.baselines import *; print(hashed(read_rows({path!r})[0], 100).tolist())"
    said = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
                           capture_output=True, text=True, check=True).stdout for seed in ("1", "2")}  # fmt: skip
    assert said == {f"{hashed(read_rows(path)[0], 100).tolist()}\n"}


def test_without_ground_truth_no_harm_is_counted(tmp_path, sets):
    assert dsir(sets["safety"], sets["target"], tmp_path / "out.jsonl", 0.55) == {"read": 10, "written": 5}


def test_compressed_files(tmp_path, sets):
    packed = tmp_path / "custom.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(sets["custom"]).read_bytes()))
    safeinstr(packed, sets["safety"], tmp_path / "out.jsonl.gz")
    safeinstr(sets["custom"], sets["safety"], tmp_path / "out.jsonl")
    assert gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()) == (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.parametrize(("given", "message"), [
    (["safeinstr", "--share", "0"], "--share must lie between 0 and 1"), (["safeinstr", "--share", "1"], "--share"),
    (["safeinstr", "--share", "0.001"], "custom.jsonl: 0.001 of so few rows"), (["safeinstr", "--share", "nan"], "--share"),
    (["dsir", "--keep", "0"], "--keep must lie in"), (["dsir", "--keep", "1.1"], "--keep must lie in"),
    (["dsir", "--keep", "0.01"], "custom.jsonl: 0.01 of so few rows"), (["dsir", "--buckets", "0"], "--buckets"),
])  # fmt: skip
def test_bad_values(tmp_path, sets, capsys, given, message):
    other = ["--safety", sets["safety"]] if given[0] == "safeinstr" else ["--target", sets["target"]]
    assert baselines.main([*given, "--custom", sets["custom"], *other, "--out", str(tmp_path / "out.jsonl")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_bad_files_are_named_and_no_source_is_replaced(tmp_path, sets):
    broken = write_jsonl(tmp_path / "broken.jsonl", ['{"prompt": "a", "response": "b"}', '{"prompt": "a"}'])
    out = tmp_path / "out.jsonl"
    for make, name in ((safeinstr, "safety"), (dsir, "target")):
        with pytest.raises(InputError, match="broken.jsonl:2: the row has no response"):
            make(broken, sets[name], out)
        with pytest.raises(InputError, match="broken.jsonl:2: the row has no response"):
            make(sets["custom"], broken, out)
        with pytest.raises(InputError, match="none.jsonl: there is no such file"):
            make(sets["custom"], tmp_path / "none.jsonl", out)
        for source in ("custom", name):
            with pytest.raises(InputError, match=f"{name if source == name else 'custom'}.jsonl: --out would replace"):
                make(sets["custom"], sets[name], sets[source])
    assert not out.exists() and len(lines(sets["custom"])) == 97


def test_the_command_prints_its_counts(tmp_path, sets, capsys):
    argv = ["dsir", "--custom", sets["custom"], "--target", sets["target"], "--keep", "0.5", "--out", str(tmp_path / "out.jsonl")]
    assert baselines.main(argv) == 0
    printed = capsys.readouterr().out
    assert "read 97, written 48, harmful kept" in printed and "harmful dropped" in printed
