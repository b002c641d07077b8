"""How far this project is from transformers and PEFT: `python -m tests.agreement` prints a table.

The rows of golden files need nothing else; the live rows need transformers and peft.
"""

import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from model import load_adapter, load_checkpoint, load_tokenizer, save_adapter, save_checkpoint
from model.generate import generate
from model.lora import lora_layers, merge, new_adapter, use
from model.transformer import Transformer

GOLDENS = Path(__file__).parent / "goldens"
MODELS = sorted(file.parent.name for file in GOLDENS.glob("*/golden.safetensors"))
ADAPTERS = sorted(file.parent.name for file in GOLDENS.glob("adapters/*/golden.safetensors"))
REAL = os.environ.get("TOSS_REAL_CHECKPOINT")


def golden(folder: str) -> dict:
    """A golden file's tensors and metadata ("eos_id", "base"); prompts and answers as lists."""
    with safe_open(GOLDENS / folder / "golden.safetensors", "pt") as file:
        content = dict(file.metadata() or {})
        for name in file.keys():
            content[name] = file.get_tensor(name)
    for name, lengths in (("prompts", "lengths"), ("new_ids", "new_lengths")):
        if name in content:
            rows = zip(content[name].tolist(), content[lengths].tolist())
            content[name] = [row[:length] for row, length in rows]
    return content


def base_of(adapter: str) -> Path:
    """The golden model that a golden adapter sits on."""
    return GOLDENS / golden(f"adapters/{adapter}").get("base", "gqa-tied")


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference between two tensors of one shape."""
    assert ours.shape == theirs.shape
    return float((ours.float() - theirs.float()).abs().max())


@torch.no_grad()
def logits_of(model: Transformer, ids: Tensor) -> Tensor:
    return model.lm_head(model(ids))


def losses_of(logits: Tensor, ids: Tensor) -> Tensor:
    """-log P(token t | tokens before it) [B, T], 0 at t = 0."""
    flat = logits[:, :-1].flatten(0, 1).float()  # positions first: [B, T, V] is less exact
    losses = F.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none")
    return F.pad(losses.view(len(ids), -1), (1, 0))


# The figures


def golden_model(name: str) -> dict[str, float]:
    """Largest differences between a golden model here and in transformers, float32."""
    model = load_checkpoint(GOLDENS / name)
    expected = golden(name)
    ids = expected["input_ids"]
    logits = logits_of(model, ids)
    answers = generate(model, expected["prompts"], 12, int(expected["eos_id"]))
    differing = [ours != theirs for ours, theirs in zip(answers, expected["new_ids"])]
    return {
        "logits, golden files": apart(logits, expected["logits"]),
        "losses of the tokens, golden files": apart(losses_of(logits, ids), expected["losses"]),
        "greedy answers that differ, of 5": sum(differing),
    }


def golden_adapter(name: str) -> dict[str, float]:
    """The largest difference between a golden adapter here and in peft, float32."""
    model = load_checkpoint(base_of(name))
    load_adapter(model, GOLDENS / "adapters" / name)
    expected = golden(f"adapters/{name}")
    logits = logits_of(model, expected["input_ids"])
    return {"an adapter of peft's here, golden files": apart(logits, expected["logits"])}


def round_trip(folder: Path, out: Path) -> dict[str, float]:
    """Largest differences on a way through transformers and peft and back, float32.

    Also "size", the largest logit, and "moved", how much the adapter changes one.
    """
    import peft

    ids = torch.randint(3, 80, (2, 40), generator=torch.Generator().manual_seed(0))
    if str(folder) == REAL:
        text = (GOLDENS.parent.parent / "LICENSE").read_text(encoding="utf-8")
        ids = torch.tensor([load_tokenizer(folder).encode(text)])
    figures = {}

    # A checkpoint of theirs here.
    ours = load_checkpoint(folder)
    theirs = in_transformers(folder)
    base_logits = logits_of(ours, ids)
    expected = their_logits(theirs, ids)
    losses = losses_of(base_logits, ids)
    figures["logits, live"] = apart(base_logits, expected)
    figures["size"] = float(expected.abs().max())
    figures["losses of the tokens, live"] = apart(losses, losses_of(expected, ids))
    figures["tensors, split by transformers"] = split(ours, folder, out / "split")

    # An adapter of ours in peft.
    adapter = wide_adapter(ours)
    use(ours, adapter)
    save_adapter(ours, out / "ours")
    theirs = peft.PeftModel.from_pretrained(theirs, out / "ours").eval()
    expected = their_logits(theirs, ids)
    figures["moved"] = apart(base_logits, expected)
    figures["an adapter of ours in peft"] = apart(logits_of(ours, ids), expected)

    # The same, saved by peft, here; and merged, in transformers.
    theirs.save_pretrained(out / "theirs")
    again = load_checkpoint(folder)
    adapter = load_adapter(again, out / "theirs")
    figures["the same, saved by peft, here"] = apart(logits_of(again, ids), expected)
    merge(again, adapter)
    save_checkpoint(again, out / "merged", like=folder)
    merged = their_logits(in_transformers(out / "merged"), ids)
    figures["the same, merged, in transformers"] = apart(merged, expected)
    return figures


def in_transformers(folder: Path, dtype: torch.dtype | str = torch.float32) -> nn.Module:
    """A checkpoint, read by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def their_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def split(ours: Transformer, folder: Path, out: Path) -> float:
    """The largest difference of a tensor after transformers has saved the checkpoint in shards."""
    tensors = dict(ours.named_parameters())
    size = sum(tensor.numel() for tensor in tensors.values())  # bytes: two shards in any dtype
    in_transformers(folder, "auto").save_pretrained(out, max_shard_size=size)
    assert (out / "model.safetensors.index.json").exists()
    again = dict(load_checkpoint(out).named_parameters())
    return max(apart(again[name], tensors[name]) for name in tensors)


def wide_adapter(model: Transformer):
    """An adapter on every linear layer that moves the logits."""
    targets = {name.rpartition(".")[2] for name in lora_layers(model)}
    adapter = new_adapter(model, 4, 8, sorted(targets), seed=0)
    for B in adapter.B.values():
        B.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return adapter


# The table


def main() -> None:
    """Print the table: one row per figure, one column per family of models."""
    measured = []  # (folder of the model, its figures)
    for name in MODELS:
        measured.append((GOLDENS / name, golden_model(name)))
    for name in ADAPTERS:
        measured.append((base_of(name), golden_adapter(name)))
    if find_spec("peft"):
        live = [GOLDENS / name for name in MODELS]
        if REAL:
            live.append(Path(REAL))
        with tempfile.TemporaryDirectory() as out:
            for folder in live:
                measured.append((folder, round_trip(folder, Path(out) / folder.name)))

    columns: dict[str, dict[str, list[float]]] = {}  # family -> figure -> values
    figures: dict[str, None] = {}  # in the order of their first appearance
    for folder, values in measured:
        family = json.loads((folder / "config.json").read_text())["model_type"]
        if str(folder) == REAL:
            family += f", {folder.name}"
        column = columns.setdefault(family, {})
        for figure, value in values.items():
            column.setdefault(figure, []).append(value)
            figures[figure] = None

    print(f"| largest difference | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for figure in figures:
        cells = [cell(column.get(figure)) for column in columns.values()]
        print(f"| {figure} | {' | '.join(cells)} |")
    print("\nIn brackets: the number of models or adapters.")


def cell(values: list[float] | None) -> str:
    return f"{max(values):.1e} ({len(values)})" if values else "-"


if __name__ == "__main__":
    main()
