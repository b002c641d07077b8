"""What users bring: other trainers, adapters from elsewhere, moved folders, own settings."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import damage, edit_json, fails, read_jsonl, sources, tree, write_jsonl
from helpers import call, refused, said, talk

from model import load_tokenizer
from model.io import InputError, read_json
from toss.audit.command import cautions
from toss.workbench.files import load_selection
from toss.workbench.progress import Bar
from toss.workbench.results import read_record
from toss.workbench.run import open_run


@pytest.mark.parametrize("how", ["toss --discard 0.4", "sft", "sample --discard 0.2"])
def test_an_export_holds_the_ids_and_the_kept_tokens_of_every_row(how, trained, tmp_path, capsys):
    assert call(f"select.py --run {trained} --name m --method {how}") == 0
    out = said(capsys, f"toss.export --run {trained} --method m --out {tmp_path}/m.jsonl")
    about, run = read_json(tmp_path / "m.about.json"), open_run(trained)
    tokens, _ = run.scored()
    keep = load_selection(run.path("methods/m") / "selection.safetensors", tokens)["keep"]
    found = []
    for i in range(tokens.rows):
        at = tokens.places([i])
        ids, wanted = tokens.input_ids[at], (tokens.response & keep)[at]
        assert (about["kept"][i], about["response"][i]) == (wanted.sum(), tokens.response[at].sum())
        if wanted.any():
            labels = torch.where(wanted, ids, -100).tolist()
            ones = [1] * len(ids)
            found.append({"input_ids": ids.tolist(), "attention_mask": ones, "labels": labels})
        assert about["line"][i] == (len(found) - 1 if wanted.any() else None)
    assert read_jsonl(tmp_path / "m.jsonl") == found
    assert about["tokenizer_sha256"] == run.identity["tokenizer_sha256"]
    assert f"{len(found)} rows, {sum(about['kept'])} of {sum(about['response'])} response" in out
    assert f"{tokens.rows - len(found)} without a kept token" in out
    assert how != "sample --discard 0.2" or len(found) < tokens.rows


def test_a_run_without_scores_exports_but_another_set_does_not(base, files, tmp_path, capsys):
    custom = f"--run {tmp_path}/plain --custom {files['custom']}"
    assert call(f"select.py {custom} --method sft --model {base}") == 0
    line = f"toss.export --run {tmp_path}/plain --method sft --out"
    said(capsys, f"{line} {tmp_path}/o.jsonl")
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 10
    write_jsonl(Path(files["custom"]), [{"prompt": "a", "response": "b"}])
    assert "--custom" in refused(capsys, f"{line} {tmp_path}/o.jsonl")


def test_trl_and_transformers_begin_with_our_loss(trained, base, tmp_path):
    """They divide by the kept tokens, the paper by all response tokens of the step."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    from datasets import load_dataset

    assert call(f"select.py --run {trained} --discard 0.3 --batch-size 64") == 0
    file = str(tmp_path / "train.jsonl")
    assert call(f"toss.export --run {trained} --method toss --out {file}") == 0
    about = read_json(tmp_path / "train.about.json")
    ours = read_jsonl(trained / "log/toss.jsonl")[0]["loss"]
    wanted = ours * sum(about["response"]) / sum(about["kept"])
    how = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "report_to": [], "use_cpu": True}
    how |= {"per_device_train_batch_size": 16, "save_strategy": "no", "bf16": False}
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for packing in (False, True):
        config = trl.SFTConfig(max_length=2048, packing=packing, **how)
        data = load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "c"))
        given = {"args": config, "train_dataset": data, "processing_class": tokenizer}
        loss = trl.SFTTrainer(load(base, dtype=torch.float32), **given).train().training_loss
        assert loss == pytest.approx(wanted, abs=1e-5)
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    given = {"args": transformers.TrainingArguments(**how), "data_collator": collate}
    trainer = transformers.Trainer(load(base, dtype=torch.float32), train_dataset=data, **given)
    assert trainer.train().training_loss == pytest.approx(wanted, abs=1e-5)


@pytest.fixture
def theirs(trained, tmp_path) -> Path:
    """The run's references as an outsider would publish them: no record, no header of ours."""
    for role in ("degraded", "utility"):
        folder = Path(shutil.copytree(trained / role, tmp_path / "theirs" / role))
        damage(folder, {"record.json": None, "adapter_model.safetensors": ("", lambda _: None)})
    return tmp_path / "theirs"


def test_references_from_elsewhere_score_alike(theirs, trained, base, files, tmp_path, capsys):
    """A run is begun in a folder that holds nothing but them."""
    run = Path(shutil.copytree(theirs, tmp_path / "new"))
    line = f"score.py --run {run} --model {base} --custom {files['custom']}"
    out = said(capsys, line)
    for role in ("degraded", "utility"):
        assert f"note: {run}/{role} has no record of how it was made" in out
    _, ours = open_run(trained).scored()
    _, new = open_run(run).scored()
    for name in ours:
        assert torch.equal(ours[name], new[name])
    assert "degraded" in read_record(run / "scores.safetensors")["inputs"]
    assert "scores.safetensors exists with equal settings and inputs, skipped" in said(capsys, line)
    assert tree(run / "degraded") == tree(theirs / "degraded")


def test_references_from_elsewhere_serve_every_later_stage(theirs, base, files, tmp_path, capsys):
    run = Path(shutil.copytree(theirs, tmp_path / "new"))
    assert call(f"score.py --run {run} --model {base} --custom {files['custom']}") == 0
    assert call(f"select.py --run {run}") == 0
    pro = f"select.py --run {run} --pro 1 --pro-samples 2"
    assert "--harmful must be given" in refused(capsys, pro)
    out = said(capsys, f"{pro} --harmful {files['harmful']}")
    assert "theta^h has no record: it is trained again with this command's settings" in out
    shutil.rmtree(run / "degraded")
    shutil.copytree(theirs / "utility", run / "degraded")
    again = f"select.py --run {run} --name again"
    assert "scores.safetensors does not fit this run (changed: degraded)" in refused(capsys, again)
    assert "degraded" in refused(capsys, f"score.py --run {run}")
    assert call(f"score.py --run {run} --overwrite") == 0 and call(again) == 0


def test_train_does_not_replace_a_reference_from_elsewhere(theirs, base, files, tmp_path, capsys):
    run = Path(shutil.copytree(theirs, tmp_path / "new"))
    before = tree(run)
    error = refused(capsys, f"train.py --run {run} {sources(files, base)}")
    assert f"{run}/degraded exists with other settings or inputs" in error
    assert "it has no record" in error and tree(run) == before


def test_evaluate_and_diagnose_take_an_adapter_as_a_method(
    theirs, trained, files, tmp_path, capsys
):
    """A PEFT folder that lies where a method's model would."""
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "Do harm 77?", "response": "No."}])
    shutil.copytree(theirs / "utility", trained / "methods/theirs/model")
    out = said(capsys, f"toss.audit.evaluate --run {trained} --harmful {asked} --max-new-tokens 3")
    assert f"note: {trained}/methods/theirs has no record of how it was made" in out
    assert "note: theirs was made elsewhere; how it was trained is not known here" in out
    assert read_json(trained / "metrics.json").keys() == {"base", "theirs"}
    assert call(f"toss.audit.diagnose --run {trained} --rows {files['harmful']}") == 0
    assert "\ntheirs," in (trained / "diagnosis/kl.csv").read_text()
    before = tree(trained / "methods/theirs")
    error = refused(capsys, f"select.py --run {trained} --name theirs")
    assert "it has no record" in error and tree(trained / "methods/theirs") == before


def test_training_settings_come_from_the_first_method_then_from_the_references(trained, capsys):
    def lr(method):
        return read_json(trained / f"methods/{method}/record.json")["settings"]["lr"]

    for name, flags in (("one", ""), ("two", "--lr 0.5"), ("three", "")):
        line = f"select.py --run {trained} --method sft --name {name} {flags}"
        whose = "degraded" if name == "one" else "methods/one"
        assert call(line, fast=False) == 0
        assert f"training settings as for {whose}: " in capsys.readouterr().out
    assert (lr("one"), lr("two"), lr("three")) == (0.01, 0.5, 0.01)
    assert call(f"train.py --run {trained}", fast=False) == 0  # as it was: nothing to do
    assert capsys.readouterr().out.count("inputs, skipped") == 2


def test_what_forbids_a_conclusion_is_said():
    def made(code="1", **settings):
        settings = {"lr": 0.1, "seed": 1, **settings}
        return {"settings": settings, "code": {"select.py": "0", "toss/loss.py": code}}

    def cell(value):
        return {"not_refused": {"value": value, "low": value - 0.1, "high": value + 0.1}}

    table = {"base": cell(0.2), "sft": cell(0.9), "toss": cell(0.1)}
    (trained,) = cautions({"sft": made(), "toss": made(lr=0.2)}, table)
    how = "toss was trained otherwise than sft (lr 0.2, not 0.1)"
    assert trained == f"warning: {how}: this is no comparison of the two methods"
    (code,) = cautions({"sft": made(), "toss": made(code="2")}, table)
    how = "toss was made by other code than sft (different: toss/loss.py)"
    assert code == f"warning: {how}: this is no comparison of the two methods"
    records = {"sft": made(), "toss": made()}
    assert cautions(records, table) == []
    (lost,) = cautions(records, {**table, "sft": cell(0.35)})
    assert "did not clearly lose the base's safety (not_refused 0.35, base 0.20" in lost
    (unknown,) = cautions(records, {**table, "x": cell(0.1)})
    assert "x was made elsewhere" in unknown


@pytest.mark.parametrize("name", ["score", "select"])
def test_what_moved_is_found_by_its_flags(name, trained, base, files, tmp_path, capsys):
    """A base, data and a run. The record follows, also where the stage is there and skipped."""
    model = Path(shutil.copytree(base, tmp_path / "base"))
    edit_json(trained / "run.json", settings={"model": str(model), **files})
    stages, new = read_json(trained / "run.json")["stages"], tmp_path / "moved"
    new.mkdir()
    moved = {name: shutil.move(file, new) for name, file in files.items()}
    run, base_now = shutil.move(trained, tmp_path / "elsewhere"), shutil.move(model, new)
    line = f"{name}.py --run {run}"
    assert "if it was moved, name it once" in refused(capsys, line)
    error = refused(capsys, f"{line} --model {base_now}")
    assert "file not found; give its new path with --custom" in error
    out = said(capsys, f"{line} --model {base_now} --custom {moved['custom']}")
    assert ("inputs, skipped" in out) == (name == "score")
    record, now = read_json(run / "run.json"), {"model": base_now, "custom": moved["custom"]}
    assert record["settings"].items() >= now.items()
    assert record["stages"].items() >= stages.items()
    assert "inputs, skipped" in said(capsys, line)
    pro = f"select.py --run {run} --pro 1 --pro-samples 1"
    assert "file not found; give its new path with --harmful" in refused(capsys, pro)
    said(capsys, f"{pro} --harmful {moved['harmful']}")


PLANS = {
    "train.py --rank 3": "degraded: optimizer steps: 2 (rows: 5, epochs: 1)",
    "score.py --base": "scores-utility: rows: 10, tokens: 530, the longest rows first",
    "select.py --pro 1": "toss-pro-round-1: optimizer steps: 2 (rows: 6, epochs: 1)",
    "select.py --merge": "toss: optimizer steps: 3 (rows: 10, epochs: 1)",
}


@pytest.mark.parametrize(("line", "plan"), PLANS.items())
def test_the_plan_is_printed_before_weights_are_loaded(line, plan, trained, monkeypatch, capsys):
    """And before anything is written."""

    def no_weights(*_, **__):
        raise InputError("no weights today")

    monkeypatch.setattr("toss.workbench.base.load_checkpoint", no_weights)
    before = tree(trained)
    assert call(f"{line} --run {trained} --overwrite") == 1
    out, err = capsys.readouterr()
    assert f"{plan}\n" in out and err == "error: no weights today\n"
    assert tree(trained) == before


def test_without_a_terminal_the_time_left_is_told(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    bar = Bar("toss")
    for step in range(1, 100):
        now[0] = 10.0 * step
        bar.show({"step": step, "steps": 100})
    first, second, *others = capsys.readouterr().out.splitlines()
    assert first == "toss: step 1 of 100, 16.5 minutes left"
    assert second == "toss: step 4 of 100, 16.0 minutes left" and len(others) == 31
    late = Bar("late")
    late.show({"resumed": 50, "steps": 60})
    assert capsys.readouterr().out == "late: goes on after step 50 of 60\n"
    now[0] += 10
    late.show({"step": 51, "steps": 60})
    assert capsys.readouterr().out == "late: step 51 of 60, 1.5 minutes left\n"


def test_template_kwargs_are_used_recorded_inherited_and_checked(base, files, tmp_path, capsys):
    model = Path(shutil.copytree(base, tmp_path / "base"))
    text = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    thinking = "{{ 'think ' if enable_thinking else 'plain ' }}"
    (model / "chat_template.jinja").write_text(thinking + text)

    def prompt(**variables):
        return load_tokenizer(model, template_kwargs=variables).chat.render(talk("a"), True)

    assert prompt().startswith("plain") and prompt(enable_thinking=True).startswith("think")
    fails("has no enable_thinkng", prompt, enable_thinkng=True)
    line, given = f"select.py --run {tmp_path}/run --method sft", '{"enable_thinking": true}'
    begin = f"{line} --model {model} --custom {files['custom']}"
    said(capsys, f"{begin} --chat-template-kwargs '{given}'")
    assert f"chat_template_kwargs = {given}" in said(capsys, line)
    other = refused(capsys, f"{line} --chat-template-kwargs '{{}}'")
    assert "was begun with --chat-template-kwargs" in other
