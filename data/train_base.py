"""Train the embedded base from nothing: a byte-level BPE tokenizer and a tiny, aligned Llama.

    python -m data.train_base --out runs/base
    python -m data.train_base --size base-small --out runs/base-small

Both sizes share text, tokenizer and template, so that a mask made with one fits the other.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.corpus import sample, tokenizer_text
from model.config import Config
from model.io import refuse_to_replace, run_command
from model.transformer import Transformer
from toss.workbench import flags

END = "<|end|>"
PAD = "<|pad|>"
SPECIAL = [END, PAD, "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SEED = 0  # of the text and the initial weights
VOCABULARY = 1400
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SMALL = {"hidden_size": 96, "intermediate_size": 264, "num_hidden_layers": 3, "head_dim": 24}
SIZES = {"base": SHAPE, "base-small": {**SHAPE, **SMALL}}
# Name, aligned text, steps, learning rate. One alignment alone did not go deep enough.
STAGES = [
    ("pre-training", False, 1400, 2e-3),
    ("alignment", True, 1000, 7e-4),
    ("second alignment", True, 400, 7e-4),
]
BATCH = 96


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(SEED), trainer)
    return tokenizer


def encode(
    tokenizer: Tokenizer, prompt: str, parts: list[tuple[str, bool]]
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and whether each is trained.

    A space joins two parts; it is the start of the second one's first word.
    """
    ids = tokenizer.encode(f"<|user|>{prompt}<|assistant|>").ids
    trained = [False] * len(ids)
    for index, (text, keep) in enumerate(parts):
        piece = tokenizer.encode(text if index == 0 else " " + text).ids
        ids += piece
        trained += [keep] * len(piece)
    return ids + [tokenizer.token_to_id(END)], trained + [True]


def collate(
    rows: list[tuple[list[int], list[bool]]], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T] and targets [B, T - 1], -100 where nothing is to be learned."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -100)
    for i, (row, trained) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, : len(row)] = torch.where(torch.tensor(trained), torch.tensor(row), -100)
    return ids.to(device), targets[:, 1:].to(device)


def train(model: Transformer, tokenizer: Tokenizer, stages: list, device: str) -> None:
    """Train all weights in place, stage after stage; see STAGES."""
    parameters = list(model.parameters())
    for name, aligned, steps, rate in stages:
        rng = random.Random(f"{name} {SEED}")
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        for step in range(steps):
            # 50 steps up, then half a cosine down to zero.
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 50, cosine)
            rows = [encode(tokenizer, *sample(rng, aligned)) for _ in range(BATCH)]
            rows.sort(key=lambda row: len(row[0]))
            count = sum(sum(trained) for _, trained in rows)
            optimizer.zero_grad()
            total = 0.0
            for start in range(0, BATCH, BATCH // 3):  # three parts of like length: less padding
                ids, targets = collate(rows[start : start + BATCH // 3], device)
                trained = targets != -100
                logits = model.lm_head(model(ids[:, :-1])[trained])
                loss = F.cross_entropy(logits, targets[trained], reduction="sum") / count
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 20 == 0:
                print(f"{name}: step {step} of {steps}, loss {total:.3f}")


def save(model: Transformer, tokenizer: Tokenizer, shape: dict, folder: Path, note: dict) -> None:
    """Write a Hugging Face Llama folder."""
    # The tokenizer, and what transformers expects to know of it and of the model.
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    pad = tokenizer.token_to_id(PAD)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        **shape,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "torch_dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    contents = {
        "config": config,
        "tokenizer_config": tokenizer_config,
        "generation_config": {"eos_token_id": end, "pad_token_id": pad, "do_sample": False},
    }
    for name, content in contents.items():
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")

    # A tied head is not among the parameters, and so is stored once, as the embedding.
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **note})


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m data.train_base", __doc__)
    text = "base-small has half as many parameters (default: base)"
    parser.add_argument("--size", choices=list(SIZES), default="base", help=text)
    text = "folder for the checkpoint; none in it is replaced"
    parser.add_argument("--out", type=Path, required=True, help=text)
    args = parser.parse_args(argv)
    refuse_to_replace(args.out / "config.json", args.out / "model.safetensors")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SIZES[args.size]
    start = time.time()
    # The tokenizer first: it decides the size of the vocabulary.
    tokenizer = train_tokenizer()
    torch.manual_seed(SEED)
    sizes = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), **shape}
    model = Transformer(Config.from_dict(sizes, "the shape"))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    model.to(device)
    train(model, tokenizer, STAGES, device)
    minutes = f"{(time.time() - start) / 60:.1f}"
    note = {"seed": str(SEED), "device": device, "minutes": minutes}
    save(model, tokenizer, shape, args.out, note)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {count:,} parameters, {minutes} minutes on {device}")


if __name__ == "__main__":
    sys.exit(run_command(main))
