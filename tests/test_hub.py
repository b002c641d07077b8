"""A hub id stands for its files: only those needed are fetched, at one commit, never a pickle.

A server on this machine speaks as much of the hub's protocol as huggingface_hub needs. What the hub
does not give stands in hub_refused.txt.
"""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
from agreement import GOLDENS
from conftest import fails, make_base, sources
from helpers import cases, refused, same_weights, succeed

from model import load_checkpoint, load_tokenizer
from model.hub import resolve
from model.io import read_json

PLAIN = GOLDENS / "plain"
TOKENIZER = GOLDENS / "tokenizer-bos"
SMALL = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
UNWANTED = """consolidated.safetensors original/model.safetensors model.fp16.safetensors
    pytorch_model.bin tf_model.h5 README.md""".split()


class Hub(ThreadingHTTPServer):
    """repositories: {id: {revision: (commit, {file: bytes})}}; sent: the fetched files' names."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.sent = []

    def put(self, name, *folders, revision="main", more=()):
        """A new commit of the folders' files, and of small files more; `revision` then names it."""
        files = {file: json.dumps({"name": file}).encode() for file in more}
        for folder in folders:
            for file in folder.glob("*"):
                if "golden" not in file.name:
                    files[file.name] = file.read_bytes()
        commit = hashlib.sha1(repr((name, files)).encode()).hexdigest()
        revisions = self.repositories.setdefault(name, {})
        revisions[revision] = revisions[commit] = (commit, files)
        return commit

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client needs."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        # /ORG/NAME/resolve/REVISION/FILE, or /api/models/ORG/NAME/KIND/REVISION
        path = self.path.partition("?")[0].removeprefix("/api/models").lstrip("/")
        org, name, *rest = path.split("/")
        kind, revision, *file = rest or ["revision", "main"]
        revisions = self.server.repositories.get(f"{org}/{name}")
        if revisions is None:
            self.answer(401, code="RepoNotFound")
        elif revision not in revisions:
            self.answer(404, code="RevisionNotFound")
        elif kind == "resolve" and name == "gated":
            self.answer(403, code="GatedRepo")
        else:
            commit, files = revisions[revision]
            self.answer(200, self.content(kind, commit, files, "/".join(file)), commit)

    do_GET = do_HEAD

    def content(self, kind, commit, files, file):
        """A file, or one of the two lists of all files."""
        if kind == "resolve":
            if self.command == "GET":
                self.server.sent.append(file)
            return files[file]
        if kind == "tree":
            entry = {"type": "file", "size": 2, "oid": ""}
            return json.dumps([{**entry, "path": name} for name in files]).encode()
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": "someone/model", "sha": commit, "siblings": siblings}).encode()

    def answer(self, status, body=b"{}", commit="", code=""):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; huggingface_hub is set to it and to an empty cache."""
    server = Hub()
    constants = huggingface_hub.constants
    endpoint = f"http://127.0.0.1:{server.server_port}"
    url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, huggingface_hub.file_download):  # older versions have it in both
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", url, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.close()


def test_only_the_files_that_are_needed_are_fetched(hub):
    more = ["additional_chat_templates/tool_use.jinja", "special_tokens_map.json"]
    shards = GOLDENS / "gqa-tied-shards"
    hub.put("someone/model", shards, TOKENIZER, more=[*UNWANTED, *more])
    load_tokenizer("someone/model")
    assert sorted(hub.sent) == sorted([*more, *SMALL])

    hub.sent.clear()
    assert same_weights(load_checkpoint("someone/model"), load_checkpoint(shards))
    assert sorted(hub.sent) == sorted(file.name for file in shards.glob("model*"))


def test_a_revision_is_found_and_a_complete_cache_needs_no_network(hub, monkeypatch):
    first = hub.put("someone/model", PLAIN, TOKENIZER)
    second = hub.put("someone/model", GOLDENS / "qwen2", revision="v2")
    commit_of = {None: first, "main": first, first: first, "v2": second, second: second}

    def all_is_found():
        for revision, commit in commit_of.items():
            assert resolve("someone/model", revision).name == commit
        model = load_checkpoint("someone/model", revision="v2")
        assert same_weights(model, load_checkpoint(GOLDENS / "qwen2"))
        fingerprint = load_tokenizer("someone/model").fingerprint()
        assert fingerprint == load_tokenizer(TOKENIZER).fingerprint()

    all_is_found()
    hub.put("someone/half", PLAIN, TOKENIZER)
    load_tokenizer("someone/half")  # not the weights
    hub.close()
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        all_is_found()
        for name in ("someone/half", "someone/other"):
            fails(f"{name}: .*`hf download {name}`", load_checkpoint, name)


@pytest.mark.parametrize(("name", "words"), cases("hub_refused.txt"))
def test_what_the_hub_does_not_give_is_said_in_one_line(hub, name, words):
    hub.put("someone/gated", PLAIN)
    hub.put("someone/pickles", more=[*UNWANTED, "config.json"])
    hub.put("someone/empty", more=["README.md"])
    fails(words, load_checkpoint, name)
    assert not set(UNWANTED) & set(hub.sent)


def test_a_local_folder_never_touches_the_hub_and_wins_over_an_id(base, tmp_path, monkeypatch):
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone/model").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    assert same_weights(load_checkpoint("someone/model"), load_checkpoint(base))
    assert load_tokenizer("someone/model")
    fails("local folder and has no revisions", load_checkpoint, "someone/model", revision="main")


def test_a_run_keeps_the_commit_that_it_was_begun_with(hub, base, tmp_path, files, capsys):
    run = tmp_path / "run"
    commit = hub.put("someone/model", base)
    succeed(f"train.py --run {run} {sources(files, 'someone/model')}")
    hub.put("someone/model", make_base(tmp_path / "other", seed=1))  # main is another model now
    score = f"score.py --run {run} --custom {files['custom']}"
    assert "begun with another" in refused(capsys, f"{score} --revision main")
    hub.close()  # the rest needs no network
    succeed(score)
    succeed(f"select.py --run {run} --merge")
    settings = read_json(run / "run.json")
    assert settings["model"] == "someone/model"
    assert settings["revision"] == commit
    adapter = run / "methods/toss/model"
    config = read_json(adapter / "adapter_config.json")
    assert config["base_model_name_or_path"] == "someone/model"
    assert load_tokenizer(adapter / "merged")
