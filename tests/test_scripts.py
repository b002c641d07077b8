"""The three scripts as their users see them: files, skipping, refusing, settings, texts."""

import doctest
import json
import re
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    damage,
    edit_json,
    make_base,
    read_jsonl,
    run,
    script,
    sources,
    tree,
    write_jsonl,
)
from helpers import call, refused, said, same_tensors
from safetensors.torch import load_file, save_file

from model import load_adapter, load_checkpoint
from model.io import file_hash, made_from, read_json, save_tensors, tensors_hash
from toss.config import TrainConfig
from toss.workbench import flags, runfile
from toss.workbench.files import load_selection, read_scores
from toss.workbench.results import read_record
from toss.workbench.run import open_run

ADAPTER = "adapter_model.safetensors"


def tensor_files(folder: Path) -> dict[str, bytes]:
    """The content of every safetensors file below a folder."""
    return {
        name: content for name, content in tree(folder).items() if name.endswith(".safetensors")
    }


def test_scores_and_selection_keep_the_contract(trained, files, capsys):
    scores = load_file(trained / "scores.safetensors")
    n, response = len(scores["input_ids"]), scores["response"]
    assert (scores["input_ids"].dtype, scores["offsets"].dtype) == (torch.int32, torch.int64)
    assert scores["offsets"][[0, -1]].tolist() == [0, n] and len(scores["offsets"]) == 11
    for name in ("loss_utility", "loss_degraded"):
        assert scores[name].dtype == torch.float32 and len(scores[name]) == n
        assert (scores[name][~response] == 0).all() and (scores[name][response] > 0).all()
    out, mask = said(capsys, f"select.py --run {trained}"), "methods/toss/selection.safetensors"
    keep, gone = load_file(trained / mask)["keep"], int(0.1 * int(response.sum()))
    assert not keep[~response].any()  # it is the loss mask
    assert int((response & ~keep).sum()) == gone
    assert f"{gone} of {int(response.sum())} response tokens discarded" in out
    S = scores["loss_utility"] - scores["loss_degraded"]
    tokens, losses = read_scores(trained / "scores.safetensors", files["custom"])
    assert torch.equal(losses["utility"] - losses["degraded"], S) and tokens.harmful.any()
    selection = load_selection(trained / mask, tokens)
    assert torch.equal(selection["keep"], keep)
    assert torch.equal(selection["score"][response], S[response])


def test_each_result_says_what_it_was_made_from(trained, files):
    assert call(f"select.py --run {trained} --discard 0.2 --keep-eos") == 0
    places = ("degraded", "scores.safetensors", "methods/toss")
    degraded, scores, method = (read_record(trained / place) for place in places)
    for record in (degraded, scores, method):
        assert (record["template"], record["max_length"]) == ("chat", 2048)
        assert len(record["base_sha256"]) == len(record["tokenizer_sha256"]) == 64
        assert not {"seconds", "commit"} & record.keys()  # costs are in run.json alone
    inputs = {role: tensors_hash(trained / role / ADAPTER) for role in ("degraded", "utility")}
    inputs["--custom"] = file_hash(files["custom"])
    assert degraded["inputs"] == {"--harmful": file_hash(files["harmful"])}
    assert scores["inputs"] == inputs
    assert method["inputs"] == inputs | {"scores": tensors_hash(trained / "scores.safetensors")}
    assert degraded["settings"].items() >= {"lr": 1e-2, "rank": 2, "seed": 0}.items()
    expected = {"method": "toss", "discard": 0.2, "keep_eos": True, "lr": 1e-2}
    assert method["settings"].items() >= expected.items()
    assert (scores["skipped"], scores["cut"], scores["dtype"]) == (0, 0, "float32")
    mask = trained / "methods/toss/selection.safetensors"
    response = load_file(trained / "scores.safetensors")["response"]
    gone = response & ~load_file(mask)["keep"]
    assert method["discarded"] == int(gone.sum()) > 0
    assert method["tokens_sha256"] == scores["tokens_sha256"]
    made_by = {
        "degraded": "train.py",
        "scores.safetensors": "score.py",
        "methods/toss": "select.py",
    }
    for place, name in made_by.items():
        assert name in read_record(trained / place)["code"]
    own = method.pop("files")  # the hashes of the files that the record lies with
    for name in ("selection.safetensors", f"model/{ADAPTER}"):
        assert own[name] == file_hash(trained / "methods/toss" / name)
    assert read_record(mask) == method
    assert len(made_from(mask)["sha256"]) == 64  # of record and tensors
    for role, warns in (("degraded", True), ("utility", False)):
        header = made_from(trained / role / ADAPTER)
        assert ("Do not merge it" in header.get("warning", "")) == warns
        assert (trained / role / "README.md").exists() == warns


def test_run_json_says_what_is_inherited_and_the_logs_hold_each_step(trained, files, base):
    assert call(f"select.py --run {trained}") == 0
    record = read_json(trained / "run.json")
    assert record["settings"].keys() <= set(runfile.INHERITED)
    assert record["stages"]["degraded"]["recipe"]["settings"]["lr"] == 1e-2
    assert record["settings"]["model"] == str(base) and record["demo"] is False
    for path in (*files.values(), f"{base}/model.safetensors"):
        assert record["inputs"][path] == file_hash(path)
    assert record["versions"].keys() == {"python", "torch"} and "commit" in record
    assert record["stages"].keys() == {"degraded", "utility", "scores", "methods/toss"}
    facts = {"recipe", "seconds", "tokens", "peak_memory_gib", "rows", "skipped", "cut", "torch"}
    for name, stage in record["stages"].items():
        assert stage.keys() >= facts and stage["tokens"] > 0, name
        made = read_record(open_run(trained).path(name))
        assert made.items() >= stage["recipe"].items() and open_run(trained).stale(name) == []
    logs = sorted(file.stem for file in (trained / "log").iterdir())
    assert logs == ["degraded", "toss", "utility"]
    steps = read_jsonl(trained / "log/toss.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3] and steps[0]["steps"] == 3
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in steps)


def test_plain_fine_tuning_needs_no_references_or_scores(tmp_path, base, files, trained, capsys):
    plain, adapter = tmp_path / "plain", f"methods/sft/model/{ADAPTER}"
    custom = f"--model {base} --custom {files['custom']}"
    assert call(f"select.py --run {plain} --method sft {custom}") == 0
    keep = load_file(plain / "methods/sft/selection.safetensors")["keep"]
    assert torch.equal(keep, load_file(trained / "scores.safetensors")["response"])
    assert call(f"select.py --run {trained} --method sft") == 0  # with them it gives the same
    assert same_tensors(plain / adapter, trained / adapter)
    assert "begun without these rows" in refused(capsys, f"train.py --run {plain}")


def test_the_base_takes_the_utility_models_place_and_reference_sets_may_be_gone(trained, files):
    for name in ("harmful", "utility"):
        Path(files[name]).unlink()
    assert call(f"score.py --run {trained} --base --overwrite") == 0
    assert call(f"select.py --run {trained} --method base") == 0
    scores = load_file(trained / "scores.safetensors")
    mask = trained / "methods/base-reference/selection.safetensors"  # `base` is the untuned model
    assert torch.equal(load_file(mask)["score"], scores["loss_base"] - scores["loss_degraded"])


def test_a_merged_checkpoint_is_the_adapters_fits_and_has_the_dtype(trained, base, capsys):
    line = f"select.py --run {trained} --merge"
    assert call(line) == 0
    folder, ids = trained / "methods/toss/model", torch.arange(40).view(2, 20)
    adapted, merged = load_checkpoint(base), load_checkpoint(folder / "merged")
    assert not torch.allclose(merged(ids), adapted(ids), atol=1e-3)
    load_adapter(adapted, folder)
    assert torch.allclose(merged(ids), adapted(ids), atol=1e-4)
    out = said(capsys, f"toss.audit.show {folder}/merged")
    assert "a checkpoint" in out and out.endswith(": fits\n")
    assert re.search(rf"^  adapter +{tensors_hash(folder / ADAPTER)}$", out, re.MULTILINE)
    for dtype in ("float32", "bfloat16"):
        assert call(f"{line} --overwrite --dtype {dtype}") == 0
        weights = load_file(folder / "merged/model.safetensors")
        assert {str(w.dtype) for w in weights.values()} == {f"torch.{dtype}"}


def test_a_mask_travels_to_another_model(trained, tmp_path, base, files, capsys):
    assert call(f"select.py --run {trained} --keep-eos --discard 0.2") == 0
    mask, new = trained / "methods/toss/selection.safetensors", tmp_path / "new"
    other, made = make_base(tmp_path / "other", seed=1), new / "methods/mask/selection.safetensors"
    line = f"select.py --run {new} --model {other} --custom {files['custom']} --mask {mask}"
    assert call(line) == 0 and "skipped" in said(capsys, line)
    assert same_tensors(mask, made)
    keep = load_file(made)["keep"]
    response = load_file(trained / "scores.safetensors")["response"]
    assert 0 < int(keep.sum()) < int(response.sum())
    record = read_record(made)
    assert record["settings"]["method"] == "mask"
    assert record["inputs"]["--mask"] == tensors_hash(mask)
    assert record["base_sha256"] != read_record(mask)["base_sha256"]
    load_adapter(load_checkpoint(other), new / "methods/mask/model")
    assert call(f"select.py --run {trained} --mask {mask} --name again") == 0  # in its own run
    own, again = (trained / f"methods/{name}/model/{ADAPTER}" for name in ("toss", "again"))
    assert same_tensors(own, again)
    rows = [{"note": "", **json.loads(line)} for line in open(files["custom"])]
    same = write_jsonl(tmp_path / "same.jsonl", rows)  # other bytes, the same token ids
    third = f"select.py --run {tmp_path}/3 --model {base} --custom {same} --max-length 999"
    assert call(f"{third} --mask {mask}") == 0
    mask.write_bytes(made.read_bytes())  # the same mask, though the file has another record
    assert "skipped" in said(capsys, line)
    assert call(f"select.py --run {trained} --discard 0.3 --overwrite") == 0
    assert "--mask" in refused(capsys, line)  # the same flags, another mask


def test_a_mask_that_is_true_on_prompts_is_read_as_the_loss_mask(trained, tmp_path, capsys):
    assert call(f"select.py --run {trained}") == 0
    toss = trained / "methods/toss/selection.safetensors"
    record = made_from(toss)
    del record["sha256"]
    keep = load_file(toss)["keep"]
    response = load_file(trained / "scores.safetensors")["response"]
    old = tmp_path / "old.safetensors"
    save_tensors({"keep": keep | ~response}, old, record)
    out = said(capsys, f"select.py --run {trained} --mask {old}")
    assert f"keep is true on {int((~response).sum())} tokens of prompts" in out
    assert torch.equal(load_file(trained / "methods/mask/selection.safetensors")["keep"], keep)


def test_the_settings_of_an_adapter_without_a_record_are_part_of_what_it_is(trained, capsys):
    for role in ("degraded", "utility"):
        (trained / role / "record.json").unlink()
    assert call(f"score.py --run {trained} --overwrite") == 0
    assert "inputs, skipped" in said(capsys, f"score.py --run {trained}")
    edit_json(trained / "degraded/adapter_config.json", lora_alpha=4000)
    error = refused(capsys, f"score.py --run {trained}")
    assert "scores.safetensors exists with other settings or inputs (different: degraded" in error


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


def test_a_refused_reference_is_refused_before_the_other_one_is_trained(trained, capsys):
    shutil.rmtree(trained / "degraded")
    before = tree(trained)
    assert "lr 0.01 there, 0.5 now" in refused(capsys, f"train.py --run {trained} --lr 0.5")
    assert tree(trained) == before


def test_a_record_that_was_edited_still_protects_another_result(trained, capsys):
    edit_json(trained / "degraded/record.json", comment="mine")
    before = tree(trained)
    error = refused(capsys, f"train.py --run {trained} --lr 0.5")
    assert "lr 0.01 there, 0.5 now" in error and tree(trained) == before
    assert "made again" in said(capsys, f"train.py --run {trained}")


def test_scores_without_their_digest_are_refused(trained, capsys):
    file = trained / "scores.safetensors"
    record = made_from(file)
    del record["sha256"]
    tensors = load_file(file)
    tensors["loss_degraded"] = -tensors["loss_degraded"]
    save_file(tensors, file, {"made_from": json.dumps(record)})
    assert "the file was changed" in refused(capsys, f"select.py --run {trained}")


def test_an_export_replaces_no_file_of_the_run(trained, capsys):
    assert call(f"select.py --run {trained}") == 0
    for name in ("scores.safetensors", "methods/toss/record.json"):
        line = f"toss.export --run {trained} --out {trained}/{name}"
        assert "would replace a file of the run" in refused(capsys, line)
    for _ in range(2):
        assert call(f"toss.export --run {trained} --out {trained}/export.jsonl") == 0


def test_what_exists_is_skipped_and_what_differs_is_refused(trained, capsys):
    assert call(f"select.py --run {trained}") == 0
    before = tree(trained)
    for name in ("train", "score", "select"):
        out = said(capsys, f"{name}.py --run {trained}")
        assert "skipped" in out and "wrote" not in out
    assert tree(trained) == before
    error = refused(capsys, f"select.py --run {trained} --discard 0.2")
    assert "discard 0.1 there, 0.2 now" in error and tree(trained) == before
    line = f"select.py --run {trained} --discard 0.2"
    assert call(f"{line} --name other") == 0 and call(f"{line} --overwrite") == 0
    for name in ("toss", "other"):
        assert read_record(trained / "methods" / name)["settings"]["discard"] == 0.2
    for flag in ("--batch-tokens 64", "--gradient-checkpointing", "--threads 1"):
        assert "skipped" in said(capsys, f"{line} {flag}")  # these do not change the result


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


@pytest.mark.parametrize("copied", ["degraded", "utility"])
def test_a_reference_in_the_place_of_the_other_is_refused(copied, trained, capsys):
    other = {"degraded": "utility", "utility": "degraded"}[copied]
    shutil.rmtree(trained / other)
    shutil.copytree(trained / copied, trained / other)
    before = tree(trained)
    error = refused(capsys, f"score.py --run {trained} --overwrite")
    assert f"{other} holds the result of another stage: {copied}" in error
    assert tree(trained) == before


def test_references_that_were_exchanged_are_refused(trained, capsys):
    shutil.move(trained / "degraded", trained / "aside")
    shutil.move(trained / "utility", trained / "degraded")
    shutil.move(trained / "aside", trained / "utility")
    before = tree(trained)
    for line in ("score.py", "score.py --overwrite", "select.py"):
        error = refused(capsys, f"{line} --run {trained}")
        assert "utility holds the result of another stage: degraded" in error
    assert "stage utility there, degraded now" in refused(capsys, f"train.py --run {trained}")
    assert tree(trained) == before


@pytest.mark.parametrize("damaged", [None, "{"])
def test_a_lost_run_json_is_written_again_from_the_inputs(damaged, trained, base, files, capsys):
    assert call(f"select.py --run {trained}") == 0
    before = tensor_files(trained)
    settings_before = read_json(trained / "run.json")["settings"]
    damage(trained, {"run.json": damaged})
    custom = f"--model {base} --custom {files['custom']}"
    for name, inputs in (("train", sources(files, base)), ("score", custom), ("select", custom)):
        assert "skipped" in said(capsys, f"{name}.py --run {trained} {inputs}")
    assert tensor_files(trained) == before
    record = read_json(trained / "run.json")
    assert record["settings"] == settings_before
    assert record["stages"].keys() == {"degraded", "utility", "scores", "methods/toss"}


def test_run_json_decides_nothing(trained, capsys):
    """What it says of a stage, or of no stage, does not count beside the stage's own record."""
    line = f"select.py --run {trained}"
    assert call(line) == 0
    before = tensor_files(trained)
    record = read_json(trained / "run.json")
    record["stages"]["methods/toss"]["recipe"]["settings"]["discard"] = 0.9
    (trained / "run.json").write_text(json.dumps(record))
    assert "skipped" in said(capsys, line)
    del record["stages"], record["hashes"], record["inputs"]
    (trained / "run.json").write_text(json.dumps(record))
    assert "skipped" in said(capsys, line)
    assert tensor_files(trained) == before


def test_rows_in_two_sets_are_warned_of(trained, tmp_path, files, capsys):
    copy = shutil.copyfile(files["harmful"], tmp_path / "copy.jsonl")
    out = said(capsys, f"score.py --run {trained} --custom {copy} --overwrite")
    assert f"warning: 5 of 5 rows of {copy} are in {files['harmful']} too" in out


def settings(line: str):
    """The settings in force: the paper's < data/demo.json < run.json < the command line."""
    name, *argv = line.split()
    parser = flags.script_parser(name, "", harmful="", utility="", custom="")
    parser.add_argument("--discard", type=float, default=0.1)
    flags.add_training_flags(parser)
    return flags.parse(parser, argv, references=name == "train.py")


def test_the_defaults_are_the_papers(tmp_path):
    made = settings(f"select.py --run {tmp_path}/new --model m --custom c.jsonl")
    assert TrainConfig.of(made) == TrainConfig()
    assert (made.lr, made.epochs, made.batch_size, made.discard) == (1e-5, 2, 64, 0.1)
    assert (made.rank, made.alpha, made.targets) == (16, 16, "q_proj,v_proj")
    assert (made.schedule, made.seed, made.max_length) == ("constant", 0, 2048)


def test_without_inputs_the_demos_settings_apply_under_the_command_line(tmp_path):
    demo, new = read_json(flags.DEMO), f"--run {tmp_path}/new"
    known = {field.name for field in fields(TrainConfig)} | {"max_length", "threads"}
    for name, stage in (("train.py", "reference"), ("select.py", "finetune")):
        made = vars(settings(f"{name} {new}"))
        assert demo[stage].keys() <= known and made.items() >= demo[stage].items()
        assert made["demo"] and made["discard"] == demo["discard"]
        assert made["model"] == str(ROOT / "data/base")
        assert settings(f"{name} {new} --lr 0.5").lr == 0.5
    given = settings(f"select.py {new} --model m --custom c.jsonl")
    assert given.lr == 1e-5 and not given.demo  # any input: no demo


def test_the_run_comes_between_the_demo_and_the_command_line(trained, files, tmp_path, capsys):
    assert "max_length = 2048" in said(capsys, f"score.py --run {trained}")
    stored = {"model": "/gone", "custom": files["custom"], "template": "human", "max_length": 77}
    record = {"format": runfile.FORMAT, "demo": True, "settings": {**stored, "lr": 9.0}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    demo = settings(f"select.py --run {tmp_path}")
    assert (demo.custom, demo.template, demo.max_length) == (files["custom"], "human", 77)
    assert demo.model == str(ROOT / "data/base")  # that of the demo moved with the checkout
    assert demo.lr == read_json(flags.DEMO)["finetune"]["lr"]  # training settings: each stage's own
    given = settings(f"select.py --run {tmp_path} --custom /d")
    assert (given.custom, given.max_length, given.lr) == ("/d", 77, 1e-5)
    new = settings(f"train.py --run {tmp_path} --overwrite --model /n --harmful h --utility u")
    assert (new.model, new.template, new.max_length) == ("/n", None, 2048)  # begun anew
    assert new.lr == 1e-5 and not new.demo


def test_a_whole_stage_runs_as_a_program_and_fails_as_one(tmp_path, base, files):
    call = ["select.py", "--run", tmp_path / "r", "--method", "sft", "--model", base]
    good = run(*call, "--custom", files["custom"], "--epochs", 1)
    assert good.returncode == 0 and f"wrote {tmp_path}/r" in good.stdout and not good.stderr
    bad = run(*call, "--custom", "absent.jsonl")
    assert bad.returncode == 1 and re.fullmatch("error: .*absent.jsonl.*\n", bad.stderr)


ASYNC = "import select, subprocess, asyncio; assert select.select([], [], [], 0) == ([], [], [])"


@pytest.mark.parametrize("call", [("-c", ASYNC), ("-m", "pytest", "-V"), ("-m", "pip", "-V")])
def test_select_py_does_not_hide_the_standard_library(call):
    done = run(*call)
    assert done.returncode == 0, done.stderr


def test_the_guard_finds_the_real_module_where_it_is_an_extension(tmp_path):
    """This interpreter may have `select` built in: a stand-in further down the path is found."""
    (tmp_path / "select.py").write_text("real = True\n")
    spec = spec_from_file_location("select", ROOT / "select.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT), str(tmp_path), *sys.path])
        patch.setitem(sys.modules, "select", module_from_spec(spec))
        spec.loader.exec_module(sys.modules["select"])
        assert sys.modules["select"].real


READMES = [ROOT / folder / "README.md" for folder in (".", "model", "toss", "toss/audit", "data")]
TEXTS = {file: file.read_text(encoding="utf-8") for file in READMES if file.exists()}
CODE = [file for part in ("model", "toss", "data") for file in (ROOT / part).rglob("*.py")]
MODULES = [file.relative_to(ROOT) for file in CODE if '"__main__"' in file.read_text()]
COMMANDS = [".".join(file.with_suffix("").parts) for file in MODULES]
COMMANDS += ["train.py", "score.py", "select.py"]
AUDIT = [name.removeprefix("toss.audit.") for name in COMMANDS if "audit" in name]
WHOLE, SHORT = "|".join(map(re.escape, COMMANDS)), "|".join(AUDIT)
NAMED = re.compile(rf"(?:\b({WHOLE})|`({SHORT}))(?![\w.])([^\n`|#]*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
TORCHRUN = {"--standalone", "--nproc-per-node"}


@pytest.mark.parametrize("file", [file for file in CODE if ">>> " in file.read_text()])
def test_the_examples_in_the_docstrings(file):
    module = import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert doctest.testmod(module) == (0, file.read_text().count(">>> "))


@pytest.mark.parametrize("name", [name for name in COMMANDS if "audit" in name or ".py" in name])
def test_help_and_usage_errors_come_without_torch(name):
    command = [name] if name.endswith(".py") else ["-m", name]
    done = run("-X", "importtime", *command, "--help")
    assert done.returncode == 0 and "usage: " in done.stdout and name in done.stdout
    assert "toss.workbench.flags" in done.stderr and not re.search(r"\| +torch\n", done.stderr)
    done = run(*command, "--no-such-flag")
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr) and not done.stdout


@cache
def help_of(command: str, *words: str) -> set[str]:
    """The flags that a command's --help lists."""
    with redirect_stdout(StringIO()) as out, pytest.raises(SystemExit) as stop:
        script(command.removesuffix(".py"), *words, "--help", fast=False)
    assert stop.value.code == 0
    return set(FLAG.findall(out.getvalue()))


def named_commands() -> list[tuple[str, str, str]]:
    """(README, command, what follows it); `evaluate --run R` is a command of the audit, too."""
    found = set()
    for file, text in TEXTS.items():
        for name, short, rest in NAMED.findall(text.replace("\\\n", " ")):
            found.add((str(file.relative_to(ROOT)), name or f"toss.audit.{short}", rest.strip()))
    return sorted(found)


@pytest.mark.parametrize(("readme", "command", "rest"), named_commands())
def test_every_command_that_a_readme_names_has_its_flags(readme, command, rest):
    words = [word for word in rest.split()[:1] if word.isalpha() and word.islower()]
    assert set(FLAG.findall(rest)) <= help_of(command, *words) | TORCHRUN


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_flag_link_and_test_that_a_readme_names_exists(file):
    text = re.sub(r"\]\(([^)]+)\)", "", TEXTS[file])
    text = re.sub(r"\b(lm_eval|vllm|alpaca_eval|python evaluate_completions.py)\s[^`]*", "", text)
    text = re.sub(r"\bhf download\s[^`\n]*", "", text)
    known = set.union(*(help_of(command) for command in COMMANDS))
    assert set(FLAG.findall(text)) <= known | TORCHRUN
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    heads = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[file]):
        path, _, anchor = target.partition("#")
        assert "://" in target or (file.parent / path).exists() and (path or anchor in heads)
    tests = "".join(f"{f.name}\n{f.read_text()}" for f in (ROOT / "tests").glob("test_*.py"))
    assert all(f"{name}.py" in tests or name in tests for name in re.findall(r"\btest_\w+", text))
    pins = re.findall(r"\*\[(test_\w+)\]\(\S+: (\w+)\*", TEXTS[file])  # for pytest -k
    assert len(pins) == 12 * (file.parent == ROOT)  # each decision has its test
    for name, word in pins:
        assert re.search(rf"def test_\w*{word}", (ROOT / f"tests/{name}.py").read_text()), word
