"""The rivals of TOSS that are more than another mask, on the same run, rows, seed and settings.

    python -m toss.study.rivals --run R --method soft-sft
    python -m toss.study.rivals --run R --method safelora --unaligned FOLDER

Works as select.py does: it trains as the run's methods were trained and writes RUN/methods/NAME,
which `evaluate` measures like any method. A rival has two parts, as TOSS has: weights for the
tokens, and a training with them.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.checkpoint import base_hash, load_checkpoint
from model.hub import resolve
from model.io import InputError
from model.lora import Adapter, merge, use
from model.transformer import Transformer
from toss.config import TrainConfig
from toss.loss import chunk_size, hidden_states, log_probs, token_log_probs
from toss.methods import Candidates
from toss.selection import competing_tokens, select_tokens
from toss.tokens import Batch, Tokens
from toss.workbench import flags
from toss.workbench.files import Mask
from toss.workbench.run import Run

Losses = dict[str, Tensor]  # under "utility", "degraded" and "base": float32 [N] each
Weighed = tuple[Tensor, Tensor | None]  # weights and S, float32 [N] each


# The first part: weights of the tokens' cross-entropy, and the S that they go by


def all_tokens(D: Tokens, L: Losses) -> Weighed:
    """As in plain fine-tuning."""
    return D.response.float(), None


def risk(D: Tokens, L: Losses, reference: str) -> Tensor:
    """S of every token, 0 on prompts. reference: whose losses come first, "utility" or "base"."""
    everywhere = torch.arange(len(D.input_ids))
    candidates = Candidates(D, L, everywhere, d=0.0)
    return candidates.S(reference)


def top_discarded(D: Tokens, L: Losses, discard: float, reference: str) -> Weighed:
    """TOSS's mask: 0 for the top d. reference: see risk."""
    S = risk(D, L, reference)
    ranked = competing_tokens(D)
    stays = select_tokens(S[ranked], discard)
    keep = D.response.clone()
    keep[ranked] = stays
    return keep.float(), S


def by_risk(D: Tokens, L: Losses, reference: str) -> Weighed:
    """arXiv 2606.30263: TOSS softly, without d: min(1, 2 sigmoid(-S)), which is fixed.

    In the source S is L^0 - L^h. Left out: its beta, with whose small value its loss comes to this
    one. reference: see risk.
    """
    S = risk(D, L, reference)
    weights = 2 * (-S).sigmoid()
    weights = weights.clamp(max=1)
    return torch.where(D.response, weights, 0.0), S


# The second part: a training


@dataclass
class Work:
    """What a rival trains with."""

    run: Run
    name: str  # of the method's folder
    config: TrainConfig
    D: Tokens  # the custom set
    weights: Tensor  # from the first part

    def fit(self, weights: Tensor, **options: Any) -> Adapter:
        """toss.training.train on the custom set, with its options."""
        return self.run.train(self.name, self.D, weights, self.config, **options)


def plainly(work: Work) -> Adapter:
    """The weighted cross-entropy."""
    return work.fit(work.weights)


def soft_sft(work: Work, b: list[float]) -> Adapter:
    """Qi et al., arXiv 2406.05946: the sum of -2/b log sigmoid(b (log p - log p_base)).

    Its gradient is the cross-entropy's times 2 (1 - sigmoid(b (log p - log p_base))): times 1
    at the base, near 0 for a token that has become much likelier than there. b: of a row's
    first response token, of the next four, of the others.
    """
    first, early, late = b
    by_position = torch.tensor([first, early, early, early, early, late])
    position = work.D.positions().clamp(0, 5)
    b_of_token = by_position[position]

    def objective(model: Transformer, batch: Batch, b: Tensor) -> Tensor:
        log_p = token_log_probs(model, batch)
        with torch.no_grad(), use(model, None):
            log_p_base = token_log_probs(model, batch)
        terms = F.logsigmoid(b * (log_p - log_p_base))
        return -(2 / b * terms).sum()

    return work.fit(b_of_token, objective=objective)


def hold(work: Work) -> Adapter:
    """The cross-entropy times the weights w, plus KL(base || tuned) times 1 - w.

    With TOSS's mask it is STAR-DSS's loss (arXiv 2505.17196), with an exact KL and without its
    guard model. The head is the base's: LoRA on it is not seen.
    """
    every_token = work.D.response.float()  # a token of weight 0 would not be in the batches
    device = work.run.device
    learnt = work.weights.to(device)
    held = every_token.to(device) - learnt

    def kl(weights: Tensor, head: Tensor, base_hidden: Tensor, hidden: Tensor) -> Tensor:
        """The weighted KL of n tokens, from hidden states [n, D]. head: [vocabulary, D]."""
        base_logits = F.linear(base_hidden, head).float()
        logits = F.linear(hidden, head).float()
        target = base_logits.log_softmax(-1)
        tuned = logits.log_softmax(-1)
        terms = F.kl_div(tuned, target, reduction="none", log_target=True)
        by_token = terms.sum(-1)
        return (weights * by_token).sum()

    def objective(model: Transformer, batch: Batch, weights: Tensor) -> Tensor:
        hidden = hidden_states(model, batch)
        log_p = log_probs(model.lm_head, hidden, batch.targets)
        loss = -(learnt[batch.places] * log_p).sum()
        weights_of_kl = held[batch.places]
        with torch.no_grad(), use(model, None):
            base_hidden = hidden_states(model, batch)

        # In chunks that are recomputed in the backward pass, so that memory does not grow with the
        # number of tokens times the vocabulary.
        head = model.lm_head.weight
        size = chunk_size(len(head), training=True, cuda=hidden.is_cuda)
        is_held = weights_of_kl.nonzero().squeeze(1)
        for chunk in is_held.split(size):
            loss = loss + checkpoint(
                kl,
                weights_of_kl[chunk],
                head,
                base_hidden[chunk],
                hidden[chunk],
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return loss

    return work.fit(every_token, objective=objective)


def buffer(work: Work) -> Adapter:
    """arXiv 2605.24550, 2606.30252: theta^h is already there while the rows are learnt.

    Our theta^h is folded into the base in float32, a fresh adapter is trained over it on all
    tokens, and is then used on the base alone.
    """
    run = work.run
    model = run.base("train")  # in float32, see main
    merge(model, run.adapter("degraded"))
    adapter = work.fit(work.weights)
    run.model = None  # it is another model now
    run.base("train")
    return adapter


def safelora(work: Work, cosine: float) -> Adapter:
    """SafeLoRA, arXiv 2405.16833: the update of plain fine-tuning, projected after it.

    With V [out, in], what alignment added to a layer's weight, B becomes V V^T B / |V| where
    the update by that and the one by B have at most this cosine.
    """
    theta = work.run.adapter("methods/sft/model")
    unaligned = work.run.args.unaligned
    unaligned_base = load_checkpoint(unaligned)
    aligned_base = work.run.base("float32")  # in half precision V would hold its rounding
    for name in theta.B:
        W = aligned_base.get_submodule(name).weight
        W_0 = unaligned_base.get_submodule(name).weight
        W_0 = W_0.to(W.device)
        if W.shape != W_0.shape:
            raise InputError(f"--unaligned {unaligned}: {name} has another shape")
        V = W - W_0
        A = theta.A[name].to(W)
        B = theta.B[name].to(W)
        projected = V @ (V.T @ B) / V.norm()
        update = (B @ A).flatten()
        projected_update = (projected @ A).flatten()
        if F.cosine_similarity(projected_update, update, dim=0) <= cosine:
            theta.B[name] = projected
    return theta


# The command


@dataclass
class Rival:
    """Its two parts, the settings of each, and what the second needs beside the weights."""

    weigh: Callable[..., Weighed]
    train: Callable[..., Adapter]
    inputs: list[str] = field(default_factory=list)
    weighing: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


UTILITY = {"reference": "utility"}
BASE = {"reference": "base"}
RIVALS = {
    "soft-sft": Rival(all_tokens, soft_sft, training={"b": [0.5, 2.0, 0.1]}),
    "kl-discarded": Rival(top_discarded, hold, weighing={"discard": 0.1, **UTILITY}),
    "kl-base": Rival(top_discarded, hold, weighing={"discard": 0.1, **BASE}),
    "dr-sft": Rival(by_risk, plainly, weighing=BASE),
    "dr-sft-utility": Rival(by_risk, plainly, weighing=UTILITY),
    "kl-dr-sft": Rival(by_risk, hold, weighing=BASE),
    "kl-dr-sft-utility": Rival(by_risk, hold, weighing=UTILITY),
    "buffer": Rival(all_tokens, buffer, ["degraded"]),
    "safelora": Rival(all_tokens, safelora, ["methods/sft/model"], training={"cosine": 0.5}),
}


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    rival = RIVALS[args.method]
    run = Run(args)
    run.script = "toss/study/rivals.py"

    # Its settings, and what two of the rivals need beyond the run.
    weighing = dict(rival.weighing)
    if "discard" in weighing:
        weighing["discard"] = args.discard
    settings = dict(rival.training)
    config = TrainConfig.of(args)
    if args.method == "buffer":
        run.dtypes["train"] = "float32"  # a merge into bfloat16 would round theta^h away
    if args.method == "safelora":
        settings["unaligned_sha256"] = unaligned_hash(run, args)
        as_sft = run.check("methods/sft/model").get("settings", {})
        values = {**vars(args), **as_sft}
        config = TrainConfig.of(values)

    def weigh() -> Mask:
        D_cus, L = run.tokens(args.custom), {}
        if rival.weighing:
            D_cus, L = run.losses()
        weights, S = rival.weigh(D_cus, L, **weighing)
        keep = weights > 0
        soft = None if torch.equal(weights, keep.float()) else weights
        return Mask(D_cus, keep, S, soft)

    def finetune() -> Adapter:
        D_cus = run.tokens(args.custom)
        weights = run.mask(selection, D_cus).weights()
        work = Work(run, args.name, config, D_cus, weights)
        return rival.train(work, **rival.training)

    selection = f"methods/{args.name}/selection"
    inputs = ["--custom"]
    if rival.weighing:
        inputs.append("scores")
    if weighing.get("reference") == "base":
        inputs.append("loss_base")
    run.make(selection, weigh, inputs, {"method": args.method, **weighing})
    settings |= config.recipe()
    inputs = ["--custom", selection, *rival.inputs]
    run.make(f"methods/{args.name}/model", finetune, inputs, settings)


def unaligned_hash(run: Run, args: Namespace) -> str:
    """The hash of safelora's second base, which lies in a folder from here on."""
    if not args.unaligned:
        raise InputError("safelora needs --unaligned FOLDER, the base before its alignment")
    args.unaligned = str(resolve(args.unaligned))
    folder = Path(args.unaligned)
    sha256 = base_hash(folder)
    if sha256 == run.identity()["base_sha256"]:
        raise InputError(f"--unaligned {args.unaligned} is the run's own base")
    return sha256


def arguments(argv: list[str] | None) -> Namespace:
    """The command line, with what it inherits."""
    parser = flags.script_parser("python -m toss.study.rivals", __doc__, custom="custom set D^cus")
    add = parser.add_argument
    add("--method", choices=RIVALS, required=True, help="the rival")
    add("--name", type=flags.method, help="folder in RUN/methods (default: the method)")
    text = "d, for kl-discarded and kl-base"
    add("--discard", type=flags.share, default=0.1, metavar="D", help=text)
    add("--unaligned", metavar="FOLDER", help="for safelora: the base before its alignment")
    flags.add_training_flags(parser)
    args = flags.parse(parser, argv)
    args.name = args.name or args.method
    if args.shard:
        raise InputError("a rival needs the base whole in one process: leave --shard out")
    return args


if __name__ == "__main__":
    sys.exit(flags.run(main))
