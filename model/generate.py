"""Talk to a checkpoint: `python -m model.generate --model M [--adapter A] [--prompt TEXT]`."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from model.io import InputError, as_input_error, json_object, run_command

Progress = Callable[[int, dict[int, list[int]]], None]


def generate(
    model,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_id: int,
    batch_tokens: int = 16384,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy continuation of each prompt: new ids only, up to and without `eos_id`.

    Prompts may differ in length. A batch holds at most `batch_tokens` slots of the key-value cache
    (rows x longest). progress: called after each batch with the number of prompts answered so far,
    and the new answers by their index; after each new token with how much is done, in prompts.
    Raises InputError for a limit out of range, or an id that the model does not have, or where
    the logits do not say which token comes next.
    """
    if not 0 <= max_new_tokens <= 2**20:
        raise InputError(f"the number of new tokens is 0 to {2**20}, not {max_new_tokens}")
    if not all(prompts):
        raise InputError("a prompt has no tokens, so nothing predicts an answer")
    size = model.config.vocab_size
    lowest = min(map(min, prompts), default=0)
    highest = max(map(max, prompts), default=0)
    if lowest < 0 or highest >= size:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"a prompt holds the id {wrong}, but the model has {size} embeddings")

    # The longest prompts first, since a batch is padded to its longest and memory shows at once.
    lengths = [len(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: lengths[index], reverse=True)
    answers: dict[int, list[int]] = {}
    while len(answers) < len(prompts):
        start = len(answers)
        longest = lengths[order[start]]
        rows = max(1, batch_tokens // (longest + max_new_tokens))
        batch = order[start : start + rows]
        batch_prompts = [prompts[index] for index in batch]
        batch_answers = generate_batch(
            model, batch_prompts, max_new_tokens, eos_id, progress, answered=start
        )
        new_answers = dict(zip(batch, batch_answers))
        answers |= new_answers
        if progress is not None:
            progress(len(answers), new_answers)
    return [answers[index] for index in range(len(prompts))]


def generate_batch(
    model,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_id: int,
    progress: Progress | None,
    answered: int,
) -> list[list[int]]:
    """generate for one batch. Prompts are padded on the right; new tokens overwrite the padding.

    Rows that have ended leave the batch once they are half of it.
    """
    import torch

    from model.packed import Cache

    device = model.device
    rows = len(prompts)
    longest = max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = [prompt + [eos_id] * (longest - len(prompt)) for prompt in prompts]
    ids = torch.tensor(padded, device=device)  # (B, T)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    answer_of = answers  # of each row that is still in the batch
    with torch.inference_mode():
        cache = Cache(model, rows, longest + max_new_tokens)
        hidden = model(ids, cache=cache)  # (B, T, D)
        # Of each prompt's last token, which predicts the first new one.
        hidden = hidden[torch.arange(rows, device=device), lengths - 1]  # (B, D)
        for step in range(max_new_tokens):
            # The likeliest token of each row; -1 where its logits are not finite. A row that has
            # ended stays at eos_id.
            logits = model.lm_head(hidden).float()  # (B, V)
            finite = logits.isfinite().all(dim=-1)
            token = logits.argmax(dim=-1).where(finite, -1)  # (B,)
            done |= token == eos_id
            token = torch.where(done, eos_id, token)

            new_ids = token.tolist()  # the only wait for the device
            if -1 in new_ids:
                raise InputError(f"the model's logits are not finite at new token {step + 1}")
            going_on = []
            for row, new_id in enumerate(new_ids):
                if new_id != eos_id:
                    answer_of[row].append(new_id)
                    going_on.append(row)
            if step + 1 == max_new_tokens or not going_on:
                break
            if progress is not None:
                progress(answered + rows * (step + 1) // max_new_tokens, {})

            if len(going_on) <= len(new_ids) // 2:
                answer_of = [answer_of[row] for row in going_on]
                kept = torch.tensor(going_on, device=device)
                token = token[kept]
                lengths = lengths[kept]
                done = done[kept]
                cache.keep_rows(kept)
            # The slot at `lengths + step` may hold padding: it is overwritten before it is read.
            hidden = model(token[:, None], (lengths + step)[:, None], cache)[:, 0]  # (B, D)
    return answers


def talk(args: argparse.Namespace) -> None:
    """Answer --prompt, or each line of standard input."""
    import torch

    from model import load_adapter, load_checkpoint, load_tokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    template_values = json_object(args.chat_template_kwargs, "--chat-template-kwargs")
    tokenizer = load_tokenizer(args.model, args.template, args.date, args.revision, template_values)
    model = load_checkpoint(args.model, device, dtype, args.revision)
    if args.adapter:
        load_adapter(model, args.adapter)

    lines = [args.prompt]
    sign = ""  # what asks for a line
    if args.prompt is None:
        lines = sys.stdin
        if sys.stdin.isatty():
            sign = "> "
        if hasattr(sys.stdin, "reconfigure"):  # a file
            sys.stdin.reconfigure(errors="strict")  # some locales let other bytes pass
    print(sign, end="", flush=True)
    with as_input_error("standard input is not UTF-8 text", UnicodeDecodeError):
        for line in lines:
            prompt = tokenizer.prompt_ids([{"role": "user", "content": line.rstrip("\n")}])
            answers = generate(model, [prompt], args.max_new_tokens, tokenizer.eos_id)
            print(tokenizer.decode(answers[0]))
            print(sign, end="", flush=True)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m model.generate", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--revision", help="branch, tag or commit of a hub id (default: main)")
    add("--adapter", help="folder of a LoRA adapter in PEFT's format")
    add("--prompt", help="answer this and stop (default: read one prompt per line from stdin)")
    add("--template", choices=["chat", "human"], help="prompt form (default: chat if possible)")
    add("--date", help="YYYY-MM-DD for a chat template that asks for the day (default: today)")
    template_help = "for the chat template, such as '{\"enable_thinking\": false}'"
    add("--chat-template-kwargs", default="{}", metavar="JSON", help=template_help)
    add("--max-new-tokens", type=int, default=128, help="longest answer (default: 128)")
    add("--device", help="cpu or cuda (default: cuda if available)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    args = parser.parse_args(argv)
    if args.threads is not None and not 1 <= args.threads <= 1024:
        parser.error(f"argument --threads: {args.threads} is not a whole number from 1 to 1024")
    if args.prompt is None and sys.stdin is None:
        parser.error("give --prompt: there is no standard input")
    return run_command(partial(talk, args))


if __name__ == "__main__":
    sys.exit(main())
