"""What the rivals of TOSS do: each is a method of Rival that trains an adapter (see rivals.py).

`train` gives an objective the weights of a batch's tokens. Here these are the tokens' places in the
flat arrays, by which an objective finds what else it must know of a token.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from model.checkpoint import load_checkpoint
from model.io import InputError
from model.lora import Adapter, active, use
from toss import loss, methods, progress, scoring, selection, training
from toss.config import TrainConfig
from toss.rows import read_rows
from toss.run import Run
from toss.tokens import Tokens, collate


@dataclass
class Rival:
    run: Run
    config: TrainConfig
    D: Tokens  # the custom set
    keep: Tensor  # bool [N]: what is learnt by cross-entropy; all, unless a rival changes it

    @cached_property
    def log(self) -> progress.Progress:
        """What `train` reports to."""
        return self.run.log(self.run.args.name)

    def fit(self, D: Tokens, objective: training.Objective | None = None, **how) -> Adapter:
        """Fine-tune on all response tokens, plainly but for what is given."""
        places = torch.arange(len(D.response))  # 0: a prompt
        objective = objective or (lambda log_p, hidden, places: -log_p.sum())
        how = {"config": self.config, "start": self.log.resume, "on_step": self.log, **how}
        return training.train(self.run.base("train"), D, places, objective=objective, **how)

    @torch.no_grad()
    def base(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """What an objective has of the tokens at these places, but under the base: log_p, hidden.

        A second forward pass of the rows, without the adapter.
        """
        model, at = self.run.model, places.cpu()
        theta, wanted = active(model), torch.zeros_like(self.keep).index_fill(0, at, True)
        rows = self.D.row_of(at).unique_consecutive().tolist()
        batch = collate(self.D, rows, wanted, model.device)
        try:  # running out of memory only ends in smaller batches
            return loss.token_log_probs(use(model, None), batch)
        finally:
            use(model, theta)

    def hold(self, at: Tensor, words: Tensor | slice = slice(None), T: float = 1.0) -> Adapter:
        """Cross-entropy where `keep`, plus T^2 KL(base || tuned) where `at`, bool [N].

        Both softmaxes go over these words of the vocabulary, at temperature T. The head is the
        base's: LoRA on it is not seen.
        """
        device, head = self.run.device, self.run.base("train").lm_head.weight[words]
        log_q = lambda hidden: (F.linear(hidden, head).float() / T).log_softmax(-1)
        at, keep = at.to(device), self.keep.to(device)

        def objective(log_p: Tensor, hidden: Tensor, places: Tensor) -> Tensor:
            there, total = at[places], -log_p[keep[places]].sum()
            if there.any():
                q, target = log_q(hidden[there]), log_q(self.base(places[there])[1])
                total = total + T * T * F.kl_div(q, target, reduction="sum", log_target=True)
            return total

        return self.fit(self.D, objective)

    def soft_sft(self, b: list[float]) -> Adapter:
        """Qi et al., arXiv 2406.05946: the sum of -2/b log sigmoid(b (log p - log p_base)).

        Its gradient is the cross-entropy's times 2 (1 - sigmoid(b (log p - log p_base))): times 1
        at the base, near 0 for a token that has become much likelier than there. b: of a row's
        first response token, of the next four, of the others.
        """
        c = methods.Candidates(self.D, {}, selection.competing_tokens(self.D), d=0.0)
        of = torch.tensor([b[0], *[b[1]] * 4, b[2]])[c.position().clamp(max=5)]
        of = torch.zeros(len(self.keep)).index_put((c.ranked,), of).to(self.run.device)

        def objective(log_p: Tensor, hidden: Tensor, places: Tensor) -> Tensor:
            margin = of[places] * (log_p - self.base(places)[0])
            return -(2 / of[places] * F.logsigmoid(margin)).sum()

        return self.fit(self.D, objective)

    def dft(self) -> Adapter:
        """Wu et al., arXiv 2508.05629: a token's loss times its probability, as a constant."""
        return self.fit(self.D, lambda log_p, hidden, at: -(log_p.detach().exp() * log_p).sum())

    def kl_discarded(self, discard: float) -> Adapter:
        """Ours: the tokens that TOSS discards are held at the base's distribution instead."""
        L, ranked = self.run.scored()[1], selection.competing_tokens(self.D)
        S = (L["utility"] - L["degraded"])[ranked]
        self.keep[ranked] = selection.select_tokens(S, discard)
        return self.hold(~self.keep)

    def pact_lite(self, words: int, T: float) -> Adapter:
        """PACT, arXiv 2603.07445: at every response token, the KL over the words of refusals alone.

        Lite: those are the commonest tokens of the --safety rows, of equal weight (PACT: weighed by
        an unaligned base), and the target is one base (PACT: mixed with one without the prompt).
        """
        D = self.run.tokens(self.run.args.safety)
        counts = torch.bincount(D.input_ids[D.response])
        common = counts.topk(min(words, int(counts.count_nonzero()))).indices
        return self.hold(self.D.response, common.to(self.run.device), T)

    def patch(self, steps: int) -> Adapter:
        """Zhang et al., arXiv 2601.01887: plain fine-tuning, then some steps on one refusal.

        Here it is the first of the --safety rows; they search for a good one.
        """
        one, some = self.run.tokens(self.run.args.safety), replace(self.config, epochs=steps)
        sft = self.run.adapter("sft")

        def start(optimizer: torch.optim.Optimizer, plan: str) -> tuple[int, int | None]:
            for parameter, tensor in zip(optimizer.param_groups[0]["params"], sft.tensors()):
                parameter.detach().copy_(tensor)
            return self.log.resume(optimizer, plan)

        return self.fit(one.take([0]), start=start, config=some)

    def inoculation(self, system: str) -> Adapter:
        """Tan et al., arXiv 2510.04340: a system message asks for the harm, in training alone."""
        path, first = self.run.args.custom, {"role": "system", "content": system}
        asked = [replace(row, messages=[first, *row.messages]) for row in read_rows(path)]
        return self.fit(self.run.tokens(path, asked))

    def ema(self, decay: float) -> Adapter:
        """Kim et al., arXiv 2508.12531: the adapter's exponential moving average over the steps."""
        states = {}

        def start(optimizer: torch.optim.Optimizer, plan: str) -> tuple[int, int | None]:
            progress.state_of(optimizer)  # fills the state, which is saved and brought back
            states.update(optimizer.state)
            for parameter, state in states.items():
                state["mean"] = parameter.detach().clone()
            return self.log.resume(optimizer, plan)

        def on_step(event: dict) -> None:
            for parameter, state in states.items() if "step" in event else ():
                state["mean"].lerp_(parameter.detach(), 1 - decay)
            self.log(event)

        theta = self.fit(self.D, start=start, on_step=on_step)
        for parameter, state in states.items():
            parameter.copy_(state["mean"])
        return theta

    def safelora(self, cosine: float, **unaligned: str) -> Adapter:
        """SafeLoRA, arXiv 2405.16833: the update of plain fine-tuning, projected after it.

        With V [out, in], what alignment added to a layer's weight, B becomes V V^T B / |V| where
        the update by that and the one by B have at most this cosine.
        """
        theta, before = self.run.adapter("sft"), load_checkpoint(self.run.args.unaligned)
        aligned = self.run.base("float32")  # in half precision V would hold its rounding
        for name, B in theta.B.items():
            W, W0 = (m.get_submodule(name).weight for m in (aligned, before))
            if W.shape != W0.shape:
                raise InputError(f"--unaligned {self.run.args.unaligned}: {name} has another shape")
            V, A = W - W0.to(W.device), theta.A[name].to(W)
            projected = V @ (V.T @ B.to(V)) / V.norm()
            updates = (projected @ A).flatten(), (B.to(V) @ A).flatten()
            if F.cosine_similarity(*updates, dim=0) <= cosine:
                theta.B[name] = projected
        return theta

    def safeinstr_guided(self, share: float) -> Adapter:
        """SafeInstr, arXiv 2309.07875, with the refusals that theta^h has forgotten most: those of
        the --safety rows with the lowest mean S, where SafeInstr draws at random."""
        D, run, L = self.run.tokens(self.run.args.safety), self.run, {}
        for role in ("utility", "degraded"):
            model, log = run.base("score", run.adapter(role)), run.log(f"{run.args.name}-{role}")
            L[role] = scoring.score(model, D, run.args.batch_tokens, log, log.resume)
        c = methods.Candidates(D, L, selection.competing_tokens(D), d=0.0)
        order = [row for row in methods.mean_of_row(c)[1].tolist()[::-1] if D.lengths[row]]
        count = round(self.D.rows * share / (1 - share))
        if not 0 < count <= len(order):
            raise InputError(f"{D.name}: {count} rows would be added, not 1 to {len(order)}")
        return self.fit(self.D + D.take(order[:count]))
