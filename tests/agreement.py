"""How near this project is to transformers and PEFT, in numbers: prints a Markdown table.

    python -m tests.agreement

The first part reads the golden files. The second needs transformers and peft: the same on whole round trips, and with
TOSS_REAL_CHECKPOINT on a real checkpoint. tests/test_interop.py holds the same numbers against their bounds.
"""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from model import load_adapter, load_checkpoint, load_tokenizer, save_adapter, save_checkpoint
from model.generation import generate
from model.lora import adapter_parameters, add_adapter, lora_layers, merge_adapter
from model.transformer import Transformer

GOLDENS = Path(__file__).parent / "goldens"
MODELS = sorted(file.parent.name for file in GOLDENS.glob("*/golden.safetensors"))
ADAPTERS = sorted(file.parent.name for file in GOLDENS.glob("adapters/*/golden.safetensors"))
REAL = os.environ.get("TOSS_REAL_CHECKPOINT")


def family(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


def base_of(adapter: str) -> Path:
    """The golden model that a golden adapter sits on."""
    with safe_open(GOLDENS / "adapters" / adapter / "golden.safetensors", "pt") as file:
        return GOLDENS / (file.metadata() or {}).get("base", "gqa-tied")


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    assert ours.shape == theirs.shape
    return float((ours.float() - theirs.float()).abs().max())


@torch.no_grad()
def logits_of(model: Transformer, ids: Tensor) -> Tensor:
    return model.lm_head(model(ids))


def goldens() -> Iterator[tuple[str, str, float]]:
    """(family, what, largest difference) against every golden file."""
    for name in MODELS:
        model, want = load_checkpoint(GOLDENS / name), load_file(GOLDENS / name / "golden.safetensors")
        yield family(GOLDENS / name), "logits, golden files", apart(logits_of(model, want["input_ids"]), want["logits"])
        cut = lambda rows, lengths: [row[:n] for row, n in zip(want[rows].tolist(), want[lengths].tolist())]  # noqa: E731
        with safe_open(GOLDENS / name / "golden.safetensors", "pt") as file:
            answers = generate(model, cut("prompts", "lengths"), 12, int(file.metadata()["eos_id"]))
        wrong = sum(ours != theirs for ours, theirs in zip(answers, cut("new_ids", "new_lengths"), strict=True))
        yield family(GOLDENS / name), "greedy answers that differ, of 5", wrong
    for name in ADAPTERS:
        folder, base = GOLDENS / "adapters" / name, base_of(name)
        model, want = load_checkpoint(base), load_file(folder / "golden.safetensors")
        load_adapter(model, folder)
        yield family(base), "an adapter of peft's here, golden files", apart(logits_of(model, want["input_ids"]), want["logits"])


def train(model: Transformer, ids: Tensor, targets: list[str], lr: float) -> None:
    """A few steps of LoRA on next tokens, so that the adapter is one that training makes."""
    add_adapter(model, "default", rank=4, alpha=8, targets=targets, seed=0)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=lr)
    for _ in range(5):
        F.cross_entropy(model.lm_head(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def round_trip(folder: Path, out: Path, ids: Tensor, targets: list[str], lr: float) -> dict[str, float]:
    """Largest differences on a way through transformers and peft and back, float32.

    Beside them `size`, the largest logit, and `moved`, by how much the adapter changes one.
    """
    import peft
    import transformers

    their_logits = torch.no_grad()(lambda model: model(ids).logits)
    read = lambda path, dtype=torch.float32: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()  # noqa: E731
    ours, theirs, found = load_checkpoint(folder), read(folder), {}
    base, want = logits_of(ours, ids), their_logits(theirs)
    losses = lambda logits: F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")  # noqa: E731
    found["logits, live"], found["size"] = apart(base, want), float(want.abs().max())
    found["losses of the tokens, live"] = apart(losses(base), losses(want))

    tensors = dict(ours.named_parameters())
    size = sum(p.numel() for p in tensors.values())  # bytes a shard: two shards or more in any dtype
    read(folder, "auto").save_pretrained(out / "split", max_shard_size=size)
    assert (out / "split/model.safetensors.index.json").exists()
    split = dict(load_checkpoint(out / "split").named_parameters())
    assert split.keys() == tensors.keys()
    found["tensors, split by transformers"] = max(apart(split[name], tensors[name]) for name in tensors)

    train(ours, ids, targets, lr)
    save_adapter(ours, out / "ours")
    theirs = peft.PeftModel.from_pretrained(theirs, out / "ours").eval()
    want = their_logits(theirs)
    found["moved"] = apart(base, want)
    found["an adapter of ours in peft"] = apart(logits_of(ours, ids), want)
    theirs.save_pretrained(out / "theirs")
    again = load_checkpoint(folder)
    load_adapter(again, out / "theirs")
    found["the same, saved by peft, here"] = apart(logits_of(again, ids), want)
    merge_adapter(again)
    save_checkpoint(again, out / "merged", like=folder)
    found["the same, merged here, in transformers"] = apart(their_logits(read(out / "merged")), want)
    return found


def golden_round_trip(name: str, out: Path) -> dict[str, float]:
    """round_trip of a golden model, on rows longer than any window, with every linear layer and the head adapted."""
    ids = torch.randint(3, 80, (2, 40), generator=torch.Generator().manual_seed(0))
    targets = sorted({key.rsplit(".", 1)[-1] for key in lora_layers(load_checkpoint(GOLDENS / name))})
    return round_trip(GOLDENS / name, out, ids, targets, lr=1e-2)


def real_round_trip(out: Path) -> dict[str, float]:
    """round_trip of the real checkpoint, on the text of the LICENSE."""
    text = (GOLDENS.parent.parent / "LICENSE").read_text(encoding="utf-8")
    ids = torch.tensor([load_tokenizer(REAL).encode(text)])
    return round_trip(Path(REAL), out, ids, ["q_proj", "v_proj", "down_proj"], lr=1e-3)


def main() -> None:
    found = defaultdict(list)
    for kind, what, value in goldens():
        found[kind, what].append(value)
    if find_spec("transformers") and find_spec("peft"):
        with tempfile.TemporaryDirectory() as out:
            for name in MODELS:
                for what, value in golden_round_trip(name, Path(out) / name).items():
                    found[family(GOLDENS / name), what].append(value)
            if REAL:
                for what, value in real_round_trip(Path(out) / "real").items():
                    found[f"{family(Path(REAL))}, {Path(REAL).name}", what].append(value)
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    print(f"| largest difference | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for what in dict.fromkeys(what for _, what in found if what not in ("size", "moved")):
        cells = (f"{max(values):.1e} ({len(values)})".replace("0.0e+00", "0") if (values := found.get((kind, what))) else "-"
                 for kind in kinds)
        print(f"| {what} | {' | '.join(cells)} |")
    print("\nIn brackets: how many models, or adapters. 0: equal to the last bit.")


if __name__ == "__main__":
    main()
