"""What users bring fits: other trainers, adapters from elsewhere, moved folders, own settings."""

import pytest
import torch
from conftest import fails, read_jsonl
from helpers import call, refused, results_in, said, same_tensors, succeed, talk
from safetensors.torch import load_file

from model import load_tokenizer
from model.io import InputError, read_json
from toss.workbench.progress import Progress
from toss.workbench.run import open_run

# Other trainers


@pytest.mark.parametrize("method", ["toss --discard 0.4", "sft", "sample --discard 0.2"])
def test_an_export_holds_the_ids_and_the_kept_tokens_of_every_row(
    method, trained, tmp_path, capsys
):
    succeed(f"select.py --run {trained} --name m --method {method} --mask-only")
    output = said(capsys, f"toss.export --run {trained} --method m --out {tmp_path}/m.jsonl")
    run = open_run(trained)
    tokens, _ = run.losses()
    keep = load_file(run.path("methods/m/selection"))["keep"]
    about = read_json(tmp_path / "m.about.json")
    assert about["tokenizer_sha256"] == run.identity()["tokenizer_sha256"]

    expected = []
    for i in range(tokens.rows):
        places = tokens.places([i])
        ids = tokens.input_ids[places]
        assert about["response"][i] == tokens.response[places].sum()
        assert about["kept"][i] == keep[places].sum()
        assert about["line"][i] == (len(expected) if keep[places].any() else None)
        if keep[places].any():
            labels = torch.where(keep[places], ids, -100).tolist()
            mask = [1] * len(ids)
            expected.append({"input_ids": ids.tolist(), "attention_mask": mask, "labels": labels})
    assert read_jsonl(tmp_path / "m.jsonl") == expected
    left_out = tokens.rows - len(expected)
    assert (left_out > 0) == method.startswith("sample")
    assert f"{left_out} without a kept token" in output


def test_trl_and_transformers_begin_with_our_loss(trained, base, tmp_path):
    """They divide by the kept tokens, the paper by all response tokens of the step."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    from datasets import load_dataset

    succeed(f"select.py --run {trained} --discard 0.3 --batch-size 64")
    file = str(tmp_path / "train.jsonl")
    succeed(f"toss.export --run {trained} --method toss --out {file}")
    about = read_json(tmp_path / "train.about.json")
    ours = read_jsonl(trained / "log/toss.jsonl")[0]["loss"]
    data = load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    options = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 16,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
    }

    def first_loss(trainer, config, **more) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return trainer(model, config, train_dataset=data, **more).train().training_loss

    losses = []
    for packing in (False, True):
        config = trl.SFTConfig(max_length=2048, packing=packing, **options)
        losses.append(first_loss(trl.SFTTrainer, config, processing_class=tokenizer))
    plain = transformers.TrainingArguments(**options)  # SFTTrainer has given the tokenizer a pad
    losses.append(first_loss(transformers.Trainer, plain, data_collator=collator))
    expected = ours * sum(about["response"]) / sum(about["kept"])
    assert losses == pytest.approx([expected] * 3, abs=1e-5)


# Adapters from elsewhere


def test_references_from_elsewhere_score_alike(theirs, trained, base, files):
    succeed(f"score.py --run {theirs} --model {base} --custom {files['custom']}")
    assert same_tensors(theirs / "scores.safetensors", trained / "scores.safetensors")


# Settings


def test_template_kwargs_are_used_recorded_inherited_and_checked(place, files, capsys):
    turns = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    (place / "base/chat_template.jinja").write_text("{{ enable_thinking }}" + turns)

    def chat(**variables):
        return load_tokenizer(place / "base", template_kwargs=variables).chat

    assert chat(enable_thinking="yes").render(talk("a"), True).startswith("yesa")
    fails("has no enable_thinkng", chat, enable_thinkng=True)
    fails("has no messages to set", chat, messages=[])  # the conversation is not an option

    line = f"select.py --run {place}/new --method sft"
    value = '{"enable_thinking": true}'
    given = f"--model {place}/base --custom {files['custom']} --chat-template-kwargs '{value}'"
    said(capsys, f"{line} {given}")
    assert read_json(place / "new/run.json")["chat_template_kwargs"] == value
    assert "skipped" in said(capsys, line)
    error = refused(capsys, f"{line} --chat-template-kwargs '{{}}'")
    assert "was begun with another base or prompt form (tokenizer_sha256)" in error


# What is printed meanwhile


@pytest.mark.parametrize(
    ("line", "plan"),
    [
        ("train.py --rank 3", "degraded: 2 steps of 5 rows"),
        ("score.py --dtype bfloat16", "scores-utility: 530 tokens of 10 rows, the longest"),
        ("select.py --pro 1", "toss-pro-round-1: 2 steps of 6 rows"),
    ],
)
def test_the_plan_is_printed_before_weights_are_loaded(line, plan, trained, monkeypatch, capsys):
    """And before anything is written."""

    def no_weights(*_, **__):
        raise InputError("no weights today")

    monkeypatch.setattr("toss.workbench.base.load_checkpoint", no_weights)
    before = results_in(trained)
    assert call(f"{line} --run {trained} --overwrite") == 1
    captured = capsys.readouterr()
    assert plan in captured.out
    assert captured.err == "error: no weights today\n"
    assert results_in(trained) == before


def test_the_time_left_is_printed_ever_more_rarely(monkeypatch, capsys):
    """Counted from where resumed work goes on."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress("toss")
    progress.on_step({"resumed": 50, "steps": 150})
    for step in range(51, 151):
        now += 10
        progress.on_step({"step": step, "steps": 150})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "toss: step 50 of 150 was reached before; it goes on from there"
    assert lines[1] == "toss: step 51 of 150"  # it also pays for warming up
    assert lines[2] == "toss: step 53 of 150, 16.2 minutes left"
    assert 10 < len(lines) < 40


def test_the_prompts_of_a_batch_share_its_time(monkeypatch, capsys):
    """They are reported one behind the other; nothing is known until a second batch has ended."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress("benign")
    for prompt in range(1, 31):
        if prompt % 10 == 1:
            now += 60
        progress.on_step({"step": prompt, "steps": 60, "unit": "prompt"})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "benign: prompt 1 of 60",
        "benign: prompt 11 of 60",
        "benign: prompt 21 of 60, 3.9 minutes left",
    ]
