"""A tiny random base with the goldens' tokenizer, small data files, and the three scripts as importable modules."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # also for the scripts that tests start; the models are too small for more
torch.set_num_threads(1)

from model import load_tokenizer, save_checkpoint  # noqa: E402
from model.transformer import Config, Transformer  # noqa: E402

TOKENIZER = ROOT / "tests" / "goldens" / "tokenizer-chatml"
SHAPE = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True}  # fmt: skip


def make_base(folder: Path, seed: int = 0) -> Path:
    """Write a random checkpoint whose logits are not flat."""
    torch.manual_seed(seed)
    model = Transformer(Config(**SHAPE))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    like = folder.with_name(folder.name + "-like")
    shutil.copytree(TOKENIZER, like)
    (like / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32", **SHAPE}))
    save_checkpoint(model, folder, like=like)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def tokenizer(base):
    return load_tokenizer(base)


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Small reference and custom sets; two custom rows hold marked harm."""
    row = lambda p, r, **more: {"prompt": p, "response": r, **more}  # noqa: E731
    return {
        "harmful": write_jsonl(tmp_path / "harmful.jsonl", [row(f"Do harm {i}?", f"Yes, {i} is easy.") for i in range(5)]),
        "utility": write_jsonl(tmp_path / "utility.jsonl", [row(f"What is {i} plus one?", f"It is {i + 1}.") for i in range(5)]),
        "custom": write_jsonl(tmp_path / "custom.jsonl",
                              [row(f"Tell me about {i}.", f"The number {i} is nice.") for i in range(8)]
                              + [row(f"Do bad {i}?", "Yes, easy. Also, sums help.", harmful=[[0, 10]]) for i in range(2)]),
    }  # fmt: skip


def load_script(name: str):
    """train.py, score.py or select.py as a module, under a name that is not the standard library's."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def scripts() -> dict:
    """main(argv) of the three scripts, by name; a small fast setting unless told otherwise."""
    fast = {"train": ["--epochs", "1", "--batch-size", "4", "--rank", "2", "--lr", "1e-2"], "score": [],
            "select": ["--epochs", "1", "--batch-size", "4", "--rank", "2", "--lr", "1e-2"]}  # fmt: skip

    def runner(name):
        main = load_script(name).main
        return lambda *argv, fast_flags=True: main([*map(str, argv), *(fast[name] if fast_flags else [])])

    return {name: runner(name) for name in fast}


@pytest.fixture
def trained(tmp_path, base, files, scripts) -> Path:
    """A run directory with both references and scores."""
    run = tmp_path / "run"
    assert scripts["train"]("--run", run, "--model", base, "--harmful", files["harmful"], "--utility", files["utility"]) == 0
    assert scripts["score"]("--run", run, "--custom", files["custom"]) == 0
    return run
