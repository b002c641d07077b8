"""Makes the embedded base from nothing: a byte-level BPE tokenizer and a tiny Llama, pre-trained and then aligned.

    python -m data.train_base [--size base] [--out data/base] [--seed 0] [--device auto]
    python -m data.train_base --size base-small

The small one has text, tokenizer and template in common with the other: a second model for a mask that travels.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data.corpus import sample, tokenizer_text
from model.transformer import Config, Transformer

END, PAD = "<|end|>", "<|pad|>"
SPECIAL = [END, PAD, "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
            "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
VOCABULARY = 1400
SHAPE = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             head_dim=32, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True)  # fmt: skip
SIZES = {"base": SHAPE, "base-small": {**SHAPE, **dict(hidden_size=96, intermediate_size=264, num_hidden_layers=3, head_dim=24)}}
# name, aligned text, steps, learning rate; the second alignment was added when the first had not gone deep enough
STAGES = [("pre-training", False, 1400, 2e-3), ("alignment", True, 1000, 7e-4), ("second alignment", True, 400, 7e-4)]
BATCH = 96


def train_tokenizer(seed: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(tokenizer_text(seed), trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


def encode(tokenizer: Tokenizer, prompt: str, parts: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and whether each is trained. Parts are joined by spaces, which begin the next part's words."""
    ids = tokenizer.encode(f"<|user|>{prompt}<|assistant|>").ids
    trained = [False] * len(ids)
    for index, (text, keep) in enumerate(parts):
        piece = tokenizer.encode(text if index == 0 else " " + text).ids
        ids, trained = ids + piece, trained + [keep] * len(piece)
    return ids + [tokenizer.token_to_id(END)], trained + [True]


def collate(rows: list[tuple[list[int], list[bool]]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T] and targets [B, T - 1], -100 where nothing is to be learned."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -100)
    for i, (row, trained) in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        targets[i, :len(row)] = torch.where(torch.tensor(trained), torch.tensor(row), -100)
    return ids.to(device), targets[:, 1:].to(device)


def train(model: Transformer, tokenizer: Tokenizer, stages: list, seed: int, device: str) -> None:
    for name, aligned, steps, rate in stages:
        rng = random.Random(f"{name} {seed}")
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        bar = tqdm(range(steps), desc=name)
        for step in bar:
            # 50 steps up, then half a cosine down to zero
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            rows = sorted((encode(tokenizer, *sample(rng, aligned)) for _ in range(BATCH)), key=lambda row: len(row[0]))
            count = sum(sum(trained) for _, trained in rows)
            optimizer.zero_grad()
            total = 0.0
            for start in range(0, BATCH, BATCH // 3):  # three parts of like length: a third of the time is not padding
                ids, targets = collate(rows[start:start + BATCH // 3], device)
                trained = targets != -100
                logits = model.lm_head(model(ids[:, :-1])[trained])
                loss = F.cross_entropy(logits, targets[trained], reduction="sum") / count
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{total:.3f}")


def save(model: Transformer, tokenizer: Tokenizer, shape: dict, folder: Path, note: dict) -> None:
    """A Hugging Face Llama folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    files = {
        "config.json": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(),
                        **shape, "hidden_act": "silu", "max_position_embeddings": 256, "attention_bias": False, "mlp_bias": False,
                        "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad, "torch_dtype": "float32"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
                                  "model_max_length": 256, "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE},
        "generation_config.json": {"eos_token_id": end, "pad_token_id": pad, "do_sample": False},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **note})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded tokenizer and base checkpoint from nothing.")
    parser.add_argument("--size", choices=list(SIZES), default="base",
                        help="how large; half as many parameters with base-small (base)")
    parser.add_argument("--out", help="folder of the checkpoint (data/ and its size)")
    parser.add_argument("--seed", type=int, default=0, help="draws the text and the initial weights (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    arguments = parser.parse_args()
    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    shape, out = SIZES[arguments.size], arguments.out or f"data/{arguments.size}"
    start = time.time()
    tokenizer = train_tokenizer(arguments.seed)
    torch.manual_seed(arguments.seed)
    model = Transformer(Config(vocab_size=tokenizer.get_vocab_size(), **shape))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    model.to(device)
    train(model, tokenizer, STAGES, arguments.seed, device)
    minutes = f"{(time.time() - start) / 60:.1f}"
    save(model, tokenizer, shape, Path(out), {"seed": str(arguments.seed), "device": device, "minutes": minutes})
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {count:,} parameters, seed {arguments.seed}, {minutes} minutes on {device}")


if __name__ == "__main__":
    main()
