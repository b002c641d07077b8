"""What users bring fits: other trainers, adapters from elsewhere, moved folders, own settings."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import edit_json, fails, read_jsonl, sources, tree, write_jsonl
from helpers import call, refused, said, talk
from safetensors.torch import load_file, save_file

from model import load_tokenizer
from model.io import InputError, read_json
from toss.audit.command import cautions
from toss.workbench.files import load_selection
from toss.workbench.progress import Bar, StepLog
from toss.workbench.results import read_record
from toss.workbench.run import open_run

# Other trainers


@pytest.mark.parametrize("method", ["toss --discard 0.4", "sft", "sample --discard 0.2"])
def test_an_export_holds_the_ids_and_the_kept_tokens_of_every_row(
    method, trained, tmp_path, capsys
):
    assert call(f"select.py --run {trained} --name m --method {method}") == 0
    output = said(capsys, f"toss.export --run {trained} --method m --out {tmp_path}/m.jsonl")
    run = open_run(trained)
    tokens, _ = run.scored()
    keep = load_selection(run.path("methods/m") / "selection.safetensors", tokens)["keep"]
    lines = read_jsonl(tmp_path / "m.jsonl")
    about = read_json(tmp_path / "m.about.json")
    assert about["tokenizer_sha256"] == run.identity["tokenizer_sha256"]

    exported = 0
    for i in range(tokens.rows):
        places = tokens.places([i])
        ids = tokens.input_ids[places]
        assert about["response"][i] == tokens.response[places].sum()
        assert about["kept"][i] == keep[places].sum()
        if not keep[places].any():
            assert about["line"][i] is None
            continue
        assert about["line"][i] == exported
        assert lines[exported] == {
            "input_ids": ids.tolist(),
            "attention_mask": [1] * len(ids),
            "labels": torch.where(keep[places], ids, -100).tolist(),
        }
        exported += 1
    assert len(lines) == exported
    left_out = tokens.rows - exported
    assert (left_out > 0) == method.startswith("sample")
    assert f"{exported} rows, {int(keep.sum())} of {int(tokens.response.sum())} response" in output
    assert f"{left_out} without a kept token" in output


def test_a_run_without_scores_exports_but_another_set_does_not(base, files, tmp_path, capsys):
    custom = f"--run {tmp_path}/plain --custom {files['custom']}"
    assert call(f"select.py {custom} --method sft --model {base}") == 0
    line = f"toss.export --run {tmp_path}/plain --method sft --out {tmp_path}/o.jsonl"
    said(capsys, line)
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 10
    write_jsonl(Path(files["custom"]), [{"prompt": "a", "response": "b"}])
    assert "--custom" in refused(capsys, line)


def test_an_export_replaces_no_file_of_the_run_but_an_export(trained, capsys):
    assert call(f"select.py --run {trained}") == 0
    line = f"toss.export --run {trained} --out {trained}"
    for name in ("scores.safetensors", "methods/toss/record.json"):
        assert "would replace a file of the run" in refused(capsys, f"{line}/{name}")
    assert call(f"{line}/export.jsonl") == 0
    assert call(f"{line}/export.jsonl") == 0


def test_trl_and_transformers_begin_with_our_loss(trained, base, tmp_path):
    """They divide by the kept tokens, the paper by all response tokens of the step."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    from datasets import load_dataset

    assert call(f"select.py --run {trained} --discard 0.3 --batch-size 64") == 0
    file = str(tmp_path / "train.jsonl")
    assert call(f"toss.export --run {trained} --method toss --out {file}") == 0
    about = read_json(tmp_path / "train.about.json")
    ours = read_jsonl(trained / "log/toss.jsonl")[0]["loss"]
    expected = pytest.approx(ours * sum(about["response"]) / sum(about["kept"]), abs=1e-5)
    data = load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    options = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 16,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
    }

    def model():
        return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    for packing in (False, True):
        config = trl.SFTConfig(max_length=2048, packing=packing, **options)
        trainer = trl.SFTTrainer(
            model(), args=config, train_dataset=data, processing_class=tokenizer
        )
        assert trainer.train().training_loss == expected
    trainer = transformers.Trainer(
        model(),
        args=transformers.TrainingArguments(**options),
        train_dataset=data,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )
    assert trainer.train().training_loss == expected


# Adapters from elsewhere


@pytest.fixture
def theirs(trained, tmp_path) -> Path:
    """A run that holds nothing but references as an outsider would publish them."""
    for role in ("degraded", "utility"):
        folder = Path(shutil.copytree(trained / role, tmp_path / "theirs" / role))
        (folder / "record.json").unlink()
        weights = folder / "adapter_model.safetensors"
        save_file(load_file(weights), weights, {"format": "pt"})
    return tmp_path / "theirs"


def test_references_from_elsewhere_score_alike(theirs, trained, base, files, capsys):
    before = tree(theirs)
    line = f"score.py --run {theirs} --model {base} --custom {files['custom']}"
    output = said(capsys, line)
    for role in ("degraded", "utility"):
        assert f"note: {theirs}/{role} has no record of how it was made" in output
    _, expected = open_run(trained).scored()
    _, losses = open_run(theirs).scored()
    for name in expected:
        assert torch.equal(losses[name], expected[name])
    assert "degraded" in read_record(theirs / "scores.safetensors")["inputs"]
    assert "scores.safetensors exists with equal settings" in said(capsys, line)
    assert tree(theirs).items() >= before.items()


def test_what_a_run_of_such_references_lacks_is_named(theirs, base, tmp_path, capsys):
    line = f"score.py --run {theirs} --model {base}"
    assert "--custom must be given" in refused(capsys, line)
    line = f"{line} --custom {tmp_path}"
    assert f"{tmp_path}/no.jsonl: file not found" in refused(capsys, f"{line}/no.jsonl")
    shutil.rmtree(theirs / "utility")
    error = refused(capsys, f"{line}/custom.jsonl")
    assert re.search(r"utility/adapter_model.safetensors does not exist: run \S+ train.py", error)


def test_references_from_elsewhere_serve_every_later_stage(theirs, base, files, capsys):
    assert call(f"score.py --run {theirs} --model {base} --custom {files['custom']}") == 0
    assert call(f"select.py --run {theirs}") == 0
    pro = f"select.py --run {theirs} --pro 1 --pro-samples 2"
    assert "--harmful must be given" in refused(capsys, pro)
    output = said(capsys, f"{pro} --harmful {files['harmful']}")
    assert "theta^h has no record: it is trained again with this command's settings" in output

    # Another adapter in their place is noticed.
    shutil.rmtree(theirs / "degraded")
    shutil.copytree(theirs / "utility", theirs / "degraded")
    again = f"select.py --run {theirs} --name again"
    assert "scores.safetensors does not fit this run (changed: degraded)" in refused(capsys, again)
    assert "degraded" in refused(capsys, f"score.py --run {theirs}")
    assert call(f"score.py --run {theirs} --overwrite") == 0
    assert "both references give each token the same loss" in refused(capsys, again)


def test_train_does_not_replace_a_reference_from_elsewhere(theirs, base, files, capsys):
    before = tree(theirs)
    error = refused(capsys, f"train.py --run {theirs} {sources(files, base)}")
    assert f"{theirs}/degraded exists with other settings or inputs" in error
    assert "it has no record" in error
    assert tree(theirs) == before


def test_an_adapter_counts_as_a_method_where_a_methods_model_would_lie(
    theirs, trained, files, tmp_path, capsys
):
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "Do harm 77?", "response": "No."}])
    method = trained / "methods/theirs"
    shutil.copytree(theirs / "utility", method / "model")
    line = f"toss.audit.evaluate --run {trained} --harmful {asked} --max-new-tokens 3"
    output = said(capsys, line)
    assert f"note: {method} has no record of how it was made" in output
    assert "note: theirs was made elsewhere; how it was trained is not known here" in output
    assert read_json(trained / "metrics.json").keys() == {"base", "theirs"}
    assert call(f"toss.audit.diagnose --run {trained} --rows {files['harmful']}") == 0
    assert "\ntheirs," in (trained / "diagnosis/kl.csv").read_text()
    before = tree(method)
    assert "it has no record" in refused(capsys, f"select.py --run {trained} --name theirs")
    assert tree(method) == before


# Settings


def test_training_settings_come_from_the_first_method_then_from_the_references(trained, capsys):
    expected = [
        # method, flags, whose settings it has, its rate
        ("one", "", "degraded", 0.01),
        ("two", "--lr 0.5", "methods/one", 0.5),
        ("three", "", "methods/one", 0.01),
    ]
    for name, given, whose, lr in expected:
        line = f"select.py --run {trained} --method sft --name {name} {given}"
        assert call(line, fast=False) == 0
        assert f"training settings as for {whose}: " in capsys.readouterr().out
        assert read_record(trained / "methods" / name)["settings"]["lr"] == lr
    assert call(f"train.py --run {trained}", fast=False) == 0  # as it was: nothing to do
    assert capsys.readouterr().out.count("inputs, skipped") == 2


def test_what_forbids_a_conclusion_is_said():
    def record(lr=0.1, code="1"):
        return {"settings": {"lr": lr, "seed": 1}, "code": {"select.py": "0", "toss/loss.py": code}}

    def cell(value):
        return {"not_refused": {"value": value, "low": value - 0.1, "high": value + 0.1}}

    alike = {"sft": record(), "toss": record()}
    table = {"base": cell(0.2), "sft": cell(0.9), "toss": cell(0.1)}
    assert cautions(alike, table) == []
    no_comparison = "this is no comparison of the two methods"
    difference = "toss was trained otherwise than sft (lr 0.2, not 0.1)"
    told = cautions({**alike, "toss": record(lr=0.2)}, table)
    assert told == [f"warning: {difference}: {no_comparison}"]
    difference = "toss was made by other code than sft (different: toss/loss.py)"
    told = cautions({**alike, "toss": record(code="2")}, table)
    assert told == [f"warning: {difference}: {no_comparison}"]
    (told,) = cautions(alike, {**table, "sft": cell(0.35)})
    assert "did not clearly lose the base's safety (not_refused 0.35, base 0.20" in told
    (told,) = cautions(alike, {**table, "x": cell(0.1)})
    assert "x was made elsewhere" in told


def test_template_kwargs_are_used_recorded_inherited_and_checked(base, files, tmp_path, capsys):
    model = Path(shutil.copytree(base, tmp_path / "base"))
    turns = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    thinking = "{{ 'think ' if enable_thinking else 'plain ' }}"
    (model / "chat_template.jinja").write_text(thinking + turns)

    def prompt(**variables):
        return load_tokenizer(model, template_kwargs=variables).chat.render(talk("a"), True)

    assert prompt().startswith("plain")
    assert prompt(enable_thinking=True).startswith("think")
    fails("has no enable_thinkng", prompt, enable_thinkng=True)

    line = f"select.py --run {tmp_path}/run --method sft"
    value = '{"enable_thinking": true}'
    given = f"--model {model} --custom {files['custom']} --chat-template-kwargs '{value}'"
    said(capsys, f"{line} {given}")
    assert f"chat_template_kwargs = {value}" in said(capsys, line)
    error = refused(capsys, f"{line} --chat-template-kwargs '{{}}'")
    assert "was begun with --chat-template-kwargs" in error


# Places


@pytest.mark.parametrize("name", ["score", "select"])
def test_what_moved_is_found_by_its_flags(name, trained, base, files, tmp_path, capsys):
    """A base, data and a run. run.json follows, also where the stage is there and skipped."""
    old_base = shutil.copytree(base, tmp_path / "base")
    edit_json(trained / "run.json", settings={"model": str(old_base), **files})
    stages = read_json(trained / "run.json")["stages"]
    new = tmp_path / "moved"
    new.mkdir()
    harmful = shutil.move(files["harmful"], new)
    custom = shutil.move(files["custom"], new)
    new_base = shutil.move(old_base, new)
    run = shutil.move(trained, tmp_path / "elsewhere")

    line = f"{name}.py --run {run}"
    assert "if it was moved, name it once" in refused(capsys, line)
    error = refused(capsys, f"{line} --model {new_base}")
    assert "file not found; give its new path with --custom" in error
    output = said(capsys, f"{line} --model {new_base} --custom {custom}")
    assert ("inputs, skipped" in output) == (name == "score")
    content = read_json(run / "run.json")
    assert content["settings"].items() >= {"model": new_base, "custom": custom}.items()
    assert content["stages"].items() >= stages.items()
    assert "inputs, skipped" in said(capsys, line)
    pro = f"select.py --run {run} --pro 1 --pro-samples 1"
    assert "file not found; give its new path with --harmful" in refused(capsys, pro)
    said(capsys, f"{pro} --harmful {harmful}")


# What is printed meanwhile


@pytest.mark.parametrize(
    ("line", "plan"),
    [
        ("train.py --rank 3", "degraded: optimizer steps: 2 (rows: 5, epochs: 1)"),
        ("score.py --base", "scores-utility: rows: 10, tokens: 530, the longest rows first"),
        ("select.py --pro 1", "toss-pro-round-1: optimizer steps: 2 (rows: 6, epochs: 1)"),
        ("select.py --merge", "toss: optimizer steps: 3 (rows: 10, epochs: 1)"),
    ],
)
def test_the_plan_is_printed_before_weights_are_loaded(line, plan, trained, monkeypatch, capsys):
    """And before anything is written."""

    def no_weights(*_, **__):
        raise InputError("no weights today")

    monkeypatch.setattr("toss.workbench.base.load_checkpoint", no_weights)
    before = tree(trained)
    assert call(f"{line} --run {trained} --overwrite") == 1
    captured = capsys.readouterr()
    assert f"{plan}\n" in captured.out
    assert captured.err == "error: no weights today\n"
    assert tree(trained) == before


def test_without_a_terminal_the_time_left_is_printed_every_half_minute(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    bar = Bar("toss")
    for step in range(1, 100):
        now += 10
        bar.show({"step": step, "steps": 100})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "toss: step 1 of 100, 16.5 minutes left"
    assert lines[1] == "toss: step 4 of 100, 16.0 minutes left"
    assert len(lines) == 33


def test_the_time_left_of_a_resumed_work_counts_from_where_it_goes_on(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    bar = Bar("late")
    bar.show({"resumed": 50, "steps": 60})
    assert capsys.readouterr().out == "late: goes on after step 50 of 60\n"
    now += 10
    bar.show({"step": 51, "steps": 60})
    assert capsys.readouterr().out == "late: step 51 of 60, 1.5 minutes left\n"


def test_the_log_goes_on_behind_the_step_that_was_saved(tmp_path):
    log = StepLog(tmp_path / "toss.jsonl")
    event = {"steps": 9, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1}
    for step in (1, 2, 3, 4):
        log.write({**event, "step": step})
    log.write({"resumed": 2, "steps": 9})
    log.write({**event, "step": 3})
    assert [line["step"] for line in read_jsonl(log.file)] == [1, 2, 3]
