"""The three scripts as users see them: what they write, skip and refuse, and what they inherit.

A result carries its record; run.json only fills in what a command line leaves out.
"""

import json
import re
import shutil

import pytest
import torch
from conftest import (
    ROOT,
    edit_json,
    make_base,
    read_jsonl,
    run,
    script_module,
    sources,
    write_jsonl,
)
from helpers import paragraphs, refused, said, session, succeed
from safetensors.torch import load_file

from model.io import digest, file_hash, made_from, read_json
from toss.config import TrainConfig
from toss.workbench import flags
from toss.workbench.records import read_record

ADAPTER = "adapter_model.safetensors"
SELECTION = "selection.safetensors"
SESSIONS = paragraphs("sessions.txt")
FAST_LR = {"rank": 2, "lr": 1e-2}  # of conftest.FAST
FINETUNE = {**FAST_LR, "epochs": 1, "batch_size": 4}


@pytest.mark.parametrize("title", SESSIONS)
def test_a_session(title, place, theirs, capsys):
    session(SESSIONS[title], place, capsys)


# What they write


def test_scores_hold_a_loss_for_each_token_and_what_it_belongs_to(trained):
    scores = load_file(trained / "scores.safetensors")
    assert {name: str(tensor.dtype) for name, tensor in scores.items()} == {
        "input_ids": "torch.int32",
        "offsets": "torch.int64",
        "response": "torch.bool",
        "harmful": "torch.bool",
        "loss_utility": "torch.float32",
        "loss_degraded": "torch.float32",
    }
    assert len(scores["offsets"]) == 11
    assert scores["offsets"][-1] == len(scores["loss_utility"])
    assert scores["harmful"].any()
    assert torch.equal(scores["loss_degraded"] > 0, scores["response"])


def test_each_result_says_what_it_was_made_from(trained, files):
    succeed(f"select.py --run {trained} --discard 0.2 --keep-eos --pro 1")
    method = trained / "methods/toss-pro"
    mask = method / SELECTION
    records = {}
    for name in ("degraded", "scores.safetensors", f"methods/toss-pro/{SELECTION}"):
        records[name] = read_record(trained / name)
        assert not {"seconds", "commit"} & records[name].keys()  # costs are in log/costs.jsonl
    degraded, scores, selection = records.values()
    custom = file_hash(files["custom"])
    round_scores = digest(load_file(method / "round-1/scores.safetensors"), {})
    assert degraded["inputs"] == {"--harmful": file_hash(files["harmful"])}
    assert scores["inputs"].keys() == {"--custom", "utility", "degraded"}
    inputs = {"--custom": custom, "methods/toss-pro/round-1/scores": round_scores}
    assert selection["inputs"] == inputs
    expected = {"method": "toss", "pro": 1, "discard": 0.2, "keep_eos": True}
    assert selection["settings"] == expected

    # A folder's record has the hashes of its files, a file's header one of record and tensors.
    model = read_record(method / "model")
    assert model["files"][ADAPTER] == file_hash(method / "model" / ADAPTER)
    place = "methods/toss-pro/selection"
    assert model["inputs"] == {"--custom": custom, place: digest(load_file(mask), {})}
    assert model["settings"].items() >= {**FINETUNE, "dtype": "float32"}.items()

    # A degraded adapter warns of itself.
    for folder in ("degraded", "utility", "methods/toss-pro/round-1/degraded"):
        header = made_from(trained / folder / ADAPTER)
        is_degraded = folder.endswith("degraded")
        assert ("Do not merge it" in header.get("warning", "")) == is_degraded
        assert (trained / folder / "README.md").exists() == is_degraded


def test_run_json_has_the_form_of_the_demos_file(trained, files, base):
    content = read_json(trained / "run.json")
    assert content.items() >= {**files, "model": str(base), "template": "chat"}.items()
    assert content["max_length"] == 2048
    assert content["reference"] == {**TrainConfig().recipe(), **FINETUNE}
    assert "finetune" not in content
    succeed(f"select.py --run {trained} --lr 0.5 --method sft")
    assert read_json(trained / "run.json")["finetune"]["lr"] == 0.5
    demo = read_json(flags.DEMO)
    others = {"skip_empty", "template", "finetune", "reference", *files, "model", "max_length"}
    assert content.keys() <= demo.keys() | others


def test_each_result_has_a_line_of_what_it_cost(trained):
    costs = {line["stage"]: line for line in read_jsonl(trained / "log/costs.jsonl")}
    assert costs.keys() == {"degraded", "utility", "scores"}
    assert costs["scores"].keys() >= {"seconds", "peak_memory_gib", "torch", "threads"}
    tokens = len(load_file(trained / "scores.safetensors")["input_ids"])
    assert costs["scores"]["tokens"] == 2 * tokens


def test_the_log_of_a_stage_holds_each_step_once(trained):
    for seed in (1, 2):
        succeed(f"select.py --run {trained} --overwrite --seed {seed}")
    lines = read_jsonl(trained / "log/toss.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0].keys() == {"step", "steps", "loss", "grad_norm", "lr"}


# What is refused


def test_what_was_made_from_something_else_is_refused(trained, files, capsys):
    """The harmful set has changed; then theta^h is trained on it, and the scores are old."""
    write_jsonl(files["harmful"], [{"prompt": "a", "response": "b"}])
    for name in ("score", "select"):
        error = refused(capsys, f"{name}.py --run {trained}")
        assert "was made from other inputs (changed since: " in error
    succeed(f"train.py --run {trained} --overwrite")
    error = refused(capsys, f"select.py --run {trained}")
    assert "scores.safetensors was made from other inputs (changed since: degraded)" in error


def test_an_earlier_result_of_another_base_is_refused(trained, tmp_path, files, capsys):
    """One made of the same rows, beside another that fits."""
    other = make_base(tmp_path / "other", seed=1)
    run = tmp_path / "new"
    succeed(f"train.py --run {run} {sources(files, other)}")
    shutil.copytree(trained / "utility", run / "utility", dirs_exist_ok=True)
    error = refused(capsys, f"score.py --run {run} --custom {files['custom']}")
    assert "utility was made from other inputs (changed since: base_sha256)" in error


def test_the_settings_of_an_adapter_without_a_record_are_part_of_what_it_is(
    theirs, base, files, capsys
):
    line = f"score.py --run {theirs} --model {base} --custom {files['custom']}"
    succeed(line)
    edit_json(theirs / "degraded/adapter_config.json", lora_alpha=4000)
    assert "exists with other settings or inputs (different: degraded" in refused(capsys, line)


# run.json


def test_run_json_decides_nothing(trained, capsys):
    """What it says of settings does not count beside a result's own record."""
    edit_json(trained / "run.json", reference={"lr": 0.5})
    assert "different: lr" in refused(capsys, f"train.py --run {trained}", fast=False)
    assert "skipped" in said(capsys, f"score.py --run {trained}")


# Where settings come from


def settings_of(line: str) -> dict:
    """The settings in force: the paper's < data/demo.json < run.json < the command line."""
    name, *words = line.split()
    if name == "select.py":
        return vars(script_module("select").arguments(words))
    parser = flags.script_parser(name, "", harmful="", utility="", custom="")
    flags.add_training_flags(parser)
    section = "reference" if name == "train.py" else "finetune"
    return vars(flags.parse(parser, words, section))


SETTINGS = (ROOT / "tests/settings.jsonl").read_text().replace("{root}", str(ROOT)).splitlines()


@pytest.mark.parametrize("line", SETTINGS)
def test_the_defaults_are_the_papers_below_the_run_and_the_command_line(line, tmp_path):
    case = json.loads(line)
    if "run" in case:
        (tmp_path / "run.json").write_text(json.dumps(case["run"]))
    args = settings_of(f"{case['command']} --run {tmp_path}")
    assert args.items() >= case["settings"].items()


def test_without_inputs_the_demos_settings_apply_under_the_command_line(tmp_path):
    demo = read_json(flags.DEMO)
    args = settings_of(f"train.py --run {tmp_path}/new --lr 0.5")
    assert args.items() >= {**demo["reference"], "lr": 0.5}.items()
    args = settings_of(f"select.py --run {tmp_path}/new")
    assert args.items() >= {**demo["finetune"], "max_length": demo["max_length"]}.items()
    assert args["discard"] == demo["discard"]
    for name in ("model", "harmful", "custom"):
        assert args[name] == str(ROOT / demo[name])


# As programs


def test_a_stage_fails_as_a_program(trained):
    """One that succeeds as a program is in test_code.py."""
    done = run("score.py", "--run", trained, "--template", "human")
    assert done.returncode == 1
    assert re.fullmatch("error: .* was begun with another base or prompt form .*\n", done.stderr)


ASYNC = "import select, subprocess, asyncio; assert select.select([], [], [], 0) == ([], [], [])"


@pytest.mark.parametrize("words", [("-c", ASYNC), ("-m", "pytest", "-V"), ("-m", "pip", "-V")])
def test_select_py_does_not_hide_the_standard_library(words):
    done = run(*words)
    assert done.returncode == 0, done.stderr
