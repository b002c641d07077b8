"""Stage 1 of TOSS: train the two reference models, theta^h and theta^u.

The safety-degraded theta^h is trained on a small harmful set D^h, the utility-oriented theta^u on a
small utility set D^u: two LoRA adapters of one base.

    python train.py                                       (the embedded default, data/)
    python train.py --run runs/mine --model M --harmful harmful.jsonl --utility utility.jsonl

Writes RUN/degraded and RUN/utility (PEFT's format). The degraded adapter is harmful on purpose:
keep it to yourself and do not merge it. Next: score.py.
"""

import sys

from toss import cli
from toss.config import TrainConfig


def main(argv=None):
    """Parse the command line, then train. Raises InputError."""
    inputs = {"harmful": "harmful reference set D^h", "utility": "utility reference set D^u"}
    parser = cli.parser("train.py", __doc__, **inputs)
    cli.add_training_flags(parser)
    args = cli.parse(parser, argv)

    from toss.run import Run  # after parsing: torch takes a while to import
    from toss.training import train

    run, config = Run(args), TrainConfig.of(args)
    D_h, D_u = run.tokens(args.harmful), run.tokens(args.utility)
    for role, D, flag in (("degraded", D_h, "--harmful"), ("utility", D_u, "--utility")):

        def reference():  # plain supervised fine-tuning: every response token counts
            w, log = D.response.float(), run.log(role)
            return train(run.base("train"), D, w, config, start=log.resume, on_step=log)

        run.once(role, reference, inputs=[flag], settings=config.recipe())


if __name__ == "__main__":
    sys.exit(cli.run(main))
