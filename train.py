"""Stage 1 of TOSS: train the two reference models, theta^h and theta^u.

The safety-degraded theta^h is trained on a small harmful set D^h, the utility-oriented theta^u on a
small utility set D^u: two LoRA adapters of one base.

    python train.py                                       (the embedded default, data/)
    python train.py --run runs/mine --model M --harmful harmful.jsonl --utility utility.jsonl

Writes RUN/degraded and RUN/utility (PEFT's format). The degraded adapter is harmful on purpose:
keep it to yourself and do not merge it. Next: score.py.
"""

import sys

from toss.config import TrainConfig
from toss.workbench import flags


def main(argv=None):
    """Parse the command line, then train. Raises InputError."""
    inputs = {"harmful": "harmful reference set D^h", "utility": "utility reference set D^u"}
    parser = flags.script_parser("train.py", __doc__, **inputs)
    flags.add_training_flags(parser)
    args = flags.parse(parser, argv, references=True)

    from toss.workbench.run import Run  # after parsing: torch takes a while to import

    run = Run(args)
    config = TrainConfig.of(args)
    D_h = run.tokens(args.harmful)
    D_u = run.tokens(args.utility)
    run.show_first_row("harmful", D_h)  # so that exchanged files are seen
    run.show_first_row("utility", D_u)

    # Plain supervised fine-tuning of the base: every response token counts.
    def train_theta_h():
        w = D_h.response.float()
        theta_h = run.train("degraded", D_h, w, config)
        run.check_learnt(D_h, theta_h)
        return theta_h

    def train_theta_u():
        w = D_u.response.float()
        theta_u = run.train("utility", D_u, w, config)
        run.check_learnt(D_u, theta_u)
        return theta_u

    settings = config.recipe()
    run.look("degraded", ["--harmful"], settings)  # a refusal comes before any training
    run.look("utility", ["--utility"], settings)
    run.make("degraded", train_theta_h, ["--harmful"], settings)
    run.make("utility", train_theta_u, ["--utility"], settings)
    run.suggest("score.py", custom=args.custom or "CUSTOM.jsonl")


if __name__ == "__main__":
    sys.exit(flags.run(main))
