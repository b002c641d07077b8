"""Talk to a checkpoint: `python -m model.generate --model M [--adapter A] [--prompt TEXT]`."""

import argparse
import sys

import torch

from model import load_adapter, load_checkpoint, load_tokenizer
from model.errors import reported
from model.generation import generate


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.generate", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--revision", help="a hub id's branch, tag or commit (default: main)")
    parser.add_argument("--adapter", help="folder of a LoRA adapter in PEFT's format")
    parser.add_argument("--prompt", help="answer this and stop; without it, read prompts from the terminal, a line each")
    parser.add_argument("--template", choices=["chat", "human"], help="prompt form (default: the checkpoint's own, else human)")
    parser.add_argument("--date", help="YYYY-MM-DD, told to a chat template that asks for the day (default: today)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="length of an answer in tokens (default: 128)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    return reported(lambda: talk(args))


def talk(args: argparse.Namespace) -> None:
    """Answer --prompt, or one line of standard input after the other."""
    tokenizer = load_tokenizer(args.model, args.template, args.date, args.revision)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = load_checkpoint(args.model, args.device, dtype, args.revision)
    if args.adapter:
        load_adapter(model, args.adapter)
    interactive = args.prompt is None and sys.stdin.isatty()
    print("> " if interactive else "", end="", flush=True)
    for line in [args.prompt] if args.prompt is not None else sys.stdin:
        ids = tokenizer.prompt_ids([{"role": "user", "content": line.rstrip("\n")}])
        print(tokenizer.decode(generate(model, [ids], args.max_new_tokens, tokenizer.eos_id)[0]))
        print("> " if interactive else "", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
