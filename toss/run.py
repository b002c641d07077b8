"""The run directory: what was made, from what, with which settings; nothing is made twice or mixed up.

run.json holds the settings, the sha256 of each input file, versions, and for each stage its recipe (settings and
hashes of all that went in) and its cost. A stage with an equal recipe is skipped, one with another is refused.
"""

import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

from model.checkpoint import resolve, shards
from model.errors import InputError
from model.files import HASHES, file_beside, file_hash, made_from, read_json, tensors_hash
from model.tokenizer import Tokenizer, load_tokenizer
from toss.dataset import Tokens, tokenise
from toss.parallel import rank
from toss.rows import Row
from toss.settings import ROOT, Settings, flags_of

# The hashes in file headers, in words.
WHAT = {"base_sha256": "base model", "tokenizer_sha256": "tokenizer", "custom_sha256": "custom file",
        "data_sha256": "reference file", "degraded_sha256": "degraded adapter", "utility_sha256": "utility adapter",
        "scores_sha256": "scores file", "tokens_sha256": "set of tokens", "template": "prompt form", "max_length": "row length"}


class Run:
    """One run directory under the given settings."""

    def __init__(self, settings: Settings):
        self.settings, self.folder = settings, Path(settings.run)
        self.file = self.folder / "run.json"
        # Of several processes the first alone writes into the run; what the others write (adapters, which TOSS-Pro loads
        # again) vanishes with them.
        self.scratch = tempfile.TemporaryDirectory() if rank() > 0 else None
        self.out = Path(self.scratch.name) if self.scratch else self.folder
        self.record: dict = read_json(self.file) if self.file.exists() else {}
        HASHES.update(self.record.get("hashes", {}))
        self.checkpoint = resolve(settings.model, settings.revision)
        self.tokenizer: Tokenizer = load_tokenizer(self.checkpoint, settings.template, settings.date)
        self.inputs: dict[str, str] = {}  # path -> sha256 of the input files that this process has used
        for file in (self.checkpoint / "config.json", self.checkpoint / "tokenizer.json",
                     self.checkpoint / "tokenizer_config.json", *shards(self.checkpoint)):
            self.use(file)
        self.vocab_size: int = read_json(self.checkpoint / "config.json").get("vocab_size", 0)
        settings.template = "human" if self.tokenizer.template is None else "chat"
        if self.tokenizer.turn_end != self.tokenizer.eos:
            print(f"note: the chat template ends a turn with {self.tokenizer.turn_end}, but the tokenizer's eos_token is "
                  f"{self.tokenizer.eos}, which ends the responses here; an instruction-tuned model has one for both")
        # What a run was begun with holds in all its stages: the day, if it matters, and a hub id's commit.
        settings.date = None if self.tokenizer.date is None else str(self.tokenizer.date)
        settings.revision = None if Path(settings.model).is_dir() else self.checkpoint.name
        # What identifies the base model and how text becomes ids: part of every recipe and of every file's header.
        self.identity = {
            "base_sha256": tensors_hash(self.checkpoint),
            "tokenizer_sha256": self.tokenizer.fingerprint(),
            "template": settings.template,
            "max_length": str(settings.max_length),
        }

    def recipe(self, names: tuple[str, ...], **inputs: str) -> dict:
        """Everything that decides a stage's result: the named settings, the run's identity, hashes of its inputs."""
        return {"settings": {name: getattr(self.settings, name) for name in names}, **self.identity, **inputs}

    def is_done(self, stage: str, path: Path, recipe: dict, parts: tuple[str, ...] = ()) -> bool:
        """True when `path` was made by an equal recipe and has all its parts: the stage is skipped with a line.

        Raises InputError when something else is there and --overwrite was not given.
        """
        if not path.exists():
            return False
        known = self.record.get("stages", {}).get(stage, {}).get("recipe")
        if known == recipe and not all((path / part).exists() for part in parts):
            print(f"{stage}: {path} is no longer complete, so it is made again")
            return False
        if known == recipe:
            print(f"{stage}: already there with equal settings and inputs, skipped ({path})")
            return True
        if self.settings.overwrite:
            return False
        if known is None:
            raise InputError(f"{path} is there, but {self.file} does not know how it was made; give --overwrite to replace it")
        elsewhere = "another --name" if stage.startswith("methods/") else "another --run"
        raise InputError(f"{path} holds another result (different: {', '.join(differences(known, recipe))}); "
                         f"give --overwrite to replace it, or choose {elsewhere}")

    def check_made_from(self, file: Path, **expected: str) -> None:
        """Refuse a file whose header says that it was made from another model, tokenizer or data than this run's.

        A file without such a header (an adapter made elsewhere) passes: its shapes are checked when it is loaded.
        """
        header, maker = made_from(file), "score.py" if file.name == "scores.safetensors" else "train.py"
        for what, values in misfits(header, {**self.identity, **expected}).values():
            raise InputError(f"{file} was made with {what} than this run has now ({values}); run {maker} again with "
                             "--overwrite, or choose another --run")

    def use(self, path: str | Path) -> str:
        """sha256 of an input file, which run.json will list among the run's inputs."""
        self.inputs[os.path.abspath(path)] = digest = file_hash(path)
        return digest

    def finish(self, stage: str, recipe: dict, cost: dict) -> None:
        """Write down that a stage was made: its recipe, its settings, its cost, and the state of the run."""
        if self.out != self.folder:
            return
        self.record = record = read_json(self.file) if self.file.exists() else {}
        names = [name for name in flags_of(self.settings.script) if name not in ("run", "overwrite")]
        settings = {name: getattr(self.settings, name) for name in names}
        record["demo"] = self.settings.demo
        record["settings"] = {**record.get("settings", {}), **settings}
        record["inputs"] = {**record.get("inputs", {}), **self.inputs}
        record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        record["commit"] = git_commit()
        record.setdefault("stages", {})[stage] = {"recipe": recipe, "settings": settings, **cost}
        record["hashes"] = {key: known for key, known in HASHES.items() if key.split("#")[0] in record["inputs"]}
        with file_beside(self.file) as file:
            file.write_text(json.dumps(record, indent=2) + "\n")

    def tokens(self, rows: list[Row], name: str) -> Tokens:
        """Rows tokenised under the run's tokenizer, template and max_length."""
        tokens = tokenise(rows, self.tokenizer, self.settings.max_length, name)
        highest = int(tokens.input_ids.max())
        if highest >= self.vocab_size:
            raise InputError(f"{self.checkpoint}: tokenizer.json gives the id {highest}, "
                             f"but the model has {self.vocab_size} embeddings")
        return tokens


def differences(known: dict, wanted: dict) -> list[str]:
    """What differs between two recipes, for a message: "lr 1e-05 there, 0.001 now"."""
    flat = [{**recipe, **recipe.get("settings", {})} for recipe in (known, wanted)]
    names = [name for name in flat[1] if name != "settings" and flat[0].get(name) != flat[1][name]]
    return [f"{name} {str(flat[0].get(name))[:16]} there, {str(flat[1][name])[:16]} now" for name in names]


def misfits(header: dict[str, str], now: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Where a file's header says that it was made from something else than there is now, each in words.

    >>> misfits({"max_length": "512", "template": "chat", "role": "utility"}, {"max_length": "2048", "template": "chat"})
    {'max_length': ('another row length', 'max_length 512 there, 2048 now')}
    """
    return {name: (f"another {WHAT.get(name, name)}", f"{name} {header[name][:16]} there, {value[:16]} now")
            for name, value in now.items() if header.get(name, value) != value}


def git_commit() -> str | None:
    """The commit of this code, with a plus sign when the tree has changes; None outside a repository."""
    try:
        call = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
