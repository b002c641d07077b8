"""A mask that was made with one model, under another: what it gives, what must agree, and how the audit reads it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_base, write_jsonl
from safetensors.torch import load_file
from test_compare import Recorder
from test_scripts import edit_json, refused, tree

import toss.audit.evaluate as evaluation
import toss.audit.sweep as sweep
from model import load_adapter, load_checkpoint
from model.files import file_hash, made_from, save_tensors
from toss.audit import report
from toss.audit.tokens import load_mask, load_scored


def test_a_mask_made_with_one_model_fine_tunes_another(trained, tmp_path, files, scripts, capsys):
    assert scripts["select"]("--run", trained, "--keep-eos", "--discard", "0.2") == 0
    mask, other = trained / "methods/toss/selection.safetensors", make_base(tmp_path / "other", seed=1)
    call = ("--run", tmp_path / "new", "--model", other, "--custom", files["custom"], "--mask", mask)
    assert scripts["select"](*call) == 0
    made = tmp_path / "new/methods/mask/selection.safetensors"
    theirs, ours = load_file(mask), load_file(made)
    assert theirs.keys() == ours.keys() == {"keep", "score"} and not ours["keep"].all()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    maker, header = made_from(mask), made_from(made)
    assert (header["method"], header["mask_method"], header["mask_sha256"]) == ("mask", "toss", file_hash(mask))
    assert header["mask_base_sha256"] == maker["base_sha256"] != header["base_sha256"]
    assert [header[name] for name in ("discard", "keep_eos", "ranked")] == ["0.2", "True", maker["ranked"]]
    load_adapter(load_checkpoint(other), tmp_path / "new/methods/mask/model")
    capsys.readouterr()
    assert scripts["select"](*call) == 0 and "skipped" in capsys.readouterr().out
    mask.write_bytes(made.read_bytes())  # the same flags, but from elsewhere
    assert "mask_sha256" in refused(scripts, capsys, "select", *call)


def test_a_mask_trains_as_the_selection_it_was_taken_from(trained, scripts):
    assert scripts["select"]("--run", trained) == 0
    assert scripts["select"]("--run", trained, "--mask", trained / "methods/toss/selection.safetensors", "--name", "again") == 0
    one, two = (load_file(trained / f"methods/{name}/model/adapter_model.safetensors") for name in ("toss", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("change", "said"), [
    ({"custom": [{"prompt": "a", "response": "b"}]}, "another custom file (custom_sha256"),
    ({"flags": ("--template", "human")}, "another prompt form (template chat there, human now)"),
    ({"flags": ("--max-length", "50")}, "another row length (max_length 2048 there, 50 now)"),
    ({"tokenizer": lambda content: content["model"]["merges"].pop(0)}, "another tokenizer (tokenizer_sha256")])  # fmt: skip
def test_a_mask_over_other_tokens_is_refused(trained, tmp_path, base, files, scripts, capsys, change, said):
    assert scripts["select"]("--run", trained) == 0
    model = Path(shutil.copytree(base, tmp_path / "copy"))
    if "tokenizer" in change:
        edit_json(model / "tokenizer.json", change["tokenizer"])
    custom = write_jsonl(tmp_path / "other.jsonl", change["custom"]) if "custom" in change else files["custom"]
    message = refused(scripts, capsys, "select", "--run", tmp_path / "new", "--model", model, "--custom", custom, "--mask",
                      trained / "methods/toss/selection.safetensors", *change.get("flags", ()))  # fmt: skip
    assert said in message and ("another custom file" in message) == ("custom" in change) and not (tmp_path / "new").exists()


def test_the_same_token_ids_are_enough_for_a_mask(trained, tmp_path, base, files, scripts):
    assert scripts["select"]("--run", trained) == 0
    lines = [json.dumps({"note": "", **json.loads(line)}) for line in Path(files["custom"]).read_text().splitlines()]
    assert scripts["select"]("--run", tmp_path / "new", "--model", base, "--custom", write_jsonl(tmp_path / "same.jsonl", lines),
                             "--max-length", "999", "--mask", trained / "methods/toss/selection.safetensors") == 0  # fmt: skip


def test_a_file_that_is_no_mask_is_refused(trained, tmp_path, scripts, capsys):
    assert scripts["select"]("--run", trained) == 0
    before, mask = tree(trained), trained / "methods/toss/selection.safetensors"
    tensors, header, other = load_file(mask), made_from(mask), tmp_path / "other.safetensors"
    said = lambda *argv: refused(scripts, capsys, "select", "--run", trained, "--mask", *argv)  # noqa: E731
    assert "no such file" in said(tmp_path / "absent")
    other.write_bytes(b"keep")
    assert "not a safetensors file" in said(other)
    assert "not a selection.safetensors" in said(trained / "scores.safetensors")
    save_tensors(tensors, other, {})
    assert "not a selection.safetensors" in said(other)  # it does not say which tokens it is over
    save_tensors({name: tensor[1:].clone() for name, tensor in tensors.items()}, other, header)
    assert f"of {len(tensors['keep'])} tokens were expected" in said(other)
    save_tensors({"keep": tensors["keep"].float()}, other, header)
    assert "torch.float32" in said(other)
    save_tensors({"keep": torch.zeros_like(tensors["keep"])}, other, header)
    assert "tokens of prompts" in said(other)
    assert "--method and --discard cannot be given" in said(mask, "--method", "toss", "--discard", "0.1")
    assert tree(trained) == before


def test_the_audit_reports_a_mask_under_its_name(trained, scripts, tmp_path, capsys):
    assert scripts["select"]("--run", trained, "--discard", "0.2") == 0
    made = trained / "methods/toss/selection.safetensors"
    assert scripts["select"]("--run", trained, "--mask", made, "--name", "theirs") == 0
    benign = write_jsonl(tmp_path / "benign.jsonl", [{"prompt": "a"}])
    assert evaluation.main(["--run", str(trained), "--benign", benign, "--max-new-tokens", "1", "--device", "cpu"]) == 0
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["theirs"] == metrics["toss"] and {"precision", "recall", "auc"} <= metrics["theirs"].keys()
    own, theirs = (load_mask(load_scored(trained), name) for name in ("toss", "theirs"))
    assert theirs.label == "theirs (mask)" and torch.equal(theirs.rank, own.rank) and theirs.threshold is None
    assert report.main(["--run", str(trained)]) == 0
    page = (trained / "report.html").read_text()
    assert "theirs (mask)" in page


def test_the_transfer_sweep_gives_each_base_the_others_mask(tmp_path, monkeypatch):
    keeps = {"sft": [1, 1, 1, 1, 1], "random": [0, 1, 0, 1, 1], "toss": [1, 0, 0, 1, 1], "mask": [1, 1, 0, 0, 0]}

    def finetune(self, name, method, **more):
        self.arms[name] = {"method": method, **more}
        (self.folder / "methods" / name).mkdir(parents=True, exist_ok=True)
        save_tensors({"keep": torch.tensor(keeps[name]).bool()}, self.folder / "methods" / name / "selection.safetensors", {})

    monkeypatch.setattr(Recorder, "finetune", finetune)
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(sweep, "Experiment", Recorder)
    found = sweep.transfer(3, tmp_path)
    big, small = Recorder.made
    assert [Path(one.common["model"]).name for one in Recorder.made] == ["base", "base-small"] and big.files == small.files
    for one, other in ((big, small), (small, big)):
        assert list(one.arms) == ["toss", "sft", "random", "mask"]
        assert one.arms["mask"] == {"method": "mask", "mask": str(other.folder / "methods/toss/selection.safetensors")}
    lines = [(line["x"], line["arm"], line["shared"]) for line in found if line["x"] == "base-small"]
    assert lines == [("base-small", "sft", None), ("base-small", "random", 0.5), ("base-small", "toss", 1.0),
                     ("base-small", "mask", 0.3333)]  # fmt: skip
    assert len(found) == 8 and "shared with own toss" in sweep.table_of(found, "fine-tuned")
    assert "base-small" in sweep.chart(found, "transfer", "fine-tuned")
