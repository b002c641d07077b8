"""The three scripts from end to end: what they write, what they skip, what they refuse, and select.py's guard."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_base, write_jsonl
from safetensors.torch import load_file

from model import load_adapter, load_checkpoint
from model.files import file_hash, made_from, save_tensors


def tree(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def edit_json(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_scores_and_selection_keep_the_contract(trained, files, scripts):
    scores = load_file(trained / "scores.safetensors")
    n, rows = len(scores["input_ids"]), 10
    assert scores["input_ids"].dtype == torch.int32 and scores["offsets"].dtype == torch.int64
    assert scores["offsets"].tolist()[0] == 0 and scores["offsets"].tolist()[-1] == n and len(scores["offsets"]) == rows + 1
    for name in ("loss_utility", "loss_degraded"):
        assert scores[name].dtype == torch.float32 and (scores[name][~scores["response"]] == 0).all()
    assert scripts["select"]("--run", trained) == 0
    keep = load_file(trained / "methods/toss/selection.safetensors")["keep"]
    response = scores["response"]
    assert keep[~response].all() and int((~keep).sum()) == int(0.1 * int(response.sum()) + 1e-9)
    S = (scores["loss_utility"] - scores["loss_degraded"])[response]
    assert S[~keep[response]].min() >= S[keep[response]].max()
    record = json.loads((trained / "run.json").read_text())
    assert record["settings"]["model"].startswith("/") and record["inputs"][files["custom"]] == file_hash(files["custom"])
    assert {"degraded", "utility", "scores", "methods/toss"} == record["stages"].keys()
    assert all({"seconds", "tokens", "peak_memory_gib"} <= stage.keys() for stage in record["stages"].values())
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert {"stage", "step", "loss", "grad_norm"} <= log[0].keys() and {line["stage"] for line in log} == {"degraded", "utility", "toss"}


def test_the_base_can_be_scored_too(trained, scripts):
    assert scripts["score"]("--run", trained, "--base") == 1  # another result is there
    assert scripts["score"]("--run", trained, "--base", "--overwrite") == 0
    assert "loss_base" in load_file(trained / "scores.safetensors")


def test_a_degraded_adapter_says_what_it_is(trained):
    header = made_from(trained / "degraded" / "adapter_model.safetensors")
    assert header["role"] == "degraded" and "harmful data on purpose" in header["warning"]
    assert "harmful data on purpose" in (trained / "degraded" / "README.md").read_text()
    assert "warning" not in made_from(trained / "utility" / "adapter_model.safetensors")


def test_plain_fine_tuning_needs_neither_references_nor_scores(tmp_path, base, files, scripts):
    run = tmp_path / "plain"
    assert scripts["select"]("--run", run, "--method", "sft", "--model", base, "--custom", files["custom"]) == 0
    assert load_file(run / "methods/sft/selection.safetensors")["keep"].all()
    load_adapter(load_checkpoint(base), run / "methods/sft/model")


def test_plain_fine_tuning_with_and_without_scores_is_the_same(tmp_path, base, trained, files, scripts):
    scripts["select"]("--run", trained, "--method", "sft")
    scripts["select"]("--run", tmp_path / "plain", "--method", "sft", "--model", base, "--custom", files["custom"])
    with_scores, without = (load_file(run / "methods/sft/model/adapter_model.safetensors") for run in (trained, tmp_path / "plain"))
    assert with_scores.keys() == without.keys() and all(torch.equal(with_scores[k], without[k]) for k in without)


def test_a_name_keeps_two_settings_of_a_method_apart(trained, scripts, capsys):
    assert scripts["select"]("--run", trained, "--discard", "0.3", "--name", "toss-0.3") == 0
    assert scripts["select"]("--run", trained) == 0
    gone = {name: int((~load_file(trained / f"methods/{name}/selection.safetensors")["keep"]).sum()) for name in ("toss", "toss-0.3")}
    assert gone["toss-0.3"] > gone["toss"] > 0
    stages = json.loads((trained / "run.json").read_text())["stages"]
    assert stages["methods/toss-0.3"]["recipe"]["method"] == stages["methods/toss"]["recipe"]["method"] == "toss"
    for bad in ("../up", "a/b", "base", "degraded", ".."):
        assert "cannot name a folder" in refused(scripts, capsys, "select", "--run", trained, "--name", bad)


def test_the_base_can_take_the_utility_models_place(trained, scripts, capsys):
    assert "--base" in refused(scripts, capsys, "select", "--run", trained, "--method", "base")
    assert scripts["score"]("--run", trained, "--base", "--overwrite") == 0
    assert scripts["select"]("--run", trained, "--method", "base") == 0
    assert (trained / "methods/base-reference/selection.safetensors").exists() and not (trained / "methods/base").exists()


def test_inputs_may_be_gone_once_they_were_used(trained, files, scripts):
    for name in ("harmful", "utility"):
        Path(files[name]).unlink()
    assert scripts["select"]("--run", trained) == 0
    assert set(json.loads((trained / "run.json").read_text())["inputs"]) >= set(files.values())


def test_each_script_writes_down_its_own_settings_only(trained, base, scripts):
    assert scripts["score"]("--run", trained, "--batch-tokens", "999") == 0
    settings = json.loads((trained / "run.json").read_text())["settings"]
    assert (settings["lr"], settings["rank"]) == (1e-2, 2)  # as trained, not score.py's defaults
    assert "method" not in settings


def test_merge_gives_the_adapters_logits(trained, base, scripts):
    assert scripts["select"]("--run", trained, "--merge") == 0
    adapted = load_checkpoint(base)
    load_adapter(adapted, trained / "methods/toss/model")
    merged = load_checkpoint(trained / "methods/toss/model/merged")
    ids = torch.arange(40).view(2, 20)
    assert torch.allclose(merged(ids), adapted(ids), atol=1e-4) and not torch.allclose(merged(ids), load_checkpoint(base)(ids), atol=1e-3)


def test_the_same_seed_twice_gives_the_same_tensor_files(tmp_path, base, files, scripts):
    for name in ("one", "two"):
        run = tmp_path / name / "run"
        scripts["train"]("--run", run, "--model", base, "--harmful", files["harmful"], "--utility", files["utility"])
        scripts["score"]("--run", run, "--custom", files["custom"])
        scripts["select"]("--run", run, "--pro", "1", "--pro-samples", "2")
    one, two = ({name: h for name, h in tree(tmp_path / n / "run").items() if name.endswith(".safetensors")} for n in ("one", "two"))
    assert one == two and len(one) == 7


def test_what_is_there_is_skipped_and_what_differs_is_refused(trained, scripts, capsys):
    before = tree(trained)
    assert scripts["score"]("--run", trained) == 0 and "skipped" in capsys.readouterr().out
    assert tree(trained) == before
    assert scripts["select"]("--run", trained) == 0
    before = tree(trained)
    assert scripts["select"]("--run", trained, "--discard", "0.2") == 1
    assert "discard 0.1 there, 0.2 now" in capsys.readouterr().err and tree(trained) == before
    assert scripts["select"]("--run", trained, "--discard", "0.2", "--overwrite") == 0
    assert tree(trained) != before


def test_a_stage_that_lost_a_file_is_made_again(trained, scripts, capsys):
    whole = tree(trained)
    (trained / "degraded" / "adapter_model.safetensors").unlink()
    assert scripts["train"]("--run", trained) == 0 and "no longer complete" in capsys.readouterr().out
    assert tree(trained)["degraded/adapter_model.safetensors"] == whole["degraded/adapter_model.safetensors"]
    assert scripts["select"]("--run", trained) == 0
    shutil.rmtree(trained / "methods/toss/model")
    assert scripts["select"]("--run", trained) == 0 and (trained / "methods/toss/model/adapter_model.safetensors").exists()


def test_identity_is_inherited_with_a_line_and_never_contradicted(trained, scripts, capsys):
    assert scripts["score"]("--run", trained) == 0
    assert "max_length = 2048" in capsys.readouterr().out
    assert scripts["score"]("--run", trained, "--max-length", "64") == 1
    assert "--max-length 2048" in capsys.readouterr().err


def refused(scripts, capsys, script, *argv) -> str:
    """Run a script that must fail; what it said."""
    assert scripts[script](*argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_train_needs_all_three_inputs_or_none(tmp_path, base, files, scripts, capsys):
    said = refused(scripts, capsys, "train", "--run", tmp_path / "r", "--model", base, "--harmful", files["harmful"])
    assert "--utility is not given" in said and not (tmp_path / "r").exists()


@pytest.mark.parametrize("which", ["harmful", "utility"])
def test_a_broken_reference_file_stops_before_anything_is_written(tmp_path, base, files, scripts, capsys, which):
    write_jsonl(Path(files[which]), [{"prompt": "a", "response": "b"}, "{broken"])
    said = refused(scripts, capsys, "train", "--run", tmp_path / "r", "--model", base, "--harmful", files["harmful"], "--utility", files["utility"])
    assert f"{files[which]}:2" in said and not (tmp_path / "r").exists()


def test_an_empty_custom_file(trained, tmp_path, scripts, capsys):
    empty = write_jsonl(tmp_path / "none.jsonl", [])
    before = tree(trained)
    assert "no rows" in refused(scripts, capsys, "score", "--run", trained, "--custom", empty, "--overwrite")
    assert tree(trained) == before


def test_scripts_out_of_order(tmp_path, base, files, trained, scripts, capsys):
    assert "train.py" in refused(scripts, capsys, "score", "--run", tmp_path / "r", "--model", base, "--custom", files["custom"])
    (trained / "scores.safetensors").unlink()
    assert "score.py" in refused(scripts, capsys, "select", "--run", trained)
    assert "train.py" in refused(scripts, capsys, "score", "--run", tmp_path / "absent", "--custom", files["custom"])


def test_another_custom_file_is_refused(trained, tmp_path, files, scripts, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "response": "b"}])
    assert "custom_sha256" in refused(scripts, capsys, "score", "--run", trained, "--custom", other)
    assert "custom_sha256" in refused(scripts, capsys, "select", "--run", trained, "--custom", other)
    write_jsonl(Path(files["custom"]), [{"prompt": "a", "response": "b"}])  # the same path, other rows
    assert "custom_sha256" in refused(scripts, capsys, "select", "--run", trained)


def test_another_model_or_tokenizer_is_refused(trained, tmp_path, base, scripts, capsys):
    other = make_base(tmp_path / "other", seed=1)
    assert "begun with --model" in refused(scripts, capsys, "select", "--run", trained, "--model", other)
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    edit_json(trained / "run.json", lambda record: record["settings"].update(model=str(copy)))
    assert scripts["select"]("--run", trained) == 0  # the same files elsewhere
    shutil.copyfile(other / "model.safetensors", copy / "model.safetensors")
    assert "base_sha256" in refused(scripts, capsys, "select", "--run", trained, "--method", "toss", "--overwrite")
    shutil.copyfile(base / "model.safetensors", copy / "model.safetensors")
    edit_json(copy / "tokenizer.json", lambda tokenizer: tokenizer["added_tokens"].pop())
    assert "tokenizer_sha256" in refused(scripts, capsys, "score", "--run", trained, "--overwrite")


def test_an_adapter_from_another_run_is_refused(trained, tmp_path, base, files, scripts, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "response": "b"}])
    scripts["train"]("--run", tmp_path / "r", "--model", base, "--harmful", other, "--utility", files["utility"])
    shutil.rmtree(trained / "degraded")
    shutil.copytree(tmp_path / "r" / "degraded", trained / "degraded")
    assert "data_sha256" in refused(scripts, capsys, "score", "--run", trained, "--overwrite")
    assert "data_sha256" in refused(scripts, capsys, "select", "--run", trained)


def test_pro_needs_to_know_how_the_degraded_model_was_trained(trained, scripts, capsys):
    edit_json(trained / "run.json", lambda record: record["stages"].pop("degraded"))
    assert "how it was trained" in refused(scripts, capsys, "select", "--run", trained, "--pro", "1")


def test_scores_that_are_not_finite_name_the_row(trained, scripts, capsys):
    path = trained / "scores.safetensors"
    tensors, header = load_file(path), made_from(path)
    tensors["loss_degraded"][int(tensors["offsets"][4]) - 1] = float("nan")
    save_tensors(tensors, path, header)
    assert "loss_degraded is not finite on row 3" in refused(scripts, capsys, "select", "--run", trained)
    assert not (trained / "methods").exists()


@pytest.mark.parametrize("damage", [b"", b"\x10\0\0\0\0\0\0\0{}", b"version https://git-lfs", b"\xff" * 500])
@pytest.mark.parametrize("which", ["base", "scores"])
def test_a_broken_tensor_file_is_named(trained, tmp_path, base, files, scripts, capsys, damage, which):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    path = copy / "model.safetensors" if which == "base" else trained / "scores.safetensors"
    path.write_bytes(damage)
    model = () if which == "scores" else ("--model", copy, "--custom", files["custom"], "--method", "sft")
    run = trained if which == "scores" else tmp_path / "new"
    assert path.name in refused(scripts, capsys, "select", "--run", run, *model)


def test_paths_that_are_no_files(trained, tmp_path, base, files, scripts, capsys):
    refused(scripts, capsys, "score", "--run", trained, "--custom", tmp_path)
    assert "absent" in refused(scripts, capsys, "select", "--run", tmp_path / "r", "--method", "sft", "--model", tmp_path / "absent",
                               "--custom", files["custom"])  # fmt: skip


def test_sample_all_without_ground_truth_is_an_error(tmp_path, base, files, scripts, capsys):
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": f"a {i}", "response": "b c d"} for i in range(4)])
    run = tmp_path / "r"
    scripts["train"]("--run", run, "--model", base, "--harmful", files["harmful"], "--utility", files["utility"])
    scripts["score"]("--run", run, "--custom", plain)
    assert "marks no harm" in refused(scripts, capsys, "select", "--run", run, "--method", "sample-all")


@pytest.mark.parametrize("flags", [("--discard", "1"), ("--discard", "-0.1"), ("--method", "best"), ("--rank", "0"), ("--lr", "0"),
                                   ("--targets", "q_proj,mystery"), ("--device", "abacus"), ("--pro", "1", "--method", "sft"),
                                   ("--lr", "nan"), ("--seed", "-1"), ("--device", "meta"), ("--pro-samples", "3")])  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_written(trained, scripts, capsys, flags):
    before = tree(trained)
    assert scripts["select"]("--run", trained, *flags, fast_flags=False) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert tree(trained) == before


def test_unknown_flags_are_refused(trained, scripts):
    with pytest.raises(SystemExit) as stop:
        scripts["select"]("--run", trained, "--discrad", "0.1")
    assert stop.value.code == 2


def test_training_that_diverges_writes_nothing(tmp_path, base, files, scripts, capsys):
    argv = ["--run", tmp_path / "r", "--model", base, "--harmful", files["harmful"], "--utility", files["utility"],
            "--lr", "1e30", "--epochs", "9", "--batch-size", "1", "--rank", "2"]  # fmt: skip
    assert scripts["train"](*argv, fast_flags=False) == 1
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "r" / "degraded").exists()


def test_overlapping_rows_are_warned_of(tmp_path, base, files, scripts, capsys):
    scripts["train"]("--run", tmp_path / "r", "--model", base, "--harmful", files["harmful"], "--utility", files["harmful"])
    assert "warning: harmful and utility reference sets: 5 of 5 rows are in both" in capsys.readouterr().out
    scripts["score"]("--run", tmp_path / "r", "--custom", files["harmful"])
    assert "warning: custom and harmful reference set: 5 of 5" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train", "score", "select"])
def test_each_script_runs_as_a_program_from_the_root(script):
    result = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "--overwrite" in result.stdout and f"{script}.py" in result.stdout


def test_a_whole_stage_runs_as_a_program_and_fails_as_one(tmp_path, base, files):
    call = [sys.executable, "select.py", "--run", str(tmp_path / "r"), "--method", "sft", "--model", str(base), "--custom"]
    good = subprocess.run([*call, files["custom"], "--epochs", "1"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert good.returncode == 0 and "wrote" in good.stdout and "Traceback" not in good.stderr
    bad = subprocess.run([*call, "absent.jsonl"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr


@pytest.mark.parametrize("call", [
    ["-c", "import select, subprocess, asyncio; assert hasattr(select, 'select') and not hasattr(select, 'main')"],
    ["-c", "import importlib, select; importlib.import_module('select').select([], [], [], 0)"],
    ["-m", "pytest", "--version"],
    ["-m", "pip", "--version"],
])  # fmt: skip
def test_select_py_does_not_hide_the_standard_library(call):
    result = subprocess.run([sys.executable, *call], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_guard_finds_the_real_module_where_it_is_an_extension(tmp_path):
    """Also where this interpreter has `select` built in: a stand-in for it further down the path must be found."""
    shutil.copyfile(ROOT / "select.py", tmp_path / "select.py")
    library = tmp_path / "library"
    library.mkdir()
    (library / "select.py").write_text("real = True\n")
    code = (f"import sys; from importlib.util import spec_from_file_location as s, module_from_spec as m; sys.modules.pop('select', None); "
            f"sys.path[:0] = [{str(tmp_path)!r}, {str(library)!r}]; spec = s('select', {str(tmp_path / 'select.py')!r}); "
            "module = m(spec); sys.modules['select'] = module; spec.loader.exec_module(module); import select; assert select.real")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "library", capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
