"""Talk to a checkpoint: `python -m model.generate --model M [--adapter A] [--prompt TEXT]`."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from model.io import InputError, NotFinite, as_input_error, json_object
from model.process import joined, reported


def generate(
    model,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_id: int,
    batch_tokens: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Greedy continuation of each prompt: new ids only, up to and without `eos_id`.

    Prompts may differ in length. A batch holds at most `batch_tokens` slots of the key-value cache
    (rows x longest). progress: called after each batch with the number of prompts answered so far.
    Raises InputError for a limit out of range, or an id that the model does not have, and NotFinite
    where the logits do not say which token comes next.
    """
    if not 0 <= max_new_tokens <= 2**20:
        raise InputError(f"the number of new tokens is 0 to {2**20}, not {max_new_tokens}")
    highest, size = max(map(max, prompts), default=0), model.config.vocab_size
    if highest >= size:
        raise InputError(f"a prompt holds the id {highest}, but the model has {size} embeddings")
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        rows = max(1, batch_tokens // (len(prompts[order[0]]) + max_new_tokens))
        batch, order = order[:rows], order[rows:]
        found = generate_batch(model, [prompts[i] for i in batch], max_new_tokens, eos_id)
        answers |= zip(batch, found)
        if progress is not None:
            progress(len(answers))
    return [answers[i] for i in range(len(prompts))]


def generate_batch(
    model, prompts: list[list[int]], max_new_tokens: int, eos_id: int
) -> list[list[int]]:
    """generate for one batch. Prompts are padded on the right; new tokens overwrite the padding."""
    import torch

    from model.packed import Cache

    device, rows, longest = model.device, len(prompts), max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    padded = [p + [eos_id] * (longest - len(p)) for p in prompts]
    ids = torch.tensor(padded, device=device)  # (B, T)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    new = []
    with torch.inference_mode():
        cache = Cache(model, rows, longest + max_new_tokens)
        positions = torch.arange(longest, device=device).expand_as(ids)
        hidden = model(ids, positions, cache)[torch.arange(rows, device=device), lengths - 1]
        for step in range(max_new_tokens):
            logits = model.lm_head(hidden).float()  # (B, V)
            token = logits.argmax(dim=-1).where(logits.isfinite().all(dim=-1), -1)  # (B,)
            done |= token == eos_id
            token = torch.where(done, eos_id, token)
            new.append(token.tolist())  # the only wait for the device
            if -1 in new[-1]:
                raise NotFinite(f"the model's logits are not finite at new token {step + 1}")
            if step + 1 == max_new_tokens or all(id == eos_id for id in new[-1]):
                break
            # The slot at `lengths + step` may hold padding: it is overwritten before it is read.
            hidden = model(token[:, None], (lengths + step)[:, None], cache)[:, 0]  # (B, D)
    answers = [list(column) for column in zip(*new)] or [[] for _ in prompts]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in answers]


def talk(args: argparse.Namespace) -> None:
    """Answer --prompt, or each line of standard input."""
    import torch

    from model import load_adapter, load_checkpoint, load_tokenizer

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.shard and device == "cuda":
        torch.cuda.set_device(device := f"cuda:{os.environ['LOCAL_RANK']}")
    more = json_object(args.chat_template_kwargs, "--chat-template-kwargs")
    tokenizer = load_tokenizer(args.model, args.template, args.date, args.revision, more)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = load_checkpoint(args.model, device, dtype, args.revision, args.shard)
    if args.adapter:
        load_adapter(model, args.adapter)
    if asked := args.prompt is None:
        with suppress(AttributeError):  # not a file
            sys.stdin.reconfigure(errors="strict")  # some locales let other bytes pass
    sign = "> " if asked and sys.stdin.isatty() else ""
    print(sign, end="", flush=True)
    with as_input_error("standard input is not UTF-8 text", UnicodeDecodeError):
        for line in sys.stdin if asked else [args.prompt]:
            ids = tokenizer.prompt_ids([{"role": "user", "content": line.rstrip("\n")}])
            new = generate(model, [ids], args.max_new_tokens, tokenizer.eos_id)[0]
            print(tokenizer.decode(new))
            print(sign, end="", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.generate", description=__doc__)
    parser.error = lambda said: parser.exit(2, f"error: {said} (see {parser.prog} --help)\n")
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--revision", help="branch, tag or commit of a hub id (default: main)")
    add("--adapter", help="folder of a LoRA adapter in PEFT's format")
    add("--prompt", help="answer this and stop (default: read one prompt per line from stdin)")
    add("--template", choices=["chat", "human"], help="prompt form (default: chat if possible)")
    add("--date", help="YYYY-MM-DD for a chat template that asks for the day (default: today)")
    text = "for the chat template, such as '{\"enable_thinking\": false}'"
    add("--chat-template-kwargs", default="{}", metavar="JSON", help=text)
    add("--max-new-tokens", type=int, default=128, help="longest answer (default: 128)")
    add("--device", help="cpu or cuda (default: cuda if available)")
    text = "with torchrun and --prompt: spread the base over the processes"
    add("--shard", action="store_true", help=text)
    args = parser.parse_args(argv)
    if args.prompt is None and sys.stdin is None:
        parser.error("give --prompt: there is no standard input")
    if args.shard and args.prompt is None:
        parser.error("--shard needs --prompt: processes cannot share standard input")
    # Sharded, all processes find the same answer, and the first one prints it.
    return reported(lambda: joined(lambda: talk(args)) if args.shard else talk(args))


if __name__ == "__main__":
    sys.exit(main())
