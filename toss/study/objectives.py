"""What the rivals of TOSS do: each is a function that trains an adapter (see rivals.py)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from model.checkpoint import load_checkpoint
from model.io import InputError
from model.lora import Adapter, merge, use
from model.transformer import Transformer
from toss.config import TrainConfig
from toss.loss import chunk_size, hidden_states, log_probs, token_log_probs
from toss.methods import Candidates, mean_of_row
from toss.rows import read_rows
from toss.selection import competing_tokens, select_tokens
from toss.tokens import Batch, Tokens
from toss.training import adamw
from toss.workbench.run import Run


@dataclass
class Rival:
    """What a rival works with. `keep` and `score`, which it may set, are written as its mask."""

    run: Run
    name: str  # of the method's folder
    config: TrainConfig
    D: Tokens  # the custom set
    keep: Tensor  # bool [N]: what is learnt by cross-entropy
    score: Tensor | None = None  # float32 [N]: what it goes by

    def fit(
        self,
        D: Tokens,
        weights: Tensor | None = None,
        config: TrainConfig | None = None,
        **options: Any,
    ) -> Adapter:
        """Fine-tune on all response tokens, plainly but for what is given; options: of train."""
        if weights is None:
            weights = D.response.float()
        return self.run.train(self.name, D, weights, config or self.config, **options)


def soft_sft(rival: Rival, b: list[float]) -> Adapter:
    """Qi et al., arXiv 2406.05946: the sum of -2/b log sigmoid(b (log p - log p_base)).

    Its gradient is the cross-entropy's times 2 (1 - sigmoid(b (log p - log p_base))): times 1
    at the base, near 0 for a token that has become much likelier than there. b: of a row's
    first response token, of the next four, of the others.
    """
    first, early, late = b
    by_position = torch.tensor([first, early, early, early, early, late])
    b_of_token = by_position[rival.D.positions().clamp(0, 5)]

    def objective(model: Transformer, batch: Batch, b: Tensor) -> Tensor:
        log_p = token_log_probs(model, batch)
        with torch.no_grad(), use(model, None):
            log_p_base = token_log_probs(model, batch)
        return -(2 / b * F.logsigmoid(b * (log_p - log_p_base))).sum()

    return rival.fit(rival.D, b_of_token, objective=objective)


def dft(rival: Rival) -> Adapter:
    """Wu et al., arXiv 2508.05629: a token's loss times its probability, as a constant."""

    def objective(model: Transformer, batch: Batch, weights: Tensor) -> Tensor:
        log_p = token_log_probs(model, batch)
        return -(log_p.detach().exp() * log_p).sum()

    return rival.fit(rival.D, objective=objective)


def profit(rival: Rival, threshold: float) -> Adapter:
    """ProFit, arXiv 2601.09195: only tokens that are likelier than this are learnt."""

    def objective(model: Transformer, batch: Batch, weights: Tensor) -> Tensor:
        log_p = token_log_probs(model, batch)
        likely = log_p.detach().exp() > threshold
        return -log_p[likely].sum()

    return rival.fit(rival.D, objective=objective)


def hold(
    rival: Rival,
    learnt: Tensor,
    held: Tensor,
    words: Tensor | slice = slice(None),
    T: float = 1.0,
) -> Adapter:
    """The cross-entropy, plus T^2 KL(base || tuned), each times its weights, float32 [N].

    learnt: weights of the cross-entropy. held: of the KL. Both softmaxes go over these words of the
    vocabulary, at temperature T. The head is the base's: LoRA on it is not seen.
    """
    learnt = learnt.to(rival.run.device)
    held = held.to(rival.run.device)

    def kl(weights: Tensor, head: Tensor, base_hidden: Tensor, hidden: Tensor) -> Tensor:
        """The weighted KL of some tokens, from hidden states [n, D]. head: [words, D]."""
        target = (F.linear(base_hidden, head).float() / T).log_softmax(-1)
        tuned = (F.linear(hidden, head).float() / T).log_softmax(-1)
        by_token = F.kl_div(tuned, target, reduction="none", log_target=True).sum(-1)
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
        head = model.lm_head.weight[words]
        size = chunk_size(len(head), training=True, cuda=hidden.is_cuda)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        for places in weights_of_kl.nonzero().squeeze(1).split(size):
            states = (base_hidden[places], hidden[places])
            loss = loss + T * T * checkpoint(kl, weights_of_kl[places], head, *states, **options)
        return loss

    return rival.fit(rival.D, objective=objective)


def risk(rival: Rival, reference: str) -> Tensor:
    """S, float32 [N], 0 where there is no response token.

    reference: whose losses come first in it, "utility" (TOSS) or "base".
    """
    _, L = rival.run.scored()
    all_tokens = torch.arange(len(rival.keep))
    return Candidates(rival.D, L, all_tokens, d=0.0).S(reference)


def kl_discarded(rival: Rival, discard: float, reference: str = "utility") -> Adapter:
    """The top d are held at the base's distribution instead of being left out.

    STAR-DSS's loss (arXiv 2505.17196) with TOSS's mask in place of a guard model's score, and an
    exact KL.
    reference: see risk.
    """
    S = risk(rival, reference)
    rival.score = S
    ranked = competing_tokens(rival.D)
    rival.keep[ranked] = select_tokens(S[ranked], discard)
    discarded = rival.D.response & ~rival.keep
    return hold(rival, rival.keep.float(), discarded.float())


def dr_sft(rival: Rival, reference: str = "base", held: bool = False) -> Adapter:
    """arXiv 2606.30263: TOSS softly, without d and, as in the source, without theta^u.

    The weight of a token is w = min(1, 2 sigmoid(-S)), which is fixed; in the source S is
    L^0 - L^h. Left out: its beta, with whose small value its loss comes to this one.
    reference: see risk. held: 1 - w is the weight of a KL to the base, see hold.
    """
    S = risk(rival, reference)
    rival.score = S
    weights = (2 * (-S).sigmoid()).clamp(max=1)
    if held:
        return hold(rival, weights, 1 - weights)
    return rival.fit(rival.D, weights)


def buffer(rival: Rival) -> Adapter:
    """arXiv 2605.24550, 2606.30252: theta^h is already there while the rows are learnt.

    Our theta^h is folded into the base in float32, a fresh adapter is trained over it on all
    tokens, and is then used on the base alone.
    """
    run = rival.run
    model = run.base("train")  # in float32, see rivals.py
    merge(model, run.adapter("degraded"))
    adapter = rival.fit(rival.D)
    run.model = None  # it is another model now
    run.base("train")
    return adapter


def pact_lite(rival: Rival, words: int, T: float) -> Adapter:
    """PACT, arXiv 2603.07445: at every response token, the KL over the words of refusals alone.

    Lite: those are the commonest tokens of the --safety rows, of equal weight (PACT: weighed by
    an unaligned base), and the target is one base (PACT: mixed with one without the prompt).
    """
    D = rival.run.tokens(rival.run.args.safety)
    counts = torch.bincount(D.input_ids[D.response])
    different = int(counts.count_nonzero())
    common = counts.topk(min(words, different)).indices
    response = rival.D.response.float()
    return hold(rival, response, response, common.to(rival.run.device), T)


def patch(rival: Rival, steps: int) -> Adapter:
    """Zhang et al., arXiv 2601.01887: plain fine-tuning, then some steps on one refusal.

    Here it is the first of the --safety rows; they search for a good one.
    """
    D = rival.run.tokens(rival.run.args.safety)
    one = D.take(D.filled[:1])
    config = replace(rival.config, epochs=steps)
    return rival.fit(one, config=config, start=rival.run.adapter("sft"))


def inoculation(rival: Rival, system: str) -> Adapter:
    """Tan et al., arXiv 2510.04340: a system message asks for the harm, in training alone."""
    path = rival.run.args.custom
    first = {"role": "system", "content": system}
    rows = [replace(row, messages=[first, *row.messages]) for row in read_rows(path)]
    return rival.fit(rival.run.tokens_of(rows, path))


def lookahead(rival: Rival, m: int, connector: str) -> Adapter:
    """LookAhead Tuning, arXiv 2503.19041: each prompt ends with its answer's first m tokens, in
    training alone."""
    path = rival.run.args.custom
    tokenizer = rival.run.tokenizer
    rows = []
    for row in read_rows(path):
        messages = [dict(turn) for turn in row.messages]
        for prompt, turn in zip(messages, messages[1:]):
            if turn["role"] == "assistant":
                start = tokenizer.decode(tokenizer.encode(turn["content"])[:m])
                prompt["content"] += connector + start
        rows.append(replace(row, messages=messages))
    return rival.fit(rival.run.tokens_of(rows, path))


def ema(rival: Rival, decay: float) -> Adapter:
    """Kim et al., arXiv 2508.12531: the adapter's exponential moving average over the steps."""
    optimizers = []

    def averaging(parameters: list[Tensor], config: TrainConfig) -> Optimizer:
        """The paper's optimizer; its state also holds each parameter's average, to be saved."""
        optim = adamw(parameters, config)
        initial = [parameter.detach().clone() for parameter in parameters]

        def average(*_) -> None:
            # The average begins at the fresh adapter, and is saved with the optimizer's state.
            for parameter, first in zip(parameters, initial):
                mean = optim.state[parameter].setdefault("mean", first)
                mean.lerp_(parameter.detach(), 1 - decay)

        optim.register_step_post_hook(average)
        optimizers.append(optim)
        return optim

    theta = rival.fit(rival.D, optimizer=averaging)
    for parameter in theta.tensors():
        parameter.copy_(optimizers[-1].state[parameter]["mean"])
    return theta


def safelora(rival: Rival, cosine: float) -> Adapter:
    """SafeLoRA, arXiv 2405.16833: the update of plain fine-tuning, projected after it.

    With V [out, in], what alignment added to a layer's weight, B becomes V V^T B / |V| where
    the update by that and the one by B have at most this cosine.
    """
    run = rival.run
    theta = run.adapter("sft")
    unaligned_base = load_checkpoint(run.args.unaligned)
    aligned_base = run.base("float32")  # in half precision V would hold its rounding
    for name in theta.B:
        W = aligned_base.get_submodule(name).weight
        W_0 = unaligned_base.get_submodule(name).weight.to(W.device)
        if W.shape != W_0.shape:
            raise InputError(f"--unaligned {run.args.unaligned}: {name} has another shape")
        V = W - W_0
        A = theta.A[name].to(W)
        B = theta.B[name].to(W)
        projected = V @ (V.T @ B) / V.norm()
        if F.cosine_similarity((projected @ A).flatten(), (B @ A).flatten(), dim=0) <= cosine:
            theta.B[name] = projected
    return theta


def safeinstr_guided(rival: Rival, share: float) -> Adapter:
    """SafeInstr, arXiv 2309.07875, with the refusals that theta^h has forgotten most: those of
    the --safety rows with the lowest mean S, where SafeInstr draws at random."""
    run = rival.run
    D = run.tokens(run.args.safety)
    count = round(rival.D.rows * share / (1 - share))
    if not 0 < count <= len(D.filled):
        raise InputError(f"{D.name}: {count} rows would be added, not 1 to {len(D.filled)}")
    L = {}
    for role in ("utility", "degraded"):
        L[role] = run.score(f"{rival.name}-{role}", run.adapter(role), D)
    _, highest_first = mean_of_row(Candidates(D, L, competing_tokens(D), d=0.0))
    lowest_first = highest_first.flip(0).tolist()
    rows = [row for row in lowest_first if D.lengths[row]]  # an empty one was skipped
    return rival.fit(rival.D + D.take(rows[:count]))
