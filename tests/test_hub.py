"""A hub id stands for its files: only those needed are fetched, at one commit, never a pickle.

In the place of huggingface_hub's snapshot_download stands one that copies from memory, by the
client's own reading of the patterns. What the hub does not give stands in hub_refused.txt.
"""

import hashlib
import sys

import huggingface_hub
import pytest
from agreement import GOLDENS
from conftest import fails, make_base, sources
from helpers import cases, refused, same_weights, succeed
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from model import load_checkpoint, load_tokenizer
from model.hub import resolve
from model.io import read_json

PLAIN = GOLDENS / "plain"
TOKENIZER = GOLDENS / "tokenizer-bos"
SMALL = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
UNWANTED = """consolidated.safetensors original/model.safetensors model.fp16.safetensors
    pytorch_model.bin tf_model.h5 README.md""".split()


class Hub:
    """A hub, and the cache of its client.

    repositories: {id: {revision: (commit, {file: bytes})}}; sent: the names of fetched files.
    """

    def __init__(self, folder):
        self.cache = folder / "cache"
        self.repositories = {}
        self.sent = []
        self.closed = False

    def put(self, name, *folders, revision="main", more=()):
        """A new commit of the folders' files, and of small files more; `revision` then names it."""
        files = {file: b"{}" for file in more}
        for folder in folders:
            for file in folder.glob("*"):
                if "golden" not in file.name:
                    files[file.name] = file.read_bytes()
        commit = hashlib.sha1(repr((name, files)).encode()).hexdigest()
        revisions = self.repositories.setdefault(name, {})
        revisions[revision] = revisions[commit] = (commit, files)
        return commit

    def snapshot_download(self, name, revision, allow_patterns):
        revisions = self.repositories.get(name)
        problem = None
        if revisions is None:
            problem = errors.RepositoryNotFoundError
        elif "gated" in name:
            problem = errors.GatedRepoError
        elif (revision or "main") not in revisions:
            problem = errors.RevisionNotFoundError
        if problem:
            raise problem.__new__(problem)
        commit, files = revisions[revision or "main"]
        folder = self.cache / name / commit
        if not self.closed:
            folder.mkdir(parents=True, exist_ok=True)
            for file in filter_repo_objects(files, allow_patterns=allow_patterns):
                self.sent.append(file)
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_bytes(files[file])
        if not folder.exists():
            raise OSError("no network")
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_only_the_files_that_are_needed_are_fetched(hub):
    more = ["additional_chat_templates/tool_use.jinja", "special_tokens_map.json"]
    shards = GOLDENS / "gqa-tied-shards"
    hub.put("someone/model", shards, TOKENIZER, more=[*UNWANTED, *more])
    load_tokenizer("someone/model")
    small = sorted([*more, *SMALL])
    assert sorted(hub.sent) == small
    hub.sent.clear()
    assert same_weights(load_checkpoint("someone/model"), load_checkpoint(shards))
    weights = [file.name for file in shards.glob("model*")]
    assert sorted(hub.sent) == sorted([*small, *weights])


def test_a_revision_is_found_and_a_complete_cache_needs_no_network(hub):
    first = hub.put("someone/model", PLAIN, TOKENIZER)
    second = hub.put("someone/model", GOLDENS / "qwen2", revision="v2")
    commit_of = {None: first, "main": first, first: first, "v2": second, second: second}
    for closed in (False, True):
        hub.closed = closed
        for revision, commit in commit_of.items():
            assert resolve("someone/model", revision).name == commit
    model = load_checkpoint("someone/model", revision="v2")
    assert same_weights(model, load_checkpoint(GOLDENS / "qwen2"))
    fails("no revision 'v9'", load_checkpoint, "someone/model", revision="v9")
    hub.put("someone/other", PLAIN)
    fails("`hf download someone/other`", load_checkpoint, "someone/other")


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
    hub.closed = True  # the rest needs no network
    succeed(score)
    succeed(f"select.py --run {run} --merge")
    settings = read_json(run / "run.json")
    assert settings["model"] == "someone/model"
    assert settings["revision"] == commit
    adapter = run / "methods/toss/model"
    config = read_json(adapter / "adapter_config.json")
    assert config["base_model_name_or_path"] == "someone/model"
    assert load_tokenizer(adapter / "merged")
