"""Shared by all tests: a tiny random base, small data files, a run, and ways to start commands."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # for subprocesses too: these models are too small for more
if "TOSS_CUDA" not in os.environ:  # make gpu, for test_cuda.py
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # comparisons to the bit are of float32 on the CPU
torch.set_num_threads(1)

FAST = "--epochs 1 --batch-size 4 --rank 2 --lr 1e-2".split()


# Commands


def run(*command, **environment: str) -> subprocess.CompletedProcess:
    """Run `python COMMAND` from the repository's root, as in run("-m", "toss.audit.show", ...)."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@cache
def script_module(name: str) -> ModuleType:
    """train.py, score.py or select.py, whose name is also that of a standard module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(name: str, *argv, fast: bool = True) -> int | None:
    """Call main(argv) of a script or a module, "train" or "toss.audit.show"; `fast`: after FAST."""
    words = [str(word) for word in argv]
    if fast and name in ("train", "select"):
        words = FAST + words
    module = import_module(name) if "." in name else script_module(name)
    return module.main(words)


def sources(files: dict[str, str], base: Path) -> str:
    """The inputs of train.py, as flags."""
    return f"--model {base} --harmful {files['harmful']} --utility {files['utility']}"


def make_run(run: Path, base: Path, files: dict[str, str], *flags) -> Path:
    """Train both references and score the custom set."""
    script("train", "--run", run, *sources(files, base).split(), *flags)
    script("score", "--run", run, "--custom", files["custom"], *flags)
    return run


# Files


def write_jsonl(path: Path, rows: list) -> str:
    """Write one line per row, a dictionary or a text; returns the path as text."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            line = row if isinstance(row, str) else json.dumps(row)
            file.write(line + "\n")
    return str(path)


def read_jsonl(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is below a folder, by relative path: the content of files, None for folders."""
    content = {}
    for path in sorted(folder.rglob("*")):
        content[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return content


def edit_json(path: Path, **fields) -> None:
    """Change a JSON file, without the fields that become "absent"."""
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    for name in list(content):
        if content[name] == "absent":
            del content[name]
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_tensors(file: Path, name: str, change) -> None:
    """Replace a tensor of a safetensors file by change(tensor or None); None removes it."""
    tensors = load_file(file)
    new = change(tensors.pop(name, None))
    if new is not None:
        tensors[name] = new.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def fails(words: str, work, *arguments, error: type | None = None, **options) -> None:
    """Assert that work(...) raises an InputError, or `error`, of one line that fits `words`."""
    from model.io import InputError

    with pytest.raises(error or InputError, match=words) as raised:
        work(*arguments, **options)
    assert "\n" not in str(raised.value)


# A base, data, and a run


def make_base(folder: Path, seed: int = 0, **fields) -> Path:
    """Write a random checkpoint, its logits not flat; `fields` go into its config.json."""
    from model.checkpoint import skeleton

    shutil.copytree(GOLDENS / "tokenizer-chatml", folder)
    (folder / "golden.json").unlink()
    shutil.copy(ROOT / "tests/config.json", folder)
    edit_json(folder / "config.json", **fields)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in skeleton(folder).named_parameters():
        noise = 0.15 * torch.randn(parameter.shape, generator=generator)
        tensors[name] = torch.ones(parameter.shape) if "norm" in name else noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_files(folder: Path) -> dict[str, str]:
    """Copy small reference and custom sets; two custom rows hold marked harm."""
    files = {}
    for name in ("harmful", "utility", "custom"):
        files[name] = shutil.copy(ROOT / f"tests/rows/{name}.jsonl", str(folder))
    return files


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def model(base):
    from model import load_checkpoint

    return load_checkpoint(base)


@pytest.fixture(scope="session")
def tokenizer(base):
    from model import load_tokenizer

    return load_tokenizer(base)


@pytest.fixture(scope="session")
def tokens(tokenizer):
    """Eight rows of different lengths."""
    from helpers import tokens_of

    rows = [{"prompt": "a " * n, "response": "yes I can " * (9 - n)} for n in range(1, 9)]
    return tokens_of(rows, tokenizer)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Paths of the test's own data files: harmful, utility, custom."""
    return write_files(tmp_path)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, base) -> Path:
    """A folder with data files and a run, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("trained")
    make_run(folder / "run", base, write_files(folder))
    return folder


@pytest.fixture
def trained(tmp_path, trained_once, files) -> Path:
    """The test's own copy of a run with both references and scores, from `base` and `files`."""
    run = Path(shutil.copytree(trained_once / "run", tmp_path / "run"))
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace(str(trained_once), str(tmp_path)))
    return run


@pytest.fixture
def place(trained, tmp_path, base) -> Path:
    """The folder of the run, with a base of its own."""
    own = shutil.copytree(base, tmp_path / "base")
    text = (trained / "run.json").read_text()
    (trained / "run.json").write_text(text.replace(str(base), str(own)))
    return tmp_path


@pytest.fixture
def theirs(trained, tmp_path) -> Path:
    """A run that holds nothing but references as an outsider would publish them."""
    for role in ("degraded", "utility"):
        folder = Path(shutil.copytree(trained / role, tmp_path / "theirs" / role))
        (folder / "record.json").unlink()
        weights = folder / "adapter_model.safetensors"
        save_file(load_file(weights), weights, {"format": "pt"})
    return tmp_path / "theirs"


@pytest.fixture(scope="session")
def stages(tmp_path_factory, base):
    """Commands of a run, and what each leaves if nothing disturbs it; see stages.py."""
    from stages import Stages

    return Stages(tmp_path_factory.mktemp("stages"), base)
