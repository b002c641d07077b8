"""Stage 1 of TOSS: train the two reference models.

Trains two LoRA adapters from the same base: the safety-degraded model theta^h on a small harmful set D^h, and the
utility-oriented model theta^u on a small utility set D^u. Without inputs it takes the embedded default (data/).

    python train.py
    python train.py --run runs/mine --model M --harmful harmful.jsonl --utility utility.jsonl

Writes RUN/degraded and RUN/utility (PEFT adapters), RUN/run.json and RUN/log.jsonl. Next: score.py.
The degraded adapter is harmful on purpose. Keep it to yourself and do not merge it.
"""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    from model.errors import reported
    from toss.parallel import processes
    from toss.pipeline import train_references
    from toss.settings import parse

    return reported(processes()(lambda: train_references(parse("train", __doc__, argv))))


if __name__ == "__main__":
    sys.exit(main())
