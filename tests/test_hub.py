"""Checkpoints by hub id, from a server on this machine that speaks as much of the hub's protocol as the client needs."""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch

from model import InputError, load_checkpoint, load_tokenizer
from model.checkpoint import resolve
from model.files import read_json
from model.generate import main as talk

GOLDENS = Path(__file__).parent / "goldens"
TOKEN = "hf_" + "a" * 34
UNWANTED = {name: b"no" for name in ("consolidated.safetensors", "original/model.safetensors", "model.fp16.safetensors",
                                     "pytorch_model.bin", "tf_model.h5", "README.md")}  # fmt: skip
URL = "/{repo_id}/resolve/{revision}/{filename}"


class Hub(ThreadingHTTPServer):
    """Repositories by id: commits by name (the sha256's beginning), and what is refused."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.commits, self.private, self.gated, self.sent = {}, {}, set(), set(), []

    def put(self, name, files, revision="main"):
        """A new commit of a repository, which `revision` then names. Returns its hash."""
        commit = hashlib.sha1(json.dumps([name, revision, sorted(files)]).encode() + b"".join(files.values())).hexdigest()
        self.repositories.setdefault(name, {})[revision] = commit
        self.commits[name, commit] = files
        return commit


class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: no connection outlives the server
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        hub, parts = self.server, self.path.split("?")[0].strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        if len(parts) < 4:  # newer clients ask for more than this server knows
            return self.answer(404)
        name = "/".join(parts[2:4] if listing else parts[:2])
        place = (parts[5:] or ["main"])[0] if listing else parts[3]
        revisions = hub.repositories.get(name, {})
        commit = revisions.get(unquote(place), unquote(place))
        if not revisions or name in hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, code="RepoNotFound")
        if (name, commit) not in hub.commits:
            return self.answer(404, code="RevisionNotFound")
        files = hub.commits[name, commit]
        if listing:
            siblings = [{"rfilename": file} for file in files]
            return self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(), commit)
        file = unquote("/".join(parts[4:]))
        if name in hub.gated:
            return self.answer(403, code="GatedRepo")
        if file not in files:
            return self.answer(404, commit=commit, code="EntryNotFound")
        if self.command == "GET":
            hub.sent.append(file)
        return self.answer(200, files[file], commit)

    do_GET = do_HEAD

    def answer(self, status, body=b"{}", commit=None, code=None):
        self.send_response(status)
        for key, value in (("X-Error-Code", code), ("X-Repo-Commit", commit), ("Content-Length", len(body)),
                           ("Content-Type", "application/json"), ("ETag", f'"{hashlib.sha256(body).hexdigest()}"')):
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def contents(*folders):
    """The files of folders as a repository holds them."""
    return {str(file.relative_to(folder)): file.read_bytes() for folder in folders for file in sorted(folder.rglob("*"))
            if file.is_file() and not file.name.startswith(("golden.", "config-old"))}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, and the client pointed to it and to an empty cache."""
    server = Hub()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    for module in (huggingface_hub.constants, huggingface_hub.file_download):  # older versions have it in both
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + URL, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def close(hub):
    """From now on there is no network."""
    hub.shutdown()
    hub.server_close()


def assert_same_weights(one, two):
    one, two = dict(one.named_parameters()), dict(two.named_parameters())
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_only_the_files_that_the_model_needs_are_fetched(hub):
    hub.put("someone/shards", {**contents(GOLDENS / "gqa-tied-shards", GOLDENS / "tokenizer-bos"), **UNWANTED})
    assert_same_weights(load_checkpoint("someone/shards"), load_checkpoint(GOLDENS / "gqa-tied-shards"))
    assert sorted(hub.sent) == ["chat_template.jinja", "config.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
                                "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    hub.put("someone/whole", {**contents(GOLDENS / "plain"), **UNWANTED})
    hub.sent.clear()
    assert_same_weights(load_checkpoint("someone/whole"), load_checkpoint(GOLDENS / "plain"))
    assert hub.sent == ["config.json", "model.safetensors"]


def test_a_tokenizer_is_fetched_without_the_weights(hub):
    extra = {"additional_chat_templates/tool_use.jinja": b"x", "special_tokens_map.json": b"{}", **UNWANTED}
    hub.put("someone/model", {**contents(GOLDENS / "plain", GOLDENS / "tokenizer-bos"), **extra})
    assert load_tokenizer("someone/model").fingerprint() == load_tokenizer(GOLDENS / "tokenizer-bos").fingerprint()
    assert sorted(hub.sent) == ["additional_chat_templates/tool_use.jinja", "chat_template.jinja", "config.json",
                                "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, capsys):
    first = hub.put("someone/model", contents(GOLDENS / "plain"))
    second = hub.put("someone/model", contents(GOLDENS / "headdim-bias-linear"), "refs/pr/1")
    for revision, folder, commit in ((None, "plain", first), ("main", "plain", first), (first, "plain", first),
                                     ("refs/pr/1", "headdim-bias-linear", second), (second, "headdim-bias-linear", second)):
        assert resolve("someone/model", revision).name == commit
        assert_same_weights(load_checkpoint("someone/model", revision=revision), load_checkpoint(GOLDENS / folder))
    with pytest.raises(InputError, match="someone/model: .*no revision 'v9'"):
        load_checkpoint("someone/model", revision="v9")
    assert talk(["--model", "someone/model", "--revision", "v9", "--prompt", "a"]) == 1
    assert "no revision 'v9'" in capsys.readouterr().err


def test_a_private_repository_needs_the_usual_token(hub, monkeypatch):
    hub.put("someone/private", contents(GOLDENS / "plain"))
    hub.private.add("someone/private")
    for token in (None, "hf_" + "b" * 34):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(InputError, match="someone/private.*HF_TOKEN"):
            load_checkpoint("someone/private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_same_weights(load_checkpoint("someone/private"), load_checkpoint(GOLDENS / "plain"))


@pytest.mark.parametrize(("name", "words"), [
    ("someone/nobody", "neither a local folder nor a repository"),
    ("someone/gated", "gives access on request only"),
    ("someone/pickles", "neither model.safetensors nor its index; pytorch_model.bin is a pickle"),
    ("someone/empty", "no config.json"),
    ("some one/model", "some one/model"),
])  # fmt: skip
def test_what_the_hub_does_not_give_is_said_in_one_line(hub, name, words):
    hub.put("someone/gated", contents(GOLDENS / "plain"))
    hub.gated.add("someone/gated")
    hub.put("someone/pickles", {**contents(GOLDENS / "tokenizer-bos"), **UNWANTED, "config.json": b"{}"})
    hub.put("someone/empty", {"README.md": b"no"})
    with pytest.raises(InputError, match=words) as raised:
        load_checkpoint(name)
    assert "\n" not in str(raised.value) and not any(file in hub.sent for file in UNWANTED)


def test_a_repository_without_a_tokenizer_is_named(hub):
    hub.put("someone/model", contents(GOLDENS / "plain"))
    with pytest.raises(InputError, match="models--someone--model.*tokenizer.json.*no such file"):
        load_tokenizer("someone/model")
    hub.put("someone/slow", {**contents(GOLDENS / "plain"), "tokenizer_config.json": b"{}", "tokenizer.model": b"no"})
    with pytest.raises(InputError, match="tokenizer.json.*no such file.*save_pretrained"):
        load_tokenizer("someone/slow")


@pytest.mark.parametrize("switch", [False, True])
def test_without_a_network_the_cache_is_used(hub, monkeypatch, switch, capsys):
    commit = hub.put("someone/model", contents(GOLDENS / "gqa-tied-shards", GOLDENS / "tokenizer-bos"))
    hub.put("someone/half", contents(GOLDENS / "plain", GOLDENS / "tokenizer-bos"))
    load_checkpoint("someone/model")
    load_tokenizer("someone/half")
    close(hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", switch)
    for revision in (None, "main", commit):
        assert_same_weights(load_checkpoint("someone/model", revision=revision), load_checkpoint(GOLDENS / "gqa-tied-shards"))
    assert f"the cache's files are used as they are ({commit[:12]})" in capsys.readouterr().out
    assert load_tokenizer("someone/model").fingerprint() == load_tokenizer("someone/half").fingerprint()
    for name in ("someone/half", "someone/other"):
        with pytest.raises(InputError, match=f"{name}: .*`hf download {name}` and pass the folder") as raised:
            load_checkpoint(name)
        assert "\n" not in str(raised.value)


def test_a_local_folder_never_touches_the_hub_and_wins_over_an_id(base, tmp_path, monkeypatch):
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone/model").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    for path in (base, "someone/model"):
        assert_same_weights(load_checkpoint(path), load_checkpoint(base))
        assert load_tokenizer(path).fingerprint() == load_tokenizer(base).fingerprint()
    with pytest.raises(InputError, match="local folder, which has no revisions"):
        load_checkpoint("someone/model", revision="main")


def test_a_run_keeps_the_commit_that_it_was_begun_with(hub, base, tmp_path, files, scripts, capsys):
    commit, run = hub.put("someone/model", contents(base)), tmp_path / "run"
    hub.put("someone/model", contents(base), "v1")
    hub.repositories["someone/model"]["v1"] = commit  # a tag of the same commit
    begin = ["--run", run, "--model", "someone/model", "--harmful", files["harmful"], "--utility", files["utility"]]
    assert scripts["train"](*begin) == 0
    settings = read_json(run / "run.json")["settings"]
    assert (settings["model"], settings["revision"], settings["date"]) == ("someone/model", commit, None)
    moved = hub.put("someone/model", {**contents(base), "generation_config.json": b"{ }"})
    assert moved != commit == hub.repositories["someone/model"]["v1"]
    capsys.readouterr()
    for revision in ("main", moved):
        assert scripts["score"]("--run", run, "--custom", files["custom"], "--revision", revision) == 1
        assert f"begun with --revision {commit}, not {moved}" in capsys.readouterr().err
    assert scripts["score"]("--run", run, "--custom", files["custom"], "--model", "someone/model", "--revision", "v1") == 0
    close(hub)  # the rest needs no network
    assert scripts["select"]("--run", run, "--method", "toss", "--merge") == 0
    assert f"revision = {commit}" in capsys.readouterr().out
    assert read_json(run / "methods/toss/model/adapter_config.json")["base_model_name_or_path"] == "someone/model"
    assert load_tokenizer(run / "methods/toss/model/merged").fingerprint() == load_tokenizer(base).fingerprint()
    assert read_json(run / "run.json")["settings"]["revision"] == commit
