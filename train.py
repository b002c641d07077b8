"""Stage 1 of TOSS: train the two reference models, theta^h and theta^u.

The safety-degraded theta^h is trained on a small harmful set D^h, the utility-oriented theta^u on a
small utility set D^u: two LoRA adapters of one base.

    python train.py                                       (the embedded default, data/)
    python train.py --run runs/mine --model M --harmful harmful.jsonl --utility utility.jsonl

Writes RUN/degraded and RUN/utility (PEFT's format). The degraded adapter is harmful on purpose:
keep it to yourself and do not merge it. Next: score.py.
"""

import sys
from functools import partial

from toss.config import TrainConfig
from toss.workbench import flags
from toss.workbench.run import Run


def main(argv=None):
    """Parse the command line, then train. Raises InputError."""
    inputs = {"harmful": "harmful reference set D^h", "utility": "utility reference set D^u"}
    parser = flags.script_parser("train.py", __doc__, **inputs)
    flags.add_training_flags(parser)
    args = flags.parse(parser, argv, references=True)

    run = Run(args)
    config = TrainConfig.of(args)
    D_h = run.tokens(args.harmful)
    D_u = run.tokens(args.utility)
    run.show_references(D_h, D_u)  # so that exchanged or equal files are seen

    # Plain supervised fine-tuning of the base: every response token counts.
    def train_reference(name, D):
        w = D.response.float()
        return run.train(name, D, w, config)

    settings = config.recipe()
    # Before any training: stop here if one of them exists with other settings.
    run.look("degraded", ["--harmful"], settings)
    run.look("utility", ["--utility"], settings)
    run.make("degraded", partial(train_reference, "degraded", D_h), ["--harmful"], settings)
    run.make("utility", partial(train_reference, "utility", D_u), ["--utility"], settings)
    print(f"next: {flags.command('score.py', run.folder)} [--custom FILE]")


if __name__ == "__main__":
    sys.exit(flags.run(main, flags.GOES_ON))
