"""How far this project is from transformers and PEFT: `python -m tests.agreement` prints a table.

The rows of golden files need nothing else; the live rows need transformers and peft.
"""

import os
import tempfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from model import load_adapter, load_checkpoint, load_tokenizer, save_adapter, save_checkpoint
from model.generate import generate
from model.io import read_json
from model.lora import lora_layers, merge, new_adapter, use

GOLDENS = Path(__file__).parent / "goldens"
MODELS = sorted(file.parent.name for file in GOLDENS.glob("*/golden.safetensors"))
ADAPTERS = sorted(file.parent.name for file in GOLDENS.glob("adapters/*/golden.safetensors"))
REAL = os.environ.get("TOSS_REAL_CHECKPOINT")
LIVE = [GOLDENS / name for name in MODELS] + ([Path(REAL)] if REAL else [])


def golden(folder):
    """A golden file's tensors and metadata ("eos_id", "base"); prompts and answers as lists."""
    file = GOLDENS / folder / "golden.safetensors"
    with safe_open(file, "pt") as tensors:
        content = load_file(file) | (tensors.metadata() or {})
    if "prompts" in content:
        content["prompts"] = unpadded(content["prompts"], content["lengths"])
        content["new_ids"] = unpadded(content["new_ids"], content["new_lengths"])
    return content


def unpadded(rows, lengths):
    return [row[:length] for row, length in zip(rows.tolist(), lengths)]


def base_of(adapter):
    """The golden model that a golden adapter sits on."""
    return GOLDENS / golden(f"adapters/{adapter}").get("base", "gqa-tied")


def apart(ours, theirs):
    """The largest difference between two tensors of one shape."""
    assert ours.shape == theirs.shape
    return float((ours.float() - theirs.float()).abs().max())


@torch.no_grad()
def logits_of(model, ids):
    return model.lm_head(model(ids))


def losses_of(logits, ids):
    """-log P(token t | tokens before it) [B, T], 0 at t = 0."""
    flat = logits[:, :-1].flatten(0, 1).float()  # positions first: [B, T, V] is less exact
    losses = F.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none")
    return F.pad(losses.view(len(ids), -1), (1, 0))


# The figures


def golden_model(name):
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


def golden_adapter(name):
    """The largest difference between a golden adapter here and in peft, float32."""
    model = load_checkpoint(base_of(name))
    load_adapter(model, GOLDENS / "adapters" / name)
    expected = golden(f"adapters/{name}")
    logits = logits_of(model, expected["input_ids"])
    return {"an adapter of peft's here, golden files": apart(logits, expected["logits"])}


def round_trip(folder, out):
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


def in_transformers(folder):
    """A checkpoint, read by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def their_logits(model, ids):
    return model(ids).logits


def wide_adapter(model):
    """An adapter on every linear layer that moves the logits."""
    targets = {name.rpartition(".")[2] for name in lora_layers(model)}
    adapter = new_adapter(model, 4, 8, sorted(targets), seed=0)
    for B in adapter.B.values():
        B.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return adapter


# The table


def main():
    """Print the table: one row per figure, one column per family of models."""
    values = defaultdict(list)  # (figure, family) -> of each model or adapter

    def note(folder, figures):
        family = read_json(folder / "config.json")["model_type"]
        if str(folder) == REAL:
            family += f", {folder.name}"
        for figure, value in figures.items():
            values[figure, family].append(value)

    for name in MODELS:
        note(GOLDENS / name, golden_model(name))
    for name in ADAPTERS:
        note(base_of(name), golden_adapter(name))
    if find_spec("peft"):
        for folder in LIVE:
            with tempfile.TemporaryDirectory() as out:
                note(folder, round_trip(folder, Path(out)))

    families = dict.fromkeys(family for _, family in values)  # in the order of their appearance
    print(f"| largest difference | {' | '.join(families)} |\n|---|{'---|' * len(families)}")
    for figure in dict.fromkeys(figure for figure, _ in values):
        cells = [cell(values[figure, family]) for family in families]
        print(f"| {figure} | {' | '.join(cells)} |")
    print("\nIn brackets: the number of models or adapters.")


def cell(values):
    return f"{max(values):.1e} ({len(values)})" if values else "-"


if __name__ == "__main__":
    main()
