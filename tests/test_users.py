"""What users bring: other trainers, adapters from elsewhere, moved folders, own settings."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import damage, edit_json, fails, read_jsonl, tree, write_jsonl
from helpers import call, refused, said, talk

from model import load_tokenizer
from model.io import read_json
from toss.audit.command import cautions
from toss.files import load_selection
from toss.progress import Progress
from toss.run import open_run


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
    run = tmp_path / "new"
    flags = " ".join(f"--{role}-adapter {theirs}/{role}" for role in ("degraded", "utility"))
    line = f"score.py --run {run} --model {base} --custom {files['custom']} {flags}"
    assert "dry run" in said(capsys, f"{line} --dry-run") and not run.exists()
    said(capsys, line)
    (_, ours), (_, new) = open_run(trained).scored(), open_run(run).scored()
    assert all(torch.equal(ours[name], new[name]) for name in ours)
    assert "--degraded-adapter" in read_json(run / "degraded/record.json")["inputs"]
    assert said(capsys, line).count("inputs, skipped") == 3
    shutil.move(theirs, tmp_path / "moved")
    assert call(f"select.py --run {run}") == 0
    pro = f"select.py --run {run} --pro 1 --pro-samples 2"
    assert "--harmful must be given" in refused(capsys, pro)
    out = said(capsys, f"{pro} --harmful {files['harmful']}")
    assert "made elsewhere: it is trained again with this command's settings" in out
    other = f"score.py --run {run} --degraded-adapter {tmp_path}/moved/utility"
    assert "--degraded-adapter" in refused(capsys, other)
    assert "a dry run ends here" in said(capsys, f"{other} --overwrite --dry-run")


def test_evaluate_and_diagnose_take_an_adapter_as_a_method(theirs, trained, files, tmp_path):
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "Do harm 77?", "response": "No."}])
    flags = f"--run {trained} --adapter theirs={theirs}/utility"
    evaluate = f"toss.audit.evaluate {flags} --harmful {asked} --max-new-tokens 3"
    assert call(evaluate) == 0
    assert read_json(trained / "metrics.json").keys() == {"base", "theirs"}
    assert not (trained / "methods/theirs").exists()
    assert call(f"toss.audit.diagnose {flags} --rows {files['harmful']}") == 0
    assert "\ntheirs," in (trained / "diagnosis/kl.csv").read_text()
    assert call(f"select.py --run {trained} --name theirs") == 0
    assert call(evaluate) == 1  # two of this name


def test_training_settings_come_from_the_first_method_then_from_the_references(trained, capsys):
    lr = lambda method: read_json(trained / f"methods/{method}/record.json")["settings"]["lr"]
    for name, flags in (("one", ""), ("two", "--lr 0.5"), ("three", "")):
        line = f"select.py --run {trained} --method sft --name {name} {flags}"
        whose = "degraded" if name == "one" else "methods/one"
        assert call(line, fast=False) == 0
        assert f"training settings as for {whose}: " in capsys.readouterr().out
    assert (lr("one"), lr("two"), lr("three")) == (0.01, 0.5, 0.01)
    assert call(f"train.py --run {trained}", fast=False) == 0  # as it was: nothing to do
    assert capsys.readouterr().out.count("inputs, skipped") == 2


def test_what_forbids_a_conclusion_is_said():
    stage = lambda **how: {"recipe": {"settings": {"lr": 0.1, "seed": 1, **how}}}
    stages = {"methods/sft": stage(), "methods/toss": stage(lr=0.2)}
    cell = lambda value: {"not_refused": {"value": value, "low": value - 0.1, "high": value + 0.1}}
    table = {"base": cell(0.2), "sft": cell(0.9), "toss": cell(0.1)}
    how = "toss was trained otherwise than sft (lr 0.2, not 0.1)"
    assert cautions(stages, table) == [f"warning: {how}: this is no comparison of the two methods"]
    stages["methods/toss"] = stage()
    assert cautions(stages, table) == []
    (lost,) = cautions(stages, {**table, "sft": cell(0.35)})
    assert "did not clearly lose the base's safety (not_refused 0.35, base 0.20" in lost
    (unknown,) = cautions(stages, {**table, "x": cell(0.1)})
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
    assert "--custom says where it is now" in refused(capsys, f"{line} --model {base_now}")
    out = said(capsys, f"{line} --model {base_now} --custom {moved['custom']}")
    assert ("inputs, skipped" in out) == (name == "score")
    record, now = read_json(run / "run.json"), {"model": base_now, "custom": moved["custom"]}
    assert record["settings"].items() >= now.items()
    assert record["stages"].items() >= stages.items()
    assert "inputs, skipped" in said(capsys, line)
    pro = f"select.py --run {run} --pro 1 --pro-samples 1"
    assert "--harmful says where it is now" in refused(capsys, pro)
    said(capsys, f"{pro} --harmful {moved['harmful']}")


PLANS = {
    "train.py --rank 3": "utility: optimizer steps: 2 (rows: 5, epochs: 1)",
    "score.py --base": "scores-utility: rows: 10, tokens: 530, the longest rows first",
    "select.py --pro 1": "toss-pro-round-1: optimizer steps: 2 (rows: 6, epochs: 1)",
    "select.py --merge": "toss: optimizer steps: 3 (rows: 10, epochs: 1)",
}


@pytest.mark.parametrize(("line", "plan"), PLANS.items())
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(line, plan, trained, capsys):
    before = tree(trained)
    assert f"{plan}\n" in said(capsys, f"{line} --run {trained} --overwrite --dry-run")
    assert tree(trained) == before


def test_without_a_terminal_the_time_left_is_told(trained, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    log = Progress("toss", torch.device("cpu"), trained, None, False)
    for step in range(1, 100):
        now[0] = 10.0 * step
        log({"step": step, "steps": 100, "tokens": 1})
    first, second, *others = capsys.readouterr().out.splitlines()
    assert first == "toss: step 1 of 100, 16.5 minutes left"
    assert second == "toss: step 4 of 100, 16.0 minutes left" and len(others) == 31
    late = Progress("late", torch.device("cpu"), trained, None, False)
    late.first, now[0] = None, now[0] + 10  # goes on, and this is the first step here
    late({"step": 51, "steps": 60, "tokens": 1})
    assert capsys.readouterr().out == "late: step 51 of 60, 1.5 minutes left\n"


def test_template_kwargs_are_used_recorded_inherited_and_checked(base, files, tmp_path, capsys):
    model = Path(shutil.copytree(base, tmp_path / "base"))
    text = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    thinking = "{{ 'think ' if enable_thinking else 'plain ' }}"
    (model / "chat_template.jinja").write_text(thinking + text)
    prompt = lambda **more: load_tokenizer(model, template_kwargs=more).chat.render(talk("a"), True)
    assert prompt().startswith("plain") and prompt(enable_thinking=True).startswith("think")
    fails("has no enable_thinkng", prompt, enable_thinkng=True)
    line, given = f"select.py --run {tmp_path}/run --method sft", '{"enable_thinking": true}'
    begin = f"{line} --model {model} --custom {files['custom']}"
    said(capsys, f"{begin} --chat-template-kwargs '{given}'")
    assert f"chat_template_kwargs = {given}" in said(capsys, line)
    other = refused(capsys, f"{line} --chat-template-kwargs '{{}}'")
    assert "was begun with --chat-template-kwargs" in other
