"""Will a model fit? GPU memory for scoring and for training, by arithmetic from its config.json alone.

    python -m toss.audit.memory --model FOLDER [--tokens 2048] [--rank 16] [--targets q_proj,v_proj]
    python -m toss.audit.memory --shape llama3-8b

What autograd keeps of a block is measured, on the CPU and on a few tokens (every term is linear in the tokens); all else
is counted. The base is in a half-precision type, one row fills a batch, and flash attention runs, as on CUDA. "its noise" is
the comparison with float32 on a sample of rows that follows scoring. What the CUDA context and the allocator's gaps take comes
on top: leave a tenth. So do 4 bytes for each token of the dataset while it is scored.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import resolve
from model.config import Config
from model.errors import InputError, reported
from model.files import read_json
from model.lora import adapter_parameters, add_adapter
from model.transformer import Transformer
from toss.audit.bench import SHAPES
from toss.audit.experiment import markdown
from toss.loss import LOGITS


def kept_by_a_block(config: Config, rank: int, targets: list[str], sample: int = 64) -> int:
    """Bytes that autograd keeps of one block for the backward pass, a token: what another block and another token add.

    On the CPU, where grouped keys and values are expanded.
    """
    block = {n: kept(config, 2, n, rank, targets) - kept(config, 1, n, rank, targets) for n in (sample, 2 * sample)}
    return (block[2 * sample] - block[sample]) // sample


def kept(config: Config, layers: int, tokens: int, rank: int, targets: list[str]) -> int:
    """Bytes of all tensors that the backward pass of so many blocks needs, each storage once, weights left out."""
    small = Config(**{**vars(config), "num_hidden_layers": layers, "vocab_size": 2})
    model = Transformer(small).to(torch.bfloat16).requires_grad_(False)
    add_adapter(model, "default", rank, rank, targets, seed=0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(1, tokens, dtype=torch.int64))
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def expanded(config: Config) -> int:
    """Bytes a token that keys and values take more, expanded to all heads, than in groups, which flash attention takes."""
    return 2 * 2 * (config.num_attention_heads - config.num_key_value_heads) * config.head_dim


def parts(config: Config, tokens: int, rank: int, targets: list[str], kept_by_block: int) -> dict[str, dict[str, float]]:
    """Bytes by purpose, then by what takes them. kept_by_block: see kept_by_a_block."""
    with torch.device("meta"):
        model = Transformer(config)
        weights = 2 * sum(parameter.numel() for parameter in model.parameters())  # a tied head counts once
        add_adapter(model, "default", rank, rank, targets, seed=0)
        adapter = sum(parameter.numel() for parameter in adapter_parameters(model))
    with torch.device("meta"):
        exact = 4 * sum(p.numel() for p in Transformer(Config(**{**vars(config), "num_hidden_layers": 1})).parameters())
        exact += 4 * config.vocab_size * config.hidden_size * config.tie_word_embeddings  # read once for each of its places
    layers, stream = config.num_hidden_layers, 4 * config.hidden_size  # the residual stream is float32
    masked = config.sliding_window is not None and tokens > config.sliding_window  # and then there is no flash attention
    block = kept_by_block if masked else kept_by_block - expanded(config)
    there = min(LOGITS, tokens * config.vocab_size)
    logits = there * (2 + 4 + 4)  # as computed, in float32, and their log-softmax
    train = {"weights": weights, "logits": logits + there * (4 + 2),  # and their gradients
             "adapter": 4 * 4 * adapter}  # and its gradients, and AdamW's two moments
    score = {"weights": weights, "logits": logits, "adapter": 4 * adapter, "activations": (stream + block) * tokens}
    return {
        "score": score,
        "score, its noise": {**score, "weights": weights + exact, "activations": (stream + 2 * kept_by_block) * tokens},
        "train": {**train, "activations": layers * block * tokens},
        "train, --gradient-checkpointing": {**train, "activations": (layers * stream + block) * tokens},
    }


def table(config: Config, tokens: list[int], rank: int, targets: list[str]) -> str:
    """The parts in GiB, a line for each purpose and number of tokens."""
    names, gib = ["weights", "activations", "logits", "adapter"], lambda count: f"{count / 2**30:.1f}"
    block = kept_by_a_block(config, rank, targets)
    lines = [[purpose, str(count), *(gib(taken[name]) for name in names), gib(sum(taken.values()))]
             for count in tokens for purpose, taken in parts(config, count, rank, targets, block).items()]
    return markdown(["purpose", "tokens a batch", *names, "GiB in all"], lines)


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--model", help="checkpoint folder or hub id; its weights are not read")
    one.add_argument("--shape", choices=list(SHAPES), help="a known model's shape")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="tokens a batch (default: 2048 8192)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (default: 16)")
    parser.add_argument("--targets", default="q_proj,v_proj", help="layers that carry LoRA (default: q_proj,v_proj)")
    args = parser.parse_args(argv)

    def work() -> None:
        if min(*args.tokens, args.rank) < 1:
            raise InputError("--tokens and --rank must be 1 or more")
        folder = resolve(args.model, weights=False) if args.model else Path(args.shape)
        raw = read_json(folder / "config.json") if args.model else SHAPES[args.shape]
        print(table(Config.from_dict(raw, str(folder / "config.json")), args.tokens, args.rank, args.targets.split(",")))

    return reported(work)


if __name__ == "__main__":
    sys.exit(main())
