"""How far this project is from transformers and PEFT: `python -m tests.agreement` prints a table.

The rows of golden files need nothing else; the live rows need transformers and peft.
"""

import json
import os
import tempfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

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
        found = {**{name: file.get_tensor(name) for name in file.keys()}, **(file.metadata() or {})}
    for rows, lengths in {"prompts": "lengths", "new_ids": "new_lengths"}.items():
        if rows in found:
            found[rows] = [r[:n] for r, n in zip(found[rows].tolist(), found[lengths].tolist())]
    return found


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


def golden_model(name: str) -> dict[str, float]:
    """Largest differences between a golden model here and in transformers, float32."""
    model, want = load_checkpoint(GOLDENS / name), golden(name)
    logits, ids = logits_of(model, want["input_ids"]), want["input_ids"]
    answers = zip(generate(model, want["prompts"], 12, int(want["eos_id"])), want["new_ids"])
    return {
        "logits, golden files": apart(logits, want["logits"]),
        "losses of the tokens, golden files": apart(losses_of(logits, ids), want["losses"]),
        "greedy answers that differ, of 5": sum(a != b for a, b in answers),
    }


def golden_adapter(name: str) -> dict[str, float]:
    """The largest difference between a golden adapter here and in peft, float32."""
    model, want = load_checkpoint(base_of(name)), golden(f"adapters/{name}")
    load_adapter(model, GOLDENS / "adapters" / name)
    logits = logits_of(model, want["input_ids"])
    return {"an adapter of peft's here, golden files": apart(logits, want["logits"])}


def round_trip(folder: Path, out: Path) -> dict[str, float]:
    """Largest differences on a way through transformers and peft and back, float32.

    Also "size", the largest logit, and "moved", how much the adapter changes one.
    """
    import peft
    import transformers

    def read(path, dtype=torch.float32):
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    ids = torch.randint(3, 80, (2, 40), generator=torch.Generator().manual_seed(0))
    if str(folder) == REAL:
        text = (GOLDENS.parent.parent / "LICENSE").read_text(encoding="utf-8")
        ids = torch.tensor([load_tokenizer(folder).encode(text)])
    their_logits = torch.no_grad()(lambda model: model(ids).logits)
    ours, theirs, found = load_checkpoint(folder), read(folder), {}
    base, want = logits_of(ours, ids), their_logits(theirs)
    found["logits, live"], found["size"] = apart(base, want), float(want.abs().max())
    found["losses of the tokens, live"] = apart(losses_of(base, ids), losses_of(want, ids))
    tensors = dict(ours.named_parameters())
    size = sum(p.numel() for p in tensors.values())  # bytes: two shards or more in any dtype
    read(folder, "auto").save_pretrained(out / "split", max_shard_size=size)
    assert (out / "split/model.safetensors.index.json").exists()
    split = dict(load_checkpoint(out / "split").named_parameters())
    found["tensors, split by transformers"] = max(apart(split[n], tensors[n]) for n in tensors)
    targets = sorted({name.rsplit(".")[-1] for name in lora_layers(ours)})
    adapter = new_adapter(ours, 4, 8, targets, seed=0)
    for b in adapter.B.values():
        b.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    use(ours, adapter)
    save_adapter(ours, out / "ours")
    theirs = peft.PeftModel.from_pretrained(theirs, out / "ours").eval()
    want = their_logits(theirs)
    found["moved"] = apart(base, want)
    found["an adapter of ours in peft"] = apart(logits_of(ours, ids), want)
    theirs.save_pretrained(out / "theirs")
    again = load_checkpoint(folder)
    adapter = load_adapter(again, out / "theirs")
    found["the same, saved by peft, here"] = apart(logits_of(again, ids), want)
    merge(again, adapter)
    save_checkpoint(again, out / "merged", like=folder)
    found["the same, merged, in transformers"] = apart(their_logits(read(out / "merged")), want)
    return found


def main() -> None:
    """Print the table: one row per figure, one column per family of models."""
    figures = [(GOLDENS / name, golden_model(name)) for name in MODELS]
    figures += [(base_of(name), golden_adapter(name)) for name in ADAPTERS]
    live = [GOLDENS / name for name in MODELS] + ([Path(REAL)] if REAL else [])
    with tempfile.TemporaryDirectory() as out:
        for folder in live if find_spec("peft") else []:
            figures.append((folder, round_trip(folder, Path(out) / folder.name)))
    table = defaultdict(list)  # (figure, family) -> values
    for folder, found in figures:
        family = json.loads((folder / "config.json").read_text())["model_type"]
        for what, value in found.items():
            table[what, family + f", {folder.name}" * (str(folder) == REAL)].append(value)
    families = list(dict.fromkeys(family for _, family in table))
    print(f"| largest difference | {' | '.join(families)} |\n|---|{'---|' * len(families)}")
    for what in dict.fromkeys(what for what, _ in table):
        values = [table.get((what, family)) for family in families]
        cells = [f"{max(v):.1e} ({len(v)})" if v else "-" for v in values]
        print(f"| {what} | {' | '.join(cells)} |")
    print("\nIn brackets: the number of models or adapters.")


if __name__ == "__main__":
    main()
