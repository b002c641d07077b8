"""Stage 3 of TOSS: discard the riskiest tokens and fine-tune the base on the rest.

Ranks all response tokens of the custom set together by S = L^u - L^h, drops the top share d from the loss (they stay
in the input), and trains a LoRA adapter from the base. With --pro T it first refines the degraded model over T rounds.

    python select.py
    python select.py --run runs/mine --method toss --discard 0.1 [--pro 1 --pro-samples 40] [--merge]
    python select.py --run runs/plain --method sft --model M --custom custom.jsonl     (plain fine-tuning)
    python select.py --run runs/other --model M2 --custom custom.jsonl --mask runs/mine/methods/toss/selection.safetensors

The last one fine-tunes another model of the same tokenizer on what the first one's scores left: it needs no references.

Writes RUN/methods/METHOD/selection.safetensors (the mask) and RUN/methods/METHOD/model (a PEFT adapter); with --name NAME
RUN/methods/NAME. The methods stand in toss/selection.py.
"""

if __name__ == "select":
    # This file hides the standard library's `select` from every program that runs in this folder: subprocess and
    # asyncio import it. Whoever does so gets the real module, found on the rest of the path.
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _here = os.path.dirname(os.path.realpath(__file__))
    _spec = PathFinder.find_spec("select", [p for p in sys.path if os.path.realpath(p or os.curdir) != _here])
    if _spec is None:
        raise ImportError("the standard library's select module was not found behind this folder")
    sys.modules["select"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["select"])

import sys


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    from model.errors import reported
    from toss.parallel import processes
    from toss.pipeline import finetune
    from toss.settings import parse

    return reported(processes()(lambda: finetune(parse("select", __doc__, argv))))


if __name__ == "__main__":
    sys.exit(main())
