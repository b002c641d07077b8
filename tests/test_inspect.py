"""What a path holds, what it was made from, whether it fits a run; and one line for what cannot be read."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOKENIZER, make_base, write_jsonl
from safetensors.torch import load_file, save_file

from model.files import made_from, save_tensors
from toss.audit.inspect import main
from toss.run import misfits

GOLDENS = ROOT / "tests" / "goldens"


@pytest.fixture
def look(capsys):
    """Run the command: its exit status, and its lines as a table from label to text."""

    def call(*argv) -> tuple[int, dict[str, str]]:
        capsys.readouterr()
        status, out = main([*map(str, argv)]), capsys.readouterr()
        if status == 1:
            assert not out.out and out.err.startswith("error: ") and out.err.count("\n") == 1
            return status, {"error": out.err}
        first, *lines = out.out.splitlines()
        cells = [line.strip().split("  ", 1) for line in reversed(lines) if line]  # of two equal labels the first counts
        return status, {**{cell[0]: cell[-1].strip() for cell in cells}, "": first}

    return call


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(path: Path, change) -> None:
    """Change the tensors and the header of one of the project's files."""
    tensors, header = load_file(path), made_from(path)
    change(tensors, header)
    save_tensors(tensors, path, header)


def test_a_checkpoint(look, base):
    status, said = look(base)
    assert status == 0 and said[""] == f"{base}: a checkpoint" and said["model_type"] == "llama"
    parameters = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    assert said["parameters"].startswith(f"{parameters:,} in 20 tensors, float32, ")
    assert said["parameters"].endswith(" kB in 1 file")
    assert (said["num_hidden_layers"], said["head_dim"], said["tie_word_embeddings"]) == ("2", "8", "true")
    assert said["loading"].startswith("complete") and said["prompt form"].startswith("chat template, in ")
    assert "id " in said["eos"] and look(base / "model.safetensors")[1]["parameters"] == said["parameters"]


def test_where_the_chat_template_is(look, tmp_path, base):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} é\n{% endfor %}", encoding="utf-8")
    assert look(copy)[1]["prompt form"] == "chat template, in chat_template.jinja"
    (copy / "chat_template.jinja").unlink()
    edit_json(copy / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }} é")
    assert look(copy)[1]["prompt form"] == "chat template, in tokenizer_config.json"
    config.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert look(copy)[1]["prompt form"].startswith("human")


def test_shards_dtypes_and_raw_fields(look, tmp_path, base):
    status, said = look(GOLDENS / "gqa-tied-shards")
    assert status == 0 and said["parameters"].endswith("in 3 files") and said["loading"].startswith("complete")
    assert '"rope_theta": 500.0' in said["rope_parameters"] and said["tokenizer"].startswith("refused: ")
    assert look(GOLDENS / "gqa-tied-shards" / "model.safetensors.index.json")[1]["parameters"] == said["parameters"]
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor.half() if "mlp" in name else tensor for name, tensor in tensors.items()}, copy / "model.safetensors")
    edit_json(copy / "config.json", sliding_window=128)
    said = look(copy)[1]
    assert "float16 and float32" in said["parameters"] and said["sliding_window"] == "128"


@pytest.mark.parametrize("change, refusal", [({"model_type": "mamba"}, "model_type 'mamba' is not implemented here"),
                                             ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
                                             ({"num_hidden_layers": 3}, "9 tensors are missing, the first is model.layers.2."),
                                             ({"num_hidden_layers": 1}, "model.layers.1."),
                                             ({"intermediate_size": 60}, "but config.json asks for (")])  # fmt: skip
def test_a_checkpoint_that_cannot_be_loaded_says_why(look, tmp_path, base, change, refusal):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    edit_json(copy / "config.json", **change)
    status, said = look(copy)
    assert status == 0 and said["loading"].startswith("refused: ") and refusal in said["loading"]


def test_a_checkpoint_as_the_base_of_a_run(look, tmp_path, base, trained):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    status, said = look(copy, "--run", trained)
    assert status == 0 and said["base_sha256"].endswith("  fits") and said["tokenizer_sha256"].endswith("  fits")
    other = make_base(tmp_path / "other", seed=1)
    status, said = look(other, "--run", trained)
    assert status == 2 and "another base model: base_sha256" in said["base_sha256"]
    assert said["tokenizer_sha256"].endswith("  fits") and said[str(trained)] == "does not fit: another base model"


def test_adapters_of_a_run(look, trained):
    status, said = look(trained / "degraded")
    assert status == 0 and said[""].endswith(": the degraded adapter of a run (LoRA)") and said["r"] == "2"
    assert "harmful data on purpose" in said["warning"] and said["data_sha256"].endswith("  fits")
    assert said["loading"].startswith("every tensor fits a layer of ") and said[str(trained)] == "fits"
    status, said = look(trained / "utility" / "adapter_model.safetensors")
    assert status == 0 and "warning" not in said and said["role"] == "utility"


@pytest.mark.parametrize("name, label, text", [("rslora", "use_rslora", "true"),
                                               ("pattern", "rank_pattern", '{"layers.0.self_attn.q_proj": 2}')])  # fmt: skip
def test_an_adapter_made_elsewhere(look, name, label, text):
    status, said = look(GOLDENS / "adapters" / name)
    assert status == 0 and said[""].endswith(": an adapter (LoRA)") and said[label] == text
    assert "made elsewhere" in said["made from"] and "shapes unchecked" in said["loading"]


def test_an_adapter_made_elsewhere_is_checked_by_its_shapes(look, tmp_path, trained):
    foreign = Path(shutil.copytree(trained / "utility", tmp_path / "foreign"))
    save_file(load_file(foreign / "adapter_model.safetensors"), foreign / "adapter_model.safetensors")
    status, said = look(foreign, "--run", trained)
    assert status == 0 and "made elsewhere" in said["made from"] and said[str(trained)] == "fits"
    status, said = look(GOLDENS / "adapters" / "all", "--run", trained)
    assert status == 2 and "the adapter was made for another base" in said["loading"] and "it is refused" in said[str(trained)]


def test_an_adapter_that_is_refused_says_by_which_setting(look, tmp_path):
    copy = Path(shutil.copytree(GOLDENS / "adapters" / "qv", tmp_path / "copy"))
    edit_json(copy / "adapter_config.json", use_dora=True)
    status, said = look(copy)
    assert status == 0 and said["loading"].startswith("refused: ") and "use_dora" in said["loading"]


def test_scores(look, trained):
    status, said = look(trained / "scores.safetensors")
    tensors = load_file(trained / "scores.safetensors")
    n, S = int(tensors["response"].sum()), (tensors["loss_utility"] - tensors["loss_degraded"])[tensors["response"]]
    assert status == 0 and said["rows"] == "10, 0 skipped, 0 cut"
    assert said["tokens"] == f"{len(tensors['input_ids'])}, of which {n} of responses"
    assert f"mean {S.mean():.3f}, standard deviation {S.std():.3f}" in said["S = L^u - L^h"]
    assert said["losses"].startswith("loss_degraded, loss_utility (scored in float32; ")
    assert said["ground truth"].startswith(f"{int((tensors['harmful'] & tensors['response']).sum())} response tokens are harmful")
    assert all(said[name].endswith("  fits") for name in ("custom_sha256", "degraded_sha256", "utility_sha256", "base_sha256"))


def test_a_selection_with_and_without_its_run(look, tmp_path, trained, scripts):
    assert scripts["select"]("--run", trained, "--discard", "0.2") == 0
    file = trained / "methods/toss/selection.safetensors"
    status, said = look(file)
    keep, scores = load_file(file)["keep"], load_file(trained / "scores.safetensors")
    gone, n = ~keep, int(scores["response"].sum())
    assert status == 0 and said["method"] == "toss, d = 0.2, keep_eos = False"
    assert said["discarded"] == f"{int(gone.sum())} of {n} ranked tokens, {len(keep)} in all"
    assert said["precision"].startswith(f"{round(float(scores['harmful'][gone].float().mean()), 4)} [")
    assert said["lost all"].endswith(" of 10 rows") and said["scores_sha256"].endswith("  fits")
    S = scores["loss_utility"] - scores["loss_degraded"]
    assert said["score"] == f"{S[gone].min():.3f} to {S[gone].max():.3f} of those that went"
    alone = shutil.copyfile(file, tmp_path / "alone.safetensors")
    status, said = look(alone)
    assert status == 0 and "precision" not in said and not said["scores_sha256"].endswith("fits")
    assert look(alone, "--run", trained)[1]["precision"]


def test_a_run_and_the_folders_in_it(look, trained, files, scripts):
    assert scripts["select"]("--run", trained, "--pro", "2", "--pro-samples", "2") == 0
    assert scripts["select"]("--run", trained, "--merge") == 0
    status, said = look(trained)
    assert status == 0 and said[""] == f"{trained}: a run directory" and said["custom set"] == f"{files['custom']}: as it was"
    assert said["prompt form"] == "chat, at most 2048 tokens a row" and said[str(trained)] == "fits"
    places = ("degraded", "utility", "scores.safetensors", "methods/toss/model", "methods/toss-pro/selection.safetensors",
              "methods/toss-pro/round-1/degraded", "methods/toss-pro/round-2/scores.safetensors")  # fmt: skip
    assert {place: said[place].split("  ")[-1] for place in places} == dict.fromkeys(places, "fits")
    assert look(trained / "methods")[1]["toss-pro/model"].endswith("  fits")
    status, said = look(trained / "methods" / "toss-pro")
    assert status == 0 and said["method"].startswith("toss-pro, d = 0.1") and said["round-2/degraded"].endswith("  fits")
    status, said = look(trained / "methods" / "toss-pro" / "round-2")
    assert status == 0 and said["added rows"] == "2" and said["scores.safetensors"].endswith("  fits")
    status, said = look(trained / "methods/toss/model/merged")
    assert status == 0 and said[""].endswith(": a checkpoint") and str(trained) not in said
    status, said = look(trained / "methods/toss/model/merged", "--run", trained)  # whose weights are in it
    assert status == 0 and "merged from" in said and said["base_sha256"].endswith("  fits") and len(said["adapter_sha256"]) == 16
    edit_json(trained / "run.json", stages={**json.loads((trained / "run.json").read_text())["stages"], "diagnosis": {"seconds": 2}})
    status, said = look(trained)
    assert status == 0 and said["stage diagnosis"] == "2 s" and "its files are gone" not in "".join(said.values())


def test_a_custom_file_that_changed(look, trained, files):
    write_jsonl(Path(files["custom"]), [{"prompt": "a", "response": "b"}])
    status, said = look(trained)
    assert status == 2 and said["custom set"].endswith(": changed since") and "another custom file" in said["scores.safetensors"]
    assert look(trained / "scores.safetensors")[0] == 2 and look(trained / "degraded")[0] == 0
    Path(files["custom"]).unlink()  # it may be gone: then what run.json recorded counts
    status, said = look(trained)
    assert status == 0 and said["custom set"].endswith(": gone")


def test_a_degraded_adapter_that_was_made_again(look, trained, files, scripts):
    assert scripts["select"]("--run", trained) == 0
    rewrite(trained / "degraded" / "adapter_model.safetensors", lambda tensors, header: next(iter(tensors.values())).mul_(2))
    status, said = look(trained)
    assert status == 2 and said["degraded"].endswith("  fits")
    for place in ("scores.safetensors", "methods/toss/selection.safetensors", "methods/toss/model"):
        assert said[place].endswith("  another degraded adapter")
    assert "another degraded adapter: degraded_sha256 " in look(trained / "scores.safetensors")[1]["degraded_sha256"]


def test_the_last_round_decides_on_toss_pros_mask(look, trained, scripts):
    assert scripts["select"]("--run", trained, "--pro", "2", "--pro-samples", "1") == 0
    shutil.rmtree(trained / "methods/toss-pro/round-2")
    status, said = look(trained / "methods/toss-pro")
    assert status == 2 and said["selection.safetensors"].endswith("another scores file")
    assert said["round-1/scores.safetensors"].endswith("  fits")


def test_files_of_another_run(look, tmp_path, trained, base, files, scripts):
    custom = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "response": "b c d e f g h"}])
    other = tmp_path / "other"
    assert scripts["select"]("--run", other, "--method", "sft", "--model", base, "--custom", custom, "--max-length", "64") == 0
    status, said = look(other / "methods/sft/selection.safetensors", "--run", trained)
    assert status == 2 and said["max_length"] == "64  another row length: max_length 64 there, 2048 now"
    assert look(other / "methods/sft/selection.safetensors")[0] == 0
    status, said = look(other, "--run", trained)
    assert status == 2 and "another custom file" in said["methods/sft/model"]


def test_a_run_whose_base_is_gone_is_still_described(look, tmp_path, trained, base):
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    record = json.loads((trained / "run.json").read_text())
    edit_json(trained / "run.json", settings={**record["settings"], "model": str(moved)})
    shutil.rmtree(moved)
    status, said = look(trained)
    assert status == 0 and said["scores.safetensors"].endswith("  fits")
    assert "its base was not compared" in said[str(trained)] and "no such checkpoint folder" in said[str(trained)]
    status, said = look(trained / "degraded")
    assert status == 0 and said["data_sha256"].endswith("  fits") and not said["base_sha256"].endswith("fits")
    status, said = look(trained / "scores.safetensors", "--run", trained)
    assert status == 1 and "no such checkpoint folder" in said["error"]


def test_a_file_that_was_altered(look, trained, scripts):
    assert scripts["select"]("--run", trained) == 0
    rewrite(trained / "methods/toss/selection.safetensors", lambda tensors, header: tensors["keep"].fill_(True))
    status, said = look(trained / "methods/toss/selection.safetensors")
    assert status == 1 and "it was altered" in said["error"]
    rewrite(trained / "scores.safetensors", lambda tensors, header: tensors["input_ids"][:3].fill_(7))
    assert "it was altered" in look(trained / "scores.safetensors")[1]["error"]
    status, said = look(trained)
    assert status == 2
    assert all("it was altered" in said[place] for place in ("scores.safetensors", "methods/toss/selection.safetensors"))


def test_unknown_strings_of_a_header_are_printed_without_control_characters(look, tmp_path):
    header = {"mask_sha256": "ab" * 32, "note": "a\n\x1b[2Jb"}
    save_tensors({"keep": torch.ones(3, dtype=torch.bool)}, tmp_path / "s.safetensors", header)
    status, said = look(tmp_path / "s.safetensors")
    assert status == 0 and said["mask_sha256"] == "ab" * 8 and said["note"] == "a <1b>[2Jb"


@pytest.mark.parametrize("damage", [b"", b"\x10\0\0\0\0\0\0\0{}", b"version https://git-lfs", b"\xff" * 500, b"\x80\x02}q\0.",
                                    b"PK\x03\x04"])  # fmt: skip
@pytest.mark.parametrize("which", ["scores.safetensors", "degraded/adapter_model.safetensors", "base/model.safetensors"])
def test_a_broken_file_is_one_line(look, tmp_path, trained, base, damage, which):
    shutil.copytree(base, trained / "base")
    (trained / which).write_bytes(damage)
    status, said = look(trained / which)
    assert status == 1 and str(trained / which) in said["error"]
    if "scores" in which:
        assert ("pickle" in said["error"]) == (damage[:1] == b"\x80" or damage[:2] == b"PK")
    if "base" not in which:
        status, said = look(trained)
        assert status == 2 and "safetensors" in said[which.removesuffix("/adapter_model.safetensors")]


@pytest.mark.parametrize("which", ["scores.safetensors", "degraded/adapter_model.safetensors"])
def test_a_truncated_file_is_one_line(look, trained, which):
    whole = (trained / which).read_bytes()
    for length in (4, 8, 100, len(whole) // 2, len(whole) - 1):
        (trained / which).write_bytes(whole[:length])
        status, said = look(trained / which)
        assert status == 1 and which.split("/")[-1] in said["error"]


@pytest.mark.parametrize("record, words", [({"settings": []}, "settings is not a table"), ({"hashes": 3}, "malformed"),
                                           ({"stages": [1]}, "stages is not a table"), ({"settings": {"model": 5}}, "malformed"),
                                           ({"inputs": "x"}, "inputs is not a table")])  # fmt: skip
def test_a_malformed_run_json_is_one_line(look, trained, record, words):
    edit_json(trained / "run.json", **record)
    for path in (trained, trained / "degraded"):
        status, said = look(path)
        assert status == 1 and "run.json" in said["error"] and words in said["error"]


def test_headers_that_are_not_ours(look, tmp_path):
    for note in ("[1]", "{", '{"method": 3}', "5"):
        save_file({"keep": torch.ones(3, dtype=torch.bool)}, tmp_path / "s.safetensors", metadata={"made_from": note})
        status, said = look(tmp_path / "s.safetensors")
        assert status == 1 and "made_from is not a JSON object of strings" in said["error"]


def test_what_is_nothing_known(look, tmp_path, base, trained):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    for path, words in ((tmp_path / "empty", "holds nothing"), (tmp_path / "pickles", "pytorch_model.bin"), (TOKENIZER, "holds "),
                        (tmp_path / "pickles" / "pytorch_model.bin", "pickle"), (tmp_path / "other.safetensors", "1 tensors"),
                        (tmp_path / "absent", "no such checkpoint folder")):  # fmt: skip
        status, said = look(path)
        assert status == 1 and words in said["error"], path
    status, said = look(base, "--run", tmp_path / "empty")
    assert status == 1 and "run.json" in said["error"]


def test_a_name_nobody_has_is_one_line(look, monkeypatch):
    def no_network(*args, **more):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    status, said = look("nobody/nothing")
    assert status == 1 and "neither a local folder nor" in said["error"]


def test_misfits_are_what_a_run_refuses_a_file_for():
    now = {"base_sha256": "a" * 64, "template": "chat", "custom_sha256": "c" * 64}
    assert misfits({"base_sha256": "a" * 64, "role": "sft"}, now) == {}  # what a header does not say cannot differ
    assert misfits({"base_sha256": "b" * 64, "template": "chat"}, now) == {
        "base_sha256": ("another base model", f"base_sha256 {'b' * 16} there, {'a' * 16} now")}


def test_help_names_the_exit_statuses_and_hides_no_standard_module(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "2 it does not fit the run" in text and "--run" in text
    import inspect

    assert hasattr(inspect, "signature") and not any(Path(p or ".").resolve() == ROOT / "toss" / "audit" for p in sys.path)
