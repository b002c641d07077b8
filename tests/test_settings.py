"""Defaults, and where a setting comes from: command line, run, embedded default, paper."""

import json

import pytest

from model.errors import InputError
from toss import settings
from toss.settings import Settings, inherit


def test_the_defaults_are_the_papers():
    s = Settings()
    assert (s.discard, s.lr, s.epochs, s.batch_size, s.rank, s.alpha, s.max_length) == (0.1, 1e-5, 2, 64, 16, 16, 2048)
    assert s.target_list == ["q_proj", "v_proj"] and s.schedule == "constant" and not s.keep_eos


def begin(run, **record):
    run.mkdir()
    (run / "run.json").write_text(json.dumps(record))
    return str(run)


def test_without_inputs_the_embedded_default_applies_to_each_script(tmp_path):
    demo = json.loads(settings.DEMO.read_text())
    for script, stage in (("train", "reference"), ("select", "finetune")):
        s = inherit(script, {"run": str(tmp_path / "new")})
        assert s.demo and s.model.endswith("data/base") and s.lr == demo[stage]["lr"] and s.discard == demo["discard"]


def test_the_command_line_beats_the_embedded_default(tmp_path):
    assert inherit("train", {"run": str(tmp_path / "new"), "lr": 0.5}).lr == 0.5


def test_a_run_begun_with_inputs_never_takes_the_embedded_default(tmp_path):
    run = begin(tmp_path / "r", demo=False, settings={"model": "/m", "custom": "/c.jsonl", "lr": 9.0, "max_length": 77})
    s = inherit("select", {"run": run})
    assert (s.model, s.custom, s.max_length) == ("/m", "/c.jsonl", 77)
    assert s.lr == Settings().lr  # a training setting belongs to its stage


def test_a_demo_run_given_an_input_leaves_the_embedded_training_settings(tmp_path):
    run = begin(tmp_path / "r", demo=True, settings={"model": "/m"})
    assert inherit("select", {"run": run, "custom": "c.jsonl"}).lr == Settings().lr


def test_a_demo_run_begun_anew_with_inputs_is_no_demo_and_inherits_nothing(tmp_path):
    run = begin(tmp_path / "r", demo=True, settings={"model": "/m", "template": "chat", "max_length": 77})
    s = inherit("train", {"run": run, "model": "/n", "harmful": "h", "utility": "u", "overwrite": True})
    assert not s.demo and (s.model, s.template, s.max_length, s.lr) == ("/n", None, 2048, Settings().lr)


def test_an_unknown_key_in_the_embedded_default_is_refused(tmp_path, monkeypatch):
    demo = json.loads(settings.DEMO.read_text())
    demo["finetune"]["learning_rate"] = 1
    path = tmp_path / "demo.json"
    path.write_text(json.dumps(demo))
    monkeypatch.setattr(settings, "DEMO", path)
    with pytest.raises(InputError, match="learning_rate"):
        inherit("select", {"run": str(tmp_path / "new")})


@pytest.mark.parametrize("given", [{"model": "m"}, {"harmful": "h"}, {"harmful": "h", "utility": "u"}])
def test_train_with_some_of_its_inputs_is_an_error(tmp_path, given):
    with pytest.raises(InputError, match="not given"):
        inherit("train", {"run": str(tmp_path / "new"), **given})
