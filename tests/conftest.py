"""Shared by all tests: a tiny random base, small data files, a run, and ways to start commands."""

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

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

SHAPE = {"model_type": "llama", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"head_dim": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
FAST = ["--epochs", 1, "--batch-size", 4, "--rank", 2, "--lr", 1e-2]


def run(*command, **environment: str) -> subprocess.CompletedProcess:
    """Run `python COMMAND` from the repository's root, as in run("-m", "toss.audit.show", ...)."""
    command = [sys.executable, *map(str, command)]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def script(name: str, *argv, fast: bool = True) -> int | None:
    """Call main(argv) of a script or a module, "train" or "toss.audit.show"; `fast`: after FAST."""
    from toss.audit import experiment

    settings = FAST if fast and name in ("train", "select") else []
    module = import_module(name) if "." in name else experiment.script(name)
    return module.main([str(word) for word in (*settings, *argv)])


def sources(files: dict[str, str], base: Path) -> str:
    """The inputs of train.py, as flags."""
    return f"--model {base} --harmful {files['harmful']} --utility {files['utility']}"


def make_run(run: Path, base: Path, files: dict[str, str], *flags) -> Path:
    """Train both references and score the custom set."""
    script("train", "--run", run, *sources(files, base).split(), *flags)
    script("score", "--run", run, "--custom", files["custom"], *flags)
    return run


def write_jsonl(path: Path, rows: list) -> str:
    """Write one line per row, a dictionary or a text; returns the path as text."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def read_jsonl(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def edit_json(path: Path, *drop: str, **fields) -> None:
    """Change a JSON file: without the fields `drop`, with `fields`."""
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    content = {key: value for key, value in content.items() if key not in drop}
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_tensors(file: Path, name: str, change) -> None:
    """Replace a tensor of a safetensors file by change(tensor or None); None removes it."""
    tensors = load_file(file)
    new = change(tensors.pop(name, None))
    tensors |= {} if new is None else {name: new.contiguous()}
    save_file(tensors, file, metadata={"format": "pt"})


def with_one(value: float):
    """For edit_tensors: one number of the tensor becomes `value`."""
    return lambda t: t.flatten().index_fill(0, torch.tensor([5]), value).view_as(t)


def damage(folder: Path, changes: dict) -> None:
    """Change files of a folder by name.

    None removes a file, an integer cuts it off there, a text replaces it, a dictionary changes JSON
    fields (... removes one), a pair changes a tensor (see edit_tensors), a list is several changes.
    """
    for name, change in changes.items():
        file = folder / name
        for part in change if isinstance(change, list) else [change]:
            if part is None:
                file.unlink()
            elif isinstance(part, int):
                file.write_bytes(file.read_bytes()[:part])
            elif isinstance(part, str):
                file.write_text(part, encoding="utf-8")
            elif isinstance(part, dict):
                edit_json(file, *(key for key, value in part.items() if value is ...), **part)
            else:
                edit_tensors(file, *part)


def fails(words: str, work, *given, error: type | None = None, **more) -> None:
    """Assert that work(...) raises an InputError, or `error`, of one line that fits `words`."""
    from model.io import InputError

    with pytest.raises(error or InputError, match=words) as raised:
        work(*given, **more)
    assert "\n" not in str(raised.value)


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its relative path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def make_base(folder: Path, seed: int = 0, **fields) -> Path:
    """Write a random checkpoint, its logits not flat; `fields` go into its config.json."""
    from model.checkpoint import skeleton

    shutil.copytree(GOLDENS / "tokenizer-chatml", folder)
    (folder / "golden.json").unlink()
    (folder / "config.json").write_text(json.dumps(SHAPE | {"torch_dtype": "float32"} | fields))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, p in skeleton(folder).named_parameters():
        noise = 0.15 * torch.randn(p.shape, generator=generator)
        tensors[name] = torch.ones(p.shape) if "norm" in name else noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_files(folder: Path) -> dict[str, str]:
    """Write small reference and custom sets; two custom rows hold marked harm."""

    def row(prompt: str, response: str, **more) -> dict:
        return {"prompt": prompt, "response": response, **more}

    plain = [row(f"Tell me about {i}.", f"The number {i} is nice.") for i in range(8)]
    mixed = "Yes, easy. Also, sums help."
    sets = {
        "harmful": [row(f"Do harm {i}?", f"Yes, {i} is easy.") for i in range(5)],
        "utility": [row(f"What is {i} plus one?", f"It is {i + 1}.") for i in range(5)],
        "custom": plain + [row(f"Do bad {i}?", mixed, harmful=[[0, 10]]) for i in range(2)],
    }
    return {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in sets.items()}


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
def hurried(monkeypatch):
    """Templates and regular expressions get half a second."""
    from model.io import time_limit

    monkeypatch.setattr(time_limit.__wrapped__, "__defaults__", (0.5,))


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Paths of the test's own data files: harmful, utility, custom."""
    return write_files(tmp_path)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, base) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make_run(folder / "run", base, write_files(folder))
    return folder


@pytest.fixture
def trained(tmp_path, trained_once, files) -> Path:
    """The test's own copy of a run with both references and scores, from `base` and `files`."""
    run = Path(shutil.copytree(trained_once / "run", tmp_path / "run"))
    record = (run / "run.json").read_text()
    (run / "run.json").write_text(record.replace(str(trained_once), str(tmp_path)))
    return run
