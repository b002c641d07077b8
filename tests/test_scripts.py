"""The three scripts as users see them: what they write, skip and refuse, and what they inherit.

A result carries its record; run.json only fills in what a command line leaves out.
"""

import json
import re
import shutil
import sys
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from conftest import ROOT, edit_json, make_base, read_jsonl, run, sources, tree, write_jsonl
from helpers import call, refused, said
from safetensors.torch import load_file

from model.io import file_hash, made_from, read_json, tensors_hash
from toss.config import TrainConfig
from toss.workbench import flags, runfile
from toss.workbench.files import read_scores
from toss.workbench.results import read_record
from toss.workbench.run import open_run

ADAPTER = "adapter_model.safetensors"
SELECTION = "selection.safetensors"


# What they write


def test_scores_hold_a_loss_for_each_response_token(trained, files):
    file = trained / "scores.safetensors"
    scores = load_file(file)
    assert {name: str(tensor.dtype) for name, tensor in scores.items()} == {
        "input_ids": "torch.int32",
        "offsets": "torch.int64",
        "response": "torch.bool",
        "harmful": "torch.bool",
        "loss_utility": "torch.float32",
        "loss_degraded": "torch.float32",
    }
    assert len(scores["offsets"]) == 11
    assert scores["offsets"][0] == 0
    assert scores["offsets"][-1] == len(scores["input_ids"])
    response = scores["response"]
    for name in ("loss_utility", "loss_degraded"):
        assert (scores[name][response] > 0).all()
        assert (scores[name][~response] == 0).all()
    tokens, losses = read_scores(file, files["custom"])
    assert torch.equal(losses["degraded"], scores["loss_degraded"])
    assert tokens.harmful.any()


def test_keep_is_the_loss_mask_and_score_is_what_it_went_by(trained, files, capsys):
    output = said(capsys, f"select.py --run {trained}")
    tokens, losses = read_scores(trained / "scores.safetensors", files["custom"])
    response = tokens.response
    selection = load_file(trained / "methods/toss" / SELECTION)
    discarded = response & ~selection["keep"]
    assert not selection["keep"][~response].any()
    assert int(discarded.sum()) == int(0.1 * int(response.sum()))
    assert f"{int(discarded.sum())} of {int(response.sum())} response tokens discarded" in output
    S = losses["utility"] - losses["degraded"]
    assert torch.equal(selection["score"][response], S[response])


def test_each_result_says_what_it_was_made_from(trained, files):
    assert call(f"select.py --run {trained} --discard 0.2 --keep-eos") == 0
    degraded = read_record(trained / "degraded")
    scores = read_record(trained / "scores.safetensors")
    method = read_record(trained / "methods/toss")
    for record, name in ((degraded, "train.py"), (scores, "score.py"), (method, "select.py")):
        assert name in record["code"]
        assert record["template"] == "chat"
        assert record["max_length"] == 2048
        assert len(record["base_sha256"]) == len(record["tokenizer_sha256"]) == 64
        assert not {"seconds", "commit"} & record.keys()  # costs are in run.json alone

    inputs = {
        "--custom": file_hash(files["custom"]),
        "utility": tensors_hash(trained / "utility" / ADAPTER),
        "degraded": tensors_hash(trained / "degraded" / ADAPTER),
    }
    assert degraded["inputs"] == {"--harmful": file_hash(files["harmful"])}
    assert scores["inputs"] == inputs
    assert method["inputs"] == {**inputs, "scores": tensors_hash(trained / "scores.safetensors")}
    expected = {"method": "toss", "discard": 0.2, "keep_eos": True, "lr": 1e-2, "seed": 0}
    assert method["settings"].items() >= expected.items()
    assert method["tokens_sha256"] == scores["tokens_sha256"]
    assert scores["skipped"] == scores["cut"] == 0

    # A folder's record has the hashes of its files, a file's header one of record and tensors.
    mask = trained / "methods/toss" / SELECTION
    hashes = method.pop("files")
    assert hashes[SELECTION] == file_hash(mask)
    assert hashes[f"model/{ADAPTER}"] == file_hash(trained / "methods/toss/model" / ADAPTER)
    assert read_record(mask) == method
    assert len(made_from(mask)["sha256"]) == 64


def test_the_degraded_adapter_warns_of_itself(trained):
    for role in ("degraded", "utility"):
        header = made_from(trained / role / ADAPTER)
        assert ("Do not merge it" in header.get("warning", "")) == (role == "degraded")
        assert (trained / role / "README.md").exists() == (role == "degraded")


def test_run_json_says_what_is_inherited_and_what_each_stage_took(trained, files, base):
    content = read_json(trained / "run.json")
    assert content.keys() >= {"demo", "commit", "versions"}
    assert content["settings"].keys() <= set(runfile.INHERITED)
    assert content["settings"]["model"] == str(base)
    for path in (*files.values(), f"{base}/model.safetensors"):
        assert content["inputs"][path] == file_hash(path)
    assert content["stages"].keys() == {"degraded", "utility", "scores"}
    facts = {"seconds", "tokens", "peak_memory_gib", "torch", "threads"}
    opened = open_run(trained)
    for name, stage in content["stages"].items():
        assert stage.keys() >= facts
        assert stage["tokens"] > 0
        assert read_record(opened.path(name)).items() >= stage["recipe"].items()
        assert opened.stale(name) == []


def test_the_log_of_a_stage_holds_each_step_once(trained):
    for seed in (1, 2):
        assert call(f"select.py --run {trained} --overwrite --seed {seed}") == 0
    logs = sorted(file.stem for file in (trained / "log").iterdir())
    assert logs == ["degraded", "toss", "utility"]
    lines = read_jsonl(trained / "log/toss.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["steps"] == 3
        assert line["loss"] > 0
        assert line["grad_norm"] > 0


# What is skipped, and what is refused


def test_what_exists_is_skipped_and_what_differs_is_refused(trained, capsys):
    assert call(f"select.py --run {trained}") == 0
    before = tree(trained)
    for name in ("train", "score", "select"):
        output = said(capsys, f"{name}.py --run {trained}")
        assert "skipped" in output
        assert "wrote" not in output
    line = f"select.py --run {trained} --discard 0.2"
    assert "discard 0.1 there, 0.2 now" in refused(capsys, line)
    assert tree(trained) == before

    # Give it another name, or replace it.
    assert call(f"{line} --name other") == 0
    assert call(f"{line} --overwrite") == 0
    for name in ("toss", "other"):
        assert read_record(trained / "methods" / name)["settings"]["discard"] == 0.2
    for flag in ("--batch-tokens 64", "--gradient-checkpointing", "--threads 1"):
        assert "skipped" in said(capsys, f"{line} {flag}")  # these do not change the result


def test_a_refused_reference_is_refused_before_the_other_one_is_trained(trained, capsys):
    for missing in ("degraded", "utility"):
        shutil.move(trained / missing, trained / "aside")
        before = tree(trained)
        assert "lr 0.01 there, 0.5 now" in refused(capsys, f"train.py --run {trained} --lr 0.5")
        assert tree(trained) == before
        shutil.move(trained / "aside", trained / missing)


def test_what_was_made_from_something_else_is_refused(trained, tmp_path, base, files, capsys):
    """An adapter of another run, which was made from another harmful set."""
    files["harmful"] = write_jsonl(tmp_path / "o.jsonl", [{"prompt": "a", "response": "b"}])
    assert call(f"train.py --run {tmp_path}/other {sources(files, base)}") == 0
    shutil.rmtree(trained / "degraded")
    shutil.copytree(tmp_path / "other" / "degraded", trained / "degraded")
    for name in ("score", "select"):
        error = refused(capsys, f"{name}.py --run {trained}")
        assert "degraded does not fit this run (changed: --harmful)" in error
    assert open_run(trained).stale("scores") == ["degraded"]


def test_an_earlier_result_of_another_base_is_refused(trained, tmp_path, files, capsys):
    """One made of the same rows, beside another that fits."""
    other = make_base(tmp_path / "other", seed=1)
    run = tmp_path / "new"
    assert call(f"train.py --run {run} {sources(files, other)}") == 0
    shutil.copytree(trained / "utility", run / "utility", dirs_exist_ok=True)
    error = refused(capsys, f"score.py --run {run} --custom {files['custom']}")
    assert "utility does not fit this run (changed: base_sha256)" in error


def test_a_reference_in_the_place_of_the_other_is_refused(trained, capsys):
    """Accepted, it would turn the sign of S."""
    shutil.copytree(trained, trained.with_name("copy"))
    for role, other in (("degraded", "utility"), ("utility", "degraded")):
        shutil.rmtree(trained / role)
        shutil.copytree(trained.with_name("copy") / other, trained / role)
        before = tree(trained)
        for line in ("score.py", "score.py --overwrite", "select.py"):
            error = refused(capsys, f"{line} --run {trained}")
            assert "holds the result of another stage" in error
        error = refused(capsys, f"train.py --run {trained}")
        assert "stage utility there, degraded now" in error
        assert tree(trained) == before
    # Now they are exchanged.


def test_theta_h_of_a_round_is_no_utility_model_and_no_method(trained, capsys):
    assert call(f"select.py --run {trained} --pro 1 --pro-samples 2") == 0
    theta_h = trained / "methods/toss-pro/round-1/degraded"
    shutil.rmtree(trained / "utility")
    shutil.copytree(theta_h, trained / "utility")
    (trained / "utility/record.json").unlink()
    assert "result of another stage: round-1" in refused(capsys, f"score.py --run {trained}")
    shutil.copytree(theta_h, trained / "methods/copy/model")
    line = f"toss.audit.diagnose --run {trained} --methods copy"
    assert "result of another stage: round-1" in refused(capsys, line)


def test_the_settings_of_an_adapter_without_a_record_are_part_of_what_it_is(trained, capsys):
    (trained / "degraded/record.json").unlink()
    (trained / "utility/record.json").unlink()
    assert call(f"score.py --run {trained} --overwrite") == 0
    assert "skipped" in said(capsys, f"score.py --run {trained}")
    edit_json(trained / "degraded/adapter_config.json", lora_alpha=4000)
    error = refused(capsys, f"score.py --run {trained}")
    assert "scores.safetensors exists with other settings or inputs (different: degraded" in error


def test_a_record_that_was_edited_still_protects_another_result(trained, capsys):
    edit_json(trained / "degraded/record.json", comment="mine")
    before = tree(trained)
    assert "lr 0.01 there, 0.5 now" in refused(capsys, f"train.py --run {trained} --lr 0.5")
    assert tree(trained) == before
    assert "made again" in said(capsys, f"train.py --run {trained}")


# run.json


@pytest.mark.parametrize("content", ["", "{"])
def test_a_lost_run_json_is_written_again_from_the_inputs(content, trained, base, files, capsys):
    assert call(f"select.py --run {trained}") == 0
    before = tree(trained)
    settings = read_json(trained / "run.json")["settings"]
    if content:
        (trained / "run.json").write_text(content)
    else:
        (trained / "run.json").unlink()
    custom = f"--model {base} --custom {files['custom']}"
    assert "skipped" in said(capsys, f"train.py --run {trained} {sources(files, base)}")
    assert "skipped" in said(capsys, f"score.py --run {trained} {custom}")
    assert "skipped" in said(capsys, f"select.py --run {trained} {custom}")
    again = read_json(trained / "run.json")
    assert again["settings"] == settings
    assert again["stages"].keys() == {"degraded", "utility", "scores", "methods/toss"}
    now = tree(trained)
    del before["run.json"], now["run.json"]
    assert now == before


def test_run_json_decides_nothing(trained, capsys):
    """What it says of a stage, or of no stage, does not count beside the stage's own record."""
    line = f"select.py --run {trained}"
    assert call(line) == 0
    stages = read_json(trained / "run.json")["stages"]
    stages["methods/toss"]["recipe"]["settings"]["discard"] = 0.9
    edit_json(trained / "run.json", stages=stages)
    assert "skipped" in said(capsys, line)
    edit_json(trained / "run.json", "stages", "hashes", "inputs")
    assert "skipped" in said(capsys, line)


# Where settings come from


def settings_of(line: str):
    """The settings in force: the paper's < data/demo.json < run.json < the command line."""
    name, *words = line.split()
    parser = flags.script_parser(name, "", harmful="", utility="", custom="")
    parser.add_argument("--discard", type=float, default=0.1)
    flags.add_training_flags(parser)
    return flags.parse(parser, words, references=name == "train.py")


def test_the_defaults_are_the_papers(tmp_path):
    args = settings_of(f"select.py --run {tmp_path}/new --model m --custom c.jsonl")
    assert TrainConfig.of(args) == TrainConfig()
    paper = {
        "lr": 1e-5,
        "epochs": 2,
        "batch_size": 64,
        "rank": 16,
        "alpha": 16,
        "targets": "q_proj,v_proj",
        "schedule": "constant",
        "seed": 0,
        "max_length": 2048,
        "discard": 0.1,
        "demo": False,
    }
    assert vars(args).items() >= paper.items()


@pytest.mark.parametrize(
    ("script", "stage"), [("train.py", "reference"), ("select.py", "finetune")]
)
def test_without_inputs_the_demos_settings_apply_under_the_command_line(script, stage, tmp_path):
    demo = read_json(flags.DEMO)
    known = {field.name for field in fields(TrainConfig)} | {"max_length", "threads"}
    assert demo[stage].keys() <= known
    args = vars(settings_of(f"{script} --run {tmp_path}/new"))
    assert args["demo"]
    assert args["model"] == str(ROOT / "data/base")
    assert args["discard"] == demo["discard"]
    assert args.items() >= demo[stage].items()
    assert settings_of(f"{script} --run {tmp_path}/new --lr 0.5").lr == 0.5


def test_the_run_comes_between_the_demo_and_the_command_line(files, tmp_path):
    settings = {
        "model": "/gone",
        "custom": files["custom"],
        "template": "human",
        "max_length": 77,
        "lr": 9.0,
    }
    content = {"format": runfile.FORMAT, "demo": True, "settings": settings}
    (tmp_path / "run.json").write_text(json.dumps(content))

    demo = settings_of(f"select.py --run {tmp_path}")
    assert (demo.custom, demo.template, demo.max_length) == (files["custom"], "human", 77)
    assert demo.model == str(ROOT / "data/base")  # that of the demo moved with the checkout
    assert demo.lr == read_json(flags.DEMO)["finetune"]["lr"]  # not a setting of the run as a whole

    given = settings_of(f"select.py --run {tmp_path} --custom /d")
    assert (given.custom, given.max_length, given.lr) == ("/d", 77, 1e-5)

    inputs = "--model /n --harmful h --utility u"
    anew = settings_of(f"train.py --run {tmp_path} --overwrite {inputs}")
    assert (anew.model, anew.template, anew.max_length, anew.lr) == ("/n", None, 2048, 1e-5)
    assert not anew.demo


def test_what_comes_from_the_run_is_printed(trained, capsys):
    assert "max_length = 2048" in said(capsys, f"score.py --run {trained}")


def test_a_run_that_is_begun_anew_keeps_nothing_of_the_old_one(trained, base, files):
    line = f"train.py --run {trained} --overwrite --max-length 1024 {sources(files, base)}"
    assert call(line) == 0
    settings = read_json(trained / "run.json")["settings"]
    assert settings["max_length"] == 1024
    assert "custom" not in settings


def test_another_base_does_not_inherit_the_revision_of_the_first(tmp_path):
    settings = {"model": "someone/model", "revision": "abc"}
    content = {"format": runfile.FORMAT, "demo": False, "settings": settings}
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert settings_of(f"select.py --run {tmp_path} --custom c").revision == "abc"
    assert settings_of(f"select.py --run {tmp_path} --model other/model").revision is None


# As programs


def test_a_stage_runs_as_a_program_and_fails_as_one(trained):
    good = run("score.py", "--run", trained, "--base", "--overwrite")
    assert good.returncode == 0
    assert f"wrote {trained}/scores.safetensors" in good.stdout
    assert not good.stderr
    bad = run("score.py", "--run", trained, "--template", "human")
    assert bad.returncode == 1
    assert re.fullmatch("error: .* was begun with --template chat, .*\n", bad.stderr)


ASYNC = "import select, subprocess, asyncio; assert select.select([], [], [], 0) == ([], [], [])"


@pytest.mark.parametrize("words", [("-c", ASYNC), ("-m", "pytest", "-V"), ("-m", "pip", "-V")])
def test_select_py_does_not_hide_the_standard_library(words):
    done = run(*words)
    assert done.returncode == 0, done.stderr


def test_the_guard_finds_the_real_module_where_it_is_an_extension(tmp_path, monkeypatch):
    """This interpreter may have `select` built in: a stand-in further down the path is found."""
    (tmp_path / "select.py").write_text("real = True\n")
    spec = spec_from_file_location("select", ROOT / "select.py")
    monkeypatch.setattr(sys, "path", [str(ROOT), str(tmp_path), *sys.path])
    monkeypatch.setitem(sys.modules, "select", module_from_spec(spec))
    spec.loader.exec_module(sys.modules["select"])
    assert sys.modules["select"].real
